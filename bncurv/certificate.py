"""The certificate: with the gates closed, no sample may feel another.

A cotangent supported on some samples must, with the statistics held constant, have zero gradient at all other
samples, at every recorded layer. Two passes (a random half of the samples and its complement) check that; any
layer that mixes samples behind the gates' back shows. What it finds is named by module.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from bncurv.record import Trace


def _probe(shape: torch.Size, samples: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Two cotangents ``[2, *shape]`` supported on complementary halves of the samples, and the halves."""
    generator = torch.Generator().manual_seed(0)
    half = torch.randperm(samples, generator=generator) < max(1, samples // 2)
    halves = torch.stack([half, ~half])
    values = torch.randn(shape, generator=generator, dtype=torch.float32).to(like)
    mask = halves.repeat_interleave(shape[0] // samples, 1).to(like)
    return values * mask.view(2, shape[0], *(1,) * (len(shape) - 1)), halves


def _leaks(
    output: Tensor | GradientEdge, shape: torch.Size, edges: list[GradientEdge], samples: int, like: Tensor
) -> bool:
    """Whether a probe at ``output`` reaches other samples at one of the ``edges``."""
    cotangents, halves = _probe(shape, samples, like)
    if not edges:
        return False
    got = torch.autograd.grad(
        output, edges, cotangents, retain_graph=True, allow_unused=True, is_grads_batched=True
    )
    for g in got:
        if g is None or g.shape[1] % samples:
            continue
        rows = g.reshape(2, samples, -1).abs().amax(-1)
        if bool((rows.masked_fill(halves.to(rows.device), 0) != 0).any()):
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
    if samples == 1:
        return None
    edges = [trace.sites[j].edge for j in sites]
    if not _leaks(output, output.shape, edges, samples, output):
        return None
    for name, shape, edge in trace.modules:
        if shape and shape[0] % samples == 0 and _leaks(edge, shape, edges, samples, output):
            return f"the samples of the batch are mixed in or before module '{name}', not through a known coupled layer."
    return "the samples of the batch are mixed behind the last module, not through a known coupled layer."
