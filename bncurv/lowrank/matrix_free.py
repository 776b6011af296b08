"""Matrix-free GGN: products through the recorded graph, for networks whose V does not fit into memory.

G v = Jᵀ H (J v), two backward passes' worth of work per vector whatever N is, in the order v → J v → H J v → Jᵀ H J v.
J v is the backward pass of a backward pass: w(u) = Jᵀ u is linear in u, so d(w · v)/du = J v (Townsend 2017). With the
symmetric factor, H = S Sᵀ, the products of the rows are there too: V v = Sᵀ J v and Vᵀ w = Jᵀ S w. The graph stays
alive as long as the operator does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NoReturn, final

import torch
from torch import Tensor

from bncurv.blocks import Batch
from bncurv.lowrank.base import GGN
from bncurv.lowrank.lanczos import damped_inverse, damped_range_inverse, eigenpairs
from bncurv.lowrank.recorded import MATRIX_FREE, Reads


class BatchOperator:
    """G of one mini-batch on flat vectors.

    Attributes:
        parameters: by name.
        factor: S.
        gradient: ∂L/∂F.
        weights: of V's rows in the per-component gradients, ``[n, c]``, where they are such combinations.
        recorded: what the graph reads.
        everybody: over whose ranks the batch is spread; ``u`` and rows are then this rank's, and all call together.
        helpers: those that have the same batch: each does all of it.
    """

    def __init__(self, batch: Batch) -> None:
        self.parameters, self.factor = dict(batch.parameters), batch.loss.factor
        self.gradient, self.weights = batch.loss.gradient, batch.loss.weights
        self._output, self._list = batch.output, list(self.parameters.values())
        self.everybody, self.helpers = batch.ranks.parts, batch.ranks.helpers
        with torch.enable_grad():
            self._u = torch.zeros_like(self._output, requires_grad=True)
            w = torch.autograd.grad(self._output, self._list, self._u, create_graph=True, materialize_grads=True)
        self._w = [(t, i) for i, t in enumerate(w) if t.requires_grad]
        copies = batch.memo.setdefault("copies", {})
        outputs = [self._output, *(t for t, _ in self._w)]
        self.recorded = Reads(MATRIX_FREE, outputs, self._list, batch.reads(), copies)

    @property
    def components(self) -> int:
        """Number of rows of V."""
        return len(self._output) * self.factor.columns_per_sample

    def jvp(self, v: Tensor) -> Tensor:
        """J v, ``[n, *output]``."""
        if not self._w:
            return torch.zeros_like(self._u)
        parts = v.split([p.numel() for p in self._list])
        cotangents = [parts[i].view_as(self._list[i]) for _, i in self._w]
        return torch.autograd.grad([t for t, _ in self._w], self._u, cotangents, retain_graph=True)[0]

    def vjp(self, u: Tensor) -> Tensor:
        """Jᵀ u, flat."""
        got = torch.autograd.grad(
            self._output, self._list, u, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        flat = torch.cat([t.reshape(-1) for t in got])
        return self.everybody.sum([flat], "matrix-free products")[0]

    def __matmul__(self, v: Tensor) -> Tensor:
        """G v, flat."""
        Jv = self.jvp(v)
        HJv = self.factor.hessian_product(Jv)
        return self.vjp(HJv)

    def up(self, v: Tensor) -> Tensor:
        """V v, ``[K]``."""
        return self.factor.coefficients(self.jvp(v)).flatten()

    def down(self, w: Tensor) -> Tensor:
        """Vᵀ w, flat."""
        return self.vjp(self.factor.combination(w.view(len(self._output), -1)))


class NeedsRows(NotImplementedError, AttributeError):
    """Asked of a matrix-free GGN: what only the rows of V give."""


@final
class MatrixFreeGGN(GGN):
    """The leading eigenpairs of G, and G itself through the network: ``LowRankGGN(matrix_free=True)``.

    Products (``@``, ``to_scipy``), solves and Newton steps (conjugate gradients), `density` (stochastic Lanczos),
    slopes and curvatures use the whole G; eigenvalues, eigenvectors and Newton steps along directions its ``top``
    leading part. What needs the whole spectrum (``trace``, ``frobenius_norm``, ``logdet``, ``sample``) is refused with
    `NeedsRows`.

    It belongs to the network as it was: once a parameter, or anything else that the graph reads, has another value, a
    product raises RuntimeError. Over several processes it has its eigenpairs, gradient, slopes and curvatures, and no
    products: they would need messages.

    Args:
        operators: one per mini-batch; G = Σ share · operator.
        top: number of eigenpairs, by scipy's implicitly restarted Lanczos (`LANCZOS_TOLERANCE`).
        shares: weights of the mini-batches.

    Example:
        >>> import torch, bncurv
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
        >>> batch, loss_fn = (torch.randn(8, 4), torch.randint(2, (8,))), torch.nn.CrossEntropyLoss()
        >>> res = bncurv.curvature(model, loss_fn, batch, bncurv.LowRankGGN(top=3, matrix_free=True))
        >>> ggn = res.ggn
        >>> ggn.eigenvalues.shape, ggn.solve(ggn.gradient, damping=0.1).shape
        (torch.Size([3]), torch.Size([29]))
    """

    def __init__(self, operators: Sequence[BatchOperator], top: int, shares: Sequence[float] = (1.0,)) -> None:
        parameters = operators[0].parameters
        shapes, like = {name: p.shape for name, p in parameters.items()}, next(iter(parameters.values())).detach()
        everybody, helpers = operators[0].everybody, operators[0].helpers
        components = sum(map(int, everybody.numbers(sum(op.components for op in operators))))
        super().__init__(shapes, components, like, top)
        self._operators, self._shares, self._over = operators, shares, 1  # processes, once it is complete
        if top >= self.dim:
            raise ValueError(f"top={top} is not below the number of parameters {self.dim}; use top=None.")
        self._known: tuple[Tensor, ...] = ()
        self._gradient = helpers.first(self._sum(lambda op: op.vjp(op.gradient)), "gradient")
        one = everybody if everybody.size > 1 else helpers  # one rank's signs for all
        pairs = eigenpairs(self._through, self.dim, top, like)
        self._pairs = one.first(pairs[0], "eigenpairs"), one.first(pairs[1], "eigenpairs")
        if everybody.size > 1 or helpers.size > 1:  # whatever needs messages, now
            purpose = "slopes and curvatures"
            here = [everybody.rows(t, purpose) for t in (self.slopes(), self.curvatures())]
            self._known = tuple(helpers.first(t, purpose) for t in here)
        self._over = everybody.size

    # ---------------------------------------------------------------- the network
    @property
    def _weighted(self) -> Iterator[tuple[BatchOperator, float]]:
        return zip(self._operators, self._shares, strict=True)

    @contextmanager
    def _unchanged(self) -> Iterator[None]:
        """Every use of the graphs after the first is in this block."""
        if self._over > 1:
            raise RuntimeError(
                f"This MatrixFreeGGN is that of a batch on {self._over} processes: its products run through the "
                "network on all of them, with messages. It has its eigenpairs, gradient, slopes and curvatures; for "
                "products and solves use LowRankGGN(matrix_free=False)."
            )
        with ExitStack() as stack:
            for op in self._operators:
                stack.enter_context(op.recorded.unchanged())
            yield

    def _sum(self, f: Callable[[BatchOperator], Tensor]) -> Tensor:
        """Σ share · f(operator)."""
        return functools.reduce(torch.add, [f(op) if share == 1 else share * f(op) for op, share in self._weighted])

    def _through(self, v: Tensor) -> Tensor:
        """G v for ``[D]`` or ``[D, m]``."""
        if v.dim() > 1:
            return torch.stack([self._through(c) for c in v.T], 1) if v.shape[1] else torch.zeros_like(v)
        return self._sum(lambda op: op @ v)

    def _up(self, v: Tensor) -> Tensor:
        """V v, ``[D] → [K]``."""
        return torch.cat([share**0.5 * op.up(v) for op, share in self._weighted])

    def _down(self, w: Tensor) -> Tensor:
        """Vᵀ w, ``[K] → [D]``."""
        parts = w.split([op.components for op in self._operators])
        return torch.stack([share**0.5 * op.down(p) for (op, share), p in zip(self._weighted, parts, strict=True)]).sum(
            0
        )

    def _product(self, v: Tensor) -> Tensor:
        with self._unchanged():
            return self._through(v)

    def mapped(self, f: Callable[[Tensor], Tensor]) -> NoReturn:
        """Refused: it is where its graph is.

        Example:
            >>> ggn.mapped(torch.Tensor.double)
            Traceback (most recent call last):
            RuntimeError: a matrix-free GGN works through the network's graph...
        """
        raise RuntimeError(
            "a matrix-free GGN works through the network's graph, and can be neither moved nor cast. Use to_dict() for "
            "its eigenpairs, or LowRankGGN(matrix_free=False)."
        )

    # ---------------------------------------------------------------- spectrum
    @property
    def _values(self) -> Tensor:
        return self._pairs[0]

    def _vectors(self, k: int) -> Tensor:
        return self._pairs[1][:, :k]

    # ---------------------------------------------------------------- directional derivatives
    @property
    def gradient(self) -> Tensor:
        """Gradient of the loss, flat ``[D]``.

        Example:
            >>> ggn.gradient.shape
            torch.Size([29])
        """
        return self._gradient.clone()

    def slopes(self, k: int | None = None) -> Tensor:
        """γ[n, d] = g_n · e_d = ∂L/∂F_n · (J e_d)_n, ``[N, k]``.

        Example:
            >>> ggn.slopes(2).shape  # [N, k]
            torch.Size([8, 2])
        """
        if self._known:
            return self._known[0][:, self._leading(k)]
        return self._along(k, lambda op, Je: (op.gradient * Je).flatten(1).sum(1))

    def curvatures(self, k: int | None = None) -> Tensor:
        """λ[n, d] = (J e_d)_n · H_n (J e_d)_n, ``[N, k]``.

        Example:
            >>> ggn.curvatures(2).shape  # [N, k]
            torch.Size([8, 2])
        """
        if self._known:
            return self._known[1][:, self._leading(k)]
        return self._along(k, lambda op, Je: op.factor.coefficients(Je).square().sum(1))

    def _leading(self, k: int | None) -> slice:
        return slice(0, self.unit_vectors(k).shape[1])

    def _along(self, k: int | None, f: Callable[[BatchOperator, Tensor], Tensor]) -> Tensor:
        directions = self.unit_vectors(k).T
        found = []
        with self._unchanged():
            for op, share in self._weighted:
                columns = [share * f(op, op.jvp(e)) for e in directions]
                none = op.gradient.new_zeros(len(op.gradient), 0)
                found.append(torch.stack(columns, 1) if columns else none)
        return torch.cat(found)

    # ---------------------------------------------------------------- solves
    def _inverse(self, v: Tensor, damping: float) -> Tensor:
        with self._unchanged():
            return torch.stack([damped_inverse(self._up, self._down, c, damping, self._largest) for c in v.T], 1)

    def _newton(self, damping: float) -> Tensor:
        known = [share**0.5 * op.weights.flatten() for op, share in self._weighted if op.weights is not None]
        if len(known) < len(self._operators):
            return self._inverse(self.gradient[:, None], damping)[:, 0]
        with self._unchanged():
            return damped_range_inverse(self._up, self._down, torch.cat(known), damping, self._largest)

    @property
    def _largest(self) -> float:
        return float(self._values[0])

    def _newton_along(self, keep: Tensor, damping: Callable[[Tensor], Tensor]) -> Tensor:
        return self._along_vectors(keep, damping)

    def __getattr__(self, name: str) -> NoReturn:
        if name in ("trace", "frobenius_norm", "logdet", "sample", "diagonal"):
            raise NeedsRows(
                f"{name} needs all rows of V, but this GGN is matrix-free with top={self.top} eigenpairs. Use "
                "LowRankGGN(matrix_free=False) with fewer samples or parameters, or density() for the spectrum."
            )
        raise AttributeError(f"MatrixFreeGGN has no attribute '{name}'.")
