"""What a way costs, before it is taken: FLOPs and bytes from the recorded calls; chunk sizes."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bncurv.engine import Engine

CHUNK_BYTES = 32 * 2**20  # cotangents of all layers held at once
RIGHT_BYTES = 512 * 2**20  # unfolded inputs of all layers kept for reuse
ROW_BYTES = 4 * 2**20  # rows of V of one parameter held at once: stays in cache while they are squared
ELEMENTWISE = 60.0  # FLOPs that one output entry's elementwise work (normalisation, activation) is worth


def chunks(total: int, size: int) -> Iterator[slice]:
    """Slices of at most ``size`` that cover ``range(total)``."""
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


class Costs:
    """Cost model of one recorded forward pass, in FLOPs (elementwise work converted)."""

    def __init__(self, engine: Engine, columns: int) -> None:
        self._engine, self._columns = weakref.proxy(engine), columns  # no cycle: graphs die with the call
        self._calls = [(j, s.mark.call) for j, s in enumerate(engine.trace.sites) if s.mark.call]
        self._backward = {}  # site → FLOPs of one cotangent through it: input gradient + parameter product
        for j, call in self._calls:
            forward = call.layer.flops(call.arguments, call.output)
            needs_input = bool(call.below)
            self._backward[j] = forward * (1 + needs_input) + ELEMENTWISE * call.output.numel()
        self._itemsize = engine.output.element_size()
        self._per_column = self._itemsize * sum(call.output.numel() for _, call in self._calls)

    def _through(self, sites: int) -> float:
        return sum(cost for j, cost in self._backward.items() if sites >> j & 1)

    def dense(self) -> float:
        """All N·C columns through everything."""
        return self._engine.samples * self._columns * self._through(-1)

    def coupled(self, slow: list[str]) -> float:
        """C columns through everything, R directions through what is below, and the products A P."""
        engine = self._engine
        cost = self._columns * self._through(-1)
        for j in engine.couplings:
            site = engine.trace.sites[j]
            cost += site.mark.coupling.statistics.numel() * self._through(site.upstream)
        for name, p in engine.wanted.items():
            directions = sum(engine.trace.sites[j].mark.coupling.statistics.numel() for j in engine.above(name))
            cost += engine.samples * self._columns * p.numel() * (2.0 * directions + ELEMENTWISE / 4)
        return cost + (self.dense() if slow else 0.0)

    def column_chunk(self) -> int:
        """Columns of the loss pulled back at once in the coupled way."""
        return max(1, int(CHUNK_BYTES * 8 // max(1, self._per_column)))

    def dense_chunk(self) -> int:
        """Columns pulled back at once in the dense way."""
        return max(1, int(CHUNK_BYTES // max(1, self._per_column)))

    def direction_chunk(self, j: int) -> int:
        """Directions of coupling ``j`` pulled back at once."""
        below = self._engine.trace.sites[j].upstream
        size = self._itemsize * sum(call.output.numel() for i, call in self._calls if below >> i & 1)
        return max(1, int(CHUNK_BYTES // max(1, size)))

    def row_chunk(self, name: str, count: int) -> int:
        """Samples whose rows of V are held at once."""
        return max(1, int(ROW_BYTES // (self._itemsize * count * max(1, self._engine.wanted[name].numel()))))
