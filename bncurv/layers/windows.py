"""Geometry of convolutions in any number of dimensions: windows of the input, and one channel's way back to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor

SMALL_MAP = 64  # positions up to which the way back is taken as a matrix


class Geometry(NamedTuple):
    """Options of a convolution per axis of its maps; padding before and behind."""

    kernel: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[tuple[int, int]]
    dilation: Sequence[int]


def per_axis(value: int | Sequence[int], length: int) -> tuple[int, ...]:
    """An option of a convolution, given once or per axis."""
    if isinstance(value, int):
        return (value,) * length
    return tuple(value) * (length if len(value) == 1 else 1)


def windows(x: Tensor, geometry: Geometry) -> Tensor:
    """All windows a kernel sees: ``[n, channel, *kernel, *position]``, a strided view of the padded input."""
    kernel, stride, padding, dilation = geometry
    x = nnf.pad(x, [p for lo_hi in reversed(padding) for p in lo_hi])
    size, step = x.shape[2:], x.stride()[2:]
    axes = zip(size, kernel, stride, dilation, strict=True)
    positions = [(length - d * (k - 1) - 1) // st + 1 for length, k, st, d in axes]
    return x.as_strided(
        (*x.shape[:2], *kernel, *positions),
        (
            *x.stride()[:2],
            *(a * d for a, d in zip(step, dilation, strict=True)),
            *(a * st for a, st in zip(step, stride, strict=True)),
        ),
    )


def one_channel_back(delta: Tensor, kernels: Tensor, size: Sequence[int], geometry: Geometry) -> Tensor:
    """Cotangents ``[q, n, i, *size]`` of a convolution's input from those of one output channel each.

    Args:
        delta: cotangents of that channel, ``[q, n, *position]``.
        kernels: its kernel, ``[q, i, *kernel]``.
        size: of the input's maps.
        geometry: of the convolution.
    """
    (q, n, *positions), i = delta.shape, kernels.shape[1]
    count = delta.shape[2:].numel()
    if count > SMALL_MAP:
        return torch.stack([_correlate(d[:, None], w, size, geometry) for d, w in zip(delta, kernels, strict=True)])
    eye = torch.eye(count, dtype=delta.dtype, device=delta.device).view(-1, 1, *positions)
    matrix = _correlate(eye, kernels.flatten(0, 1), size, geometry).unflatten(1, (q, i))  # [position, q, i, *size]
    return (delta.flatten(2) @ matrix.transpose(0, 1).flatten(2)).view(q, n, i, *size)


def _correlate(delta: Tensor, kernels: Tensor, size: Sequence[int], geometry: Geometry) -> Tensor:
    """``[n, i, *size]`` from one output channel ``delta [n, 1, *position]`` with ``kernels [i, *kernel]``.

    As a correlation with the flipped kernel: for a single channel much faster than PyTorch's transposed convolutions.
    """
    kernel, stride, padding, dilation = geometry
    dims, apart = len(stride), [st * (length - 1) + 1 for st, length in zip(stride, delta.shape[2:], strict=True)]
    spread = delta.new_zeros(*delta.shape[:2], *apart)
    places = (slice(None), slice(None), *(slice(None, None, st) for st in stride))
    spread[places] = delta
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    # a window that starts at -lo covers input positions up to reach - lo
    pads = [(r - lo, length - a + lo) for r, (lo, _), length, a in zip(reach, padding, size, apart, strict=True)]
    spread = nnf.pad(spread, [p for lo_hi in reversed(pads) for p in lo_hi])
    flipped = kernels.flip(*range(1, 1 + dims))[:, None]
    return torch.convolution(spread, flipped, None, (1,) * dims, (0,) * dims, dilation, False, (0,) * dims, 1)
