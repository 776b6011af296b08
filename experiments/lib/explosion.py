"""Gradients in deep networks at initialisation: growth per layer, its theory, residual blocks, Jacobians of stacks.

Letters as in the catalogue. At initialisation, in the limit of great width, W relu(z) of decorrelated standard normal z
has the variance (π - 1)/π per unit over the batch, and the backward pass through W and relu keeps squared norms; so
each BatchNorm multiplies the squared norm of the gradient by π/(π - 1) (Yang et al. 2019).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from lib.systems import TINY

RELU_RATE = math.sqrt(math.pi / (math.pi - 1))  # factor of the gradient's norm per layer, great width and batch


def linear_rate(B: int) -> float:
    """Factor of the gradient's squared norm per layer of a wide linear BatchNorm network on batches of ``B``.

    E[1/σ²] = B/(B-3) of B independent standard normals, and M keeps B - 2 of B directions.
    """
    return (B - 2) / (B - 3)


def gradient_norms(
    net: nn.Sequential, X: Tensor, y: Tensor | None = None, of: Literal["weights", "outputs"] = "weights"
) -> Tensor:
    """Norms of the gradients of all Linear weights, or towards all Linear layers' outputs, ``[layers]``, in order.

    Without normalisation and biases the two differ: <W, ∂L/∂W> is the same in every layer of a ReLU network, so that
    weights whose signal vanishes on its way up have gradients of the same size as the others.

    Args:
        net: a network whose ``modules()`` stand in the order of its forward pass.
        X: inputs.
        y: labels for the cross-entropy; default: the loss is a random linear function of the network's outputs.
        of: what the gradients are taken of.
    """
    layers = [layer for layer in net.modules() if isinstance(layer, nn.Linear)]
    seen: list[Tensor] = []
    handles = [layer.register_forward_hook(lambda layer, inputs, output: seen.append(output)) for layer in layers]
    outputs = net(X)
    for handle in handles:
        handle.remove()
    loss = nn.functional.cross_entropy(outputs, y) if y is not None else (outputs * torch.randn_like(outputs)).sum()
    wanted = [layer.weight for layer in layers] if of == "weights" else seen
    return torch.stack([g.norm() for g in torch.autograd.grad(loss, wanted)])


def growth(norms: Tensor, skip: int = 1) -> float:
    """Factor per layer from the last to the first, between the layers that ``skip`` at each end leaves."""
    inner = norms[skip : len(norms) - skip].log()
    return math.exp(float(inner[0] - inner[-1]) / (len(inner) - 1))


class Block(nn.Module):
    """x + BN(W₂ relu(BN(W₁ x))): two layers beside the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [nn.Linear(width, width, bias=False), nn.BatchNorm1d(width, eps=TINY), nn.ReLU()]
        self.body = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def residual(blocks: int, width: int, inputs: int = 64, classes: int = 10) -> nn.Sequential:
    """Linear, BatchNorm, ReLU, then blocks of two layers beside the identity, then a Linear."""
    stem = [nn.Linear(inputs, width, bias=False), nn.BatchNorm1d(width, eps=TINY), nn.ReLU()]
    return nn.Sequential(*stem, *(Block(width) for _ in range(blocks)), nn.Linear(width, classes))


def bn_factors(net: nn.Sequential, X: Tensor) -> tuple[Tensor, Tensor]:
    """What each BatchNorm of a Sequential (γ = 1) does to the squared norm of a gradient g: by 1/s, then by M.

    The loss is a random linear function of the outputs; ε is neglected.

    Returns:
        ``‖g/s‖² / ‖g‖²`` and ``‖M g/s‖² / ‖g/s‖²``, g at the BatchNorm's output, ``[layers]`` each, in order.
    """
    below: list[Tensor] = []
    behind: list[Tensor] = []
    h = X.detach().clone().requires_grad_()
    for layer in net:
        out = layer(h)
        if isinstance(layer, nn.BatchNorm1d):
            below.append(h)
            behind.append(out)
        h = out
    g = torch.autograd.grad((h * torch.randn_like(h)).sum(), [*below, *behind])
    by_scale, by_projection = [], []
    for y, through, at_output in zip(below, g[: len(below)], g[len(below) :], strict=True):
        scaled = (at_output / y.detach().std(0, correction=0)).square().sum()
        by_scale.append(scaled / at_output.square().sum())
        by_projection.append(through.square().sum() / scaled)
    return torch.stack(by_scale), torch.stack(by_projection)


def jacobian_values(net: nn.Module, X: Tensor) -> Tensor:
    """Singular values of ∂F/∂X of the whole batch, ``[N d]`` in falling order; X ``[N, d]``, square maps only."""
    J = torch.autograd.functional.jacobian(net, X, vectorize=True).reshape(X.numel(), X.numel())
    return torch.linalg.svdvals(J.detach())
