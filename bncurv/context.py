"""BackPACK's blocks ``with backpack(...)``, as bncurv takes part in them.

BackPACK tells its extensions nothing of where a block begins and ends. Importing bncurv therefore replaces
``backpack.backpack.__enter__`` and ``__exit__`` (`watch_blocks`, called in ``bncurv/__init__.py``) by functions that
call BackPACK's and, around that,

- let blocks of different threads wait for one another (``turns.py``),
- give the extended modules BackPACK's hooks, where the block needs them, for as long as it lasts,
- complain at the end of a block about a quantity of bncurv that never ran in it.
"""

from __future__ import annotations

import functools
import re
import threading
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import backpack as backpack_package
from backpack.context import CTX
from backpack.extensions.curvmatprod import GGNMP, HMP, PCHMP
from backpack.utils.hooks import no_op
from backpack.utils.module_classification import is_no_op
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bncurv.quantities import Quantity
from bncurv.turns import take_turn
from bncurv.undo import Undo

_BLOCKS: list[Block] = []  # those open, innermost last; all of one thread
_JOINED = "_backpack_extend"  # BackPACK's own mark of a module with its hooks


class Extended:
    """What `extend` added to one module; copies of the module have their own.

    Attributes:
        module: the module.
        forward: a ``forward`` of the user's own on the instance.
        handles: the hooks.
        arriving: what a loss is called with, by thread.
    """

    everywhere: weakref.WeakValueDictionary[int, Extended] = weakref.WeakValueDictionary()

    def __init__(self, module: nn.Module) -> None:
        self.module, self.forward = module, module.__dict__.get("forward")
        self.handles: list[RemovableHandle] = []
        self.arriving: dict[int, weakref.ref[Tensor]] = {}
        Extended.everywhere[id(self)] = self

    def plain(self, module: nn.Module) -> Callable[..., Any]:
        """The forward of the module, or of a copy, without the extension."""
        return self.forward or partial(type(module).forward, module)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "arriving": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        Extended.everywhere[id(self)] = self


class Block:
    """One ``with backpack(...)`` that is open.

    Attributes:
        thread: whose it is.
        ran: ids of the quantities that ran in it.
        ended_well: whether it ended without an exception.
        undo: its end.
    """

    def __init__(self, context: Any) -> None:
        self.context, self.thread, self.undo = context, threading.get_ident(), Undo()
        self.ran, self.ended_well = set[int](), False

    def enter(self) -> None:
        """Before BackPACK's own beginning."""
        self.undo.note(lambda: _BLOCKS.remove(self) if self in _BLOCKS else None)
        take_turn(self.undo, "a block 'with backpack(...)'")
        for name in ("active_exts", "debug", "extension_hook", "retain_graph"):
            self.undo.note(partial(setattr, CTX, name, getattr(CTX, name)))
        _BLOCKS.append(self)
        for extended in [ref() for ref in Extended.everywhere.valuerefs()] if self.needs_backpack else ():
            if extended is not None:
                self.join(extended.module, parts=False)

    @property
    def needs_backpack(self) -> bool:
        """Whether something in it is BackPACK's own."""
        return bool(foreign(self.context.exts)) or self.context.extension_hook is not no_op

    def join(self, module: nn.Module, parts: bool = True) -> None:
        """Give a module, and its parts, BackPACK's hooks until the block ends.

        BackPACK refuses some modules, so only where needed. A module's own must be there before it is called.
        """
        bare = [(m, set(vars(m))) for m in (module.modules() if parts else [module]) if not hasattr(m, _JOINED)]
        self.undo.note(partial(self._part, bare))
        if parts:
            backpack_package.extend(module)
        elif bare and not is_no_op(module):
            backpack_package._register_hooks(module)
            setattr(module, _JOINED, True)

    def _part(self, bare: list[tuple[nn.Module, set[str]]]) -> None:
        """Take BackPACK's hooks out of modules that had none (with their attributes then), and what they stored.

        The products that some extensions leave on the parameters go on using that.
        """
        hooks = backpack_package.hook_store_io, backpack_package.hook_run_extensions
        tables = [table for m, _ in bare for table in (m._forward_hooks, m._backward_hooks)]
        keys = {key for table in tables for key, hook in list(table.items()) if hook in hooks}
        CTX.hook_handles[:] = [handle for handle in CTX.hook_handles if handle.id not in keys]
        for table in tables:  # a thread that trains beside may be taking out the same: no key is sure to be there
            for key in keys:
                table.pop(key, None)
        used_later = self.ended_well and any(isinstance(e, (HMP, GGNMP, PCHMP)) for e in self.context.exts)
        stored = _JOINED if used_later else rf"{_JOINED}|output|input\d+"
        for m, attributes in bare:
            for name in set(vars(m)) - attributes:
                if re.fullmatch(stored, name):
                    vars(m).pop(name, None)

    def complain(self) -> None:
        """Raise RuntimeError if a quantity never ran."""
        idle = [type(q).__name__ for q in self.context.exts if isinstance(q, Quantity) and id(q) not in self.ran]
        if idle:
            raise RuntimeError(
                f"{', '.join(idle)} did not run inside this 'with backpack(...)' block: no backward pass of an "
                "extended loss took place. Call model = bncurv.extend(model) and loss_fn = bncurv.extend(loss_fn), "
                "and run loss_fn(model(X), y).backward() inside the block (not under BackPACK's disable())."
            )


def foreign(extensions: Iterable[Any] | None = None) -> list[Any]:
    """BackPACK's own extensions (default: among those active)."""
    return [e for e in (CTX.get_active_exts() if extensions is None else extensions) if not isinstance(e, Quantity)]


def active(thread: int) -> list[Quantity]:
    """The active quantities of a thread."""
    if _BLOCKS and _BLOCKS[-1].thread != thread:
        return []
    return [e for e in CTX.get_active_exts() if isinstance(e, Quantity)]


def joins_backpack(module: nn.Module) -> bool:
    """Whether the parts of a module have BackPACK's hooks; in an open block that needs them, they get them."""
    if _BLOCKS and _BLOCKS[-1].thread == threading.get_ident() and _BLOCKS[-1].needs_backpack:
        _BLOCKS[-1].join(module)
    return any(hasattr(m, _JOINED) for m in module.modules())


def ran(quantities: Iterable[Quantity]) -> None:
    """These quantities have run."""
    for block in _BLOCKS:
        block.ran.update(map(id, quantities))


class _Exit(functools.partial):
    """What a ``with`` statement calls at its end, from C. Dropped because Ctrl-C came just then, it ends its block."""

    def __del__(self) -> None:
        self.args[0].undo.run()


class _ExitOf:
    """``backpack.__exit__``. A ``with`` statement looks it up before it enters, so a block begins here."""

    def __init__(self, leave: Callable[..., None]) -> None:
        self._leave = leave

    def __get__(self, context: Any, owner: type) -> Callable[..., None]:
        if context is None:
            return lambda context, *exc: self._end(Block(context), *exc)
        context._bncurv_next = Block(context)
        return _Exit(self._end, context._bncurv_next)

    def _end(self, block: Block, exc_type: Any, exc_value: Any, traceback: Any) -> None:
        try:
            if block not in _BLOCKS:  # looked up by hand, after it was entered
                block = next((b for b in reversed(_BLOCKS) if b.context is block.context), block)
            try:
                block.ended_well = exc_type is None
                self._leave(block.context, exc_type, exc_value, traceback)
            finally:
                block.undo.run()
        finally:  # for an interrupt at the first line of the first time
            block.undo.run()
        if exc_type is None:
            block.complain()


def watch_blocks() -> None:
    """Replace the beginning and the end of BackPACK's blocks, once."""
    enter = backpack_package.backpack.__enter__

    @functools.wraps(enter)
    def entered(self: Any) -> Any:
        block = self.__dict__.pop("_bncurv_next", None) or Block(self)
        try:
            block.enter()
            return enter(self)
        except BaseException:
            block.undo.run()
            raise

    backpack_package.backpack.__exit__ = _ExitOf(backpack_package.backpack.__exit__)
    backpack_package.backpack.__enter__ = entered
