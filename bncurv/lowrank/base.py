"""What the GGN of one group of parameters gives, whether V is held or not."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from bncurv.lowrank.lanczos import as_scipy, quadrature
from bncurv.lowrank.matrix import orthonormal
from bncurv.lowrank.steps import Damping, Directions, chosen, constant, per_direction, positive
from bncurv.lowrank.vectors import Space, Vector
from bncurv.precision import full_precision, ulp


class GGN(ABC):
    """G = Vᵀ V of one group of parameters; the scale is that of the loss (a mean's 1/N is inside).

    Vectors in parameter space are dicts by name, ``{name: [*p]}`` or ``{name: [m, *p]}`` for m at once, or lists of
    such tensors in the order of ``names``, or flat, ``[D]`` or ``[D, m]``, tensors or NumPy's arrays; what comes back
    has the form of what went in.

    Attributes:
        names: the parameters, in the order of flat vectors.
        shapes: their shapes by name.
        components: K, the number of rows of V.
        dim: D.
        dtype: of vectors and results.
        device: of vectors and results.
        top: number of eigenpairs computed; ``None``: all.

    Example:
        >>> import torch, bncurv
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
        >>> batch, loss_fn = (torch.randn(8, 4), torch.randint(2, (8,))), torch.nn.CrossEntropyLoss()
        >>> res = bncurv.curvature(model, loss_fn, batch, bncurv.LowRankGGN(), bncurv.ComponentGrad())
        >>> ggn = res.ggn
        >>> (ggn @ ggn.gradient).shape, (ggn @ res.grad_component)["0.weight"].shape
        (torch.Size([29]), torch.Size([8, 3, 4]))
    """

    def __init__(self, shapes: Mapping[str, torch.Size], components: int, like: Tensor, top: int | None) -> None:
        self._space = Space(shapes, like)
        self.names, self.shapes, self.dim = list(shapes), dict(shapes), self._space.dim
        self.components, self.dtype, self.device, self.top = components, like.dtype, like.device, top

    def __repr__(self) -> str:
        kind = type(self).__name__
        return f"{kind}(D={self.dim}, K={self.components}, parameters={len(self.names)}, top={self.top})"

    def _repr_html_(self) -> str:
        leading = ", ".join(f"{value:.3g}" for value in self.eigenvalues[:5].tolist())
        return f"<p>{self!r}, rank {self.rank}: largest eigenvalues {leading or 'none'}</p>"

    @property
    def shape(self) -> torch.Size:
        """(D, D).

        Example:
            >>> ggn.shape
            torch.Size([29, 29])
        """
        return torch.Size((self.dim, self.dim))

    def scalars(self) -> dict[str, float]:
        """The largest eigenvalue and, with V at hand, the trace, for a logger.

        Example:
            >>> sorted(ggn.scalars())
            ['largest', 'trace']
        """
        return {"largest": float(self._values[0]) if len(self._values) else 0.0}

    def to_dict(self, vectors: int | None = None) -> dict[str, Any]:
        """Eigenvalues, eigenvectors by name, gradient, names with shapes, sizes: tensors and numbers; V is not in it.

        Args:
            vectors: only so many leading eigenvectors, which are as large as the parameters each; ``None``: all.

        Raises:
            ValueError: for more than `rank`.

        Example:
            >>> sorted(ggn.to_dict())
            ['components', 'cutoff', 'dim', 'eigenvalues', 'eigenvectors', 'gradient', 'shapes', 'top']
        """
        return {
            "eigenvalues": self.eigenvalues.clone(),
            "eigenvectors": {} if vectors == 0 else self.eigenvectors(vectors),
            "gradient": self.unflatten(self.gradient),
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "dim": self.dim,
            "components": self.components,
            "top": self.top,
            "cutoff": self.cutoff,
        }

    def save(self, file: Any, vectors: int | None = 0) -> None:
        """Write the spectrum and the gradient, and eigenvectors where asked for; never V ``[K, D]``.

        What is written is `to_dict`; ``torch.load(file, weights_only=True)`` reads it.

        Args:
            file: a path, or a file open for writing, as of ``torch.save``.
            vectors: number of leading eigenvectors to write; ``None``: all, which takes as much as V.

        Raises:
            ValueError: for more than `rank`.

        Example:
            >>> import io
            >>> ggn.save(file := io.BytesIO(), vectors=3)
            >>> loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
            >>> loaded["eigenvalues"].shape == ggn.eigenvalues.shape, loaded["eigenvectors"]["0.weight"].shape
            (True, torch.Size([3, 3, 4]))
        """
        torch.save(self.to_dict(vectors), file)

    @abstractmethod
    def mapped(self, f: Callable[[Tensor], Tensor]) -> GGN:
        """The same with a function of all its tensors, as of one that moves or casts them.

        Example:
            >>> ggn.mapped(torch.Tensor.double).dtype
            torch.float64
        """

    def to(self, *where: Any, **options: Any) -> GGN:
        """The same moved or cast, arguments as of ``Tensor.to``.

        Example:
            >>> ggn.to(torch.float64).dtype
            torch.float64
        """
        return self.mapped(lambda t: t.to(*where, **options))

    # ---------------------------------------------------------------- what the two forms provide
    @property
    @abstractmethod
    def _values(self) -> Tensor:
        """Eigenvalues, descending, rounding included."""

    @abstractmethod
    def _vectors(self, k: int) -> Tensor:
        """Leading ``k`` eigenvectors as columns, orthonormal as far as they come out."""

    @abstractmethod
    def _product(self, v: Tensor) -> Tensor:
        """G v for ``[D]`` or ``[D, m]``."""

    @abstractmethod
    def _inverse(self, v: Tensor, damping: float) -> Tensor:
        """(G + δ I)⁻¹ v for ``[D, m]``."""

    @abstractmethod
    def _newton(self, damping: float) -> Tensor:
        """(G + δ I)⁻¹ ∇L, ``[D]``."""

    @abstractmethod
    def _newton_along(self, keep: Tensor, damping: Callable[[Tensor], Tensor]) -> Tensor:
        """Σ_d γ_d / (λ_d + δ_d) e_d over the eigenvectors ``keep``, ``[D]``; ``damping``: from their λ to their δ."""

    @property
    @abstractmethod
    def gradient(self) -> Tensor:
        """Gradient of the loss, flat ``[D]``: the sum of the per-component gradients.

        Example:
            >>> torch.allclose(ggn.unflatten(ggn.gradient)["2.bias"], res.grad_component["2.bias"].sum(0), atol=1e-6)
            True
        """

    @abstractmethod
    def slopes(self, k: int | None = None) -> Tensor:
        """γ[n, d] = g_n · e_d, ``[N, k]``: first derivatives of the components along the ``k`` leading eigenvectors.

        They sum over n to the slope of the loss along e_d (ViViT's γ, whose samples average instead).

        Example:
            >>> along = ggn.gradient @ ggn.unit_vectors(3)
            >>> torch.allclose(ggn.slopes(3).sum(0), along, atol=1e-6)
            True
        """

    @abstractmethod
    def curvatures(self, k: int | None = None) -> Tensor:
        """λ[n, d] = e_d · G_n e_d = Σ_c (V[(n, c)] · e_d)², ``[N, k]``; they sum over n to the eigenvalues.

        Example:
            >>> torch.allclose(ggn.curvatures(3).sum(0), ggn.eigenvalues[:3], rtol=1e-3)
            True
        """

    def _along_vectors(self, keep: Tensor, damping: Callable[[Tensor], Tensor]) -> Tensor:
        """`_newton_along` from the eigenvectors."""
        e, values = self.unit_vectors()[:, keep], self._values[keep]
        with full_precision(e):
            return e @ ((e.T @ self.gradient) / (values + damping(values)))

    # ---------------------------------------------------------------- vectors
    def flatten(self, v: Vector) -> Tensor:
        """Vectors by name as flat ones: ``{name: [*p]}`` → ``[D]``, ``{name: [m, *p]}`` → ``[D, m]``.

        Flat vectors come back as they are.

        Raises:
            TypeError, ValueError: for names, shapes, a dtype or a device that do not fit; the message says which.

        Example:
            >>> ggn.flatten(res.grad_component).shape
            torch.Size([29, 8])
        """
        return self._space.flatten(v)

    def unflatten(self, v: Tensor) -> dict[str, Tensor]:
        """Flat vectors, the entries *last*, by name: ``[*lead, D]`` → ``{name: [*lead, *p]}``.

        Example:
            >>> ggn.unflatten(torch.ones(5, 29))["0.weight"].shape
            torch.Size([5, 3, 4])
        """
        return self._space.unflatten(v)

    # ---------------------------------------------------------------- spectrum
    @property
    def cutoff(self) -> float:
        """Eigenvalues below are rounding: √max(K, D) · ulp · largest eigenvalue (errors add up randomly).

        Example:
            >>> bool((ggn.eigenvalues > ggn.cutoff).all())
            True
        """
        return max(self.components, self.dim) ** 0.5 * ulp(self.dtype) * float(self._values[:1].clamp(min=0).sum())

    @property
    def rank(self) -> int:
        """Numerical rank: the number of eigenvalues above `cutoff` (with ``top``: at most ``top``).

        Example:
            >>> ggn.rank == len(ggn.eigenvalues) <= ggn.components
            True
        """
        return int((self._values > self.cutoff).sum())

    @property
    def eigenvalues(self) -> Tensor:
        """All eigenvalues above `cutoff`, descending, ``[rank]``.

        Example:
            >>> bool((ggn.eigenvalues.diff() <= 0).all())
            True
        """
        return self._values[: self.rank]

    def unit_vectors(self, k: int | None = None) -> Tensor:
        """The ``k`` leading eigenvectors as columns, flat, ``[D, k]``; see `eigenvectors`.

        Example:
            >>> ggn.unit_vectors(3).shape
            torch.Size([29, 3])
        """
        # a small eigenvalue's vector has picked up parts of the larger ones': orthonormal from the largest down
        return orthonormal(self._vectors(self._number(k)))

    def _number(self, k: int | None) -> int:
        """``k``, or all; ValueError if there are not so many."""
        rank = self.rank
        if k is not None and not 0 < k <= rank:
            raise ValueError(
                f"{k} eigenvectors asked for, but the GGN has {rank} eigenvalues above the cut-off {self.cutoff:.2e} "
                f"(sqrt(max(K, D)) x ulp x largest){'' if self.top is None else f' and top={self.top}'}; directions "
                f"below are rounding noise. Ask for at most {rank}."
            )
        return rank if k is None else k

    def eigenvectors(self, k: int | None = None) -> dict[str, Tensor]:
        """Eigenvectors of the ``k`` largest eigenvalues (default: all), orthonormal to rounding, ``{name: [k, *p]}``.

        Raises:
            ValueError: for more than `rank`: those would be noise.

        Example:
            >>> ggn.eigenvectors(3)["0.weight"].shape
            torch.Size([3, 3, 4])
        """
        return self.unflatten(self.unit_vectors(k).T)

    def residuals(self, k: int | None = None) -> Tensor:
        """‖G e - λ e‖ of the ``k`` leading eigenpairs, ``[k]``.

        Example:
            >>> bool((ggn.residuals(3) < 1e-4 * ggn.eigenvalues[0]).all())
            True
        """
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

        Example:
            >>> nodes, weights = ggn.density(steps=5, probes=3)
            >>> round(float(weights.sum()), 4)
            1.0
        """
        starts = [torch.randn(self.dim, generator=generator, device="cpu") for _ in range(probes)]
        found = [quadrature(self._product, v.to(self.device, self.dtype), steps) for v in starts]
        return torch.cat([nodes for nodes, _ in found]), torch.cat([weights for _, weights in found]) / probes

    # ---------------------------------------------------------------- products and solves
    def __matmul__(self, v: Vector) -> Any:
        """G v, for one vector or several.

        Raises:
            TypeError, ValueError: see `flatten`.

        Example:
            >>> torch.allclose(ggn @ ggn.unit_vectors(1), ggn.eigenvalues[0] * ggn.unit_vectors(1), atol=1e-5)
            True
        """
        return self._space.apply(self._product, v)

    def to_scipy(self) -> LinearOperator:
        """The same as a ``scipy.sparse.linalg.LinearOperator`` on flat vectors.

        Example:
            >>> ggn.to_scipy().shape
            (29, 29)
        """
        return as_scipy(self._product, self.dim, self._space.like)

    def solve(self, v: Vector, damping: float) -> Any:
        """(G + δ I)⁻¹ v, for one vector or several.

        The part of v outside the range of G counts 1/δ, however small it is. With the rows of V at hand, a v that lies
        in the range up to its own rounding is taken to lie there.

        Args:
            v: right sides, in any form.
            damping: δ > 0.

        Raises:
            TypeError, ValueError: see `flatten`; also for a damping that is not positive.
            RuntimeError: where the damping is so small that the result would not have three digits.

        Example:
            >>> import torch, bncurv
            >>> model, loss_fn = torch.nn.Linear(3, 2), torch.nn.MSELoss()
            >>> batch = torch.randn(8, 3), torch.randn(8, 2)
            >>> res = bncurv.curvature(model, loss_fn, batch, bncurv.LowRankGGN(), bncurv.ComponentGrad())
            >>> res.ggn.solve(res.grad_component, damping=0.1)["weight"].shape  # all N gradients at once
            torch.Size([8, 2, 3])
        """
        delta = positive(damping)

        def inverse(x: Tensor) -> Tensor:
            return self._inverse(x, delta) if x.dim() == 2 else self._inverse(x[:, None], delta)[:, 0]

        return self._space.apply(inverse, v)

    def newton_step(self, damping: Damping, directions: Directions = None) -> dict[str, Tensor]:
        """Damped Newton step, ``{name: [*p]}``, to be added to the parameters.

        The gradient is a combination of V's rows (except where a saturated loss has no curvature left), and is used as
        such: the step keeps its digits at small damping, where ``-solve(gradient)`` has those of the gradient's
        rounding times λ₁/δ.

        Args:
            damping: δ > 0 as a constant, a tensor with one value per direction, or a callable from the eigenvalues of
                the directions to such a tensor.
            directions: An integer: the leading eigenvectors, -Σ_d γ_d / (λ_d + δ_d) e_d. A callable: ViViT's criterion,
                from all eigenvalues (ascending, as ViViT passes them) to the indices to keep. ``None``: with constant
                damping the whole space, -(G + δ I)⁻¹ ∇L; else all eigenvectors above `cutoff`.

        Raises:
            ValueError: for a damping that is not positive or not one per direction; for more directions than `rank`.
            RuntimeError: see `solve`.

        Example:
            >>> ggn.newton_step(damping=0.1)["0.weight"].shape
            torch.Size([3, 4])
        """
        if directions is None and constant(damping):
            return self.unflatten(-self._newton(positive(damping)))
        if callable(directions):
            keep = chosen(directions, self.eigenvalues)
        else:
            keep = torch.arange(self._number(directions), device=self.device)
        return self.unflatten(-self._newton_along(keep, lambda values: per_direction(damping, values)))
