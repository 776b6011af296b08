"""Passes from the batch statistics down: rows of P and B, some coordinates of one coupling at a time.

Letters: head of ``engine.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from bncurv.certificate import unowned
from bncurv.order import Order
from bncurv.passes import Passes, vjp
from bncurv.probes import pattern
from bncurv.products import Products

Pulled = tuple[dict[str, Tensor], dict[int, Tensor]]


class StatisticsPasses:
    """Backward passes that start at batch statistics, those of lower layers held constant.

    Args:
        passes: passes through the graph.
        products: parameter products there.
    """

    def __init__(self, passes: Passes, products: Products) -> None:
        self._passes, self._products = passes, products
        self._sites, self._structure = passes.sites, passes.structure

    def sisters(self) -> list[list[int]]:
        """`Structure.sisters`, those apart that have a row in common below."""
        found: list[list[int]] = []
        for group in self._structure.sisters:
            found += [group] if not group[1:] or self._rows(group) is not None else [[j] for j in group]
        return found

    def _rows(self, group: list[int]) -> dict[int, Order | None] | None:
        """By site below, which of several couplings each row belongs to; ``None`` if they have rows in common."""
        key, known = tuple(group), self._structure.rows_of_sisters
        if key not in known:
            below, outputs = self._structure.below[group[0]], [self._sites[j].coupling.statistics for j in group]
            edges, u = self._structure.edges(below), pattern((len(group), *outputs[0].shape), outputs[0])

            def pull(v: Tensor) -> list[Tensor | None]:
                return [None if d is None else d[0] for d in vjp(outputs, edges, [one[None] for one in v])]

            with self._passes.closed():
                axes = {i: self._sites[j].mark.row_axes for i, j in enumerate(below)}
                bad, orders = unowned(pull, u, pull(u), axes, len(group))
            known[key] = None if bad else {j: orders.get(i) for i, j in enumerate(below)}
        return known[key]

    def pull(self, group: list[int], q: slice, names: list[str]) -> list[Pulled]:
        """Pull the coordinates ``q`` of couplings' statistics back to the parameters and statistics below.

        Args:
            group: couplings that have no row in common below: a pass serves them all.
            q: coordinates, of each.
            names: the parameters.

        Returns:
            For each, rows of P ``[q, *p]`` by name, rows of B ``[q, R]`` by lower coupling (those that are reached).
        """
        return self._together(group, q, names) if group[1:] else [self._alone(group[0], q, names)]

    def _together(self, group: list[int], q: slice, names: list[str]) -> list[Pulled]:
        rows, first, count = self._rows(group), group[0], len(group)
        assert rows is not None
        lower, (_, cotangents) = self._structure.lower(first), self._start(first, q)
        sites = self._structure.below[first]
        with self._passes.closed():
            outputs = [self._sites[j].coupling.statistics for j in group]
            got = self._passes.vjp(outputs, self._structure.edges(sites), [cotangents] * count)
        delta = dict(zip(sites, got, strict=True))
        received = {}
        for i in lower:
            d = delta[i]
            if d is not None:
                received[i] = self._sites[i].coupling.per_sample(d, count, rows[i])
        products = {name: self._products.by_group(name, delta, rows, count, len(cotangents)) for name in names}
        return [({n: p[g] for n, p in products.items()}, {i: b[g] for i, b in received.items()}) for g in range(count)]

    def _alone(self, j: int, q: slice, names: list[str]) -> Pulled:
        """One coupling.

        The layer directly below takes no part: its parameters need no pass, and of its output's cotangent, which has
        one channel, its input's is made at once (`Layer.from_channels`). A single cotangent, which is as much as fits
        where maps are large, is summed over the batch on the way by PyTorch's own kernels; several are kept at all
        layers and then multiplied.
        """
        output, cotangents = self._start(j, q)
        pull = self._summed_on_the_way if len(cotangents) == 1 else self._summed_afterwards
        return pull(j, output, cotangents, names)

    def _start(self, j: int, q: slice) -> tuple[Tensor | GradientEdge, Tensor]:
        """Where a pass for coordinates of coupling ``j``'s statistics starts, and their cotangents there."""
        coupling, direct = self._sites[j].coupling, self._structure.direct[j]
        index = torch.arange(q.start, q.stop, device=coupling.statistics.device)
        if direct is not None:
            call, (channel, values) = self._sites[direct].call, coupling.own_cotangents(index)
            return call.below[0], call.layer.from_channels(call.arguments, values, channel)
        every = torch.arange(self._structure.width[j], device=index.device)
        one_hot = (index[:, None] == every).to(coupling.statistics.dtype)
        return coupling.statistics, one_hot.view(-1, *coupling.statistics.shape)

    def _summed_afterwards(self, j: int, output: Tensor | GradientEdge, cotangents: Tensor, names: list[str]) -> Pulled:
        lower = self._structure.lower(j)
        used = {i for name in names for i in self._structure.sites(name)}
        sites = sorted({*lower, *used.intersection(self._structure.below[j])})
        delta = self._passes.closed_vjp(output, sites, cotangents)
        received: dict[int, Tensor] = {}
        sums: dict[int, Tensor] = {}
        for i in lower:
            d = delta[i]
            if d is not None:
                received[i], affine = self._sites[i].coupling.summed(d)
                if affine is not None:
                    sums[i] = affine
        return {name: self._products.summed(name, delta, len(cotangents), sums) for name in names}, received

    def _summed_on_the_way(self, j: int, output: Tensor | GradientEdge, cotangent: Tensor, names: list[str]) -> Pulled:
        lower = {i: self._sites[i].coupling for i in self._structure.lower(j)}
        ends = [self._sites[i].edge if c.handle is None else c.handle for i, c in lower.items()]
        with self._passes.closed(sums=True):
            got = self._passes.vjp(output, [*(self._products.wanted[name] for name in names), *ends], cotangent)
        received: dict[int, Tensor] = {}
        means: dict[int, Tensor] = {}  # what a BatchNorm's mean receives, by the site directly below
        for (i, c), g in zip(lower.items(), got[len(names) :], strict=True):
            if g is not None:
                received[i] = c.summed(g)[0] if c.handle is None else g.flatten(1)
                direct = self._structure.direct[i]
                if direct is not None:
                    means[direct] = received[i][:, : self._structure.width[i] // 2]
        rows = {name: self._products.zeros(name, 1) if g is None else g for name, g in zip(names, got, strict=False)}
        return {name: self._products.centre(name, p, means) for name, p in rows.items()}, received
