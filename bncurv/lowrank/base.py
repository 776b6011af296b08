"""What the GGN of one group of parameters gives, whether V is held or not."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from bncurv.lowrank.lanczos import as_scipy, quadrature
from bncurv.precision import ulp

Vector = Tensor | Mapping[str, Tensor]
Damping = float | Tensor | Callable[[Tensor], Tensor]


class GGN(ABC):
    """G = Vᵀ V of one group of parameters; the scale is that of the loss (a mean's 1/N is inside).

    Vectors in parameter space are dicts by name ``{name: [*p]}``, or flat ``[D]`` (``[D, m]`` for several) in the
    order of ``names``; what comes back has the form of what went in.

    Attributes:
        names: the parameters, in the order of flat vectors.
        shapes: their shapes by name.
        components: K, the number of rows of V.
        dim: D.
        dtype: of vectors and results.
        device: of vectors and results.
        top: number of eigenpairs computed; ``None``: all.
    """

    def __init__(self, shapes: Mapping[str, torch.Size], components: int, like: Tensor, top: int | None) -> None:
        self.names, self.shapes = list(shapes), dict(shapes)
        self.components, self.dtype, self.device, self.top = components, like.dtype, like.device, top
        self.dim = sum(shape.numel() for shape in shapes.values())

    def __repr__(self) -> str:
        kind = type(self).__name__
        return f"{kind}(D={self.dim}, K={self.components}, parameters={len(self.names)}, top={self.top})"

    # ---------------------------------------------------------------- what the two forms provide
    @property
    @abstractmethod
    def _values(self) -> Tensor:
        """Eigenvalues, descending, rounding included."""

    @abstractmethod
    def _vectors(self, k: int) -> Tensor:
        """Leading ``k`` eigenvectors as columns."""

    @abstractmethod
    def _product(self, v: Tensor) -> Tensor:
        """G v for ``[D]`` or ``[D, m]``."""

    @property
    @abstractmethod
    def gradient(self) -> Tensor:
        """Gradient of the loss, flat ``[D]``: the sum of the per-component gradients."""

    @abstractmethod
    def slopes(self, k: int | None = None) -> Tensor:
        """γ[n, d] = g_n · e_d, ``[N, k]``: first derivatives of the components along the eigenvectors.

        They sum over n to the slope of the loss along e_d (ViViT's γ, whose samples average instead).
        """

    @abstractmethod
    def curvatures(self, k: int | None = None) -> Tensor:
        """λ[n, d] = e_d · G_n e_d = Σ_c (V[(n, c)] · e_d)², ``[N, k]``; they sum over n to the eigenvalues."""

    @abstractmethod
    def _inverse(self, v: Tensor, damping: float) -> Tensor:
        """(G + δ I)⁻¹ v for ``[D]`` or ``[D, m]``."""

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

    # ---------------------------------------------------------------- spectrum
    @property
    def cutoff(self) -> float:
        """Eigenvalues below are rounding: √max(K, D) · ulp · largest eigenvalue (errors add up randomly)."""
        size = max(self.components, self.dim)
        return size**0.5 * ulp(self.dtype) * float(self._values[0].clamp(min=0))

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
                f"(sqrt(max(K, D)) x ulp x largest){'' if self.top is None else f' and top={self.top}'}; directions "
                f"below are rounding noise. Ask for at most {rank}."
            )
        return self._vectors(k)

    def eigenvectors(self, k: int | None = None) -> dict[str, Tensor]:
        """Orthonormal eigenvectors of the ``k`` largest eigenvalues (default: all), ``{name: [k, *p]}``.

        Raises:
            ValueError: for more than `rank`: those would be noise.
        """
        return self.unflatten(self.unit_vectors(k).T)

    def residuals(self, k: int | None = None) -> Tensor:
        """‖G e - λ e‖ of the leading eigenpairs, ``[k]``."""
        e = self.unit_vectors(k)
        return torch.linalg.vector_norm(self._product(e) - e * self._values[: e.shape[1]], dim=0)

    def density(
        self, steps: int = 60, probes: int = 10, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Spectral density of G by stochastic Lanczos quadrature (Golub & Meurant; Ghorbani et al. 2019).

        Args:
            steps: Lanczos steps per probe, with full reorthogonalisation.
            probes: random vectors averaged over.
            generator: source of randomness, on the CPU.

        Returns:
            Nodes and weights, at most ``[probes * steps]``: the density is Σ_i weight_i δ(λ - node_i), the weights sum
            to one, and D Σ_i weight_i f(node_i) estimates tr f(G) without bias in the limit of many steps.
        """
        starts = [
            torch.randn(self.dim, generator=generator, device="cpu").to(self.device, self.dtype) for _ in range(probes)
        ]
        nodes, weights = zip(*(quadrature(self._product, v, steps) for v in starts), strict=True)
        return torch.cat(nodes), torch.cat(weights) / probes

    # ---------------------------------------------------------------- products and solves
    def __matmul__(self, v: Vector) -> Any:
        """G v, for a vector or ``[D, m]``."""
        return self._apply(self._product, v)

    def to_scipy(self) -> LinearOperator:
        """The same as a ``scipy.sparse.linalg.LinearOperator`` on flat vectors."""
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        return as_scipy(self._product, self.dim, like)

    def solve(self, v: Vector, damping: float) -> Any:
        """(G + δ I)⁻¹ v."""
        positive(damping)
        return self._apply(lambda x: self._inverse(x, damping), v)

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


def positive(damping: float) -> None:
    """Raise ValueError unless the damping is positive."""
    if not damping > 0:
        raise ValueError(f"damping={damping}; expected a positive number, since G itself is singular.")
