"""Plot time against N: ``time_<job>.png`` per job, one panel per network that was measured at several N."""

from __future__ import annotations

import argparse
from itertools import zip_longest
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402
from matplotlib.ticker import NullFormatter, ScalarFormatter  # noqa: E402
from table import RESULTS, TITLES, Row, Run, load, slope  # noqa: E402

# Okabe and Ito's colours, told apart by marker and line as well
STYLES: dict[str, tuple[str, str, str]] = {
    "autograd loop": ("#999999", "v", "-"),
    "autograd batched": ("#56B4E9", "s", "-"),
    "autograd batched NHWC": ("#56B4E9", "p", "--"),
    "func vmap(vjp)": ("#009E73", "^", "-"),
    "func jacrev": ("#E69F00", "D", "-"),
    "curvlinops J^T": ("#CC79A7", "P", "-"),
    "curvlinops eigsh": ("#CC79A7", "X", "-."),
    "autograd eigsh": ("#56B4E9", "X", "-."),
    "bncurv coupled": ("#D55E00", "o", "--"),
    "bncurv dense": ("#0072B2", "o", "--"),
    "bncurv auto": ("#000000", "o", "-"),
}


def panel(axes: Axes, cells: list[list[Row]]) -> None:
    """Draw one network's curves, hollow markers where extrapolated; print their exponents."""
    first = cells[0][0]
    for name, (colour, marker, line) in STYLES.items():
        mine = [r for rows in cells for r in rows if r["competitor"] == name and r["seconds"]]
        points = [(r["n"], r["seconds"]) for r in mine]
        if points:
            axes.plot(*zip(*points, strict=True), line, color=colour, linewidth=2.4 if name == "bncurv auto" else 1.3)
        for row, point in zip(mine, points, strict=True):
            axes.plot(*point, marker, color=colour, mfc="white" if row["extrapolated"] else colour, markersize=6)
        if exponent := slope(points):
            print(f"{first['job']:10s} {first['net']:14s} {name:20s} time ~ N^{exponent:.2f}")
    title = f"{first['net']}  (C = {first['classes']}, D = {first['parameters']:,})"
    axes.set(xscale="log", yscale="log", xlabel="batch size N", title=title)
    axes.set_xticks([rows[0]["n"] for rows in cells])
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    if axes.get_ylim()[1] > 10 * axes.get_ylim()[0]:
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(True, which="major", alpha=0.3)


def figure(run: Run, job: str, out: Path) -> Path | None:
    """All networks of one job in one file."""
    by_net: dict[str, list[list[Row]]] = {}
    for rows in run.cells(job):
        by_net.setdefault(rows[0]["net"], []).append(rows)
    nets = [cells for cells in by_net.values() if len(cells) > 1]
    if not nets:
        return None
    wide = min(3, len(nets))
    high = -(-len(nets) // wide)
    size = 4.6 * wide + 0.4, 4.1 * high + 1.3
    fig, grid = plt.subplots(high, wide, figsize=size, squeeze=False, layout="constrained")
    for axes, cells in zip_longest(grid.flat, nets):
        axes.set_visible(cells is not None)
        if cells:
            panel(axes, cells)
    for axes in grid[:, 0]:
        axes.set_ylabel("seconds")
    timed = {r["competitor"] for cells in nets for rows in cells for r in rows if r["seconds"]}
    shown = [(name, style) for name, style in STYLES.items() if name in timed]
    handles = [Line2D([], [], color=c, marker=m, linestyle=line, label=name) for name, (c, m, line) in shown]
    fig.legend(handles=handles, loc="outside lower center", ncols=min(2 * wide, len(handles)), frameon=False)
    fig.suptitle(f"{TITLES[job]}: {run.where}, {run.environment['threads']} threads, float32 (hollow: extrapolated)")
    fig.savefig(out / f"time_{job}.png", dpi=150)
    plt.close(fig)
    return out / f"time_{job}.png"


def main() -> None:
    """One figure per job of the first run that has several N of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, help="folder of the figures (default: the file's)")
    args = parser.parse_args()
    for job in TITLES:
        for run in load(args.file)[:1]:
            if path := figure(run, job, args.out or args.file.parent):
                print(f"wrote {path}")


if __name__ == "__main__":
    main()
