"""Passes from the batch statistics down: rows of P and B, some coordinates of one coupling at a time.

Letters: head of ``engine.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from bncurv.passes import Passes
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

    def pull(self, j: int, q: slice, names: list[str]) -> Pulled:
        """Pull the coordinates ``q`` of coupling ``j``'s statistics back to the parameters and statistics below.

        The layer directly below takes no part: its parameters need no pass, and of its output's cotangent, which has
        one channel, its input's is made at once (`Layer.from_channels`). A single cotangent, which is as much as fits
        where maps are large, is summed over the batch on the way by PyTorch's own kernels; several are kept at all
        layers and then multiplied.

        Returns:
            Rows of P ``[q, *p]`` by name, rows of B ``[q, R]`` by lower coupling (those that are reached).
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
