"""The loud directions among the columns, from a sketch of V's own rows: C closed passes, whatever N and D are.

A parameter's own row is a product of two operands, own = left rightᵀ over positions. Random mixtures of the features of
either side, Aᵀ own B, keep inner products of rows in expectation, and the row itself is never formed. What comes of it
decides how good an estimate is, not whether it is right (``deflation.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bncurv.assurance import Assurance
from bncurv.blocks import Batch
from bncurv.budget import chunks
from bncurv.engine import Engine
from bncurv.layers.base import Product
from bncurv.order import per_sample
from bncurv.ranks import Ranks

WIDTH = 2048  # numbers per row of V, all parameters together, or
WIDE = 64  # of each
NARROW = 12  # of one parameter at least, for a sketch to be worth its passes
FLOOR = 1e-4  # of the trace: what a basis leaves at least, for a sketch may see nothing where there is something
SMALLEST = 1e-8  # of the largest eigenvalue: what is below is rounding
WORTHWHILE = 2.0  # passes allowed, per pass of the sketch, from which on it is made
DECOMPOSITION = 12.0  # operations of an eigenvalue decomposition, by the cube of its size
MANY = 2**25  # numbers of a sketch at most
COPIES = 48  # bytes of each, with what is made of it in float64


@dataclass(frozen=True)
class Basis:
    """An orthonormal basis of columns, loudest first.

    Attributes:
        vectors: Q, this rank's rows ``[k, most]``.
        tails: τ(r), the share of the trace that is left by the first r of them, ``r = 0, ..., most``.
        spent: backward passes that it took.
    """

    vectors: Tensor
    tails: Sequence[float]
    spent: int

    def tail(self, r: int) -> float:
        """τ(r), not below what a sketch can tell."""
        return max(self.tails[r], FLOOR)

    def best(self, passes: int, fewest: int) -> int:
        """How many to take exactly, of so many passes, the others being random: least τ(r)² / (passes - r)."""
        most = passes - min(fewest, -(-passes // 2))
        return min(range(min(len(self.tails), most + 1)), key=lambda r: self.tail(r) ** 2 / (passes - r))

    def cheapest(self, scale: float, fewest: int, known: int = 0) -> tuple[int, float]:
        """How many to take exactly, at least ``known``, and draws = scale · τ(r)² then: least of both together."""
        draws = [max(float(fewest), scale * self.tail(r) ** 2) for r in range(len(self.tails))]
        r = min(range(known, len(draws)), key=lambda r: r + draws[r])
        return r, draws[r]


def _width(parameters: int) -> int:
    """Numbers per row of V."""
    return max(WIDTH, WIDE * parameters)


def _worthwhile(passes: int | None, columns: int) -> bool:
    """Whether so many passes allow for a sketch of so many columns per sample."""
    return passes is None or passes >= WORTHWHILE * columns


def operations(passes: int | None, samples: int, columns: int, parameters: int) -> float:
    """What a `basis` takes beside its passes, as `Costs` counts."""
    if not _worthwhile(passes, columns):
        return 0.0
    width, rows = _width(parameters), samples * columns
    size = min(rows, width)
    return 2.0 * rows * width * size + DECOMPOSITION * size**3


def basis(engine: Engine, batch: Batch, passes: int | None) -> Basis:
    """Leading directions of the own rows' Gram matrix, every parameter at trace 1.

    Where there is no sketch, because samples are mixed other than by known couplings, parameters have no product, or C
    passes are too many, the columns of S themselves, by length.
    """
    loss, ranks = batch.loss, engine.ranks
    most = engine.costs.budget.chunk // COPIES if engine.memory else MANY
    if loss.whole is not None:
        return _by_length(loss.whole.columns.flatten(1).norm(dim=1), ranks, engine.shard.first, most)
    factor = loss.factor
    lengths = factor.blocks.norm(dim=2).flatten()
    count = factor.columns_per_sample
    total = engine.shard.everywhere if engine.shard.helpers > 1 else engine.shard.total
    names = [n for n in engine.wanted if n not in engine.slow and not engine.products.vanishes(n)]
    first, width = engine.shard.first * count, min(_width(len(names)), most // (total * count))
    if not names or width < NARROW * len(names) or not _worthwhile(passes, count):
        return _by_length(lengths, ranks, first, most)
    checks = Assurance(engine.back, engine.trace, engine.products, [factor], engine.shard)
    if ranks.everybody.any(checks.mixing() is not None):
        return _by_length(lengths, ranks, first, most)
    names = [n for n in names if not engine.structure.sites(n) & checks.strange]
    if not names:
        return _by_length(lengths, ranks, first, most)
    engine.products.prepare_means()
    Y = ranks.rows(_sketch(engine, batch, names, width), "sketch")
    values, Q = _left(Y.double())
    Q = ranks.helpers.first(ranks.first(Q, "sketch"), "sketch")  # one rank's signs and bases for all
    return _basis(values, Q[first : first + len(lengths)].to(lengths), count)


def _basis(values: Tensor, Q: Tensor, spent: int) -> Basis:
    left = values.sum() - torch.cat([values.new_zeros(1), values.cumsum(0)])
    tails = left / values.sum().clamp(min=torch.finfo(values.dtype).tiny)
    return Basis(Q, tails[: Q.shape[1] + 1].clamp(min=0).tolist(), spent)


def _by_length(lengths: Tensor, ranks: Ranks, first: int, most: int) -> Basis:
    """Columns of S, the longest first."""
    squares = ranks.rows(lengths, "sketch").double().square()
    order = squares.argsort(descending=True, stable=True)[: max(1, min(WIDTH, most // len(squares)))]
    own = torch.arange(first, first + len(lengths), device=order.device)
    rest = squares.sum() - squares[order].sum()
    values = torch.cat([squares[order], rest[None]])
    return _basis(values, (own[:, None] == order).to(lengths), 0)


def _left(Y: Tensor) -> tuple[Tensor, Tensor]:
    """Squared singular values, descending, and left singular vectors as columns, those above rounding."""
    wide = Y.shape[1] >= Y.shape[0]
    values, vectors = torch.linalg.eigh(Y @ Y.T if wide else Y.T @ Y)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    kept = int((values > SMALLEST * values[:1]).sum())
    vectors = vectors[:, :kept]
    return values, vectors if wide else Y @ vectors / values[:kept].sqrt()


def _sketch(engine: Engine, batch: Batch, names: list[str], width: int) -> Tensor:
    """Mixtures of the own rows of all columns, ``[(n c), width]`` or so, every parameter's at trace 1."""
    factor, sites = batch.loss.factor, sorted({j for name in names for j in engine.structure.sites(name)})
    uses = dict.fromkeys(use for name in names for use in engine.products.uses[name])
    mixtures = [_Mixtures(engine, j, role, width // len(uses)) for j, role in uses]
    parts: list[list[Tensor]] = [[] for _ in mixtures]
    engine.back.begin(factor)
    for c in chunks(factor.columns_per_sample, engine.costs.column_chunk(names)):
        delta = engine.back.closed_vjp(engine.output, sites, factor.columns(c))
        for part, mixture in zip(parts, mixtures, strict=True):
            part.append(mixture.of(delta, c.stop - c.start))
    whole = [torch.cat(part, 1).flatten(0, 1) for part in parts]
    traces = engine.ranks.sum([torch.stack([y.square().sum() for y in whole])], "sketch")[0]
    tiny = torch.finfo(traces.dtype).tiny
    return torch.cat([y / t.clamp(min=tiny).sqrt() for y, t in zip(whole, traces, strict=True)], 1)


class _Mixtures:
    """Aᵀ own B of one use of a parameter.

    Args:
        engine: of the graph.
        j: site of the call.
        role: of the parameter there.
        width: numbers per row.
    """

    def __init__(self, engine: Engine, j: int, role: str, width: int) -> None:
        self._call, self._samples, self._site, self._role = engine.trace.sites[j].call, len(engine.output), j, role
        self._width = width
        products, rows = engine.products, chunks(self._call.rows, engine.products.piece(j, role))
        first = products.right(j, role, slice(0, 1))
        if first is None:
            self._right, self._left_width = None, width
            return
        outputs = max(1, self._call.arguments[role].numel() // first.shape[0] // first.shape[3])
        b = max(int(width**0.5), width // outputs)
        right = [_mixed(products.right(j, role, n), 3, b) for n in rows]  # type: ignore[arg-type]
        self._right = torch.cat(right, 1)
        self._left_width = max(1, width // self._right.shape[3])

    def of(self, delta: Mapping[int, Tensor | None], count: int) -> Tensor:
        """From the cotangents of so many columns: ``[n, c, width or less]``."""
        call, d = self._call, delta[self._site]
        d = call.arguments[self._role].new_zeros(count, *call.output) if d is None else d
        left = _mixed(call.layer.left(self._role, call.arguments, call.by_sample(d)), 3, self._left_width)
        found = _mixed(Product(left, self._right).per_sample().flatten(2), 2, self._width)
        return per_sample(call.order, found, slice(0, self._samples), self._samples)


def _mixed(t: Tensor, axis: int, size: int) -> Tensor:
    """Random mixtures of the entries along an axis, the same at every call; as it is where it is no longer."""
    if t.shape[axis] <= size:
        return t
    # from a generator of its own: random states of the day are neither read nor moved
    generator = torch.Generator("cpu").manual_seed(axis)
    R = torch.randn(t.shape[axis], size, generator=generator, dtype=t.dtype, device="cpu")
    return torch.tensordot(t, R.to(t.device) / size**0.5, ([axis], [0])).movedim(-1, axis)
