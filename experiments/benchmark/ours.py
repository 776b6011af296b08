"""bncurv as a competitor, through its public function only."""

from __future__ import annotations

from typing import Any

import torch
from peers import Competitor, Outcome, Runner
from problem import TOP, Problem


def _quantity(job: str, problem: Problem, matrix_free: bool | None) -> Any:
    """The quantity that answers a job."""
    import bncurv

    if job == "diag":
        return bncurv.DiagGGNExact()
    if job == "components":
        return bncurv.ComponentGrad()
    if job == "mc":
        generator = torch.Generator(problem.device).manual_seed(1000 + problem.draw)
        return bncurv.DiagGGNMC(mc_samples=problem.mc_samples, generator=generator)
    return bncurv.LowRankGGN(top=TOP, matrix_free=matrix_free) if job == "top10" else bncurv.LowRankGGN()


def _value(job: str, results: Any, problem: Problem) -> Any:
    """The result in the form that the peers give."""
    if job == "spectrum":
        return results.ggn.eigenvalues
    if job == "top10":
        vectors = results.ggn.eigenvectors(TOP)
        columns = [vectors[name].flatten(1) for name in problem.names]
        return results.ggn.eigenvalues[:TOP], torch.cat(columns, 1).T
    field, lead = {
        "diag": ("diag_ggn_exact", 0),
        "mc": ("diag_ggn_mc", 0),
        "components": ("grad_component", 1),
    }[job]
    by_name = getattr(results, field)
    return torch.cat([by_name[name].flatten(lead) for name in problem.names], dim=-1)


def _runner(job: str, method: str) -> Runner:
    """A call of ``bncurv.curvature`` with one method."""

    def run(problem: Problem, chunk: int | None, limit: int | None) -> Outcome:
        import bncurv

        results = bncurv.curvature(
            problem.model,
            problem.loss_fn,
            (problem.X, problem.y),
            _quantity(job, problem, None if method == "auto" else False),  # auto: what a user gets
            method=method,
            chunk_size=chunk,
        )
        note = f"took the {results.method} way" if method == "auto" else ""
        return Outcome(_value(job, results, problem), results.passes, note=note)

    return run


def ours(job: str) -> list[Competitor]:
    """The coupled, the dense and the automatic way (Monte Carlo has only one)."""
    methods = ("auto",) if job == "mc" else ("coupled", "dense", "auto")
    return [Competitor(f"bncurv {m}", "ours", _runner(job, m)) for m in methods]


def available() -> bool:
    """Whether bncurv can be imported."""
    try:
        from bncurv import curvature  # noqa: F401
    except ImportError:
        return False
    return True
