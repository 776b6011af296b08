"""Plot time against N: ``time_<job>.png``, one panel per network that was measured at several N; exponents printed."""

from __future__ import annotations

import argparse
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter, ScalarFormatter

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from lib import figures  # noqa: E402
from lib.figures import AMBER, BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY  # noqa: E402
from table import RESULTS, TITLES, Row, load, slope  # noqa: E402

# told apart by marker and line as well
STYLES = {
    "autograd loop": (GREY, "v", "-"),
    "autograd batched": (SKY, "s", "-"),
    "autograd batched NHWC": (SKY, "p", "--"),
    "func vmap(vjp)": (GREEN, "^", "-"),
    "func jacrev": (AMBER, "D", "-"),
    "curvlinops J^T": (PURPLE, "P", "-"),
    "curvlinops eigsh": (PURPLE, "X", "-."),
    "autograd eigsh": (SKY, "X", "-."),
    "bncurv coupled": (ORANGE, "o", "--"),
    "bncurv dense": (BLUE, "o", "--"),
    "bncurv auto": (BLACK, "o", "-"),
}


def panel(axes: Any, cells: list[list[Row]]) -> set[str]:
    """Draw one network's curves, hollow markers where extrapolated; print their exponents; the names drawn."""
    first, drawn = cells[0][0], set()
    for name, (colour, marker, line) in STYLES.items():
        mine = [r for rows in cells for r in rows if r["competitor"] == name and r["seconds"]]
        points = [(r["n"], r["seconds"]) for r in mine]
        if points:
            drawn.add(name)
            axes.loglog(*zip(*points, strict=True), line, color=colour, linewidth=2.4 if name == "bncurv auto" else 1.3)
        for row, point in zip(mine, points, strict=True):
            axes.plot(*point, marker, color=colour, mfc="white" if row["extrapolated"] else colour, markersize=6)
        if exponent := slope(points):
            print(f"{first['job']:10s} {first['net']:14s} {name:20s} time ~ N^{exponent:.2f}")
    title = f"{first['net']}  (C = {first['classes']}, D = {first['parameters']:,})"
    axes.set(xlabel="batch size N", title=title, xticks=[rows[0]["n"] for rows in cells])
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    return drawn


def main() -> None:
    """The first run of the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, default=RESULTS)
    parser.add_argument("--job", default="diag", choices=TITLES)
    args = parser.parse_args()
    run = load(args.file)[0]
    by_net = (list(cells) for _, cells in groupby(run.cells(args.job), key=lambda rows: rows[0]["net"]))
    nets = [cells for cells in by_net if len(cells) > 1]
    with figures.style():
        figure, grid = figures.panels(len(nets), size=(4.6 * len(nets) + 0.4, 5.4))
        drawn = set().union(*(panel(axes, cells) for axes, cells in zip(figure.axes, nets, strict=True)))
        figure.axes[0].set_ylabel("seconds")
        shown = [(name, *STYLES[name]) for name in STYLES if name in drawn]
        handles = [Line2D([], [], color=c, marker=m, linestyle=line, label=name) for name, c, m, line in shown]
        figure.legend(handles=handles, loc="outside lower center", ncols=2 * len(nets))
        where = f"{run.where}, {run.environment['threads']} threads"
        figure.suptitle(f"{TITLES[args.job]}: {where}, float32 (hollow: extrapolated)")
        path = figures.save(figure, args.file.parent / f"time_{args.job}.png")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
