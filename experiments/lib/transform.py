"""The BatchNorm transform written out: forward, backward, second derivative, inference.

Every function takes inputs ``[N, C, ...]`` and treats each channel for itself; m counts all entries of a channel.
Letters as in the catalogue: μ, σ² (biased), s = √(σ² + ε), ŷ = (y - μ)/s, ρ = σ²/s², M = I - 11ᵀ/m - ŷŷᵀ/m.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, ``[C]`` each."""
    axes = [d for d in range(x.dim()) if d != 1]
    variance, mean = torch.var_mean(x, axes, correction=0)
    return mean, variance


def per_channel(v: Tensor, x: Tensor) -> Tensor:
    """``[C]`` shaped to multiply ``x [N, C, ...]``."""
    return v.view(1, -1, *[1] * (x.dim() - 2))


def transform(x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """γ x̂ + β and x̂ = (x - μ)/√(σ² + ε)."""
    mean, variance = moments(x)
    normal = (x - per_channel(mean, x)) * per_channel((variance + eps).rsqrt(), x)
    return per_channel(gamma, x) * normal + per_channel(beta, x), normal


def backward(cotangent: Tensor, x: Tensor, gamma: Tensor, eps: float) -> dict[str, Tensor]:
    """Ioffe & Szegedy's formulas (2015, section 3), each term under its name.

    Returns:
        ``normal`` ∂ℓ/∂x̂, ``variance`` ∂ℓ/∂σ², ``mean`` ∂ℓ/∂μ = ``mean_1`` + ``mean_2`` (the second term is identically
        zero, since Σ (x_i - μ) = 0), ``x``, ``gamma``, ``beta``.
    """
    axes = [d for d in range(x.dim()) if d != 1]
    m = x.numel() // x.shape[1]
    mean, variance = moments(x)
    centred, invstd = x - per_channel(mean, x), (variance + eps).rsqrt()
    d: dict[str, Tensor] = {"normal": cotangent * per_channel(gamma, x)}
    d["variance"] = (d["normal"] * centred).sum(axes) * -0.5 * invstd**3
    d["mean_1"] = -d["normal"].sum(axes) * invstd
    d["mean_2"] = d["variance"] * (-2 * centred).sum(axes) / m
    d["mean"] = d["mean_1"] + d["mean_2"]
    through_variance = per_channel(d["variance"], x) * 2 * centred / m
    d["x"] = d["normal"] * per_channel(invstd, x) + through_variance + per_channel(d["mean"], x) / m
    d["gamma"] = (cotangent * centred * per_channel(invstd, x)).sum(axes)
    d["beta"] = cotangent.sum(axes)
    return d


def projector(y: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """M ``[m, m]``, ŷ ``[m]`` and s of one channel's entries ``y [m]``."""
    m = len(y)
    s = (y.var(correction=0) + eps).sqrt()
    normal = (y - y.mean()) / s
    return torch.eye(m).to(y) - 1 / m - torch.outer(normal, normal) / m, normal, s


def jacobian(y: Tensor, gamma: float, eps: float) -> Tensor:
    """∂z/∂y = (γ/s) M of one channel, ``[m, m]``. Its singular values: γ/s, but for 1 and ŷ 0 and (γ/s)(1 - ρ)."""
    M, _, s = projector(y, eps)
    return gamma / s * M


def hessian(y: Tensor, gamma: float, eps: float, g: Tensor, H: Tensor) -> Tensor:
    """Hessian with respect to y of L(z(y)), from the gradient g ``[m]`` and Hessian H ``[m, m]`` of L at z; any ε.

    (γ²/s²) M H M - γ/(m s²) [(M g) ŷᵀ + ŷ (M g)ᵀ + <ŷ, g> M]: the first term is what the GGN keeps.
    """
    M, normal, s = projector(y, eps)
    outer = torch.outer(M @ g, normal)
    return gamma**2 / s**2 * M @ H @ M - gamma / (len(y) * s**2) * (outer + outer.T + (normal @ g) * M)


def population(means: Tensor, variances: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """E[x] and Var[x] for inference, from the means and biased variances of batches of m (first axis)."""
    return means.mean(0), m / (m - 1) * variances.mean(0)


def folded(layer: nn.Linear | nn.Conv2d, bn: nn.Module) -> nn.Module:
    """The layer that computes ``bn(layer(x))`` in eval mode."""
    result = copy.deepcopy(layer)
    scale = bn.weight * (bn.running_var + bn.eps).rsqrt()
    with torch.no_grad():
        result.weight.mul_(scale.view(-1, *[1] * (layer.weight.dim() - 1)))
        bias = layer.bias if layer.bias is not None else torch.zeros_like(scale)
        result.bias = nn.Parameter((bias - bn.running_mean) * scale + bn.bias)
    return result


def unfolded_rows(rows: dict[str, Tensor], layer: nn.Linear, bn: nn.Module) -> dict[str, Tensor]:
    """Rows of V of layer and BatchNorm in eval mode, from those of the folded layer: the chain rule through `folded`.

    Args:
        rows: ``weight [K, out, in]`` and ``bias [K, out]`` of the folded layer.
        layer: the layer below.
        bn: the BatchNorm, in eval mode.

    Returns:
        ``weight``, ``bias`` of the layer and ``gamma``, ``beta``.
    """
    invstd = (bn.running_var + bn.eps).rsqrt()
    scale = bn.weight * invstd
    through = (rows["weight"] * layer.weight).sum(2) + rows["bias"] * (layer.bias - bn.running_mean)
    return {
        "weight": rows["weight"] * scale[:, None],
        "bias": rows["bias"] * scale,
        "gamma": through * invstd,
        "beta": rows["bias"],
    }
