"""One at a time: what changes the state of the process waits until no other thread does.

BackPACK's context, PyTorch's random state and the stance of its compiler are one per process. `bncurv.curvature` and
the blocks ``with backpack(...)`` therefore take turns between threads; within a thread they nest as they like.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import warnings
from types import FrameType

import torch

from bncurv.slow import user_level
from bncurv.undo import Undo

_OWNER: dict[str, int] = {}  # "thread": whose turn it is. No lock: an interrupted thread may give up its turn twice
_HELD: dict[object, str] = {}  # what the owner does, one entry for each nested turn
PATIENCE = 30.0  # seconds without a word
if hasattr(os, "register_at_fork"):  # the others' threads do not live on in a child
    os.register_at_fork(after_in_child=_OWNER.clear)
    os.register_at_fork(after_in_child=_HELD.clear)


def take_turn(undo: Undo, what: str) -> None:
    """Wait for the turn of this thread; given up when ``undo`` runs."""
    token, me, since, told = object(), threading.get_ident(), time.monotonic(), False
    undo.note(lambda: _give_up(token, me))
    while _OWNER.setdefault("thread", me) != me and not in_engine_thread():
        time.sleep(0.002)
        if not told and time.monotonic() - since > PATIENCE:
            told = True
            holder = next(iter(_HELD.values()), "another call")
            warnings.warn(
                f"{what} has been waiting {PATIENCE:.0f} s for {holder} of another thread: they take turns, since "
                "BackPACK's context and PyTorch's random state are one per process. If that thread waits for this "
                "one, neither goes on: leave the block before you wait.",
                stacklevel=user_level(),
            )
    _HELD[token] = what


def _give_up(token: object, me: int) -> None:
    _HELD.pop(token, None)
    if not _HELD and _OWNER.get("thread") == me:
        _OWNER.pop("thread", None)


def backward_frame(thread: int | None = None) -> FrameType | None:
    """The innermost running ``backward()`` or ``autograd.grad()`` of a thread (default: this one)."""
    frame = sys._getframe() if thread is None else sys._current_frames().get(thread)
    while frame is not None and frame.f_code is not torch.autograd.graph._engine_run_backward.__code__:
        frame = frame.f_back
    return frame


def in_engine_thread() -> bool:
    """Whether this is a thread of PyTorch's engine: it works for one that waits, so it must not wait itself."""
    return torch._C._current_graph_task_id() != -1 and backward_frame() is None
