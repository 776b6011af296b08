"""The certificate: with the gates closed, no sample may feel another.

The pull-back with constant statistics is block-diagonal over samples if and only if scaling sample n's cotangent by t_n
scales all gradients of sample n by t_n and does nothing else. Two passes with random t check that at every recorded
layer, for all pairs of samples at once: coupling of m with n leaves (t_m - t_n) J_nm u_m behind. Coupling weaker than
rounding (`TOLERANCE`) cannot be told from rounding, and does as little harm. What mixes samples is named by module.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from bncurv.record import Trace

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-11}


def _leaks(
    output: Tensor | GradientEdge, shape: torch.Size, edges: list[GradientEdge], samples: int, like: Tensor
) -> bool:
    """Whether scaling the cotangents of ``output [n·t, ...]`` per sample does more than scale those at ``edges``."""
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(shape, generator=generator).to(like)
    scale = (0.5 + torch.rand(samples, generator=generator)).to(like)
    rows = scale.repeat_interleave(shape[0] // samples).view(-1, *(1,) * (len(shape) - 1))
    got = [torch.autograd.grad(output, edges, t, retain_graph=True, allow_unused=True) for t in (u, rows * u)]
    for g in zip(*got, strict=True):
        if g[0] is None or g[0].shape[0] % samples:
            continue
        plain, scaled = (t.reshape(samples, -1) for t in g)
        difference = torch.linalg.vector_norm(scaled - scale[:, None] * plain, dim=1).max()
        if bool(difference > TOLERANCE[like.dtype] * torch.linalg.vector_norm(plain, dim=1).max()):
            return True
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
