"""The GGN diagonal where the exact one is too dear: exact on the loud directions, random on the quiet rest.

With V ``[K, D]`` and orthonormal columns Q ``[K, r]``,

    diag G = Σ_q (Vᵀ Q_q)²  +  E (Vᵀ (I - Q Qᵀ) w)²        for w with independent entries of unit variance

whatever Q is; Q decides the variance only. A term is one backward pass of the whole batch. Q: the leading left singular
vectors of a sketch of V (``sketch.py``). For Gaussian w, M times the mean T of M squares over its expectation t is χ²
with M degrees of freedom, entry by entry and whatever the network is: limits follow, and Var[T] = 2 t²/M.

Deflation of a trace estimate: Meyer, Musco, Musco & Woodruff (2021), "Hutch++"; of a diagonal: Epperly, Tropp & Webber
(2024), "XTrace". Letters: head of ``engine.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from scipy.special import chdtri, ndtri, stdtrit
from torch import Tensor

from bncurv.blocks import Batch, Rows, Squares, WholeBatch
from bncurv.budget import chunks
from bncurv.engine import Engine, Procedure
from bncurv.factor import source_of
from bncurv.sketch import Basis, basis, operations

FEWEST = 12  # draws from which on their spread tells an error
EXPECTED = 1.2  # by how much an error may exceed its expectation, before draws tell


class Tail(NamedTuple):
    """Mean of (Vᵀ (I - Q Qᵀ) w)² over ``draws`` Gaussian w, ``[*p]`` of parameter ``name``."""

    name: str
    values: Tensor
    draws: int


@dataclass(frozen=True)
class Goal:
    """What an estimate is to reach: as good as ``passes`` make it; or a relative error ``rtol`` at a ``confidence``."""

    passes: int | None
    rtol: float | None
    confidence: float


class Deflated(Procedure):
    """The estimate of one batch, and the exact way where that is no dearer.

    Args:
        batch: the recorded forward pass.
        goal: what to reach.
        generator: random numbers (``None``: torch's global ones).
    """

    def __init__(self, batch: Batch, goal: Goal, generator: torch.Generator | None) -> None:
        self._batch, self._goal, self._generator = batch, goal, generator
        whole = batch.loss.whole
        self._whole = None if whole is None else whole.columns
        self._closed = 0 if whole is not None else batch.loss.factor.columns_per_sample

    def planned(self, engine: Engine) -> int:
        """The passes allowed; or the fewest."""
        random = (self._goal.passes or self._closed + FEWEST) - self._closed
        return max(1, self._closed + math.ceil(random / engine.shard.helpers))

    def pull(self, engine: Engine) -> Iterator[Rows | Squares | Tail]:
        """Squares of what is exact, tails of what is random."""
        exact = self._price(engine)
        beside = operations(self._goal.passes, engine.shard.total, self._closed, len(engine.wanted))
        if engine.costs.whole(self.planned(engine)) + beside >= exact:
            yield from self._exactly(engine)
            return
        found = basis(engine, self._batch, self._goal.passes)
        estimate = _Estimate(engine, found, self._cotangents, self._normal)
        if self._goal.passes:
            left = self._goal.passes - found.spent
            # groups of ranks have bases of their own, but go through the same passes
            estimate.deflate(int(min(self._batch.ranks.everybody.numbers(found.best(left, FEWEST)))))
            estimate.draw(left - estimate.exact)
        elif not self._reach(estimate, found, lambda passes: self._cost(engine, passes) < exact):
            yield from self._exactly(engine)
            return
        engine.went("sampled")
        for name in engine.wanted:
            yield Squares(name, estimate.head[name])
            yield Tail(name, estimate.tail[name] / estimate.draws, estimate.draws)

    def _reach(self, estimate: _Estimate, found: Basis, affordable: Callable[[int], bool]) -> bool:
        """Until the goal is met; false where the exact way is no dearer than what is left to do.

        Directions half of the way at a time: the first draws go along, and tell how far it is.
        """
        everybody, rtol = self._batch.ranks.everybody, self._goal.rtol or 0.0
        scale, now, last = 2 * (EXPECTED / rtol) ** 2, 1.0, False  # draws for a tail of trace 1: Var[mean] = 2 t²/M
        while now > rtol:
            r, draws = estimate.exact, scale * found.tail(estimate.exact) ** 2
            if not last:
                r, draws = found.cheapest(scale, FEWEST, r)
            r, more = (int(max(everybody.numbers(k))) for k in (r, math.ceil(draws) - estimate.draws))
            left = r - estimate.exact
            if not affordable(left + more):
                return False
            if last:
                estimate.draw(max(FEWEST // 2, more))
            else:
                last = estimate.draws > 0 and left <= max(estimate.size, estimate.exact // 4)
                estimate.deflate(r if last else r - left // 2)
                if not estimate.draws:
                    estimate.draw(FEWEST, keep=True)
            now, then = (max(everybody.numbers(e)) for e in estimate.errors(self._goal.confidence))
            scale = estimate.draws * (then / rtol / found.tail(estimate.exact)) ** 2
        return True

    # ---------------------------------------------------------------- columns
    def _cotangents(self, w: Tensor) -> Tensor:
        """S w for ``w [q, k]``: ``[q, n, *output]``."""
        if self._whole is not None:
            return torch.tensordot(w, self._whole, 1)
        factor = self._batch.loss.factor
        return torch.vmap(factor.combination)(w.unflatten(1, (-1, self._closed)))

    def _normal(self, count: int) -> Tensor:
        """Gaussian w, ``[count, k]``."""
        like = self._batch.output
        size = len(self._whole) if self._whole is not None else len(like) * self._closed
        where = source_of(self._generator, like)
        return torch.randn(count, size, generator=self._generator, dtype=like.dtype, device=where).to(like.device)

    # ---------------------------------------------------------------- the exact way
    def _price(self, engine: Engine) -> float:
        """What the exact way costs."""
        if self._whole is not None:
            return engine.costs.whole(len(self._whole))
        costs = engine.costs.of_columns(self._closed)
        ways = {"dense": costs.dense(), "coupled": costs.coupled(engine.slow)}
        return ways.get(engine.method, min(ways.values()))

    def _cost(self, engine: Engine, passes: int) -> float:
        return engine.costs.whole(math.ceil(passes / engine.shard.helpers))

    def _exactly(self, engine: Engine) -> Iterator[Squares]:
        source = self._batch.loss.factor if self._whole is None else WholeBatch(self._whole)
        exact = engine.beside(self._batch, {"factor": source}, squares=("factor",))
        alike = engine.ranks.size * engine.ranks.helpers.size
        for _, block in exact.pull():
            # sums over ranks that share statistics are alike on all of them, and are divided by their number
            yield Squares(block.name, block.sum_squares() * (1 if self._whole is not None else alike))
        engine.went(exact.way, exact.passes)


class _Estimate:
    """Sums of squares so far.

    Args:
        engine: pulls back.
        basis: Q.
        cotangents: S w for ``w [q, k]``.
        normal: draws so many Gaussian ``[count, k]``.

    Attributes:
        size: columns that are pulled at once.
        exact: r.
        draws: M.
        head: Σ_q (Vᵀ Q_q)² by parameter name.
        tail: Σ_m (Vᵀ (I - Q Qᵀ) w_m)².
    """

    def __init__(
        self,
        engine: Engine,
        basis: Basis,
        cotangents: Callable[[Tensor], Tensor],
        normal: Callable[[int], Tensor],
    ) -> None:
        self._engine, self._Q, self._cotangents, self._normal = engine, basis.vectors, cotangents, normal
        self.size = engine.costs.dense_chunk() * engine.shard.helpers
        self.exact = self.draws = 0
        self.head, self.tail = ({n: engine.products.zeros(n) for n in engine.wanted} for _ in range(2))
        self._traces: dict[str, list[Tensor]] = {n: [] for n in engine.wanted}  # of the terms of the tail
        self._freedom: dict[str, Tensor] = {}  # ν of the squared error, by the first draws
        self._first: tuple[Tensor, dict[str, Tensor]] | None = None  # the first draws w, and their Vᵀ(I - Q Qᵀ) w

    def deflate(self, r: int) -> None:
        """Take directions exactly, up to the first ``r``."""
        for q in chunks(r - self.exact, self.size):
            Q = self._Q[:, self.exact : r][:, q]
            rows = self._engine.pull_whole(self._cotangents(Q.T))
            for name, values in rows.items():
                self.head[name] += values.square().sum(0)
            if self._first is not None:  # Vᵀ w - (Vᵀ Q_q) (Q_qᵀ w)
                (inside,) = self._engine.ranks.sum([self._first[0] @ Q], "random columns")
                for name, values in self._first[1].items():
                    values -= torch.tensordot(inside, rows[name], 1)
        if r > self.exact:
            self._look()
        self.exact = r

    def draw(self, count: int, keep: bool = False) -> None:
        """More random columns; kept, they are usable with more directions, until the next ones."""
        Q, held = self._Q[:, : self.exact], []
        for m in chunks(count, self.size):
            w = self._normal(m.stop - m.start)
            (inside,) = self._engine.ranks.sum([w @ Q], "random columns")
            rows = self._engine.pull_whole(self._cotangents(w - inside @ Q.T))
            if keep:
                held.append((w, rows))
                continue
            for name, values in rows.items():
                self._take(name, values)
        self.draws += count
        self._first = None
        if keep:
            by_name = {n: torch.cat([rows[n] for _, rows in held]) for n in self.tail}
            self._first = torch.cat([w for w, _ in held]), by_name
            self._look()

    def _look(self) -> None:
        """The first draws, as they are now: the only ones so far."""
        for name, rows in self._first[1].items() if self._first else ():
            self.tail[name].zero_()
            self._traces[name].clear()
            squares = self._take(name, rows)
            self._freedom[name] = _freedom(squares.div_(squares.amax().clamp(min=torch.finfo(squares.dtype).tiny)))

    def _take(self, name: str, rows: Tensor) -> Tensor:
        """More terms of the tail: their squares ``[m, p]``."""
        squares = rows.square()
        self.tail[name] += squares.sum(0)
        squares = squares.flatten(1)
        self._traces[name].append(squares.sum(1))
        return squares

    def errors(self, confidence: float) -> tuple[float, float]:
        """The largest of all parameters' relative errors of trace and of diagonal, all of them at that confidence.

        Once as it is known from so many draws, and once as if the spread were known exactly: to plan with. Of the
        diagonal, Σ (T - t)² is about a multiple of χ² with ν degrees of freedom, of expectation 2/M Σ t².
        """
        M, found = self.draws, []
        for name, head in self.head.items():
            if not self._engine.structure.vanishes(name):  # else nothing but rounding
                diagonal, spread = head + self.tail[name] / M, torch.cat(self._traces[name]).std() / M**0.5
                length, tail = (torch.linalg.vector_norm(t, dtype=torch.float64) for t in (diagonal, self.tail[name]))
                found.append(torch.stack([diagonal.sum(), spread, length, tail / M, self._freedom[name]]))
        alive = [row for row in torch.stack(found).tolist() if row[0] > 0] if found else []  # one wait for the device
        level = 1 - (1 - confidence) / max(1, len(alive))
        quantiles, worst = (float(stdtrit(M - 1, level)), float(ndtri(level))), (0.0, 0.0)
        for total, spread, length, tail, nu in alive:
            beyond = (2 / (M + 2) * float(chdtri(nu, 1 - level)) / nu) ** 0.5  # E[T²] = (1 + 2/M) t²
            now, then = (max(quantile * spread / total, beyond * tail / length) for quantile in quantiles)
            worst = max(worst[0], now), max(worst[1], then)
        return worst


def _freedom(terms: Tensor) -> Tensor:
    """ν = (tr Σ)² / ‖Σ‖² of the squared length of a sum of independent ``terms [m, p]`` with covariance Σ.

    From their inner products about the mean: tr Σ on the diagonal, and ‖Σ‖² the variance of those beside it.
    """
    m, products = len(terms), (terms @ terms.T).double()
    products = products - products.mean(0)
    products = products - products.mean(1, keepdim=True)
    beside = products[~torch.eye(m, dtype=torch.bool, device=products.device)]
    trace = products.trace() / (m - 1)
    return (trace.square() / beside.var().clamp(min=torch.finfo(beside.dtype).tiny)).clamp(min=1)
