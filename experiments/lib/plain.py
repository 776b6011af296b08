"""What bncurv is compared with: plain `torch.autograd.grad` of the mean cross-entropy, one backward pass per row."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from tqdm import tqdm

Tensors = dict[str, Tensor]


def plain_gradient(model: nn.Module, X: Tensor, y: Tensor) -> Tensors:
    """The gradient of the mean cross-entropy, as any training loop has it."""
    model = copy.deepcopy(model)
    names, params = zip(*model.named_parameters(), strict=True)
    loss = nn.functional.cross_entropy(model(X), y)
    return dict(zip(names, torch.autograd.grad(loss, params), strict=True))


def plain_component_gradients(model: nn.Module, X: Tensor, y: Tensor, samples: list[int]) -> Tensors:
    """Gradients of `loss_n / N` for some samples: one backward pass of the whole batch each."""
    model = copy.deepcopy(model)
    names, params = zip(*model.named_parameters(), strict=True)
    losses = nn.functional.cross_entropy(model(X), y, reduction="none") / len(X)
    grads = [torch.autograd.grad(losses[n], params, retain_graph=True) for n in samples]
    return {name: torch.stack(g) for name, g in zip(names, zip(*grads, strict=True), strict=True)}


def plain_diag_ggn(model: nn.Module, X: Tensor) -> Tensors:
    """The GGN diagonal of the mean cross-entropy: N·C backward passes of the whole batch.

    The Hessian of one sample's loss, `(diag(p) - p pᵀ) / N`, is the sum of `s sᵀ` over the columns
    `s = sqrt(p_c / N) (e_c - p)`; the diagonal is the sum of the squares of all `Jᵀ s`.
    """
    model = copy.deepcopy(model)
    names, params = zip(*model.named_parameters(), strict=True)
    outputs = model(X)
    probabilities = outputs.detach().softmax(dim=1)
    diagonal = [torch.zeros_like(p) for p in params]
    for n, p in enumerate(tqdm(probabilities, desc="plain backward passes", unit="sample")):
        columns = (p / len(X)).sqrt().unsqueeze(1) * (torch.eye(len(p)).to(p) - p)
        for column in columns:
            pulled_back = torch.autograd.grad(outputs[n], params, column, retain_graph=True)
            for total, v in zip(diagonal, pulled_back, strict=True):
                total += v.square()
    return dict(zip(names, diagonal, strict=True))


def relative_error(values: Tensors, truth: Tensors) -> float:
    """Largest deviation, each parameter tensor's measured by its own largest entry."""
    return max(((values[name] - truth[name]).abs().max() / truth[name].abs().max()).item() for name in truth)
