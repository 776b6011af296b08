"""One cell of the grid: tune, plan, time in alternating order, then memory, FLOPs, errors; one row per competitor."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Any

import torch
from jobs import Job, Problem
from meters import count_flops, gemm_rate, peak_memory, quiet_median, time_call, total_memory, wait_for_quiet
from ways import Way, competitors

Row = dict[str, Any]
PROBE = 64  # columns that a probe pulls back at least
MIN_REPEATS = 3


def timed(call: Callable[[], Any], settings: Namespace) -> tuple[float, Any]:
    """Seconds of one call, on the clock that counts, and what it returns."""
    results: list[Any] = []
    sample = time_call(lambda: results.append(call()), settings.device)
    return getattr(sample, settings.clock), results[0]


def measure_cell(net: str, n: int, job: Job, settings: Namespace) -> list[Row]:
    """All competitors of a job in one process; ``settings`` are the options of ``run.py``."""
    problem = Problem(net, n, settings.device, settings.mc_samples)
    ways = [w for w in competitors(job.name, problem.X.ndim == 4) if any(o in w.name for o in settings.only or [""])]
    cell = Cell(problem, job, settings.budget / max(1, len(ways)), settings)
    for way in ways:
        cell.prepare(way, fastest=min((t for w in ways for t in w.tuned.values()), default=0.0))
    alternate([w for w in ways if not w.skipped], problem, cell.share, settings)
    cell.pay_once(any(w.columns for w in ways))
    return [cell.row(way) for way in ways]


def alternate(ways: list[Way], problem: Any, share: float, settings: Namespace) -> None:
    """Rounds in alternating order until each has enough quiet samples or has used its share [s]."""
    patience = settings.patience
    for turn in range(2 * settings.repeats):
        for way in ways if turn % 2 == 0 else ways[::-1]:
            quiet = quiet_median(way.samples, settings.clock)[1] if way.samples else 0
            enough = (len(way.samples) if patience <= 0 else quiet) >= min(MIN_REPEATS, settings.repeats)
            late = way.used + way.single * way.inner > share * (1 if enough else 2)
            if quiet >= settings.repeats or (way.samples and late):
                continue
            patience = wait_for_quiet(patience)
            way.samples.append(time_call(partial(way.call, problem), settings.device, way.inner))
            way.used += way.inner * way.samples[-1].wall


@dataclass
class Cell:
    """A problem, a job of K components, the seconds that each competitor may use; what its rows share."""

    problem: Problem
    job: Job
    share: float
    settings: Namespace
    reference: tuple[str, Any] | None = None  # the first result in full

    def __post_init__(self) -> None:
        self.K, self.room = self.job.count(self.problem), total_memory(self.problem.device)
        self.forward = self.forward_flops = self.finish = 0.0

    def prepare(self, way: Way, fastest: float) -> None:
        """Tune and plan one competitor; a failure or an excess becomes the reason to skip it."""
        problem = self.problem
        kept = problem.n * problem.classes if way.name == "func jacrev" else self.job.stored * self.K
        if way.plain and 4 * kept * problem.D > 0.3 * self.room:
            way.skipped = f"keeps {4 * kept * problem.D / 2**30:.1f} GiB"
        elif way.name == "bncurv dense" and fastest * self.K > self.share:
            way.skipped = "over the time budget"
        else:
            try:
                if way.plain:
                    self.tune(way)
                self.plan(way)
            except Exception as error:  # a peer's refusal is a result
                way.skipped = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"

    def tune(self, way: Way) -> None:
        """Find the chunk with the least time per column, the better of two probes, within a quarter of the share."""
        problem, known, key = self.problem, self.settings.known, (self.problem.net, self.problem.n, way.name)
        grid = [known[key]] if key in known else [c for c in self.settings.chunks if c < 2 * self.K]
        grid = [1] if way.name == "autograd loop" else grid or self.settings.chunks[:1]
        way.run(problem, grid[0], min(self.K, grid[0]))  # warm-up
        for chunk in grid:
            columns, best = min(self.K, max(chunk, PROBE)), min(way.tuned.values(), default=inf)
            # what a chunk would hold: eight of the largest activations and two rows for each of its columns
            heavy = 4 * chunk * (8 * problem.largest + 2 * problem.D) > 0.4 * self.room
            worse = [t for t in list(way.tuned.values())[-2:] if t > 1.3 * best]
            if way.tuned and (heavy or len(worse) == 2 or way.used + 2 * best * columns > self.share / 4):
                break
            for _ in range(2):
                seconds, done = timed(partial(way.run, problem, chunk, columns), self.settings)
                way.tuned[chunk] = min(seconds / (done.columns or columns), way.tuned.get(chunk, inf))
                way.used += seconds
        way.chunk = min(way.tuned, key=way.tuned.__getitem__)
        if self.job.name == "diag":
            known[key] = way.chunk

    def plan(self, way: Way) -> None:
        """Decide between a full and a partial call, and how many calls make a sample."""
        if way.plain and way.chunk:
            each = (1 + MIN_REPEATS) * min(way.tuned.values())
            affordable = int(max(self.share - way.used, self.share / 2) / each)
            way.limit = None if affordable >= self.K else max(way.chunk, affordable // way.chunk * way.chunk)
        way.single, done = timed(partial(way.call, self.problem), self.settings)
        way.used += way.single
        way.columns = done.columns
        if way.single < 0.5:  # the first call may have been slow for its own reasons
            way.single, _ = timed(partial(way.call, self.problem), self.settings)
        way.inner = max(1, round(self.settings.min_time / max(way.single, 1e-6)))

    def pay_once(self, partly: bool) -> None:
        """What does not grow with the columns, for those that were timed on a part of them."""
        problem, job, settings = self.problem, self.job, self.settings
        self.gemm = gemm_rate(problem.device, settings.clock) / 1e9
        self.forward_flops = count_flops(lambda: problem.model(problem.X))
        if partly:
            self.forward, _ = timed(lambda: problem.model(problem.X), settings)
        if partly and job.stored and job.name != "components":  # Gram matrix and eigenvalues
            V = torch.randn(self.K, problem.D, device=problem.device)
            self.finish, _ = timed(lambda: job.finish(V), settings)

    def row(self, way: Way) -> Row:
        """Of the results file."""
        problem = self.problem
        head = {"job": self.job.name, "net": problem.net, "n": problem.n, "classes": problem.classes}
        head |= {"parameters": problem.D, "components": self.K}
        head |= {"competitor": way.name, "kind": way.kind, "chunk": way.chunk}
        return head | ({"seconds": None, "note": way.skipped} if way.skipped else self.measured(way))

    def measured(self, way: Way) -> Row:
        """Time, memory, passes, FLOPs and error of one competitor; all but a forward pass is linear in the columns."""
        scale = self.K / (way.columns or self.K)
        seconds, quiet = quiet_median(way.samples, self.settings.clock)
        if way.columns:
            once = min(self.forward, seconds / 2)
            seconds = once + (seconds - once) * scale + self.finish
        self.problem.draw = 0
        outcome, peak = peak_memory(partial(way.call, self.problem), self.problem.device)
        unlike = way.columns and (self.job.stored or way.name == "func jacrev")  # keeps more in a full run
        flops = None
        if way.single < self.share / 2:
            counted = count_flops(partial(way.call, self.problem))
            flops = round(self.forward_flops + (counted - self.forward_flops) * scale)
        error = None
        if not way.columns:
            self.reference = self.reference or (way.name, outcome.value)
            error = self.job.error(outcome.value, self.reference[1]) if way.name != self.reference[0] else None
        return {
            "seconds": seconds, "samples": len(way.samples), "quiet": quiet,
            "extrapolated": bool(way.columns), "columns_timed": way.columns or self.K,
            "peak_mib": None if peak is None or unlike else peak / 2**20,
            "passes": None if outcome.passes is None else round(outcome.passes * scale),
            "flops": flops, "gflops": flops and flops / seconds / 1e9, "gemm_gflops": self.gemm,
            "error": error, "reference": self.reference and self.reference[0],
            "note": outcome.note, "tuned": way.tuned,
        }  # fmt: skip
