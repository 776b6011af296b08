"""Figures: one style, colours that everybody can tell apart, a sentence of what to see under each."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito
BLUE, ORANGE, GREEN, PURPLE, SKY, AMBER = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"
GREY, BLACK = "#777777", "#000000"

# One look per mode and per normalisation, in every figure: keywords of `Axes.plot`.
LOOK = {
    "train": {"color": BLUE, "marker": "o", "label": "BN, train mode"},
    "frozen": {"color": ORANGE, "marker": "s", "label": "BN, statistics held constant"},
    "eval": {"color": GREEN, "marker": "^", "label": "BN, eval mode"},
    "none": {"color": GREY, "marker": "D", "label": "no BN"},
    "bn": {"color": BLUE, "marker": "o", "label": "BatchNorm"},
    "ln": {"color": AMBER, "marker": "v", "label": "LayerNorm"},
    "gn": {"color": PURPLE, "marker": "P", "label": "GroupNorm"},
}

MODES = ("train", "frozen", "eval", "none")

STYLE = {
    "font.size": 11,
    "axes.titlesize": "medium",
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.markersize": 5,
    "legend.frameon": False,
}


@contextmanager
def style() -> Iterator[None]:
    """The style of all figures made inside."""
    with plt.rc_context(STYLE):
        yield


def look(kind: str, **more: Any) -> dict[str, Any]:
    """Colour, marker and label of a mode or normalisation, with changes."""
    return LOOK[kind] | more


def panels(columns: int = 1, rows: int = 1, size: tuple[float, float] | None = None) -> tuple[Figure, Any]:
    """A figure and its axes: one, or an array as `plt.subplots` gives it."""
    size = size or (5.2 * columns if columns > 1 else 7, 4.2 * rows)
    return plt.subplots(rows, columns, figsize=size, layout="constrained")


def save(figure: Figure, path: Path, caption: str = "") -> Path:
    """Write a figure with its caption below, and close it."""
    if caption:
        width = int(figure.get_figwidth() * 13)
        figure.supxlabel(textwrap.fill(caption, width), fontsize=10, color="#333333", x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def reference_line(ax: Axes, text: str, *, y: float | None = None, x: float | None = None, below: bool = False) -> None:
    """A dashed line at a predicted value, named where it ends."""
    if y is not None:
        ax.axhline(y, color=BLACK, linestyle="--", linewidth=1)
        ax.annotate(
            text,
            (1, y),
            (-4, -14 if below else 4),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
        )
    if x is not None:
        ax.axvline(x, color=BLACK, linestyle="--", linewidth=1)
        ax.annotate(text, (x, 1), (4, -12), xycoords=("data", "axes fraction"), textcoords="offset points")
