"""What a way costs, before it is taken: FLOPs and bytes from the recorded calls; chunk sizes.

The unit is one floating point operation of a matrix product. Other work is converted at rates measured on two CPU
cores (float32): elementwise work per entry, the fixed cost of one call into the autograd engine per graph node.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy

from bncurv.budget import TALL, USUAL, Budget
from bncurv.graph import Trace
from bncurv.marks import Call
from bncurv.memory import BATCHED, Memory
from bncurv.products import Products
from bncurv.spread import Shard
from bncurv.structure import ALL, Structure

WORTHWHILE = 3  # fewer backward passes than this are not done at once
ELEMENTWISE = 100.0  # one entry of a layer's output through normalisation, activation and their copies
ROW_ENTRY = 60.0  # one entry of V: written, corrected, squared
POSITIONS = 1.5  # by how much sums of squares over several positions take longer than their operations
COUPLED = 1.25  # the coupled way's smaller products run at a lower rate
CALL = 2e6  # one layer in one call of the engine


class Costs:
    """Cost model of one recorded forward pass, and the sizes of chunks that follow from it.

    Args:
        trace: the traced graph.
        structure: its structure.
        products: parameter products there.
        columns: columns per sample that will be asked for.
        squares: whether sums of squares of V are enough for some of them.
        chunk_size: most vectors (cotangents of the batch, rows of V) held at once; ``None`` chooses by bytes.
        shard: which samples of the batch are here.
        budget: how many bytes.
        memory: what a cotangent takes, where there is a limit to everything together.

    Attributes:
        budget: how many bytes.
    """

    def __init__(
        self,
        trace: Trace,
        structure: Structure,
        products: Products,
        columns: int,
        squares: bool = False,
        chunk_size: int | None = None,
        *,
        shard: Shard,
        budget: Budget = USUAL,
        memory: Memory | None = None,
    ) -> None:
        self._structure, self._products, self._columns = structure, products, columns
        self._squares_do, self._chunk_size, self.budget, self._memory = squares, chunk_size, budget, memory
        self._samples, self._total, self._wanted = shard.largest, shard.total, products.wanted
        self._share = shard.held / products.samples  # of the largest shard: all ranks must decide alike
        self._helpers = shard.helpers
        self._calls = {j: s.mark.call for j, s in enumerate(trace.sites) if s.mark.call}
        flops = {j: call.layer.flops(call.arguments, call.output) for j, call in self._calls.items()}
        self._forward = {j: self._share * work for j, work in flops.items()}
        self._computed = {name: self._entries_computed(name) for name in products.uses}
        self._itemsize = next(iter(self._wanted.values())).element_size()

    def _pass(self, sites: int, products: list[int]) -> float:
        """One cotangent of the batch through a bit set of sites, with the parameter products of some of them."""
        cost = 0.0
        for j, call in self._calls.items():
            if sites >> j & 1:
                cost += self._forward[j] * (bool(call.below) + (j in products)) + ELEMENTWISE * self._entries(call)
        return cost

    def _entries_computed(self, name: str) -> int:
        """Entries of what is computed from a parameter, W = φ(θ): a row passes them on its way to θ."""
        uses = [(self._calls[j], role) for j, role in self._products.uses[name]]
        return sum(call.parameters[role].numel() for call, role in uses if role in call.leaves)

    def _entries(self, call: Call) -> int:
        """Entries of a layer's output, on the rank with most samples."""
        return round(self._share * call.output.numel())

    def _fitting(self, sites: int, rows: bool) -> int:
        """How many cotangents of the batch fit at the layers of a bit set of sites, with their parameters' rows."""
        calls = [call for j, call in self._calls.items() if sites >> j & 1]
        outputs = [self._entries(call) for call in calls]
        widest = max([1, *outputs, *(p.numel() for call in calls for p in call.parameters.values() if rows)])
        by_all, by_widest = self.budget.chunk // max(1, sum(outputs)), self.budget.widest // widest
        return min(by_all, by_widest) // self._itemsize

    def _limited(self, count: int, each: Callable[[Memory], int]) -> int:
        """``count`` cotangents, or as many as keep to the limit with so many bytes each."""
        if self._memory is None:
            return count
        return max(1, min(count, int((self.budget.chunk - self._memory.spare) // (BATCHED * each(self._memory)))))

    def _batch(self, sites: int) -> int:
        """How many backward passes to do at once; few large ones are faster one after the other."""
        count = self._fitting(sites, rows=True)
        return count if count >= WORTHWHILE else 1

    def of_columns(self, columns: int) -> Costs:
        """The same for so many columns per sample, of which the squares are asked for."""
        costs = copy(self)
        costs._columns, costs._squares_do = columns, True
        return costs

    def with_budget(self, budget: Budget) -> Costs:
        """The same with other sizes."""
        costs = copy(self)
        costs.budget = budget
        return costs

    def whole(self, count: int) -> float:
        """So many cotangents of the whole batch through everything."""
        rows = count * sum(p.numel() for p in self._wanted.values())
        calls = -(-count // self.dense_chunk()) * len(self._calls)
        through = ELEMENTWISE * count * sum(self._computed.values())
        return count * self._pass(ALL, self._structure.calls_in(ALL)) + ROW_ENTRY * rows + through + CALL * calls

    def dense(self) -> float:
        """All N·C columns."""
        return self.whole(self._total * self._columns)

    def coupled(self, slow: list[str]) -> float:
        """C columns through everything, R directions through what is below, the rows of V and their correction."""
        cost = (self._columns + 2) * self._pass(ALL, self._structure.calls_in(ALL)) + 6 * CALL * len(self._calls)
        groups = self.groups([name for name in self._wanted if name not in slow])
        cost *= len(groups)
        for j, *_ in self._structure.sisters:
            sites = self._structure.below[j]
            if sites:
                count, through = -(-self._structure.width[j] // self._helpers), self._structure.through[j]
                calls = -(-count // self.direction_chunk(j)) * len(sites)
                cost += len(groups) * (count * self._pass(through, sites) + CALL * calls)
        for name in self._wanted:
            if self._direction_bytes(name) > (1 if self._memory else 4) * self.budget.direction:
                return float("inf")  # one parameter's P alone does not fit
            squares = self._squares_do and self.factored(name, self._columns)
            cost += self._squares(name, self._columns) if squares else self._rows(name, self._columns)
        return COUPLED * cost + (self.dense() if slow else 0.0)

    def truncated(self, directions: int, slow: list[str]) -> float:
        """The coupled way with so many directions of all statistics together, each through everything."""
        cost = (self._columns + directions) * self._pass(ALL, self._structure.calls_in(ALL))
        cost += CALL * len(self._calls) * (6 + -(-directions // self.dense_chunk()))
        cost += sum(self._rows(name, self._columns, directions) for name in self._wanted)
        return COUPLED * cost + (self.dense() if slow else 0.0)

    def _rows(self, name: str, columns: int, directions: int | None = None) -> float:
        """The rows of V of one parameter, corrected and squared."""
        rows = self._samples * columns
        directions = self._structure.entries[name] if directions is None else directions
        through = ELEMENTWISE * (rows + directions) * self._computed.get(name, 0)
        return rows * self._wanted[name].numel() * (2.0 * directions + ROW_ENTRY) + through

    def _squares(self, name: str, columns: int) -> float:
        """The sum of their squares, from the factors."""
        if not self._products.factors(name):
            return float("inf")
        directions, (positions, features) = self._structure.entries[name], self._products.positions(name)
        rows = self._samples * columns if positions > 1 else 0  # without their correction
        products = 2.0 * (directions + 2) * (self._samples * positions * (1 + columns / features) + directions)
        cost = self._wanted[name].numel() * (products + ROW_ENTRY * (directions + 2 + rows))
        return cost if positions == 1 else POSITIONS * cost

    def factored(self, name: str, columns: int) -> bool:
        """Whether the squares of ``columns`` columns per sample are cheaper from factors than from rows."""
        return self._squares(name, columns) < self._rows(name, columns)

    def _direction_bytes(self, name: str) -> int:
        """P of one parameter."""
        return self._itemsize * self._structure.entries[name] * self._wanted[name].numel()

    def groups(self, names: list[str]) -> list[list[str]]:
        """Parameters whose P is held at once, in forward order; a single one may exceed the budget."""
        found: list[list[str]] = []
        held = float("inf")
        for name in names:
            size = self._direction_bytes(name)
            if held + size > self.budget.direction:
                found, held = [*found, []], 0.0
            found[-1].append(name)
            held += size
        return found

    def column_chunk(self, names: list[str]) -> int:
        """Columns of the loss pulled back at once in the coupled way: at least as many as make A P a tall product."""
        directions = max((self._structure.entries[name] for name in names), default=0)
        tall = -(-TALL // self._samples) if directions > TALL else 1
        count = self._chunk_size or max(tall, self._fitting(ALL, rows=False))
        if self._memory is None:
            return count
        largest = self._itemsize * max((self._wanted[name].numel() for name in names), default=1)
        return self._limited(min(count, max(1, self.budget.row // largest)), lambda memory: memory.column)

    def dense_chunk(self) -> int:
        """Columns pulled back at once in the dense way."""
        return self._limited(self._chunk_size or min(128, self._batch(ALL)), lambda memory: memory.dense)

    def direction_chunk(self, j: int) -> int:
        """Directions of coupling ``j`` pulled back at once."""
        count = self._chunk_size or self._batch(self._structure.through[j])
        return self._limited(count, lambda memory: memory.direction(j))

    def row_chunk(self, name: str, count: int) -> int:
        """Samples whose rows of V are held at once."""
        most = self._chunk_size or self._total * count
        if self._chunk_size and not self._memory:
            return max(1, most // count)
        rows = self.budget.row // (self._itemsize * max(1, self._wanted[name].numel()))
        if self._structure.entries[name] > TALL and not self._memory:
            rows = max(rows, TALL)  # the correction's matrix product needs that many to run at its rate
        return max(1, int(min(rows, most) // count))
