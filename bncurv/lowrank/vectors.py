"""Vectors in parameter space: by name, in a list, or flat, in PyTorch or NumPy; one or several; checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

Vector = Tensor | np.ndarray | Mapping[str, Tensor] | Sequence[Tensor]


class Space:
    """The parameters that a matrix acts on, in the order of flat vectors.

    Attributes:
        shapes: ``{name: p}``.
        dim: D, the number of entries.
        like: an empty tensor of the dtype and device of all vectors.
    """

    def __init__(self, shapes: Mapping[str, torch.Size], like: Tensor) -> None:
        self.shapes, self.like = dict(shapes), like.new_empty(0)
        self.sizes = [shape.numel() for shape in shapes.values()]
        self.dim = sum(self.sizes)

    def flatten(self, v: Vector) -> Tensor:
        """``{name: [*p]}`` → ``[D]``, ``{name: [m, *p]}`` → ``[D, m]``; flat ``[D]``, ``[D, m]`` as they are."""
        if isinstance(v, list | tuple):
            v = self._named(v)
        if isinstance(v, Mapping):
            lead = self._lead(v)
            flat = [v[name].reshape((*lead, size)) for name, size in zip(self.shapes, self.sizes, strict=True)]
            return torch.cat(flat, -1).movedim(-1, 0)
        if isinstance(v, np.ndarray):
            v = torch.as_tensor(v).to(self.like)
        if not isinstance(v, Tensor):
            raise TypeError(f"vector is {type(v).__name__}; expected a torch.Tensor, or a dict or list of tensors.")
        self._check("vector", v)
        if v.dim() not in (1, 2) or len(v) != self.dim:
            raise ValueError(
                f"vector has shape {tuple(v.shape)}; expected [{self.dim}], or [{self.dim}, m] for m vectors, or a "
                "dict by parameter name."
            )
        return v

    def unflatten(self, v: Tensor) -> dict[str, Tensor]:
        """``[*lead, D]`` → ``{name: [*lead, *p]}``."""
        parts = v.split(self.sizes, -1)
        return {n: part.reshape((*v.shape[:-1], *p)) for (n, p), part in zip(self.shapes.items(), parts, strict=True)}

    def apply(self, f: Callable[[Tensor], Tensor], v: Vector) -> Any:
        """A function of flat vectors on vectors of any form; what comes back has the form of what went in."""
        flat = f(self.flatten(v))
        if isinstance(v, np.ndarray):
            return flat.cpu().numpy().astype(v.dtype)
        if isinstance(v, Tensor):
            return flat
        by_name = self.unflatten(flat.movedim(0, -1))
        return by_name if isinstance(v, Mapping) else list(by_name.values())

    def _named(self, v: Sequence[Tensor]) -> dict[str, Tensor]:
        """A list of tensors, one for each parameter in order, by name."""
        if len(v) != len(self.shapes):
            raise ValueError(
                f"vector is a {type(v).__name__} of {len(v)}; expected one tensor for each of the {len(self.shapes)} "
                f"parameters, in the order {_some(list(self.shapes))}."
            )
        return dict(zip(self.shapes, v, strict=True))

    def _lead(self, v: Mapping[str, Tensor]) -> tuple[int, ...]:
        """``()`` for one vector, ``(m,)`` for several; ValueError for a wrong name or shape."""
        missing, unknown = [n for n in self.shapes if n not in v], [n for n in v if n not in self.shapes]
        if missing or unknown:
            wrong = [f"lacks {_some(missing)}"] * bool(missing) + [f"has unknown {_some(unknown)}"] * bool(unknown)
            raise ValueError(f"vector {' and '.join(wrong)}; expected exactly the names {_some(list(self.shapes))}.")
        lead: tuple[int, ...] | None = None
        for name, p in self.shapes.items():
            self._check(f"vector['{name}']", v[name])
            shape, extra = tuple(v[name].shape), v[name].dim() - len(p)
            if extra not in (0, 1) or shape[extra:] != tuple(p):
                several = ", ".join(map(str, ("m", *p)))
                raise ValueError(
                    f"vector['{name}'] has shape {shape}; expected {tuple(p)}, or ({several}) for m vectors."
                )
            here = shape[:extra]
            lead = here if lead is None else lead
            if here != lead:
                first = next(iter(self.shapes))
                raise ValueError(
                    f"vector['{name}'] has shape {shape}, {_number(here)}, but vector['{first}'] has shape "
                    f"{tuple(v[first].shape)}, {_number(lead)}; expected as many of each."
                )
        return lead or ()

    def _check(self, what: str, t: Any) -> None:
        """Raise TypeError/ValueError for anything but a tensor of this dtype and device."""
        if not isinstance(t, Tensor):
            raise TypeError(f"{what} is {type(t).__name__}; expected a torch.Tensor.")
        if t.dtype != self.like.dtype or t.device != self.like.device:
            raise ValueError(
                f"{what} is {t.dtype} on {t.device}; expected {self.like.dtype} on {self.like.device}, as the "
                "curvature is. Convert it with .to(...)."
            )


def _some(names: list[str]) -> str:
    """A few names, and how many there are."""
    return f"{names[:3]}" + (f" … ({len(names)} in all)" if names[3:] else "")


def _number(lead: tuple[int, ...]) -> str:
    return f"{lead[0]} vectors" if lead else "one vector"
