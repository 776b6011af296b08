"""The GGN from the rows of V.

The non-zero spectrum of G [D, D] is that of the Gram matrix V Vᵀ [K, K] (Dangel, Tatzel & Hennig 2022, TMLR, "ViViT");
the smaller of the two is decomposed. With cross-entropy its rank is at most N (C - 1), with squared error N C.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from bncurv.lowrank.base import GGN
from bncurv.lowrank.damped import Damped, Tall, Wide
from bncurv.lowrank.lanczos import eigenpairs
from bncurv.lowrank.matrix import RowMatrix
from bncurv.lowrank.steps import positive
from bncurv.precision import full_precision

OF_NONE = -1  # in place of a sample: a row of V that belongs to none
DIRECT_SIZE = 1000  # smaller Gram matrices are decomposed directly, whatever ``top`` is


@final
class LowRank(GGN):
    """The GGN with V at hand: everything that `GGN` gives, and what needs the whole spectrum.

    Args:
        rows: V by parameter name, ``[K, *p]`` each; k = (n, c), n slowest.
        gradients: per-component gradients g_n by name, ``[N, *p]``; or weights w ``[K]`` with
            g_n = Σ_{k of n} w[k] V[k].
        top: compute only so many eigenpairs (Lanczos on the rows); ``None``: all.
        samples: the sample n of each row, ``[K]`` (`OF_NONE`: of no sample); ``None``: K / N of each, in order
            (needs gradients by name).

    Example:
        >>> import torch, bncurv
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
        >>> batch, loss_fn = (torch.randn(8, 4), torch.randint(2, (8,))), torch.nn.CrossEntropyLoss()
        >>> res = bncurv.curvature(model, loss_fn, batch, bncurv.LowRankGGN(), bncurv.ComponentGrad())
        >>> ggn = res.ggn
        >>> ggn
        LowRank(D=29, K=8, parameters=6, top=None)
    """

    def __init__(
        self,
        rows: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor] | Tensor,
        top: int | None = None,
        samples: Tensor | None = None,
    ) -> None:
        first = next(iter(rows.values()))
        super().__init__({name: r.shape[1:] for name, r in rows.items()}, len(first), first, top)
        self._V = RowMatrix(rows)
        self._weights = gradients if isinstance(gradients, Tensor) else None
        self._gradients = {} if isinstance(gradients, Tensor) else {name: gradients[name] for name in self.names}
        if samples is None:
            if not self._gradients:
                raise ValueError("gradients are weights of V's rows; pass samples too, the sample of each row [K].")
            count = len(self._gradients[self.names[0]])
            samples = torch.arange(count, device=self.device).repeat_interleave(len(first) // max(1, count))
        self._samples = samples

    def _product(self, v: Tensor) -> Tensor:
        return self._V.down(self._V.up(v))

    def mapped(self, f: Callable[[Tensor], Tensor]) -> LowRank:
        """The same with a function of V and the gradients; eigenpairs are computed anew.

        Example:
            >>> ggn.mapped(torch.Tensor.double).eigenvalues.dtype
            torch.float64
        """
        rows = {name: f(r) for name, r in self._V.by_name(self.shapes).items()}
        gradients = {name: f(g) for name, g in self._gradients.items()}
        device = next(iter(rows.values())).device
        weights = gradients if self._weights is None else f(self._weights)
        return LowRank(rows, weights, self.top, self._samples.to(device))

    def diagonal(self) -> dict[str, Tensor]:
        """Diagonal of G, ``{name: [*p]}``: Σ_k V[k]², as `DiagGGNExact` gives it.

        Example:
            >>> total = sum(d.sum() for d in ggn.diagonal().values())
            >>> torch.allclose(total, ggn.trace)
            True
        """
        return {name: r.square().sum(0) for name, r in self._V.by_name(self.shapes).items()}

    def scalars(self) -> dict[str, float]:
        """Largest eigenvalue and trace, for a logger.

        Example:
            >>> sorted(ggn.scalars())
            ['largest', 'trace']
        """
        return super().scalars() | {"trace": float(self.trace)}

    # ---------------------------------------------------------------- spectrum
    @cached_property
    def _small(self) -> Tensor:
        """The smaller of V Vᵀ and Vᵀ V."""
        return self._V.gram(self.dtype)

    @cached_property
    def _values(self) -> Tensor:
        return self._decomposition[0] if self.top else torch.linalg.eigvalsh(self._small).flip(0)

    @property
    def _iterative(self) -> bool:
        """Whether Lanczos on the rows is cheaper than decomposing `_small`."""
        size = min(self.components, self.dim)
        return self.top is not None and self.top < size // 3 and size > DIRECT_SIZE

    @cached_property
    def _decomposition(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues, descending, and eigenvectors (columns) of `_small`."""
        if self.top and self._iterative:
            there, back = (self._V.down, self._V.up) if self._V.wide else (self._V.up, self._V.down)
            return eigenpairs(lambda u: back(there(u)), min(self.components, self.dim), self.top, self._space.like)
        values, vectors = self._fine if self.dtype == torch.float64 else _descending(self._small)
        return values[: self.top], vectors[:, : self.top]

    def _vectors(self, k: int) -> Tensor:
        values, vectors = self._decomposition
        if not self._V.wide:
            return vectors[:, :k]
        # G (Vᵀ u) = λ (Vᵀ u),  ‖Vᵀ u‖² = λ
        return self._V.down(vectors[:, :k]) / values[:k].sqrt()

    @property
    def trace(self) -> Tensor:
        """Sum of all eigenvalues, from the rows themselves.

        Example:
            >>> torch.allclose(ggn.trace, ggn.eigenvalues.sum(), rtol=1e-4)
            True
        """
        return self._V.trace()

    @property
    def frobenius_norm(self) -> Tensor:
        """Square root of the sum of squared eigenvalues.

        Example:
            >>> torch.allclose(ggn.frobenius_norm, ggn.eigenvalues.norm(), rtol=1e-4)
            True
        """
        return torch.linalg.matrix_norm(self._small.double()).to(self.dtype)

    # ---------------------------------------------------------------- matrix functions
    @cached_property
    def _fine(self) -> tuple[Tensor, Tensor]:
        """All eigenpairs of the smaller matrix, in float64."""
        return _descending(self._small if self.dtype == torch.float64 else self._V.gram(torch.float64))

    @cached_property
    def _damped(self) -> Damped:
        kind = Wide if self._V.wide else Tall
        return kind(*self._fine, self._V)

    def _inverse(self, v: Tensor, damping: float) -> Tensor:
        return self._damped.solve(v.double(), damping).to(self.dtype)

    def logdet(self, damping: float) -> Tensor:
        """Log det (G + δ I) over all D dimensions.

        Args:
            damping: δ > 0.

        Example:
            >>> dense = ggn @ torch.eye(29) + 0.1 * torch.eye(29)
            >>> torch.allclose(ggn.logdet(damping=0.1), torch.logdet(dense), rtol=1e-4)
            True
        """
        return self._damped.logdet(positive(damping), self.dim).to(self.dtype)

    def sample(self, damping: float, count: int = 1, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Draws from N(0, (G + δ I)⁻¹), ``{name: [count, *p]}``.

        Args:
            damping: δ > 0, a prior's precision.
            count: number of draws.
            generator: source of randomness on the result's device; ``None``: PyTorch's own.

        Example:
            >>> ggn.sample(damping=0.1, count=5)["0.weight"].shape
            torch.Size([5, 3, 4])
        """
        delta = positive(damping)
        z = torch.randn(self.dim, count, generator=generator, dtype=self.dtype, device=self.device)
        return self.unflatten(self._damped.root(z.double(), delta).T.to(self.dtype))

    # ---------------------------------------------------------------- directional derivatives
    @property
    def gradient(self) -> Tensor:
        """Gradient of the loss, flat ``[D]``: the sum of the per-component gradients.

        Example:
            >>> ggn.gradient.shape
            torch.Size([29])
        """
        if self._weights is not None:
            return self._V.down(self._weights)
        return torch.cat([g.sum(0).reshape(-1) for g in self._gradients.values()])

    def _per_sample(self, t: Tensor) -> Tensor:
        """Sum over the rows of each sample, ``[K, ...] → [N, ...]``."""
        if len(self._samples) and int(self._samples[0]) == OF_NONE:
            raise ValueError(
                "These rows of V belong to no sample, since the loss compares samples: there are no curvatures by "
                "sample. eigenvalues, eigenvectors, slopes, products, solves and Newton steps need none."
            )
        count = int(self._samples[-1]) + 1 if len(self._samples) else 0
        return t.new_zeros(count, *t.shape[1:]).index_add_(0, self._samples, t)

    def slopes(self, k: int | None = None) -> Tensor:
        """γ[n, d] = g_n · e_d, ``[N, k]``; see `GGN.slopes`.

        Example:
            >>> ggn.slopes(3).shape  # [N, k]
            torch.Size([8, 3])
        """
        e = self.unit_vectors(k)
        if self._weights is not None:
            return self._per_sample(self._weights[:, None] * self._V.up(e))
        parts = zip(self._gradients.values(), e.split(self._space.sizes), strict=True)
        with full_precision(e):
            return torch.stack([g.reshape(len(g), -1) @ part for g, part in parts]).sum(0)

    def curvatures(self, k: int | None = None) -> Tensor:
        """λ[n, d] = Σ_c (V[(n, c)] · e_d)², ``[N, k]``; see `GGN.curvatures`.

        Example:
            >>> ggn.curvatures(3).shape  # [N, k]
            torch.Size([8, 3])
        """
        return self._per_sample(self._V.up(self.unit_vectors(k)).square())

    def _newton(self, damping: float) -> Tensor:
        if self._weights is None:
            return self._inverse(self.gradient[:, None], damping)[:, 0]
        return self._damped.from_weights(self._weights.double()[:, None], damping)[:, 0].to(self.dtype)

    def _newton_along(self, keep: Tensor, damping: Callable[[Tensor], Tensor]) -> Tensor:
        if self._iterative or self._weights is None:
            return self._along_vectors(keep, damping)
        delta = damping(self._damped.values[keep].to(self.dtype))
        return self._damped.along(self._weights.double(), keep, delta.double()).to(self.dtype)


def _descending(small: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, descending, and eigenvectors as columns."""
    values, vectors = torch.linalg.eigh(small)
    return values.flip(0), vectors.flip(1)
