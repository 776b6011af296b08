"""The GGN from the rows of V.

The non-zero spectrum of G [D, D] is that of the Gram matrix V Vᵀ [K, K] (Dangel, Tatzel & Hennig 2022, TMLR, "ViViT");
the smaller of the two is decomposed. With cross-entropy its rank is at most N (C - 1), with squared error N C.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import final

import numpy as np
import torch
from torch import Tensor

from bncurv.budget import chunks
from bncurv.lowrank.base import GGN, positive
from bncurv.lowrank.lanczos import eigenpairs

DIRECT_SIZE = 1000  # smaller Gram matrices are decomposed directly, whatever ``top`` is


@final
class LowRank(GGN):
    """The GGN with V at hand: everything that `GGN` gives, and what needs the whole spectrum.

    Args:
        rows: V by parameter name, ``[K, *p]`` each; k = (n, c), n slowest.
        gradients: per-component gradients g_n by name, ``[N, *p]``.
        top: compute only so many eigenpairs (Lanczos on the rows); ``None``: all.
    """

    def __init__(self, rows: dict[str, Tensor], gradients: Mapping[str, Tensor], top: int | None = None) -> None:
        first = next(iter(rows.values()))
        super().__init__({name: r.shape[1:] for name, r in rows.items()}, len(first), first, top)
        self._rows, self._gradients = rows, gradients

    def _up(self, v: Tensor) -> Tensor:
        """V v: ``[D, ...] → [K, ...]``."""
        parts = v.split([shape.numel() for shape in self.shapes.values()])
        return sum(_flat(r) @ part for r, part in zip(self._rows.values(), parts, strict=True))

    def _down(self, u: Tensor) -> Tensor:
        """Vᵀ u: ``[K, ...] → [D, ...]``."""
        return torch.cat([_flat(r).T @ u for r in self._rows.values()])

    def _product(self, v: Tensor) -> Tensor:
        return self._down(self._up(v))

    # ---------------------------------------------------------------- spectrum
    @cached_property
    def _small(self) -> Tensor:
        """The smaller of V Vᵀ and Vᵀ V."""
        if self.components <= self.dim:
            return gram([_flat(r) for r in self._rows.values()])
        return gram([torch.cat([_flat(r) for r in self._rows.values()], 1).T])

    @cached_property
    def _values(self) -> Tensor:
        return self._decomposition[0] if self.top else torch.linalg.eigvalsh(self._small).flip(0)

    @cached_property
    def _decomposition(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues, descending, and eigenvectors (columns) of `_small`."""
        size = min(self.components, self.dim)
        if self.top and self.top < size // 3 and size > DIRECT_SIZE:
            wide = self.components <= self.dim
            there, back = (self._down, self._up) if wide else (self._up, self._down)
            return eigenpairs(lambda u: back(there(u)), size, self.top, next(iter(self._rows.values())))
        values, vectors = torch.linalg.eigh(self._small)
        return values.flip(0)[: self.top], vectors.flip(1)[:, : self.top]

    def _vectors(self, k: int) -> Tensor:
        values, vectors = self._decomposition
        if self.components > self.dim:
            return vectors[:, :k]
        # G (Vᵀ u) = λ (Vᵀ u),  ‖Vᵀ u‖² = λ
        return self._down(vectors[:, :k]) / values[:k].sqrt()

    @property
    def trace(self) -> Tensor:
        """Sum of all eigenvalues, from the rows themselves."""
        return sum(torch.linalg.vector_norm(r).square() for r in self._rows.values())

    @property
    def frobenius_norm(self) -> Tensor:
        """Square root of the sum of squared eigenvalues."""
        return torch.linalg.matrix_norm(self._small)

    # ---------------------------------------------------------------- matrix functions
    def logdet(self, damping: float) -> Tensor:
        """Log det (G + δ I) over all D dimensions."""
        positive(damping)
        cholesky = torch.linalg.cholesky(self._shifted(damping))
        return 2 * cholesky.diagonal().log().sum() + (self.dim - len(cholesky)) * float(np.log(damping))

    def _inverse(self, v: Tensor, damping: float) -> Tensor:
        shifted = self._shifted(damping)
        if self.components > self.dim:
            return torch.linalg.solve(shifted, v)
        # (G + δ I)⁻¹ v = (v - Vᵀ (δ I + V Vᵀ)⁻¹ V v) / δ (push-through identity)
        return (v - self._down(torch.linalg.solve(shifted, self._up(v)))) / damping

    def _shifted(self, damping: float) -> Tensor:
        """`_small` + δ I."""
        return self._small + damping * torch.eye(len(self._small), dtype=self.dtype, device=self.device)

    def sample(self, damping: float, count: int = 1, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Draws from N(0, (G + δ I)⁻¹), ``{name: [count, *p]}``.

        Args:
            damping: δ > 0, a prior's precision.
            count: number of draws.
            generator: source of randomness on the result's device.
        """
        positive(damping)
        z = torch.randn(self.dim, count, generator=generator, dtype=self.dtype, device=self.device)
        e = self.unit_vectors(None)
        # (G + δ)^(-1/2) = δ^(-1/2) I + e ((λ + δ)^(-1/2) - δ^(-1/2)) eᵀ
        shrink = (self.eigenvalues + damping).rsqrt() - damping**-0.5
        return self.unflatten((damping**-0.5 * z + e @ (shrink[:, None] * (e.T @ z))).T)

    # ---------------------------------------------------------------- directional derivatives
    @property
    def gradient(self) -> Tensor:
        """Gradient of the loss, flat ``[D]``: the sum of the per-component gradients."""
        return torch.cat([self._gradients[name].sum(0).reshape(-1) for name in self.names])

    def slopes(self, k: int | None = None) -> Tensor:
        """γ[n, d] = g_n · e_d, ``[N, k]``; see `GGN.slopes`."""
        parts = self.unit_vectors(k).split([shape.numel() for shape in self.shapes.values()])
        return sum(_flat(self._gradients[n]) @ e for n, e in zip(self.names, parts, strict=True))

    def curvatures(self, k: int | None = None) -> Tensor:
        """λ[n, d] = Σ_c (V[(n, c)] · e_d)², ``[N, k]``; see `GGN.curvatures`."""
        samples = len(self._gradients[self.names[0]])
        return self._up(self.unit_vectors(k)).square().unflatten(0, (samples, -1)).sum(1)


def gram(parts: Sequence[Tensor]) -> Tensor:
    """Σ_i X_i X_iᵀ of ``X_i [k, p_i]``: only blocks on and below the diagonal are computed, 5/8 of the products."""
    size = len(parts[0])
    lower = parts[0].new_zeros(size, size)
    for rows in parts:
        for b in chunks(size, max(1, -(-size // 4))):
            lower[b, : b.stop].addmm_(rows[b], rows[: b.stop].T)
    return lower.tril() + lower.tril(-1).T


def _flat(rows: Tensor) -> Tensor:
    """``[K, *p] → [K, p]``; p may be a scalar."""
    return rows.reshape(len(rows), -1)
