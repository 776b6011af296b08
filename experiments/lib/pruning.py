"""Saliencies of weights, networks without some of them, and what one weight's removal does."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bncurv
from lib.systems import Batch, estimate_population, evaluated

LOSS = nn.CrossEntropyLoss()
SECOND = "½ h θ² - g θ"
WAYS = "train-mode diagonal", "eval-mode diagonal", "magnitude"

Weights = dict[str, Tensor]


def saliencies(net: nn.Module, data: Batch, size: int) -> dict[str, Weights]:
    """What each way thinks that a weight is worth: of convolutions and linear layers, not of BatchNorms."""
    loader = DataLoader(TensorDataset(*data), batch_size=size, drop_last=True)
    weights = {name: p.detach() for name, p in net.named_parameters() if p.dim() > 1}

    def obd(model: nn.Module) -> Weights:
        res = bncurv.curvature(model, LOSS, loader, bncurv.DiagGGNExact(), params=list(weights))
        return {name: h * weights[name] ** 2 / 2 for name, h in res.diag_ggn_exact.items()}

    ways = obd(net), obd(evaluated(net)), {name: w**2 for name, w in weights.items()}
    return dict(zip(WAYS, ways, strict=True))


def pruned(net: nn.Module, saliency: Weights, share: float, X: Tensor) -> nn.Module:
    """A copy without the least salient share of all weights, with batch statistics of its own, in eval mode."""
    copied = copy.deepcopy(net)
    values = torch.cat([s.flatten() for s in saliency.values()])
    removed = torch.zeros_like(values, dtype=torch.bool)
    removed[values.argsort()[: round(share * len(values))]] = True
    parts = removed.split([s.numel() for s in saliency.values()])
    with torch.no_grad():
        for (name, s), part in zip(saliency.items(), parts, strict=True):
            dict(copied.named_parameters())[name][part.view_as(s)] = 0
    estimate_population(copied.train(), X)
    return copied.eval()


def emptied(net: nn.Module, name: str) -> int:
    """Units of a layer that have lost all inputs."""
    return int((dict(net.named_parameters())[name] == 0).flatten(1).all(1).sum())


def single(net: nn.Module, data: Batch, name: str, count: int) -> dict[str, Tensor]:
    """Rise of the train-mode loss without one weight, and what is said of it; of weights drawn by chance."""
    weight = dict(net.named_parameters())[name]
    h = bncurv.curvature(net, LOSS, data, bncurv.DiagGGNExact(), params=[name]).diag_ggn_exact[name].flatten()
    g = torch.autograd.grad(LOSS(net(data[0]), data[1]), weight)[0].flatten()
    chosen, w, rises = torch.randperm(weight.numel())[:count], weight.detach().flatten().clone(), []
    with torch.no_grad():
        before = LOSS(net(data[0]), data[1])
        for i in chosen:
            weight.view(-1)[i] = 0
            rises.append(LOSS(net(data[0]), data[1]) - before)
            weight.view(-1)[i] = w[i]
    h, g, w = h[chosen], g[chosen], w[chosen]
    return {"rise": torch.stack(rises), SECOND: h * w**2 / 2 - g * w, "½ h θ²": h * w**2 / 2, "θ²": w**2}


def ranks(a: Tensor, b: Tensor) -> float:
    """Rank correlation (Spearman's)."""
    return float(torch.corrcoef(torch.stack([x.argsort().argsort().to(x.dtype) for x in (a, b)]))[0, 1])
