"""The certificate: with the gates closed, no sample may feel another.

The pull-back with constant statistics is block-diagonal over samples if and only if scaling sample n's cotangent by t_n
scales all gradients of sample n by t_n and does nothing else. That is checked at every recorded layer, for all pairs of
samples: coupling of m with n leaves (t_m / t_n - 1) J_nm u_m behind. The t_n are powers of two, by which rounding
commutes: without coupling nothing at all is left, also where a gradient cancels down to rounding. Two samples differ in
at least one base-32 digit of their indices, one pass per digit. Coupling weaker than `TOLERANCE` is as little harm.
What mixes samples is named by module.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from bncurv.graph import Trace

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-11}
BASE = 32


def _leaks(
    output: Tensor | GradientEdge, shape: torch.Size, edges: list[GradientEdge], samples: int, like: Tensor
) -> bool:
    """Whether scaling the cotangents of ``output [n·t, ...]`` per sample does more than scale those at ``edges``."""
    u = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(like)
    index = torch.arange(samples, device=u.device)

    def pull(t: Tensor) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(output, edges, t, retain_graph=True, allow_unused=True)

    plain, place = pull(u), 1
    while place < samples:
        scale = (2.0 ** (index // place % BASE)).to(like)
        rows = scale.repeat_interleave(shape[0] // samples).view(-1, *(1,) * (len(shape) - 1))
        for p, scaled in zip(plain, pull(rows * u), strict=True):
            if p is None or scaled is None or p.shape[0] % samples:
                continue
            p, scaled = p.reshape(samples, -1), scaled.reshape(samples, -1)
            difference = torch.linalg.vector_norm(scaled / scale[:, None] - p, dim=1).max()
            if bool(difference > TOLERANCE[like.dtype] * torch.linalg.vector_norm(p, dim=1).max()):
                return True
        place *= BASE
    return False


def find_mixing(output: Tensor, trace: Trace, sites: list[int], samples: int) -> str | None:
    """Look for coupling between samples that the gates do not cover; call with the gates closed.

    Args:
        output: the model's output ``[N, ...]``.
        trace: the recorded graph.
        sites: indices of the recorded calls to watch.
        samples: N.

    Returns:
        ``None`` if there is none, else a sentence naming the first module after which samples are mixed.
    """
    edges = [trace.sites[j].edge for j in sites]
    if samples == 1 or not edges or not _leaks(output, output.shape, edges, samples, output):
        return None
    name = "behind the last one"
    for module, shape, edge in trace.modules:
        if shape and shape[0] % samples == 0 and _leaks(edge, shape, edges, samples, output):
            name = f"'{module}'"
            break
    return f"the samples of the batch are mixed in or before module {name}, other than by a known coupled layer."
