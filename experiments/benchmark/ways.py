"""The competitors: plain exact ways, eigensolvers, and bncurv by its public function.

A plain way is called ``way(problem, job, chunk, stop)`` and yields the rows of V up to component ``stop``, a chunk at a
time: one tensor ``[k, *p]`` per parameter, which the job may overwrite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy
import torch
from jobs import JOBS, TOP, Job, Problem
from meters import Sample
from scipy.sparse.linalg import LinearOperator
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vjp, vmap

import bncurv
from bncurv.lowrank import LANCZOS_TOLERANCE, leading

Rows = Iterator[list[Tensor]]
LOOP_BLOCK = 64  # cotangents that the loop makes at a time


class Outcome(NamedTuple):
    """A result, the backward passes it took, and of how many columns it is if not of all (then it is unfinished)."""

    value: Any
    passes: int | None
    columns: int | None = None
    note: str = ""


@dataclass
class Way:
    """A competitor in a cell: how it is called, and what was measured.

    ``kind`` is peer or ours. Only ``plain`` ones mind ``chunk`` and ``limit``.
    """

    name: str
    kind: str
    run: Callable[[Any, int | None, int | None], Outcome]  # of the problem, chunk, limit
    plain: bool = False
    chunk: int | None = None
    limit: int | None = None  # columns per timed call (None: all)
    columns: int | None = None  # that such a call really does, if not all
    inner: int = 1  # calls per sample
    single: float = 0.0  # expected seconds of one call
    used: float = 0.0  # seconds spent so far
    skipped: str = ""  # why
    samples: list[Sample] = field(default_factory=list)
    tuned: dict[int, float] = field(default_factory=dict)  # chunk -> seconds per column

    def call(self, problem: Any) -> Outcome:
        """One call as planned, with another draw where there is one."""
        problem.draw += 1
        return self.run(problem, self.chunk, self.limit)


def autograd(
    problem: Problem, job: Job, chunk: int, stop: int, batched: bool = True, channels_last: bool = False
) -> Rows:
    """``torch.autograd.grad``, chunks with ``is_grads_batched=True`` (channels last: faster for some), or in a loop."""
    model, X = problem.channels_last if channels_last else (problem.model, problem.X)
    F, params = model(X), tuple(model.parameters())
    columns, chunk = job.columns(problem, F), chunk if batched else LOOP_BLOCK
    for start in range(0, stop, chunk):
        part = columns(start, min(start + chunk, stop))
        if batched:
            yield list(torch.autograd.grad(F, params, part, retain_graph=True, is_grads_batched=True))
        for column in () if batched else part:
            yield [row.unsqueeze(0) for row in torch.autograd.grad(F, params, column, retain_graph=True)]


def _functional(problem: Problem, *params: Tensor) -> Tensor:
    """The model as a function of its parameters, on buffers cloned inside the transform."""
    buffers = {name: b.clone() for name, b in problem.model.named_buffers()}
    return functional_call(problem.model, (dict(zip(problem.names, params, strict=True)), buffers), (problem.X,))


def func_vjp(problem: Problem, job: Job, chunk: int, stop: int) -> Rows:
    """``torch.func``: ``vmap`` of one ``vjp``, in chunks."""
    F, pull = vjp(partial(_functional, problem), *(p.detach() for p in problem.params))
    columns, pull_many = job.columns(problem, F), vmap(pull)
    for start in range(0, stop, chunk):
        yield list(pull_many(columns(start, min(start + chunk, stop))))


def func_jacrev(problem: Problem, job: Job, chunk: int, stop: int) -> Rows:
    """``torch.func.jacrev(chunk_size=...)`` of the whole batch (of whole samples up to ``stop``), then the factor."""
    per_sample = job.per_sample(problem)
    samples = max(1, stop // per_sample)

    def outputs(params: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        F = _functional(problem, *params)
        return F[:samples], F

    J, F = jacrev(outputs, has_aux=True, chunk_size=chunk)(tuple(p.detach() for p in problem.params))
    S, block = job.blocks(problem, F), max(1, 128 // per_sample)
    for n in range(0, samples, block):
        part = slice(n, min(n + block, samples))
        rows = [torch.bmm(S[part].mT, j[part].flatten(2)) for j in J]  # S [n, per sample, C]
        yield [row.reshape(-1, *p.shape) for row, p in zip(rows, problem.params, strict=True)]


def _operator(kind: str, problem: Problem, *loss: nn.Module) -> Any:
    """One of curvlinops' operators at the batch (the way is skipped where it is not installed)."""
    import curvlinops

    model, data = problem.untracked, [(problem.X, problem.y)]
    more = {"check_deterministic": False, "num_data": problem.n}
    return getattr(curvlinops, kind)(model, *loss, list(model.parameters()), data, **more)


def curvlinops_vjp(problem: Problem, job: Job, chunk: int, stop: int) -> Rows:
    """curvlinops' ``TransposedJacobianLinearOperator`` on chunks of columns."""
    operator = _operator("TransposedJacobianLinearOperator", problem)
    with torch.no_grad():
        columns = job.columns(problem, problem.untracked(problem.X))
    for start in range(0, stop, chunk):
        part = columns(start, min(start + chunk, stop)).movedim(0, -1).contiguous()
        yield [row.movedim(-1, 0) for row in operator @ [part]]


PLAIN = {
    "autograd batched": autograd,  # the reference: exact, cheap to trust
    "autograd loop": partial(autograd, batched=False),
    "autograd batched NHWC": partial(autograd, channels_last=True),
    "func vmap(vjp)": func_vjp,
    "func jacrev": func_jacrev,
    "curvlinops J^T": curvlinops_vjp,
}


def plain(name: str, job: Job) -> Way:
    """A competitor that makes rows in a plain way and hands them to the job."""

    def run(problem: Problem, chunk: int | None, limit: int | None) -> Outcome:
        state, done, K = job.start(problem), 0, job.count(problem)
        for rows in PLAIN[name](problem, job, chunk or 1, min(K, limit or K)):
            job.add(state, done, rows)
            done += len(rows[0])
        # jacrev pulls the C columns of the identity per sample, whatever the factor
        passes = done * problem.classes * problem.n // K if name == "func jacrev" else done
        return Outcome(job.result(state), passes) if done == K else Outcome(state, passes, done)

    return Way(name, "peer", run, plain=True)


def _leading(problem: Problem, product: Callable[[Any], Any], what: str) -> Outcome:
    """The ten largest pairs of the matrix behind ``product``, by the eigensolver call that bncurv uses itself."""
    products = 0

    def matvec(v: Any) -> Any:
        nonlocal products
        products += 1
        return product(v)

    operator = LinearOperator((problem.D, problem.D), matvec=matvec, dtype=numpy.float32)
    pairs = leading(operator, TOP, torch.float32)
    value = tuple(torch.from_numpy(a[..., ::-1].copy()).to(problem.device) for a in pairs)
    return Outcome(value, products, note=f"{products} products ({what}), tol {LANCZOS_TOLERANCE[torch.float32]:g}")


def curvlinops_eigsh(problem: Problem, chunk: int | None, limit: int | None) -> Outcome:
    """curvlinops' matrix-free GGN and scipy's ``eigsh``."""
    operator = _operator("GGNLinearOperator", problem, problem.loss_fn).to_scipy(dtype=numpy.float32)
    return _leading(problem, lambda v: operator @ v, "forward, jvp, vjp each")


def autograd_eigsh(problem: Problem, chunk: int | None, limit: int | None) -> Outcome:
    """Matrix-free GGN on one kept graph (double backward for ``J v``) and scipy's ``eigsh``."""
    F = problem.model(problem.X)
    p = F.detach().softmax(1) / problem.n
    w = torch.zeros_like(F, requires_grad=True)
    pulled = torch.autograd.grad(F, problem.params, w, create_graph=True)

    def product(v: Any) -> Any:
        parts = torch.from_numpy(v).to(problem.device).split([q.numel() for q in problem.params])
        parts = [part.view_as(q) for part, q in zip(parts, problem.params, strict=True)]
        (u,) = torch.autograd.grad(pulled, w, parts, retain_graph=True)
        u = p * u - p * (p * u).sum(1, keepdim=True) * problem.n
        rows = torch.autograd.grad(F, problem.params, u, retain_graph=True)
        return torch.cat([row.flatten() for row in rows]).cpu().numpy()

    return _leading(problem, product, "two backward passes each")


def ours(job: str, method: str, problem: Problem, chunk: int | None, limit: int | None) -> Outcome:
    """A call of ``bncurv.curvature`` with one method, its result in the form that the peers give."""
    generator = torch.Generator(problem.device).manual_seed(1000 + problem.draw)
    quantity: Any = {
        "diag": bncurv.DiagGGNExact(),
        "components": bncurv.ComponentGrad(),
        "mc": bncurv.DiagGGNMC(problem.mc_samples, generator=generator),
        "spectrum": bncurv.LowRankGGN(),
        "top10": bncurv.LowRankGGN(top=TOP, matrix_free=None if method == "auto" else False),  # auto: what a user gets
    }[job]
    res = bncurv.curvature(problem.model, problem.loss_fn, (problem.X, problem.y), quantity, method=method)
    note = f"took the {res.method} way" if method == "auto" else ""
    if job == "spectrum":
        return Outcome(res.ggn.eigenvalues, res.passes, note=note)
    if job == "top10":
        rows = [vectors.flatten(1) for vectors in res.ggn.eigenvectors(TOP).values()]
        return Outcome((res.ggn.eigenvalues[:TOP], torch.cat(rows, 1).T), res.passes, note=note)
    field, lead = {"diag": ("diag_ggn_exact", 0), "mc": ("diag_ggn_mc", 0), "components": ("grad_component", 1)}[job]
    rows = [rows.flatten(lead) for rows in getattr(res, field).values()]
    return Outcome(torch.cat(rows, dim=-1), res.passes, note=note)


def competitors(job: str, images: bool) -> list[Way]:
    """All ways to do a job, the reference first."""
    unfit = ["func jacrev"] * (job == "mc") + ["autograd batched NHWC"] * (not images)
    found = [plain(name, JOBS[job]) for name in PLAIN if name not in unfit]
    if job == "top10":
        found += [Way("curvlinops eigsh", "peer", curvlinops_eigsh), Way("autograd eigsh", "peer", autograd_eigsh)]
    methods = ("auto",) if job == "mc" else ("coupled", "dense", "auto")
    return found + [Way(f"bncurv {method}", "ours", partial(ours, job, method)) for method in methods]
