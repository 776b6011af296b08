"""Matrix-free GGN: products through the recorded graph, for networks whose V does not fit into memory.

G v = Jᵀ H (J v), two backward passes' worth of work per vector whatever N is, in the order v → J v → H J v → Jᵀ H J v.
J v is the backward pass of a backward pass: w(u) = Jᵀ u is linear in u, so d(w · v)/du = J v (Townsend 2017). The graph
stays alive as long as the operator does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NoReturn, final

import torch
from torch import Tensor

from bncurv.loss_at_batch import LossAtBatch
from bncurv.lowrank.base import GGN
from bncurv.lowrank.lanczos import conjugate_gradients, eigenpairs


class BatchOperator:
    """G of one mini-batch on flat vectors.

    Args:
        output: the model's output on its graph.
        at_batch: the loss' gradient and Hessian factor there.
        parameters: parameters by name.
    """

    def __init__(self, output: Tensor, at_batch: LossAtBatch, parameters: Mapping[str, Tensor]) -> None:
        self.parameters, self.at_batch = dict(parameters), at_batch
        self._output, self._list = output, list(parameters.values())
        with torch.enable_grad():
            self._u = torch.zeros_like(output, requires_grad=True)
            w = torch.autograd.grad(output, self._list, self._u, create_graph=True, materialize_grads=True)
        self._w = [(t, i) for i, t in enumerate(w) if t.requires_grad]

    @property
    def components(self) -> int:
        """Number of rows of V."""
        return len(self._output) * self.at_batch.factor.columns_per_sample

    def jvp(self, v: Tensor) -> Tensor:
        """J v, ``[n, *output]``."""
        parts = v.split([p.numel() for p in self._list])
        cotangents = [parts[i].view_as(self._list[i]) for _, i in self._w]
        return torch.autograd.grad([t for t, _ in self._w], self._u, cotangents, retain_graph=True)[0]

    def vjp(self, u: Tensor) -> Tensor:
        """Jᵀ u, flat."""
        got = torch.autograd.grad(
            self._output, self._list, u, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return torch.cat([t.reshape(-1) for t in got])

    def __matmul__(self, v: Tensor) -> Tensor:
        """G v, flat."""
        Jv = self.jvp(v)
        HJv = self.at_batch.factor.hessian_product(Jv)
        return self.vjp(HJv)


class NeedsRows(NotImplementedError, AttributeError):
    """Asked of a matrix-free GGN: what only the rows of V give."""


@final
class MatrixFreeGGN(GGN):
    """The leading eigenpairs of G, and G itself through the network: ``LowRankGGN(matrix_free=True)``.

    Products (``@``, ``to_scipy``), ``solve`` (conjugate gradients), `density` (stochastic Lanczos), slopes and
    curvatures use the whole G; eigenvalues, eigenvectors and Newton steps along directions its ``top`` leading part.
    What needs the whole spectrum (``trace``, ``frobenius_norm``, ``logdet``, ``sample``) is refused with `NeedsRows`.

    Args:
        operators: one per mini-batch; G = Σ share · operator.
        top: number of eigenpairs, by scipy's implicitly restarted Lanczos (`LANCZOS_TOLERANCE`).
        shares: weights of the mini-batches.
    """

    def __init__(self, operators: list[BatchOperator], top: int, shares: Sequence[float] = (1.0,)) -> None:
        parameters = operators[0].parameters
        shapes, like = {name: p.shape for name, p in parameters.items()}, next(iter(parameters.values())).detach()
        super().__init__(shapes, sum(op.components for op in operators), like, top)
        self._operators, self._shares = operators, shares
        if top >= self.dim:
            raise ValueError(f"top={top} is not below the number of parameters {self.dim}; use top=None.")
        self._pairs = eigenpairs(self._product, self.dim, top, like)

    @property
    def _values(self) -> Tensor:
        return self._pairs[0]

    def _vectors(self, k: int) -> Tensor:
        return self._pairs[1][:, :k]

    @property
    def _weighted(self) -> Iterator[tuple[BatchOperator, float]]:
        return zip(self._operators, self._shares, strict=True)

    def _product(self, v: Tensor) -> Tensor:
        if v.dim() > 1:
            return torch.stack([self._product(c) for c in v.T], 1)
        parts = [op @ v if share == 1 else share * (op @ v) for op, share in self._weighted]
        return functools.reduce(torch.add, parts)

    def _inverse(self, v: Tensor, damping: float) -> Tensor:
        return conjugate_gradients(self._product, v, damping)

    @property
    def gradient(self) -> Tensor:
        """Gradient of the loss, flat ``[D]``."""
        return functools.reduce(torch.add, (share * op.vjp(op.at_batch.gradient) for op, share in self._weighted))

    def slopes(self, k: int | None = None) -> Tensor:
        """γ[n, d] = g_n · e_d = ∂L/∂F_n · (J e_d)_n, ``[N, k]``."""
        return self._along(k, lambda op, Je: (op.at_batch.gradient * Je).flatten(1).sum(1))

    def curvatures(self, k: int | None = None) -> Tensor:
        """λ[n, d] = (J e_d)_n · H_n (J e_d)_n, ``[N, k]``."""
        return self._along(k, lambda op, Je: (Je * op.at_batch.factor.hessian_product(Je)).flatten(1).sum(1))

    def _along(self, k: int | None, f: Callable[[BatchOperator, Tensor], Tensor]) -> Tensor:
        directions = self.unit_vectors(k).T
        rows = [share * torch.stack([f(op, op.jvp(e)) for e in directions], 1) for op, share in self._weighted]
        return torch.cat(rows)

    def __getattr__(self, name: str) -> NoReturn:
        if name in ("trace", "frobenius_norm", "logdet", "sample"):
            raise NeedsRows(
                f"{name} needs all rows of V, but this GGN is matrix-free with top={self.top} eigenpairs. Use "
                "LowRankGGN(matrix_free=False) with fewer samples or parameters, or density() for the spectrum."
            )
        raise AttributeError(f"MatrixFreeGGN has no attribute '{name}'.")
