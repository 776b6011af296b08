"""Tensors inside of containers: one rule for inputs, targets, outputs, and what modules keep.

Containers are tuples, lists and mappings, with all their subclasses (named tuples, packed sequences, model outputs).
Of objects of other kinds it is known what they hold, but not how to make them anew: they stay as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

DEEPEST = 16  # levels of containers that are looked into; such as hold themselves end there


def named(name: str, value: Any, depth: int = DEEPEST) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a structure, in order, each with the expression that leads to it from ``name``."""
    if isinstance(value, Tensor):
        yield name, value
    elif depth:
        for key, part in _entries(value):
            yield from named(f"{name}[{key!r}]", part, depth - 1)


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of a structure, in order."""
    return (t for _, t in named("", value))


def held(value: Any, depth: int = 6, seen: tuple[int, ...] = (), kinds: Any = Tensor) -> Iterator[Any]:
    """The tensors (or values of other ``kinds``) that a structure or any other object holds, also as attributes."""
    if isinstance(value, kinds):
        yield value
    elif depth and id(value) not in seen and not isinstance(value, str | bytes | type | nn.Module):
        inside: Iterable[Any] = getattr(value, "__dict__", {}).values()
        if isinstance(value, Mapping | Sequence | Set):
            inside = value.values() if isinstance(value, Mapping) else value
        for part in inside:
            yield from held(part, depth - 1, (*seen, id(value)), kinds)


def mapped(f: Callable[[Tensor], Any], value: Any, depth: int = DEEPEST) -> Any:
    """The structure with ``f`` of its tensors, in order; what is no container and no tensor stays.

    Containers keep their type. One in which nothing has changed stays the same object.
    """
    if isinstance(value, Tensor):
        return f(value)
    entries = dict(_entries(value)) if depth else {}
    if isinstance(value, PackedSequence):
        entries.pop(1)  # how many steps go on: numbers for the CPU, of no dtype but their own
    found = {key: mapped(f, part, depth - 1) for key, part in entries.items()}
    changed = {key: part for key, part in found.items() if part is not entries[key]}
    return _with(value, changed) if changed else value


def renewed(value: Any, depth: int = DEEPEST) -> Any:
    """The same tensors in containers of their own, for code that may change these."""
    entries = dict(_entries(value)) if depth else {}
    found = {key: renewed(part, depth - 1) for key, part in entries.items()}
    changed = {key: part for key, part in found.items() if part is not entries[key]}
    return _with(value, changed) if changed or isinstance(value, list | MutableMapping) else value


def moved(value: Any, device: torch.device | None) -> Any:
    """The structure with its tensors on a device, if there is one to go to."""
    return value if device is None else mapped(lambda t: t.to(device), value)


def _entries(value: Any) -> Iterable[tuple[Any, Any]]:
    """Of a container, by key or position; of anything else, none."""
    if isinstance(value, Mapping):
        return value.items()
    return enumerate(value) if isinstance(value, tuple | list) else ()


def _with(value: Any, changed: dict[Any, Any]) -> Any:
    """A container of the same kind with some entries changed."""
    if isinstance(value, tuple):
        parts = [changed.get(i, part) for i, part in enumerate(value)]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if not isinstance(value, list | MutableMapping):
        return type(value)({**value, **changed})
    other = copy.copy(value)
    for key, part in changed.items():
        other[key] = part
    return other
