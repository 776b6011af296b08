"""The BackPACK gesture: `extend` a model and a loss, then ``with backpack(...): loss.backward()``.

Extending adds a hook or two and nothing else. The model's forward records each forward pass (``record.py``); the loss'
hook runs, when the gradient of the loss value arrives in ``backward()``, the quantities that are active in BackPACK's
context and stores the results on the parameters.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import backpack as backpack_package
import torch
from backpack.context import CTX
from torch import Tensor, nn
from tqdm import tqdm

from bncurv.batch import compute
from bncurv.blocks import Batch
from bncurv.checks import check_output, check_quantities
from bncurv.graph import behind, trace
from bncurv.loss_at_batch import LossAtBatch
from bncurv.losses import check_loss, is_loss, output_and_target
from bncurv.marks import MODEL, metadata
from bncurv.quantities import Quantity
from bncurv.record import Recorder
from bncurv.sampling import generator_of_call
from bncurv.slow import warn_slow
from bncurv.untouched import grads_kept, resting_hooks, set_aside

_ATTRIBUTE = "_bncurv_hooks"


def extend(module: nn.Module) -> nn.Module:
    """Make a model or a loss ready for bncurv's quantities inside BackPACK's ``with backpack(...)``.

    Only hooks (for a model, one around its ``forward``) are added; the module stays the same object, is neither
    converted nor copied, and works as before. Undo with `unextend`.

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
    if hasattr(module, _ATTRIBUTE):
        return module
    if is_loss(module):
        handles = [
            module.register_forward_pre_hook(_join_backpack),
            module.register_forward_hook(_after_loss, with_kwargs=True),
        ]
    else:
        handles = [module.register_forward_pre_hook(_join_backpack)]
        _wrap_forward(module)
    setattr(module, _ATTRIBUTE, handles)
    return module


def unextend(module: nn.Module) -> nn.Module:
    """Remove what `extend` added, BackPACK's hooks included where bncurv had them installed.

    Args:
        module: an extended model or loss; others are returned as they are.

    Returns:
        The same module.
    """
    for handle in getattr(module, _ATTRIBUTE, ()):
        handle.remove()
    if hasattr(module, _ATTRIBUTE):
        own = module.__dict__.pop("_bncurv_forward", None)
        if module.__dict__.pop("forward", None) and own is not None:
            module.forward = own
        if getattr(module, "_bncurv_backpack", False):
            for part in module.modules():
                part.__dict__.pop("_backpack_extend", None)
            del module._bncurv_backpack
        delattr(module, _ATTRIBUTE)
    return module


# -------------------------------------------------------------------- forward
_recording = False  # whether an extended model is running now (those inside it need no recorder of their own)


def _wrap_forward(module: Any) -> None:
    module._bncurv_forward = module.__dict__.get("forward")  # somebody's own instance attribute, mostly None
    module.forward = functools.partial(_recorded, module)


@torch._disable_dynamo  # torch.compile around an extended model runs it eagerly
def _recorded(module: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward of an extended model. Not a pair of hooks: those are left dangling by a KeyboardInterrupt."""
    global _recording
    forward = module._bncurv_forward or functools.partial(type(module).forward, module)
    if _recording or not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    _recording = True
    try:
        with Recorder(module), resting_hooks(module):
            output = forward(*args, **kwargs)
    finally:
        _recording = False
    if isinstance(output, Tensor) and output.grad_fn is not None:
        metadata(output.grad_fn)[MODEL] = weakref.ref(module)
    return output


def _foreign() -> list[Any]:
    """Active BackPACK extensions that are not ours."""
    return [e for e in CTX.get_active_exts() if not isinstance(e, Quantity)]


def _join_backpack(module: Any, args: tuple) -> None:
    """Beside BackPACK's own extensions its hooks are needed too; they refuse in-place layers, so only then."""
    if _foreign() and not any(hasattr(m, "_backpack_extend") for m in module.modules()):
        before = len(CTX.hook_handles)
        backpack_package.extend(module)
        getattr(module, _ATTRIBUTE).extend(CTX.hook_handles[before:])
        module._bncurv_backpack = True


# -------------------------------------------------------------------- backward
def _after_loss(loss_fn: nn.Module, args: tuple, kwargs: dict[str, Any], loss: Any) -> None:
    output, target = output_and_target(loss_fn, args, kwargs)
    if isinstance(loss, Tensor) and loss.requires_grad:
        loss.register_hook(lambda g: _run(loss_fn, output, target, g))


def _run(loss_fn: nn.Module, output: Any, target: Any, g: Tensor) -> None:
    """Compute the active quantities; called in ``backward()`` before the graph behind the loss is walked."""
    quantities = [e for e in CTX.get_active_exts() if isinstance(e, Quantity)]
    if not quantities:
        return
    check_quantities(quantities)
    models, retained = behind(output)
    _check_models(models, type(loss_fn).__name__, type(quantities[0]).__name__)
    wanted = _parameters(models)
    check_output(output, target, wanted)
    check_loss(loss_fn)
    if g.numel() != 1:
        raise ValueError(f"{type(loss_fn).__name__} returned shape {tuple(g.shape)}; expected a scalar loss.")
    if retained:
        _warn_of_single_passes(retained, type(quantities[0]).__name__)
    unhooked = {name: p for name, p in wanted.items() if not p._backward_hooks}  # .grad is what a hook makes of it
    with set_aside(wanted.values()), grads_kept(retained), torch.enable_grad():
        at_batch = LossAtBatch(loss_fn, output, target, float(g))
        leaf = output.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss_fn.forward(leaf, target), leaf, g)  # in the loss' own dtype, to the bit
        _expect_gradient(loss_fn, output, gradient, unhooked, quantities)
        with tqdm(disable=True) as bar:
            generator = generator_of_call(quantities, output.device)
            traced = trace(output, wanted.values())
            batch = Batch(output, at_batch, wanted, traced, graph_survives=False, generator=generator)
            parts, _ = compute(batch, quantities, bar, chunk_size=1 if retained else None)
    for q in quantities:
        q.runs += 1
        q.deliver(q.fields(parts[q.field]), wanted)


def _check_models(models: list[nn.Module], loss: str, quantity: str) -> None:
    """Raise RuntimeError unless an extended model made the output, with BackPACK's hooks where needed and no others."""
    if not models:
        raise RuntimeError(
            f"{quantity} is active, but the output that {loss} received comes from no extended model. Call "
            "model = bncurv.extend(model) before the forward pass."
        )
    if _foreign() and not any(hasattr(m, "_backpack_extend") for model in models for m in model.modules()):
        raise RuntimeError(
            f"BackPACK's {type(_foreign()[0]).__name__} is active, but the forward pass ran outside the "
            "'with backpack(...)' block on a model without BackPACK's hooks. Run the forward pass inside the block, or "
            "call backpack.extend on the model and the loss as well."
        )
    for model in models:
        if model._backward_pre_hooks:
            raise RuntimeError(
                f"{quantity}: the extended module {type(model).__name__} itself has a full backward pre-hook, which "
                "would act on bncurv's passes too. Remove it, hook its last layer instead, or use bncurv.curvature, "
                "which leaves hooks out."
            )


def _parameters(models: list[nn.Module]) -> dict[str, Tensor]:
    """All parameters that require grad, by name; of several models with their number in front."""
    return {
        (f"{i}." if len(models) > 1 else "") + name: p
        for i, model in enumerate(models)
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def _warn_of_single_passes(retained: list[Tensor], quantity: str) -> None:
    shapes = ", ".join(str(tuple(t.shape)) for t in retained)
    warn_slow(
        f"retain_grad() was called on tensor(s) of shape {shapes} in the model, so the backward passes for {quantity} "
        "go one by one: exact, but slow. Leave it out, or use bncurv.curvature."
    )


def _expect_gradient(
    loss_fn: nn.Module, output: Tensor, gradient: Tensor, wanted: dict[str, Tensor], quantities: list[Quantity]
) -> None:
    """When ``backward()`` ends, ``.grad`` must have grown by this loss' gradient: else the loss was composed."""
    if not wanted:
        return
    names = list(wanted)
    before = [(p.grad, None if p.grad is None else p.grad._version) for p in wanted.values()]
    values = [None if p.grad is None else p.grad.clone() for p in wanted.values()]
    expected = torch.autograd.grad(
        output, list(wanted.values()), gradient, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    # same kernels as backward()'s: equal to rounding; for a zero gradient (bias before a BatchNorm) to the whole's
    relative = 1e-9 if gradient.dtype == torch.float64 else 1e-4
    whole = torch.stack([own.norm() for own in expected]).norm()

    def check() -> None:
        for name, (grad, version), value, own in zip(names, before, values, expected, strict=True):
            p = wanted[name]
            if p.grad is None or (p.grad is grad and p.grad._version == version):
                continue  # torch.autograd.grad, or backward(inputs=...): nothing was accumulated here
            grown = p.grad if value is None else p.grad - value
            scale = own.norm() + (0 if value is None else value.norm())
            if not (grown - own).norm() <= relative * (scale + 0.1 * whole):
                for q in quantities:
                    q.withdraw(wanted)
                raise RuntimeError(
                    f"backward() gave '{name}' a gradient that is not that of {type(loss_fn).__name__} alone (relative "
                    f"difference {float((grown - own).norm() / (scale + 0.1 * whole)):.1e}): the loss was composed "
                    "with other terms, whose curvature bncurv does not know, or a module's backward hook changes "
                    "gradients. Call backward() on the extended loss (times a positive number, if you like), and add "
                    "the gradient of other terms in a backward() outside the block; for hooks use bncurv.curvature, "
                    "which leaves them out."
                )

    torch.autograd.Variable._execution_engine.queue_callback(check)


# -------------------------------------------------------------------- context
def _watch_context() -> None:
    """Let BackPACK's context manager say so when a bncurv quantity inside it never ran.

    Without an extended module no hook of ours is ever called, and the user would meet a bare AttributeError.
    """
    context = backpack_package.backpack
    enter, leave = context.__enter__, context.__exit__

    @functools.wraps(enter)
    def entered(self: Any) -> Any:
        self._bncurv_runs = {q: q.runs for q in self.exts if isinstance(q, Quantity)}
        return enter(self)

    @functools.wraps(leave)
    def left(self: Any, exc_type: Any, exc_value: Any, traceback: Any) -> None:
        leave(self, exc_type, exc_value, traceback)
        idle = [type(q).__name__ for q, runs in self._bncurv_runs.items() if q.runs == runs]
        if exc_type is None and idle:
            raise RuntimeError(
                f"{', '.join(idle)} did not run inside this 'with backpack(...)' block: no backward pass of an "
                "extended loss took place. Call model = bncurv.extend(model) and loss_fn = bncurv.extend(loss_fn), "
                "and run loss_fn(model(X), y).backward() inside the block."
            )

    context.__enter__, context.__exit__ = entered, left


_watch_context()
