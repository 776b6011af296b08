"""What needs nothing of a symmetric matrix but its products with vectors: eigenpairs, spectral density, solves."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache

import numpy as np
import torch
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh
from threadpoolctl import ThreadpoolController
from torch import Tensor

from bncurv.precision import CG_STEPS, CG_TOLERANCE, LANCZOS_TOLERANCE, WORST, full_precision, ulp

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
    try:
        values, vectors = leading(as_scipy(product, size, like), count, like.dtype)
    except ArpackError:
        if bool(product(like.new_ones(size)).any()):
            raise
        return like.new_zeros(count), torch.eye(size, count, dtype=like.dtype, device=like.device)  # the zero matrix
    return torch.from_numpy(values[::-1].copy()).to(like), torch.from_numpy(vectors[:, ::-1].copy()).to(like)


def quadrature(product: Product, start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights, at most ``steps``: start · f(A) start = ‖start‖² Σ_i weight_i f(node_i) for smooth f."""
    with full_precision(start):
        return _quadrature(product, start, steps)


def _quadrature(product: Product, start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
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


def damped_inverse(up: Product, down: Product, v: Tensor, damping: float, largest: float) -> Tensor:
    """(Vᵀ V + δ I)⁻¹ v by conjugate gradients, ``[D] → [D]``.

    Args:
        up: V v, ``[D] → [K]``.
        down: Vᵀ u, ``[K] → [D]``.
        v: the right side.
        damping: δ > 0.
        largest: the largest eigenvalue λ₁, for the error's estimate.

    Raises:
        RuntimeError: if the iterations do not converge, or if rounding may leave fewer than three digits.
    """
    # ‖(Vᵀ V + δ I)⁻¹ r‖ ≤ ‖r‖ / δ
    x, Vx = _conjugate_gradients(up, down, v, damping, lambda x, _: damping * x)
    # V + E with ‖E‖ ≈ ulp √λ₁ moves x by (Vᵀ V + δ I)⁻¹ (Vᵀ E x + Eᵀ V x); a rounded v in the range of Vᵀ by no more
    _refuse(v.dtype, largest**0.5 * (damping**-0.5 / 2 + _ratio(Vx, x) / damping), damping, largest)
    return x.to(v.dtype)


def damped_range_inverse(up: Product, down: Product, w: Tensor, damping: float, largest: float) -> Tensor:
    """(Vᵀ V + δ I)⁻¹ Vᵀ w = Vᵀ (V Vᵀ + δ I)⁻¹ w, ``[K] → [D]``; otherwise as `damped_inverse`."""
    # ‖Vᵀ (V Vᵀ + δ I)⁻¹ r‖ ≤ ‖r‖ / 2√δ
    y, x = _conjugate_gradients(down, up, w, damping, lambda _, x: 2 * damping**0.5 * x)
    _refuse(w.dtype, largest**0.5 * _ratio(y, x), damping, largest)  # x = Vᵀ y
    return x.to(w.dtype)


def _conjugate_gradients(
    first: Product, second: Product, b: Tensor, damping: float, enough: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """(A + δ I)⁻¹ b and ``first`` of it, A = second · first positive semi-definite, in float64 but for the products.

    Args:
        first: part of the product.
        second: its transpose.
        b: right side.
        damping: δ.
        enough: from the solution and its image to a vector as long as the error per `CG_TOLERANCE` that is allowed.
    """
    r = b.double()
    x, image, p, rho = torch.zeros_like(r), torch.zeros_like(first(b)).double(), r, r @ r
    for _ in range(1 + CG_STEPS * min(len(b), len(image))):
        if bool(rho.sqrt() <= CG_TOLERANCE[b.dtype] * enough(x, image).norm()):
            return x, image
        scale = p.norm()  # keeps the direction within the dtype's range
        half = first((p / scale).to(b.dtype))
        step = rho / (scale**2 * (half.double().square().sum() + damping))  # p · (A + δ I) p > 0, whatever the rounding
        x, image = x + step * p, image + step * scale * half
        r = r - step * (scale * second(half) + damping * p)
        p, rho = r + (r @ r / rho) * p, r @ r
    raise RuntimeError(f"conjugate gradients did not converge at damping={damping}; raise the damping.")


def _ratio(a: Tensor, b: Tensor) -> float:
    """‖a‖ / ‖b‖; 0 for zeros, which are exact."""
    return float(a.norm() / b.norm()) if bool(a.any()) and bool(b.any()) else 0.0


def _refuse(dtype: torch.dtype, condition: float, damping: float, largest: float) -> None:
    """Raise RuntimeError where an ulp times this condition number is too large an error."""
    error = ulp(dtype) * condition
    if not error <= WORST:
        raise RuntimeError(
            f"at damping={damping:g} (largest eigenvalue {largest:.1e}) the rounding of {dtype} products may be a "
            f"relative error of {error:.0e}. Raise the damping, compute in float64, or use "
            "LowRankGGN(matrix_free=False). For the gradient, newton_step(damping) has a smaller error than "
            "solve(gradient, damping)."
        )
