"""Print the results as Markdown: bncurv beside the best exact peer, or every competitor.

A results file has one JSON object per line: environment and settings of a run, then its rows; files can be joined.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from lib.pages import ROOT, insert  # noqa: E402

Row = dict[str, Any]
RESULTS = ROOT / "experiments/benchmark/results/results.jsonl"
TITLES = {
    "diag": "Exact GGN diagonal",
    "spectrum": "All non-zero GGN eigenvalues",
    "top10": "Ten largest eigenpairs",
    "components": "Per-component gradients",
    "mc": "Monte-Carlo GGN diagonal, 64 draws",
    "accuracy": "GGN diagonal of digits networks at equal accuracy: backward passes, time",
}


@dataclass
class Run:
    """One run: where, how, and what was measured."""

    environment: Row
    settings: Row
    rows: list[Row] = field(default_factory=list)

    def cells(self, job: str) -> list[list[Row]]:
        """Rows of a job by network and N."""
        rows = sorted((r for r in self.rows if r["job"] == job), key=lambda r: (r["net"], r["n"]))
        return [list(cell) for _, cell in groupby(rows, key=lambda r: (r["net"], r["n"]))]

    @property
    def where(self) -> str:
        """The device."""
        return self.environment["cpu" if self.environment["device"] == "cpu" else "device"]


def load(path: Path) -> list[Run]:
    """The runs of a file (none if there is no file)."""
    runs: list[Run] = []
    for line in path.read_text().splitlines() if path.exists() else ():
        row = json.loads(line)
        if "environment" in row:
            runs.append(Run(**row))
        else:
            runs[-1].rows.append(row)
    return runs


def best(rows: list[Row], kind: str, name: str = "") -> Row:
    """The fastest timed competitor of a kind; an empty row if there is none."""
    timed = [r for r in rows if r["kind"] == kind and r["seconds"] and name in r["competitor"]]
    return min(timed, key=lambda r: r["seconds"], default={})


def number(value: float | None, form: str) -> str:
    """A formatted number or a dash."""
    return "–" if value is None else format(value, form)


def seconds(row: Row) -> str:
    """Time with three digits, ``~`` where extrapolated, ``?`` where the machine was busy."""
    if not row.get("seconds"):
        return "–"
    sign = "~" if row["extrapolated"] else ""
    doubt = "?" if row["quiet"] < min(3, row["samples"]) else ""
    value = f"{row['seconds']:.3g} s" if row["seconds"] >= 1 else f"{1e3 * row['seconds']:.3g} ms"
    return sign + value + doubt


def count(passes: int) -> str:
    """Passes; of very many their order."""
    return f"{passes}" if passes < 10**6 else f"{passes:.1e}"


def way(row: Row) -> str:
    """Name and chunk."""
    return row.get("competitor", "–") + (f", {row['chunk']}" if (row.get("chunk") or 1) > 1 else "")


def table(header: list[str], lines: Iterable[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *lines])


def brief(cells: list[list[Row]]) -> str:
    """One line per cell: best peer and bncurv's automatic way."""
    header = ["net", "N", "best peer (its chunk)", "time", "bncurv", "ratio", "passes", "MiB", "GFLOP/s"]
    lines = []
    for rows in cells:
        peer, mine = best(rows, "peer"), best(rows, "ours", "auto")
        times = peer["seconds"] / mine["seconds"] if peer and mine else None
        ratio = "–" if times is None else f"**{times:.{1 if times > 1 else 2}f}×**"
        line = [rows[0]["net"], str(rows[0]["n"]), way(peer), seconds(peer), seconds(mine), ratio]
        for key, form in (("passes", "d"), ("peak_mib", ".0f"), ("gflops", ".0f")):
            line.append(f"{number(peer.get(key), form)} / {number(mine.get(key), form)}")
        lines.append(line)
    return table(header, lines)


def everything(cells: list[list[Row]]) -> str:
    """One line per competitor."""
    header = ["net", "N", "competitor", "time", "MiB", "passes", "GFLOP/s", "error", "quiet", "note"]
    lines = []
    for row in (row for rows in cells for row in rows):
        name = way(row) + (f", rtol {row['rtol']:g}" if row.get("rtol") else "")
        line = [row["net"], str(row["n"]), name, seconds(row)]
        for key, form in (("peak_mib", ".0f"), ("passes", "d"), ("gflops", ".0f"), ("error", ".0e")):
            line.append(number(row.get(key), form))
        lines.append([*line, f"{row['quiet']}/{row['samples']}" if row["seconds"] else "–", row["note"]])
    return table(header, lines)


def accuracy(cells: list[list[Row]]) -> str:
    """One line per network and goal; a column per competitor."""
    names = list(dict.fromkeys(r["competitor"] for rows in cells for r in rows))
    lines = []
    for rows in cells:
        found = {(r["rtol"], r["competitor"]): r for r in rows}
        exact = found[0, "bncurv"]
        for goal in sorted({r["rtol"] for r in rows if r["rtol"]}, reverse=True):
            mine = [found.get((goal, name), {}) for name in names]
            said = [f"{count(r['passes'])}, {seconds(r)}" if r else "–" for r in [*mine, exact]]
            lines.append([rows[0]["net"], f"{100 * goal:g} %", *said])
    return table(["network", "error", *names, "exact"], lines)


def slope(points: list[tuple[int, float]]) -> float | None:
    """Exponent of the growth of time with N, from N = 128 to the largest."""
    points = [point for point in points if point[0] >= 128]
    if len(points) < 2:
        return None
    (n0, t0), (n1, t1) = points[0], points[-1]
    return math.log(t1 / t0) / math.log(n1 / n0)


def exponents(cells: list[list[Row]]) -> str:
    """Growth of the time with N for bncurv and the best peer, per network with two N of 128 and more."""
    said = []
    for net, group in groupby(cells, key=lambda rows: rows[0]["net"]):
        pairs = [(best(rows, "ours", "auto"), best(rows, "peer")) for rows in group]
        mine, peer = (slope([(r["n"], r["seconds"]) for r in rows if r]) for rows in zip(*pairs, strict=True))
        if mine and peer:
            said.append(f"{net} {mine:.2f} (best peer {peer:.2f})")
    return "\n\nExponent of the time's growth with N, from N = 128 on: " + ", ".join(said) + "." if said else ""


def report(runs: list[Run], form: Callable[[list[list[Row]]], str] = brief, jobs: Iterable[str] = TITLES) -> str:
    """For each run its environment and one table per job."""
    parts = []
    for run in runs:
        env = run.environment
        parts.append(
            f"{run.where}, {env['threads']} threads, torch {env['torch']}, {env['dtype']}, "
            f"GEMM {env['gemm_gflops']:.0f} GFLOP/s, {run.settings['clock']} clock, {env['date']}. Times are medians; "
            "~ is extrapolated from a part of the columns, ? had few quiet moments on a shared machine."
        )
        for job in jobs:
            if cells := run.cells(job):
                shown = (accuracy if job == "accuracy" and form is brief else form)(cells)
                parts.append(f"**{TITLES[job]}**\n\n{shown}{exponents(cells) if job == 'diag' else ''}")
    return "\n\n".join(parts)


def main() -> None:
    """Print the tables, or put them into docs/speed.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, default=RESULTS)
    parser.add_argument("--full", action="store_true", help="every competitor")
    parser.add_argument("--jobs", type=lambda s: s.split(","), default=list(TITLES), help=",".join(TITLES))
    parser.add_argument("--write", action="store_true", help="put the tables into docs/speed.md")
    args = parser.parse_args()
    found = report(load(args.file), everything if args.full else brief, args.jobs)
    print(found)
    if args.write:
        insert(ROOT / "docs/speed.md", "bench", found)


if __name__ == "__main__":
    main()
