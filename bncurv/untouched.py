"""Leave no trace: what others hooked in is set aside meanwhile; buffers, gradients, random state are put back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from backpack import disable
from backpack.context import CTX
from backpack.utils.hooks import no_op
from torch import Tensor, nn

_depth = 0  # of `set_aside`


@contextmanager
def set_aside(parameters: Iterable[Tensor], modules: Iterable[nn.Module] = ()) -> Iterator[None]:
    """Keep BackPACK and backward hooks from acting on our passes.

    BackPACK neither stores inputs meanwhile nor deletes those that it has stored.

    Args:
        parameters: tensors whose hooks wait.
        modules: modules whose backward hooks stay off the graphs that are recorded meanwhile.
    """
    global _depth
    before = CTX.get_active_exts(), CTX.get_extension_hook(), CTX.get_retain_graph()
    hooks = [(p._backward_hooks, dict(p._backward_hooks)) for p in parameters if p._backward_hooks]
    hooks += _backward_hooks(modules)
    CTX.set_active_exts(())
    CTX.set_extension_hook(no_op)
    CTX.set_retain_graph(True)
    for table, _ in hooks:
        table.clear()
    _depth += 1
    try:
        with disable():
            yield
    finally:
        _depth -= 1
        for table, entries in hooks:
            table.update(entries)
        CTX.set_active_exts(before[0])
        CTX.set_extension_hook(before[1])
        CTX.set_retain_graph(before[2])


def _backward_hooks(modules: Iterable[nn.Module]) -> list[tuple[dict, dict]]:
    """The non-empty tables of backward hooks of modules, each with a copy of its entries."""
    return [(t, dict(t)) for m in modules for t in (m._backward_hooks, m._backward_pre_hooks) if t]


class _Resting:
    """A module's backward hook that rests while our passes run."""

    def __init__(self, hook: Callable) -> None:
        self._hook = hook

    def __call__(self, *args: Any) -> Any:
        return None if _depth else self._hook(*args)


@contextmanager
def resting_hooks(model: nn.Module) -> Iterator[None]:
    """Backward hooks that a forward pass in this block puts on its graph act in the user's passes only.

    Those of ``model`` itself are on their way to the graph when its forward begins, and are not reached.
    """
    hooks = _backward_hooks(model.modules())
    for table, entries in hooks:
        table.update({key: _Resting(hook) for key, hook in entries.items()})
    try:
        yield
    finally:
        for table, entries in hooks:
            table.update({key: hook for key, hook in entries.items() if key in table})


@contextmanager
def left_as_is(model: nn.Module) -> Iterator[None]:
    """Restore the model's buffers and the random state on leaving the block, whatever happens."""
    tables = [(m._buffers, dict(m._buffers)) for m in model.modules() if isinstance(m._buffers, dict)]
    values = [(b, b.clone()) for b in model.buffers()]
    devices = {p.device for p in model.parameters() if p.is_cuda}
    with torch.random.fork_rng(devices=[d.index for d in devices]):
        try:
            yield
        finally:
            for table, entries in tables:
                table.clear()
                table.update(entries)
            with torch.no_grad():
                for buffer, value in values:  # by value: batch_norm bumps no version of its running statistics
                    if not torch.equal(buffer, value):
                        buffer.data.copy_(value)


@contextmanager
def grads_kept(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Give tensors with ``retain_grad()`` the gradients back that they had before our passes."""
    before = [(t, t.grad) for t in tensors]
    try:
        yield
    finally:
        for t, grad in before:
            t.grad = grad
