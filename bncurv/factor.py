"""The symmetric factor S of a loss Hessian, S Sᵀ = ∇²_F L, block by block (letters: ``engine.py``).

A loss is a sum over independent *positions* of the output: position (n, t) holds ``e`` output entries (cross-entropy:
the classes of a sample or pixel; squared error: a single entry), and the Hessian is block-diagonal over positions. The
entries of a position lie along the output's first axis after the batch, all other axes are positions; or (``last``)
along its last axis. One position may also hold all of a sample's entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from bncurv.probes import pattern


def by_position(u: Tensor, e: int, last: bool = False) -> Tensor:
    """``[n, *output] → [n, t, e]``."""
    return u.reshape(len(u), -1, e) if last else u.reshape(len(u), e, -1).mT


def by_output(v: Tensor, layout: torch.Size, last: bool = False) -> Tensor:
    """``[..., n, t, e] → [..., n, *output]``."""
    return (v if last else v.mT).reshape(*v.shape[:-3], *layout)


@dataclass(frozen=True)
class Factor:
    """Symmetric factor of a loss Hessian, column by column.

    Attributes:
        blocks: ``[n, t, e, j]``, one factor per position.
        layout: shape of the model's output; its axes are ``n, e, *t`` (``e`` absent when it is 1 per entry).
        joint: whether column j covers all positions of a sample at once (random draws), or one position (the
            exact factor, whose columns are then (t, j)).
        last: whether the axes are ``n, *t, e``.
    """

    blocks: Tensor
    layout: torch.Size
    joint: bool = False
    last: bool = False

    @property
    def columns_per_sample(self) -> int:
        """Number of columns c that each sample has."""
        return self.blocks.shape[3] * (1 if self.joint else self.blocks.shape[1])

    def coefficients(self, u: Tensor) -> Tensor:
        """Sᵀ u of the exact factor, ``[n, *output] → [n, c]``."""
        u = by_position(u, self.blocks.shape[2], self.last)
        return (self.blocks.mT @ u[..., None]).flatten(1)

    def combination(self, w: Tensor) -> Tensor:
        """S w of the exact factor, ``[n, c] → [n, *output]``."""
        n, t, _, j = self.blocks.shape
        return by_output((self.blocks @ w.reshape(n, t, j, 1))[..., 0], self.layout, self.last)

    def hessian_product(self, u: Tensor) -> Tensor:
        """S Sᵀ u for ``u [n, *output]``."""
        return self.combination(self.coefficients(u))

    def mixture(self) -> Tensor:
        """All columns, each with a fixed weight: ``[n, *output]``."""
        n, t, _, j = self.blocks.shape
        weights = pattern((n, 1 if self.joint else t, j, 1), self.blocks)
        return by_output((self.blocks @ weights)[..., 0], self.layout, self.last)

    def columns(self, c: slice) -> Tensor:
        """Columns ``c`` of all samples, each in its own sample's row: ``[c, n, *output]``."""
        if self.joint:
            drawn = rearrange(self.blocks[..., c], "n t e c -> c n t e")
            return by_output(drawn, self.layout, self.last).contiguous()  # what reads it goes along its rows
        n, t, e, j = self.blocks.shape
        index = torch.arange(t * j, device=self.blocks.device)[c]
        out = self.blocks.new_zeros(len(index), n, t, e)
        row = torch.arange(len(index), device=index.device)
        position, column = index // j, index % j
        out[row, :, position] = rearrange(self.blocks[:, position, :, column], "k n e -> k n e")
        return by_output(out, self.layout, self.last)


@dataclass(frozen=True)
class WholeFactor:
    """Symmetric factor of a loss that compares samples: its columns reach all of the batch.

    Attributes:
        columns: ``[q, n, *output]``.
    """

    columns: Tensor

    def sample(self, draws: int, kind: str, generator: torch.Generator | None) -> Factor:
        """Random columns with covariance S Sᵀ; those of one draw belong together."""
        q, n, *rest = self.columns.shape
        S = self.columns.reshape(q, -1).T[None, None]  # [1, 1, n·e, q]
        drawn = (normal_columns if kind == "labels" else rademacher_columns)(S, draws, generator)
        return Factor(drawn.reshape(n, 1, -1, draws), torch.Size((n, *rest)), joint=True)


def normal_columns(blocks: Tensor, draws: int, generator: torch.Generator | None) -> Tensor:
    """Draws from N(0, S Sᵀ), ``[n, t, e, j] → [n, t, e, draw]``."""
    shape = (*blocks.shape[:2], blocks.shape[3], draws)
    where = source_of(generator, blocks)
    return blocks @ torch.randn(shape, generator=generator, device=where, dtype=blocks.dtype).to(blocks.device)


def rademacher_columns(blocks: Tensor, draws: int, generator: torch.Generator | None) -> Tensor:
    """Random signs on the columns of S, ``[n, t, e, j] → [n, t, e, draw]``."""
    shape = (*blocks.shape[:2], blocks.shape[3], draws)
    signs = torch.randint(2, shape, generator=generator, device=source_of(generator, blocks)).to(blocks.device)
    return blocks @ (2 * signs - 1).to(blocks.dtype)


def source_of(generator: torch.Generator | None, like: Tensor) -> torch.device:
    """Where to draw: a generator draws on its own device only."""
    return like.device if generator is None else generator.device
