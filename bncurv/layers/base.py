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
from typing import Any, NamedTuple

import torch
from einops import rearrange, reduce
from torch import Tensor

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
