"""Calling a loss: with its forward hooks or without, in another dtype, and without a trace on a module."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from bncurv.losses import PYTORCHS, Known, find_loss
from bncurv.nested import mapped

# What PyTorch runs for its own modules: their formulas are held against autograd by the tests, not at every use
_VERIFIED = [(rule, module_class.forward) for module_class, rule in PYTORCHS.items()]
_MODULE_OF: dict[Callable, type[nn.Module]] = {
    nnf.cross_entropy: nn.CrossEntropyLoss,
    nnf.mse_loss: nn.MSELoss,
    nnf.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
}


def as_module(loss_fn: Any) -> Any:
    """The module that a function of PyTorch's, or a ``partial`` of it, stands for; other losses as they are."""
    partial = loss_fn if isinstance(loss_fn, functools.partial) else functools.partial(loss_fn)
    function = partial.func
    kind = _MODULE_OF.get(function) if isinstance(function, type(nnf.mse_loss)) else None
    options = partial.keywords
    if kind is None or partial.args or options.get("reduction", "mean") not in ("mean", "sum"):
        return loss_fn
    if not options.keys() <= {"weight", "pos_weight", "ignore_index", "label_smoothing", "reduction"}:
        return loss_fn
    try:
        return kind(**options)
    except TypeError:  # an option that the module does not have
        return loss_fn


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


def callable_of(loss_fn: Any, hooked: bool) -> Callable:
    """The loss with its forward hooks; or without, and without a trace on the module."""
    return loss_fn if hooked or not isinstance(loss_fn, nn.Module) else twin(loss_fn).forward


def cast(value: Any, dtype: torch.dtype | None) -> Any:
    """A tensor, or those in containers, in another dtype if floating-point; everything else as it is."""
    return mapped(lambda t: t.to(dtype) if dtype is not None and t.is_floating_point() else t, value)


def twin(loss_fn: Any, dtype: torch.dtype | None = None) -> Any:
    """A copy of a loss module with tensors of its own, floating-point ones in ``dtype``, and the users' hooks.

    Of a ``partial`` with its arguments likewise; other functions as they are.
    """
    if isinstance(loss_fn, functools.partial):
        return functools.partial(twin(loss_fn.func, dtype), *cast(loss_fn.args, dtype), **cast(loss_fn.keywords, dtype))
    if not isinstance(loss_fn, nn.Module):
        return loss_fn

    def copied(entries: Mapping[str, Any]) -> dict[str, Any]:
        return {name: cast(t.detach().clone(), dtype) if isinstance(t, Tensor) else t for name, t in entries.items()}

    other = copy.copy(loss_fn)
    other.__dict__ |= copied(vars(loss_fn))
    other.__dict__ |= {table: copied(getattr(loss_fn, table)) for table in ("_buffers", "_parameters")}
    other.__dict__ |= {table: _of_users(getattr(loss_fn, table)) for table in ("_forward_hooks", "_forward_pre_hooks")}
    other.__dict__["_modules"] = {name: twin(child, dtype) for name, child in loss_fn._modules.items()}
    return other
