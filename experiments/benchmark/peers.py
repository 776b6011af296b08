"""Competitors: plain ways, curvlinops' eigensolver route, and BackPACK's eval-mode floor."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from problem import JOBS, TOP, Job, Problem
from torch import Tensor, nn
from ways import WAYS, Way


@dataclass
class Outcome:
    """What a competitor returns: the result, the columns behind it, backward passes."""

    value: Any
    passes: int | None
    columns: int | None = None  # fewer than K: a partial run, ``value`` is the unfinished state
    note: str = ""


Runner = Callable[[Problem, "int | None", "int | None"], Outcome]


@dataclass(frozen=True)
class Competitor:
    """A named way to do a job. ``run(problem, chunk, limit)``; only plain ones honour ``limit``."""

    name: str
    kind: str  # "peer", "floor" (another matrix: BN in eval mode), "ours"
    run: Runner
    tunable: bool = False
    partial: bool = False
    single: bool = False  # the chunk does not matter


def plain(name: str, way: Way, job: Job) -> Competitor:
    """A competitor that makes rows in the given way and hands them to the job."""

    def run(problem: Problem, chunk: int | None, limit: int | None) -> Outcome:
        state = job.start(problem)
        done = 0
        for start, rows in way(problem, job, chunk or 1, limit):
            done = start + len(rows[0])
            job.add(state, start, rows)
        passes = done
        if name == "func jacrev":  # C columns of the identity per sample, whatever the factor
            passes = done * problem.classes * problem.n // job.count(problem)
        if done < job.count(problem):
            partial = state if not job.stored else [state[0][:done]]
            return Outcome(torch.cat([s.flatten() for s in partial]), passes, done)
        return Outcome(job.finish(state), passes, done)

    single = name == "autograd loop"
    return Competitor(name, "peer", run, tunable=not single, partial=True, single=single)


def _top_by_lanczos(problem: Problem, product: Callable[[Any], Any], what: str) -> Outcome:
    """The ten largest pairs of the matrix behind ``product``, by the eigensolver call that bncurv uses itself."""
    import numpy
    from scipy.sparse.linalg import LinearOperator

    from bncurv.lowrank import LANCZOS_TOLERANCE, leading

    products = 0

    def matvec(v: Any) -> Any:
        nonlocal products
        products += 1
        return product(v)

    operator = LinearOperator((problem.D, problem.D), matvec=matvec, dtype=numpy.float32)
    w, u = leading(operator, TOP, torch.float32)
    pairs = torch.from_numpy(w[::-1].copy()), torch.from_numpy(u[:, ::-1].copy())
    value = tuple(t.to(problem.device) for t in pairs)
    return Outcome(value, products, note=f"{products} products ({what}), tol {LANCZOS_TOLERANCE[torch.float32]:g}")


def curvlinops_eigsh(problem: Problem, chunk: int | None, limit: int | None) -> Outcome:
    """curvlinops' matrix-free GGN and scipy's ``eigsh``."""
    import numpy
    from curvlinops import GGNLinearOperator

    model = problem.untracked
    operator = GGNLinearOperator(
        model,
        problem.loss_fn,
        list(model.parameters()),
        [(problem.X, problem.y)],
        check_deterministic=False,
        num_data=problem.n,
    )
    scipy_operator = operator.to_scipy(dtype=numpy.float32)
    return _top_by_lanczos(problem, lambda v: scipy_operator @ v, "forward, jvp, vjp each")


def autograd_eigsh(problem: Problem, chunk: int | None, limit: int | None) -> Outcome:
    """Matrix-free GGN on one kept graph (double backward for ``J v``) and scipy's ``eigsh``."""
    F = problem.model(problem.X)
    p = F.detach().softmax(1) / problem.n
    w = torch.zeros_like(F, requires_grad=True)
    pulled = torch.autograd.grad(F, problem.params, w, create_graph=True)
    shapes = [q.shape for q in problem.params]

    def product(v: Any) -> Any:
        flat = torch.from_numpy(v).to(problem.device)
        parts = [f.view(s) for f, s in zip(flat.split(problem.sizes), shapes, strict=True)]
        (u,) = torch.autograd.grad(pulled, w, parts, retain_graph=True)
        u = p * u - p * (p * u).sum(1, keepdim=True) * problem.n
        rows = torch.autograd.grad(F, problem.params, u, retain_graph=True)
        return torch.cat([row.flatten() for row in rows]).cpu().numpy()

    return _top_by_lanczos(problem, product, "two backward passes each")


def _eval_mode(problem: Problem) -> tuple[Any, Any]:
    """The model in eval mode and the loss, extended by BackPACK (converted if not sequential)."""
    from backpack import extend

    if problem.extended is None:
        model = copy.deepcopy(problem.model).eval()
        sequential = all(len(list(m.children())) == 0 for m in model.children())
        model = extend(model, use_converter=not sequential).eval()
        problem.extended = model, extend(nn.CrossEntropyLoss())
    return problem.extended


def _backpack(extension: str, field: str, passes: Callable[[Problem], int]) -> Runner:
    """A runner for one of BackPACK's extensions on the eval-mode network."""

    def run(problem: Problem, chunk: int | None, limit: int | None) -> Outcome:
        from backpack import backpack, extensions

        model, loss_fn = _eval_mode(problem)
        arguments = {"mc_samples": problem.mc_samples} if "MC" in extension else {}
        with backpack(getattr(extensions, extension)(**arguments)):
            loss_fn(model(problem.X), problem.y).backward()
        rows = [getattr(p, field) for p in model.parameters()]
        for p in model.parameters():
            delattr(p, field)
            p.grad = None
        lead = 1 if field == "grad_batch" else 0
        value: Tensor = torch.cat([row.flatten(lead) for row in rows], dim=-1)
        return Outcome(value, passes(problem), note="BN in eval mode: another matrix")

    return run


FLOORS: dict[str, Runner] = {
    "diag": _backpack("DiagGGNExact", "diag_ggn_exact", lambda p: p.classes),
    "components": _backpack("BatchGrad", "grad_batch", lambda p: 1),
    "mc": _backpack("DiagGGNMC", "diag_ggn_mc", lambda p: p.mc_samples),
}


def peers(job: str, images: bool = True) -> list[Competitor]:
    """All competitors of a job, the reference (exact, cheap to trust) first."""
    unfit = ["func jacrev"] * (job == "mc") + ["autograd batched NHWC"] * (not images)
    found = [plain(name, way, JOBS[job]) for name, way in WAYS.items() if name not in unfit]
    found.sort(key=lambda c: c.name != "autograd batched")
    if job == "top10":
        found.append(Competitor("curvlinops eigsh", "peer", curvlinops_eigsh))
        found.append(Competitor("autograd eigsh", "peer", autograd_eigsh))
    if job in FLOORS:
        found.append(Competitor("BackPACK eval mode", "floor", FLOORS[job]))
    return found
