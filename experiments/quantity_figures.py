"""A picture of each quantity, all from one small BatchNorm network that was trained on digits: docs/quantities/*.png.

python experiments/quantity_figures.py [--quick] [--out DIR]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib
import torch
from lib import figures
from lib.defaults import defaults
from lib.pages import ROOT
from lib.systems import digits, mlp, train
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from PIL import Image
from torch import Tensor, nn

import bncurv
from bncurv import plots

LOSS = nn.CrossEntropyLoss()
FIRST = "0.weight"
WEIGHTS = {FIRST: "first layer", "3.weight": "second layer", "6.weight": "last layer"}
COLORS = dict(zip(WEIGHTS, (figures.BLUE, figures.ORANGE, figures.GREEN), strict=True))


class Point:
    """The network, its batch sorted by label, and what was computed there."""

    def __init__(self, size: int, steps: int) -> None:
        torch.manual_seed(0)
        X, y = digits(seed=0)
        self.net = mlp((64, 32, 32, 10)).train()
        train(self.net, (X, y), steps, 0.1, batch_size=128)
        X, y = X[:size], y[:size]
        self.X, self.y = X[y.argsort()], y.sort().values
        self.sure = self.net(self.X).detach().softmax(1).gather(1, self.y[:, None])[:, 0]
        self.res = self(
            *(bncurv.DiagGGNExact(), bncurv.ComponentDiagGGNExact(), bncurv.LowRankGGN(), bncurv.SqrtGGNExact()),
            *(bncurv.CouplingReport(), bncurv.ComponentGrad(), bncurv.ComponentL2Grad(), bncurv.InfluenceGrad()),
            bncurv.SumComponentGradSquared(),
        )

    def __call__(self, *quantities: object, model: nn.Module | None = None) -> bncurv.Results:
        return bncurv.curvature(model or self.net, LOSS, (self.X, self.y), *quantities)


def diagonal(ax: Axes, values: Tensor) -> None:
    """The line of equal values, over the range of these."""
    ends = [float(values[values > 0].min()), float(values.max())]
    ax.loglog(ends, ends, color=figures.BLACK, linewidth=1)


def matrix(ax: Axes, values: Tensor, y: Tensor, label: str, **style: object) -> None:
    """An N x N matrix of samples, sorted by class."""
    image = ax.imshow(values, interpolation="nearest", **style)
    edges = [int((y < c).sum()) for c in range(10)]
    centres = [(a + b) / 2 for a, b in zip(edges, [*edges[1:], len(y)], strict=True)]
    ax.set_xticks(centres, range(10))
    ax.set_yticks(centres, range(10))
    ax.grid(visible=False)
    ax.set(xlabel="sample m, by digit", ylabel="sample n, by digit")
    ax.figure.colorbar(image, label=label)


def diag_ggn_exact(ax: Axes, at: Point) -> None:
    image = ax.imshow(at.res.diag_ggn_exact[FIRST].sum(0).view(8, 8), cmap="viridis")
    ax.grid(visible=False)
    ax.set(xlabel="pixel", ylabel="pixel", title="Curvature of the weights of each pixel")
    ax.figure.colorbar(image, label="Σ over units of diag_ggn_exact")


def diag_ggn_mc(ax: Axes, at: Point) -> None:
    got = at(bncurv.DiagGGNMC(passes=40, generator=torch.Generator().manual_seed(0)))
    some = slice(None, None, 13)
    exact = at.res.diag_ggn_exact[FIRST].flatten()[some]
    alive = exact > 0
    low, value, high = (got[f"diag_ggn_mc{part}"][FIRST].flatten()[some][alive] for part in ("_lower", "", "_upper"))
    bars = torch.stack([(value - low).clamp(min=0), (high - value).clamp(min=0)])
    ax.errorbar(exact[alive], value, bars, fmt=".", color=figures.BLUE, ecolor=figures.SKY, elinewidth=0.8)
    diagonal(ax, exact)
    ax.set(xlabel="entry of diag_ggn_exact", ylabel="diag_ggn_mc, with limits")
    ax.set(title=f"{got.passes} passes, instead of {at(bncurv.DiagGGNExact()).passes}")


def diag_ggn_exact_component(ax: Axes, at: Point) -> None:
    trace = sum(t.flatten(1).sum(1) for t in at.res.diag_ggn_exact_component.values())
    ax.loglog(1 - at.sure, trace, ".", color=figures.BLUE)
    ax.set(xlabel="1 - probability of the right class", ylabel="Σ of diag_ggn_exact_component")
    ax.set_title("Curvature that passes through each sample's output")


def ggn(ax: Axes, at: Point) -> None:
    plots.spectrum(at.res.ggn, ax)


def sqrt_ggn_exact(ax: Axes, at: Point) -> None:
    V = torch.cat([v.flatten(2) for v in at.res.sqrt_ggn_exact.values()], 2)  # [C, N, D]
    gram = torch.einsum("cnd,emd->nmce", V, V).flatten(2).norm(dim=2)
    norm = LogNorm(float(gram.max()) * 1e-4, float(gram.max()))
    matrix(ax, gram, at.y, "‖V[n] V[m]ᵀ‖", cmap="viridis", norm=norm)
    ax.set_title("Which samples share curvature")


def coupling(ax: Axes, at: Point) -> None:
    plots.coupling({label: at.res.coupling[name.removesuffix(".weight")] for name, label in WEIGHTS.items()}, ax)


def grad_component(ax: Axes, at: Point) -> None:
    g = torch.cat([g.flatten(1) for g in at.res.grad_component.values()], 1)
    g = g / g.norm(dim=1, keepdim=True)
    matrix(ax, g @ g.T, at.y, "cosine of g_n and g_m", cmap="RdBu", vmin=-1, vmax=1)
    ax.set_title("Which outputs pull alike")


def l2_component(ax: Axes, at: Point) -> None:
    for name, label in WEIGHTS.items():
        values = at.res.l2_component[name].sort(descending=True).values
        percent = 100 * torch.arange(1, len(values) + 1) / len(values)
        ax.plot(percent, 100 * values.cumsum(0) / values.sum(), color=COLORS[name], label=label, linewidth=2)
    ax.set(
        xlabel="samples, largest first [%]", ylabel="share of Σ_n ‖g_n‖² [%]", title="Few outputs carry the gradient"
    )
    ax.legend()


def sum_grad_squared(ax: Axes, at: Point) -> None:
    for name, label in WEIGHTS.items():
        x, y = at.res.diag_ggn_exact[name].flatten(), len(at.y) * at.res.sum_grad_squared[name].flatten()
        ax.loglog(x[x > 0], y[x > 0], ".", color=COLORS[name], label=label, markersize=3, alpha=0.6)
    diagonal(ax, at.res.diag_ggn_exact[FIRST])
    ax.set(xlabel="diag_ggn_exact", ylabel="N · sum_grad_squared", title="Second moment beside curvature")
    ax.legend(markerscale=3)


def grad_influence(ax: Axes, at: Point) -> None:
    for name in (FIRST, "6.weight"):
        x, y = (at.res[field][name].flatten(1).norm(dim=1) for field in ("grad_component", "grad_influence"))
        ax.loglog(x, y, ".", color=COLORS[name], label=WEIGHTS[name])
    diagonal(ax, at.res.grad_component[FIRST].flatten(1).norm(dim=1))
    ax.set(xlabel="‖grad_component‖", ylabel="‖grad_influence‖", title="Through the statistics, all samples matter")
    ax.legend()


PICTURES: dict[str, Callable[[Axes, Point], None]] = {
    name: globals()[name]
    for name in ("diag_ggn_exact", "diag_ggn_mc", "diag_ggn_exact_component", "ggn", "sqrt_ggn_exact", "coupling",
                 "grad_component", "l2_component", "sum_grad_squared", "grad_influence")
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, for a smoke test")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/quantities")
    args = parser.parse_args(arguments)
    matplotlib.use("Agg")
    with defaults(0), figures.style():
        at = Point(*((16, 3) if args.quick else (128, 150)))
        for name, draw in PICTURES.items():
            figure, ax = figures.panels(size=(5.2, 3.6))
            draw(ax, at)
            path = figures.save(figure, args.out / f"{name}.png")
            Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)  # a third of the bytes
            print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
