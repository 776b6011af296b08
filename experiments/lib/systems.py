"""Systems that several experiments use: data, networks with BatchNorm, LayerNorm, GroupNorm or none, modes, training.

Everything is made in torch's default dtype (float64 in the experiments) on the given device, and from a generator of
its own or torch's global one, so that a seed decides all of it.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from sklearn import datasets
from torch import Tensor, nn

import bncurv

TINY = 1e-300  # an ε that is zero beside any variance; torch refuses 0 itself

Batch = tuple[Tensor, Tensor]
Device = str | torch.device
Norm = Literal["bn", "ln", "gn", "none"]


# --- data -----------------------------------------------------------------------------------------


def digits(n: int | None = None, seed: int = 0, *, standardised: bool = False, device: Device = "cpu") -> Batch:
    """The first ``n`` of the shuffled 1797 digits: pixels ``[n, 64]`` in [0, 1] and labels.

    ``standardised`` gives each pixel mean 0 and variance 1 over all digits (dead pixels stay 0).
    """
    X, y = datasets.load_digits(return_X_y=True)
    X = (X - X.mean(0)) / (X.std(0) + (X.std(0) == 0)) if standardised else X / 16
    return _shuffled(X, torch.as_tensor(y), n, seed, device)


def table(name: str, n: int | None = None, seed: int = 0, *, device: Device = "cpu") -> Batch:
    """Standardised ``wine``, ``breast_cancer`` (labels) or ``diabetes`` (one standardised target ``[n, 1]``)."""
    X, y = getattr(datasets, f"load_{name}")(return_X_y=True)
    X = (X - X.mean(0)) / X.std(0)
    if name == "diabetes":
        target = torch.as_tensor((y - y.mean()) / y.std(), dtype=torch.get_default_dtype())[:, None]
        return _shuffled(X, target, n, seed, device)
    return _shuffled(X, torch.as_tensor(y), n, seed, device)


def _shuffled(X: object, y: Tensor, n: int | None, seed: int, device: Device) -> Batch:
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))[:n]
    X = torch.as_tensor(X, dtype=torch.get_default_dtype())
    return X[order].to(device), y[order].to(device)


def one_hot(y: Tensor, classes: int = 10) -> Tensor:
    """Targets for squared error."""
    return nn.functional.one_hot(y, classes).to(torch.get_default_dtype())


# --- networks -------------------------------------------------------------------------------------


def norm_layer(
    kind: Norm, features: int, *, images: bool = False, groups: int = 4, eps: float = 1e-5
) -> list[nn.Module]:
    """The normalisation of one layer, as a list (empty for ``"none"``); LayerNorm of images is GroupNorm(1)."""
    if kind == "bn":
        return [(nn.BatchNorm2d if images else nn.BatchNorm1d)(features, eps=eps)]
    if kind == "gn":
        return [nn.GroupNorm(groups, features, eps=eps)]
    if kind == "ln":
        return [nn.GroupNorm(1, features, eps=eps) if images else nn.LayerNorm(features, eps=eps)]
    return []


def mlp(
    widths: Sequence[int],
    norm: Norm = "bn",
    activation: Callable[[], nn.Module] = nn.ReLU,
    *,
    eps: float = 1e-5,
    bias: bool = True,
    he: bool = False,
    device: Device = "cpu",
) -> nn.Sequential:
    """Linear, normalisation, activation for each hidden layer, then a last Linear.

    Args:
        widths: input, hidden ..., output.
        norm: which normalisation stands before each activation.
        activation: makes the nonlinearity.
        eps: of the normalisation.
        bias: whether the hidden Linear layers have biases (redundant below a BatchNorm).
        he: weights from N(0, 2 / fan-in) and zero biases, instead of PyTorch's default.
        device: where it lives.
    """
    layers: list[nn.Module] = []
    for fan_in, width in itertools.pairwise(widths[:-1]):
        layers += [nn.Linear(fan_in, width, bias=bias), *norm_layer(norm, width, eps=eps), activation()]
    net = nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1])).to(device)
    return he_init(net) if he else net


def he_init(net: nn.Module) -> nn.Module:
    """Weights of Linear and Conv2d from N(0, 2 / fan-in), biases zero; in place."""
    for layer in net.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return net


class Residual(nn.Module):
    """conv, norm, ReLU, conv, norm beside the identity, then ReLU."""

    def __init__(self, width: int, norm: Norm) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(2):
            conv = nn.Conv2d(width, width, 3, padding=1, bias=norm == "none")
            layers += [conv, *norm_layer(norm, width, images=True), nn.ReLU()]
        self.body = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))


def residual_net(blocks: int, width: int = 8, norm: Norm = "bn", device: Device = "cpu") -> nn.Sequential:
    """A small residual network for digits ``[N, 64]``: stem, blocks at 8x8, global average, ten classes."""
    stem = nn.Conv2d(1, width, 3, padding=1, bias=norm == "none")
    return nn.Sequential(
        *(nn.Unflatten(1, (1, 8, 8)), stem, *norm_layer(norm, width, images=True), nn.ReLU()),
        *(Residual(width, norm) for _ in range(blocks)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)),
    ).to(device)


# --- modes ----------------------------------------------------------------------------------------


def batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """All BatchNorms, in the model's order."""
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


@torch.no_grad()
def frozen(model: nn.Module, X: Tensor) -> nn.Module:
    """A copy whose train-mode BatchNorms hold the moments of the batch ``X`` as constants (biased variance, eval mode).

    It computes the same outputs for ``X``, but its samples are independent: its curvature is the "own part" of the
    train-mode curvature, and what tools for per-sample quantities compute.
    """
    held = copy.deepcopy(model)
    moments: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def keep(bn: nn.Module, inputs: tuple[Tensor]) -> None:
        x = inputs[0]
        moments[bn] = torch.var_mean(x, dim=[d for d in range(x.dim()) if d != 1], correction=0)

    handles = [bn.register_forward_pre_hook(keep) for bn in batch_norms(held) if bn.training]
    held(X)
    for handle in handles:
        handle.remove()
    for bn, (variance, mean) in moments.items():
        bn.running_mean, bn.running_var, bn.track_running_stats = mean, variance, True
        bn.eval()
    return held


def evaluated(model: nn.Module) -> nn.Module:
    """A copy in eval mode: BatchNorms use their running statistics, which make another function."""
    return copy.deepcopy(model).eval()


# --- training -------------------------------------------------------------------------------------


def train(
    model: nn.Module,
    data: Batch,
    steps: int,
    lr: float,
    *,
    loss_fn: nn.Module | None = None,
    batch_size: int | None = None,
    momentum: float = 0.0,
    seed: int = 0,
    each: Callable[[int], None] | None = None,
) -> None:
    """Gradient descent in place, in the mode that the model is in.

    Args:
        model: any module.
        data: all of it, ``(X, y)``.
        steps: number of updates.
        lr: learning rate.
        loss_fn: default: mean cross-entropy.
        batch_size: of batches drawn without replacement at each step; default: all data (deterministic).
        momentum: heavy-ball.
        seed: of the batches.
        each: called with t = 0 ... steps - 1 before update t.
    """
    X, y = data
    loss_fn = loss_fn or nn.CrossEntropyLoss()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=momentum)
    for t in range(steps):
        if each is not None:
            each(t)
        batch = slice(None) if batch_size is None else torch.randperm(len(X), generator=generator)[:batch_size]
        optimizer.zero_grad()
        loss_fn(model(X[batch]), y[batch]).backward()
        optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def accuracy(model: nn.Module, data: Batch) -> float:
    """Share of samples whose largest output is the label, in the mode that the model is in."""
    return (model(data[0]).argmax(1) == data[1]).to(torch.get_default_dtype()).mean().item()


def steps_to(
    model: nn.Module, data: Batch, share: float, lr: float, *, most: int, batch_size: int = 128, seed: int = 0
) -> int:
    """Updates until so much of the data is classified right, looked at every fifth; ``most`` if that is not reached."""
    for step in range(0, most, 5):
        if accuracy(model, data) >= share:
            return step
        train(model, data, 5, lr, batch_size=batch_size, seed=1000 * seed + step)
    return most


# --- curvature ------------------------------------------------------------------------------------


def ggn(model: nn.Module, data: Batch, loss_fn: nn.Module | None = None, *, top: int | None = None) -> bncurv.LowRank:
    """The GGN in the mode that the model is in, of the mean cross-entropy by default."""
    return bncurv.curvature(model, loss_fn or nn.CrossEntropyLoss(), data, bncurv.LowRankGGN(top)).ggn


@torch.no_grad()
def estimate_population(model: nn.Module, X: Tensor, batch_size: int = 128) -> None:
    """Running statistics as the averages over the batches of ``X``, in place: what eval mode means before training."""
    momenta = {bn: bn.momentum for bn in batch_norms(model)}
    for bn in momenta:
        bn.reset_running_stats()
        bn.momentum = None  # cumulative average
    for batch in X.split(batch_size):
        if len(batch) == batch_size:
            model(batch)
    for bn, momentum in momenta.items():
        bn.momentum = momentum


def modes(model: nn.Module, X: Tensor) -> dict[str, nn.Module]:
    """The same parameters in train mode, frozen at ``X``, and in eval mode."""
    return {"train": model, "frozen": frozen(model, X), "eval": evaluated(model)}


def participation(values: Tensor) -> float:
    """Participation ratio (Σ λ)² / Σ λ²: how many eigenvalues the trace is spread over."""
    return float(values.sum() ** 2 / values.square().sum())


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Least-squares slope of log y against log x."""
    a, b = (torch.tensor(list(v)).log() for v in (x, y))
    return float(((a - a.mean()) * (b - b.mean())).sum() / (a - a.mean()).square().sum())


def relative(a: Tensor, b: Tensor) -> float:
    """‖a - b‖ / ‖b‖."""
    return float((a - b).detach().norm() / b.detach().norm())
