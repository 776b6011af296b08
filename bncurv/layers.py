"""Parameter products: how the cotangent of a layer's output becomes that of its parameters.

Every layer here is linear in its parameters and acts on one sample at a time, so each product is one
contraction of two operands (glossary of the letters: head of ``engine.py``)

    left  [q, n, g, o, s]    from the cotangents of the layer's output, q of them at once
    right [n, g, i, s]       from the layer's input; ``None`` stands for ones (i = 1)

    per sample   out[n, q, g, o, i] = Σ_s   left[q, n, g, o, s] right[n, g, i, s]
    summed       out[q, g, o, i]    = Σ_n,s left[q, n, g, o, s] right[n, g, i, s]

with g = group, o/i = output/input feature of the group, s = position inside a sample. ``LAYERS`` is the one
table: torch function → how to build the operands. A new layer is one more row (`register_layer`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as nnf
from einops import rearrange, reduce
from torch import Tensor


class Product(NamedTuple):
    """Operands of a parameter product, shapes as in the module's docstring."""

    left: Tensor
    right: Tensor | None

    def per_sample(self) -> Tensor:
        """Contract positions: ``[n, q, g, o, i]``."""
        left, right = self
        if right is None:
            return rearrange(left.sum(-1), "q n g o -> n q g o 1")
        q, _, g, o, s = left.shape
        i = right.shape[2]
        if o == i == 1:
            return rearrange(torch.einsum("qngos,ngis->nqgo", left, right), "n q g o -> n q g o 1")
        if g == s == 1:  # outer products: a write-bound multiplication, not a matrix product
            return rearrange(left, "q n 1 o 1 -> n q 1 o 1") * rearrange(right, "n 1 i 1 -> n 1 1 1 i")
        rows = rearrange(left, "q n g o s -> n g (q o) s") @ right.mT
        return rearrange(rows, "n g (q o) i -> n q g o i", q=q)

    def summed(self) -> Tensor:
        """Contract positions and samples: ``[q, g, o, i]``."""
        left, right = self
        if right is None:
            return reduce(left, "q n g o s -> q g o 1", "sum")
        q, _, _, o, _ = left.shape
        if o == right.shape[2] == 1:
            return torch.einsum("qngos,ngis->qgo", left, right)[..., None]
        rows = rearrange(left, "q n g o s -> g (q o) (n s)") @ rearrange(right, "n g i s -> g (n s) i")
        return rearrange(rows, "g (q o) i -> q g o i", q=q)


class Layer(ABC):
    """One row of the table: a torch function that is linear in its parameters, sample by sample.

    Attributes:
        arguments: names of the function's arguments in positional order; the first is the input.
        parameters: which of them are parameters; the method of that name builds the product's operands.
        flops: floating point operations of the forward pass per output entry and entry of the weight's
            row; 0 where the work is elementwise.
    """

    arguments: tuple[str, ...] = ("input", "weight", "bias")
    parameters: tuple[str, ...] = ("weight", "bias")

    def accepts(self, arguments: dict[str, Any]) -> bool:
        """Whether a call with these arguments is covered; otherwise its parameters go the dense way."""
        return True

    @abstractmethod
    def weight(self, arguments: dict[str, Any], x: Tensor, delta: Tensor) -> Product:
        """Operands for the weight from the input ``x [n, ...]`` and the cotangents ``delta [q, n, ...]``."""

    @abstractmethod
    def bias(self, arguments: dict[str, Any], x: Tensor, delta: Tensor) -> Product:
        """Operands for the bias."""

    def unfold(self, result: Tensor, shape: torch.Size) -> Tensor:
        """Bring ``result [..., g, o, i]`` into the parameter's ``shape``."""
        return result.reshape(*result.shape[:-3], *shape)

    def flops(self, arguments: dict[str, Any], output: torch.Size) -> float:
        """Multiplications and additions of one forward call (0: elementwise, not worth counting)."""
        return 0.0


class Linear(Layer):
    """``y = x Wᵀ + b``: s runs over all axes between the sample and the feature."""

    def _left(self, delta: Tensor) -> Tensor:
        q, n, *_, o = delta.shape
        return rearrange(delta.reshape(q, n, -1, o), "q n s o -> q n 1 o s")

    def weight(self, arguments, x, delta):
        right = rearrange(x.reshape(x.shape[0], -1, x.shape[-1]), "n s i -> n 1 i s")
        return Product(self._left(delta), right)

    def bias(self, arguments, x, delta):
        return Product(self._left(delta), None)

    def flops(self, arguments, output):
        return 2.0 * output.numel() * arguments["weight"].shape[-1]


def _tuple(value: int | Sequence[int], length: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * length
    return tuple(value) * (length if len(value) == 1 else 1)


def windows(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
) -> Tensor:
    """All windows a kernel sees: ``[n, channel, *kernel, *position]``, a strided view of the padded input."""
    x = nnf.pad(x, [p for lo_hi in reversed(padding) for p in lo_hi])
    size, step = x.shape[2:], x.stride()[2:]
    geometry = list(zip(size, kernel, stride, dilation, strict=True))
    positions = [(length - d * (k - 1) - 1) // st + 1 for length, k, st, d in geometry]
    return x.as_strided(
        (*x.shape[:2], *kernel, *positions),
        (
            *x.stride()[:2],
            *(a * d for a, d in zip(step, dilation, strict=True)),
            *(a * st for a, st in zip(step, stride, strict=True)),
        ),
    )


class Conv(Layer):
    """Convolution in any number of dimensions: windows of the input against the output's cotangent."""

    arguments = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")

    def accepts(self, arguments):
        return arguments["input"].dim() == arguments["weight"].dim()  # not the unbatched form

    def _geometry(self, arguments: dict[str, Any]) -> tuple:
        kernel = tuple(arguments["weight"].shape[2:])
        dims = len(kernel)
        stride = _tuple(arguments.get("stride", 1), dims)
        dilation = _tuple(arguments.get("dilation", 1), dims)
        padding = arguments.get("padding", 0)
        if padding == "same":
            total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
            pads = [(t // 2, t - t // 2) for t in total]
        else:
            padding = 0 if padding == "valid" else padding
            pads = [(p, p) for p in _tuple(padding, dims)]
        return kernel, stride, pads, dilation

    def weight(self, arguments, x, delta):
        groups = arguments.get("groups", 1)
        seen = windows(x, *self._geometry(arguments)).flatten(2 + delta.dim() - 3).flatten(2, -2)
        right = rearrange(seen, "n (g c) k s -> n g (c k) s", g=groups)
        return Product(self._left(arguments, delta), right)

    def bias(self, arguments, x, delta):
        return Product(self._left(arguments, delta), None)

    def _left(self, arguments: dict[str, Any], delta: Tensor) -> Tensor:
        return rearrange(delta.flatten(3), "q n (g o) s -> q n g o s", g=arguments.get("groups", 1))

    def flops(self, arguments, output):
        return 2.0 * output.numel() * arguments["weight"][0].numel()


class ConvTranspose(Conv):
    """Transposed convolution: windows of the output's cotangent against the input."""

    arguments = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")

    def weight(self, arguments, x, delta):
        groups, (q, n) = arguments.get("groups", 1), delta.shape[:2]
        seen = windows(delta.flatten(0, 1), *self._geometry(arguments))
        dims = x.dim() - 2
        for axis, length in enumerate(x.shape[2:]):  # output_padding may leave windows beyond the input
            seen = seen.narrow(2 + dims + axis, 0, length)
        seen = seen.flatten(2 + dims).flatten(2, -2)
        left = rearrange(seen, "(q n) (g o) k s -> q n g (o k) s", q=q, n=n, g=groups)
        return Product(left, rearrange(x.flatten(2), "n (g i) s -> n g i s", g=groups))

    def unfold(self, result, shape):
        if result.shape[-1] == 1 and len(shape) == 1:  # the bias
            return super().unfold(result, shape)
        return result.mT.reshape(*result.shape[:-3], *shape)

    def flops(self, arguments, output):
        return 2.0 * arguments["input"].numel() * arguments["weight"][0].numel()


class Affine(Layer):
    """``y = x̂ ∘ weight + bias`` behind a normalisation; subclasses say what x̂ is."""

    @abstractmethod
    def normalised(self, arguments: dict[str, Any], x: Tensor) -> Tensor:
        """The input x̂ of the affine map."""

    def spread(self, arguments: dict[str, Any], t: Tensor, lead: int) -> Tensor:
        """Bring ``t [*lead, n, ...]`` to ``[*lead, n, feature, 1, position]``; features on axis 1."""
        return t.reshape(*t.shape[: lead + 2], 1, -1)

    def weight(self, arguments, x, delta):
        right = self.spread(arguments, self.normalised(arguments, x), 0)
        return Product(self.spread(arguments, delta, 1), right)

    def bias(self, arguments, x, delta):
        return Product(self.spread(arguments, delta, 1), None)


class LayerNorm(Affine):
    """Layer normalisation: features are the trailing axes."""

    arguments = ("input", "normalized_shape", "weight", "bias", "eps")

    def normalised(self, arguments, x):
        return nnf.layer_norm(x, arguments["normalized_shape"], eps=arguments.get("eps", 1e-5))

    def spread(self, arguments, t, lead):
        features = len(arguments["normalized_shape"])
        flat = t.reshape(*t.shape[: lead + 1], -1, t.shape[-features:].numel())
        return flat.mT.unsqueeze(-2)


class GroupNorm(Affine):
    """Group normalisation."""

    arguments = ("input", "num_groups", "weight", "bias", "eps")

    def normalised(self, arguments, x):
        return nnf.group_norm(x, arguments["num_groups"], eps=arguments.get("eps", 1e-5))


class InstanceNorm(Affine):
    """Instance normalisation, with the instance's own or with running statistics."""

    arguments = ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps")

    def normalised(self, arguments, x):
        eps = arguments.get("eps", 1e-5)
        if arguments.get("use_input_stats", True):
            return nnf.instance_norm(x, eps=eps)
        return nnf.batch_norm(x, arguments["running_mean"], arguments["running_var"], eps=eps)


class BatchNormEval(Affine):
    """Batch normalisation with running statistics: an affine map per channel."""

    arguments = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")

    def accepts(self, arguments):
        return not arguments.get("training", False)  # training: statistics.py

    def normalised(self, arguments, x):
        eps = arguments.get("eps", 1e-5)
        return nnf.batch_norm(x, arguments["running_mean"], arguments["running_var"], eps=eps)


class BatchNormTrain(Affine):
    """Affine part of a train-mode batch normalisation; ``mean`` and ``invstd`` are the batch's."""

    def normalised(self, arguments, x):
        axes = (1, -1) + (1,) * (x.dim() - 2)
        return (x - arguments["mean"].view(axes)) * arguments["invstd"].view(axes)


class Embedding(Layer):
    """Table look-up: the one-hot rows of the indices are the input."""

    arguments = (
        "input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse",
    )  # fmt: skip
    parameters = ("weight",)

    def accepts(self, arguments):
        return arguments.get("max_norm") is None and not arguments.get("scale_grad_by_freq")

    def weight(self, arguments, x, delta):
        count, width = arguments["weight"].shape
        hot = nnf.one_hot(x.reshape(len(x), -1), count).to(delta.dtype)
        padding = arguments.get("padding_idx")
        if padding is not None:
            hot[..., padding] = 0
        left = rearrange(delta.reshape(*delta.shape[:2], -1, width), "q n s o -> q n 1 o s")
        return Product(left, rearrange(hot, "n s i -> n 1 i s"))

    def bias(self, arguments, x, delta):
        raise NotImplementedError("an embedding has no bias")

    def unfold(self, result, shape):
        return result.mT.reshape(*result.shape[:-3], *shape)


LAYERS: dict[Callable, Layer] = {
    nnf.linear: Linear(),
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), Conv()),
    **dict.fromkeys(
        (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d), ConvTranspose()
    ),
    nnf.layer_norm: LayerNorm(),
    nnf.group_norm: GroupNorm(),
    nnf.instance_norm: InstanceNorm(),
    nnf.batch_norm: BatchNormEval(),
    nnf.embedding: Embedding(),
}


def register_layer(function: Callable, layer: Layer) -> None:
    """Add a row to the table: calls of ``function`` get their parameter products from ``layer``.

    Args:
        function: a torch function (``torch.nn.functional.*``, ``torch.*``) that dispatches to
            ``__torch_function__``, e.g. ``torch.nn.functional.bilinear``.
        layer: how to build the operands of its products.
    """
    LAYERS[function] = layer
