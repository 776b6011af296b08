"""Autocast is off for a call: what is on around it, and every region that code of the model enters meanwhile.

PyTorch has no switch for that, so ``torch.autocast.__enter__`` is wrapped for as long as a call needs it: a region
begins as always, and is then switched off. The wish is kept where PyTorch hands the state of a thread on to its
engine's threads, so that what a checkpoint runs again is off there too, and other threads are not concerned.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from functools import partial
from operator import methodcaller
from typing import Any

import torch
from torch import Tensor

from bncurv.undo import Undo

_OFF = "bncurv.autocast_is_off"
_CALLS: dict[object, None] = {}  # that need the wrapped beginning
_BEFORE: dict[str, Any] = {}  # "enter": the one found by the first


def keep_off(undo: Undo, tensors: Iterable[Tensor]) -> None:
    """From now on, in this thread, on the CPU and the tensors' devices."""
    for device in {"cpu", *(t.device.type for t in tensors)} - {"meta"}:
        state = device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        undo.note(partial(_set, *state, torch.is_autocast_cache_enabled(), _nesting()))
        torch.set_autocast_enabled(device, False)
    before = _off()
    undo.note(lambda: torch._C._stash_obj_in_tls(_OFF, before))
    torch._C._stash_obj_in_tls(_OFF, True)
    call = object()
    undo.note(partial(_release, call))
    _CALLS[call] = None
    if "enter" not in _BEFORE:
        _BEFORE["enter"] = torch.autocast.__enter__
        torch.autocast.__enter__ = _beginning(_BEFORE["enter"])  # type: ignore[method-assign]


def _beginning(enter: Any) -> Any:
    @functools.wraps(enter)
    def entered(region: torch.autocast) -> Any:
        found = enter(region)
        if _off():
            torch.set_autocast_enabled(region.device, False)
        return found

    return entered


def _release(call: object) -> None:
    """Not needed by this call any more; may be run again."""
    _CALLS.pop(call, None)
    if not _CALLS and "enter" in _BEFORE:
        torch.autocast.__enter__ = _BEFORE["enter"]  # type: ignore[method-assign]
        _BEFORE.pop("enter", None)


def _off() -> bool:
    return torch._C._is_key_in_tls(_OFF) and torch._C._get_obj_in_tls(_OFF)


def _nesting() -> int:
    """How many regions this thread is in."""
    _, nesting = map(methodcaller("__call__"), (torch.autocast_increment_nesting, torch.autocast_decrement_nesting))
    return nesting  # no interrupt came between the two


def _set(device: str, enabled: bool, dtype: torch.dtype, cached: bool, nesting: int) -> None:
    """The state of this thread, also where an interrupt kept a region from its end."""
    while _nesting() > nesting:
        torch.autocast_decrement_nesting()
    torch.set_autocast_enabled(device, enabled)
    torch.set_autocast_dtype(device, dtype)
    torch.set_autocast_cache_enabled(cached)
