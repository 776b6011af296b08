"""Where parameters meet data: a parameter that broadcasts against the batch gets a copy for every row of it.

The copies ``θ.expand(...)`` are a view, so they cost no memory; the cotangent of copy n is what sample n does to θ.
They are marked as calls of the table (`Expanded`). θ may be computed from parameters (a view, a product of two).
"""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

import torch
from torch import Tensor

from bncurv.layers.copies import Embedding
from bncurv.marks import MARK, Mark, leaves_of, metadata

ELEMENTWISE = frozenset(
    "add sub mul div true_divide truediv rsub rtruediv rdiv radd rmul pow rpow iadd isub imul idiv itruediv ipow "
    "subtract multiply divide addcmul addcdiv lerp where maximum minimum fmax fmin clamp clamp_min clamp_max hypot "
    "atan2".split()
)
EXPANDING = frozenset("expand expand_as broadcast_to repeat tile".split())
Marker = Callable[[Tensor, Tensor], None]  # (copies, parameter)


def name_of(func: Any) -> str:
    """A torch function's name, without the underscores of operators and in-place forms."""
    return getattr(func, "__name__", "").strip("_")


def spread(args: tuple, kwargs: dict[str, Any], learnt: Container[int], fixed: Container[int], mark: Marker) -> Any:
    """Arguments of an elementwise function, with copies in place of the parameters that broadcast against data.

    Args:
        args: its arguments.
        kwargs: those by name.
        learnt: ids of the parameters.
        fixed: ids of tensors that belong to the model as they do (buffers).
        mark: called with the copies and what they are copies of.
    """
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
    if len(tensors) < 2 or all(t.shape == tensors[0].shape for t in tensors):
        return args, kwargs
    if len({t.dtype for t in tensors if t.is_floating_point()}) > 1:  # copies of a 0-d tensor would promote the others
        return args, kwargs
    shape = torch.broadcast_shapes(*(t.shape for t in tensors))
    grows = [t for t in tensors if t.requires_grad and t.shape != shape]
    own = {id(t) for t in grows if _computed(t, learnt)}
    data = any(id(t) not in own and id(t) not in fixed and leaves_of(t, learnt) is None for t in tensors)
    if not own or not data:
        return args, kwargs

    def copies(t: Any) -> Any:
        if id(t) not in own:
            return t
        axis = _repeated(t.shape, shape)
        if axis:  # copies along another axis than the first: as if it were the first
            t = t.view((1,) * (len(shape) - t.dim()) + t.shape).movedim(axis, 0)
        rows = t.expand(*shape[axis : axis + 1], *shape[:axis], *shape[axis + 1 :])
        mark(rows, t)
        return rows.movedim(0, axis)

    return tuple(copies(a) for a in args), {key: copies(a) for key, a in kwargs.items()}


def copied(output: Any, t: Any, learnt: Container[int], mark: Marker) -> None:
    """Mark the output of the model's own ``t.expand(...)`` of a parameter, where it makes rows."""
    if isinstance(output, Tensor) and isinstance(t, Tensor) and output.requires_grad and output.shape != t.shape:
        if output.dim() and output.shape[0] > 1 and _leads(t.shape, output.shape) and _computed(t, learnt):
            mark(output, t)


def _repeated(own: torch.Size, shape: torch.Size) -> int:
    """The first axis of ``shape`` along which a tensor is repeated."""
    padded = (1,) * (len(shape) - len(own)) + tuple(own)
    return next(axis for axis, (a, b) in enumerate(zip(padded, shape, strict=True)) if a != b)


def _leads(own: torch.Size, shape: torch.Size) -> bool:
    """Whether ``shape`` repeats a tensor along the first axis, and along no axis that has entries of its own."""
    first = bool(shape) and (len(own) < len(shape) or own[0] == 1)
    return first and all(a in (1, b) for a, b in zip(reversed(own), reversed(shape), strict=False))


def _computed(t: Tensor, learnt: Container[int]) -> bool:
    """Whether a tensor is a parameter or made from parameters alone; rows of a table are, where they are repeated."""
    if t.grad_fn is not None:
        mark: Mark | None = metadata(t.grad_fn).get(MARK)
        if mark and mark.call and isinstance(mark.call.layer, Embedding):
            del metadata(t.grad_fn)[MARK]  # they are no samples' after all
    return leaves_of(t, learnt) is not None
