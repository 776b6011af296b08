"""A loss at one batch: its gradient and Hessian factor, only when asked for (letters: ``engine.py``).

The gradient is autograd's of the very call ``loss_fn(output, y)``, in the model's dtype, whatever the loss is. The
factor is the table's (``losses.py``), in float64, and stands for the loss only where gradient and Hessian of the call
agree with it; any other loss has its factor by autograd (``hessian.py``). PyTorch's own losses, as they are, module or
function, need neither autograd nor comparison: the table's formulas are theirs.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bncurv.factor import Factor, WholeFactor, by_position, normal_columns, rademacher_columns
from bncurv.graph import coarsest
from bncurv.hessian import Hessian, factor_by_autograd
from bncurv.loss_calls import as_module, callable_of, cast, plain_rule, twin, user_hooks
from bncurv.losses import Loss, check_loss, find_loss, is_inherited, name_of
from bncurv.precision import CONVEX, ROUGHLY, ulp
from bncurv.probes import pattern
from bncurv.slow import listed, user_level


class LossAtBatch:
    """The loss at one batch: gradient and Hessian factor with respect to the model's output, in its dtype.

    As a source of columns it is the gradient, one column per sample.

    Args:
        loss_fn: a module or function of output and target.
        output: the model's output ``[N, ...]``.
        target: the targets, a tensor; a structure of them for a loss that takes it.
        scale: what the loss was multiplied by before ``backward()``.
        hooked: whether the loss module's forward hooks take part.
        empty_ok: whether a mean over no target at all is zero (one of several mini-batches) or an error.
        parameters: of the model, by name: the loss may depend on them through the output only.

    Attributes:
        name: what messages call the loss.
        plain: whether it is one of PyTorch's own in the table, as it is.
        divisor: what the mean of a plain loss divides by; ``None`` where it sums.

    Raises:
        TypeError, ValueError: where the loss, its options, or the shapes are not supported.
    """

    columns_per_sample = 1

    def __init__(
        self,
        loss_fn: Any,
        output: Tensor,
        target: Any,
        scale: float = 1.0,
        *,
        hooked: bool = False,
        empty_ok: bool = False,
        parameters: Mapping[str, Tensor] | None = None,
    ) -> None:
        check_loss(loss_fn)
        self.name, self.output, self.target = name_of(loss_fn), output.detach(), target
        loss_fn = as_module(loss_fn)
        self._loss_fn, self._scale, self._dtype, self._hooked = loss_fn, scale, output.dtype, hooked
        self._parameters = parameters or {}
        if find_loss(loss_fn) and not isinstance(target, Tensor):
            raise TypeError(
                f"{self.name} takes a tensor as target and got {type(target).__name__}; say which of it: "
                "forward=lambda model, batch: (model(...), batch[...])."
            )
        own = plain_rule(loss_fn, hooked)
        self.plain, self.divisor, self._own = own is not None, None, own
        self._past: list[str] = []
        if own is None:
            self._by_autograd = self.gradient_at(self.output, target)
            return
        own.check(loss_fn, self.output, target)
        precise, leaf, wide = self._at
        with torch.no_grad():
            value = precise.forward(leaf, wide)  # PyTorch's own errors come here
        if precise.reduction == "mean":
            self.divisor = own.divisor(*self._at)
        if not (empty_ok and self.divisor == 0):
            self._finite("value", value)

    # ---------------------------------------------------------------- gradient
    def gradient_at(self, output: Tensor, target: Any) -> Tensor:
        """∂L/∂F by autograd, at any output and target.

        Raises:
            TypeError, ValueError: if the loss is no differentiable scalar of the output alone, in single precision.
        """
        with torch.enable_grad():
            leaf = output.detach().requires_grad_()
            value = callable_of(self._loss_fn, self._hooked)(leaf.clone(), target)  # a clone may be changed in place
            self._scalar(value)
            found = torch.autograd.grad(value, [leaf, *self._parameters.values()], retain_graph=True, allow_unused=True)
        self._past = [name for name, direct in zip(self._parameters, found[1:], strict=True) if direct is not None]
        if found[0] is None:
            raise ValueError(f"{self.name} does not depend on the model's output, so it has no gradient.")
        return self._finite("gradient", found[0])

    def value_on(self, output: Tensor) -> Tensor:
        """The loss as a differentiable function of the output on its graph."""
        return callable_of(self._loss_fn, self._hooked)(output.clone(), self.target) * self._scale

    def _scalar(self, value: Any) -> None:
        if not isinstance(value, Tensor):
            raise TypeError(f"{self.name} returned {type(value).__name__}; expected a scalar tensor.")
        if value.numel() != 1:
            raise ValueError(
                f"{self.name} returned shape {tuple(value.shape)}; expected a scalar, because the curvature is that "
                "of one scalar: reduce it with .mean() or .sum(), or by reduction='mean' or 'sum'."
            )
        if not value.requires_grad:
            raise ValueError(
                f"{self.name} returned a value without a graph; expected a differentiable function of the model's "
                "output (detach(), no_grad() or argmax in the loss?)."
            )
        dtype = coarsest(value)[0]
        if ulp(dtype) > ulp(torch.float32):
            raise TypeError(
                f"{self.name} computes in {dtype} inside (autocast, or a cast in its code), which loses the digits "
                "that curvature needs. Use bncurv.curvature(..., precision='float32'), or take the cast out."
            )
        self._finite("value", value)

    @functools.cached_property
    def gradient(self) -> Tensor:
        """∂L/∂F ``[n, *output]``.

        Raises:
            ValueError: if it is not all of the loss' gradient.
        """
        if self._past:
            raise ValueError(
                f"{self.name} depends on the parameter '{self._past[0]}' past the model's output (a penalty, another "
                "forward pass?). Such a term belongs to no component: leave it out, and add its derivatives to "
                "the results."
            )
        if self._own is None:
            return self._by_autograd * self._scale
        with torch.no_grad():
            return (self._finite("gradient", self._own.gradient(*self._at)) * self._scale).to(self._dtype)

    def in_float64(self) -> LossAtBatch:
        """The same in float64.

        Raises:
            RuntimeError: of PyTorch's, for a loss with other tensors inside.
        """
        wide = cast(self.target, torch.float64)
        return LossAtBatch(twin(self._loss_fn, torch.float64), self.output.double(), wide, hooked=self._hooked)

    # ---------------------------------------------------------------- factor
    @functools.cached_property
    def _at(self) -> tuple[Any, Tensor, Tensor]:
        """The arguments of the table's formulas: loss, output and target, in float64 (int64 for whole numbers)."""
        wide = self.target.double() if self.target.is_floating_point() else self.target.long()
        return twin(self._loss_fn, torch.float64), self.output.double(), wide

    @functools.cached_property
    def _rule(self) -> Loss | None:
        """The table's entry; ``None``: by autograd. An entry of PyTorch's serves others only where it fits."""
        rule = find_loss(self._loss_fn)
        if rule is None or self.plain or not is_inherited(self._loss_fn):
            return rule
        try:
            self._by_rule(rule)
        except (TypeError, ValueError, RuntimeError, AttributeError):
            return None
        return rule

    @functools.cached_property
    def _factor(self) -> Factor | WholeFactor:
        if self._scale < 0:
            raise ValueError(
                f"The loss was multiplied by {self._scale:.3g} before backward(): a negative multiple of a convex loss "
                "has no positive semi-definite GGN. Multiply by a positive number, or ask for quantities of the "
                "gradient alone."
            )
        if self._past:
            warnings.warn(
                f"{self.name} depends on the parameter(s) {listed(self._past)} past the model's output (a penalty, "
                "another forward pass?). The GGN is that of the model's output alone: the curvature of that term is "
                "not in it. Add it to the results.",
                stacklevel=user_level(),
            )
        if self._rule is not None:
            return self._by_rule(self._rule)
        return factor_by_autograd(self._hessian(), CONVEX[self._dtype])

    def _by_rule(self, rule: Loss) -> Factor:
        """The table's formulas, held against autograd where the loss is not one of PyTorch's as it is."""
        rule.check(self._loss_fn, self.output, self.target)
        with torch.no_grad():
            factor = Factor(self._finite("Hessian factor", rule.blocks(*self._at)), self.output.shape)
        if not self.plain:
            self._verify(rule, factor)
        return factor

    def _hessian(self) -> Hessian:
        """In float64 where the loss can take that, in the model's dtype where it has other tensors inside."""

        def call(output: Tensor) -> Tensor:
            loss_fn = twin(self._loss_fn, output.dtype)
            return callable_of(loss_fn, self._hooked)(output, cast(self.target, output.dtype))

        try:
            call(self.output.double().clone())  # which it may change in place
        except RuntimeError:  # of PyTorch's, for a product of different dtypes
            return Hessian(self.name, call, self.output)
        H = Hessian(self.name, call, self.output.double())
        apart, size = (H.gradient - self._by_autograd).norm(), H.gradient.norm()
        if not apart <= ROUGHLY[self._dtype] * size:
            raise ValueError(
                f"{self.name}: its gradient in float64 is another one than in {self._dtype} (by "
                f"{float(apart / size):.0e} relative): it draws random numbers, or loses its digits there. Pass a loss "
                "that is one fixed function of output and target, or model.double()."
            )
        return H

    def _verify(self, rule: Loss, factor: Factor) -> None:
        """Raise ValueError unless the derivatives of the loss' value are those of the formulas."""
        precise, output, wide = self._at
        with torch.enable_grad():
            leaf = output.detach().requires_grad_()
            value = callable_of(precise, self._hooked)(leaf.clone(), wide)
            (actual,) = torch.autograd.grad(value, leaf, create_graph=True)
            u = pattern(leaf.shape, leaf)
            Hu = torch.autograd.grad(actual, leaf, u)[0] if actual.requires_grad else torch.zeros_like(u)
        with torch.no_grad():
            expected = self._finite("gradient", rule.gradient(*self._at))
        self._compare("gradient", actual.detach(), expected, 1e-14)
        self._compare("Hessian", Hu, factor.hessian_product(u), 1e-14 * float(actual.detach().norm()))

    def _compare(self, what: str, actual: Tensor, expected: Tensor, floor: float) -> None:
        difference, size = (actual - expected).norm(), actual.norm() + expected.norm()
        if not difference <= 1e-8 * size + floor:
            hooks = ", ".join(name_of(h) for h in user_hooks(self._loss_fn)) if self._hooked else ""
            cause = f"a forward hook ({hooks}) or the class' own forward" if hooks else "the class' own forward"
            raise ValueError(
                f"{self.name}: its {what} differs from the formula that bncurv has for this loss (by "
                f"{float(difference / size):.1e} relative). Either {cause} overrides what the formula is of, or the "
                "formula registered for it is wrong. Register the loss with bncurv.register_loss, correct the formula"
                f"{', remove the hook' if hooks else ''}, or ask for quantities of the gradient alone."
            )

    def _finite(self, what: str, t: Tensor) -> Tensor:
        if bool(t.detach().isfinite().all()):
            return t
        raise ValueError(
            f"{self.name}: its {what} is not finite at this batch. Either the loss is undefined there (NaN/inf, or no "
            "target that counts) or not convex in the model's output, or its registered formula is wrong. Correct the "
            "batch or the formula."
        )

    @functools.cached_property
    def factor(self) -> Factor:
        """The symmetric factor S.

        Raises:
            TypeError, ValueError: if the loss is not that of its formulas, or has no factor here, or none by samples.
        """
        if isinstance(self._factor, WholeFactor):
            raise ValueError(self.compares)
        return dataclasses.replace(self._factor, blocks=self._scaled(self._factor.blocks))

    @functools.cached_property
    def whole(self) -> WholeFactor | None:
        """The symmetric factor of a loss that compares samples; ``None`` of others, whose `factor` goes by samples."""
        if self.plain or not isinstance(self._factor, WholeFactor):
            return None
        return WholeFactor(self._scaled(self._factor.columns))

    @property
    def taken_as_a_whole(self) -> bool:
        """Whether a factor of the whole batch has been asked for."""
        return isinstance(vars(self).get("_factor"), WholeFactor)

    @property
    def compares(self) -> str:
        """What to say of a loss that compares samples."""
        return (
            f"{self.name} compares samples: its Hessian in the model's output has no part for each sample. "
            "DiagGGNExact, DiagGGNMC and LowRankGGN (with all rows of V) take such a loss."
        )

    def _scaled(self, columns: Tensor) -> Tensor:
        return (columns * self._scale**0.5).to(self._dtype)

    @functools.cached_property
    def weights(self) -> Tensor | None:
        """Weights ``[n, c]`` with ∂L/∂F_n = Σ_c w[n, c] s_(n, c), so that g_n = Σ_c w[n, c] V[(n, c)] needs no pass.

        ``None`` where the gradient is not in the range of the factor (a saturated output in finite precision).
        """
        blocks = self.factor.blocks.double()  # [n, t, e, j]
        if blocks.shape[-1] == 0:
            return None
        gradient = by_position(self.gradient, blocks.shape[2], self.factor.last).double()[..., None]
        weights = torch.linalg.lstsq(blocks, gradient).solution
        error = (blocks @ weights - gradient).norm()
        good = error <= 1e3 * torch.finfo(self._dtype).eps * gradient.norm() and bool(weights.isfinite().all())
        return weights.flatten(1).to(self._dtype) if good else None

    def columns(self, c: slice) -> Tensor:
        """The gradient as a column, ``[1, n, *output]``."""
        return self.gradient[None][c]

    def mixture(self) -> Tensor:
        """The gradient, each sample's with a fixed weight: ``[n, *output]``."""
        g = self.gradient
        return g * pattern((len(g), *(1,) * (g.dim() - 1)), g)

    def sample(self, draws: int, kind: str, generator: torch.Generator | None) -> Factor:
        """Random columns with covariance ∇²_F L: ``"rademacher"``, or ``"labels"``.

        Labels are drawn from the model's predictive distribution; the columns are the gradient's deviations for them.
        A loss by autograd has no such distribution: its columns are drawn from N(0, H).
        """
        if self.whole is not None:
            return self.whole.sample(draws, kind, generator)
        if kind == "rademacher":
            return dataclasses.replace(
                self.factor, blocks=rademacher_columns(self.factor.blocks, draws, generator), joint=True
            )
        rule = self._rule
        if rule is None:
            return dataclasses.replace(
                self.factor, blocks=normal_columns(self.factor.blocks, draws, generator), joint=True
            )
        if not self.plain or self._scale < 0:
            _ = self._factor  # its checks
        with torch.no_grad():
            return Factor(self._scaled(rule.sample(*self._at, draws, generator)), self.output.shape, joint=True)
