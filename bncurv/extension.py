"""The BackPACK gesture: `extend` a model and a loss, then ``with backpack(...): loss.backward()``.

Extending adds a hook or two and nothing else. The model's forward records each forward pass (``recording.py``); the
loss' hooks have the active quantities run when the gradient of its value arrives in ``backward()`` (``backward.py``).
What a block ``with backpack(...)`` is to bncurv: ``context.py``.
"""

from __future__ import annotations

import threading
import weakref
from functools import partial
from typing import Any

from backpack import disable
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from bncurv.backward import LossCall, run
from bncurv.checks import check_modules
from bncurv.context import Extended, joins_backpack
from bncurv.losses import is_loss, output_and_target
from bncurv.marks import LOSS, metadata
from bncurv.recording import recorded

_ATTRIBUTE = "_bncurv"


def extend(module: nn.Module) -> nn.Module:
    """Make a model or a loss ready for bncurv's quantities inside BackPACK's ``with backpack(...)``.

    Only hooks (for a model, one around its ``forward``) are added; the module stays the same object, is neither
    converted nor copied, and works as before. Undo with `unextend`. Where a block needs BackPACK's hooks (for its own
    extensions or its ``extension_hook``), extended modules have them for as long as the block lasts.

    In ``backward()`` the active quantities raise RuntimeError unless it was called on a positive multiple of the loss.

    Args:
        module: the model (its root module), or the loss module.

    Returns:
        The same module.

    Example:
        >>> import torch
        >>> from backpack import backpack
        >>> from bncurv import DiagGGNExact, extend
        >>> model = extend(torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2)))
        >>> loss_fn = extend(torch.nn.CrossEntropyLoss())
        >>> with backpack(DiagGGNExact()):
        ...     loss_fn(model(torch.randn(8, 4)), torch.randint(2, (8,))).backward()
        >>> model[0].weight.diag_ggn_exact.shape
        torch.Size([3, 4])
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"extend got {type(module).__name__}; expected a torch.nn.Module (model or loss).")
    check_modules(module)
    extended = vars(module).get(_ATTRIBUTE)
    if extended is not None and extended.module is module:
        return module
    if extended is not None:
        _restore_forward(module, extended)  # a shallow copy of an extended module: its own from now on
    try:
        _add_hooks(module)
    except BaseException:
        unextend(module)
        raise
    joins_backpack(module)
    return module


def _add_hooks(module: nn.Module) -> None:
    extended = Extended(module)
    setattr(module, _ATTRIBUTE, extended)
    if is_loss(module):
        extended.handles.append(module.register_forward_pre_hook(_before_loss, with_kwargs=True))
        extended.handles.append(module.register_forward_hook(_after_loss, with_kwargs=True, prepend=True))
    else:
        extended.handles.append(module.register_forward_pre_hook(_refuse_shallow_copies))
        module.forward = partial(recorded, module)


def _refuse_shallow_copies(module: Any, args: tuple) -> None:
    extended = vars(module).get(_ATTRIBUTE)
    if extended is not None and extended.module is not module:
        raise RuntimeError(
            f"This {type(module).__name__} is a shallow copy of an extended one (copy.copy, or a replica of "
            "DataParallel), so it would run the other one's forward. Call bncurv.extend on it, or use copy.deepcopy."
        )


def _restore_forward(module: Any, extended: Extended) -> None:
    forward = vars(module).get("forward")
    if isinstance(forward, partial) and forward.func is recorded:
        del module.forward
        if extended.forward is not None:
            module.forward = extended.forward


def unextend(module: nn.Module) -> nn.Module:
    """Remove what `extend` added.

    Args:
        module: an extended model or loss; others are returned as they are.

    Returns:
        The same module.

    Example:
        >>> import torch, bncurv
        >>> model = torch.nn.Linear(4, 3)
        >>> bncurv.unextend(bncurv.extend(model)) is model
        True
    """
    extended = vars(module).get(_ATTRIBUTE)
    if extended is not None:
        for handle in extended.handles:
            handle.remove()
        _restore_forward(module, extended)
        delattr(module, _ATTRIBUTE)
    return module


def _before_loss(loss_fn: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """Keep the output as it is on the model's graph: a backward hook of the loss puts a node of its own in between."""
    output, _ = output_and_target(loss_fn, args, kwargs)
    if isinstance(output, Tensor):
        loss_fn._bncurv.arriving[threading.get_ident()] = weakref.ref(output)


def _after_loss(loss_fn: Any, args: tuple, kwargs: dict[str, Any], loss: Any) -> None:
    output, target = output_and_target(loss_fn, args, kwargs)
    arrived = loss_fn._bncurv.arriving.pop(threading.get_ident(), lambda: None)()
    if not isinstance(loss, Tensor) or loss.grad_fn is None or not disable.should_store_io():
        return
    call = LossCall(loss_fn, output, target)
    below = output.grad_fn if isinstance(output, Tensor) else None
    if below is not None and below.name() == "BackwardHookFunctionBackward" and output is not arrived:
        call.output = arrived
        if arrived is None or below.next_functions[0] != tuple(get_gradient_edge(arrived))[:2]:
            call.problem = "a forward pre-hook registered after bncurv.extend replaces its input: register that before"
    metadata(loss.grad_fn).setdefault(LOSS, []).append(call.token)  # not the call itself: it holds the graph
    loss.register_hook(partial(run, call))
