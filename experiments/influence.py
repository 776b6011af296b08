"""Influence functions through BatchNorm: what less weight on a sample does to a test loss, predicted and computed.

    python experiments/influence.py [--quick] [--seed S] [--device D] [--out DIR] [--write]

Every sample stands in a train-mode batch four times; one copy of sample n left out changes loss and batch statistics.
Predicted: ¼ ∇L_testᵀ (G + δ I)⁻¹ g_n with influence gradients g_n (`InfluenceProjection`: all N for two passes). The
same with component gradients, or in eval mode, forgets what the sample does to the statistics. True: trained on.
"""

from __future__ import annotations

import copy
import sys

import torch
from lib import figures
from lib.command import Run
from lib.gallery import show, table
from lib.per_sample import without_buffers
from lib.systems import Batch, digits, evaluated, mlp, train
from torch import Tensor, nn

import bncurv

LOSS = nn.CrossEntropyLoss()
DAMPING = 0.1  # δ: nobody moves far, ½ δ ‖θ - θ_0‖² is part of what is minimised
COPIES = 4
LOOKS = {
    "influence": {"color": figures.BLUE, "marker": "o", "label": "influence gradients"},
    "component": {"color": figures.PURPLE, "marker": "v", "label": "component gradients"},
    "eval mode": {"color": figures.GREEN, "marker": "^", "label": "all of it in eval mode"},
}
CHECK = "influence, the Hessian in G's place"


def gradient(net: nn.Module, loss: Tensor) -> Tensor:
    """∇ of a loss, as one vector."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))])


def hessian(net: nn.Module, data: Batch) -> Tensor:
    """∇² of the loss, of which G is a part."""
    pure, names = without_buffers(net), [name for name, _ in net.named_parameters()]
    shapes = [p.shape for p in net.parameters()]

    def loss(theta: Tensor) -> Tensor:
        parts = theta.split([shape.numel() for shape in shapes])
        values = {name: t.view(shape) for name, t, shape in zip(names, parts, shapes, strict=True)}
        return LOSS(torch.func.functional_call(pure, values, (data[0],)), data[1])

    return torch.func.hessian(loss)(nn.utils.parameters_to_vector(net.parameters()).detach())


def predictions(net: nn.Module, data: Batch, test: Batch) -> dict[str, Tensor]:
    """Change of the test loss for each sample left out, by way."""
    found = {}
    for mode, model in (("train", net), ("eval", evaluated(net))):
        G = bncurv.curvature(model, LOSS, data, bncurv.LowRankGGN()).ggn
        g_test = gradient(model, LOSS(model(test[0]), test[1]))
        v = G.unflatten(G.solve(g_test, DAMPING))
        res = bncurv.curvature(model, LOSS, data, bncurv.InfluenceProjection(v), bncurv.ComponentGrad())
        found[mode] = res.influence_projection
        found[f"{mode}, component"] = sum((g * v[name]).flatten(1).sum(1) for name, g in res.grad_component.items())
        if mode == "train":
            H = hessian(net, data) + DAMPING * torch.eye(G.dim, device=G.device)
            v = bncurv.InfluenceProjection(G.unflatten(torch.linalg.solve(H, g_test)))
            found["Hessian"] = bncurv.curvature(model, LOSS, data, v).influence_projection
    ways = zip((*LOOKS, CHECK), ("train", "train, component", "eval", "Hessian"), strict=True)
    return {way: found[key] / COPIES for way, key in ways}


def trained_on(net: nn.Module, data: Batch, keep: Tensor) -> nn.Module:
    """The minimum near ``net`` of the loss of the rows kept, in units of all, plus ½ δ ‖θ - θ_0‖²."""
    moved, (X, y) = copy.deepcopy(net), (data[0][keep], data[1][keep])
    start, parameters = [p.detach() for p in net.parameters()], list(moved.parameters())
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=300, tolerance_grad=1e-8, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        distance = sum((p - p0).square().sum() for p, p0 in zip(parameters, start, strict=True))
        loss = len(X) / len(data[0]) * LOSS(moved(X), y) + DAMPING / 2 * distance
        loss.backward()
        return loss

    optimizer.step(closure)
    if (left := max(float(p.grad.abs().max()) for p in parameters)) > 1e-6:
        raise RuntimeError(f"no minimum: a gradient of {left:.0e} is left.")
    optimizer.zero_grad()
    return moved


def truth(run: Run, net: nn.Module, data: Batch, test: Batch) -> Tensor:
    """Test loss with one copy less of each sample, less that with all."""
    often, losses = (data[0].repeat(COPIES, 1), data[1].repeat(COPIES)), []
    everyone = torch.arange(len(often[0]))
    for n in range(-1, len(data[0])):
        moved = trained_on(net, often, everyone[everyone != n])
        losses.append(float(LOSS(moved(test[0]), test[1]).detach()))
        run.tick()
    return torch.tensor(losses[1:]) - losses[0]


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's."""
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


def picture(predicted: dict[str, Tensor], true: Tensor) -> figures.Figure:
    """Predicted against true change, one panel for each way."""
    figure, axes = figures.panels(3, size=(12.5, 4.6))
    for ax, (way, look) in zip(axes, LOOKS.items(), strict=True):
        ax.sharey(axes[0])
        ax.axline((0, 0), slope=1, color=figures.BLACK, linewidth=1)
        ax.plot(1000 * true, 1000 * predicted[way], linestyle="", **look)
        title = f"{look['label']}: r = {correlation(predicted[way], true):.3f}"
        ax.set(xlabel="true change of the test loss [10⁻³]", title=title)
    axes[0].set_ylabel("predicted change [10⁻³]")
    return figure


def application(run: Run) -> str:
    """Correlation and slope, by way."""
    N, M = run.pick(96, 16), run.pick(256, 32)
    run.expect(N + 1)
    X, y = digits(N + M, run.seed, device=run.device)
    data, test = (X[:N], y[:N]), (X[N:], y[N:])
    net = mlp((64, 16, 10), activation=nn.Tanh, device=run.device).train()
    train(net, data, run.pick(1000, 100), 0.2)
    predicted, true = predictions(net, data, test), truth(run, net, data, test)
    run.save(
        picture(predicted, true),
        "Each point is a sample of which the batch has one copy of four less. Only influence gradients know what that "
        "does to the statistics of all others.",
    )
    rows = [
        [way, f"{correlation(p, true):.3f}", f"{float(p @ true / (true @ true)):.2f}",
         f"{float((p - true).norm() / true.norm()):.0%}"]
        for way, p in predicted.items()
    ]  # fmt: skip
    return table(["predicted with", "correlation", "slope", "error"], rows)


if __name__ == "__main__":
    sys.exit(show(application))
