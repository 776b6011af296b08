"""The forward pass of an extended model: recorded, with a note at each tensor that it returns."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from backpack import disable
from torch import Tensor, nn
from torch.autograd.graph import Node

from bncurv.context import joins_backpack
from bncurv.marks import MODEL, RETAINED, metadata
from bncurv.nested import held
from bncurv.ranks import ALONE, Ranks, ranks_of, wrapper_of
from bncurv.record import Recorder
from bncurv.undo import Undo, without_trace
from bncurv.untouched import keep_modes


@dataclass(eq=False)
class Recording:
    """One forward pass of an extended model.

    Attributes:
        model: the model, weakly.
        joined: whether BackPACK's hooks were on its modules.
        disabled: whether BackPACK's ``disable()`` was in force, so that nothing was recorded.
        ranks: those that share its batch statistics.
        rests: whether backward hooks of its modules rest now.
    """

    model: weakref.ref[nn.Module]
    joined: bool
    disabled: bool
    ranks: Ranks = ALONE
    rests: bool = False


@torch._disable_dynamo  # torch.compile around an extended model runs it eagerly
def recorded(module: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward of an extended model; without gradients, and inside one that is recorded, it is the plain one."""
    forward = module._bncurv.plain(module)
    if Recorder.watches() or not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    disabled, ranks = not disable.should_store_io(), ranks_of(wrapper_of(module))
    recording = Recording(weakref.ref(module), joins_backpack(module), disabled, ranks)
    if recording.disabled:
        output = forward(*args, **kwargs)
    else:
        output = without_trace(partial(_watch, recording, module, partial(forward, *args, **kwargs)))
    for t in held(output):
        if t.grad_fn is not None:
            metadata(t.grad_fn)[MODEL] = recording
    return output


def _watch(recording: Recording, module: nn.Module, forward: Callable[[], Any], undo: Undo) -> Any:
    keep_modes(undo)
    recorder = Recorder(module, ranks=recording.ranks)
    undo.note(recorder.stop)
    for m in module.modules():
        for table in (m._backward_hooks, m._backward_pre_hooks):
            entries = dict(table)
            undo.note(partial(_wake, table, entries))
            table.update({key: _Resting(hook, recording) for key, hook in entries.items()})
    with recorder:
        return forward()


class _Resting:
    """A module's backward hook on the graph of a recording: it acts in the user's passes only.

    Hooks of the extended module itself are on their way to the graph when its forward begins, and are not reached.
    """

    def __init__(self, hook: Callable, recording: Recording) -> None:
        self._hook, self._recording = hook, recording

    def __call__(self, *args: Any) -> Any:
        return None if self._recording.rests else self._hook(*args)


def _wake(table: dict[int, Any], entries: dict[int, Any]) -> None:
    """The module's own hooks again, those that are still there."""
    table.update({key: hook for key, hook in entries.items() if isinstance(table.get(key), _Resting)})


def behind(output: Tensor) -> tuple[list[Recording], list[Tensor]]:
    """The recordings that ``output`` depends on, and the tensors on the way whose gradients are retained."""
    recordings: list[Recording] = []
    retained = [output] if output.retains_grad else []
    seen: set[Node] = set()
    stack = [output.grad_fn] if output.grad_fn is not None else []
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        notes = metadata(node)
        if MODEL in notes and notes[MODEL] not in recordings:
            recordings.append(notes[MODEL])
        retained += [t for t in (r() for r in notes.get(RETAINED, ())) if t is not None and t is not output]
        stack.extend(child for child, _ in node.next_functions if child is not None)
    return recordings, retained
