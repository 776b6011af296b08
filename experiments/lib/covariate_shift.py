"""Internal covariate shift, measured in two ways: by the distributions of layer inputs, and by gradients.

The distributions are those of the pre-activations: what goes into a nonlinearity, behind the BatchNorm if there is one.
"""

from __future__ import annotations

from statistics import mean

import torch
from torch import Tensor, nn

from lib.systems import Batch, train


class NoisyBatchNorm(nn.BatchNorm1d):
    """BatchNorm whose output is scaled by U(1, 1.5) and shifted by U(-0.5, 0.5) per unit, anew in every forward pass.

    Covariate shift put in on purpose (Santurkar et al. 2018, figure 1b); in eval mode without noise.
    """

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if not self.training:
            return y
        scale, shift = torch.rand(2, self.num_features).to(y)
        return (1 + 0.5 * scale) * y + shift - 0.5


@torch.no_grad()
def preactivations(
    net: nn.Sequential, X: Tensor, kinds: tuple[type[nn.Module], ...] = (nn.ReLU, nn.Sigmoid)
) -> list[Tensor]:
    """Inputs of the nonlinearities, ``[N, width]`` per layer."""
    seen: list[Tensor] = []
    handles = [
        m.register_forward_pre_hook(lambda m, x: seen.append(x[0])) for m in net.modules() if isinstance(m, kinds)
    ]
    net(X)
    for handle in handles:
        handle.remove()
    return seen


def gaussian_kl(new: Tensor, old: Tensor) -> float:
    """KL(new ‖ old) of Gaussians fitted to each unit, mean over the units; samples ``[N, width]``."""
    variance, mean = torch.var_mean(new, 0, correction=0)
    variance_0, mean_0 = torch.var_mean(old, 0, correction=0)
    alive = (variance > 0) & (variance_0 > 0)
    ratio = variance[alive] / variance_0[alive]
    far = (mean - mean_0)[alive].square() / variance_0[alive]
    return float((ratio - 1 - ratio.log() + far).mean() / 2)


def moment_distance(new: Tensor, old: Tensor) -> float:
    """Root mean square over the units of the differences of means and of deviations."""
    means = new.mean(0) - old.mean(0)
    deviations = new.std(0, correction=0) - old.std(0, correction=0)
    return float((means.square() + deviations.square()).mean().sqrt())


def linear_net(weights: list[Tensor], bn: bool) -> nn.Sequential:
    """A linear network from its weights, with BatchNorm behind every layer but the last, or without."""
    layers: list[nn.Module] = []
    for i, weight in enumerate(weights):
        layer = nn.Linear(weight.shape[1], weight.shape[0]).to(weight)
        with torch.no_grad():
            layer.weight.copy_(weight)
            nn.init.zeros_(layer.bias)
        layers += [layer, *([nn.BatchNorm1d(weight.shape[0])] if bn and i < len(weights) - 1 else [])]
    return nn.Sequential(*layers)


def gradient_shift(net: nn.Sequential, data: Batch, lr: float) -> tuple[Tensor, Tensor]:
    """One step of gradient descent, in place, layer by layer; how each layer's gradient changes by the layers below.

    G_i is the gradient of layer i's weights at the old parameters, G'_i with all modules below updated
    (Santurkar et al. 2018, definition 2.1), on the same batch; the loss is the cross-entropy.

    Returns:
        cos(G_i, G'_i) and ‖G_i - G'_i‖/‖G_i‖ of the Linear layers but the first, ``[layers - 1]`` each.
    """

    def loss() -> Tensor:
        return nn.functional.cross_entropy(net(data[0]), data[1])

    parameters = list(net.parameters())
    gradients = dict(zip(parameters, torch.autograd.grad(loss(), parameters), strict=True))
    cosines, changes = [], []
    for i, module in enumerate(net):
        if isinstance(module, nn.Linear) and i > 0:
            G = gradients[module.weight]
            moved = torch.autograd.grad(loss(), module.weight)[0]
            cosines.append((G * moved).sum() / (G.norm() * moved.norm()))
            changes.append((G - moved).norm() / G.norm())
        with torch.no_grad():
            for p in module.parameters():
                p -= lr * gradients[p]
    return torch.stack(cosines), torch.stack(changes)


def movement(net: nn.Sequential, data: Batch, lr: float, steps: int = 10) -> float:
    """Distance of the pre-activations' moments from one step to the next, relative to their size, mean over steps."""
    seen = [preactivations(net, data[0])]
    for step in range(steps):
        train(net, data, 1, lr, batch_size=128, seed=step)
        seen.append(preactivations(net, data[0]))
    moved = [
        moment_distance(b, a) / float(a.square().mean().sqrt())
        for before, behind in zip(seen, seen[1:], strict=False)
        for a, b in zip(before, behind, strict=True)
    ]
    return mean(moved)
