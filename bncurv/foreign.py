"""What others have hooked into a model, set aside while we run our own passes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from backpack import disable
from backpack.context import CTX
from backpack.utils.hooks import no_op
from torch import Tensor


@contextmanager
def set_aside(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Keep BackPACK and hooks on parameters from acting on our passes.

    BackPACK neither stores inputs meanwhile nor deletes those that it has stored.

    Args:
        parameters: the model's parameters, whose tensor hooks wait.
    """
    before = CTX.get_active_exts(), CTX.get_extension_hook(), CTX.get_retain_graph()
    hooks = [(p._backward_hooks, dict(p._backward_hooks)) for p in parameters if p._backward_hooks]
    CTX.set_active_exts(())
    CTX.set_extension_hook(no_op)
    CTX.set_retain_graph(True)
    for table, _ in hooks:
        table.clear()
    try:
        with disable():
            yield
    finally:
        for table, entries in hooks:
            table.update(entries)
        CTX.set_active_exts(before[0])
        CTX.set_extension_hook(before[1])
        CTX.set_retain_graph(before[2])
