"""Train-mode batch normalisation with the statistics of several ranks (`torch.nn.SyncBatchNorm`), gated.

With closed gates nothing is sent: what flows into the statistics is read off on every rank, and added up once
(``directions.py``). Open gates take one message per layer and direction of a pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from bncurv.batchnorm import BatchNormCoupling, Moments, factors, per_channel
from bncurv.gate import Coupling, Gates
from bncurv.ranks import Ranks, Sum


class _SyncBatchNorm(torch.autograd.Function):
    """The layer with given moments of all ranks; backward as `torch.nn.SyncBatchNorm` with open gates."""

    is_linear = True  # its backward pass

    @staticmethod
    def forward(ctx, x, weight, bias, handle, mean, variance, count, eps, gates, ranks):
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.count, ctx.eps, ctx.gates, ctx.ranks = count, eps, gates, ranks
        ctx.set_materialize_grads(False)
        return nnf.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx, g):
        if g is None:
            return (None,) * 10
        x, weight, mean, variance = ctx.saved_tensors
        axes, closed = (0, *range(2, x.dim())), ctx.gates.closed
        if not closed and torch.is_grad_enabled() and x.requires_grad:  # differentiated again: the moments take part
            mean = Sum.apply(x.sum(axes), ctx.ranks) / ctx.count
            variance = Sum.apply((x - per_channel(x, mean)).square().sum(axes), ctx.ranks) / ctx.count
        invstd = (variance + ctx.eps).rsqrt()
        scale = invstd if weight is None else invstd * weight
        if closed and not ctx.gates.sums:
            return per_channel(x, scale) * g, *(None,) * 9
        normalised = (x - per_channel(x, mean)) * per_channel(x, invstd)
        first, second = g.sum(axes), (g * normalised).sum(axes)
        handle = torch.stack([first, second]) * factors(scale, invstd) if closed and ctx.needs_input_grad[3] else None
        felt = g
        if not closed:
            everywhere = Sum.apply(torch.stack([first, second]), ctx.ranks) / ctx.count
            felt = g - per_channel(x, everywhere[0]) - normalised * per_channel(x, everywhere[1])
        affine = (t if needed else None for t, needed in zip((second, first), ctx.needs_input_grad[1:3], strict=True))
        return per_channel(x, scale) * felt, *affine, handle, *(None,) * 6


class _SyncCoupling(BatchNormCoupling):
    """One whose statistics are those of several ranks."""

    ranks: Ranks

    def _total(self, sums: Tensor) -> Tensor:
        return Sum.apply(sums, self.ranks)


def _moments(x: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor, int]:
    """Mean and biased variance of all ranks' entries, and their number per channel (Chan, Golub & LeVeque 1983)."""
    axes, count = (0, *range(2, x.dim())), x.numel() // x.shape[1]
    mean = x.mean(axes) if count else x.new_zeros(x.shape[1])
    spread = (x - per_channel(x, mean)).square().sum(axes)
    parts = torch.stack(ranks.gather(torch.cat([mean, spread, mean.new_full((1,), count)]), "statistics"))
    means, spreads, counts = parts.split([len(mean), len(mean), 1], 1)
    total = counts.sum()
    mean = (counts * means).sum(0) / total
    return mean, (spreads.sum(0) + (counts * (means - mean).square()).sum(0)) / total, int(total)


def sync_batch_norm(
    arguments: dict[str, Any], name: str, gates: Gates, ranks: Ranks
) -> tuple[Tensor, Coupling | None, dict[str, Tensor]]:
    """As `bncurv.batchnorm.batch_norm`, over all ranks.

    Raises:
        ValueError: if a channel has a single value on all ranks together.
    """
    x, eps, momentum = arguments["input"], arguments["eps"], arguments["momentum"]
    running, weight = (arguments["running_mean"], arguments["running_var"]), arguments.get("weight")
    with torch.no_grad():
        mean, variance, count = _moments(x.detach(), ranks)
        if count == 1:
            raise ValueError(
                f"SyncBatchNorm '{name}' is in training mode and got one value per channel on all {ranks.size} ranks "
                "together, which has no batch statistics. Use at least 2 samples, or put this module in eval mode."
            )
        if running[0] is not None:
            running[0].lerp_(mean.to(running[0]), momentum)
            running[1].lerp_((variance * (count / (count - 1))).to(running[1]), momentum)
        invstd = (variance + eps).rsqrt()
    coupled = x.requires_grad and torch.is_grad_enabled()
    handle = x.new_zeros(2, x.shape[1], requires_grad=True) if coupled else None
    y = _SyncBatchNorm.apply(x, weight, arguments.get("bias"), handle, mean, variance, count, eps, gates, ranks)
    coupling = None
    if handle is not None:
        statistics = Moments.apply(x, mean, invstd, eps, count)
        coupling = _SyncCoupling(name, statistics, gates, handle, x, mean, invstd, weight, eps, count)
        coupling.ranks = ranks
    return y, coupling, {"mean": mean, "invstd": invstd}


def arguments_of(m: nn.SyncBatchNorm, x: Tensor) -> tuple[dict[str, Any], bool]:
    """What the forward of `torch.nn.SyncBatchNorm` calls its function with, and whether on the batch's statistics."""
    m._check_input_dim(x)
    m._check_non_zero_input_channels(x)
    factor = 0.0 if m.momentum is None else m.momentum
    if m.training and m.track_running_stats and m.num_batches_tracked is not None:
        m.num_batches_tracked.add_(1)
        factor = 1.0 / float(m.num_batches_tracked) if m.momentum is None else m.momentum
    on_batch = m.training or (m.running_mean is None and m.running_var is None)
    keeps = not m.training or m.track_running_stats
    running = (m.running_mean, m.running_var) if keeps else (None, None)
    return {
        "input": x, "running_mean": running[0], "running_var": running[1], "weight": m.weight, "bias": m.bias,
        "training": on_batch, "momentum": factor, "eps": m.eps,
    }, on_batch  # fmt: skip
