"""The coupled way against one ordinary backward pass: Σ_k w_k V[k] must be Jᵀ Σ_k w_k s_k, for every parameter.

Whatever acts on a graph without leaving a mark (a hook on a node, say), a layer's product that is wrong, or digits that
the coupled way loses to cancellation show here, before anything is handed out.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from bncurv.precision import EXACT, ROUNDING

MOST = sys.float_info.max  # of what is a number
FACTORS = 0.7, 0.9, 1.3  # rounding moves with them, and not with 2


class Sum(NamedTuple):
    """Σ_k w_k V[k] of a parameter by the coupled way.

    Attributes:
        value: ``[*p]``.
        terms: the largest entries of what it was added up from: its own rounding is relative to them.
        slack: what may be missing on purpose.
    """

    value: Tensor
    terms: float
    slack: float = 0.0


class Difference(NamedTuple):
    """How far the coupled way is from an ordinary pass, and why.

    Attributes:
        size: relatively; infinite where the coupled way gives no number.
        cancelled: whether the coupled way's rounding explains it.
        theirs: whether an ordinary pass' own rounding does: nothing is known yet.
    """

    size: float
    cancelled: bool
    theirs: bool = False


def differences(
    pull: Callable[[Tensor], Mapping[str, Tensor]],
    u: Tensor,
    coupled: Mapping[str, Sum],
    terms: Callable[[str], float],
    anywhere: Callable[[list[str]], list[str]] = list,
) -> dict[str, Difference]:
    """Where the coupled way is not what an ordinary pass is, by parameter; within `EXACT` it is.

    An ordinary pass' own rounding is seen in two ways: it moves when the cotangent is scaled, but not by a power of two
    (there a random backward does), and it is relative to the terms of its sums. Where all that an ordinary pass gives
    is rounding, the coupled way may have a little more.

    Args:
        pull: an ordinary pass with open gates, ``[n, *output]`` → ``[*p]`` by parameter.
        u: Σ_c w[n, c] s_(n, c).
        coupled: the same by the coupled way.
        terms: largest sum of a parameter's product with all terms taken positive.
        anywhere: those that any rank suspects: all go through the same passes.
    """
    truth = pull(u)
    apart = dict(zip(coupled, _all_largest(s.value - truth[name] for name, s in coupled.items()), strict=True))
    both = (_all_largest(truth[name] for name in coupled), _all_largest(s.value for s in coupled.values()))
    size = dict(zip(coupled, map(max, *both), strict=True))
    suspects = [n for n, s in coupled.items() if not apart[n] <= min(EXACT[u.dtype] * size[n] + s.slack, MOST)]
    looked_at = anywhere(suspects)
    scaled = {factor: pull(factor * u) for factor in ((*FACTORS, 2.0) if looked_at else ())}
    found, limits = {}, torch.finfo(u.dtype)
    for name in looked_at:
        off = {factor: largest(got[name] / factor - truth[name]) for factor, got in scaled.items()}
        linear = off[2.0] <= EXACT[u.dtype] * largest(truth[name]) + limits.tiny / limits.eps
        noise, ulps = ROUNDING * max(off[factor] for factor in FACTORS), ROUNDING**2 * limits.eps
        cancelled = apart[name] <= ulps * coupled[name].terms
        if cancelled:  # then the ordinary pass is better, unless all that it gives is rounding
            limit = noise if largest(truth[name]) > noise else ROUNDING * noise
        else:
            limit = max(noise, ulps * terms(name))
        number = apart[name] <= MOST
        if name not in suspects:
            continue
        relative = apart[name] / size[name] if number else math.inf
        found[name] = Difference(relative, cancelled and linear, number and linear and apart[name] <= limit)
    return found


def largest(t: Tensor) -> float:
    """Largest entry by magnitude."""
    return _all_largest([t])[0]


def _all_largest(tensors: Iterable[Tensor]) -> list[float]:
    """Of each, with one wait for the device."""
    found = [t.abs().amax() if t.numel() else t.new_zeros(()) for t in tensors]  # several times faster than the norm
    return torch.stack(found).tolist() if found else []
