"""Wide networks and their Fisher matrix (Karakida et al. 2019): normalisation in one place or another.

F = Σ_n J_nᵀ J_n / N, the GGN of half the squared error.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

import bncurv
from lib.systems import ggn


class MeanSubtraction(nn.Module):
    """x minus its mean over the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


bncurv.register_coupled(MeanSubtraction, lambda module, x: x.mean(0), lambda module, x, copies: x - copies)

LAST: dict[str, Callable[[int], list[nn.Module]]] = {
    "none": lambda C: [],
    "bn": lambda C: [nn.BatchNorm1d(C)],
    "mean": lambda C: [MeanSubtraction()],
}


def wide(
    width: int, classes: int, *, hidden: bool = False, last: str = "none", act: Callable[[], nn.Module] = nn.ReLU
) -> nn.Sequential:
    """One hidden layer; weights from N(0, 2 / fan-in), biases from N(0, 0.1).

    Args:
        width: of the input and the hidden layer.
        classes: outputs.
        hidden: whether a BatchNorm stands before the activation.
        last: behind the outputs: ``"none"``, ``"bn"`` or ``"mean"`` (batch mean subtracted).
        act: the nonlinearity.
    """
    below = [nn.Linear(width, width), *([nn.BatchNorm1d(width)] if hidden else []), act()]
    net = nn.Sequential(*below, nn.Linear(width, classes), *LAST[last](classes))
    for layer in net.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=math.sqrt(2 / layer.in_features))
            nn.init.normal_(layer.bias, std=math.sqrt(0.1))
    return net.train()


def largest(net: nn.Module, X: Tensor, classes: int) -> float:
    """λ_max of F at the batch X, in the mode that the network is in: batch statistics are functions of θ."""
    nothing = torch.zeros(len(X), classes).to(X)  # targets do not enter
    return float(ggn(net, (X, nothing), nn.MSELoss(), top=1).eigenvalues[0]) * classes / 2
