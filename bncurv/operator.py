"""Matrix-free GGN: products through the recorded graph, for networks whose V does not fit into memory.

G v = Jᵀ H (J v), two backward passes' worth of work per vector whatever N is, in the order v → J v → H J v → Jᵀ H J v.
J v is the backward pass of a backward pass: w(u) = Jᵀ u is linear in u, so d(w · v)/du = J v (Townsend 2017). The graph
stays alive as long as the operator does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, cg
from torch import Tensor

from bncurv.loss_at_batch import LossAtBatch
from bncurv.lowrank import LowRank, Vector, leading, one_blas_thread, positive


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


class MatrixFreeGGN(LowRank):
    """The leading eigenpairs of G, and G itself through the network: `LowRank` with ``matrix_free=True``.

    Products (``@``, ``to_scipy``), ``solve`` (conjugate gradients), `density` (stochastic Lanczos), slopes and
    curvatures use the whole G; eigenvalues, eigenvectors and Newton steps along directions its ``top`` leading part.
    What needs the whole spectrum (trace, Frobenius norm, log-determinant, samples) is refused.

    Args:
        operators: one per mini-batch; G = Σ share · operator.
        top: number of eigenpairs, by scipy's implicitly restarted Lanczos (`LANCZOS_TOLERANCE`).
    """

    def __init__(self, operators: list[BatchOperator], top: int, shares: Sequence[float] = (1.0,)) -> None:
        self._operators, self._shares = operators, shares
        parameters = operators[0].parameters
        super().__init__({name: p.detach()[None][:0] for name, p in parameters.items()}, {}, top)
        if top >= self.dim:
            raise ValueError(f"top={top} is not below the number of parameters {self.dim}; use top=None.")
        values, vectors = leading(self.to_scipy(), top, self.dtype)
        values, vectors = values[::-1].copy(), vectors[:, ::-1].copy()
        kept = values > 0
        # as rows of V: √λ e, so that the base class' formulas apply to the leading part
        rows = torch.from_numpy((vectors[:, kept] * np.sqrt(values[kept])).T).to(self.device, self.dtype)
        self._rows, self.components = self.unflatten(rows), len(rows)
        self._decomposition = torch.from_numpy(values[kept]).to(rows), torch.eye(len(rows)).to(rows)

    def _product(self, v: Tensor) -> Tensor:
        if v.dim() > 1:
            return torch.stack([self._product(c) for c in v.T], 1)
        parts = [op @ v if share == 1 else share * (op @ v) for op, share in self._weighted]
        return functools.reduce(torch.add, parts)

    @property
    def _weighted(self) -> Iterator[tuple[BatchOperator, float]]:
        return zip(self._operators, self._shares, strict=True)

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

    def residuals(self, k: int | None = None) -> Tensor:
        """‖G e - λ e‖ of the leading eigenpairs, with the whole G."""
        e = self.unit_vectors(k)
        return torch.linalg.vector_norm(self._product(e) - e * self._values[: e.shape[1]], dim=0)

    @property
    def trace(self) -> Tensor:
        """Not available."""
        raise self._refusal("trace")

    @property
    def frobenius_norm(self) -> Tensor:
        """Not available."""
        raise self._refusal("frobenius_norm")

    def logdet(self, damping: float) -> Tensor:
        """Not available."""
        raise self._refusal("logdet")

    def sample(self, damping: float, count: int = 1, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Not available."""
        raise self._refusal("sample")

    def _refusal(self, what: str) -> NotImplementedError:
        return NotImplementedError(
            f"{what} needs all rows of V, but this GGN is matrix-free with top={self._top} eigenpairs. Use "
            "LowRankGGN(matrix_free=False) with fewer samples or parameters, or density() for the spectrum."
        )

    def solve(self, v: Vector, damping: float) -> Any:
        """(G + δ I)⁻¹ v by conjugate gradients to a relative residual of 1e-6 (float64: 1e-10).

        Raises:
            RuntimeError: if they do not converge.
        """
        positive(damping)
        kind = self.to_scipy().dtype
        shifted = LinearOperator(
            (self.dim, self.dim), matvec=lambda x: self.to_scipy().matvec(x) + damping * x, dtype=kind
        )
        tolerance = 1e-10 if kind == np.float64 else 1e-6

        def inverse(x: Tensor) -> Tensor:
            columns = []
            for c in x.reshape(self.dim, -1).T:
                solution, failed = cg(shifted, c.cpu().numpy(), rtol=tolerance, maxiter=10 * self.dim)
                if failed:
                    raise RuntimeError(f"conjugate gradients did not converge at damping={damping}; raise the damping.")
                columns.append(torch.from_numpy(solution).to(x))
            return torch.stack(columns, 1).reshape(x.shape)

        with one_blas_thread():
            return self._apply(inverse, v)
