"""Where must BatchNorm stand to tame the largest eigenvalue of the Fisher matrix of a wide network?

    python experiments/karakida.py [--quick] [--seed S] [--device D] [--out DIR]

λ_max grows with the width because of one direction, in which all outputs move together (Karakida et al. 2019). Behind
a ReLU BatchNorm leaves that direction; behind the outputs it takes it away, and so does the mean's subtraction alone.
Control: tanh, whose activations have mean zero once their inputs have.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from statistics import mean
from typing import Any

import torch
from lib import figures
from lib.command import Run, main
from lib.fisher import largest, wide
from lib.statements import Row, check, listed, refute
from lib.systems import slope
from torch import nn

CLASSES = 3
CASES: dict[str, dict[str, Any]] = {
    "none": {},
    "hidden BN": {"hidden": True},
    "last BN": {"last": "bn"},
    "last mean subtraction": {"last": "mean"},
    "all BN": {"hidden": True, "last": "bn"},
    "tanh, none": {"act": nn.Tanh},
    "tanh, hidden BN": {"act": nn.Tanh, "hidden": True},
}
STYLE = {
    "none": figures.look("none", label="no BN"),
    "hidden BN": {"color": figures.ORANGE, "marker": "s"},
    "last BN": {"color": figures.BLUE, "marker": "o"},
    "last mean subtraction": {"color": figures.SKY, "marker": "v"},
    "all BN": {"color": figures.GREEN, "marker": "^"},
}


def sharpness(run: Run, case: dict[str, Any], width: int, seeds: list[int]) -> float:
    """Mean λ_max over the seeds, on as many Gaussian samples as units."""
    found = []
    for seed in seeds:
        torch.manual_seed(seed)
        net = wide(width, CLASSES, **case).to(run.device)
        found.append(largest(net, torch.randn(width, width, device=run.device), CLASSES))
        run.tick(width / 256)
    return mean(found)


def picture(found: dict[str, list[float]], widths: list[int], slopes: dict[str, float]) -> figures.Figure:
    """λ_max against the width, with the two slopes of theory."""
    figure, ax = figures.panels(size=(7.5, 5))
    for name, style in STYLE.items():
        said = f"{style.get('label', name)} (slope {slopes[name]:.2f})"
        ax.loglog(widths, found[name], **(style | {"label": said}))
    start = found["hidden BN"][-1] * 0.75
    ends = widths[0], widths[-1]
    ax.loglog(ends, [start * end / ends[-1] for end in ends], "--", color=figures.BLACK, linewidth=1)
    ax.annotate("slope 1", (ends[0], start * ends[0] / ends[1]), (4, -4), textcoords="offset points", va="top")
    ax.set_xticks(widths, [str(w) for w in widths])
    ax.minorticks_off()
    ax.set(xlabel="width = number of samples", ylabel="λ_max of the Fisher matrix")
    ax.set_title("Only behind the outputs does BatchNorm stop the growth (ReLU)")
    ax.legend(fontsize=9)
    return figure


def experiment(run: Run) -> Iterator[Row]:
    """Both rows."""
    widths, seeds = run.pick([32, 64, 128, 256], [32, 64, 128]), run.seeds(4, 3)
    run.expect(len(CASES) * len(seeds) * sum(widths) / 256)
    found = {name: [sharpness(run, case, width, seeds) for width in widths] for name, case in CASES.items()}
    slopes = {name: slope(widths, values) for name, values in found.items()}
    said = f"slope of log λ_max in log width, {listed(widths, 'd')}: " + ", ".join(
        f"{name} {value:.2f}" for name, value in slopes.items()
    )
    holds = min(slopes["none"], slopes["hidden BN"]) > 0.6 and slopes["last BN"] < 0.15
    yield check("X4", holds, said, slopes=slopes, largest=found)
    ratio = {name: values[-1] / found["none"][-1] for name, values in found.items()}
    said = (
        f"at width {widths[-1]}, λ_max with BatchNorm ÷ without: hidden {ratio['hidden BN']:.2f} (and growing with the "
    )
    said += (
        f"width as without, slope {slopes['hidden BN']:.2f}), last {ratio['last BN']:.3f}; for tanh hidden BatchNorm "
    )
    said += f"does flatten (slope {slopes['tanh, hidden BN']:.2f})"
    yield refute("G27", holds, said, ratio=ratio, slopes=slopes)
    run.save(
        picture(found, widths, slopes),
        f"Mean of {len(seeds)} networks. A hidden BatchNorm lowers λ_max but leaves its growth with the width.",
    )


if __name__ == "__main__":
    sys.exit(main(experiment))
