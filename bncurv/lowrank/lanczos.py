"""What needs nothing of a symmetric matrix but its products with vectors: eigenpairs, spectral density, solves."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, cg, eigsh
from threadpoolctl import ThreadpoolController
from torch import Tensor

from bncurv.precision import CG_TOLERANCE, LANCZOS_TOLERANCE, ulp

Product = Callable[[Tensor], Tensor]  # [size] → [size], or [size, m] → [size, m]


def one_blas_thread() -> AbstractContextManager:
    """One thread for the OpenBLAS of scipy's wheel, which works on single vectors here.

    Its idle threads spin, on the cores that PyTorch's need: products take up to four times as long.
    """
    return _scipy_blas().limit(limits=1)


@cache
def _scipy_blas() -> ThreadpoolController:
    """Found once: the search goes through all loaded libraries."""
    return ThreadpoolController().select(prefix="libscipy_openblas")


def as_scipy(product: Product, size: int, like: Tensor) -> LinearOperator:
    """A product as scipy's operator.

    Args:
        product: on flat vectors, one or several.
        size: of the matrix.
        like: a tensor of the product's dtype and device.
    """
    kind = np.float64 if like.dtype == torch.float64 else np.float32

    def apply(x: np.ndarray) -> np.ndarray:
        return product(torch.from_numpy(x.astype(kind)).to(like.device)).cpu().numpy()

    return LinearOperator((size, size), matvec=apply, matmat=apply, rmatvec=apply, dtype=kind)


def leading(operator: LinearOperator, count: int, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Largest eigenpairs, ascending, by scipy's implicitly restarted Lanczos from a fixed start."""
    start = np.random.default_rng(0).standard_normal(operator.shape[0]).astype(operator.dtype)
    with one_blas_thread():
        return eigsh(operator, k=count, which="LA", v0=start, tol=LANCZOS_TOLERANCE[dtype])


def eigenpairs(product: Product, size: int, count: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """The ``count`` largest eigenvalues, descending, and their eigenvectors as columns; arguments as `as_scipy`."""
    values, vectors = leading(as_scipy(product, size, like), count, like.dtype)
    return torch.from_numpy(values[::-1].copy()).to(like), torch.from_numpy(vectors[:, ::-1].copy()).to(like)


def quadrature(product: Product, start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights, at most ``steps``: start · f(A) start = ‖start‖² Σ_i weight_i f(node_i) for smooth f."""
    basis, alphas, betas = [start / start.norm()], [], []
    for _ in range(min(steps, len(start))):
        w = product(basis[-1])
        alphas.append(w @ basis[-1])
        Q = torch.stack(basis)
        w = w - Q.T @ (Q @ w)
        w = w - Q.T @ (Q @ w)
        beta = w.norm()
        if beta <= 1e3 * ulp(start.dtype) * alphas[0].abs():
            break
        betas.append(beta)
        basis.append(w / beta)
    T = torch.diag(torch.stack(alphas))
    off = torch.stack(betas[: len(alphas) - 1]) if len(alphas) > 1 else alphas[0].new_zeros(0)
    values, vectors = torch.linalg.eigh(T + torch.diag(off, 1) + torch.diag(off, -1))
    return values, vectors[0] ** 2


def conjugate_gradients(product: Product, v: Tensor, damping: float) -> Tensor:
    """(A + δ I)⁻¹ v for ``v [size]`` or ``[size, m]``, to a relative residual of `CG_TOLERANCE`.

    Raises:
        RuntimeError: if the iterations do not converge.
    """
    size = len(v)
    shifted = as_scipy(lambda x: product(x) + damping * x, size, v)
    columns = []
    for c in v.reshape(size, -1).T:
        with one_blas_thread():
            solution, failed = cg(shifted, c.cpu().numpy(), rtol=CG_TOLERANCE[v.dtype], maxiter=10 * size)
        if failed:
            raise RuntimeError(f"conjugate gradients did not converge at damping={damping}; raise the damping.")
        columns.append(torch.from_numpy(solution).to(v))
    return torch.stack(columns, 1).reshape(v.shape)
