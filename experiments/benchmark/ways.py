"""The plain exact ways to pull cotangents back through the whole batch: generators of rows.

Each way is called ``way(problem, job, chunk, limit)`` and yields ``(start, rows)``, where ``rows``
holds one tensor ``[k, *p]`` per parameter for the components ``start ... start + k``; the consumer
may overwrite them. ``limit`` stops after that many components.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from factors import Columns
from problem import Job, Problem
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vjp, vmap

Rows = Iterator[tuple[int, list[Tensor]]]
Way = Callable[[Problem, Job, int, "int | None"], Rows]
LOOP_BLOCK = 64  # cotangents that the loop makes at a time


def _ranges(columns: Columns, chunk: int, limit: int | None) -> Iterator[tuple[int, int]]:
    """Chunk borders up to the limit."""
    stop = min(columns.count, limit or columns.count)
    for start in range(0, stop, chunk):
        yield start, min(start + chunk, stop)


def _functional(problem: Problem) -> Callable[[tuple[Tensor, ...]], Tensor]:
    """The model as a function of its parameters, on buffers cloned inside the transform."""

    def forward(params: tuple[Tensor, ...]) -> Tensor:
        named = dict(zip(problem.names, params, strict=True))
        buffers = {name: b.clone() for name, b in problem.model.named_buffers()}
        return functional_call(problem.model, (named, buffers), (problem.X,))

    return forward


def loop(problem: Problem, job: Job, chunk: int, limit: int | None) -> Rows:
    """A Python loop of ``torch.autograd.grad``."""
    F = problem.model(problem.X)
    columns = job.columns(problem, F)
    for start, stop in _ranges(columns, LOOP_BLOCK, limit):
        for k, column in enumerate(columns.chunk(start, stop), start):
            rows = torch.autograd.grad(F, problem.params, column, retain_graph=True)
            yield k, [row.unsqueeze(0) for row in rows]


def _batched(
    problem: Problem, job: Job, chunk: int, limit: int | None, model: nn.Module, X: Tensor
) -> Rows:
    """``is_grads_batched`` on a given copy of the model."""
    F, params = model(X), tuple(model.parameters())
    columns = job.columns(problem, F)
    for start, stop in _ranges(columns, chunk, limit):
        rows = torch.autograd.grad(
            F, params, columns.chunk(start, stop), retain_graph=True, is_grads_batched=True
        )
        yield start, list(rows)


def batched(problem: Problem, job: Job, chunk: int, limit: int | None) -> Rows:
    """``torch.autograd.grad(..., is_grads_batched=True)`` in chunks."""
    return _batched(problem, job, chunk, limit, problem.model, problem.X)


def batched_channels_last(problem: Problem, job: Job, chunk: int, limit: int | None) -> Rows:
    """The same in channels-last layout (faster for some convolutional networks)."""
    model, X = problem.channels_last
    return _batched(problem, job, chunk, limit, model, X)


def func_vjp(problem: Problem, job: Job, chunk: int, limit: int | None) -> Rows:
    """``torch.func``: ``vmap`` of one ``vjp``, in chunks."""
    params = tuple(p.detach() for p in problem.params)
    F, pull = vjp(_functional(problem), params)
    columns = job.columns(problem, F)
    pull_many = vmap(pull)
    for start, stop in _ranges(columns, chunk, limit):
        (rows,) = pull_many(columns.chunk(start, stop))
        yield start, list(rows)


def func_jacrev(problem: Problem, job: Job, chunk: int, limit: int | None) -> Rows:
    """``torch.func.jacrev(chunk_size=...)`` of the whole batch, then the factor."""
    params = tuple(p.detach() for p in problem.params)
    forward = _functional(problem)
    probe = job.columns(problem, torch.zeros(problem.n, problem.classes, device=problem.device))
    per_sample = probe.count // problem.n
    samples = problem.n if limit is None else max(1, min(problem.n, limit // per_sample))

    def outputs(params: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        F = forward(params)
        return F[:samples], F

    J, F = jacrev(outputs, has_aux=True, chunk_size=chunk)(params)
    S = job.columns(problem, F).blocks
    assert S is not None
    block = max(1, 128 // per_sample)
    for n in range(0, samples, block):
        part = slice(n, min(n + block, samples))
        factor = S[part].transpose(1, 2)  # [n, per_sample, C]
        rows = [torch.bmm(factor, j[part].flatten(2)) for j in J]
        shapes = [p.shape for p in problem.params]
        yield (
            n * per_sample,
            [row.reshape(-1, *shape) for row, shape in zip(rows, shapes, strict=True)],
        )


def curvlinops_vjp(problem: Problem, job: Job, chunk: int, limit: int | None) -> Rows:
    """curvlinops' ``TransposedJacobianLinearOperator`` on chunks of columns."""
    from curvlinops import TransposedJacobianLinearOperator

    model = problem.untracked
    operator = TransposedJacobianLinearOperator(
        model,
        list(model.parameters()),
        [(problem.X, problem.y)],
        check_deterministic=False,
        num_data=problem.n,
    )
    with torch.no_grad():
        columns = job.columns(problem, model(problem.X))
    for start, stop in _ranges(columns, chunk, limit):
        M = columns.chunk(start, stop).movedim(0, -1).contiguous()
        yield start, [row.movedim(-1, 0) for row in operator @ [M]]


WAYS: dict[str, Way] = {
    "autograd loop": loop,
    "autograd batched": batched,
    "autograd batched NHWC": batched_channels_last,
    "func vmap(vjp)": func_vjp,
    "func jacrev": func_jacrev,
    "curvlinops J^T": curvlinops_vjp,
}
