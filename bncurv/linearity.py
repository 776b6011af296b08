"""Whether backward passes are what they must be: rows of one fixed linear map, the same at once as one by one.

One ordinary pass of a combination Σ_i w_i u_i of cotangents must give Σ_i w_i of the rows found for them. It does not
where PyTorch's rule for batches of an operation is wrong, where a backward draws random numbers, clips or selects.
Then powers of two tell these from rounding: a linear map of u / 2 is half of that of u, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from bncurv.precision import EXACT, ROUGHLY, ROUNDING
from bncurv.probes import loudness, power_of_two

Ends = Sequence[GradientEdge | Tensor]
Pull = Callable[[list[Tensor]], list[Tensor | None]]  # an ordinary pass: cotangents [1, *output] → [1, *edge]


class Verdict(Enum):
    """What a comparison of rows with ordinary passes shows."""

    RIGHT = "rows of one linear map"
    OTHER_ROWS = "ordinary passes give other rows"
    NOT_LINEAR = "ordinary passes are not linear, or not twice the same"


def examine(pull: Pull, cotangents: list[Tensor], rows: list[Tensor | None]) -> Verdict:
    """Compare a few rows with ordinary passes.

    Args:
        pull: an ordinary pass.
        cotangents: what was pulled, ``[q, *output]`` each.
        rows: what came of it, ``[q, *edge]`` per edge.
    """
    count = len(cotangents[0])
    few = sorted({0, count // 2, count - 1})
    some = [None if r is None else r[few] for r in rows]
    sizes = [loudness(r) for r in some if r is not None]
    weights = 1 / power_of_two(torch.stack(sizes).amax(0) if sizes else cotangents[0].new_ones(len(few)))
    weights = weights * weights.new_tensor([1.0, -0.75, 0.625])[: len(few)]  # quiet rows count as much as loud ones
    u = [torch.tensordot(weights.to(c.dtype), c[few], 1)[None] for c in cotangents]
    ordinary = pull(u)
    combined = [None if r is None else torch.tensordot(weights.to(r.dtype), r, 1)[None] for r in some]
    apart = _apart(ordinary, combined)
    if all(d <= EXACT[dtype] * size for d, size, dtype in apart):
        return Verdict.RIGHT
    half = pull([0.5 * c for c in u])
    if any(not d <= EXACT[dtype] * size for d, size, dtype in _apart(half, ordinary, 0.5)):
        return Verdict.NOT_LINEAR
    moved = [_apart(pull([factor * c for c in u]), ordinary, factor) for factor in (0.7, 0.9, 1.3)]
    noise = [max(d for d, _, _ in by_factor) for by_factor in zip(*moved, strict=True)]
    floor = ROUNDING * torch.finfo(u[0].dtype).eps * max(size for _, size, _ in apart)
    explained = (
        d <= max(ROUGHLY[dtype] * size, ROUNDING * n, floor) for (d, size, dtype), n in zip(apart, noise, strict=True)
    )
    return Verdict.RIGHT if all(explained) else Verdict.OTHER_ROWS


def _apart(
    a: list[Tensor | None], b: list[Tensor | None], scale: float = 1.0
) -> list[tuple[float, float, torch.dtype]]:
    """By edge: largest difference of a / scale from b, largest entry, dtype."""
    found = []
    for x, y in zip(a, b, strict=True):
        known = x if y is None else y
        if known is None or not known.numel():
            found.append((0.0, 0.0, torch.float64))
            continue
        x = torch.zeros_like(known) if x is None else x / scale
        y = torch.zeros_like(known) if y is None else y
        found.append((float((x - y).abs().amax()), float(torch.maximum(x.abs(), y.abs()).amax()), known.dtype))
    return found
