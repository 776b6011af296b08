"""The certificate: with the gates closed, no sample may feel another.

The pull-back with constant statistics is block-diagonal over samples if and only if scaling sample n's cotangent by f_n
scales all gradients of sample n by f_n and does nothing else. That is checked at every recorded layer, entry by entry,
for all pairs of samples: coupling of n' with n leaves (f_n' / f_n - 1) J_nn' u_n' behind in row n. The f_n are powers
of two, by which rounding commutes: without coupling nothing at all is left, also where a gradient cancels down to
rounding. They are 2^digit / loudness. The loudness, sample n's largest gradient, makes what a quiet sample leaves in a
loud one's row as large as it is beside its own. The digits are those of n's rank, the quieter the higher, to base 32,
one pass per digit: the highest digit in which two samples differ adds to what their loudness makes of f. The cotangents
u are the loss' own columns, mixed: what they do not reach plays no part.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from bncurv.graph import Trace
from bncurv.precision import COUPLED
from bncurv.probes import loudness, pattern, power_of_two

BASE = 32
Gradients = list[Tensor | None]


def leaks(pull: Callable[[Tensor], Gradients], u: Tensor, plain: Gradients, samples: int) -> bool:
    """Whether `leaking` finds anything."""
    return bool(leaking(pull, u, plain, samples))


def leaking(pull: Callable[[Tensor], Gradients], u: Tensor, plain: Gradients, samples: int) -> set[int]:
    """Where scaling the cotangents ``u [n·t, ...]`` per sample does more than scale their gradients.

    Args:
        pull: an ordinary backward pass.
        u: cotangents, sample by sample.
        plain: their gradients, ``[n·t, ...]`` each; others are passed over.
        samples: N.

    Returns:
        Indices into ``plain``.
    """
    found = set[int]()
    checked = [i for i, p in enumerate(plain) if p is not None and p.numel() and p.shape[0] % samples == 0]
    before = [_by_sample(plain[i], samples) for i in checked]
    if not before:
        return found
    sizes = [loudness(p) for p in before]
    level, place = power_of_two(torch.stack(sizes).amax(0)), 1
    rank = level.argsort(descending=True).argsort()
    while place < samples:
        scale = torch.ldexp(1 / level, rank // place % BASE)
        scaled = pull(u * scale.repeat_interleave(len(u) // samples).view(-1, *(1,) * (u.dim() - 1)).to(u.dtype))
        for i, p, size in zip(checked, before, sizes, strict=True):
            after = scaled[i]
            back = torch.zeros_like(p) if after is None else _by_sample(after, samples) / scale[:, None].to(p.dtype)
            if bool(((back - p).abs() > COUPLED[p.dtype] * p.abs() + _rounded(p, size)[:, None]).any()):
                found.add(i)
        if len(found) == len(checked):
            break
        place *= BASE
    return found


def _rounded(p: Tensor, size: Tensor) -> Tensor:
    """What may be left without coupling, by row: numbers too small for all their digits.

    On devices whose sums come in any order also rounding.
    """
    limits = torch.finfo(p.dtype)
    relative = 2.0**30 * limits.tiny + (0.0 if p.device.type == "cpu" else 8 * limits.eps)
    return relative * size + limits.tiny / limits.eps


def _by_sample(p: Tensor | None, samples: int) -> Tensor:
    assert p is not None
    return p.reshape(samples, -1)


def find_mixing(pull: Callable[[Tensor], Gradients], u: Tensor, plain: Gradients, trace: Trace) -> str | None:
    """Look for coupling between samples that the gates do not cover; call with the gates closed.

    Args:
        pull: an ordinary backward pass from the model's output to the recorded calls to watch.
        u: cotangents ``[n, *output]``.
        plain: their gradients.
        trace: the recorded graph.

    Returns:
        ``None`` if there is none, else a sentence with the cause: the first module after which samples are mixed.
    """
    samples = len(u)
    if samples == 1 or not leaks(pull, u, plain, samples):
        return None
    if trace.ungated:
        return trace.ungated[0]
    name = "behind the last one"
    edges = [site.edge for site in trace.sites]
    for module, shape, edge in trace.modules:
        if shape and shape[0] and shape[0] % samples == 0:

            def from_here(v: Tensor, edge: GradientEdge = edge) -> Gradients:
                return list(torch.autograd.grad(edge, edges, v, retain_graph=True, allow_unused=True))

            v = pattern(shape, u)
            if leaks(from_here, v, from_here(v), samples):
                name = f"'{module}'"
                break
    return f"the samples of the batch are mixed in or before module {name}, other than by a known coupled layer."
