"""One cell of the grid: all competitors of a job, interleaved in one process."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import mean
from typing import Any

import torch
from meters import count_flops, gemm_rate, peak_memory, quiet_median, time_call
from ours import available, ours
from peers import Competitor, Outcome, peers
from problem import JOBS, TOP, Job, Problem
from torch import Tensor
from tuning import CHUNKS, MIN_REPEATS, Entry, bytes_needed, plan, total_memory, tune

MC_TARGET = 0.1  # relative error at which Monte-Carlo times are compared
Row = dict[str, Any]


@dataclass
class Settings:
    """What the command line decides for every cell."""

    repeats: int = 7
    budget: float = 120.0
    min_time: float = 0.1
    chunks: tuple[int, ...] = CHUNKS
    only: tuple[str, ...] = ()  # parts of competitor names; empty: all
    known: dict[tuple[str, int, str], int] = field(default_factory=dict)  # tuned before


def measure_cell(problem: Problem, job_name: str, settings: Settings) -> list[Row]:
    """Tune, plan, time in alternating order, then memory, FLOPs and errors; one row each."""
    job = JOBS[job_name]
    found = peers(job_name) + (ours(job_name) if available() else [])
    if settings.only:
        found = [c for c in found if any(part in c.name for part in settings.only)]
    entries = [Entry(c) for c in found]
    share = settings.budget / max(1, len(entries))
    for entry in entries:
        prepare(entry, entries, problem, job, share, settings)
    take_samples([e for e in entries if not e.skipped], problem, share, settings)
    return summarise(entries, problem, job, share)


def prepare(
    entry: Entry,
    entries: list[Entry],
    problem: Problem,
    job: Job,
    share: float,
    settings: Settings,
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
            tune(entry, problem, job, grid, share)
            if entry.chunk and job.name == "diag":
                settings.known[key] = entry.chunk
        plan(entry, problem, job, share, settings.min_time)
    except Exception as error:  # a peer's refusal is a result
        entry.skipped = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"


def take_samples(
    entries: list[Entry], problem: Problem, share: float, settings: Settings
) -> None:
    """Rounds in alternating order until each has enough quiet samples or has used its share."""
    for turn in range(2 * settings.repeats):
        for entry in entries if turn % 2 == 0 else entries[::-1]:
            cost = entry.single * entry.inner
            quiet = quiet_median(entry.samples)[1] if entry.samples else 0
            done = quiet >= settings.repeats
            late = len(entry.samples) >= MIN_REPEATS and entry.used + cost > share
            if done or late or (entry.samples and entry.used + cost > 2 * share):
                continue
            sample = time_call(lambda e=entry: e.call(problem), problem.device, entry.inner)
            entry.samples.append(sample)
            entry.used += sample.seconds * entry.inner


def plain_flops(problem: Problem) -> tuple[int, int]:
    """Counted FLOPs of one forward pass and of one plain backward pass of one cotangent."""
    forward = count_flops(lambda: problem.model(problem.X))
    F = problem.model(problem.X)
    one = torch.ones_like(F)
    backward = count_flops(
        lambda: torch.autograd.grad(F, problem.params, one, retain_graph=True)
    )
    return forward, backward


def finish_seconds(problem: Problem, job: Job) -> float:
    """Seconds of the job's last step on stored rows (Gram matrix, eigenvalues)."""
    if not job.stored or job.name == "components":
        return 0.0
    V = torch.randn(job.count(problem), problem.D, device=problem.device)
    return time_call(lambda: job.finish([V]), problem.device).seconds


def errors(job: Job, value: Any, reference: Any) -> tuple[float, float | None]:
    """Relative error against the reference; for eigenpairs also the angle between the spaces."""
    if job.name == "top10":
        (w, U), (w0, U0) = value, reference
        Q, Q0 = (torch.linalg.qr(u.double()).Q for u in (U, U0))
        sine = torch.linalg.matrix_norm(Q - Q0 @ (Q0.T @ Q), 2).item()
        return ((w[:TOP] - w0).abs().max() / w0[0]).item(), sine
    if job.name == "spectrum":
        size = max(len(value), len(reference))
        value, reference = (_padded(v, size) for v in (value, reference))
        return ((value - reference).abs().max() / reference[0]).item(), None
    return ((value - reference).norm() / reference.norm()).item(), None


def _padded(values: Tensor, size: int) -> Tensor:
    """Append zeros."""
    return torch.cat([values, values.new_zeros(size - len(values))])


def exact_diagonal(problem: Problem, entries: list[Entry], share: float) -> Tensor | None:
    """What Monte-Carlo diagonals estimate: by plain passes, or else by the coupled way."""
    entry = next((e for e in entries if e.tuned and not e.skipped), None)
    if entry and min(entry.tuned.values()) * problem.n * problem.per_sample < 2 * share:
        return peers("diag")[0].run(problem, entry.chunk, None).value
    return ours("diag")[0].run(problem, None, None).value if available() else None


def mean_error(entry: Entry, problem: Problem, exact: Tensor, share: float) -> float:
    """Relative Frobenius error of a Monte-Carlo diagonal, mean over draws."""
    found = []
    for draw in range(max(1, min(10, int(share / 4 / max(entry.single, 1e-6))))):
        problem.draw = 100 + draw
        value = entry.competitor.run(problem, entry.chunk, None).value
        found.append(((value - exact).norm() / exact.norm()).item())
    return mean(found)


def summarise(entries: list[Entry], problem: Problem, job: Job, share: float) -> list[Row]:
    """Rows of the results file."""
    from report import finished_row, skipped_row

    cell = Cell(problem, job, share)
    rows = [skipped_row(cell, e) if e.skipped else finished_row(cell, e) for e in entries]
    if job.name == "mc" and (exact := exact_diagonal(problem, entries, share)) is not None:
        for row, entry in zip(rows, entries, strict=True):
            if not entry.skipped and entry.columns is None:
                row["error"] = mean_error(entry, problem, exact, share)
                row["reference"] = "exact diagonal"
                row["seconds_at_target"] = row["seconds"] * (row["error"] / MC_TARGET) ** 2
    return rows


class Cell:
    """What the rows of a cell share: rates, FLOPs, the reference result."""

    def __init__(self, problem: Problem, job: Job, share: float) -> None:
        self.problem, self.job, self.share = problem, job, share
        self.K = job.count(problem)
        self.gemm = gemm_rate(problem.device, 2048, 3)
        self.forward_flops, self.backward_flops = plain_flops(problem)
        model, X = problem.model, problem.X
        self.forward = min(
            time_call(lambda: model(X), problem.device).seconds for _ in range(3)
        )
        self._finish: float | None = None
        self.reference: tuple[str, Any] | None = None
        self.partial_reference: tuple[str, Any] | None = None

    @property
    def finish(self) -> float:
        """Seconds of the job's last step, measured when first needed."""
        if self._finish is None:
            self._finish = finish_seconds(self.problem, self.job)
        return self._finish

    def peak(self, entry: Entry) -> tuple[Outcome, int | None]:
        """One more call as planned, for its result and its peak memory."""
        self.problem.draw = 0
        run = entry.competitor.run
        return peak_memory(
            lambda: run(self.problem, entry.chunk, entry.limit), self.problem.device
        )

    def check(self, competitor: Competitor, entry: Entry, outcome: Outcome) -> Row:
        """Error against the first exact result (or the first one on one sample's columns)."""
        columns, value = None, outcome.value
        if entry.columns is not None:
            columns = max(1, self.K // self.problem.n)
            self.problem.draw = 0
            value = competitor.run(self.problem, entry.chunk, columns).value
            if self.partial_reference is None:
                self.partial_reference = competitor.name, value
            name, reference = self.partial_reference
            found: tuple[float, float | None] = (
                ((value - reference).norm() / reference.norm()).item(),
                None,
            )
        else:
            if self.reference is None and competitor.kind != "floor":
                self.reference = competitor.name, value
            if self.reference is None:
                return {}
            name, reference = self.reference
            found = errors(self.job, value, reference)
        if name == competitor.name:
            return {"error": 0.0, "reference": name, "error_columns": columns}
        row = {"error": found[0], "reference": name, "error_columns": columns}
        return row | ({"error_space": found[1]} if found[1] is not None else {})
