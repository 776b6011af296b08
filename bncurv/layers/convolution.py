"""Convolutions (letters: ``layers/base.py``)."""

from __future__ import annotations

import torch
from einops import rearrange

from bncurv.layers.base import Arguments, Layer
from bncurv.layers.windows import Geometry, one_channel_back, per_axis, windows


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
