"""A cell's problem, and its job: which cotangents are pulled back, and what is done with the rows of V that they give.

``S[n]`` is a factor of sample n's loss Hessian, ``S[n] S[n]^T = (diag(p_n) - p_n p_n^T) / N``. Component ``k = (n, c)``
is the column ``S[n, :, c]`` placed in row n of a zero ``[N, C]`` array.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from lib.networks import make_problem, untracked
from torch import Tensor, nn

TOP = 10
Columns = Callable[[int, int], Tensor]  # cotangents [k, N, C] from number start to number stop


@dataclass
class Problem:
    """A network in train mode with one batch, and what every competitor shares."""

    net: str
    n: int
    device: torch.device
    mc_samples: int = 64
    draw: int = 0  # seed of Monte-Carlo jobs, changed from call to call
    largest: int = 0  # elements of the largest activation

    def __post_init__(self) -> None:
        self.model, self.loss_fn, self.X, self.y = make_problem(self.net, self.n, self.device)
        self.names, self.params = zip(*self.model.named_parameters(), strict=True)
        self.D = sum(p.numel() for p in self.params)
        hooks = [m.register_forward_hook(self._note) for m in self.model.modules()]
        self.classes = self.model(self.X).shape[1]
        for hook in hooks:
            hook.remove()

    def _note(self, module: nn.Module, inputs: object, output: Tensor) -> None:
        self.largest = max(self.largest, output.numel())

    @cached_property
    def untracked(self) -> nn.Module:
        """A copy for curvlinops."""
        return untracked(self.model)

    @cached_property
    def channels_last(self) -> tuple[nn.Module, Tensor]:
        """A copy of the model and the batch, both in channels-last layout."""
        layout = torch.channels_last
        return copy.deepcopy(self.model).to(memory_format=layout), self.X.contiguous(memory_format=layout)


def factor(F: Tensor) -> Tensor:
    """Cholesky factor ``[N, C, C-1]`` of the cross-entropy's Hessian (its column C is zero), by remaining mass.

    With ``q_c = sum_{i >= c} p_i``: diagonal ``sqrt(p_c q_{c+1} / q_c)``, below it ``-p_i sqrt(p_c / (q_c q_{c+1}))``.
    """
    p = F.detach().softmax(1)
    q = p.flip(1).cumsum(1).flip(1)
    here, after = q[:, :-1], q[:, 1:]
    S = (-p[:, :, None] * (p[:, :-1] / (here * after)).sqrt()[:, None, :]).tril(-1)
    S.diagonal(dim1=1, dim2=2).copy_((p[:, :-1] * after / here).sqrt())
    return S / len(F) ** 0.5


def one_hot(blocks: Tensor, start: int, stop: int) -> Tensor:
    """Components ``start`` to ``stop`` as ``[k, N, C]``, of the columns ``[N, C, per sample]``."""
    N, C, per_sample = blocks.shape
    ks = torch.arange(start, stop, device=blocks.device)
    n, c = ks // per_sample, ks % per_sample
    out = blocks.new_zeros(stop - start, N, C)
    out[ks - start, n] = blocks[n, :, c]
    return out


def gradients(problem: Problem, F: Tensor) -> Tensor:
    """The loss' gradient at each sample's output, ``[N, C, 1]``."""
    leaf = F.detach().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(problem.loss_fn(leaf, problem.y), leaf)[0].unsqueeze(2)


@dataclass(frozen=True)
class Job:
    """What is asked of V: its rows as they are (``stored``, ``V [K, D]``), or the sum of their squares, and more.

    Attributes:
        name: of the job.
        stored: whether all rows are kept.
        finish: what is made of them.
        error: of a result, relative to another's.
    """

    name: str
    stored: bool = False
    finish: Callable[[Tensor], Any] = lambda found: found
    error: Callable[[Any, Any], float | None] = lambda value, other: float((value - other).norm() / other.norm())

    def per_sample(self, problem: Problem) -> int:
        """Components of one sample."""
        return 1 if self.name == "components" else problem.classes - 1

    def count(self, problem: Problem) -> int:
        """Number of components K; of draws M."""
        return problem.mc_samples if self.name == "mc" else problem.n * self.per_sample(problem)

    def blocks(self, problem: Problem, F: Tensor) -> Tensor:
        """The components' columns ``[N, C, per sample]``."""
        return gradients(problem, F) if self.name == "components" else factor(F)

    def columns(self, problem: Problem, F: Tensor) -> Columns:
        """Cotangents by their numbers, at an output."""
        return draws(problem, F) if self.name == "mc" else partial(one_hot, self.blocks(problem, F))

    def start(self, problem: Problem) -> list[Tensor]:
        """One buffer for all rows; or a sum per parameter."""
        if self.stored:
            return [torch.empty(self.count(problem), problem.D, device=problem.device)]
        return [torch.zeros_like(p, requires_grad=False) for p in problem.params]

    def add(self, state: list[Tensor], start: int, rows: list[Tensor]) -> None:
        """Take in the rows ``start ...`` of ``V`` (a list per parameter, may be overwritten)."""
        places = state
        if self.stored:
            places = list(state[0][start : start + len(rows[0])].split([row[0].numel() for row in rows], dim=1))
        for place, row in zip(places, rows, strict=True):
            if self.stored:
                place.copy_(row.flatten(1))
            elif len(row) == 1:
                place.addcmul_(row[0], row[0])
            else:
                place.add_(row.square_().sum(0))

    def result(self, state: list[Tensor]) -> Any:
        """Of all rows."""
        return self.finish(state[0] if self.stored else torch.cat([s.flatten() for s in state]))


def draws(problem: Problem, F: Tensor) -> Columns:
    """M whole-batch Rademacher mixtures of the exact factor's columns, over sqrt(M)."""
    S, generator = factor(F), torch.Generator().manual_seed(1000 + problem.draw)
    signs = 2 * torch.randint(0, 2, (problem.mc_samples, len(S), S.shape[2]), generator=generator) - 1
    mixed = torch.einsum("ncs,mns->mnc", S, signs.to(S)) / problem.mc_samples**0.5
    return lambda start, stop: mixed[start:stop]


def spectrum(V: Tensor) -> Tensor:
    """All non-zero GGN eigenvalues, descending, from the smaller of ``V V^T`` and ``V^T V``."""
    return torch.linalg.eigvalsh(V @ V.T if V.shape[0] <= V.shape[1] else V.T @ V).flip(0)


def spectrum_error(value: Tensor, other: Tensor) -> float:
    """The largest difference, relative to the largest eigenvalue; what one lacks is zero."""
    size = max(len(value), len(other))
    value, other = (torch.cat([v, v.new_zeros(size - len(v))]) for v in (value, other))
    return float((value - other).abs().max() / other[0])


def top_pairs(V: Tensor) -> tuple[Tensor, Tensor]:
    """The ten largest eigenpairs, ``[10]`` and ``[D, 10]``, from the smaller one, by Lanczos on a CPU."""
    tall = V.shape[0] > V.shape[1]
    matrix = V.T @ V if tall else V @ V.T
    if matrix.is_cuda or len(matrix) <= 400:
        values, U = torch.linalg.eigh(matrix)
    else:
        from scipy.sparse.linalg import eigsh

        values, U = (torch.from_numpy(a) for a in eigsh(matrix.numpy(), k=TOP, which="LA"))
    values, U = values[-TOP:].flip(0), U[:, -TOP:].flip(1)
    return values, U if tall else V.T @ U / values.sqrt()


JOBS = {
    job.name: job
    for job in (
        Job("diag"),
        Job("spectrum", stored=True, finish=spectrum, error=spectrum_error),
        Job("top10", stored=True, finish=top_pairs, error=lambda value, other: spectrum_error(value[0], other[0])),
        Job("components", stored=True),
        Job("mc", error=lambda value, other: None),  # draws differ
    )
}
