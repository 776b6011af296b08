"""Whether backward passes are what they must be: rows of one fixed linear map, the same at once as one by one.

An ordinary pass of a row's own cotangent must give that row, and one of a combination Σ_i w_i u_i of cotangents the
combination Σ_i w_i of their rows. It does not where PyTorch's rule for batches of an operation is wrong, where a
backward draws random numbers, clips or selects. Then powers of two tell these from rounding: a linear map of u / 2 is
half of that of u, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from bncurv.precision import EXACT, ROUGHLY, ROUNDING

Ends = Sequence[GradientEdge | Tensor]
Pull = Callable[[Tensor], list[Tensor | None]]  # an ordinary pass: cotangent [1, *output] → [1, *edge] per edge


class Verdict(Enum):
    """What a comparison of rows with ordinary passes shows."""

    RIGHT = "rows of one linear map"
    OTHER_ROWS = "ordinary passes give other rows"
    NOT_LINEAR = "ordinary passes are not linear, or not twice the same"


def examine(pull: Pull, u: Tensor, rows: list[Tensor | None], single: bool = False) -> Verdict:
    """Compare rows with an ordinary pass, and with a few more where they differ.

    Args:
        pull: an ordinary pass.
        u: the cotangents that were pulled, ``[q, *output]``.
        rows: what came of them, ``[q, *edge]`` per edge.
        single: whether one row will do: the map is known to be linear.
    """
    count = len(u)
    if single or count == 1:
        probe, expected = u[count // 2 :][:1], [None if r is None else r[count // 2 :][:1] for r in rows]
    else:  # the first, the middle and the last
        few = sorted({0, count // 2, count - 1})
        weights = u.new_tensor([1.0, -0.75, 0.625])[: len(few)]
        probe = torch.tensordot(weights, u[few], 1)[None]
        expected = [None if r is None else torch.tensordot(weights, r[few], 1)[None] for r in rows]
    ordinary = pull(probe)
    apart = _apart(ordinary, expected)
    if all(d <= EXACT[u.dtype] * size for d, size in apart):
        return Verdict.RIGHT
    half = pull(0.5 * probe)
    if not all(d <= EXACT[u.dtype] * size for d, size in _apart(half, ordinary, 0.5)):
        return Verdict.NOT_LINEAR
    moved = [_apart(pull(factor * probe), ordinary, factor) for factor in (0.7, 0.9, 1.3, 0.55, 1.1, 1.7)]
    noise = [max(d for d, _ in by_factor) for by_factor in zip(*moved, strict=True)]
    floor = ROUNDING * torch.finfo(u.dtype).eps * max((size for _, size in apart), default=0.0)
    explained = (
        d <= max(ROUGHLY[u.dtype] * size, ROUNDING * n, floor) for (d, size), n in zip(apart, noise, strict=True)
    )
    return Verdict.RIGHT if all(explained) else Verdict.OTHER_ROWS


def _apart(a: list[Tensor | None], b: list[Tensor | None], scale: float = 1.0) -> list[tuple[float, float]]:
    """By edge: largest difference of a / scale from b, and largest entry."""
    found: list[Tensor] = []
    for x, y in zip(a, b, strict=True):
        known = x if y is None else y
        if known is None or not known.numel():
            continue
        x = torch.zeros_like(known) if x is None else x if scale == 1 else x / scale
        y = torch.zeros_like(known) if y is None else y
        found += [(x - y).abs().amax(), x.abs().amax()]
    flat = torch.stack(found).tolist() if found else []  # one wait for the device
    return list(zip(flat[::2], flat[1::2], strict=True))
