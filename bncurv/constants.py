"""Tensors of a forward pass that no data went into: what the model holds, and what its code makes from nothing.

Evidence for speed only: a parameter that meets such tensors alone computes another parameter, W = φ(θ). Exact is also
what is computed from a tensor that is taken for a constant and is none.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

DATA, CONSTANT, OWN = range(3)  # what went into a tensor: data; constants; parameters and buffers alone
MAKING = frozenset(
    "arange linspace logspace eye zeros ones full empty tensor scalar_tensor tril_indices triu_indices zeros_like "
    "ones_like full_like empty_like new_zeros new_ones new_full new_empty new_tensor".split()
)


def tensors_of(values: Any) -> Iterator[Tensor]:
    """The tensors among values, also those in lists and tuples."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from tensors_of(value)


class Constants:
    """A set of tensors without gradients, by identity: attributes of a model's modules, and what was made from them.

    Args:
        modules: whose buffers and other tensors are constant from the beginning.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        held = (t for m in modules for t in (*m._buffers.values(), *vars(m).values()))
        self._known = {id(t): weakref.ref(t) for t in held if isinstance(t, Tensor)}

    def __contains__(self, t: Tensor) -> bool:
        known = self._known.get(id(t))
        return known is not None and known() is t

    def note(self, name: str, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """A function's call: its output is constant if it makes tensors, or if all that it takes are."""
        taken = list(tensors_of((*args, *kwargs.values())))
        if name in MAKING or (taken and all(t in self for t in taken)):
            self._known |= {id(t): weakref.ref(t) for t in tensors_of((output,))}
