"""Coupling directions: what the batch statistics contribute to V, V[k] = own[k] + Σ_q A[q, k] P[q].

The directions are the coordinates of the statistics themselves. With closed gates a direction passes only the layers
below its BatchNorm, up to the next statistics; B carries A from upper statistics to lower ones (glossary:
``engine.py``). For ``tol > 0`` see ``truncation.py``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from einops import rearrange
from torch import Tensor

from bncurv.blocks import Correction
from bncurv.budget import chunks
from bncurv.costs import Costs
from bncurv.passes import Passes
from bncurv.products import Products
from bncurv.ranks import Ranks
from bncurv.statistics_passes import StatisticsPasses


class Directions:
    """The statistics' own coordinates: exact.

    Args:
        passes: passes through the graph.
        products: parameter products there.
        costs: chooses how many directions are pulled back at once.
        names: parameters to pull back for.
        between: B where it is known already, by upper and lower coupling.
    """

    def __init__(
        self,
        passes: Passes,
        products: Products,
        costs: Costs,
        names: list[str],
        between: dict[int, dict[int, Tensor]] | None = None,
    ) -> None:
        self._passes, self._products, self._costs = passes, products, costs
        self._from_statistics = StatisticsPasses(passes, products)
        structure = self._structure = passes.structure
        self.between = dict(between or {})
        self._a: dict[int, Tensor] = {}
        self._P = {name: products.zeros(name, structure.entries[name]) for name in names}
        self._rows: dict[str, dict[int, Tensor]] = {}  # views of P: the part of each coupling
        for name, P in self._P.items():
            above = structure.pulled_from[name]
            self._rows[name] = dict(zip(above, P.split([structure.width[j] for j in above]), strict=False))
        self._direct: dict[str, list[tuple[int, Tensor]]] = {}
        for sisters in self._from_statistics.sisters():
            self._pull(sisters)
            for j in sisters:
                self._pull_direct(j)
        if passes.ranks.size > 1:
            self._sum_over_ranks(passes.ranks, between)
        elif passes.ranks.divides:
            self._sum_over_ranks(passes.ranks.helpers, between)

    def _sum_over_ranks(self, ranks: Ranks, known: Mapping[int, Mapping[int, Tensor]] | None) -> None:
        """Everything until here was local: chunks need not be the same on all ranks.

        Each has pulled all coordinates back to its own samples; or its share of them to all samples, and has zeros in
        the rows of the others.
        """
        products = self._products
        pairs = [(j, i) for j in self.between for i in self.between[j] if not known or j not in known]
        total = ranks.sum([self.between[j][i] for j, i in pairs], "B")
        for (j, i), b in zip(pairs, total, strict=True):
            self.between[j][i] = b
        for name, P in self._P.items():
            if len(P) and not products.vanishes(name):
                (self._P[name],) = ranks.sum([P], "P")
            if name in self._direct and not self._passes.ranks.divides:
                own = ranks.sum([p for _, p in self._direct[name]], "P of the layer below a BatchNorm")
                self._direct[name] = [(j, p) for (j, _), p in zip(self._direct[name], own, strict=True)]

    def _pull_direct(self, j: int) -> None:
        """P of the layer directly below a BatchNorm, all channels at once, without a pass."""
        for name in self._P:
            for i, role in self._structure.uses.get(name, ()):
                if i == self._structure.direct[j]:
                    coupling, width = self._passes.sites[j].coupling, self._structure.width[j]
                    m = 1 if i in self._products.centred else 2  # the mean drops out where the input is centred
                    coordinates = torch.arange(width - m * width // 2, width, device=coupling.statistics.device)
                    _, own = coupling.own_cotangents(coordinates)  # [(moment o), n, *position]
                    cotangents = rearrange(own, "(m o) n ... -> m n o ...", m=m)
                    self._direct.setdefault(name, []).append((j, self._products.summed_at(i, role, cotangents)))

    def _pull(self, sisters: list[int]) -> None:
        """P of couplings, their statistics pulled back one coordinate after the other; B too where still unknown."""
        width, first = self._structure.width, sisters[0]
        names = [name for name, rows in self._rows.items() if first in rows and not self._products.vanishes(name)]
        known = first in self.between
        if not known:
            zeros = self._passes.output.new_zeros
            for j in sisters:
                self.between[j] = {i: zeros(width[j], width[i]) for i in self._structure.lower(j)}
        if not names and (known or not self.between[first]):
            return
        share = self._passes.ranks.helpers.share(width[first])
        for part in chunks(share.stop - share.start, self._costs.direction_chunk(first)):
            q = slice(share.start + part.start, share.start + part.stop)
            for j, (products, received) in zip(sisters, self._from_statistics.pull(sisters, q, names), strict=True):
                for name in names:
                    self._rows[name][j][q] = products[name]
                for i, rows in received.items():
                    self.between[j][i][q] = rows

    def read(self, delta: Mapping[int, Tensor | None], count: int) -> None:
        """Take A from the cotangents of ``count`` columns with closed gates."""
        self.carry(self._passes.coefficients(delta, count))

    def carry(self, a: dict[int, Tensor]) -> None:
        """Take coefficients ``[n, c, R]`` by coupling, and carry them down through the lower statistics, in place."""
        self._a = a
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
        A, P = self._joined.get(above), self._P[name] if above else None
        direct = tuple((self._a[j].unflatten(-1, (2, -1))[:, :, -len(p) :], p) for j, p in self._direct.get(name, ()))
        return Correction(A, P, direct)
