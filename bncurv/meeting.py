"""Where parameters meet data: a parameter that broadcasts against the batch gets a copy for every row of it.

The copies ``θ.expand(...)`` are a view, so they cost no memory; the cotangent of copy n is what sample n does to θ.
They are marked as calls of the table (`Expanded`). θ may be computed from parameters (a view, a product of two), also
by layers of the table whose input is a constant (a table of relative positions): their rows are no samples'.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from bncurv.constants import CONSTANT, OWN
from bncurv.layers.copies import Embedding
from bncurv.marks import MARK, Mark, leaves_of, metadata

ELEMENTWISE = frozenset(
    "add sub mul div true_divide truediv rsub rtruediv rdiv radd rmul pow rpow iadd isub imul idiv itruediv ipow "
    "subtract multiply divide addcmul addcdiv lerp where maximum minimum fmax fmin clamp clamp_min clamp_max hypot "
    "atan2".split()
)
EXPANDING = frozenset("expand expand_as broadcast_to repeat tile".split())
Marker = Callable[..., None]  # (copies, parameter[, whether constants are all that it meets])


def name_of(func: Any) -> str:
    """A torch function's name, without the underscores of operators and in-place forms."""
    return getattr(func, "__name__", "").strip("_")


def spread(
    args: tuple, kwargs: dict[str, Any], learnt: Container[int], source: Callable[[Tensor], int], mark: Marker
) -> Any:
    """Arguments of an elementwise function, with copies in place of the parameters that broadcast against data.

    Args:
        args: its arguments.
        kwargs: those by name.
        learnt: ids of the parameters.
        source: of a tensor, what went into it (``constants.py``).
        mark: called with the copies, what they are copies of, and whether constants are all that they meet.
    """
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
    if len(tensors) < 2 or all(t.shape == tensors[0].shape for t in tensors):
        return args, kwargs
    if len({t.dtype for t in tensors if t.is_floating_point()}) > 1:  # copies of a 0-d tensor would promote the others
        return args, kwargs
    shape = torch.broadcast_shapes(*(t.shape for t in tensors))
    grows = [t for t in tensors if t.requires_grad and t.shape != shape]
    own = {id(t) for t in grows if computed(t, learnt, _repeated(t.shape, shape) == 0)}
    others = min((source(t) for t in tensors if id(t) not in own), default=OWN) if own else OWN
    if others == OWN:
        return args, kwargs

    def copies(t: Any) -> Any:
        if id(t) not in own:
            return t
        axis = _repeated(t.shape, shape)
        if axis:  # copies along another axis than the first: as if it were the first
            t = t.view((1,) * (len(shape) - t.dim()) + t.shape).movedim(axis, 0)
        rows = t.expand(*shape[axis : axis + 1], *shape[:axis], *shape[axis + 1 :])
        mark(rows, t, others == CONSTANT)
        return rows.movedim(0, axis)

    return tuple(copies(a) for a in args), {key: copies(a) for key, a in kwargs.items()}


def copied(output: Any, t: Any, learnt: Container[int], mark: Marker) -> None:
    """Mark the output of the model's own ``t.expand(...)`` of a parameter, where it makes rows."""
    if isinstance(output, Tensor) and isinstance(t, Tensor) and output.requires_grad and output.shape != t.shape:
        if output.dim() and output.shape[0] > 1 and _leads(t.shape, output.shape) and computed(t, learnt, True):
            mark(output, t)


def _repeated(own: torch.Size, shape: torch.Size) -> int:
    """The first axis of ``shape`` along which a tensor is repeated."""
    padded = (1,) * (len(shape) - len(own)) + tuple(own)
    return next(axis for axis, (a, b) in enumerate(zip(padded, shape, strict=True)) if a != b)


def _leads(own: torch.Size, shape: torch.Size) -> bool:
    """Whether ``shape`` repeats a tensor along the first axis, and along no axis that has entries of its own."""
    first = bool(shape) and (len(own) < len(shape) or own[0] == 1)
    return first and all(a in (1, b) for a, b in zip(reversed(own), reversed(shape), strict=False))


def computed(t: Tensor, learnt: Container[int], repeated: bool) -> bool:
    """Whether a tensor is a parameter or made from parameters alone.

    Args:
        t: the tensor.
        learnt: ids of the parameters.
        repeated: whether it is the same for all samples. Then rows of a table, and what layers make of constants, are
            no samples' after all, and lose their marks.
    """
    if repeated and t.grad_fn is not None:
        mark: Mark | None = metadata(t.grad_fn).get(MARK)
        if mark and mark.call and isinstance(mark.call.layer, Embedding):
            del metadata(t.grad_fn)[MARK]
    passed: list[Node] | None = [] if repeated else None
    found = leaves_of(t, learnt, passed) is not None
    for node in passed or () if found else ():
        del metadata(node)[MARK]
    return found
