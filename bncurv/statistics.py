"""START HERE. The cut: a train-mode BatchNorm as batch statistics + a per-sample map, with a gate between.

A layer that couples the samples of a batch is two steps, ``stats = stats(x)`` over the whole batch and then a
*per-sample* map ``y_n = apply(x_n, stats)``. The gate between them decides what backpropagation sees:

    open     the whole layer, ``y = apply(x, stats(x))`` (the truth; also what ``loss.backward()`` sees)
    closed   the statistics held constant: nothing flows from one sample to another; what would have flowed
             into the statistics is read off per sample instead (`Coupling.per_sample`: the coefficients A).

``statistics`` itself is a node of the graph, so that d statistics / d θ (P) is an ordinary backward pass from there.
BatchNorm is built in, fused: its forward and open backward are PyTorch's own kernels, to the bit. Any other layer
of this form joins by `register_coupled`.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Gates:
    """All gates of one forward pass, open unless bncurv closes them."""

    def __init__(self) -> None:
        self.closed = False


class Coupling(ABC):
    """What one forward call of a coupled layer leaves behind.

    Attributes:
        name: qualified name of the module that made the call.
        statistics: the batch statistics, a node of the graph above the layer's input.
        gates: the forward pass' gates.
    """

    def __init__(self, name: str, statistics: Tensor, gates: Gates) -> None:
        self.name, self.statistics, self.gates = name, statistics, gates

    @abstractmethod
    def per_sample(self, delta: Tensor) -> Tensor:
        """Closed gates: gradient with respect to sample n's use of the statistics, ``[q, n, R]``.

        Args:
            delta: cotangents ``[q, n, ...]`` at the edge where the recorder put the mark.
        """

    def summed(self, delta: Tensor) -> Tensor:
        """The same summed over the samples, ``[q, R]``."""
        return self.per_sample(delta).sum(1)


class HandleCoupling(Coupling):
    """General pair: the mark sits on the per-sample copies of the statistics, whose gradient is the answer."""

    def per_sample(self, delta: Tensor) -> Tensor:
        """Flatten the copies' gradient."""
        return delta.reshape(*delta.shape[:2], -1)


class BatchNormCoupling(Coupling):
    """BatchNorm: the mark sits on the layer's output y = (x - mean) scale + bias, scale = weight (v + eps)^(-1/2)."""

    def __init__(self, name, statistics, gates, x, mean, invstd, weight) -> None:
        super().__init__(name, statistics, gates)
        self._x, self._mean, self._invstd = x, mean, invstd
        self._scale = invstd if weight is None else invstd * weight

    @property
    def shape(self) -> torch.Size:
        """Shape of the layer's input."""
        return self._x.shape

    def own_cotangents(self) -> Tensor:
        """D mean / dx and d v / dx of every channel's own entries, ``[2, *x]``: 1/m and 2 (x - mean)/m."""
        m = self._x.numel() // self._x.shape[1]
        centred = self._x - _per_channel(self._x, self._mean)
        return torch.stack([torch.full_like(centred, 1 / m), 2 / m * centred])

    @functools.cached_property
    def _moments(self) -> Tensor:
        """Ones and x̂ per channel, ``[c, (n s), 2]``."""
        hat = rearrange(
            self.normalised.flatten(2) if self._x.dim() > 2 else self.normalised[..., None], "n c s -> c (n s)"
        )
        return torch.stack([torch.ones_like(hat), hat], -1)

    @functools.cached_property
    def normalised(self) -> Tensor:
        """x̂, kept while the graph lives."""
        return (self._x - _per_channel(self._x, self._mean)) * _per_channel(self._x, self._invstd)

    def per_sample(self, delta: Tensor) -> Tensor:
        """d/dmean = -scale Σ_s δ,  d/dv = -½ scale invstd Σ_s δ x̂."""
        q, n, channels = delta.shape[:3]
        delta = delta.reshape(q, n, channels, -1)
        first = delta.sum(3)
        second = torch.einsum("qncs,ncs->qnc", delta, self.normalised.reshape(n, channels, -1))
        return self._coefficients(first, second)

    def summed(self, delta: Tensor) -> Tensor:
        """The same; the two sums over samples and positions are one batched matrix product."""
        q, n, channels = delta.shape[:3]
        rows = rearrange(delta.reshape(q, n, channels, -1), "q n c s -> c q (n s)")
        first, second = torch.matmul(rows, self._moments).unbind(-1)
        return self._coefficients(first.T, second.T)

    def _coefficients(self, first: Tensor, second: Tensor) -> Tensor:
        return -torch.cat([self._scale * first, 0.5 * self._invstd * self._scale * second], -1)


def _per_channel(x: Tensor, t: Tensor) -> Tensor:
    return t.view(1, -1, *(1,) * (x.dim() - 2))


class _Moments(torch.autograd.Function):
    """``x → (mean, biased variance) [2, channel]``; the values come from the fused forward."""

    @staticmethod
    def forward(ctx, x, mean, invstd, eps):
        ctx.save_for_backward(x, mean)
        return torch.stack([mean, invstd**-2 - eps])

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        # x̄ = Σ x / m,  v = Σ (x - x̄)² / m   ⇒   dx = (ḡ + 2 v̄ (x - x̄)) / m
        x, mean = ctx.saved_tensors
        m = x.numel() // x.shape[1]
        slope = _per_channel(x, 2 * g[1] / m)
        offset = _per_channel(x, g[0] / m - 2 * g[1] * mean / m)
        return slope * x + offset, None, None, None


class _BatchNorm(torch.autograd.Function):
    """Train-mode batch normalisation, PyTorch's own kernels, with a gate before the statistics."""

    @staticmethod
    def forward(ctx, x, weight, bias, running, momentum, eps, gates):
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
            return (None,) * 7
        x, weight, mean, invstd, reserve = ctx.saved_tensors
        if ctx.gates.closed:
            return _per_channel(x, invstd if weight is None else invstd * weight) * g, *(None,) * 6
        mask = list(ctx.needs_input_grad[:3])
        if ctx.kind == 0:  # PyTorch's own kernel, which has a rule for batches of cotangents
            dx, dw, db = torch.ops.aten.native_batch_norm_backward(
                g, x, weight, None, None, mean, invstd, True, ctx.eps, mask
            )
        else:
            dx, dw, db = torch.ops.aten._batch_norm_impl_index_backward(
                ctx.kind, x, g, weight, None, None, mean, invstd, True, ctx.eps, mask, reserve
            )
        return *(t if needed else None for t, needed in zip((dx, dw, db), mask, strict=True)), None, None, None, None


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
    y, mean, invstd = _BatchNorm.apply(x, weight, arguments.get("bias"), running, momentum, eps, gates)
    coupling = None
    if x.requires_grad and torch.is_grad_enabled():
        statistics = _Moments.apply(x, mean, invstd, eps)
        fixed = None if weight is None else weight.detach()
        coupling = BatchNormCoupling(name, statistics, gates, x.detach(), mean, invstd, fixed)
    return y, coupling, {"mean": mean, "invstd": invstd}


class _Gate(torch.autograd.Function):
    """Identity; closed, it lets no cotangent through."""

    @staticmethod
    def forward(ctx, statistics, gates):
        ctx.gates = gates
        return statistics.clone()

    @staticmethod
    def backward(ctx, g):
        return (None if ctx.gates.closed else g), None


def couple(
    stats: Callable[[Tensor], Tensor],
    apply: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    name: str,
    gates: Gates,
) -> tuple[Tensor, Tensor, Coupling | None]:
    """General pair: ``y = apply(x, copies)`` with one gated copy of ``stats(x)`` per sample; y, copies, coupling."""
    statistics = stats(x)
    gated = _Gate.apply(statistics, gates)
    handle = gated.expand(x.shape[0], *statistics.shape)
    y = apply(x, handle)
    if not statistics.requires_grad:
        return y, handle, None
    return y, handle, HandleCoupling(name, statistics, gates)


@dataclass(frozen=True)
class CoupledLayer:
    """A coupled layer's pair of functions, see `register_coupled`."""

    stats: Callable[[nn.Module, Tensor], Tensor]
    apply: Callable[[nn.Module, Tensor, Tensor], Tensor]


COUPLED: dict[type[nn.Module], CoupledLayer] = {}


def register_coupled(
    module_class: type[nn.Module],
    stats: Callable[[nn.Module, Tensor], Tensor],
    apply: Callable[[nn.Module, Tensor, Tensor], Tensor],
) -> None:
    """Teach bncurv a layer that couples the samples of a batch through batch statistics.

    Whenever a module of this class (exactly) runs under bncurv, its output is recomputed as
    ``apply(module, x, copies)``; a certificate checks that nothing but the statistics couples samples.

    Args:
        module_class: the layer's class; its forward takes one tensor ``x [N, ...]``.
        stats: ``(module, x) -> Tensor [*s]``, the batch statistics (stack several into one tensor).
        apply: ``(module, x, copies) -> y`` with ``copies [N, *s]``: the rest of the layer, where sample ``n``
            uses ``copies[n]`` only. ``apply(module, x, stats(module, x).expand(N, ...))`` must equal the
            module's own output.
    """
    COUPLED[module_class] = CoupledLayer(stats, apply)
