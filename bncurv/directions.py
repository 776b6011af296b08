"""Coupling directions: what the batch statistics contribute to V, V[k] = own[k] + Σ_q A[q, k] P[q].

`Directions`: the coordinates of the statistics themselves. With closed gates a direction passes only the layers below
its BatchNorm, up to the next statistics; B carries A from upper statistics to lower ones (glossary: ``engine.py``).

`TruncatedDirections`: the leading left singular vectors of A, for ``tol > 0``, with an estimate of the error made.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bncurv.costs import chunks
from bncurv.statistics_passes import StatisticsPasses

if TYPE_CHECKING:
    from bncurv.engine import Engine, Source

PROBES = 4  # random combinations of dropped directions that estimate the error of a truncation


@dataclass(frozen=True)
class Correction:
    """Σ_q A[q, k] P[q] for one parameter.

    The statistics of the BatchNorm directly above a layer's output are a special case: the parameters of channel o feel
    the statistics of channel o only, so that their P is kept per channel. Of its two moments the mean drops out where
    the layer's input is centred (`Products.centred`).

    Attributes:
        A: coefficients ``[n, c, R]`` (``None``: none).
        P: directions ``[R, *p]``.
        direct: pairs of coefficients ``[n, c, moment, o]`` and directions ``[moment, *p]``, o the parameter's axis 0.
    """

    A: Tensor | None = None
    P: Tensor | None = None
    direct: tuple[tuple[Tensor, Tensor], ...] = ()

    def add_to(self, rows: Tensor, n: slice) -> None:
        """Add the correction of the samples ``n`` to their rows ``[n, c, *p]``."""
        if self.A is not None and self.P is not None:
            flat = rows.view(rows.shape[0] * rows.shape[1], -1)
            flat.addmm_(self.A[n].flatten(0, 1), self.P.reshape(len(self.P), -1))
        for a, p in self.direct:
            by_channel = rows.view(*rows.shape[:2], p.shape[1], -1)
            for moment in range(len(p)):
                by_channel.addcmul_(a[n, :, moment, :, None], p[moment].reshape(p.shape[1], -1))

    def dense(self) -> tuple[Tensor, Tensor] | None:
        """All of it as one pair ``A [n, c, R]``, ``P [R, p]``; ``None`` if there is nothing."""
        pairs = [] if self.A is None or self.P is None else [(self.A, self.P.reshape(len(self.P), -1))]
        for a, p in self.direct:
            eye = torch.eye(p.shape[1], dtype=p.dtype, device=p.device)
            spread = torch.einsum("toi,oc->tcoi", p.reshape(*p.shape[:2], -1), eye)
            pairs.append((a.flatten(2), spread.flatten(0, 1).flatten(1)))
        if not pairs:
            return None
        return torch.cat([a for a, _ in pairs], -1), torch.cat([p for _, p in pairs])


class Directions:
    """The statistics' own coordinates: exact.

    Args:
        engine: the engine.
        names: parameters to pull back for.
        between: B where it is known already, by upper and lower coupling.
    """

    def __init__(self, engine: Engine, names: list[str], between: dict[int, dict[int, Tensor]] | None = None) -> None:
        self._engine = weakref.proxy(engine)  # no cycle: graphs die with the call
        structure = self._structure = engine.structure
        self._passes = StatisticsPasses(engine)
        self.between = dict(between or {})
        self._a: dict[int, Tensor] = {}
        self._products = {name: engine.products.zeros(name, structure.entries[name]) for name in names}
        self._rows: dict[str, dict[int, Tensor]] = {}  # views of P: the part of each coupling
        for name, P in self._products.items():
            above = structure.pulled_from[name]
            self._rows[name] = dict(zip(above, P.split([structure.width[j] for j in above]), strict=False))
        self._direct: dict[str, list[tuple[int, Tensor]]] = {}
        for j in structure.couplings:
            self._pull(j)
            self._pull_direct(j)

    def _pull_direct(self, j: int) -> None:
        """P of the layer directly below a BatchNorm, all channels at once, without a pass."""
        products, site = self._engine.products, self._structure.direct[j]
        for name in self._products:
            for i, role in products.uses.get(name, ()):
                if i == site:
                    cotangents = self._engine.trace.sites[j].coupling.own_cotangents()
                    cotangents = cotangents[1:] if i in products.centred else cotangents
                    self._direct.setdefault(name, []).append((j, products.summed_at(i, role, cotangents)))

    def _pull(self, j: int) -> None:
        """P of coupling ``j``, its statistics pulled back one coordinate after the other; B too where still unknown."""
        engine, width = self._engine, self._structure.width
        names = [name for name, rows in self._rows.items() if j in rows and not engine.products.vanishes(name)]
        known = j in self.between
        if not known:
            zeros = self._engine.output.new_zeros
            self.between[j] = {i: zeros(width[j], width[i]) for i in self._structure.lower(j)}
        if not names and (known or not self.between[j]):
            return
        for q in chunks(width[j], engine.chunk_size or engine.costs.direction_chunk(j)):
            products, received = self._passes.pull(j, q, names)
            for name in names:
                self._rows[name][j][q] = products[name]
            for i, rows in received.items():
                self.between[j][i][q] = rows

    def read(self, delta: dict[int, Tensor | None], count: int) -> None:
        """Take A from the cotangents of ``count`` columns with closed gates."""
        a = self._a = read_coefficients(self._engine, delta, count)
        self._joined: dict[tuple[int, ...], Tensor] = {}
        for upper in reversed(self._structure.couplings):
            for lower, b in self.between[upper].items():
                a[lower].flatten(0, 1).addmm_(a[upper].flatten(0, 1), b)

    def correction(self, name: str) -> Correction:
        """The correction of one parameter's rows for the columns last read."""
        above = tuple(self._rows.get(name, ()))
        if above and above not in self._joined:  # the same for all parameters of a layer
            parts = [self._a[j] for j in above]
            self._joined[above] = torch.cat(parts, -1) if parts[1:] else parts[0]
        A, P = self._joined.get(above), self._products[name] if above else None
        direct = tuple((self._a[j].unflatten(-1, (2, -1))[:, :, -len(p) :], p) for j, p in self._direct.get(name, ()))
        return Correction(A, P, direct)


class TruncatedDirections:
    """Leading directions of the whole coupling: A = U Σ Oᵀ, kept while the tail is above ``tol``.

    The directions U_q on all statistics at once are pulled back with open gates, r passes. What is dropped,
    ΔV = Σ_{q>r} O_q σ_q P_q with orthonormal O_q, has E‖Σ_{q>r} ε_q σ_q P_q‖² = ‖ΔV‖_F² for random signs ε: a few more
    passes estimate it.

    Args:
        engine: the engine.
        sources: all columns that will be pulled back.
        names: parameters to pull back for.
        tol: keep the smallest r with (Σ_{q>r} σ_q²)^(1/2) <= tol (Σ_q σ_q²)^(1/2).

    Attributes:
        error: estimated ‖ΔV‖_F by parameter name, over all sources together.
        kept: number of directions kept.
    """

    def __init__(self, engine: Engine, sources: list[Source], tol: float, names: list[str]) -> None:
        self._engine, self._names = weakref.proxy(engine), names
        a = torch.cat([self._all_coefficients(s) for s in sources])  # [K, R]
        squares, U = torch.linalg.eigh((a.T @ a).double())
        squares, U = squares.flip(0).clamp(min=0), U.flip(1)
        tail = squares.flip(0).cumsum(0).flip(0)  # Σ_{q >= r}
        self.kept = int((tail > tol**2 * tail[0]).sum())
        self._basis = U[:, : self.kept].to(a.dtype)
        self._products = self._pull(self._basis.T)
        signs = torch.randint(
            2, (PROBES, len(squares) - self.kept), generator=torch.Generator().manual_seed(0), device="cpu"
        ).to(U)
        probes = (2 * signs - 1) * squares[self.kept :].sqrt() @ U[:, self.kept :].T
        dropped = self._pull(probes.to(a.dtype))
        self.error = {n: float(torch.linalg.vector_norm(p)) / PROBES**0.5 for n, p in dropped.items()}

    def _all_coefficients(self, source: Source) -> Tensor:
        engine, parts = self._engine, []
        for c in chunks(source.columns_per_sample, engine.chunk_size or engine.costs.column_chunk([])):
            columns = source.columns(c)
            delta = engine.closed_vjp(engine.output, engine.structure.couplings, columns)
            a = read_coefficients(engine, delta, columns.shape[0])
            parts.append(torch.cat(list(a.values()), -1).flatten(0, 1))
        return torch.cat(parts)

    def _pull(self, directions: Tensor) -> dict[str, Tensor]:
        """Directions ``[q, R]`` on all statistics, pulled back with open gates: ``[q, *p]`` per parameter."""
        engine, structure = self._engine, self._engine.structure
        statistics = [engine.trace.sites[j].coupling.statistics for j in structure.couplings]
        below = {i for j in structure.couplings for i in structure.calls_in(engine.trace.sites[j].upstream)}
        names = [name for name in self._names if not engine.products.sites(name).isdisjoint(below)]
        sites = sorted({i for name in names for i in engine.products.sites(name)})
        parts: dict[str, list[Tensor]] = {name: [engine.products.zeros(name, 0)] for name in names}
        for q in chunks(len(directions), engine.chunk_size or engine.costs.dense_chunk()):
            split = directions[q].split([s.numel() for s in statistics], -1)
            cotangents = [part.reshape(-1, *s.shape) for part, s in zip(split, statistics, strict=True)]
            deltas = dict(zip(sites, engine.vjp(statistics, structure.edges(sites), cotangents), strict=True))
            for name in names:
                parts[name].append(engine.products.summed(name, deltas, len(directions[q]), {}))
        return {name: torch.cat(p) for name, p in parts.items()}

    def read(self, delta: dict[int, Tensor | None], count: int) -> None:
        """Take the coefficients of ``count`` columns from their cotangents with closed gates."""
        a = read_coefficients(self._engine, delta, count)
        self._a = torch.cat(list(a.values()), -1) @ self._basis

    def correction(self, name: str) -> Correction:
        """The correction of one parameter's rows for the columns last read."""
        return Correction(self._a, self._products[name]) if name in self._products else Correction()


def read_coefficients(engine: Engine, delta: dict[int, Tensor | None], count: int) -> dict[int, Tensor]:
    """A of every coupling before the chain through lower statistics, ``[n, c, R]``."""
    a: dict[int, Tensor] = {}
    for j in engine.structure.couplings:
        coupling, d = engine.trace.sites[j].coupling, delta[j]
        if d is None:
            a[j] = engine.output.new_zeros(engine.samples, count, engine.structure.width[j])
        else:
            a[j] = coupling.per_sample(d, engine.samples)
    return a
