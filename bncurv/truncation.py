"""The leading coupling directions, for ``tol > 0``: the strongest left singular vectors of A (``directions.py``)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bncurv.blocks import Correction, Source
from bncurv.budget import chunks
from bncurv.costs import Costs
from bncurv.passes import Passes
from bncurv.probes import pattern
from bncurv.products import Products

PROBES = 4  # random combinations of dropped directions that estimate the error of a truncation


class TruncatedDirections:
    """Leading directions of the whole coupling: A = U Σ Oᵀ, kept while the tail is above ``tol``.

    The directions U_q on all statistics at once are pulled back with open gates, r passes. What is dropped,
    ΔV = Σ_{q>r} O_q σ_q P_q with orthonormal O_q, has E‖Σ_{q>r} ε_q σ_q P_q‖² = ‖ΔV‖_F² for random signs ε: a few more
    passes estimate it.

    Args:
        passes: passes through the graph.
        products: parameter products there.
        costs: chooses how many are pulled back at once.
        sources: all columns that will be pulled back.
        names: parameters to pull back for.
        tol: keep the smallest r with (Σ_{q>r} σ_q²)^(1/2) <= tol (Σ_q σ_q²)^(1/2).

    Attributes:
        error: estimated ‖ΔV‖_F by parameter name, over all sources together.
        kept: number of directions kept.
    """

    def __init__(
        self, passes: Passes, products: Products, costs: Costs, sources: list[Source], tol: float, names: list[str]
    ) -> None:
        self._passes, self._products, self._costs, self._names = passes, products, costs, names
        a = torch.cat([self._all_coefficients(s) for s in sources])  # [K, R]
        (gram,) = passes.ranks.sum([(a.T @ a).double()], "AᵀA")
        squares, U = torch.linalg.eigh(gram)
        for ranks in (passes.ranks, passes.ranks.helpers):  # one rank's signs and bases for all
            U = ranks.first(U, "basis of the statistics")
        squares, U = squares.flip(0).clamp(min=0), U.flip(1)
        tail = squares.flip(0).cumsum(0).flip(0)  # Σ_{q >= r}
        kept = int((tail > tol**2 * tail[0]).sum())
        self.kept = int(max(passes.ranks.everybody.numbers(kept)))  # all go through the same passes
        self._basis = U[:, : self.kept].to(a.dtype)
        self._P = self._pull(self._basis.T)
        signs = pattern((PROBES, len(squares) - self.kept), U).sign()
        probes = signs * squares[self.kept :].sqrt() @ U[:, self.kept :].T
        dropped = self._pull(probes.to(a.dtype))
        self.error = {n: float(torch.linalg.vector_norm(p)) / PROBES**0.5 for n, p in dropped.items()}

    def _all_coefficients(self, source: Source) -> Tensor:
        passes, parts = self._passes, []
        for c in chunks(source.columns_per_sample, self._costs.column_chunk([])):
            columns = source.columns(c)
            delta = passes.closed_vjp(passes.output, passes.structure.couplings, columns)
            parts.append(torch.cat(list(passes.coefficients(delta, len(columns)).values()), -1).flatten(0, 1))
        return torch.cat(parts)

    def _pull(self, directions: Tensor) -> dict[str, Tensor]:
        """Directions ``[q, R]`` on all statistics, pulled back with open gates: ``[q, *p]`` per parameter."""
        passes, products, structure = self._passes, self._products, self._passes.structure
        statistics = [passes.sites[j].coupling.statistics for j in structure.couplings]
        below = {i for j in structure.couplings for i in structure.calls_in(passes.sites[j].upstream)}
        names = [name for name in self._names if not structure.sites(name).isdisjoint(below)]
        sites = sorted({i for name in names for i in structure.sites(name)})
        parts: dict[str, list[Tensor]] = {name: [products.zeros(name, 0)] for name in names}
        helpers = passes.ranks.helpers
        own = directions[helpers.share(len(directions))]
        for q in chunks(len(own), self._costs.dense_chunk()):
            split = own[q].split([s.numel() for s in statistics], -1)
            cotangents = [part.reshape(-1, *s.shape) for part, s in zip(split, statistics, strict=True)]
            deltas = dict(zip(sites, passes.vjp(statistics, structure.edges(sites), cotangents), strict=True))
            for name in names:
                parts[name].append(products.summed(name, deltas, len(own[q]), {}))
        rows = passes.ranks.sums({name: torch.cat(p) for name, p in parts.items()}, "P")
        return helpers.joined(rows, len(directions), "P")

    def read(self, delta: Mapping[int, Tensor | None], count: int) -> None:
        """Take the coefficients of ``count`` columns from their cotangents with closed gates."""
        a = self._passes.coefficients(delta, count)
        self._a = torch.cat(list(a.values()), -1) @ self._basis

    def correction(self, name: str) -> Correction:
        """The correction of one parameter's rows for the columns last read."""
        return Correction(self._a, self._P[name]) if name in self._P else Correction()
