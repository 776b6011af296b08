"""Functions of G + δ I, accurate also where the damping δ is far below the largest eigenvalue λ₁.

All is computed in float64, whatever the dtype of V, from the eigendecomposition of the smaller of V Vᵀ (`Wide`) and
Vᵀ V (`Tall`), and then refined: residuals are formed with V itself, so that the relative error is about ulp √(λ₁/δ), as
for a least-squares problem, and not ulp λ₁/δ, as for a linear system with G.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import final

import torch
from torch import Tensor

from bncurv.lowrank.matrix import RowMatrix
from bncurv.precision import INSIDE, ROW_ROUNDING, WORST, ulp

Map = Callable[[Tensor], Tensor]
STEPS = 3  # of refinement; one does unless δ is below 1e-7 λ₁
NEARLY = 1e-3  # part outside the range from which on a vector may lie inside, after refinement


class Damped(ABC):
    """The eigendecomposition behind (G + δ I)⁻¹, its square root and its determinant.

    Args:
        values: eigenvalues of the smaller of V Vᵀ and Vᵀ V, descending, float64.
        vectors: its eigenvectors as columns.
        V: for residuals; the rounding of its dtype is no information.
    """

    def __init__(self, values: Tensor, vectors: Tensor, V: RowMatrix) -> None:
        self.values, self.vectors = values.clamp(min=0), vectors
        self._up, self._down, self._ulp = V.up, V.down, ulp(V.dtype)
        largest = self.values[:1].sum()
        resolved = len(values) ** 0.5 * ulp(values.dtype) * largest
        rounding = (ROW_ROUNDING * self._ulp) ** 2 * largest
        self._clear = int((self.values > torch.maximum(resolved, rounding)).sum())  # told apart from zero
        self._real = int((self.values > rounding - resolved).sum())  # the others are the rounding of V's rows

    def _inverse(self, u: Tensor, damping: float, count: int | None = None) -> Tensor:
        """(small + δ I)⁻¹ u in the span of the ``count`` leading eigenvectors (default: all)."""
        vectors, values = self.vectors[:, :count], self.values[:count, None]
        return vectors @ ((vectors.T @ u) / (values + damping))

    # ---------------------------------------------------------------- what depends on the side
    @abstractmethod
    def _roughly(self, v: Tensor, damping: float) -> Tensor:
        """(G + δ I)⁻¹ v, to be refined."""

    @abstractmethod
    def _next_to(self, v: Tensor) -> Tensor:
        """Least squares: the smallest w ``[K, m]`` with Vᵀ w next to v, to be refined."""

    @abstractmethod
    def from_weights(self, w: Tensor, damping: float) -> Tensor:
        """(G + δ I)⁻¹ Vᵀ w, ``[K, m] → [D, m]``."""

    @abstractmethod
    def along(self, w: Tensor, keep: Tensor, damping: Tensor) -> Tensor:
        """Σ_d e_d (e_d · Vᵀ w) / (λ_d + δ_d) over the eigenvectors ``keep``, ``[K] → [D]``."""

    @abstractmethod
    def root(self, z: Tensor, damping: float) -> Tensor:
        """(G + δ I)^(-1/2) z."""

    def logdet(self, damping: float, dim: int) -> Tensor:
        """Log det (G + δ I) over ``dim`` dimensions, those that the decomposition lacks with eigenvalue 0."""
        return (self.values + damping).log().sum() + (dim - len(self.values)) * math.log(damping)

    # ---------------------------------------------------------------- the inverse
    def solve(self, v: Tensor, damping: float) -> Tensor:
        """(G + δ I)⁻¹ v, ``[D, m] → [D, m]``; a v in the range of Vᵀ up to its own rounding is taken to be there."""
        w = self._next_to(v)
        rest, size = v - self._down(w), v.norm(dim=0)
        if bool((rest.norm(dim=0) <= NEARLY * size).any()):
            w = w + self._next_to(rest)
            rest = v - self._down(w)
        inside = rest.norm(dim=0) <= INSIDE * self._ulp * size
        x = torch.zeros_like(v)
        if bool(inside.any()):
            x[:, inside] = self.from_weights(w[:, inside], damping)
        if not bool(inside.all()):
            x[:, ~inside] = self._general(v[:, ~inside], damping)
        return x

    def _general(self, v: Tensor, damping: float) -> Tensor:
        """(G + δ I)⁻¹ v for any v."""
        return self._refined(
            lambda r: self._roughly(r, damping), v, lambda x: v - self._down(self._up(x)) - damping * x
        )

    def _refined(self, roughly: Map, b: Tensor, residual: Map) -> Tensor:
        """Solution by an approximate inverse and residuals, as far as V's dtype goes.

        Raises:
            RuntimeError: where the last correction is not small.
        """
        x, error = roughly(b), 1.0
        for _ in range(STEPS):
            correction = roughly(residual(x))
            x = x + correction
            error = _largest(correction.norm(dim=0) / x.norm(dim=0))
            if error**2 <= self._ulp:  # what is left is smaller by the same factor
                break
        self._refuse(error)
        return x

    def _refuse(self, error: float) -> None:
        if not error <= WORST:
            raise RuntimeError(
                f"the damping is too small for float64: the result would have a relative error of about {error:.0e}. "
                f"Raise it (the largest eigenvalue is {float(self.values[0]):.1e})."
            )


@final
class Wide(Damped):
    """From V Vᵀ [K, K], K ≤ D."""

    def _roughly(self, v: Tensor, damping: float) -> Tensor:
        # (v - Vᵀ (V Vᵀ + δ I)⁻¹ V v) / δ   (push-through identity)
        return (v - self._down(self._inverse(self._up(v), damping))) / damping

    def _next_to(self, v: Tensor) -> Tensor:
        return self._inverse(self._up(v), 0.0, self._clear)

    def from_weights(self, w: Tensor, damping: float) -> Tensor:
        """Vᵀ (V Vᵀ + δ I)⁻¹ w."""
        y = self._refined(
            lambda r: self._inverse(r, damping, self._real),
            w,
            lambda y: w - self._up(self._down(y)) - damping * y,
        )
        x = self._down(y)
        # where rows combine to zero, their parts of y are w / δ and cancel here
        size = ulp(y.dtype) * self.values[:1].sum().sqrt() * y.norm(dim=0)
        self._refuse(_largest(size / x.norm(dim=0)))
        return x

    def along(self, w: Tensor, keep: Tensor, damping: Tensor) -> Tensor:
        """Σ_d Vᵀ u_d (u_d · w) / (λ_d + δ_d)."""
        u = self.vectors[:, keep]
        return self._down(u @ ((u.T @ w) / (self.values[keep] + damping)))

    def root(self, z: Tensor, damping: float) -> Tensor:
        """δ^(-1/2) (z - Vᵀ φ(V Vᵀ) V z),  φ(λ) = (1 - √(δ/(λ + δ))) / λ without its cancellation."""
        shifted = self.values + damping
        phi = 1 / (shifted * (1 + (damping / shifted).sqrt()))
        u = self.vectors @ (phi[:, None] * (self.vectors.T @ self._up(z)))
        return (z - self._down(u)) * damping**-0.5


@final
class Tall(Damped):
    """From G = Vᵀ V itself, D < K."""

    def _roughly(self, v: Tensor, damping: float) -> Tensor:
        return self._inverse(v, damping)

    def _next_to(self, v: Tensor) -> Tensor:
        return self._up(self._inverse(v, 0.0, self._clear))

    def from_weights(self, w: Tensor, damping: float) -> Tensor:
        """Least squares with a ridge: min ‖V x - w‖² + δ ‖x‖²."""
        return self._refined(
            lambda r: self._inverse(r, damping, self._real),
            self._down(w),
            lambda x: self._down(w - self._up(x)) - damping * x,
        )

    def along(self, w: Tensor, keep: Tensor, damping: Tensor) -> Tensor:
        """Σ_d e_d (e_d · Vᵀ w) / (λ_d + δ_d)."""
        e = self.vectors[:, keep]
        return e @ ((e.T @ self._down(w)) / (self.values[keep] + damping))

    def root(self, z: Tensor, damping: float) -> Tensor:
        """E (Λ + δ I)^(-1/2) Eᵀ z."""
        return self.vectors @ ((self.vectors.T @ z) * (self.values + damping).rsqrt()[:, None])


def _largest(ratios: Tensor) -> float:
    """0 / 0 counts as zero: nothing to correct."""
    return float(ratios.nan_to_num(0.0).amax())
