"""Before the clock counts: each competitor's best chunk, and how much of it fits its time."""

from __future__ import annotations

from dataclasses import dataclass, field

from meters import Gate, Sample, synchronize, total_memory
from peers import Competitor
from problem import Job, Problem

PROBE = 64  # columns that a probe pulls back at least
MIN_REPEATS = 3
CHUNKS = (4, 8, 16, 32, 64, 128, 256, 512)


@dataclass
class Entry:
    """One competitor in one cell: how it is run and what was measured."""

    competitor: Competitor
    chunk: int | None = None
    limit: int | None = None  # columns per timed call (None: all)
    inner: int = 1
    single: float = 0.0  # expected seconds of one call
    used: float = 0.0  # seconds spent so far
    samples: list[Sample] = field(default_factory=list)
    tuned: dict[int, float] = field(default_factory=dict)  # chunk -> seconds per column
    columns: int | None = None  # columns that a partial call really did
    skipped: str = ""

    def call(self, problem: Problem) -> None:
        """One call as planned, with another draw where there is one."""
        problem.draw += 1
        self.competitor.run(problem, self.chunk, self.limit)


def bytes_needed(competitor: Competitor, problem: Problem, job: Job) -> int:
    """Bytes of the large arrays that a plain way keeps (0 if it streams)."""
    if competitor.name == "func jacrev":
        return 4 * problem.n * problem.classes * problem.D
    return 4 * job.count(problem) * problem.D if job.stored else 0


def _seconds(entry: Entry, problem: Problem, chunk: int, columns: int, gate: Gate) -> float:
    """Seconds of one partial call, per column."""
    gate.wait()
    start = gate.now()
    done = entry.competitor.run(problem, chunk, columns).columns
    synchronize(problem.device)
    return (gate.now() - start) / (done or columns)


def tune(
    entry: Entry, problem: Problem, job: Job, grid: tuple[int, ...], share: float, gate: Gate
) -> None:
    """Find the chunk with the least time per column, within a quarter of the entry's share."""
    spent, K = 0.0, job.count(problem)
    chunks = (1,) if entry.competitor.single else tuple(c for c in grid if c < 2 * K) or grid[:1]
    room = 0.4 * total_memory(problem.device)
    entry.competitor.run(problem, chunks[0], min(K, chunks[0]))  # warm-up
    worse = 0
    for chunk in chunks:
        columns = min(K, max(chunk, PROBE))
        best = min(entry.tuned.values(), default=0.0)
        late = spent + best * columns > share / 4
        if best and (late or worse == 2 or _heavy(problem, chunk, room)):
            break
        entry.tuned[chunk] = _seconds(entry, problem, chunk, columns, gate)
        spent += entry.tuned[chunk] * columns
        worse = worse + 1 if best and entry.tuned[chunk] > 1.3 * best else 0
    for _ in range(2):  # the three best again, the machine may have been busy
        for chunk in sorted(entry.tuned, key=entry.tuned.__getitem__)[:3]:
            columns = min(K, max(chunk, PROBE))
            if spent + entry.tuned[chunk] * columns < share / 4:
                again = _seconds(entry, problem, chunk, columns, gate)
                entry.tuned[chunk] = min(entry.tuned[chunk], again)
                spent += again * columns
    entry.chunk = min(entry.tuned, key=entry.tuned.__getitem__)
    entry.used = spent


def _heavy(problem: Problem, chunk: int, room: float) -> bool:
    """Whether a chunk would hold too much: eight of the largest activations and two rows each."""
    return 4.0 * chunk * (8 * problem.largest + 2 * problem.D) > room


def plan(
    entry: Entry, problem: Problem, job: Job, share: float, min_time: float, gate: Gate
) -> None:
    """Warm up; decide between a full and a partial call and how many calls make a sample."""
    competitor, K = entry.competitor, job.count(problem)
    if competitor.partial:
        per_column = min(entry.tuned.values())
        left = max(share - entry.used, share / 2)
        affordable = int(left / ((1 + MIN_REPEATS) * per_column))
        if affordable < K:
            chunk = entry.chunk or 1
            entry.limit = max(chunk, affordable // chunk * chunk)
    gate.wait()
    start = gate.now()
    outcome = competitor.run(problem, entry.chunk, entry.limit)
    synchronize(problem.device)
    entry.single = gate.now() - start
    if outcome.columns is not None and outcome.columns < K:
        entry.columns = outcome.columns
    else:
        entry.limit = None
    entry.used += entry.single
    if entry.single < 0.5:  # the first call may have been slow for its own reasons
        start = gate.now()
        entry.call(problem)
        synchronize(problem.device)
        entry.single = gate.now() - start
    entry.inner = max(1, round(min_time / max(entry.single, 1e-6)))
