"""Pruning a trained BatchNorm network by curvature: saliency from the train-mode diagonal, from eval mode's, or none.

    python experiments/pruning.py [--quick] [--seed S] [--device D] [--out DIR] [--write]

Optimal brain damage removes the weights with the least ½ h θ², h the diagonal of the GGN: what the loss would rise by.
Beside it magnitude, θ². After removal the batch statistics are estimated anew from the training data, for all alike.
And one weight at a time: what its removal does to the train-mode loss, against ½ h θ² - g θ, g the gradient.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from statistics import mean
from typing import NamedTuple

import torch
from lib import figures
from lib.command import Run
from lib.gallery import show, table
from lib.pruning import SECOND, WAYS, emptied, pruned, ranks, saliencies, single
from lib.systems import accuracy, digits, mlp, residual_net, train
from torch import Tensor, nn

SHARES = (0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
TOLD = (0.5, 0.7, 0.8, 0.9)
LOOKS = dict(
    zip(
        WAYS,
        (
            figures.look("train", label="½ h θ², h in train mode"),
            figures.look("eval", label="½ h θ², h in eval mode"),
            {"color": figures.GREY, "marker": "D", "label": "magnitude θ²"},
        ),
        strict=True,
    )
)


class Found(NamedTuple):
    """Of one trained network: test accuracy by way and share; empty units by way; single weights."""

    accuracies: list[list[float]]
    empty: list[int]
    alone: dict[str, Tensor]


def one(run: Run, build: Callable[[], nn.Module], seed: int) -> Found:
    """All of it."""
    torch.manual_seed(seed)
    X, y = digits(seed=seed, standardised=True, device=run.device)
    data, test = (X[:1280], y[:1280]), (X[1280:], y[1280:])
    net = build().to(run.device).train()
    train(net, data, run.pick(300, 20), 0.1, batch_size=128, momentum=0.9, seed=seed)
    ways = saliencies(net, (X[:640], y[:640]), 128)
    name = list(ways["magnitude"])[1]
    alone = single(net, (X[:256], y[:256]), name, run.pick(400, 20))
    accuracies = [[accuracy(pruned(net, s, share, data[0]), test) for share in SHARES] for s in ways.values()]
    run.tick()
    return Found(accuracies, [emptied(pruned(net, s, 0.8, data[0]), name) for s in ways.values()], alone)


def picture(each: dict[str, Tensor], alone: dict[str, Tensor]) -> figures.Figure:
    """Accuracy against the share removed, for both networks; single weights."""
    figure, axes = figures.panels(3, size=(14, 4.6))
    for ax, (network, accuracies) in zip(axes, each.items(), strict=False):
        for (_, look), values in zip(LOOKS.items(), accuracies.unbind(1), strict=True):
            percent = [100 * share for share in SHARES]
            ax.plot(percent, 100 * values.mean(0), linewidth=2.5, **look)
            ax.plot(percent, 100 * values.T, color=look["color"], linewidth=0.6, alpha=0.5)
        ax.set(xlabel="weights removed [%]", ylabel="test accuracy [%]", title=network)
        ax.legend(loc="lower left")
    axes[2].axline((0, 0), slope=1, color=figures.BLACK, linewidth=1)
    axes[2].plot(1e6 * alone["rise"], 1e6 * alone[SECOND], ".", color=figures.BLUE, markersize=5, label=SECOND)
    axes[2].plot(1e6 * alone["rise"], 1e6 * alone["½ h θ²"], ".", color=figures.SKY, markersize=5, label="½ h θ²")
    axes[2].set(xlabel="rise of the train-mode loss [10⁻⁶]", ylabel="predicted [10⁻⁶]", title="One weight removed, MLP")
    axes[2].legend()
    return figure


def application(run: Run) -> str:
    """Accuracy at some shares, by way."""
    networks = {"MLP 64-64-64-10": lambda: mlp((64, 64, 64, 10)), "ResNet, 8 channels": lambda: residual_net(1, 8)}
    seeds = run.seeds(3)
    run.expect(len(networks) * len(seeds))
    found = {name: [one(run, build, seed) for seed in seeds] for name, build in networks.items()}
    each = {name: torch.tensor([one.accuracies for one in some]) for name, some in found.items()}
    small = next(iter(found.values()))
    run.save(
        picture(each, small[0].alone),
        f"Left, middle: mean of {len(seeds)} networks (thick) and each. Right: one weight alone, exact second order "
        "(dark) and without the gradient (light).",
    )
    at, rows = [SHARES.index(share) for share in TOLD], []
    for name, values in each.items():
        rows.append([name, "none removed", *[f"{100 * values[..., 0].mean():.1f}"] * len(TOLD)])
        for i, way in enumerate(LOOKS):
            some = 100 * values[:, i, at]
            pairs = zip(some.mean(0), some.std(0, correction=0), strict=True)
            rows.append([name, way, *(f"{mean:.1f} ± {spread:.1f}" for mean, spread in pairs)])
    said = {key: mean(ranks(one.alone["rise"], one.alone[key]) for one in small) for key in (SECOND, "½ h θ²", "θ²")}
    empty = [
        f"{mean(units):.0f} ({way})"
        for way, units in zip(LOOKS, zip(*(o.empty for o in small), strict=True), strict=True)
    ]
    return "\n\n".join(
        [
            table(["network", "test accuracy [%], removed:", *(f"{share:.0%}" for share in TOLD)], rows),
            "One weight of the MLP removed: rank correlation with the rise of the train-mode loss "
            + ", ".join(f"{r:.2f} ({key})" for key, r in said.items())
            + ".",
            f"80 % removed: of 64 units of its second layer these have lost all inputs: {', '.join(empty)}.",
        ]
    )


if __name__ == "__main__":
    sys.exit(show(application))
