"""The GGN as a low-rank matrix, G = Vᵀ V with one row V[k] per component: spectrum, eigenvectors, products, solves.

The non-zero spectrum of G [D, D] is that of the Gram matrix V Vᵀ [K, K] (Dangel, Tatzel & Hennig 2022, TMLR, "ViViT");
the smaller of the two is decomposed. With cross-entropy its rank is at most N (C - 1), with squared error N C.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from bncurv.engine import Rows
from bncurv.quantities import Quantity

Vector = Tensor | Mapping[str, Tensor]
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

    def __init__(self, rows: dict[str, Tensor], gradients: dict[str, Tensor], top: int | None = None) -> None:
        self._rows, self._gradients, self._top = rows, gradients, top
        self.names = list(rows)
        self.shapes = {name: r.shape[1:] for name, r in rows.items()}
        first = next(iter(rows.values()))
        self.components, self.dtype, self.device = len(first), first.dtype, first.device
        self.samples = len(next(iter(gradients.values())))
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
            return sum(_flat(r) @ _flat(r).T for r in self._rows.values())
        V = torch.cat([_flat(r) for r in self._rows.values()], 1)
        return V.T @ V

    @cached_property
    def _values(self) -> Tensor:
        return self._decomposition[0] if self._top else torch.linalg.eigvalsh(self._small).flip(0)

    @cached_property
    def _decomposition(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues, descending, and eigenvectors (columns) of `_small`."""
        size = min(self.components, self.dim)
        if self._top and self._top < size // 3:
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
        start = np.random.default_rng(0).standard_normal(size).astype(kind)
        values, vectors = eigsh(operator, k=count, which="LA", v0=start)
        return torch.from_numpy(values).to(self.device), torch.from_numpy(vectors).to(self.device)

    @property
    def cutoff(self) -> float:
        """Eigenvalues below are rounding: max(K, D) · ulp · largest eigenvalue."""
        return max(self.components, self.dim) * torch.finfo(self.dtype).eps * float(self._values[0].clamp(min=0))

    @property
    def rank(self) -> int:
        """Numerical rank: the number of eigenvalues above `cutoff` (with ``top``: at most ``top``)."""
        return int((self._values > self.cutoff).sum())

    @property
    def eigenvalues(self) -> Tensor:
        """All eigenvalues above `cutoff`, descending, ``[rank]``."""
        return self._values[: self.rank]

    def _unit_vectors(self, k: int | None) -> Tensor:
        """Leading eigenvectors as columns ``[D, k]``."""
        rank = self.rank
        k = rank if k is None else k
        if not 0 < k <= rank:
            raise ValueError(
                f"{k} eigenvectors asked for, but the GGN has {rank} eigenvalues above the cut-off {self.cutoff:.2e} "
                f"(max(K, D) x ulp x largest){'' if self._top is None else f' and top={self._top}'}; directions below "
                f"are rounding noise. Ask for at most {rank}."
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
        return self.unflatten(self._unit_vectors(k).T)

    def residuals(self, k: int | None = None) -> Tensor:
        """‖G e - λ e‖ of the leading eigenpairs, ``[k]``."""
        e = self._unit_vectors(k)
        return torch.linalg.vector_norm(self._down(self._up(e)) - e * self._values[: e.shape[1]], dim=0)

    # ---------------------------------------------------------------- matrix functions
    def __matmul__(self, v: Vector) -> Any:
        """G v, for a vector or ``[D, m]``."""
        return self._apply(lambda x: self._down(self._up(x)), v)

    def to_scipy(self) -> LinearOperator:
        """The same as a ``scipy.sparse.linalg.LinearOperator`` on flat vectors."""
        kind = np.float64 if self.dtype == torch.float64 else np.float32

        def product(x: np.ndarray) -> np.ndarray:
            return (self @ torch.from_numpy(x.astype(kind)).to(self.device)).cpu().numpy()

        return LinearOperator((self.dim, self.dim), matvec=product, matmat=product, rmatvec=product, dtype=kind)

    @property
    def trace(self) -> Tensor:
        """Sum of all eigenvalues, from the rows themselves."""
        return sum(torch.linalg.vector_norm(r).square() for r in self._rows.values())

    @property
    def frobenius_norm(self) -> Tensor:
        """Square root of the sum of squared eigenvalues."""
        return torch.linalg.matrix_norm(self._small)

    def logdet(self, damping: float) -> Tensor:
        """log det (G + δ I) over all D dimensions."""
        _positive(damping)
        small = self._small
        cholesky = torch.linalg.cholesky(small + damping * torch.eye(len(small), dtype=self.dtype, device=self.device))
        return 2 * cholesky.diagonal().log().sum() + (self.dim - len(small)) * float(np.log(damping))

    def solve(self, v: Vector, damping: float) -> Any:
        """(G + δ I)⁻¹ v = (v - Vᵀ (δ I + V Vᵀ)⁻¹ V v) / δ (push-through identity)."""
        _positive(damping)
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
        _positive(damping)
        z = torch.randn(self.dim, count, generator=generator, dtype=self.dtype, device=self.device)
        e = self._unit_vectors(None)
        # (G + δ)^(-1/2) = δ^(-1/2) I + e ((λ + δ)^(-1/2) - δ^(-1/2)) eᵀ
        shrink = (self.eigenvalues + damping).rsqrt() - damping**-0.5
        return self.unflatten((damping**-0.5 * z + e @ (shrink[:, None] * (e.T @ z))).T)

    # ---------------------------------------------------------------- directional derivatives
    @property
    def gradient(self) -> Tensor:
        """Gradient of the loss, flat ``[D]``: the sum of the per-component gradients."""
        return torch.cat([g.sum(0).reshape(-1) for g in self._gradients.values()])

    def slopes(self, k: int | None = None) -> Tensor:
        """γ[n, d] = g_n · e_d, ``[N, k]``: first derivatives of the components along the eigenvectors.

        They sum over n to the slope of the loss along e_d (ViViT's γ, whose samples average instead).
        """
        parts = self._unit_vectors(k).split([shape.numel() for shape in self.shapes.values()])
        return sum(_flat(g) @ e for g, e in zip(self._gradients.values(), parts, strict=True))

    def curvatures(self, k: int | None = None) -> Tensor:
        """λ[n, d] = e_d · G_n e_d = Σ_c (V[(n, c)] · e_d)², ``[N, k]``; they sum over n to the eigenvalues."""
        return self._up(self._unit_vectors(k)).square().unflatten(0, (self.samples, -1)).sum(1)

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
        e, values = self._unit_vectors(None), self.eigenvalues
        if callable(directions):
            ascending = list(directions(values.flip(0)))
            keep = torch.tensor([len(values) - 1 - i for i in ascending], dtype=torch.long, device=self.device)
        else:
            keep = torch.arange(self.rank if directions is None else directions, device=self.device)
        e, values = e[:, keep], values[keep]
        delta = torch.as_tensor(damping(values) if callable(damping) else damping, dtype=self.dtype, device=self.device)
        return self.unflatten(-(e @ ((e.T @ self.gradient) / (values + delta))))


def _flat(rows: Tensor) -> Tensor:
    """``[K, *p] → [K, p]``; p may be a scalar."""
    return rows.reshape(len(rows), -1)


def _positive(damping: float) -> None:
    if not damping > 0:
        raise ValueError(f"damping={damping}; expected a positive number, since G itself is singular.")


class LowRankGGN(Quantity):
    """The GGN as a `LowRank` object: ``quantity.result`` after ``backward()``, ``Results.ggn`` of `curvature`.

    Over several mini-batches it is the mean of their GGNs (each has its own batch statistics, so the composition of the
    batches is part of the definition).

    Args:
        top: only so many leading eigenpairs (by Lanczos iterations on V); default: the whole spectrum.
        groups: ``None``: one GGN of all parameters. ``"layer"``: one per module. A mapping: one per named group of
            parameter names. With groups the result is a dict ``{group: LowRank}``, all from one pass.
        memory: most bytes for V (N·C·D numbers).
    """

    field = "ggn"
    pulls = ("factor", "gradient")

    def __init__(
        self,
        top: int | None = None,
        groups: str | Mapping[str, Iterable[str]] | None = None,
        memory: float = 4 * 2**30,
    ) -> None:
        super().__init__()
        if top is not None and (not isinstance(top, int) or top < 1):
            raise ValueError(f"top={top!r}; expected a positive integer or None.")
        if not (groups is None or groups == "layer" or isinstance(groups, Mapping)):
            raise ValueError(f"groups={groups!r}; expected None, 'layer', or a mapping from group to parameter names.")
        self.top, self.groups, self.memory = top, groups, memory
        self._result: Any = None

    @property
    def result(self) -> Any:
        """The `LowRank` (or dict of them) of the last backward pass inside ``with backpack(...)``."""
        if self._result is None:
            raise RuntimeError(
                "LowRankGGN has no result yet: run loss.backward() of an extended model and loss inside "
                "'with backpack(ggn)', or use Results.ggn of bncurv.curvature."
            )
        return self._result

    def start(self, parameters: Mapping[str, Tensor], samples: int, columns: dict[str, int]) -> Any:
        """Empty V ``[N, C, *p]`` and gradients ``[N, *p]``."""
        width = columns["factor"]
        need = sum(p.numel() * p.element_size() for p in parameters.values()) * samples * (width + 1)
        if need > self.memory:
            raise ValueError(
                f"LowRankGGN needs {need / 2**30:.1f} GiB for V (N={samples}, {width} columns per sample, "
                f"{sum(p.numel() for p in parameters.values())} parameters), more than memory={self.memory / 2**30:.1f} "
                "GiB. Use fewer samples or parameters (params=...), or raise memory=."
            )
        make = {"factor": (samples, width), "gradient": (samples, 1)}
        return {
            key: {n: torch.zeros((*lead, *p.shape), dtype=p.dtype, device=p.device) for n, p in parameters.items()}
            for key, lead in make.items()
        }

    def add(self, state: Any, key: str, rows: Rows) -> None:
        """V[k] and g_n."""
        state[key][rows.name][rows.n, rows.c] = rows.values

    def finish(self, state: Any) -> dict[str, Any]:
        """Raw rows; `assemble` makes the result once the mini-batches are merged."""
        rows = {name: v.flatten(0, 1) for name, v in state["factor"].items()}
        return {self.field: (rows, {name: g[:, 0] for name, g in state["gradient"].items()})}

    def merge(self, batches: list[dict[str, Any]]) -> dict[str, Any]:
        """Mean of GGNs: rows of V concatenated and divided by √B, gradients by B."""
        count, pairs = len(batches), [b[self.field] for b in batches]
        if count == 1:
            return {self.field: self._assemble(*pairs[0])}
        names = list(pairs[0][0])
        rows = {n: torch.cat([r[n] for r, _ in pairs]) * count**-0.5 for n in names}
        return {self.field: self._assemble(rows, {n: torch.cat([g[n] for _, g in pairs]) / count for n in names})}

    def _assemble(self, rows: dict[str, Tensor], gradients: dict[str, Tensor]) -> Any:
        if self.groups is None:
            return LowRank(rows, gradients, self.top)
        groups: dict[str, list[str]] = {}
        if isinstance(self.groups, Mapping):
            groups = {group: list(names) for group, names in self.groups.items()}
        else:
            for name in rows:
                groups.setdefault(name.rpartition(".")[0], []).append(name)
        for group, names in groups.items():
            unknown = [n for n in names if n not in rows]
            if unknown or not names:
                raise ValueError(f"group '{group}' names {unknown or 'nothing'}; the parameters are {list(rows)}.")
        return {
            group: LowRank({n: rows[n] for n in names}, {n: gradients[n] for n in names}, self.top)
            for group, names in groups.items()
        }

    def deliver(self, fields: dict[str, Any], parameters: Mapping[str, Tensor]) -> None:
        """Keep the result on this object."""
        self._result = self.merge([fields])[self.field]

    def withdraw(self, parameters: Mapping[str, Tensor]) -> None:
        """Forget it."""
        self._result = None
