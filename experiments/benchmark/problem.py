"""One cell's problem and the plain jobs: what is done with the rows of ``V``."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from factors import Columns, exact_columns, gradient_columns, random_columns
from networks import make_problem
from torch import Tensor, nn

TOP = 10


@dataclass
class Problem:
    """A network in train mode with one batch, and the settings that every competitor shares."""

    net: str
    n: int
    device: torch.device
    factor: str = "c-1"
    mc_samples: int = 64
    draw: int = 0  # seed of Monte-Carlo jobs, changed from call to call
    model: nn.Module = field(init=False)
    extended: tuple[nn.Module, nn.Module] | None = field(init=False, default=None)  # BackPACK's

    def __post_init__(self) -> None:
        self.model, self.loss_fn, self.X, self.y = make_problem(self.net, self.n, self.device)
        self.names = [name for name, _ in self.model.named_parameters()]
        self.params = tuple(self.model.parameters())
        self.sizes = [p.numel() for p in self.params]
        self.D = sum(self.sizes)
        self.largest = 0  # elements of the largest activation
        hooks = [m.register_forward_hook(self._note) for m in self.model.modules()]
        self.classes = self.model(self.X).shape[1]
        for hook in hooks:
            hook.remove()

    def _note(self, module: nn.Module, inputs: object, output: Tensor) -> None:
        """Note the size of a module's output."""
        self.largest = max(self.largest, output.numel())

    @property
    def per_sample(self) -> int:
        """Columns of the exact factor per sample."""
        return self.classes - (self.factor == "c-1")

    @cached_property
    def untracked(self) -> nn.Module:
        """A copy whose BNs keep no running statistics (curvlinops needs that)."""
        model = copy.deepcopy(self.model)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.track_running_stats = False
                module.running_mean = module.running_var = module.num_batches_tracked = None
        return model

    @cached_property
    def channels_last(self) -> tuple[nn.Module, Tensor]:
        """A copy of the model and the batch, both in channels-last layout."""
        model: Any = copy.deepcopy(self.model)
        model.to(memory_format=torch.channels_last)
        return model, self.X.contiguous(memory_format=torch.channels_last)

    def generator(self) -> torch.Generator:
        """A fresh generator for this call's draw (on the CPU)."""
        return torch.Generator().manual_seed(1000 + self.draw)


class Diagonal:
    """Exact GGN diagonal: sum over components of the squared rows."""

    name, stored = "diag", False

    def columns(self, problem: Problem, F: Tensor) -> Columns:
        """All columns of the exact factor."""
        return exact_columns(F, problem.factor)

    def count(self, problem: Problem) -> int:
        """Number of components K."""
        return problem.n * problem.per_sample

    def start(self, problem: Problem) -> list[Tensor]:
        """Accumulators."""
        return [torch.zeros_like(p, requires_grad=False) for p in problem.params]

    def add(self, state: list[Tensor], start: int, rows: list[Tensor]) -> None:
        """Take in the rows ``start ...`` of ``V`` (a list per parameter, may be overwritten)."""
        for total, row in zip(state, rows, strict=True):
            if len(row) == 1:
                total.addcmul_(row[0], row[0])
            else:
                total.add_(row.square_().sum(0))

    def finish(self, state: list[Tensor]) -> Any:
        """The result."""
        return torch.cat([s.flatten() for s in state])


class RandomDiagonal(Diagonal):
    """Monte-Carlo GGN diagonal from whole-batch mixtures of the exact factor's columns."""

    name = "mc"

    def columns(self, problem: Problem, F: Tensor) -> Columns:
        """M Rademacher mixtures."""
        return random_columns(F, problem.factor, problem.mc_samples, problem.generator())

    def count(self, problem: Problem) -> int:
        """Number of draws M."""
        return problem.mc_samples


class Stored(Diagonal):
    """Keep the rows: ``V [K, D]``."""

    name, stored = "rows", True

    def start(self, problem: Problem) -> list[Tensor]:
        """The buffer and, as split views of it, one slice per parameter."""
        return [torch.empty(self.count(problem), problem.D, device=problem.device)]

    def add(self, state: list[Tensor], start: int, rows: list[Tensor]) -> None:
        """Copy the rows into their place."""
        block = state[0][start : start + len(rows[0])]
        parts = block.split([row[0].numel() for row in rows], dim=1)
        for part, row in zip(parts, rows, strict=True):
            part.copy_(row.flatten(1))

    def finish(self, state: list[Tensor]) -> Any:
        """The rows themselves."""
        return state[0]


class Components(Stored):
    """Per-component gradients ``[N, D]``."""

    name = "components"

    def columns(self, problem: Problem, F: Tensor) -> Columns:
        """One loss gradient per sample."""
        return gradient_columns(F, problem.loss_fn, problem.y)

    def count(self, problem: Problem) -> int:
        """Number of samples N."""
        return problem.n


class Spectrum(Stored):
    """All non-zero GGN eigenvalues, from the smaller of ``V V^T`` and ``V^T V``."""

    name = "spectrum"

    def finish(self, state: list[Tensor]) -> Tensor:
        """Eigenvalues, descending."""
        (V,) = state
        small = V @ V.T if V.shape[0] <= V.shape[1] else V.T @ V
        return torch.linalg.eigvalsh(small).flip(0)


class TopPairs(Stored):
    """The ten largest eigenpairs, from the smaller of ``V V^T`` and ``V^T V``."""

    name = "top10"

    def finish(self, state: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Eigenvalues [10] and eigenvectors [D, 10]."""
        (V,) = state
        if V.shape[0] > V.shape[1]:
            return top_pairs(V.T @ V)
        values, U = top_pairs(V @ V.T)
        return values, V.T @ U / values.sqrt()


def top_pairs(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Ten largest eigenpairs of a dense symmetric matrix, by Lanczos on a CPU."""
    if matrix.is_cuda or len(matrix) <= 400:
        values, U = torch.linalg.eigh(matrix)
        return values[-TOP:].flip(0), U[:, -TOP:].flip(1)
    from scipy.sparse.linalg import eigsh

    w, u = eigsh(matrix.numpy(), k=TOP, which="LA")
    order = w.argsort()[::-1]
    return torch.from_numpy(w[order].copy()), torch.from_numpy(u[:, order].copy())


Job = Diagonal
JOBS: dict[str, Diagonal] = {
    job.name: job for job in (Diagonal(), Spectrum(), TopPairs(), Components(), RandomDiagonal())
}
