"""What a Newton step may be asked for: dampings and directions, checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Damping = float | Tensor | Callable[[Tensor], Tensor]
Directions = int | Callable[[Tensor], Sequence[int]] | None


def positive(damping: Any) -> float:
    """The damping as a number; ValueError unless it is positive."""
    if not damping > 0:
        raise ValueError(f"damping={damping}; expected a positive number, since G itself is singular.")
    return float(damping)


def constant(damping: Damping) -> bool:
    """Whether it is one number for the whole space."""
    return not callable(damping) and torch.as_tensor(damping).dim() == 0


def per_direction(damping: Damping, values: Tensor) -> Tensor:
    """δ_d of the directions with these eigenvalues; ValueError unless there is one positive number for each."""
    delta = damping(values) if callable(damping) else damping
    delta = torch.as_tensor(delta, dtype=values.dtype, device=values.device)
    if delta.shape not in (torch.Size(), values.shape):
        raise ValueError(
            f"damping has shape {tuple(delta.shape)}; expected one value for each of {len(values)} directions."
        )
    if not bool((delta > 0).all()):
        raise ValueError(f"damping={delta.tolist()}; expected positive numbers.")
    return delta


def chosen(directions: Callable[[Tensor], Sequence[int]], values: Tensor) -> Tensor:
    """Indices, 0 for the largest, that a criterion chooses from the eigenvalues; it sees them ascending."""
    count = len(values)
    ascending = [int(i) for i in directions(values.flip(0))]
    if not all(0 <= i < count for i in ascending):
        raise ValueError(f"directions gave the indices {ascending}; expected some of 0 … {count - 1}, ascending.")
    return torch.tensor([count - 1 - i for i in ascending], dtype=torch.long, device=values.device)
