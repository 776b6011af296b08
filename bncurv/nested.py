"""Tensors inside of tuples, lists and mappings: one rule for inputs, outputs, and what modules keep."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

DEEPEST = 16  # levels of containers that are looked into; such as hold themselves end there


def named(name: str, value: Any, depth: int = DEEPEST) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a structure, in order, each with the expression that leads to it from ``name``."""
    if isinstance(value, Tensor):
        yield name, value
    elif depth and isinstance(value, tuple | list | Mapping):
        for key, part in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from named(f"{name}[{key!r}]", part, depth - 1)


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of a structure, in order."""
    return (t for _, t in named("", value))


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


def moved(value: Any, device: torch.device | None) -> Any:
    """The structure with its tensors on a device, if there is one to go to."""
    return value if device is None else mapped(lambda t: t.to(device), value)


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
