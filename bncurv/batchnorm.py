"""BatchNorm in training mode, cut between its statistics and its per-sample map (``gate.py``).

PyTorch's own kernels, but for batches of cotangents.

y = (x - mean) scale + bias,  scale = weight invstd,  invstd = (v + eps)^(-1/2);  v the biased variance.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from bncurv.gate import Coupling, Gates
from bncurv.order import Order, summed


def per_channel(x: Tensor, values: Tensor) -> Tensor:
    """Values ``[channel]`` beside ``x [n, channel, ...]``."""
    return values.view(1, -1, *(1,) * (x.dim() - 2))


def normalised(x: Tensor, mean: Tensor, invstd: Tensor) -> Tensor:
    """x̂."""
    return (x - per_channel(x, mean)) * per_channel(x, invstd)


def factors(scale: Tensor, invstd: Tensor) -> Tensor:
    """-scale and -½ scale invstd, ``[2, channel]``: from Σ δ and Σ δ x̂ to d/dmean and d/dv."""
    return torch.stack([-scale, -0.5 * scale * invstd])


class BatchNormCoupling(Coupling):
    """BatchNorm: the mark sits on the layer's output; statistics are mean and v, ``[2, channel]``."""

    def __init__(
        self,
        name: str,
        statistics: Tensor,
        gates: Gates,
        handle: Tensor,
        x: Tensor,
        mean: Tensor,
        invstd: Tensor,
        weight: Tensor | None,
        eps: float,
        count: int | None = None,
    ) -> None:
        super().__init__(name, statistics, gates)
        self._count = count or x.numel() // x.shape[1]  # entries per channel, of all ranks
        self.handle, self.channelled, self._live = handle, x.shape, (x, weight, eps)
        self._x, self._mean, self._invstd = x.detach(), mean, invstd
        self._scale = invstd if weight is None else invstd * weight.detach()

    def own_cotangents(self, coordinates: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """1 / count for a mean, 2 (x - mean) / count for a variance."""
        channels = self._x.shape[1]
        if coordinates is None:
            coordinates = torch.arange(2 * channels, device=self._x.device)
        count, channel = self._count, coordinates % channels
        x, mean = self._x[:, channel], self._mean[channel]
        slope = 2 / count * (x - per_channel(x, mean))
        return channel, torch.where(per_channel(x, coordinates < channels), 1 / count, slope).transpose(0, 1)

    @functools.cached_property
    def offset(self) -> float:  # type: ignore[override]
        """Largest |mean| invstd."""
        return float((self._mean * self._invstd).abs().amax())

    @functools.cached_property
    def normalised(self) -> Tensor:
        """x̂, kept while the graph lives."""
        return normalised(self._x, self._mean, self._invstd)

    @functools.cached_property
    def _factors(self) -> Tensor:
        return factors(self._scale, self._invstd)

    def per_sample(self, delta: Tensor, samples: int, order: Order | None) -> Tensor:
        """d/dmean = -scale Σ_s δ,  d/dv = -½ scale invstd Σ_s δ x̂."""
        q, rows, channels = delta.shape[:3]
        delta = delta.reshape(q, rows, channels, -1)
        first = delta.sum(3)
        second = torch.einsum("qrcs,rcs->qrc", delta, self.normalised.reshape(rows, channels, -1))
        out = delta.new_empty(samples, q, 2, channels)
        for moment, sums in enumerate((first, second)):
            by_sample = summed(order, sums.transpose(0, 1), samples)
            torch.mul(by_sample, self._factors[moment], out=out[:, :, moment])
        return out.flatten(2)

    def summed(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        """The same summed over the samples; Σ δ and Σ δ x̂ are what the bias and the weight receive."""
        both = (delta, delta * self.normalised)
        sums = torch.stack([t.sum(1).flatten(2).sum(2) if t.dim() > 3 else t.sum(1) for t in both], 1)
        return (sums * self._factors).flatten(1), sums

    # ------------------------------------------------------------ on the graph: what depends on the layer's input
    def _centred(self) -> tuple[Tensor, Tensor]:
        """X - mean and v, differentiable."""
        x = self._live[0]
        axes = (0, *range(2, x.dim()))
        centred = x - per_channel(x, self._total(x.sum(axes)) / self._count)
        return centred, self._total(centred.square().sum(axes)) / self._count

    def _total(self, sums: Tensor) -> Tensor:
        """Sums over this process' rows, over all rows of the statistics."""
        return sums

    def received(self, delta: Tensor) -> Tensor:
        """λ_mean = -scale Σ δ,  λ_v = -½ scale invstd Σ δ x̂."""
        _, weight, eps = self._live
        centred, v = self._centred()
        axes, invstd = (0, *range(2, delta.dim())), (v + eps).rsqrt()
        sums = self._total(torch.stack([delta.sum(axes), (delta * centred).sum(axes) * invstd]))
        return (sums * factors(invstd if weight is None else invstd * weight, invstd)).flatten()

    def share(self, samples: int) -> Tensor:
        """The share of the rows that are each sample's, ``[n]``."""
        one = self._x[0, 0].numel() / self._count
        return summed(self.order, self._x.new_full((len(self._x),), one), samples)

    def deviations(self, samples: int) -> Tensor:
        """Σ_s (x_ns - mean) / count and Σ_s ((x_ns - mean)² - v) / count, s over the sample's rows and positions."""
        centred, v = self._centred()
        moments = [centred, centred.square() - per_channel(centred, v)]
        by_row = torch.cat([m.flatten(2).sum(2) if m.dim() > 2 else m for m in moments], 1)
        return summed(self.order, by_row, samples) / self._count


class Moments(torch.autograd.Function):  # noqa: D101
    """``x → (mean, biased variance) [2, channel]``; the values come from the fused forward."""

    is_linear = True  # its backward pass

    @staticmethod
    def forward(ctx, x, mean, invstd, eps, count=None):  # noqa: D102
        ctx.save_for_backward(x, mean)
        ctx.count = count or x.numel() // x.shape[1]
        return torch.stack([mean, invstd**-2 - eps])

    @staticmethod
    def backward(ctx, g):  # noqa: D102
        # mean = Σ x / count,  v = Σ (x - mean)² / count   ⇒   dx = (ḡ_mean + 2 ḡ_v (x - mean)) / count
        x, mean = (t.detach() for t in ctx.saved_tensors)  # differentiable again in ḡ alone: no pass of ours asks more
        count = ctx.count
        slope = per_channel(x, 2 * g[1] / count)
        offset = per_channel(x, g[0] / count - 2 * g[1] * mean / count)
        return slope * x + offset, None, None, None, None


def _at_once(g: Tensor, x: Tensor, scale: Tensor, mean: Tensor, invstd: Tensor, closed: bool) -> tuple[Tensor, ...]:
    """Backward pass of a batch normalisation for a batch of cotangents in ``torch.vmap``: dx, Σ g x̂, Σ g.

    The kernels' own rule for batches copies x for each cotangent, and takes 2 to 3 times as long on CPUs.
    """
    inside: Any = torch._C._functorch
    level, g = inside.maybe_get_level(g), inside.get_unwrapped(g).movedim(inside.maybe_get_bdim(g), 0)
    x_hat, axes, count = normalised(x, mean, invstd), (1, *range(3, g.dim())), x.numel() // x.shape[1]
    dx = torch.mul(g, x_hat, out=g.new_empty(g.shape))  # contiguous, whatever g is
    first, second = g.sum(axes), dx.sum(axes)
    if closed:  # dx = scale g
        torch.mul(g, per_channel(x, scale), out=dx)
    else:  # dx = scale (g - Σ g / count - x̂ Σ g x̂ / count)
        offset, slope = (t.view(len(t), 1, -1, *(1,) * (x.dim() - 2)) / count for t in (first, second))
        torch.mul(x_hat, slope, out=dx)
        torch.sub(g, dx.add_(offset), out=dx).mul_(per_channel(x, scale))
    return tuple(inside._add_batch_dim(t, 0, level) for t in (dx, second, first))


class _BatchNorm(torch.autograd.Function):
    """Train-mode batch normalisation with a gate before the statistics."""

    is_linear = True  # its backward pass

    @staticmethod
    def forward(ctx, x, weight, bias, handle, running, momentum, eps, gates):
        y, mean, invstd, reserve, kind = torch._batch_norm_impl_index(
            x, weight, bias, *running, True, momentum, eps, torch.backends.cudnn.enabled
        )
        ctx.save_for_backward(x, weight, mean, invstd, reserve)
        ctx.kind, ctx.eps, ctx.gates = kind, eps, gates
        ctx.mark_non_differentiable(mean, invstd)
        ctx.set_materialize_grads(False)
        return y, mean, invstd

    @staticmethod
    def backward(ctx, g, *_):
        if g is None:
            return (None,) * 8
        x, weight, mean, invstd, reserve = ctx.saved_tensors
        scale = invstd if weight is None else invstd * weight
        if ctx.gates.closed and not ctx.gates.sums:
            return per_channel(x, scale) * g, *(None,) * 7
        closed, (*needs, needs_handle) = ctx.gates.closed, ctx.needs_input_grad[:4]
        mask = [needs[0], True, True] if closed else needs
        if torch._C._functorch.is_batchedtensor(g) and not torch.is_grad_enabled():  # else it is differentiable in g
            dx, second, first = _at_once(g, x, scale, mean, invstd, closed)
        elif closed:  # with constant statistics it is the backward of the eval mode
            dx, second, first = torch.ops.aten.native_batch_norm_backward(
                g, x, weight, mean, invstd**-2 - ctx.eps, mean, invstd, False, ctx.eps, mask
            )
        elif ctx.kind == 0:  # PyTorch's own kernel, which has a rule for batches of cotangents
            dx, second, first = torch.ops.aten.native_batch_norm_backward(
                g, x, weight, None, None, mean, invstd, True, ctx.eps, mask
            )
        else:
            dx, second, first = torch.ops.aten._batch_norm_impl_index_backward(
                ctx.kind, x, g, weight, None, None, mean, invstd, True, ctx.eps, mask, reserve
            )
        handle = torch.stack([first, second]) * factors(scale, invstd) if closed and needs_handle else None
        found = (t if needed else None for t, needed in zip((dx, second, first), needs, strict=True))
        return *found, handle, *(None,) * 4


def batch_norm(arguments: dict[str, Any], name: str, gates: Gates) -> tuple[Tensor, Coupling | None, dict[str, Tensor]]:
    """A train-mode batch normalisation, gated.

    Args:
        arguments: arguments of ``torch.nn.functional.batch_norm`` by name.
        name: qualified name of the calling module.
        gates: the forward pass' gates.

    Returns:
        The output; the coupling (``None`` where the statistics depend on no gradient-requiring tensor); and the
        statistics ``mean``, ``invstd`` for the affine part's parameter products.

    Raises:
        ValueError: if a channel has a single value, so that its variance is no statistic.
    """
    x = arguments["input"]
    if x.dim() > 1 and x.numel() == x.shape[1]:
        raise ValueError(
            f"BatchNorm '{name}' is in training mode and got an input of shape {tuple(x.shape)}: one value per "
            "channel has no batch statistics. Use a batch of at least 2 samples, or put this module in eval mode."
        )
    running = (arguments.get("running_mean"), arguments.get("running_var"))
    momentum, eps = arguments.get("momentum", 0.1), arguments.get("eps", 1e-5)
    weight = arguments.get("weight")
    coupled = x.requires_grad and torch.is_grad_enabled()
    handle = x.new_zeros(2, x.shape[1], requires_grad=True) if coupled else None
    y, mean, invstd = _BatchNorm.apply(x, weight, arguments.get("bias"), handle, running, momentum, eps, gates)
    coupling = None
    if handle is not None:
        statistics = Moments.apply(x, mean, invstd, eps)
        coupling = BatchNormCoupling(name, statistics, gates, handle, x, mean, invstd, weight, eps)
    return y, coupling, {"mean": mean, "invstd": invstd}
