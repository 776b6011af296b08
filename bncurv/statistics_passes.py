"""Passes from the batch statistics down: rows of P and B, some coordinates of one coupling at a time.

Letters: head of ``engine.py``.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from bncurv.passes import closed_gates
from bncurv.statistics import BatchNormCoupling

if TYPE_CHECKING:
    from bncurv.engine import Engine

Pulled = tuple[dict[str, Tensor], dict[int, Tensor]]


class StatisticsPasses:
    """Backward passes that start at batch statistics, those of lower layers held constant.

    Args:
        engine: the engine.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = weakref.proxy(engine)  # no cycle: graphs die with the call
        self._sites, self._structure, self._products = engine.trace.sites, engine.structure, engine.products

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
        if direct is not None and isinstance(coupling, BatchNormCoupling):
            call, (channel, values) = self._sites[direct].call, coupling.own_cotangents_of(index)
            return call.below[0], call.layer.from_channels(call.arguments, values, channel)
        every = torch.arange(self._structure.width[j], device=index.device)
        one_hot = (index[:, None] == every).to(coupling.statistics.dtype)
        return coupling.statistics, one_hot.view(-1, *coupling.statistics.shape)

    def _summed_afterwards(self, j: int, output: Tensor | GradientEdge, cotangents: Tensor, names: list[str]) -> Pulled:
        lower = self._structure.lower(j)
        used = {i for name in names for i in self._products.sites(name)}
        sites = sorted({*lower, *used.intersection(self._structure.below[j])})
        delta = self._engine.closed_vjp(output, sites, cotangents)
        received: dict[int, Tensor] = {}
        sums: dict[int, Tensor] = {}
        for i in lower:
            c, d = self._sites[i].coupling, delta[i]
            if d is not None and isinstance(c, BatchNormCoupling):
                sums[i] = c.sums(d)
                received[i] = c.from_sums(sums[i])
            elif d is not None:
                received[i] = c.summed(d)
        return {name: self._products.summed(name, delta, len(cotangents), sums) for name in names}, received

    def _summed_on_the_way(self, j: int, output: Tensor | GradientEdge, cotangent: Tensor, names: list[str]) -> Pulled:
        engine, lower = self._engine, {i: self._sites[i].coupling for i in self._structure.lower(j)}
        ends = [c.handle if isinstance(c, BatchNormCoupling) else self._sites[i].edge for i, c in lower.items()]
        with closed_gates(self._sites, sums=True):
            got = engine.vjp(output, [*(engine.wanted[name] for name in names), *ends], cotangent)
        received: dict[int, Tensor] = {}
        means: dict[int, Tensor] = {}  # what a BatchNorm's mean receives, by the site directly below
        for (i, c), g in zip(lower.items(), got[len(names) :], strict=True):
            if g is not None:
                received[i] = g.flatten(1) if isinstance(c, BatchNormCoupling) else c.summed(g)
                direct = self._structure.direct[i]
                if direct is not None:
                    means[direct] = received[i][:, : self._structure.width[i] // 2]
        rows = {name: self._products.zeros(name, 1) if g is None else g for name, g in zip(names, got, strict=False)}
        return {name: self._products.centre(name, p, means) for name, p in rows.items()}, received
