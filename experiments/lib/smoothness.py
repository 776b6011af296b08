"""Smoothness of the loss under BatchNorm (Santurkar et al. 2018): bounds in closed form, and the landscape along -∇L.

Letters as in the catalogue: g = ∇_z L at a BatchNorm's output z = γ ŷ + β of one channel, m entries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lib.systems import Batch


def gradient_bound(g: Tensor, y: Tensor, gamma: float) -> Tensor:
    """(γ²/σ²)(‖g‖² - <1, g>²/m - <ŷ, g>²/m): theorem 4.1's right side; equals ‖∇_y L̂‖² at ε = 0. Vectors ``[m]``."""
    m = len(y)
    sigma = y.std(correction=0)
    normal = (y - y.mean()) / sigma
    return (gamma / sigma) ** 2 * (g @ g - g.sum() ** 2 / m - (normal @ g) ** 2 / m)


def printed_weight_bound(g: Tensor, y: Tensor, gamma: float, size: float) -> Tensor:
    """Theorem 4.4 as printed: (γ²/σ²)(G² - m μ_g² - λ² <g, ŷ>²) with G = max ‖∇_W L‖² = λ² ‖g‖², over ‖X‖ ≤ λ."""
    sigma = y.std(correction=0)
    normal = (y - y.mean()) / sigma
    worst = size**2 * (g @ g)
    return (gamma / sigma) ** 2 * (worst**2 - len(y) * g.mean() ** 2 - size**2 * (g @ normal) ** 2)


def isometry(m: int, d: int, size: float) -> Tensor:
    """Inputs ``[m, d]``, m ≤ d, with X Xᵀ = size² I: of all of norm ``size`` they make ‖Xᵀ v‖ largest, for every v."""
    return size * torch.linalg.qr(torch.randn(d, m)).Q.T


def nearest_rescaling(target: Tensor, start: Tensor) -> Tensor:
    """The positive multiple of ``target`` (0 in the limit) that is nearest to ``start``."""
    return ((target @ start) / (target @ target)).clamp(min=0) * target


def along_gradient(net: nn.Module, data: Batch, sizes: Sequence[float]) -> dict[str, float]:
    """The landscape on the way θ - η ∇L, for step sizes η; parameters as before afterwards.

    Returns:
        ``range`` of the loss over the steps; ``change``: largest ‖∇L(θ) - ∇L(θ - η ∇L)‖; ``beta``: largest of
        the same divided by the distance η ‖∇L‖, the effective smoothness.
    """
    parameters = list(net.parameters())
    start = [p.detach().clone() for p in parameters]

    def gradient() -> tuple[float, list[Tensor]]:
        loss = nn.functional.cross_entropy(net(data[0]), data[1])
        return loss.item(), list(torch.autograd.grad(loss, parameters))

    _, here = gradient()
    length = math.sqrt(sum(float(g.square().sum()) for g in here))
    losses, changes, betas = [], [], []
    for size in sizes:
        with torch.no_grad():
            for p, origin, g in zip(parameters, start, here, strict=True):
                p.copy_(origin - size * g)
        loss, there = gradient()
        losses.append(loss)
        changes.append(math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(here, there, strict=True))))
        betas.append(changes[-1] / (size * length))
    with torch.no_grad():
        for p, origin in zip(parameters, start, strict=True):
            p.copy_(origin)
    return {"range": max(losses) - min(losses), "change": max(changes), "beta": max(betas)}
