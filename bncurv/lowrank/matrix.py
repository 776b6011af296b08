"""The matrix V [K, D], kept by parameter, and its products."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import final

import torch
from torch import Tensor

from bncurv.budget import USUAL, chunks
from bncurv.precision import full_precision


@final
class RowMatrix:
    """V with one row per component; products in the dtype of the other factor, V's own or float64.

    Args:
        rows: V by parameter name, ``[K, *p]`` each.

    Attributes:
        shape: (K, D).
        dtype: of the rows.
        wide: whether K ≤ D.
    """

    def __init__(self, rows: Mapping[str, Tensor]) -> None:
        self._rows = [r.reshape(len(r), r.shape[1:].numel()) for r in rows.values()]
        self.shape = len(self._rows[0]), sum(r.shape[1] for r in self._rows)
        self.dtype, self.wide = self._rows[0].dtype, self.shape[0] <= self.shape[1]

    def by_name(self, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """The rows by parameter, ``[K, *p]`` each."""
        return {name: r.view(len(r), *p) for (name, p), r in zip(shapes.items(), self._rows, strict=True)}

    def _converted(self, length: int, width: int, dtype: torch.dtype) -> Iterator[slice]:
        """Slices of a length: all of it, or if V's dtype is converted what stays in cache at this width."""
        size = length if dtype == self.dtype else USUAL.row // (8 * max(1, width))
        return chunks(length, max(1, size))

    def up(self, v: Tensor) -> Tensor:
        """V v: ``[D, ...] → [K, ...]``."""
        found = v.new_zeros(self.shape[0], *v.shape[1:])
        with full_precision(v):
            for rows, part in zip(self._rows, v.split([r.shape[1] for r in self._rows]), strict=True):
                for k in self._converted(len(rows), rows.shape[1], v.dtype):
                    found[k] += rows[k].to(v.dtype) @ part
        return found

    def down(self, u: Tensor) -> Tensor:
        """Vᵀ u: ``[K, ...] → [D, ...]``."""
        found = u.new_zeros(self.shape[1], *u.shape[1:])
        with full_precision(u):
            start = 0
            for rows in self._rows:
                p = slice(start, start := start + rows.shape[1])
                for k in self._converted(len(rows), rows.shape[1], u.dtype):
                    found[p] += rows[k].to(u.dtype).T @ u[k]
        return found

    def gram(self, dtype: torch.dtype) -> Tensor:
        """The smaller of V Vᵀ and Vᵀ V."""
        count, dim = self.shape
        if self.wide:
            return gram(
                rows[:, p].to(dtype) for rows in self._rows for p in self._converted(rows.shape[1], count, dtype)
            )
        return gram(
            torch.cat([rows[k].to(dtype) for rows in self._rows], 1).T for k in self._converted(count, dim, dtype)
        )

    def trace(self) -> Tensor:
        """Of V Vᵀ, from the rows themselves."""
        return torch.stack([torch.linalg.vector_norm(r).square() for r in self._rows]).sum()


def gram(parts: Iterable[Tensor]) -> Tensor:
    """Σ_i X_i X_iᵀ of ``X_i [k, p_i]``: only blocks on and below the diagonal are computed, 5/8 of the products."""
    lower: Tensor | None = None
    for rows in parts:
        size = len(rows)
        lower = rows.new_zeros(size, size) if lower is None else lower
        with full_precision(rows):
            for b in chunks(size, max(1, -(-size // 4))):
                lower[b, : b.stop].addmm_(rows[b], rows[: b.stop].T)
    assert lower is not None
    return lower.tril() + lower.tril(-1).T


def orthonormal(e: Tensor) -> Tensor:
    """Gram-Schmidt of nearly orthonormal columns, from the first on."""
    if not e.shape[1]:
        return e
    with full_precision(e):
        inner = gram([e.T])
        if float((inner - torch.eye(len(inner), dtype=e.dtype, device=e.device)).abs().max()) < 0.1:
            return torch.linalg.solve_triangular(torch.linalg.cholesky(inner).T, e, upper=True, left=False)
        Q, R = torch.linalg.qr(e)
        return Q * torch.where(R.diagonal() < 0, -1, 1)
