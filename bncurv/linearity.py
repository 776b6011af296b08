"""Whether backward passes are what they must be: rows of one fixed linear map, the same at once as one by one.

An ordinary pass of a combination Σ_i w_i u_i of cotangents must give the combination Σ_i w_i of their rows. It does not
where PyTorch's rule for batches of an operation is wrong, where a backward draws random numbers, clips or selects. Then
powers of two tell these from rounding: a linear map of u / 2 is half of that of u, to the bit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from enum import Enum

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from bncurv.precision import EXACT, ROUGHLY, ROUNDING
from bncurv.probes import loudness, pattern, power_of_two
from bncurv.ranks import ALONE, Ranks

FEW = 24  # rows that are compared, at most
Ends = Sequence[GradientEdge | Tensor]
Pull = Callable[[Tensor], list[Tensor | None]]  # an ordinary pass: cotangent [1, *output] → [1, *edge] per edge


class Verdict(Enum):
    """What a comparison of rows with ordinary passes shows."""

    RIGHT = "rows of one linear map"
    OTHER_ROWS = "ordinary passes give other rows"
    NOT_LINEAR = "ordinary passes are not linear, or not twice the same"
    NOT_FINITE = "ordinary passes give NaN or inf"


def examine(pull: Pull, u: Tensor, rows: list[Tensor | None], ranks: Ranks = ALONE) -> Verdict:
    """Compare rows with an ordinary pass, and with a few more where they differ.

    Args:
        pull: an ordinary pass.
        u: the cotangents that were pulled, ``[q, *output]``.
        rows: what came of them, ``[q, *edge]`` per edge.
        ranks: those that go through the same passes, each with its own samples.
    """
    step = _step(len(u))
    u, rows = u[::step], [None if r is None else r[::step] for r in rows]  # views: rows may be large
    everybody, weights = ranks.everybody, _weights(u, rows, ranks)
    probe = _mixed(weights, u)
    expected = [None if r is None else _mixed(weights, r) for r in rows]
    ordinary = pull(probe)
    apart, limits = _apart(ordinary, expected), torch.finfo(u.dtype)
    least = limits.tiny / limits.eps  # smaller numbers have not all their digits
    if everybody.all(all(d <= EXACT[u.dtype] * size + least for d, size in apart)):
        return Verdict.RIGHT
    if everybody.any(not all(math.isfinite(size) for _, size in apart)):
        return Verdict.NOT_FINITE
    half = pull(0.5 * probe)
    if not everybody.all(all(d <= EXACT[u.dtype] * size + least for d, size in _apart(half, ordinary, 0.5))):
        return Verdict.NOT_LINEAR
    moved = [_apart(pull(factor * probe), ordinary, factor) for factor in (0.7, 0.9, 1.3, 0.55, 1.1, 1.7)]
    noise = [max(d for d, _ in by_factor) for by_factor in zip(*moved, strict=True)]
    floor = ROUNDING * limits.eps * max((size for _, size in apart), default=0.0)
    explained = (
        d <= max(ROUGHLY[u.dtype] * size, ROUNDING * n, floor) for (d, size), n in zip(apart, noise, strict=True)
    )
    return Verdict.RIGHT if everybody.all(all(explained)) else Verdict.OTHER_ROWS


def _step(count: int) -> int:
    """Every how many rows one is compared: no divisor in common with their number, so that no class is left out."""
    least = -(-count // FEW)
    return next(step for step in itertools.count(least) if math.gcd(step, count) == 1) if least > 1 else 1


def _mixed(weights: Tensor, t: Tensor) -> Tensor:
    """Σ_q w_q t_q, ``[1, ...]``."""
    return (weights @ t.reshape(len(t), -1)).view(1, *t.shape[1:])


def _weights(u: Tensor, rows: list[Tensor | None], ranks: Ranks) -> Tensor:
    """Weights ``[q]`` that make all rows as loud as the loudest, as far as digits allow: none may hide another.

    Rows that are zero count for as loud as the others make them by their cotangents.
    """
    if len(u) == 1:
        return u.new_ones(1)
    sent, limits = loudness(u), torch.finfo(u.dtype)
    found = torch.stack([torch.zeros_like(sent), *(loudness(r) for r in rows if r is not None)]).amax(0)
    if ranks.size > 1:  # the same on all of them
        sent, found = torch.stack(ranks.gather(torch.stack([sent, found]), "check")).amax(0)
    alike = (found / sent.clamp(min=limits.tiny)).amax() * sent
    level = power_of_two(torch.where(found > 0, found.maximum(limits.eps**0.5 * alike), alike))
    return pattern(sent.shape, u) * (level.amax() / level).to(u.dtype)  # torch 2.6 has made it float64


def _apart(a: list[Tensor | None], b: list[Tensor | None], scale: float = 1.0) -> list[tuple[float, float]]:
    """By edge: largest difference of a / scale from b, and largest entry."""
    known = {i: x if y is None else y for i, (x, y) in enumerate(zip(a, b, strict=True))}
    shapes = {i: t for i, t in known.items() if t is not None and t.numel()}
    found: list[Tensor] = []
    for i, like in shapes.items():
        x, y = (torch.zeros_like(like) if t is None else t for t in (a[i], b[i]))
        x = x if scale == 1 else x / scale
        found += [(x - y).abs().amax(), x.abs().amax()]
    flat = torch.stack(found).tolist() if found else []  # one wait for the device
    apart = dict(zip(shapes, zip(flat[::2], flat[1::2], strict=True), strict=True))
    return [apart.get(i, (0.0, 0.0)) for i in known]
