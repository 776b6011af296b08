"""The warning of a slower way than usual, at the line of the user's code that asked for it."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterable, Mapping

import backpack
import torch
from torch import nn


class SlowPathWarning(UserWarning):
    """The result is exact, but a slower way than usual was taken; the message says why and for what.

    Example:
        >>> import warnings
        >>> import torch, bncurv
        >>> hidden = torch.nn.Linear(4, 30), torch.nn.BatchNorm1d(30), torch.nn.Linear(30, 2)
        >>> mixing = torch.nn.Sequential(*hidden, torch.nn.Softmax(dim=0))  # over the samples
        >>> batch = torch.randn(64, 4), torch.randn(64, 2)
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     bncurv.curvature(mixing, torch.nn.MSELoss(), batch, bncurv.DiagGGNExact()).method
        'dense'
        >>> caught[0].category is bncurv.SlowPathWarning
        True
    """


MOST = 6


def listed(names: Iterable[str], most: int = MOST) -> str:
    """The first names in quotes, and how many more there are."""
    names = list(names)
    rest = len(names) - most
    return ", ".join(map(repr, names[:most])) + (f" and {rest} more" if rest > 0 else "")


def kinds_of(model: nn.Module) -> dict[str, tuple[str, str]]:
    """Name and type of the module that each parameter belongs to, by the parameter's name."""
    found = {}
    for module_name, module in model.named_modules():
        for name, _ in module.named_parameters(module_name, recurse=False):
            found[name] = module_name, type(module).__name__
    return found


def summarised(names: list[str], kinds: Mapping[str, tuple[str, str]]) -> str:
    """The names; of many, how many of which type of module, with the first ones."""
    if len(names) <= MOST or not kinds:
        return listed(names)
    by_type: dict[str, list[str]] = {}
    for name in names:
        by_type.setdefault(kinds.get(name, ("", "the model"))[1], []).append(name)
    return ", ".join(
        f"{len(some)} parameters of {len({kinds.get(n, ('', ''))[0] for n in some})} {kind} ({some[0]!r}, ...)"
        for kind, some in by_type.items()
    )


def warn_of_slow(causes: Mapping[str, str], kinds: Mapping[str, tuple[str, str]], without: int, with_them: int) -> None:
    """Warn of parameters without a product.

    Args:
        causes: why, by name.
        kinds: the modules that they belong to.
        without: passes without these parameters.
        with_them: passes of the dense way.
    """
    by_cause: dict[str, list[str]] = {}
    for name, cause in causes.items():
        by_cause.setdefault(cause, []).append(name)
    them = "it" if len(causes) == 1 else "them"
    spared = f" ({without} passes without {them}, {with_them} with {them})" if without < with_them else ""
    warn_slow(
        f"No parameter product for {', '.join(f'{summarised(n, kinds)} ({cause})' for cause, n in by_cause.items())}: "
        f"exact, but by one backward pass per component{spared}. Leave out with params=..., or add the layer with "
        "bncurv.register_layer."
    )


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
