"""The GGN as a low-rank matrix, G = Vᵀ V with one row V[k] per component: spectrum, eigenvectors, products, solves.

The non-zero spectrum of G [D, D] is that of the Gram matrix V Vᵀ [K, K] (Dangel, Tatzel & Hennig 2022, TMLR, "ViViT");
the smaller of the two is decomposed. With cross-entropy its rank is at most N (C - 1), with squared error N C.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from threadpoolctl import ThreadpoolController
from torch import Tensor

from bncurv.budget import chunks

Vector = Tensor | Mapping[str, Tensor]
LANCZOS_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}  # ‖G e - λ e‖ / λ; the eigenvalue's error is its square
DIRECT_SIZE = 1000  # smaller Gram matrices are decomposed directly, whatever ``top`` is
Damping = float | Tensor | Callable[[Tensor], Tensor]


class LowRank:
    """G = Vᵀ V of one group of parameters; the scale is that of the loss (a mean's 1/N is inside).

    Vectors in parameter space are dicts by name ``{name: [*p]}``, or flat ``[D]`` (``[D, m]`` for several) in the
    order of ``names``; what comes back has the form of what went in.

    Args:
        rows: V by parameter name, ``[K, *p]`` each; k = (n, c), n slowest.
        gradients: per-component gradients g_n by name, ``[N, *p]``.
        top: compute only so many eigenpairs (Lanczos on the rows); ``None``: all.
    """

    def __init__(self, rows: dict[str, Tensor], gradients: Mapping[str, Tensor], top: int | None = None) -> None:
        self._rows, self._gradients, self._top = rows, gradients, top
        self.names = list(rows)
        self.shapes = {name: r.shape[1:] for name, r in rows.items()}
        first = next(iter(rows.values()))
        self.components, self.dtype, self.device = len(first), first.dtype, first.device
        self.dim = sum(shape.numel() for shape in self.shapes.values())

    def __repr__(self) -> str:
        return f"LowRank(D={self.dim}, K={self.components}, parameters={len(self.names)}, top={self._top})"

    # ---------------------------------------------------------------- vectors
    def flatten(self, v: Vector) -> Tensor:
        """``{name: [*p]}`` (or already flat) → ``[D]`` or ``[D, m]``."""
        if isinstance(v, Mapping):
            missing = set(self.names) ^ set(v)
            if missing:
                raise ValueError(f"vector has names {sorted(v)}; expected exactly {self.names}.")
            return torch.cat([v[name].reshape(-1) for name in self.names])
        if v.shape[0] != self.dim:
            raise ValueError(f"vector has shape {tuple(v.shape)}; expected [{self.dim}] or [{self.dim}, m], or a dict.")
        return v

    def unflatten(self, v: Tensor) -> dict[str, Tensor]:
        """``[*lead, D]`` → ``{name: [*lead, *p]}``."""
        parts = v.split([shape.numel() for shape in self.shapes.values()], -1)
        return {n: part.reshape(*v.shape[:-1], *self.shapes[n]) for n, part in zip(self.names, parts, strict=True)}

    def _apply(self, f: Callable[[Tensor], Tensor], v: Vector) -> Any:
        flat = f(self.flatten(v))
        return self.unflatten(flat) if isinstance(v, Mapping) else flat

    def _up(self, v: Tensor) -> Tensor:
        """V v: ``[D, ...] → [K, ...]``."""
        parts = v.split([shape.numel() for shape in self.shapes.values()])
        return sum(_flat(r) @ part for r, part in zip(self._rows.values(), parts, strict=True))

    def _down(self, u: Tensor) -> Tensor:
        """Vᵀ u: ``[K, ...] → [D, ...]``."""
        return torch.cat([_flat(r).T @ u for r in self._rows.values()])

    # ---------------------------------------------------------------- spectrum
    @cached_property
    def _small(self) -> Tensor:
        """The smaller of V Vᵀ and Vᵀ V."""
        if self.components <= self.dim:
            return gram([_flat(r) for r in self._rows.values()])
        return gram([torch.cat([_flat(r) for r in self._rows.values()], 1).T])

    @cached_property
    def _values(self) -> Tensor:
        return self._decomposition[0] if self._top else torch.linalg.eigvalsh(self._small).flip(0)

    @cached_property
    def _decomposition(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues, descending, and eigenvectors (columns) of `_small`."""
        size = min(self.components, self.dim)
        if self._top and self._top < size // 3 and size > DIRECT_SIZE:
            values, vectors = self._lanczos(self._top)
        else:
            values, vectors = torch.linalg.eigh(self._small)
        values, vectors = values.flip(0), vectors.flip(1)
        return values[: self._top], vectors[:, : self._top]

    def _lanczos(self, count: int) -> tuple[Tensor, Tensor]:
        """Largest eigenpairs of V Vᵀ (or Vᵀ V), matrix-free: scipy's implicitly restarted Lanczos."""
        gram = self.components <= self.dim
        size = min(self.components, self.dim)
        there, back = (self._down, self._up) if gram else (self._up, self._down)
        kind = np.float64 if self.dtype == torch.float64 else np.float32

        def product(u: np.ndarray) -> np.ndarray:
            return back(there(torch.from_numpy(u.astype(kind)).to(self.device))).cpu().numpy()

        operator = LinearOperator((size, size), matvec=product, matmat=product, dtype=kind)
        values, vectors = leading(operator, count, self.dtype)
        return torch.from_numpy(values).to(self.device), torch.from_numpy(vectors).to(self.device)

    @property
    def cutoff(self) -> float:
        """Eigenvalues below are rounding: √max(K, D) · ulp · largest eigenvalue (errors add up randomly)."""
        size = max(self.components, self.dim)
        return size**0.5 * torch.finfo(self.dtype).eps * float(self._values[0].clamp(min=0))

    @property
    def rank(self) -> int:
        """Numerical rank: the number of eigenvalues above `cutoff` (with ``top``: at most ``top``)."""
        return int((self._values > self.cutoff).sum())

    @property
    def eigenvalues(self) -> Tensor:
        """All eigenvalues above `cutoff`, descending, ``[rank]``."""
        return self._values[: self.rank]

    def unit_vectors(self, k: int | None = None) -> Tensor:
        """Leading eigenvectors as columns ``[D, k]``, flat; see `eigenvectors`."""
        rank = self.rank
        k = rank if k is None else k
        if not 0 < k <= rank:
            raise ValueError(
                f"{k} eigenvectors asked for, but the GGN has {rank} eigenvalues above the cut-off {self.cutoff:.2e} "
                f"(sqrt(max(K, D)) x ulp x largest){'' if self._top is None else f' and top={self._top}'}; directions "
                f"below are rounding noise. Ask for at most {rank}."
            )
        values, vectors = self._decomposition
        if self.components > self.dim:
            return vectors[:, :k]
        # G (Vᵀ u) = λ (Vᵀ u),  ‖Vᵀ u‖² = λ
        return self._down(vectors[:, :k]) / values[:k].sqrt()

    def eigenvectors(self, k: int | None = None) -> dict[str, Tensor]:
        """Orthonormal eigenvectors of the ``k`` largest eigenvalues (default: all), ``{name: [k, *p]}``.

        Raises:
            ValueError: for more than `rank`: those would be noise.
        """
        return self.unflatten(self.unit_vectors(k).T)

    def residuals(self, k: int | None = None) -> Tensor:
        """‖G e - λ e‖ of the leading eigenpairs, ``[k]``."""
        e = self.unit_vectors(k)
        return torch.linalg.vector_norm(self._down(self._up(e)) - e * self._values[: e.shape[1]], dim=0)

    # ---------------------------------------------------------------- matrix functions
    def _product(self, v: Tensor) -> Tensor:
        return self._down(self._up(v))

    def __matmul__(self, v: Vector) -> Any:
        """G v, for a vector or ``[D, m]``."""
        return self._apply(self._product, v)

    def to_scipy(self) -> LinearOperator:
        """The same as a ``scipy.sparse.linalg.LinearOperator`` on flat vectors."""
        kind = np.float64 if self.dtype == torch.float64 else np.float32

        def product(x: np.ndarray) -> np.ndarray:
            return (self @ torch.from_numpy(x.astype(kind)).to(self.device)).cpu().numpy()

        return LinearOperator((self.dim, self.dim), matvec=product, matmat=product, rmatvec=product, dtype=kind)

    def density(
        self, steps: int = 60, probes: int = 10, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Spectral density of G by stochastic Lanczos quadrature (Golub & Meurant; Ghorbani et al. 2019).

        Args:
            steps: Lanczos steps per probe, with full reorthogonalisation.
            probes: random vectors averaged over.
            generator: source of randomness, on the CPU.

        Returns:
            Nodes and weights ``[probes * steps]``: the density is Σ_i weight_i δ(λ - node_i), the weights sum to one,
            and D Σ_i weight_i f(node_i) estimates tr f(G) without bias in the limit of many steps.
        """
        nodes, weights = zip(*(self._quadrature(steps, generator) for _ in range(probes)), strict=True)
        return torch.cat(nodes), torch.cat(weights) / probes

    def _quadrature(self, steps: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        v = torch.randn(self.dim, generator=generator).to(self.device, self.dtype)
        basis, alphas, betas = [v / v.norm()], [], []
        for _ in range(min(steps, self.dim)):
            w = self._product(basis[-1])
            alphas.append(w @ basis[-1])
            Q = torch.stack(basis)
            w = w - Q.T @ (Q @ w)
            w = w - Q.T @ (Q @ w)
            beta = w.norm()
            if beta <= 1e3 * torch.finfo(self.dtype).eps * alphas[0].abs():
                break
            betas.append(beta)
            basis.append(w / beta)
        T = torch.diag(torch.stack(alphas))
        off = torch.stack(betas[: len(alphas) - 1]) if len(alphas) > 1 else alphas[0].new_zeros(0)
        values, vectors = torch.linalg.eigh(T + torch.diag(off, 1) + torch.diag(off, -1))
        return values, vectors[0] ** 2

    @property
    def trace(self) -> Tensor:
        """Sum of all eigenvalues, from the rows themselves."""
        return sum(torch.linalg.vector_norm(r).square() for r in self._rows.values())

    @property
    def frobenius_norm(self) -> Tensor:
        """Square root of the sum of squared eigenvalues."""
        return torch.linalg.matrix_norm(self._small)

    def logdet(self, damping: float) -> Tensor:
        """Log det (G + δ I) over all D dimensions."""
        positive(damping)
        small = self._small
        cholesky = torch.linalg.cholesky(small + damping * torch.eye(len(small), dtype=self.dtype, device=self.device))
        return 2 * cholesky.diagonal().log().sum() + (self.dim - len(small)) * float(np.log(damping))

    def solve(self, v: Vector, damping: float) -> Any:
        """(G + δ I)⁻¹ v = (v - Vᵀ (δ I + V Vᵀ)⁻¹ V v) / δ (push-through identity)."""
        positive(damping)
        small = self._small
        shifted = small + damping * torch.eye(len(small), dtype=self.dtype, device=self.device)

        def inverse(x: Tensor) -> Tensor:
            if self.components > self.dim:
                return torch.linalg.solve(shifted, x)
            return (x - self._down(torch.linalg.solve(shifted, self._up(x)))) / damping

        return self._apply(inverse, v)

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
        """γ[n, d] = g_n · e_d, ``[N, k]``: first derivatives of the components along the eigenvectors.

        They sum over n to the slope of the loss along e_d (ViViT's γ, whose samples average instead).
        """
        parts = self.unit_vectors(k).split([shape.numel() for shape in self.shapes.values()])
        return sum(_flat(self._gradients[n]) @ e for n, e in zip(self.names, parts, strict=True))

    def curvatures(self, k: int | None = None) -> Tensor:
        """λ[n, d] = e_d · G_n e_d = Σ_c (V[(n, c)] · e_d)², ``[N, k]``; they sum over n to the eigenvalues."""
        samples = len(self._gradients[self.names[0]])
        return self._up(self.unit_vectors(k)).square().unflatten(0, (samples, -1)).sum(1)

    def newton_step(
        self, damping: Damping, directions: int | Callable[[Tensor], Sequence[int]] | None = None
    ) -> dict[str, Tensor]:
        """Damped Newton step, ``{name: [*p]}``, to be added to the parameters.

        Args:
            damping: δ > 0 as a constant, a tensor with one value per direction, or a callable from the eigenvalues of
                the directions to such a tensor.
            directions: ``None``: the whole space, -(G + δ I)⁻¹ ∇L (constant damping only). An integer: the leading
                eigenvectors, -Σ_d γ_d / (λ_d + δ_d) e_d. A callable: ViViT's criterion, from all eigenvalues
                (ascending, as ViViT passes them) to the indices to keep.
        """
        if directions is None and isinstance(damping, float | int):
            return self.unflatten(-self.solve(self.gradient, float(damping)))
        e, values = self.unit_vectors(None), self.eigenvalues
        if callable(directions):
            ascending = list(directions(values.flip(0)))
            keep = torch.tensor([len(values) - 1 - i for i in ascending], dtype=torch.long, device=self.device)
        else:
            keep = torch.arange(self.rank if directions is None else directions, device=self.device)
        e, values = e[:, keep], values[keep]
        delta = torch.as_tensor(damping(values) if callable(damping) else damping, dtype=self.dtype, device=self.device)
        return self.unflatten(-(e @ ((e.T @ self.gradient) / (values + delta))))


def one_blas_thread() -> AbstractContextManager:
    """One thread for the OpenBLAS of scipy's wheel, which works on single vectors here.

    Its idle threads spin, on the cores that PyTorch's need: products take up to four times as long.
    """
    return _scipy_blas().limit(limits=1)


@cache
def _scipy_blas() -> ThreadpoolController:
    """Found once: the search goes through all loaded libraries."""
    return ThreadpoolController().select(prefix="libscipy_openblas")


def leading(operator: LinearOperator, count: int, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Largest eigenpairs, ascending, by scipy's implicitly restarted Lanczos from a fixed start."""
    start = np.random.default_rng(0).standard_normal(operator.shape[0]).astype(operator.dtype)
    with one_blas_thread():
        return eigsh(operator, k=count, which="LA", v0=start, tol=LANCZOS_TOLERANCE[dtype])


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


def positive(damping: float) -> None:
    """Raise ValueError unless the damping is positive."""
    if not damping > 0:
        raise ValueError(f"damping={damping}; expected a positive number, since G itself is singular.")
