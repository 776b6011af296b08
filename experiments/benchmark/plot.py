"""Plot time against N from ``results.json`` (one file per job, one panel per network).

Prints the growth exponents fitted from N = 128 on (from the start where that leaves one point).
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402
from matplotlib.ticker import NullFormatter, ScalarFormatter  # noqa: E402
from table import TITLES, clock  # noqa: E402

Row = dict[str, Any]
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
    "BackPACK eval mode": ("#999999", "*", ":"),
    "bncurv coupled": ("#D55E00", "o", "--"),
    "bncurv dense": ("#0072B2", "o", "--"),
    "bncurv auto": ("#000000", "o", "-"),
}
LABELS = {"BackPACK eval mode": "BackPACK, eval mode (uncoupled)"}


def exponent(points: list[tuple[int, float]]) -> float | None:
    """Slope of log time over log N."""
    chosen = [p for p in points if p[0] >= 128]
    chosen = chosen if len(chosen) > 1 else points
    if len(chosen) < 2:
        return None
    xs, ys = ([math.log(v) for v in axis] for axis in zip(*chosen, strict=True))
    mx, my = sum(xs) / len(xs), sum(ys) / len(ys)
    slope = sum((x - mx) * (y - my) for x, y in zip(xs, ys, strict=True))
    return slope / sum((x - mx) ** 2 for x in xs)


def panel(axes: Axes, rows: list[Row], job: str, net: str) -> None:
    """Draw one network's curves, hollow markers where extrapolated."""
    for name, (colour, marker, line) in STYLES.items():
        mine = sorted(
            (r for r in rows if r["competitor"] == name and clock(r)), key=lambda r: r["n"]
        )
        points = [(r["n"], clock(r) or 0.0) for r in mine]
        if not points:
            continue
        fat = 2.4 if name == "bncurv auto" else 1.3
        axes.plot(*zip(*points, strict=True), line, color=colour, linewidth=fat)
        for row, point in zip(mine, points, strict=True):
            face = "white" if row["extrapolated"] else colour
            axes.plot(*point, marker, color=colour, markerfacecolor=face, markersize=6)
        if (slope := exponent(points)) is not None:
            print(f"{job:10s} {net:14s} {name:20s} time ~ N^{slope:.2f}")
    sizes = sorted({r["n"] for r in rows})
    axes.set(xscale="log", yscale="log", xlabel="batch size N", title=_title(rows[0]))
    axes.set_xticks(sizes)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    low, high = axes.get_ylim()
    if high > 10 * low:
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(True, which="major", alpha=0.3)


def _title(row: Row) -> str:
    """Network, classes and parameters."""
    return f"{row['net']}  (C = {row['classes']}, D = {row['parameters']:,})"


def handle(name: str) -> Line2D:
    """The legend's entry of a competitor."""
    colour, marker, line = STYLES[name]
    label = LABELS.get(name, name)
    return Line2D([], [], color=colour, marker=marker, linestyle=line, label=label)


def figure(rows: list[Row], job: str, env: dict[str, Any], out: Path) -> Path:
    """All networks of one job in one file; one that was measured at a single N has no curve."""
    nets = list(dict.fromkeys(r["net"] for r in rows))
    nets = [net for net in nets if len({r["n"] for r in rows if r["net"] == net}) > 1] or nets
    wide = min(3, len(nets))
    high = -(-len(nets) // wide)
    fig, grid = plt.subplots(
        high, wide, figsize=(4.6 * wide + 0.4, 4.1 * high + 1.3), squeeze=False
    )
    for axes, net in zip(grid.flat, nets, strict=False):
        panel(axes, [r for r in rows if r["net"] == net], job, net)
    for axes in list(grid.flat)[len(nets) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("seconds")
    names = [n for n in STYLES if any(r["competitor"] == n and clock(r) for r in rows)]
    columns = min(2 * wide, len(names))
    fig.legend(handles=[handle(n) for n in names], loc="lower center", ncols=columns, frameon=False)
    where = env["cpu"] if env["device"] == "cpu" else env["device"]
    fig.suptitle(
        f"{TITLES[job]}: {where}, {env['threads']} threads, float32 (hollow: extrapolated)"
    )
    legend = 0.25 * -(-len(names) // columns) + 0.15  # inches
    fig.tight_layout(rect=(0, legend / fig.get_figheight(), 1, 1))
    file = out / f"time_{job}.png"
    fig.savefig(file, dpi=150)
    plt.close(fig)
    return file


def main() -> None:
    """One figure per job that has results."""
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, default=here / "results" / "results.json")
    parser.add_argument("--out", type=Path, help="folder of the figures (default: the file's)")
    args = parser.parse_args()
    content = json.loads(args.file.read_text())
    for job in TITLES:
        rows = [row for row in content["rows"] if row["job"] == job]
        if rows:
            print(f"wrote {figure(rows, job, content['environment'], args.out or args.file.parent)}")


if __name__ == "__main__":
    main()
