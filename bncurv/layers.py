"""Parameter products: how the cotangent of a layer's output becomes that of its parameters.

Every layer here is linear in its parameters and acts on one sample at a time, so each product is one
contraction of two operands (glossary of the letters: head of ``engine.py``)

    left  [q, n, g, o, s]    from the cotangents of the layer's output, q of them at once
    right [g, n, s, i]       from the layer's input; ``None`` stands for ones (i = 1)

    per sample   out[n, q, g, o, i] = Σ_s   left[q, n, g, o, s] right[g, n, s, i]
    summed       out[q, g, o, i]    = Σ_n,s left[q, n, g, o, s] right[g, n, s, i]

with g = group, o/i = output/input feature of the group, s = position inside a sample. ``LAYERS`` is the one
table: torch function → how to build the operands. A new layer is one more row (`register_layer`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as nnf
from einops import rearrange, reduce
from torch import Tensor

from bncurv.convolution import Geometry, one_channel_back, per_axis, windows

Arguments = dict[str, Any]


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
        i = right.shape[3]
        if o == i == 1:
            return rearrange(torch.einsum("qngos,gnsi->nqgo", left, right), "n q g o -> n q g o 1")
        if g == s == 1:  # outer products: a write-bound multiplication, not a matrix product
            return rearrange(left, "q n 1 o 1 -> n q 1 o 1") * rearrange(right, "1 n 1 i -> n 1 1 1 i")
        rows = rearrange(left, "q n g o s -> n g (q o) s") @ right.transpose(0, 1)
        return rearrange(rows, "n g (q o) i -> n q g o i", q=q)

    def summed(self) -> Tensor:
        """Contract positions and samples: ``[q, g, o, i]``."""
        left, right = self
        if right is None:
            return reduce(left, "q n g o s -> q g o 1", "sum")
        q, _, _, o, _ = left.shape
        if o == right.shape[3] == 1:
            return torch.einsum("qngos,gnsi->qgo", left, right)[..., None]
        rows = rearrange(left, "q n g o s -> g (q o) (n s)") @ right.flatten(1, 2)
        return rearrange(rows, "g (q o) i -> q g o i", q=q)


class Layer(ABC):
    """One row of the table: a torch function that is linear in its parameters, sample by sample.

    Attributes:
        arguments: names of the function's arguments in positional order; the first is the input.
        parameters: which of them are parameters (their *roles*).
        inputs: which arguments have samples on the first axis; the operands are built from some samples of them.
    """

    arguments: tuple[str, ...] = ("input", "weight", "bias")
    inputs: tuple[str, ...] = ("input",)
    parameters: tuple[str, ...] = ("weight", "bias")

    def accepts(self, arguments: Arguments) -> bool:
        """Whether a call with these arguments is covered; otherwise its parameters go the dense way."""
        return True

    def row_axes(self, arguments: Arguments) -> int:
        """How many leading axes of input and output the function treats alike; the first one at least."""
        return 1

    def channels_lead(self, output: torch.Size) -> bool:
        """Whether axis 0 of every parameter is axis 1 of an output of this shape, entry by entry."""
        return False

    def from_channels(self, arguments: Arguments, delta: Tensor, channels: Tensor) -> Tensor:
        """Cotangents ``[q, n, ...]`` of the input from those of the output that are zero but for one channel each.

        Asked for where channels lead.

        Args:
            arguments: the call's.
            delta: cotangents of that channel, ``[q, n, *position]``.
            channels: which one, ``[q]``.
        """
        raise NotImplementedError(f"{type(self).__name__}.channels_lead is true, so it must define from_channels.")

    @abstractmethod
    def left(self, role: str, arguments: Arguments, delta: Tensor) -> Tensor:
        """Left operand ``[q, n, g, o, s]`` from the cotangents ``delta [q, n, ...]`` of the output."""

    @abstractmethod
    def right(self, role: str, arguments: Arguments, x: Any) -> Tensor | None:
        """Right operand ``[g, n, s, i]`` from the input ``x [n, ...]``; ``None`` for ones.

        ``arguments`` holds the same samples of the other ``inputs``.
        """

    def unfold(self, role: str, result: Tensor, shape: torch.Size) -> Tensor:
        """Bring ``result [..., g, o, i]`` into the parameter's ``shape``."""
        return result.reshape(*result.shape[:-3], *shape)

    def flops(self, arguments: Arguments, output: torch.Size) -> float:
        """Multiplications and additions of one forward call (0: elementwise, not worth counting)."""
        return 0.0


class Linear(Layer):
    """``y = x Wᵀ + b``: s runs over all axes between the sample and the feature."""

    def row_axes(self, arguments):
        return arguments["input"].dim() - 1

    def accepts(self, arguments):
        # not the unbatched form, a weight that is a vector, or a bias that is broadcast
        bias = arguments.get("bias")
        plain = bias is None or bias.shape == arguments["weight"].shape[:1]
        return arguments["input"].dim() > 1 and arguments["weight"].dim() == 2 and plain

    def channels_lead(self, output):
        return len(output) == 2

    def left(self, role, arguments, delta):
        q, n, *_, o = delta.shape
        return rearrange(delta.reshape(q, n, -1, o), "q n s o -> q n 1 o s")

    def right(self, role, arguments, x):
        return x.reshape(1, x.shape[0], -1, x.shape[-1]) if role == "weight" else None

    def from_channels(self, arguments, delta, channels):
        return delta[..., None] * arguments["weight"][channels, None]

    def flops(self, arguments, output):
        return 2.0 * output.numel() * arguments["weight"].shape[-1]


class Conv(Layer):
    """Convolution in any number of dimensions: windows of the input against the output's cotangent."""

    arguments: tuple[str, ...] = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")

    def accepts(self, arguments):
        return arguments["input"].dim() == arguments["weight"].dim()  # not the unbatched form

    def channels_lead(self, output):
        return True

    def _geometry(self, arguments: Arguments) -> Geometry:
        kernel = tuple(arguments["weight"].shape[2:])
        dims = len(kernel)
        stride = per_axis(arguments.get("stride", 1), dims)
        dilation = per_axis(arguments.get("dilation", 1), dims)
        padding = arguments.get("padding", 0)
        if padding == "same":
            total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
            pads = [(whole // 2, whole - whole // 2) for whole in total]
        else:
            padding = 0 if padding == "valid" else padding
            pads = [(p, p) for p in per_axis(padding, dims)]
        return Geometry(kernel, stride, pads, dilation)

    def from_channels(self, arguments, delta, channels):
        weight, size = arguments["weight"], arguments["input"].shape[2:]
        found = one_channel_back(delta, weight[channels], size, self._geometry(arguments))
        groups = arguments.get("groups", 1)
        if groups == 1:
            return found
        whole = found.new_zeros(*found.shape[:2], groups, *found.shape[2:])
        whole[torch.arange(len(channels), device=channels.device), :, channels // (len(weight) // groups)] = found
        return whole.flatten(2, 3)

    def left(self, role, arguments, delta):
        return rearrange(delta.flatten(3), "q n (g o) s -> q n g o s", g=arguments.get("groups", 1))

    def right(self, role, arguments, x):
        if role == "bias":
            return None
        dims = x.dim() - 2
        seen = windows(x, self._geometry(arguments)).unflatten(1, (arguments.get("groups", 1), -1))
        # [n, g, c, *kernel, *position] → [g, n, s, (c kernel)]
        seen = seen.permute(1, 0, *range(3 + dims, 3 + 2 * dims), 2, *range(3, 3 + dims))
        return seen.reshape(*seen.shape[:2], seen.shape[2 : 2 + dims].numel(), -1)

    def flops(self, arguments, output):
        return 2.0 * output.numel() * arguments["weight"][0].numel()


class ConvTranspose(Conv):
    """Transposed convolution: windows of the output's cotangent against the input."""

    arguments = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")

    def channels_lead(self, output):
        return False

    def left(self, role, arguments, delta):
        if role == "bias":
            return super().left(role, arguments, delta)
        q, n = delta.shape[:2]
        seen = windows(delta.flatten(0, 1), self._geometry(arguments))
        dims = delta.dim() - 3
        for axis, length in enumerate(arguments["input"].shape[2:]):  # output_padding: windows beyond the input
            seen = seen.narrow(2 + dims + axis, 0, length)
        seen = seen.flatten(2 + dims).flatten(2, -2)
        return rearrange(seen, "(q n) (g o) k s -> q n g (o k) s", q=q, n=n, g=arguments.get("groups", 1))

    def right(self, role, arguments, x):
        return (
            rearrange(x.flatten(2), "n (g i) s -> g n s i", g=arguments.get("groups", 1)) if role == "weight" else None
        )

    def unfold(self, role, result, shape):
        return super().unfold(role, result if role == "bias" else result.mT, shape)

    def flops(self, arguments, output):
        return 2.0 * arguments["input"].numel() * arguments["weight"][0].numel()


class Affine(Layer):
    """``y = x̂ ∘ weight + bias`` behind a normalisation; subclasses say what x̂ is."""

    @abstractmethod
    def normalised(self, arguments: Arguments, x: Tensor) -> Tensor:
        """The input x̂ of the affine map."""

    def left(self, role, arguments, delta):
        return self.spread(arguments, delta, 1).unsqueeze(3)

    def right(self, role, arguments, x):
        if role == "bias":
            return None
        return rearrange(self.spread(arguments, self.normalised(arguments, x), 0), "n g s -> g n s 1")

    def spread(self, arguments: Arguments, x: Tensor, lead: int) -> Tensor:
        """Bring ``x [*lead, n, ...]`` to ``[*lead, n, feature, position]``; features are on axis 1 of a sample."""
        return x.reshape(*x.shape[: lead + 2], -1)


class LayerNorm(Affine):
    """Layer normalisation: features are the trailing axes."""

    arguments: tuple[str, ...] = ("input", "normalized_shape", "weight", "bias", "eps")

    def accepts(self, arguments):
        return arguments["input"].dim() > len(arguments["normalized_shape"])  # not over the samples

    def row_axes(self, arguments):
        return arguments["input"].dim() - len(arguments["normalized_shape"])

    def normalised(self, arguments, x):
        return nnf.layer_norm(x, arguments["normalized_shape"], eps=arguments.get("eps", 1e-5))

    def spread(self, arguments, x, lead):
        features = len(arguments["normalized_shape"])
        flat = x.reshape(*x.shape[: lead + 1], -1, x.shape[-features:].numel())
        return flat.mT


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
        return not arguments.get("training", False)  # training: batchnorm.py

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
        plain = arguments.get("max_norm") is None and not arguments.get("scale_grad_by_freq")
        return plain and arguments["input"].dim() > 0

    def row_axes(self, arguments):
        return arguments["input"].dim()

    def left(self, role, arguments, delta):
        return rearrange(delta.reshape(*delta.shape[:2], -1, delta.shape[-1]), "q n s o -> q n 1 o s")

    def right(self, role, arguments, x):
        weight, padding = arguments["weight"], arguments.get("padding_idx")
        hot = nnf.one_hot(x.reshape(len(x), -1), len(weight)).to(weight.dtype)
        if padding is not None:
            hot[..., padding] = 0
        return hot[None]

    def unfold(self, role, result, shape):
        return super().unfold(role, result.mT, shape)


class RMSNorm(LayerNorm):
    """Root-mean-square normalisation over the trailing axes."""

    arguments = ("input", "normalized_shape", "weight", "eps")
    parameters = ("weight",)

    def normalised(self, arguments, x):
        return nnf.rms_norm(x, arguments["normalized_shape"], eps=arguments.get("eps"))


class PReLU(Affine):
    """``y = max(x, 0) + weight min(x, 0)`` with one weight, or one per channel."""

    arguments = ("input", "weight")
    parameters = ("weight",)

    def normalised(self, arguments, x):
        return x.clamp(max=0)

    def spread(self, arguments, x, lead):
        if arguments["weight"].numel() == 1:
            return x.reshape(*x.shape[: lead + 1], 1, -1)
        return super().spread(arguments, x, lead)


class MatMul(Linear):
    """``y = x W``: a linear layer whose weight is stored the other way round."""

    arguments: tuple[str, ...] = ("input", "weight")
    parameters: tuple[str, ...] = ("weight",)

    def accepts(self, arguments):
        x, weight = arguments.get("input"), arguments.get("weight")
        return isinstance(x, Tensor) and isinstance(weight, Tensor) and x.dim() > 1 and weight.dim() == 2

    def channels_lead(self, output):
        return False

    def unfold(self, role, result, shape):
        return super().unfold(role, result.mT if role == "weight" else result, shape)

    def flops(self, arguments, output):
        return 2.0 * output.numel() * arguments["weight"].shape[0]


class AddMM(MatMul):
    """``y = b + x W``."""

    arguments = ("bias", "input", "weight")
    parameters = ("weight", "bias")

    def accepts(self, arguments):
        bias = arguments.get("bias")
        plain = isinstance(bias, Tensor) and bias.dim() == 1 and not {"alpha", "beta"} & arguments.keys()
        return plain and super().accepts(arguments) and bias.shape == arguments["weight"].shape[1:]


class Expanded(Layer):
    """A parameter that every row of the data has a copy of, ``rows = weight.expand(...)``; no torch function's.

    The cotangent of a row is its gradient, summed over the axes along which the parameter was repeated.
    """

    arguments = ("weight",)
    inputs = ()
    parameters = ("weight",)

    def accepts(self, arguments):
        return False

    def row_axes(self, arguments):
        own = arguments["weight"].shape
        leading = next((axis for axis, length in enumerate(own) if length > 1), len(own))
        return max(1, len(arguments["shape"]) - len(own) + leading)

    def left(self, role, arguments, delta):
        shape = arguments["weight"].shape
        own = (1,) * (delta.dim() - 1 - len(shape)) + tuple(shape)  # the rows' axis first
        kept = [axis for axis, length in enumerate(own) if axis and length > 1]
        gone = [axis for axis, length in enumerate(own) if axis and length == 1]
        found = delta.permute(0, 1, *(axis + 1 for axis in (*kept, *gone)))
        return found.reshape(*delta.shape[:2], 1, shape.numel(), -1)

    def right(self, role, arguments, x):
        return None


LAYERS: dict[Callable, Layer] = {
    nnf.linear: Linear(),
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), Conv()),
    **dict.fromkeys((torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d), ConvTranspose()),
    nnf.layer_norm: LayerNorm(),
    nnf.group_norm: GroupNorm(),
    nnf.instance_norm: InstanceNorm(),
    nnf.batch_norm: BatchNormEval(),
    nnf.embedding: Embedding(),
    nnf.rms_norm: RMSNorm(),
    **dict.fromkeys((torch.prelu, Tensor.prelu), PReLU()),
    **dict.fromkeys((torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__), MatMul()),
    **dict.fromkeys((torch.addmm, Tensor.addmm), AddMM()),
}
EXPANDED = Expanded()


def register_layer(function: Callable, layer: Layer) -> None:
    """Add a row to the table: calls of ``function`` get their parameter products from ``layer``.

    Args:
        function: a torch function (``torch.nn.functional.*``, ``torch.*``) that dispatches to
            ``__torch_function__``, e.g. ``torch.nn.functional.bilinear``.
        layer: how to build the operands of its products.
    """
    LAYERS[function] = layer
