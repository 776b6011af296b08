"""A loss at one batch: its gradient and Hessian factor, only when asked for (letters: ``engine.py``).

The gradient is autograd's of the very call ``loss_fn(output, y)``, in the model's dtype, whatever the loss is. The
factor is the table's (``losses.py``), in float64, and stands for the loss only where gradient and Hessian of the call
agree with it. PyTorch's own losses, as they are, need neither autograd nor comparison: the table's formulas are theirs.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from bncurv.losses import LOSSES, PYTORCHS, Factor, Known, Loss, check_loss, find_loss, name_of, source_of
from bncurv.probes import pattern

# What PyTorch runs for its own modules: their formulas are held against autograd by the tests, not at every use
_VERIFIED = [(rule, module_class.forward) for module_class, rule in PYTORCHS.items()]


class LossAtBatch:
    """The loss at one batch: gradient and Hessian factor with respect to the model's output, in its dtype.

    As a source of columns it is the gradient, one column per sample.

    Args:
        loss_fn: a module or function of output and target.
        output: the model's output ``[N, ...]``.
        target: the targets.
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
        target: Tensor,
        scale: float = 1.0,
        *,
        hooked: bool = False,
        empty_ok: bool = False,
        parameters: Mapping[str, Tensor] | None = None,
    ) -> None:
        check_loss(loss_fn)
        self.name, self.output, self.target = name_of(loss_fn), output.detach(), target
        self._loss_fn, self._scale, self._dtype, self._hooked = loss_fn, scale, output.dtype, hooked
        self._parameters = parameters or {}
        own = plain_rule(loss_fn, hooked)
        self.plain, self.divisor = own is not None, None
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
    def gradient_at(self, output: Tensor, target: Tensor) -> Tensor:
        """∂L/∂F by autograd, at any output and target.

        Raises:
            TypeError, ValueError: if the loss is no differentiable scalar of the output alone.
        """
        with torch.enable_grad():
            leaf = output.detach().requires_grad_()
            value = _call(self._loss_fn, self._hooked)(leaf.clone(), target)  # a clone may be changed in place
            self._scalar(value)
            found = torch.autograd.grad(
                value, [leaf, *self._parameters.values()], retain_graph=True, allow_unused=True
            )
        for name, direct in zip(self._parameters, found[1:], strict=True):
            if direct is not None:
                raise ValueError(
                    f"{self.name} depends on the parameter '{name}' past the model's output (a penalty, another "
                    "forward pass?). Such a term belongs to no component: leave it out, and add its derivatives to "
                    "the results."
                )
        if found[0] is None:
            raise ValueError(f"{self.name} does not depend on the model's output, so it has no gradient.")
        return self._finite("gradient", found[0])

    def value_on(self, output: Tensor) -> Tensor:
        """The loss as a differentiable function of the output on its graph."""
        return _call(self._loss_fn, self._hooked)(output.clone(), self.target) * self._scale

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
        self._finite("value", value)

    @functools.cached_property
    def gradient(self) -> Tensor:
        """∂L/∂F ``[n, *output]``."""
        if not self.plain:
            return self._by_autograd * self._scale
        with torch.no_grad():
            return (self._finite("gradient", self._rule.gradient(*self._at)) * self._scale).to(self._dtype)

    def in_float64(self) -> LossAtBatch:
        """The same in float64.

        Raises:
            RuntimeError: of PyTorch's, for a loss with other tensors inside.
        """
        precise, output, target = self._at
        return LossAtBatch(precise, output, target, self._scale, hooked=self._hooked, parameters=self._parameters)

    # ---------------------------------------------------------------- factor
    @functools.cached_property
    def _rule(self) -> Loss:
        rule = find_loss(self._loss_fn)
        if rule is None:
            known = ", ".join(c.__name__ for c in LOSSES)
            raise TypeError(
                f"The loss is {self.name}; bncurv knows the Hessian factor of the modules {known}. Use one of these, "
                "or add yours with bncurv.register_loss (README, 'Extend it'). Quantities of the gradient alone "
                "(ComponentGrad, ComponentL2Grad, SumComponentGradSquared, ComponentVariance) take any loss."
            )
        return rule

    @functools.cached_property
    def _at(self) -> tuple[Any, Tensor, Tensor]:
        """The arguments of the table's formulas: loss, output and target, in float64 (int64 for whole numbers)."""
        wide = self.target.double() if self.target.is_floating_point() else self.target.long()
        return _twin(self._loss_fn, wide=True), self.output.double(), wide

    @functools.cached_property
    def _factor(self) -> Factor:
        if self._scale < 0:
            raise ValueError(
                f"The loss was multiplied by {self._scale:.3g} before backward(): a negative multiple of a convex loss "
                "has no positive semi-definite GGN. Multiply by a positive number, or ask for quantities of the "
                "gradient alone."
            )
        self._rule.check(self._loss_fn, self.output, self.target)
        with torch.no_grad():
            factor = Factor(self._finite("Hessian factor", self._rule.blocks(*self._at)), self.output.shape)
        if not self.plain:
            self._verify(factor)
        return factor

    def _verify(self, factor: Factor) -> None:
        """Raise ValueError unless the derivatives of the loss' value are those of the formulas."""
        precise, output, wide = self._at
        with torch.enable_grad():
            leaf = output.detach().requires_grad_()
            value = _call(precise, self._hooked)(leaf.clone(), wide)
            (actual,) = torch.autograd.grad(value, leaf, create_graph=True)
            u = pattern(leaf.shape, leaf)
            Hu = torch.autograd.grad(actual, leaf, u)[0] if actual.requires_grad else torch.zeros_like(u)
        with torch.no_grad():
            expected = self._finite("gradient", self._rule.gradient(*self._at))
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
            TypeError, ValueError: if the loss is not in the table, is not that of its formulas, or has no factor here.
        """
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
            if not self.plain or self._scale < 0:
                _ = self._factor  # its checks
            with torch.no_grad():
                return (self._rule.sample(*self._at, draws, generator) * self._scale**0.5).to(self._dtype)
        blocks = self.factor.blocks
        shape = (*blocks.shape[:2], blocks.shape[3], draws)
        signs = torch.randint(2, shape, generator=generator, device=source_of(generator, blocks)).to(blocks.device)
        return blocks @ (2 * signs - 1).to(blocks.dtype)


def plain_rule(loss_fn: Callable, hooked: bool) -> Known | None:
    """The table's entry for one of PyTorch's own losses, if nothing changes what it computes."""
    if type(loss_fn).__call__ is not nn.Module.__call__ or (hooked and user_hooks(loss_fn)):
        return None
    rule, runs = find_loss(loss_fn), getattr(loss_fn.forward, "__func__", None)  # type: ignore[attr-defined]
    return next((own for own, forward in _VERIFIED if rule is own and runs is forward), None)


def user_hooks(loss_fn: Any) -> list[Callable]:
    """Forward hooks and pre-hooks that act when a module is called, but for BackPACK's and ours."""
    if not isinstance(loss_fn, nn.Module):
        return []
    tables: list[Mapping[int, Callable]] = [loss_fn._forward_pre_hooks, loss_fn._forward_hooks]
    tables += [torch_module._global_forward_pre_hooks, torch_module._global_forward_hooks]
    return [hook for table in tables for hook in _of_users(table).values()]


def _of_users(hooks: Mapping[int, Callable]) -> dict[int, Callable]:
    ours = ("bncurv", "backpack")
    return {k: h for k, h in hooks.items() if (getattr(h, "__module__", None) or "").split(".")[0] not in ours}


def _call(loss_fn: Any, hooked: bool) -> Callable:
    """The loss with its forward hooks; or without, and without a trace on the module."""
    return loss_fn if hooked or not isinstance(loss_fn, nn.Module) else _twin(loss_fn).forward


def _twin(loss_fn: Any, wide: bool = False) -> Any:
    """A copy of a loss module with tensors of its own, floating-point ones in float64 if wide, and the users' hooks."""
    if not isinstance(loss_fn, nn.Module):
        return loss_fn

    def copied(entries: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: t.detach().to(torch.float64 if wide and t.is_floating_point() else t.dtype, copy=True)
            if isinstance(t, Tensor)
            else t
            for name, t in entries.items()
        }

    twin = copy.copy(loss_fn)
    twin.__dict__ |= copied(vars(loss_fn))
    twin.__dict__ |= {table: copied(getattr(loss_fn, table)) for table in ("_buffers", "_parameters")}
    twin.__dict__ |= {table: _of_users(getattr(loss_fn, table)) for table in ("_forward_hooks", "_forward_pre_hooks")}
    twin.__dict__["_modules"] = {name: _twin(child, wide) for name, child in loss_fn._modules.items()}
    return twin
