"""Fixed pseudo-random cotangents for checks: no generator, so no random state and no device but the tensor's own."""

from __future__ import annotations

import torch
from torch import Tensor


def pattern(shape: tuple[int, ...] | torch.Size, like: Tensor) -> Tensor:
    """Numbers in ±[½, 1) without a visible order, the same every time, with ``like``'s dtype and device."""
    count = torch.Size(shape).numel()
    index = torch.arange(1, count + 1, dtype=torch.float64, device=like.device)
    fraction = (index * 0.6180339887498949 + 0.1 * (index * 12.9898).sin()).frac()
    sign = torch.where((index * 0.7548776662466927).frac() < 0.5, -1.0, 1.0)
    return (sign * (0.5 + 0.5 * fraction)).to(like.dtype).view(shape)


def loudness(t: Tensor) -> Tensor:
    """Largest entry of each row, ``[n]``, of ``t [n, ...]``."""
    if not t.numel():
        return t.new_zeros(len(t))
    rows = t.detach().reshape(len(t), -1)
    return torch.maximum(rows.amax(1), -rows.amin(1))  # nothing as large as t is written


def power_of_two(size: Tensor) -> Tensor:
    """The nearest powers of two (by which multiplication is exact); 1 where the size is 0 or not finite."""
    usable = size.isfinite() & (size > 0)
    mantissa, exponent = torch.frexp(torch.where(usable, size, 0.5))
    limit = 60 if size.dtype == torch.float32 else 500
    return torch.ldexp(torch.ones_like(mantissa), exponent.clamp(-limit, limit))
