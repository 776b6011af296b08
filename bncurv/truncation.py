"""The leading coupling directions, for ``tol > 0``: the strongest singular vectors of A ‖P‖ (``directions.py``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bncurv.blocks import Correction, Source
from bncurv.budget import chunks
from bncurv.costs import Costs
from bncurv.passes import Passes
from bncurv.probes import pattern
from bncurv.products import Products
from bncurv.ranks import RankFailure

PROBES = 4  # random combinations that estimate the error of a truncation, and the lengths of directions
LEAST = 1e-3  # of the longest direction: shorter ones count as if they were as long


class Leading:
    """The leading combinations of statistics: A W = O Σ Uᵀ, kept while the tail is above ``tol``.

    W = diag ‖P_q‖, roughly: a statistic that moves the parameters far counts as much as one that is felt much.

    Args:
        passes: passes through the graph.
        costs: chooses how many columns are pulled back at once.
        sources: all columns that will be pulled back.
        wanted: the parameters.
        tol: keep the smallest r with (Σ_{q>r} σ_q²)^(1/2) <= tol (Σ_q σ_q²)^(1/2).

    Attributes:
        kept: r.
        basis: from coefficients A to those of the directions, W U ``[R, r]``.
        directions: combinations of statistics to pull back, U W⁻¹ ``[r, R]``.
        dropped: random ones of those dropped, Σ_{q>r} ε_q σ_q U_q W⁻¹ for random signs ε, ``[PROBES, R]``.
    """

    def __init__(
        self, passes: Passes, costs: Costs, sources: list[Source], wanted: Sequence[Tensor], tol: float
    ) -> None:
        self._passes, self._costs = passes, costs
        W, a = self._lengths(wanted), torch.cat([self._all_coefficients(s) for s in sources])  # [K, R]
        a = a * W
        (gram,) = passes.ranks.sum([(a.T @ a).double()], "AᵀA")
        squares, U = torch.linalg.eigh(gram)
        for ranks in (passes.ranks, passes.ranks.helpers):  # one rank's signs and bases for all
            U = ranks.first(U, "basis of the statistics")
        squares, U = squares.flip(0).clamp(min=0), U.flip(1)
        tail = squares.flip(0).cumsum(0).flip(0)  # Σ_{q >= r}
        kept = int((tail > tol**2 * tail[0]).sum())
        self.kept = int(max(passes.ranks.everybody.numbers(kept)))  # all go through the same passes
        leading = U[:, : self.kept].to(a.dtype)
        self.basis, self.directions = leading * W[:, None], leading.T / W
        signs = pattern((PROBES, len(squares) - self.kept), U).sign()
        self.dropped = (signs * squares[self.kept :].sqrt() @ U[:, self.kept :].T).to(a.dtype) / W

    def _lengths(self, wanted: Sequence[Tensor]) -> Tensor:
        """‖P_q‖ of every statistic, roughly, ``[R]``: the root mean square of P z over a few random z.

        They decide which directions are kept, and nothing else: where the graph cannot be differentiated twice, ones.
        """
        passes = self._passes
        statistics = [passes.sites[j].coupling.statistics for j in passes.structure.couplings]
        try:
            with torch.enable_grad():
                u = [torch.zeros_like(s, requires_grad=True) for s in statistics]
                pulled = torch.autograd.grad(statistics, wanted, u, create_graph=True, allow_unused=True)
            w = [t for t in pulled if t is not None and t.requires_grad]
            moved = []  # P z, a pass of the pass: w is linear in u
            generator = torch.Generator("cpu").manual_seed(0)  # random states of the day are neither read nor moved
            for _ in range(PROBES):
                z = [torch.randn(t.shape, generator=generator, dtype=t.dtype, device="cpu").to(t.device) for t in w]
                got = torch.autograd.grad(w, u, z, retain_graph=True, materialize_grads=True)
                moved.append(torch.cat([t.flatten() for t in got]))
            passes.note(1 + PROBES)
        except RankFailure:
            raise
        except (RuntimeError, NotImplementedError):
            return torch.cat([torch.ones_like(s).flatten() for s in statistics])
        (total,) = passes.ranks.sum([torch.stack(moved)], "basis of the statistics")
        lengths = total.square().mean(0).sqrt()
        lengths = passes.ranks.helpers.first(lengths, "basis of the statistics")
        return lengths.clamp(min=LEAST * float(lengths.max())) if bool(lengths.max() > 0) else torch.ones_like(lengths)

    def _all_coefficients(self, source: Source) -> Tensor:
        passes, parts = self._passes, []
        for c in chunks(source.columns_per_sample, self._costs.column_chunk([])):
            columns = source.columns(c)
            delta = passes.closed_vjp(passes.output, passes.structure.couplings, columns)
            parts.append(torch.cat(list(passes.coefficients(delta, len(columns)).values()), -1).flatten(0, 1))
        return torch.cat(parts)


class TruncatedDirections:
    """The leading directions pulled back on all statistics at once, with open gates: r passes.

    What is dropped, ΔV = Σ_{q>r} O_q σ_q D_q with orthonormal O_q and D_q the direction pulled back, has
    E‖Σ_{q>r} ε_q σ_q D_q‖² = ‖ΔV‖_F² for random signs ε: a few more passes estimate it.

    Args:
        passes: passes through the graph.
        products: parameter products there.
        costs: chooses how many are pulled back at once.
        leading: which directions.
        names: parameters to pull back for.

    Attributes:
        error: estimated ‖ΔV‖_F by parameter name, over all sources together.
    """

    def __init__(self, passes: Passes, products: Products, costs: Costs, leading: Leading, names: list[str]) -> None:
        self._passes, self._products, self._costs, self._names = passes, products, costs, names
        self._basis, self._P = leading.basis, self._pull(leading.directions)
        dropped = self._pull(leading.dropped)
        self.error = {n: float(torch.linalg.vector_norm(p)) / PROBES**0.5 for n, p in dropped.items()}

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
