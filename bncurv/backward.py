"""What happens in ``backward()`` when the gradient of an extended loss arrives: the active quantities run."""

from __future__ import annotations

import threading
import warnings
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bncurv.bars import tqdm
from bncurv.batch import compute
from bncurv.blocks import Batch
from bncurv.checks import check_output, check_own, check_quantities
from bncurv.composed import check_multiple, expect_gradient
from bncurv.context import active, foreign, ran
from bncurv.graph import trace
from bncurv.loss_at_batch import LossAtBatch
from bncurv.losses import check_loss
from bncurv.placement import check_placement
from bncurv.quantities import Quantity
from bncurv.ranks import ALONE, Ranks
from bncurv.recording import Recording, behind
from bncurv.sampling import generator_of_call
from bncurv.slow import user_level, warn_slow
from bncurv.spread import Indices
from bncurv.turns import in_engine_thread
from bncurv.undo import Undo, without_trace
from bncurv.untouched import (
    keep_attributes,
    keep_grads,
    keep_modes,
    keep_random_states,
    keep_tables,
    keep_values,
    quieten,
    rest_backpack,
    rest_hooks,
    rest_storing,
)

_NO_BAR = tqdm(disable=True)


@dataclass
class LossCall:
    """One call of an extended loss.

    Attributes:
        loss_fn: the loss.
        output: what it was called with, on the model's graph.
        target: likewise.
        thread: where it was called.
        token: stands at the node of its value.
        problem: why its value has no curvature here.
    """

    loss_fn: nn.Module
    output: Any
    target: Any
    thread: int = field(default_factory=threading.get_ident)
    token: object = field(default_factory=object)
    problem: str = ""


def run(call: LossCall, g: Tensor) -> None:
    """Compute the active quantities; called in ``backward()`` before the graph behind the loss is walked."""
    quantities = active(call.thread if in_engine_thread() else threading.get_ident())
    if not quantities:
        return
    check_quantities(quantities)
    loss, quantity = type(call.loss_fn).__name__, type(quantities[0]).__name__
    if call.problem:
        raise RuntimeError(f"{quantity}: {loss} has a backward hook, and {call.problem}.")
    recordings, retained = behind(call.output)
    ranks = recordings[0].ranks if recordings else ALONE
    with ranks.everybody.together():
        _run(call, g, quantities, recordings, retained, ranks)
    ran(quantities)


def _run(
    call: LossCall,
    g: Tensor,
    quantities: list[Quantity],
    recordings: list[Recording],
    retained: list[Tensor],
    ranks: Ranks,
) -> None:
    """Check, and compute."""
    loss, quantity = type(call.loss_fn).__name__, type(quantities[0]).__name__
    _check_models(recordings, loss, quantity)
    wanted = _parameters(recordings)
    for model in _models(recordings):
        check_placement(model, wanted)
    check_output(call.output, call.target, wanted)
    check_own(call.output, wanted, (p for model in _models(recordings) for p in model.parameters()))
    check_loss(call.loss_fn)
    if g.numel() != 1:
        raise ValueError(f"{loss} returned shape {tuple(g.shape)}; expected a scalar loss.")
    check_multiple(loss, call.token, call.thread, wanted.values())
    if torch.is_grad_enabled():
        _warn_of_detached(quantity)
    if retained:
        _warn_of_single_passes(retained, quantity)
    without_trace(partial(_compute, call, g, quantities, recordings, wanted, retained, ranks))


def _compute(
    call: LossCall,
    g: Tensor,
    quantities: list[Quantity],
    recordings: list[Recording],
    wanted: dict[str, Tensor],
    retained: list[Tensor],
    ranks: Ranks,
    undo: Undo,
) -> None:
    """All quantities, delivered to the parameters: all of them or none."""
    generator = generator_of_call(quantities, call.output.device, ranks.everybody.rank)
    grads = {name: p.grad for name, p in wanted.items() if not p._backward_hooks}  # .grad is what a hook makes of it
    delivered = keep_attributes(undo, wanted.values())
    _leave_as_is(undo, recordings, [*wanted.values(), *retained])
    with torch.enable_grad():
        scale = float(g) / ranks.everybody.size  # as DistributedDataParallel trains: the mean of the ranks' losses
        at_batch = LossAtBatch(call.loss_fn, call.output, call.target, scale)
        leaf = call.output.detach().requires_grad_()
        value = call.loss_fn.forward(leaf, call.target)
        (gradient,) = torch.autograd.grad(value, leaf, g.detach())  # in the loss' own dtype, to the bit
        found = trace(call.output, wanted.values())
        for gates in {site.coupling.gates for site in found.sites if site.mark.coupling}:
            undo.note(gates.open)
        check = expect_gradient(type(call.loss_fn).__name__, call.output, gradient, wanted, grads, quantities)
        spread = Indices(ranks.everybody).of(len(call.output), ranks)
        batch = Batch(
            call.output, at_batch, wanted, found, graph_survives=False, generator=generator, ranks=ranks, spread=spread
        )
        parts, _ = compute(batch, quantities, _NO_BAR, chunk_size=1 if retained else None)
    for q in quantities:
        q.deliver(q.fields(parts[q.field]), wanted)
    torch.autograd.Variable._execution_engine.queue_callback(check)
    delivered()


def _leave_as_is(undo: Undo, recordings: list[Recording], tensors: list[Tensor]) -> None:
    """What our passes through the user's graph must not change: recomputed parts run the model's code again."""
    keep_modes(undo)
    keep_random_states(undo, tensors)
    rest_backpack(undo)
    keep_grads(undo, tensors)
    rest_hooks(undo, tensors)
    for recording in recordings:
        undo.note(partial(setattr, recording, "rests", recording.rests))
        recording.rests = True
        model = recording.model()
        if model is not None:
            keep_tables(undo, model.modules())
            rest_storing(undo, model.modules())
            keep_values(undo, model.named_buffers())
            if any(m._backward_hooks for m in model.modules()):
                quieten(undo, "Full backward hook is firing when gradients are computed")


def _check_models(recordings: list[Recording], loss: str, quantity: str) -> None:
    """Raise RuntimeError unless an extended model made the output, with BackPACK's hooks where needed and no others."""
    if any(recording.disabled for recording in recordings):
        raise RuntimeError(
            f"{quantity} is active, but the forward pass of the output that {loss} received ran under BackPACK's "
            "disable(), so it was not recorded. Run it outside, or call the loss under disable() too."
        )
    if not recordings:
        raise RuntimeError(
            f"{quantity} is active, but the output that {loss} received comes from no extended model. Call "
            "model = bncurv.extend(model) before the forward pass, and give the loss what the model returns."
        )
    if foreign() and not all(recording.joined for recording in recordings):
        raise RuntimeError(
            f"BackPACK's {type(foreign()[0]).__name__} is active, but the forward pass ran outside the "
            "'with backpack(...)' block on a model without BackPACK's hooks. Run the forward pass inside the block, or "
            "call backpack.extend on the model and the loss as well."
        )
    for model in _models(recordings):
        if model._backward_pre_hooks:
            raise RuntimeError(
                f"{quantity}: the extended module {type(model).__name__} itself has a full backward pre-hook, which "
                "would act on bncurv's passes too. Remove it, hook its last layer instead, or use bncurv.curvature, "
                "which leaves hooks out."
            )


def _models(recordings: list[Recording]) -> list[nn.Module]:
    """The models that are still there, each once."""
    found = {id(model): model for model in (recording.model() for recording in recordings) if model is not None}
    return list(found.values())


def _parameters(recordings: list[Recording]) -> dict[str, Tensor]:
    """All parameters that require grad, by name; of several models with their number in front."""
    models = _models(recordings)
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


def _warn_of_detached(quantity: str) -> None:
    warnings.warn(
        f"backward(create_graph=True) keeps the graph of the gradients, but what bncurv stores ({quantity}) is "
        "detached: it cannot be differentiated again.",
        stacklevel=user_level(),
    )
