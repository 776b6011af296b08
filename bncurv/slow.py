"""The warning of a slower way than usual, at the line of the user's code that asked for it."""

from __future__ import annotations

import os
import sys
import warnings

import backpack
import torch


class SlowPathWarning(UserWarning):
    """The result is exact, but a slower way than usual was taken; the message says why and for what."""


_INSIDE = tuple(os.path.dirname(os.path.abspath(f)) + os.sep for f in (__file__, torch.__file__, backpack.__file__))


def warn_slow(message: str) -> None:
    """Warn at the innermost line outside of bncurv, PyTorch and BackPACK."""
    level, frame = 1, sys._getframe(0)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, SlowPathWarning, stacklevel=level)
