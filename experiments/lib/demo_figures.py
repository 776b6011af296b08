"""The demo's three pictures: traces of the layers, entries of the diagonal, the largest per-component gradients."""

from __future__ import annotations

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from lib.figures import BLUE, GREEN, GREY, ORANGE

Tensors = dict[str, Tensor]


def by_layer(diagonal: Tensors) -> dict[str, Tensor]:
    """All entries of each layer's parameters, e.g. `weight` and `bias` of "fc", in one vector."""
    layers: dict[str, list[Tensor]] = {}
    for name, values in diagonal.items():
        layers.setdefault(name.rpartition(".")[0], []).append(values.flatten())
    return {layer: torch.cat(values) for layer, values in layers.items()}


def plot_layers(diagonal: Tensors, own_diagonal: Tensors) -> plt.Figure:
    """Trace of every layer, exact and with the batch statistics held constant."""
    full, own = (
        {layer: entries.sum().item() for layer, entries in by_layer(part).items()} for part in (diagonal, own_diagonal)
    )
    worst = max(full, key=lambda layer: own[layer] / full[layer])
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    rows, x, y = range(len(full)), list(full.values()), list(own.values())
    axes.hlines(rows, x, y, color=GREY, linewidth=2, zorder=1)
    axes.scatter(y, rows, marker="s", s=90, color=ORANGE, label="batch statistics held constant")
    axes.scatter(x, rows, s=40, color=BLUE, label="exact: differentiated through them")
    axes.set(
        xscale="log",
        xlabel="trace of the layer's block of the GGN",
        title=f"The layer {worst!r} looks {own[worst] / full[worst]:.1f} times as curved as it is "
        "when the batch statistics are held constant",
    )
    axes.title.set_size("medium")
    axes.set_yticks(rows, list(full))
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.legend()
    return figure


def plot_entries(diagonal: Tensors, own_diagonal: Tensors, model: nn.Module) -> plt.Figure:
    """Every entry of the diagonal: statistics held constant against exact."""
    layers = dict(model.named_modules())
    kinds = (
        ("convolutions", nn.Conv2d, BLUE, "o"),
        ("BatchNorms", nn.BatchNorm2d, ORANGE, "s"),
        ("linear layer", nn.Linear, GREEN, "^"),
    )
    full, own = by_layer(diagonal), by_layer(own_diagonal)
    figure, axes = plt.subplots(figsize=(7.5, 6.5), layout="constrained")
    for label, kind, color, marker in kinds:
        names = [name for name in full if isinstance(layers[name], kind)]
        x, y = (torch.cat([part[name] for name in names]).cpu() for part in (full, own))
        axes.scatter(x, y, s=12, alpha=0.5, color=color, marker=marker, label=label, linewidths=0)
    ratio = (torch.cat(list(own.values())) / torch.cat(list(full.values()))).median().item()
    axes.axline((1e-3, 1e-3), slope=1, color="black", linewidth=1, label="equal")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="entry of the GGN diagonal, exact",
        ylabel="the same entry, batch statistics held constant",
        title=f"Constant batch statistics make the typical entry {ratio:.1f} times what it is",
    )
    axes.grid(alpha=0.3)
    axes.legend(markerscale=2)
    return figure


def component_norms(components: Tensors) -> Tensor:
    """The norm of each per-component gradient over all parameters, `[N]`."""
    return sum(g.flatten(1).square().sum(dim=1) for g in components.values()).sqrt()


def plot_components(components: Tensors, X: Tensor, y: Tensor, shown: int = 8) -> plt.Figure:
    """The digits with the largest gradients, and all norms in descending order."""
    norms, order = component_norms(components).cpu().sort(descending=True)
    count, half = len(norms), int((norms.cumsum(0) < norms.sum() / 2).sum()) + 1
    figure = plt.figure(figsize=(10, 4.5), layout="constrained")
    grid = figure.add_gridspec(2, shown, height_ratios=(1, 2))
    for rank, n in enumerate(order[:shown].tolist()):
        axes = figure.add_subplot(grid[0, rank])
        axes.imshow(X[n, 0].cpu(), cmap="gray_r")
        axes.set(title=f"#{rank + 1}: a {y[n].item()}", xticks=[], yticks=[])
    axes = figure.add_subplot(grid[1, :])
    colors = [ORANGE] * half + [BLUE] * (count - half)
    axes.bar(range(1, count + 1), norms, width=1, color=colors)
    axes.set(
        xlabel="digits of the batch, largest gradient first",
        ylabel="norm of the\nper-component gradient",
        xlim=(0.5, count + 0.5),
    )
    figure.suptitle(f"{half} of {count} digits (orange) make up half of all gradient norms")
    return figure
