"""Matrix-free GGN: products through the recorded graph, for networks whose V does not fit into memory.

G v = Jᵀ H (J v), two backward passes' worth of work per vector whatever N is, in the order v → J v → H J v → Jᵀ H J v.
J v is the backward pass of a backward pass: w(u) = Jᵀ u is linear in u, so d(w · v)/du = J v (Townsend 2017). The graph
stays alive as long as the operator does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, cg, eigsh
from torch import Tensor

from bncurv.losses import Factor
from bncurv.lowrank import LowRank, Vector, positive


class BatchOperator:
    """G of one mini-batch on flat vectors.

    Args:
        output: the model's output on its graph.
        factor: the loss' Hessian factor.
        parameters: parameters by name.
    """

    def __init__(self, output: Tensor, factor: Factor, parameters: Mapping[str, Tensor]) -> None:
        self._output, self._factor, self._parameters = output, factor, list(parameters.values())
        with torch.enable_grad():
            self._u = torch.zeros_like(output, requires_grad=True)
            self._w = torch.autograd.grad(output, self._parameters, self._u, create_graph=True, materialize_grads=True)

    def __matmul__(self, v: Tensor) -> Tensor:
        """G v, flat."""
        sizes = [p.numel() for p in self._parameters]
        parts = [part.view_as(p) for part, p in zip(v.split(sizes), self._parameters, strict=True)]
        on_graph = [(w, part) for w, part in zip(self._w, parts, strict=True) if w.requires_grad]
        (Jv,) = torch.autograd.grad(
            [w for w, _ in on_graph], self._u, [part for _, part in on_graph], retain_graph=True
        )
        HJv = self._factor.hessian_product(Jv)
        JHJv = torch.autograd.grad(
            self._output, self._parameters, HJv, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return torch.cat([t.reshape(-1) for t in JHJv])


class MatrixFreeGGN(LowRank):
    """The leading eigenpairs of G, and G itself through the network: `LowRank` with ``matrix_free=True``.

    Products (``@``, ``to_scipy``), ``solve`` (conjugate gradients) and `density` (stochastic Lanczos) use the whole G;
    eigenvalues, eigenvectors, slopes, curvatures and Newton steps along directions its ``top`` leading part. What needs
    the whole spectrum (trace, Frobenius norm, log-determinant, samples) is refused.

    Args:
        operators: one per mini-batch; G is their mean.
        gradients: per-component gradients by name.
        top: number of eigenpairs, by scipy's implicitly restarted Lanczos to machine precision.
    """

    def __init__(self, operators: list[BatchOperator], gradients: dict[str, Tensor], top: int) -> None:
        self._operators = operators
        empty = {name: g[:0] for name, g in gradients.items()}
        super().__init__(empty, gradients, top)
        if top >= self.dim:
            raise ValueError(f"top={top} is not below the number of parameters {self.dim}; use top=None.")
        start = np.random.default_rng(0).standard_normal(self.dim)
        values, vectors = eigsh(self.to_scipy(), k=top, which="LA", v0=start.astype(self.to_scipy().dtype))
        values, vectors = values[::-1].copy(), vectors[:, ::-1].copy()
        kept = values > 0
        # as rows of V: √λ e, so that the base class' formulas apply to the leading part
        rows = torch.from_numpy((vectors[:, kept] * np.sqrt(values[kept])).T).to(self.device, self.dtype)
        self._rows, self.components = self.unflatten(rows), len(rows)

    def _product(self, v: Tensor) -> Tensor:
        columns = v[:, None] if v.dim() == 1 else v
        out = torch.stack([sum(op @ c for op in self._operators) for c in columns.T], 1) / len(self._operators)
        return out[:, 0] if v.dim() == 1 else out

    def residuals(self, k: int | None = None) -> Tensor:
        """‖G e - λ e‖ of the leading eigenpairs, with the whole G."""
        e = self.unit_vectors(k)
        return torch.linalg.vector_norm(self._product(e) - e * self._values[: e.shape[1]], dim=0)

    def curvatures(self, k: int | None = None) -> Tensor:
        """Not available: the components' rows of V are not kept."""
        raise self._refusal("curvatures")

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

        return self._apply(inverse, v)
