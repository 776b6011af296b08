"""One cell of the grid: all competitors of a job, interleaved in one process."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from statistics import mean

from cell import Cell, Row
from meters import Gate, quiet_median, time_call, total_memory
from ours import available, ours
from peers import peers
from problem import JOBS, Job, Problem
from report import finished_row, skipped_row
from torch import Tensor
from tuning import CHUNKS, MIN_REPEATS, Entry, bytes_needed, plan, tune

MC_TARGET = 0.1  # relative error at which Monte-Carlo times are compared


@dataclass
class Settings:
    """What the command line decides for every cell."""

    repeats: int = 7
    budget: float = 120.0
    min_time: float = 0.1
    patience: float = 60.0  # seconds per cell to wait for busy neighbours
    chunks: tuple[int, ...] = CHUNKS
    only: tuple[str, ...] = ()  # parts of competitor names; empty: all
    clock: str = "wall"
    known: dict[tuple[str, int, str], int] = field(default_factory=dict)  # tuned before


def measure_cell(problem: Problem, job_name: str, settings: Settings) -> list[Row]:
    """Tune, plan, time in alternating order, then memory, FLOPs and errors; one row each."""
    job = JOBS[job_name]
    found = peers(job_name, problem.X.ndim == 4) + (ours(job_name) if available() else [])
    if settings.only:
        found = [c for c in found if any(part in c.name for part in settings.only)]
    entries = [Entry(c) for c in found]
    share, gate = settings.budget / max(1, len(entries)), Gate(settings.patience, settings.clock)
    for entry in entries:
        prepare(entry, entries, problem, job, share, settings, gate)
    take_samples([e for e in entries if not e.skipped], problem, share, settings, gate)
    return summarise(entries, Cell(problem, job, share, settings.clock))


def prepare(
    entry: Entry,
    entries: list[Entry],
    problem: Problem,
    job: Job,
    share: float,
    settings: Settings,
    gate: Gate,
) -> None:
    """Tune and plan one competitor; a failure or an excess becomes the reason to skip it."""
    competitor = entry.competitor
    needed = bytes_needed(competitor, problem, job) if competitor.partial else 0
    if needed > 0.3 * total_memory(problem.device):
        entry.skipped = f"keeps {needed / 2**30:.1f} GiB"
        return
    if competitor.name.endswith("dense"):
        best = min((min(e.tuned.values()) for e in entries if e.tuned), default=0.0)
        if best * job.count(problem) > share:
            entry.skipped = "over the time budget"
            return
    try:
        if competitor.partial:
            key = problem.net, problem.n, competitor.name
            grid = (settings.known[key],) if key in settings.known else settings.chunks
            tune(entry, problem, job, grid, share, gate)
            if entry.chunk and job.name == "diag":
                settings.known[key] = entry.chunk
        plan(entry, problem, job, share, settings.min_time, gate)
    except Exception as error:  # a peer's refusal is a result
        entry.skipped = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"


def take_samples(
    entries: list[Entry], problem: Problem, share: float, settings: Settings, gate: Gate
) -> None:
    """Rounds in alternating order until each has enough quiet samples or has used its share."""
    for turn in range(2 * settings.repeats):
        for entry in entries if turn % 2 == 0 else entries[::-1]:
            cost = entry.single * entry.inner
            quiet = quiet_median(entry.samples)[1] if entry.samples else 0
            done = quiet >= settings.repeats
            enough = quiet >= MIN_REPEATS or (
                gate.patience <= 0 and len(entry.samples) >= MIN_REPEATS
            )
            late = enough and entry.used + cost > share
            if done or late or (entry.samples and entry.used + cost > 2 * share):
                continue
            gate.wait()
            sample = time_call(partial(entry.call, problem), problem.device, entry.inner)
            entry.samples.append(sample)
            entry.single = min(entry.single, sample.on(settings.clock))
            entry.used += entry.inner * gate.charge(sample, entry.single)


def exact_diagonal(problem: Problem, entries: list[Entry], share: float) -> Tensor | None:
    """What Monte-Carlo diagonals estimate: by plain passes, or else by the coupled way."""
    entry = next((e for e in entries if e.tuned and not e.skipped), None)
    if entry and min(entry.tuned.values()) * problem.n * problem.per_sample < 2 * share:
        return peers("diag")[0].run(problem, entry.chunk, None).value
    return ours("diag")[0].run(problem, None, None).value if available() else None


def mean_error(entry: Entry, problem: Problem, exact: Tensor, share: float) -> float:
    """Relative Frobenius error of a Monte-Carlo diagonal, mean over draws."""
    found = []
    for draw in range(max(1, min(100, int(share / 4 / max(entry.single, 1e-6))))):
        problem.draw = 100 + draw
        value = entry.competitor.run(problem, entry.chunk, None).value
        found.append(((value - exact).norm() / exact.norm()).item())
    return mean(found)


def reference_run(cell: Cell, entries: list[Entry]) -> None:
    """Where no plain way ran in full, run the fastest once in full if twice a share allows it.

    Not the channels-last one: its BatchNorm kernels lose digits (float32: 2e-4 of a ResNet-20's diagonal).
    """
    plain = [e for e in entries if e.tuned and not e.skipped and "NHWC" not in e.competitor.name]
    if not plain or any(e.columns is None for e in plain):
        return
    best = min(plain, key=lambda e: min(e.tuned.values()))
    if min(best.tuned.values()) * cell.K < 2 * cell.share and cell.job.name != "mc":
        outcome = best.competitor.run(cell.problem, best.chunk, None)
        cell.reference = best.competitor.name, outcome.value


def summarise(entries: list[Entry], cell: Cell) -> list[Row]:
    """Rows of the results file."""
    problem, job, share = cell.problem, cell.job, cell.share
    reference_run(cell, entries)
    rows = [skipped_row(cell, e) if e.skipped else finished_row(cell, e) for e in entries]
    if job.name == "mc" and (exact := exact_diagonal(problem, entries, share)) is not None:
        for row, entry in zip(rows, entries, strict=True):
            if entry.skipped or entry.columns is not None:
                continue
            if entry.competitor.kind == "floor":  # estimates another matrix: the peers' error
                row["error"] = rows[0].get("error")
            else:
                row["error"] = mean_error(entry, problem, exact, share)
            row["reference"] = "exact diagonal"
            row["seconds_at_target"] = row["seconds"] * ((row["error"] or 0) / MC_TARGET) ** 2
    return rows
