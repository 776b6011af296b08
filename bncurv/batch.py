"""All quantities at one recorded batch: what both gestures share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from bncurv.bars import tqdm
from bncurv.blocks import Batch
from bncurv.checks import check_grads, check_precision
from bncurv.engine import Engine
from bncurv.memory import Allowance
from bncurv.quantities import Quantity


def compute(
    batch: Batch,
    quantities: Sequence[Quantity],
    bar: tqdm,
    method: str = "auto",
    chunk_size: int | None = None,
    tol: float = 0.0,
    limit: Limit | None = None,
    left: int = 1,
) -> tuple[dict[str, Any], Engine]:
    """All quantities at one recorded forward pass, nothing computed twice.

    Args:
        batch: the forward pass and its loss.
        quantities: what to compute.
        bar: progress bar, counted in backward passes.
        method: which way, see `bncurv.curvature`.
        chunk_size: see `bncurv.curvature`.
        tol: see `bncurv.curvature`.
        limit: to the memory, see `bncurv.curvature`.
        left: how many mini-batches there are still, this one among them, as far as it is known.

    Returns:
        For each quantity's field its part, and the engine that made them.
    """
    check_precision(batch.trace, batch.output)
    asked = {q.field: q.sources(batch) for q in quantities}
    sources = {key: source for wants in asked.values() for key, source in wants.items()}
    keep_own = any(q.coupled_only for q in quantities)
    if keep_own and method == "auto":
        method = "coupled"
    squares = {key for key in sources if all(q.squares_only for q in quantities if key in asked[q.field])}
    allowance = None if limit is None else limit.at(batch)
    engine = Engine(batch, sources, method, chunk_size, bar.update, tol, keep_own, squares, allowance)
    bar.total = bar.n + engine.planned * max(1, left)
    states = {q.field: q.start(batch) for q in quantities}
    grads = {name: (p.grad, None if p.grad is None else p.grad._version) for name, p in batch.parameters.items()}
    for key, rows in engine.pull():
        batch.ranks.everybody.listen()
        for q in quantities:
            if key in asked[q.field]:
                q.add(states[q.field], key, rows)
    check_grads(batch.parameters, grads)
    everybody, sharing = batch.ranks.everybody, batch.ranks.size * batch.ranks.helpers.size
    return {q.field: q.reduce(q.finish(states[q.field]), everybody, sharing) for q in quantities}, engine


@dataclass
class Limit:
    """A limit to the memory of a call, shared among its mini-batches.

    Attributes:
        total: bytes.
        quantities: what is computed.
        kept: bytes of copies of the model.
        expected: number of mini-batches, as far as it is known.
        grown: bytes that quantities hold of those before.
        number: how many were before.
    """

    total: int
    quantities: Sequence[Quantity]
    kept: int = 0
    expected: int = 1
    grown: int = 0
    number: int = 0

    def at(self, batch: Batch) -> Allowance:
        """What is left for the next mini-batch; as much as for the last one, if it is known how many come."""
        size = batch.output.element_size()
        growing, fixed = (size * sum(q.numbers(batch) for q in self.quantities if q.grows == g) for g in (True, False))
        self.number += 1
        count = max(self.expected, self.number)
        earlier = self.grown + growing * (count - self.number)
        self.grown += growing
        merging = self.kept + 2 * (earlier + growing) + 3 * fixed if count > 1 else 0
        joined = (count - 1).bit_length()  # parts of so many sizes are held apart
        return Allowance(self.total, growing + fixed, self.kept + earlier + fixed * joined, merging)


class _Part(NamedTuple):
    """Some mini-batches together.

    Attributes:
        batches: their number.
        weight: what their mean divides by; ``None`` of a loss that sums.
        parts: part by quantity's field.
        errors: squared error of what was dropped from V, by parameter name.
    """

    batches: int
    weight: float | None
    parts: dict[str, Any]
    errors: Mapping[str, float]


class Merged:
    """Parts of several mini-batches, joined two and two: few are held at once, and few joins copy much.

    Args:
        quantities: whose parts.
        loss: what messages call the loss.
    """

    def __init__(self, quantities: Sequence[Quantity], loss: str = "the loss") -> None:
        self._quantities, self._loss = quantities, loss
        self._held: list[_Part] = []

    @property
    def batches(self) -> int:
        """Number of mini-batches so far."""
        return sum(held.batches for held in self._held)

    def add(self, parts: dict[str, Any], weight: float | None, errors: Mapping[str, float] | None = None) -> None:
        """Another mini-batch.

        Args:
            parts: its parts by field.
            weight: of a loss that averages, what it divided by there (`Weights`); ``None`` of one that sums. Infinity:
                all earlier ones weigh nothing beside this one, which is the unit from now on.
            errors: the Frobenius norm of what was dropped from V, by parameter name.
        """
        if weight == math.inf:
            self._held, weight = [held._replace(weight=0.0) for held in self._held], 1.0
        squares = {name: error**2 for name, error in (errors or {}).items()}
        self._held.append(_Part(1, weight, parts, squares))
        while len(self._held) > 1 and self._held[-2].batches <= self._held[-1].batches:
            self._join()

    def _join(self) -> None:
        one, two = self._held[-2:]
        total, (a, b) = _shares(one.weight, two.weight)
        parts = {q.field: q.merge([one.parts[q.field], two.parts[q.field]], (a, b)) for q in self._quantities}
        names = one.errors.keys() | two.errors.keys()
        errors = {name: a * one.errors.get(name, 0.0) + b * two.errors.get(name, 0.0) for name in sorted(names)}
        self._held[-2:] = [_Part(one.batches + two.batches, total, parts, errors)]

    def fields(self) -> dict[str, Any]:
        """Field name → result.

        Raises:
            ValueError: if there was no mini-batch, or none with a target that counts.
        """
        if not self._held:
            raise ValueError("data is empty: expected a batch (X, y) or an iterable with at least one such pair.")
        while len(self._held) > 1:
            self._join()
        if self._held[0].weight == 0:
            raise ValueError(
                f"{self._loss} averages over nothing: the data hold no target that counts (ignored, or of weight 0)."
            )
        found = dict[str, Any]()
        for q in self._quantities:
            found |= q.fields(self._held[0].parts[q.field])
        return found

    @property
    def error(self) -> dict[str, float]:
        """Frobenius norm of what was dropped from V, by parameter name, once `fields` has joined everything."""
        return {name: square**0.5 for name, square in self._held[0].errors.items()}


def _shares(one: float | None, two: float | None) -> tuple[float | None, tuple[float, float]]:
    """Weight of two mini-batches together, and the share of each: L = Σ_b share_b L_b."""
    if one is None or two is None:
        return None, (1.0, 1.0)
    total = one + two
    if total == 0 and one != 0:
        raise ValueError(f"the weights of mini-batches, {one:.3g} and {two:.3g}, cancel: their mean is undefined.")
    return total, (one / total, two / total) if total else (0.0, 0.0)
