"""Print ``results.json`` as Markdown: bncurv beside the best exact peer, or every competitor."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

Row = dict[str, Any]
WALL = True
TITLES = {
    "diag": "Exact GGN diagonal",
    "spectrum": "All non-zero GGN eigenvalues",
    "top10": "Ten largest eigenpairs",
    "components": "Per-component gradients",
    "mc": "Monte-Carlo GGN diagonal, at 10 % relative error",
}


def clock(row: Row) -> float | None:
    """The seconds that are compared: for Monte Carlo, those to the target error."""
    return row.get("seconds_at_target") or row["seconds"]


def best(rows: list[Row], kind: str, name: str = "") -> Row | None:
    """The fastest timed competitor of a kind."""
    timed = [r for r in rows if r["kind"] == kind and clock(r) and name in r["competitor"]]
    return min(timed, key=lambda r: clock(r) or 0.0, default=None)


def seconds(row: Row | None) -> str:
    """Time with three digits, ``~`` where extrapolated, ``?`` where the machine was busy."""
    if row is None or (value := clock(row)) is None:
        return "–"
    sign = "~" if row["extrapolated"] else ""
    doubt = "?" if WALL and row["quiet"] < min(3, row["samples"]) else ""
    if value >= 1:
        return f"{sign}{value:.3g} s{doubt}"
    return f"{sign}{1e3 * value:.3g} ms{doubt}"


def number(value: float | None, form: str) -> str:
    """A formatted number or a dash."""
    return "–" if value is None else format(value, form)


def table(header: list[str], lines: list[list[str]]) -> str:
    """A Markdown table."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def rate(row: Row | None) -> str:
    """GFLOP/s and the share of the GEMM rate."""
    if row is None or row.get("gflops") is None:
        return "–"
    return f"{row['gflops']:.0f} ({row['gemm_fraction']:.0%})"


def ratio(peer: Row | None, mine: Row | None) -> str:
    """How many times faster ours is."""
    theirs, own = (None if row is None else clock(row) for row in (peer, mine))
    if not theirs or not own:
        return "–"
    return f"**{theirs / own:.{1 if theirs > own else 2}f}×**"


def summary(cells: list[list[Row]]) -> str:
    """One line per cell: best peer, floor, ours, ratio."""
    header = ["net", "C", "N", "best peer", "time", "MiB", "passes", "GFLOP/s (of GEMM)"]
    header += ["bncurv", "time", "MiB", "passes", "GFLOP/s (of GEMM)", "error", "ratio"]
    header += ["BN in eval mode"]
    lines = []
    for rows in cells:
        peer, mine = best(rows, "peer"), best(rows, "ours", "auto")
        first = rows[0]
        line = [first["net"], str(first["classes"]), str(first["n"])]
        for row, name in ((peer, _way(peer)), (mine, _way(mine))):
            got = row or {}
            line += [name, seconds(row), number(got.get("peak_mib"), ".0f")]
            line += [number(got.get("passes"), "d"), rate(row)]
        line.append(number((mine or {}).get("error"), ".0e"))
        line.append(ratio(peer, mine))
        line.append(seconds(best(rows, "floor")))
        lines.append(line)
    return table(header, lines)


def brief(cells: list[list[Row]]) -> str:
    """The README's columns: best peer and bncurv's automatic way."""
    header = ["net", "N", "best peer (its chunk)", "time", "bncurv", "ratio", "passes", "MiB", "GFLOP/s"]
    lines = []
    for rows in cells:
        peer, mine = best(rows, "peer"), best(rows, "ours", "auto")
        theirs, own = peer or {}, mine or {}
        pairs = [
            f"{number(theirs.get(key), form)} / {number(own.get(key), form)}"
            for key, form in (("passes", "d"), ("peak_mib", ".0f"), ("gflops", ".0f"))
        ]
        lines.append(
            [rows[0]["net"], str(rows[0]["n"]), _way(peer), seconds(peer), seconds(mine), ratio(peer, mine), *pairs]
        )
    return table(header, lines)


def _way(row: Row | None) -> str:
    """Name and chunk of a peer, the way that auto took."""
    if row is None:
        return "–"
    if row["kind"] == "ours":
        return "coupled" if "coupled" in row["note"] else "dense" if "dense" in row["note"] else ""
    return row["competitor"] + (f", {row['chunk']}" if (row["chunk"] or 1) > 1 else "")


def everything(cells: list[list[Row]]) -> str:
    """One line per competitor."""
    header = ["net", "N", "competitor", "chunk", "time", "MiB", "passes", "GFLOP/s (of GEMM)"]
    header += ["error", "quiet samples", "note"]
    lines = []
    for row in (row for rows in cells for row in rows):
        line = [row["net"], str(row["n"]), row["competitor"], str(row["chunk"] or "–")]
        line += [seconds(row), number(row.get("peak_mib"), ".0f")]
        line += [number(row.get("passes"), "d"), rate(row), number(row.get("error"), ".0e")]
        line += [f"{row['quiet']}/{row['samples']}" if row["seconds"] else "–", row["note"]]
        lines.append(line)
    return table(header, lines)


def exponents(rows: list[Row]) -> str:
    """Growth of the time with N between 128 and the largest N, for bncurv and the best peer, per network."""
    said = []
    for net, group in groupby(rows, key=lambda r: r["net"]):
        cells = [list(g) for _, g in groupby(group, key=lambda r: r["n"])]
        slopes = []
        for kind, name in (("ours", "auto"), ("peer", "")):
            points = [(c[0]["n"], clock(row)) for c in cells if c[0]["n"] >= 128 and (row := best(c, kind, name))]
            if len(points) > 1:
                (n0, t0), (n1, t1) = points[0], points[-1]
                slopes.append(f"{math.log(t1 / t0) / math.log(n1 / n0):.2f}")
        if len(slopes) == 2:
            said.append(f"{net} {slopes[0]} (best peer {slopes[1]})")
    return "Exponent of the time's growth with N, from N = 128 on: " + ", ".join(said) + "."


def text(content: dict[str, Any], jobs: list[str], form: Callable[[list[list[Row]]], str]) -> str:
    """Environment line and one table per job."""
    global WALL
    env, settings = content["environment"], content["settings"]
    WALL = settings["clock"] == "wall"
    where = env["cpu"] if env["device"] == "cpu" else env["device"]
    parts = [
        f"{where}, {env['threads']} threads, torch {env['torch']}, {env['dtype']}, "
        f"GEMM {env['gemm_gflops']:.0f} GFLOP/s, {settings['clock']} clock, {env['date']}. Times are medians; "
        "~ is extrapolated from a part of the columns, ? had few quiet moments on a shared machine."
    ]
    for job in jobs:
        rows = [row for row in content["rows"] if row["job"] == job]
        rows.sort(key=lambda r: (r["net"], r["n"]))
        cells = [list(g) for _, g in groupby(rows, key=lambda r: (r["net"], r["n"]))]
        if cells:
            parts.append(f"**{TITLES[job]}**\n\n{form(cells)}")
            if job == "diag":
                parts.append(exponents(rows))
    return "\n\n".join(parts)


def main() -> None:
    """Print one table per job, or put the brief ones into the README."""
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, default=here / "results" / "results.json")
    parser.add_argument("--full", action="store_true", help="every competitor")
    parser.add_argument("--brief", action="store_true", help="fewer columns")
    parser.add_argument("--write", action="store_true", help="put the brief tables into the README")
    parser.add_argument("--jobs", type=lambda s: s.split(","), default=list(TITLES), help=",".join(TITLES))
    args = parser.parse_args()
    form = everything if args.full else brief if args.brief or args.write else summary
    found = text(json.loads(args.file.read_text()), args.jobs, form)
    print(found)
    if args.write:
        readme, begin, end = here.parents[1] / "README.md", "<!-- bench:begin -->", "<!-- bench:end -->"
        before, _, rest = readme.read_text().partition(begin)
        readme.write_text(f"{before}{begin}\n{found}\n{end}{rest.partition(end)[2]}")
        print(f"wrote {readme}")


if __name__ == "__main__":
    main()
