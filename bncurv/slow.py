"""The warning of a slower way than usual, at the line of the user's code that asked for it."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterable

import backpack
import torch


class SlowPathWarning(UserWarning):
    """The result is exact, but a slower way than usual was taken; the message says why and for what."""


def listed(names: Iterable[str], most: int = 6) -> str:
    """The first names in quotes, and how many more there are."""
    names = list(names)
    rest = len(names) - most
    return ", ".join(map(repr, names[:most])) + (f" and {rest} more" if rest > 0 else "")


_INSIDE = tuple(os.path.dirname(os.path.abspath(f)) + os.sep for f in (__file__, torch.__file__, backpack.__file__))


def user_level() -> int:
    """Stack level, for a warning of the caller, of the innermost line outside of bncurv, PyTorch and BackPACK."""
    level, frame = 0, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        level, frame = level + 1, frame.f_back
    return level + 1


def warn_slow(message: str) -> None:
    """Warn at the user's line."""
    warnings.warn(message, SlowPathWarning, stacklevel=user_level())
