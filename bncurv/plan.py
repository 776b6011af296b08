"""Which way the columns of one batch go, and what that is told (letters: ``engine.py``).

The cheaper one that applies: a certificate must find that nothing but the known couplings mixes samples, parameters
without a product go the dense way whatever the others do, and a limit to the memory is kept.
"""

from __future__ import annotations

from collections.abc import Callable

from bncurv.assurance import Assurance
from bncurv.blocks import Batch
from bncurv.costs import Costs
from bncurv.memory import Memory
from bncurv.slow import listed, warn_of_slow, warn_slow
from bncurv.structure import Structure

OUTSIDE = "used in a function that is no row of the layer table"
HOOKED = "below a tensor hook on a layer's output"
NO_SAMPLES = "used on rows that are no samples"


class Plan:
    """The way of one batch's columns.

    Args:
        batch: the recorded forward pass.
        structure: structure of its graph.
        costs: its costs.
        checks: of the coupled way there.
        memory: what the ways need, where there is a limit.
        columns: columns per sample.
        method: ``"auto"``, ``"coupled"`` or ``"dense"``.
        leading: where the coupling is truncated, tells how many directions of it there will be.

    Attributes:
        slow: parameters that must go the dense way.
    """

    def __init__(
        self,
        batch: Batch,
        structure: Structure,
        costs: Costs,
        checks: Assurance,
        memory: Memory | None,
        columns: int,
        method: str,
        leading: Callable[[], int] | None = None,
    ) -> None:
        self._wanted, self._trace, self._kinds = batch.parameters, batch.trace, batch.kinds
        self._ranks, self._shard, self._structure = batch.ranks, batch.shard, structure
        self._costs, self._checks, self._memory = costs, checks, memory
        self._columns, self._method, self._leading = columns, method, leading
        self._causes = self._without_product()
        self.slow = list(self._causes)

    def choose(self) -> str:
        """``"coupled"`` or ``"dense"``; warns of what is slow.

        Raises:
            RuntimeError: where the way asked for does not apply.
            ValueError: where no way keeps to the limit.
        """
        if self._method == "dense":
            return "dense"
        if self.slow:
            self._demand_dense(f"{listed(self.slow)} must go the dense way.")
            self._warn(self.slow)
        everybody = self._ranks.everybody  # all take the same way, for they meet again in messages
        # with a truncation, not before it is known how much of the coupling there is
        if self._leading is None and everybody.all(self._cheaper()) and not self._checks.offset():
            return "dense"
        problem = self._checks.mixing()
        if everybody.any(problem is not None) and not problem:
            problem = "another rank finds the samples of its batch mixed other than by a known coupled layer."
        if problem and self._method == "coupled":
            raise RuntimeError(f"method='coupled' does not apply: {problem} Use method='auto' or method='dense'.")
        if problem:
            self._demand_dense(problem)
            warn_slow(f"{problem} Taking the dense way: exact, one backward pass per component.")
            return "dense"
        strange = [n for n in self._wanted if n not in self.slow and self._structure.sites(n) & self._checks.strange]
        strange = everybody.union(strange, self._wanted)
        if strange:
            self._causes |= dict.fromkeys(strange, NO_SAMPLES)
            self._warn(strange)
            self.slow += strange
        if self._leading is None or self._method == "coupled":
            return "coupled"
        return "dense" if everybody.all(self._cheaper(self._leading())) else "coupled"

    def _cheaper(self, directions: int | None = None) -> bool:
        """Whether the dense way costs less than the coupled one with all directions, or so many; and fits."""
        if self._method == "coupled" or not (self._memory is None or self._memory.fits("dense")):
            return False
        coupled = self._costs.coupled(self.slow) if directions is None else self._costs.truncated(directions, self.slow)
        return self.dense_costs.dense() <= coupled

    @property
    def dense_costs(self) -> Costs:
        """Costs at the sizes of the dense way, where there is a limit to keep to."""
        if self._memory is None or not self._memory.fits("dense"):
            return self._costs
        return self._costs.with_budget(self._memory.budget("dense"))

    @property
    def directions(self) -> int:
        """Backward passes for the directions, on the rank with most."""
        return sum(-(-width // self._shard.helpers) for width in self.widths)

    @property
    def widths(self) -> list[int]:
        """Directions that take a pass, by coupling, sisters together."""
        return [self._structure.width[j] for j, *_ in self._structure.sisters if self._structure.below[j]]

    def _without_product(self) -> dict[str, str]:
        """Parameters that must go the dense way, and why."""
        loose = {id(p) for p in self._trace.loose}
        causes = {name: OUTSIDE for name, p in self._wanted.items() if id(p) in loose}
        for name in self._structure.uses:
            sites = self._structure.sites(name)
            if not sites.isdisjoint(self._structure.hooked):
                causes[name] = HOOKED
        return causes

    def _demand_dense(self, why: str) -> None:
        if self._memory:
            self._memory.demand(["dense"], why)

    def _warn(self, slow: list[str]) -> None:
        causes = {name: self._causes[name] for name in slow}
        warn_of_slow(causes, self._kinds(), self._columns + self.directions, self._shard.total * self._columns)
