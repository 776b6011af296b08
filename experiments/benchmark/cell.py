"""What the rows of one cell share: rates, FLOPs, the reference result, and errors against it."""

from __future__ import annotations

from typing import Any

import torch
from meters import count_flops, gemm_rate, peak_memory, time_call
from peers import Competitor, Outcome
from problem import TOP, Job, Problem
from torch import Tensor
from tuning import Entry

Row = dict[str, Any]


def plain_flops(problem: Problem) -> tuple[int, int]:
    """Counted FLOPs of one forward pass and of one plain backward pass of one cotangent."""
    forward = count_flops(lambda: problem.model(problem.X))
    F = problem.model(problem.X)
    one = torch.ones_like(F)
    backward = count_flops(lambda: torch.autograd.grad(F, problem.params, one, retain_graph=True))
    return forward, backward


def finish_seconds(problem: Problem, job: Job, clock: str) -> float:
    """Seconds of the job's last step on stored rows (Gram matrix, eigenvalues)."""
    if not job.stored or job.name == "components":
        return 0.0
    V = torch.randn(job.count(problem), problem.D, device=problem.device)
    return time_call(lambda: job.finish([V]), problem.device).on(clock)


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


class Cell:
    """What the rows of a cell share: rates, FLOPs, the reference result."""

    def __init__(self, problem: Problem, job: Job, share: float, clock: str = "wall") -> None:
        self.problem, self.job, self.share, self.clock = problem, job, share, clock
        self.K = job.count(problem)
        self.gemm = gemm_rate(problem.device, clock, 2048, 3)
        self.forward_flops, self.backward_flops = plain_flops(problem)
        model, X = problem.model, problem.X
        self.forward = min(time_call(lambda: model(X), problem.device).on(clock) for _ in range(3))
        self._finish: float | None = None
        self.reference: tuple[str, Any] | None = None
        self.partial_reference: tuple[str, Any] | None = None

    @property
    def finish(self) -> float:
        """Seconds of the job's last step, measured when first needed."""
        if self._finish is None:
            self._finish = finish_seconds(self.problem, self.job, self.clock)
        return self._finish

    def peak(self, entry: Entry) -> tuple[Outcome, int | None]:
        """One more call as planned, for its result and its peak memory."""
        self.problem.draw = 0
        run = entry.competitor.run
        return peak_memory(lambda: run(self.problem, entry.chunk, entry.limit), self.problem.device)

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
            return {"error": None, "reference": "this one"}
        row = {"error": found[0], "reference": name, "error_columns": columns}
        return row | ({"error_space": found[1]} if found[1] is not None else {})
