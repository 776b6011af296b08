"""A loss at one batch: its gradient and Hessian factor, in float64 and only when asked for (letters: ``engine.py``)."""

from __future__ import annotations

import copy
import functools

import torch
from torch import Tensor, nn

from bncurv.losses import LOSSES, Factor, find_loss
from bncurv.probes import pattern

# What PyTorch runs for its own modules: their formulas are held against autograd by the tests, not at every use
_VERIFIED = [(rule, module_class.forward) for module_class, rule in LOSSES.items()]


class LossAtBatch:
    """The loss at one batch: gradient and Hessian factor with respect to the model's output, in its dtype.

    Both are made in float64 when they are first asked for. As a source of columns it is the gradient, one column per
    sample.

    Args:
        loss_fn: a loss module of the table.
        output: the model's output ``[N, ...]``.
        target: the targets.
        scale: what the loss was multiplied by before ``backward()``.

    Raises:
        TypeError, ValueError: where the loss, its options, or the shapes are not supported; also if the loss' own
            derivatives are not those of the table's formulas (a subclass with another forward, say).
    """

    columns_per_sample = 1

    def __init__(self, loss_fn: nn.Module, output: Tensor, target: Tensor, scale: float = 1.0) -> None:
        self._rule = find_loss(loss_fn)
        self._rule.check(loss_fn, output, target)
        if scale < 0:
            raise ValueError(
                f"The loss was multiplied by {scale:.3g} before backward(): a negative multiple of a convex loss has "
                "no positive semi-definite GGN. Multiply by a positive number, or use ComponentGrad alone on the loss "
                "itself."
            )
        precise = copy.copy(loss_fn)
        precise._buffers = {
            k: b.double() if b is not None and b.is_floating_point() else b for k, b in loss_fn._buffers.items()
        }
        wide = target.double() if target.is_floating_point() else target
        self._scale, self._dtype = scale, output.dtype
        with torch.enable_grad():
            leaf = output.detach().double().requires_grad_()
            value = precise.forward(leaf, wide)  # forward: without anybody's hooks; PyTorch's own errors come here
            self._at = precise, leaf.detach(), wide
            self._finite("value", value)
            runs = getattr(precise.forward, "__func__", None)
            if not any(rule is self._rule and forward is runs for rule, forward in _VERIFIED):
                self._verify(value, leaf)

    def _verify(self, value: Tensor, leaf: Tensor) -> None:
        """Raise ValueError unless the derivatives of the loss' value are those of the formulas."""
        (actual,) = torch.autograd.grad(value, leaf, create_graph=True)
        u = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(0), dtype=leaf.dtype).to(leaf.device)
        Hu = torch.autograd.grad(actual, leaf, u)[0] if actual.requires_grad else torch.zeros_like(u)
        self._compare("gradient", actual.detach(), self._gradient, 1e-14)
        self._compare("Hessian", Hu, self._factor.hessian_product(u), 1e-14 * float(actual.detach().norm()))

    def _compare(self, what: str, actual: Tensor, expected: Tensor, floor: float) -> None:
        difference, size = (actual - expected).norm(), actual.norm() + expected.norm()
        if not difference <= 1e-8 * size + floor:
            raise ValueError(
                f"{self._name}: its {what} differs from the formula that bncurv has for this loss "
                f"(by {float(difference / size):.1e} relative). Either the class overrides the loss' forward, or the "
                "formula registered for it is wrong. Register the loss with bncurv.register_loss, or correct the "
                "formula."
            )

    @property
    def _name(self) -> str:
        return type(self._at[0]).__name__

    def _finite(self, what: str, t: Tensor) -> Tensor:
        if bool(t.detach().isfinite().all()):
            return t
        raise ValueError(
            f"{self._name}: its {what} is not finite at this batch. Either the loss is undefined there (NaN/inf, or no "
            "target that counts) or not convex in the model's output, or its registered formula is wrong. Correct the "
            "batch or the formula."
        )

    @functools.cached_property
    def _gradient(self) -> Tensor:
        with torch.no_grad():
            return self._finite("gradient", self._rule.gradient(*self._at))

    @functools.cached_property
    def _factor(self) -> Factor:
        with torch.no_grad():
            return Factor(self._finite("Hessian factor", self._rule.blocks(*self._at)), self._at[1].shape)

    @functools.cached_property
    def gradient(self) -> Tensor:
        """∂L/∂F ``[n, *output]``."""
        return (self._gradient * self._scale).to(self._dtype)

    @functools.cached_property
    def factor(self) -> Factor:
        """The symmetric factor S."""
        return Factor((self._factor.blocks * self._scale**0.5).to(self._dtype), self._factor.layout)

    @functools.cached_property
    def weights(self) -> Tensor | None:
        """Weights ``[n, c]`` with ∂L/∂F_n = Σ_c w[n, c] s_(n, c), so that g_n = Σ_c w[n, c] V[(n, c)] needs no pass.

        ``None`` where the gradient is not in the range of the factor (a saturated output in finite precision).
        """
        blocks = self.factor.blocks.double()  # [n, t, e, j]
        n, t, e, _ = blocks.shape
        gradient = self.gradient.reshape(n, e, t).mT.double()[..., None]
        if blocks.shape[-1] == 0:
            return None
        weights = torch.linalg.lstsq(blocks, gradient).solution
        error = (blocks @ weights - gradient).norm()
        good = error <= 1e3 * torch.finfo(self._dtype).eps * gradient.norm() and bool(weights.isfinite().all())
        return weights.reshape(n, -1).to(self._dtype) if good else None

    def columns(self, c: slice) -> Tensor:
        """The gradient as a column, ``[1, n, *output]``."""
        return self.gradient[None][c]

    def mixture(self) -> Tensor:
        """The gradient, each sample's with a fixed weight: ``[n, *output]``."""
        g = self.gradient
        return g * pattern((len(g), *(1,) * (g.dim() - 1)), g)

    def sample(self, draws: int, kind: str, generator: torch.Generator | None) -> Tensor:
        """Random columns with covariance ∇²_F L, ``[n, t, e, draw]``: ``"rademacher"``, or ``"labels"``.

        Labels are drawn from the model's predictive distribution; the columns are the gradient's deviations for them.
        """
        if kind == "labels":
            with torch.no_grad():
                return (self._rule.sample(*self._at, draws, generator) * self._scale**0.5).to(self._dtype)
        blocks = self.factor.blocks
        shape = (*blocks.shape[:2], blocks.shape[3], draws)
        signs = torch.randint(2, shape, generator=generator, device=blocks.device)
        return blocks @ (2 * signs - 1).to(blocks.dtype)
