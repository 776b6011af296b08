"""Linear layers and matrix products (letters: ``layers/base.py``)."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor

from bncurv.layers.base import Layer


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
