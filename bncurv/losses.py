"""Losses in closed form: gradient and Hessian factor (``factor.py``) of each, with the reduction inside.

The scale (1/N of a mean reduction, class weights, the number of targets that count) sits in the blocks; column
c = (t, j) of sample n is the j-th column of its position t. One class per loss; `register_loss` adds one. Any other
loss has its factor by autograd (``hessian.py``).
"""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from bncurv.factor import normal_columns, source_of


class Loss(ABC):
    """What bncurv needs to know of a loss; one subclass per loss module."""

    @abstractmethod
    def check(self, loss: nn.Module, output: Tensor, target: Tensor) -> None:
        """Raise ValueError where the shapes of output and target do not fit."""

    @abstractmethod
    def gradient(self, loss: nn.Module, output: Tensor, target: Tensor) -> Tensor:
        """∂L/∂F in closed form."""

    @abstractmethod
    def blocks(self, loss: nn.Module, output: Tensor, target: Tensor) -> Tensor:
        """Factor per position, ``[n, t, e, j]``."""

    def sample(
        self, loss: nn.Module, output: Tensor, target: Tensor, draws: int, generator: torch.Generator | None
    ) -> Tensor:
        """Gradient deviations for labels drawn from the model, ``[n, t, e, draw]``, with covariance H per position.

        Default: normally distributed (the predictive distribution of a squared error).
        """
        return normal_columns(self.blocks(loss, output, target), draws, generator)


class Known(Loss):
    """A loss of PyTorch's own."""

    def divisor(self, loss: nn.Module, output: Tensor, target: Tensor) -> float:
        """What ``reduction="mean"`` divides by."""
        return float(output.numel())


def _same_shape(loss: nn.Module, output: Tensor, target: Tensor) -> None:
    if output.shape != target.shape:
        raise ValueError(
            f"{type(loss).__name__} got a model output of shape {tuple(output.shape)} and a target of shape "
            f"{tuple(target.shape)}; they must be equal (broadcasting would mix samples). Reshape the target."
        )


class CrossEntropy(Known):
    """``-Σ_e q_e log p_e`` at each position, q = weighted, smoothed target; H = (Σq)(diag p - p pᵀ)."""

    def check(self, loss, output, target):
        hard = not target.is_floating_point()
        if hard and target.dtype not in (torch.int64, torch.uint8):
            raise TypeError(
                f"CrossEntropyLoss got a target of dtype {target.dtype}; expected class indices in int64 or uint8, or "
                "class probabilities in a floating dtype. Convert it, e.g. y.long()."
            )
        if output.dim() < 2:
            raise ValueError(
                f"CrossEntropyLoss got a model output of shape {tuple(output.shape)}; expected [N, C, ...] "
                "with the batch first and the classes second."
            )
        expected = (output.shape[0], *output.shape[2:]) if hard else tuple(output.shape)
        if tuple(target.shape) != expected:
            kind = "class indices" if hard else "class probabilities"
            raise ValueError(
                f"CrossEntropyLoss got a model output of shape {tuple(output.shape)} and a target ({kind}) of shape "
                f"{tuple(target.shape)}; expected {expected}. Reshape the target."
            )

    def divisor(self, loss, output, target):
        """The positions; of class indices, the weights of those that are not ignored."""
        return output.numel() / output.shape[1] if target.is_floating_point() else float(self._weighed(loss, target))

    def _weighed(self, loss: Any, target: Tensor) -> Tensor:
        """Σ of the weights of class indices."""
        counts = target != loss.ignore_index
        return counts.sum() if loss.weight is None else (loss.weight[torch.where(counts, target, 0)] * counts).sum()

    def _coefficients(self, loss: Any, output: Tensor, target: Tensor) -> Tensor:
        """Q of each position, ``[n, *t, e]``, reduction included; zeros for a mean over nothing."""
        classes, eps = output.shape[1], loss.label_smoothing
        weight = output.new_ones(classes) if loss.weight is None else loss.weight
        if target.is_floating_point():
            soft = torch.movedim(target, 1, -1) * (1 - eps) + eps / classes
            q = soft * weight
        else:
            counts = target != loss.ignore_index
            hot = nnf.one_hot(torch.where(counts, target, 0), classes).to(output.dtype)
            soft = hot * (1 - eps) + eps / classes
            q = soft * weight * counts[..., None]
        return q / self.divisor(loss, output, target) if loss.reduction == "mean" and bool(q.any()) else q

    def gradient(self, loss, output, target):
        q, p = self._coefficients(loss, output, target), torch.movedim(output.softmax(1), 1, -1)
        return torch.movedim(q.sum(-1, keepdim=True) * p - q, -1, 1)

    def blocks(self, loss, output, target):
        # diag p - p pᵀ = L Lᵀ, L lower triangular with a zero last column (Tanabe & Sagae 1992, J. R. Stat. Soc. B 54):
        # tail r_j = Σ_{i>j} p_i,  L_jj² = p_j r_j / r_{j-1},  L_ij = -(p_i / r_j) L_jj  for i > j;  C - 1 columns
        q = self._coefficients(loss, output, target).reshape(len(output), -1, output.shape[1])
        scale = q.sum(-1)
        if bool((scale < 0).any()):
            raise ValueError(
                "CrossEntropyLoss: targets or class weights sum to a negative number, so the loss is not convex in "
                "the model's output and has no GGN. Pass non-negative weights and probabilities."
            )
        p = torch.movedim(output.softmax(1), 1, -1).reshape(q.shape)
        tail = p.flip(-1).cumsum(-1).flip(-1)  # r_{j-1} at index j
        rest = tail[..., 1:]
        diagonal = (p[..., :-1] * (rest / tail[..., :-1])).sqrt().nan_to_num(0.0)
        ratio = (p[..., :, None] / -rest[..., None, :]).nan_to_num_(0.0, neginf=0.0).tril_(-1)
        ratio.diagonal(dim1=-2, dim2=-1).fill_(1)
        return ratio * (diagonal * scale[..., None].sqrt())[..., None, :]

    def sample(self, loss, output, target, draws, generator):
        # ŷ ~ p at each position:  E[(p - e_ŷ)(p - e_ŷ)ᵀ] = diag p - p pᵀ
        scale = self._coefficients(loss, output, target).sum(-1).reshape(len(output), -1)
        p = torch.movedim(output.softmax(1), 1, -1).reshape(*scale.shape, -1)
        there = p.flatten(0, 1).to(source_of(generator, p))
        labels = torch.multinomial(there, draws, replacement=True, generator=generator).to(p.device)
        hot = nnf.one_hot(labels.view(*scale.shape, draws), p.shape[-1]).to(p.dtype)
        return scale[..., None, None].sqrt() * (p[..., None] - hot.mT)


class _Elementwise(Known):
    """Every output entry is its own position: e = j = 1."""

    def check(self, loss, output, target):
        _same_shape(loss, output, target)

    @abstractmethod
    def curvature(self, loss: nn.Module, output: Tensor, target: Tensor) -> Tensor:
        """Second derivative per entry, reduction included."""

    def blocks(self, loss, output, target):
        second = self.curvature(loss, output, target)
        if bool((second < 0).any()):
            raise ValueError(
                f"{type(loss).__name__}: negative weights make the loss non-convex in the model's output, so it has "
                "no GGN. Pass non-negative weights."
            )
        return second.reshape(len(second), -1, 1, 1).sqrt()


def _reduction_scale(loss: nn.Module, output: Tensor) -> float:
    return 1 / output.numel() if loss.reduction == "mean" else 1.0


class SquaredError(_Elementwise):
    """``(F - y)²``; H = 2 (mean: over all N·C entries)."""

    def gradient(self, loss, output, target):
        return 2 * (output - target) * _reduction_scale(loss, output)

    def curvature(self, loss, output, target):
        return torch.full_like(output, 2 * _reduction_scale(loss, output))


class BinaryCrossEntropy(_Elementwise):
    """``-w (v y log σ + (1 - y) log(1 - σ))``, v = pos_weight; H = w (v y + 1 - y) σ (1 - σ)."""

    def check(self, loss, output, target):
        super().check(loss, output, target)
        if not target.is_floating_point():
            raise TypeError(
                f"BCEWithLogitsLoss got a target of dtype {target.dtype}; expected probabilities in a floating dtype. "
                "Convert it, e.g. y.float()."
            )

    def _scale(self, loss: Any, output: Tensor, target: Tensor) -> tuple[Tensor | float, Tensor | float]:
        weight = _reduction_scale(loss, output) * (1.0 if loss.weight is None else loss.weight)
        return weight, (1.0 if loss.pos_weight is None else loss.pos_weight)

    def gradient(self, loss, output, target):
        weight, v = self._scale(loss, output, target)
        p = output.sigmoid()
        return weight * ((1 - target) * p - v * target * (1 - p))

    def curvature(self, loss, output, target):
        weight, v = self._scale(loss, output, target)
        return weight * (v * target + 1 - target) * output.sigmoid() * (-output).sigmoid()

    def sample(self, loss, output, target, draws, generator):
        # y ~ Bernoulli(σ):  Var[σ - y] = σ (1 - σ)
        weight, v = self._scale(loss, output, target)
        scale = (weight * (v * target + 1 - target) * torch.ones_like(output)).sqrt()[..., None]
        p = output.sigmoid()[..., None]
        where = source_of(generator, p)
        uniform = torch.rand(*output.shape, draws, generator=generator, device=where, dtype=p.dtype).to(p.device)
        return (scale * (p - (uniform < p).to(p.dtype))).flatten(1, -2).unsqueeze(2)


PYTORCHS: dict[type[nn.Module], Known] = {
    nn.CrossEntropyLoss: CrossEntropy(),
    nn.MSELoss: SquaredError(),
    nn.BCEWithLogitsLoss: BinaryCrossEntropy(),
}
LOSSES: dict[type[nn.Module], Loss] = dict(PYTORCHS)


def register_loss(module_class: type[nn.Module], loss: Loss) -> None:
    """Teach bncurv the Hessian of a loss module. Gradients need no such help: any loss has them by autograd.

    Args:
        module_class: class of the loss module, called as ``loss_fn(output, target)``.
        loss: its gradient and Hessian factor; both are checked against autograd wherever the factor is used.

    Example:
        >>> import torch, bncurv
        >>> from bncurv.losses import Loss
        >>> class HalfSquares(torch.nn.Module):
        ...     def forward(self, output, target):
        ...         return (output - target).square().sum() / 2
        >>> class Identity(Loss):  # its Hessian
        ...     def check(self, loss, output, target):
        ...         pass
        ...     def gradient(self, loss, output, target):
        ...         return output - target
        ...     def blocks(self, loss, output, target):  # [n, position, entry, column]
        ...         return torch.ones_like(output).reshape(len(output), -1, 1, 1)
        >>> bncurv.register_loss(HalfSquares, Identity())
        >>> batch = torch.randn(8, 4), torch.randn(8, 2)
        >>> res = bncurv.curvature(torch.nn.Linear(4, 2), HalfSquares(), batch, bncurv.DiagGGNExact())
        >>> torch.allclose(res.diag_ggn_exact["weight"][0], batch[0].square().sum(0))
        True
    """
    LOSSES[module_class] = loss


def is_loss(module: nn.Module) -> bool:
    """Whether a module is a loss rather than a model: in the table, one of PyTorch's, or without any parameter."""
    return isinstance(module, (*LOSSES, nn.modules.loss._Loss)) or next(module.parameters(), None) is None


def output_and_target(loss_fn: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """The first two of a loss' arguments, given by position or by whatever name."""
    if len(args) > 1:
        return args[0], args[1]
    given = inspect.signature(loss_fn.forward).bind(*args, **kwargs)
    output, target = [*given.args, *given.kwargs.values(), None, None][:2]
    return output, target


def name_of(loss_fn: Callable) -> str:
    """What messages call a loss: its class, or a function's name."""
    if isinstance(loss_fn, functools.partial):
        return name_of(loss_fn.func)
    return getattr(loss_fn, "__name__", type(loss_fn).__name__)


def check_loss(loss_fn: Any) -> None:
    """Raise unless a loss can be called and, if it is one of PyTorch's, reduces to a scalar.

    Raises:
        TypeError: if it cannot be called with an output and a target.
        ValueError: if it does not reduce to a scalar.
    """
    if isinstance(loss_fn, type) or not callable(loss_fn):
        hint = f"{loss_fn.__name__}()" if isinstance(loss_fn, type) else "nn.CrossEntropyLoss()"
        raise TypeError(f"loss_fn is {loss_fn!r}; expected a loss module or a function of (output, y), e.g. {hint}.")
    if isinstance(loss_fn, nn.modules.loss._Loss) and loss_fn.reduction == "none":
        raise ValueError(
            f"{name_of(loss_fn)} has reduction='none'; expected 'mean' or 'sum', because the curvature is that of one "
            "scalar. Construct the loss with reduction='mean' or 'sum'."
        )


def find_loss(loss_fn: Callable) -> Loss | None:
    """The table's entry for a loss module, if there is one."""
    return next((LOSSES[cls] for cls in type(loss_fn).__mro__ if cls in LOSSES), None)


def is_inherited(loss_fn: Callable) -> bool:
    """Whether the table's entry for a loss is of a class of PyTorch's that it is, or derives from."""
    known = next((cls for cls in type(loss_fn).__mro__ if cls in LOSSES), None)
    return known in PYTORCHS and LOSSES[known] is PYTORCHS[known]
