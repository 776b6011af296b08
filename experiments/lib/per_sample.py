"""Gradients of many batches at once, and the objects that people call per-sample gradients.

All are ``{parameter: [N, *p]}`` and carry what the loss' reduction puts into the gradient (1/N of a mean).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator

import torch
from backpack import backpack, extend
from backpack.extensions import BatchGrad
from torch import Tensor, nn

import bncurv
from lib.systems import Batch, batch_norms, frozen

Gradients = dict[str, Tensor]


def without_buffers(model: nn.Module) -> nn.Module:
    """A copy whose train-mode BatchNorms keep no running statistics: the same function, without side effects."""
    pure = copy.deepcopy(model)
    for bn in batch_norms(pure):
        if bn.training:
            bn.track_running_stats = False
            bn.running_mean = bn.running_var = bn.num_batches_tracked = None
    return pure


def batch_gradients(
    model: nn.Module, loss_fn: nn.Module, data: Batch, batches: Tensor, chunk: int = 100
) -> Iterator[Gradients]:
    """Gradients of the loss of many batches of one size, ``{parameter: [k, *p]}`` for some batches after others.

    Args:
        model: any module; BatchNorms in train mode use the statistics of each batch.
        loss_fn: maps outputs and targets to a scalar.
        data: ``(X, y)``.
        batches: indices into it, ``[K, B]``.
        chunk: batches at once.
    """
    pure, (X, y) = without_buffers(model), data
    parameters = {name: p.detach() for name, p in pure.named_parameters()}

    def loss(parameters: Gradients, X: Tensor, y: Tensor) -> Tensor:
        return loss_fn(torch.func.functional_call(pure, parameters, (X,)), y)

    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))
    for index in batches.split(chunk):
        yield each(parameters, X[index], y[index])


def draw(n: int, count: int, size: int, seed: int) -> Tensor:
    """Indices of ``count`` batches of independent draws from ``n`` samples, ``[count, size]``."""
    return torch.randint(n, (count, size), generator=torch.Generator().manual_seed(seed))


def gradient_variance(model: nn.Module, loss_fn: nn.Module, data: Batch, batches: Tensor) -> dict[str, float]:
    """Trace of the covariance of the mini-batch gradient over these batches, by parameter."""
    count, sums, squares = len(batches), dict[str, Tensor](), dict[str, float]()
    for part in batch_gradients(model, loss_fn, data, batches):
        for name, g in part.items():
            sums[name] = sums.get(name, 0) + g.sum(0)
            squares[name] = squares.get(name, 0) + float(g.square().sum())
    return {name: (squares[name] - float(sums[name].square().sum()) / count) / (count - 1) for name in sums}


def squared_bias(
    model: nn.Module, loss_fn: nn.Module, data: Batch, batches: Tensor, groups: int = 100
) -> tuple[float, float]:
    """‖E_B ∇L_B - ∇L‖² / ‖∇L‖² without the noise of the mean, and its standard error where it is zero.

    Of the means d_i of groups of batches, products <d_i, d_j> with i ≠ j have no noise in expectation.
    """
    (whole,) = batch_gradients(model, loss_fn, data, torch.arange(len(data[0]))[None])
    g = flat(whole)[0]
    chunk = len(batches) // groups
    d = torch.stack([flat(part).mean(0) - g for part in batch_gradients(model, loss_fn, data, batches, chunk)])
    products = (d @ d.T)[~torch.eye(len(d), dtype=torch.bool)] / g.square().sum()
    return float(products.mean()), float((2 * products.square().mean() / len(products)).sqrt())


def path_gradients(model: nn.Module, loss_fn: nn.Module, data: Batch) -> Gradients:
    """δ_n x_nᵀ of the weights of all Linear layers, δ the cotangents of one ordinary backward pass."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    pure = without_buffers(model)
    for name, layer in pure.named_modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(lambda layer, x, z, name=name: seen.update({name: (x[0], z)}))
    loss = loss_fn(pure(data[0]), data[1])
    deltas = torch.autograd.grad(loss, [z for _, z in seen.values()])
    return {
        f"{name}.weight": torch.einsum("no,ni->noi", delta, x.detach())
        for (name, (x, _)), delta in zip(seen.items(), deltas, strict=True)
    }


def component_gradients(model: nn.Module, loss_fn: nn.Module, data: Batch) -> Gradients:
    """J_nᵀ ∂L/∂F_n."""
    return bncurv.curvature(model, loss_fn, data, bncurv.ComponentGrad()).grad_component


def backpack_gradients(model: nn.Module, loss_fn: nn.Module, data: Batch) -> Gradients:
    """What BackPACK's BatchGrad returns; in train mode the path gradients, with a warning that is kept back."""
    net, loss_fn = extend(without_buffers(model)), extend(copy.deepcopy(loss_fn))
    with backpack(BatchGrad()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss_fn(net(data[0]), data[1]).backward()
    return {name: p.grad_batch for name, p in net.named_parameters()}


def jacobian_rows(model: nn.Module, data: Batch) -> Gradients:
    """Jacobian of the vector of the samples' cross-entropies, each divided by N."""
    net = without_buffers(model)
    losses = nn.functional.cross_entropy(net(data[0]), data[1], reduction="none") / len(data[0])
    J = torch.autograd.grad(losses, list(net.parameters()), torch.eye(len(losses)).to(losses), is_grads_batched=True)
    return dict(zip((name for name, _ in net.named_parameters()), J, strict=True))


def gradient_of(model: nn.Module, loss_fn: nn.Module, data: Batch) -> Gradients:
    """Of the whole batch's loss, ``[1, *p]``."""
    g = torch.autograd.grad(loss_fn(model(data[0]), data[1]), list(model.parameters()))
    return {name: t[None] for (name, _), t in zip(model.named_parameters(), g, strict=True)}


def leave_one_out(model: nn.Module, loss_fn: nn.Module, data: Batch) -> Gradients:
    """Pseudo-values g(X) - (N-1)/N g(X without n) of a mean loss: what influence gradients agree with to O(1/N)."""
    n = len(data[0])
    others = torch.arange(n).expand(n, n)[~torch.eye(n, dtype=torch.bool)].view(n, n - 1)
    (whole,) = batch_gradients(model, loss_fn, data, torch.arange(n)[None])
    parts = list(batch_gradients(model, loss_fn, data, others, chunk=32))
    return {name: g - (n - 1) / n * torch.cat([part[name] for part in parts]) for name, g in whole.items()}


def four_objects(model: nn.Module, loss_fn: nn.Module, data: Batch) -> dict[str, Gradients]:
    """Component, path (Linear weights only), influence and frozen gradients of a batch."""
    res = bncurv.curvature(model, loss_fn, data, bncurv.ComponentGrad(), bncurv.InfluenceGrad())
    return {
        "component": res.grad_component,
        "path": path_gradients(model, loss_fn, data),
        "influence": res.grad_influence,
        "frozen": component_gradients(frozen(model, data[0]), loss_fn, data),
    }


def flat(gradients: Gradients, names: Iterable[str] | None = None) -> Tensor:
    """All (or the named) parameters' gradients side by side, ``[N, D]``."""
    return torch.cat([gradients[name].flatten(1) for name in (gradients if names is None else names)], 1)
