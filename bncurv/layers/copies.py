"""Rows of a table, copies of a parameter (letters: ``layers/base.py``)."""

from __future__ import annotations

import torch.nn.functional as nnf
from einops import rearrange

from bncurv.layers.base import Layer


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
