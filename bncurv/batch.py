"""All quantities at one recorded batch: what both gestures share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from bncurv.blocks import Batch
from bncurv.checks import check_precision
from bncurv.engine import Engine
from bncurv.quantities import Quantity


def compute(
    batch: Batch,
    quantities: Sequence[Quantity],
    bar: tqdm,
    method: str = "auto",
    chunk_size: int | None = None,
    tol: float = 0.0,
) -> tuple[dict[str, Any], Engine]:
    """All quantities at one recorded forward pass, nothing computed twice.

    Args:
        batch: the forward pass and its loss.
        quantities: what to compute.
        bar: progress bar, counted in backward passes.
        method: which way, see `bncurv.curvature`.
        chunk_size: see `bncurv.curvature`.
        tol: see `bncurv.curvature`.

    Returns:
        For each quantity's field its part, and the engine that made them.
    """
    check_precision(batch.trace)
    asked = {q.field: q.sources(batch) for q in quantities}
    sources = {key: source for wants in asked.values() for key, source in wants.items()}
    keep_own = any(q.coupled_only for q in quantities)
    if keep_own and method == "auto":
        method = "coupled"
    squares = {key for key in sources if all(q.squares_only for q in quantities if key in asked[q.field])}
    engine = Engine(batch, sources, method, chunk_size, bar.update, tol, keep_own, squares)
    bar.total = (bar.total or 0) + engine.planned
    states = {q.field: q.start(batch) for q in quantities}
    for key, rows in engine.pull():
        for q in quantities:
            if key in asked[q.field]:
                q.add(states[q.field], key, rows)
    return {q.field: q.finish(states[q.field]) for q in quantities}, engine


class Merged:
    """Parts of several mini-batches, joined two and two: few are held at once, and few joins copy much.

    Args:
        quantities: whose parts.
    """

    def __init__(self, quantities: Sequence[Quantity]) -> None:
        self._quantities = quantities
        self._held: list[tuple[int, float, dict[str, Any]]] = []  # number of mini-batches, weight, part by field

    @property
    def batches(self) -> int:
        """Number of mini-batches so far."""
        return sum(count for count, _, _ in self._held)

    def add(self, parts: dict[str, Any], weight: float | None) -> None:
        """Another mini-batch's parts; of a loss that averages, what it divided by; ``None`` of one that sums."""
        self._held.append((1, weight or 0.0, parts))
        while len(self._held) > 1 and self._held[-2][0] <= self._held[-1][0]:
            self._join()

    def _join(self) -> None:
        (count, weight, parts), (more, added, others) = self._held[-2:]
        total = weight + added
        shares = (weight / total, added / total) if total else (1.0, 1.0)
        joined = {q.field: q.merge([parts[q.field], others[q.field]], shares) for q in self._quantities}
        self._held[-2:] = [(count + more, total, joined)]

    def fields(self) -> dict[str, Any]:
        """Field name → result."""
        while len(self._held) > 1:
            self._join()
        (_, _, parts), found = self._held[0], dict[str, Any]()
        for q in self._quantities:
            found |= q.fields(parts[q.field])
        return found
