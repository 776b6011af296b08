"""Tensors inside of tuples, lists and mappings: one rule for inputs, outputs, and what modules keep."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

DEEPEST = 16  # levels of containers that are looked into; such as hold themselves end there


def tensors(value: Any, depth: int = DEEPEST) -> Iterator[Tensor]:
    """The tensors of a structure, in order."""
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, tuple | list | Mapping):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from tensors(part, depth - 1)


def mapped(f: Callable[[Tensor], Any], value: Any, depth: int = DEEPEST) -> Any:
    """The structure with ``f`` of its tensors, in order; what is no container and no tensor stays.

    Containers keep their type. One in which nothing has changed stays the same object.
    """
    if isinstance(value, Tensor):
        return f(value)
    if not depth or not isinstance(value, tuple | list | Mapping):
        return value
    entries = dict(value.items()) if isinstance(value, Mapping) else dict(enumerate(value))
    found = {key: mapped(f, part, depth - 1) for key, part in entries.items()}
    changed = {key: part for key, part in found.items() if part is not entries[key]}
    return _with(value, found, changed) if changed else value


def _with(value: Any, found: dict[Any, Any], changed: dict[Any, Any]) -> Any:
    """The container with all these entries, of which some are new."""
    if hasattr(value, "_fields"):
        return type(value)(*found.values())
    if isinstance(value, tuple):
        return type(value)(found.values())
    other = copy.copy(value)
    for key, part in changed.items():
        other[key] = part
    return other
