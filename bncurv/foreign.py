"""BackPACK, set aside while we run our own passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from backpack import disable
from backpack.context import CTX
from backpack.utils.hooks import no_op


@contextmanager
def backpack_set_aside() -> Iterator[None]:
    """Keep BackPACK from acting on our passes, from storing inputs, and from deleting those that it has stored."""
    before = CTX.get_active_exts(), CTX.get_extension_hook(), CTX.get_retain_graph()
    CTX.set_active_exts(())
    CTX.set_extension_hook(no_op)
    CTX.set_retain_graph(True)
    try:
        with disable():
            yield
    finally:
        CTX.set_active_exts(before[0])
        CTX.set_extension_hook(before[1])
        CTX.set_retain_graph(before[2])
