"""Changes that are taken back whatever happens: an error, Ctrl-C in the middle, Ctrl-C while they are taken back.

Before a change is made, how to undo it is noted; undoing is idempotent, so an interrupted one is simply run again.
There is no moment at which a change is made and not noted, and none at which an interrupt lets the rest be forgotten:

    def body(undo):
        before = thing.state
        undo.note(lambda: setattr(thing, "state", before))
        thing.state = "ours"
        ...

    without_trace(body)
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from types import TracebackType
from typing import TypeVar

import backpack
import torch

T = TypeVar("T")
_INSIDE = (
    *(os.path.dirname(os.path.abspath(f)) + os.sep for f in (__file__, torch.__file__, backpack.__file__)),
    os.path.abspath(contextlib.__file__),
)


class Undo:
    """How to take back what is changed, last change first."""

    def __init__(self) -> None:
        self._actions: list[Callable[[], object]] = []

    def note(self, action: Callable[[], object]) -> None:
        """Note, before a change, what undoes it: also if it is run twice, and if the change was never made."""
        self._actions.append(action)

    def run(self) -> None:
        """Undo everything; may be called again.

        Raises:
            BaseException: what came in between (an interrupt, or an action that failed twice), when all is undone.
        """
        raised: BaseException | None = None
        failing: Callable[[], object] | None = None
        while self._actions:
            action = self._actions[-1]
            try:
                action()
                self._actions.pop()
            except BaseException as e:
                raised = e
                if isinstance(e, Exception) and failing is action:
                    self._actions.pop()
                failing = action
        if raised is not None:
            raise raised


def without_trace(body: Callable[[Undo], T]) -> T:
    """``body(undo)``, undone afterwards; the graph goes with a failed call, even while its traceback is kept."""
    undo, handled = Undo(), sys.exc_info()[1]
    try:
        try:
            return body(undo)
        except BaseException as error:
            _let_go(error, handled)
            raise
        finally:
            undo.run()
    finally:  # for an interrupt at the first line of the first time
        undo.run()


def _let_go(error: BaseException, handled: BaseException | None) -> None:
    """Finished frames of bncurv, PyTorch and BackPACK forget their variables; those of the user's code keep them."""
    link: BaseException | None = error
    while link is not None and link is not handled:
        tb: TracebackType | None = link.__traceback__
        while tb is not None:
            if tb.tb_frame.f_code.co_filename.startswith(_INSIDE):
                with contextlib.suppress(RuntimeError):  # still running
                    tb.tb_frame.clear()
            tb = tb.tb_next
        link = link.__context__
