"""What was measured, as Markdown: one row for each architecture, or for each family."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from zoo.measure import Measured

BEGIN, END = "<!-- zoo:begin -->", "<!-- zoo:end -->"


def table(header: list[str], lines: list[list[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def passes(row: Measured) -> str:
    """By the coupled way, for any N; what slow parameters add grows with it."""
    if row.refused:
        return f"{row.columns} N"
    return f"{row.passes - row.samples * row.columns} + {row.columns} N" if row.slow else str(row.passes)


def verdict(row: Measured) -> str:
    return row.problem or f"{row.error:.0e}" + ", float32 inside" * row.single


def summary(rows: list[Measured]) -> str:
    """How many of how many."""
    wrong, slow = (sum(bool(getattr(row, what)) for row in rows) for what in ("problem", "slow"))
    norms = sum(row.norms > 0 for row in rows)
    return f"{len(rows)} architectures, {norms} with BatchNorm: {wrong} wrong, {slow} with a slow parameter."


def one_by_one(rows: list[Measured]) -> str:
    """A row for each."""
    lines = [
        [row.name, row.library, str(row.parameters), str(row.norms), passes(row), f"{row.columns} N", verdict(row),
         row.slow or "none"]
        for row in rows
    ]  # fmt: skip
    header = ["architecture", "from", "parameters", "BatchNorms", "passes", "dense", "largest error", "slow"]
    return f"{summary(rows)}\n\n{table(header, lines)}"


def span(numbers: list[int]) -> str:
    """The smallest and the largest."""
    return "–".join(str(n) for n in sorted({min(numbers), max(numbers)})) if numbers else ""


def by_family(rows: list[Measured]) -> str:
    """A row for each library, with and without BatchNorm; those that are wrong or slow below."""

    def family(row: Measured) -> tuple[str, bool]:
        return row.library, row.norms > 0

    lines = []
    for (library, norms), members in groupby(sorted(rows, key=family), family):
        some = list(members)
        taken, dense = [row.passes for row in some if not row.slow], [row.columns for row in some]
        error = max((row.error for row in some if not row.single), default=float("nan"))
        lines.append([library, "yes" if norms else "no", ", ".join(row.name for row in some), span(taken),
                      f"{span(dense)} N", f"{error:.0e}"])  # fmt: skip
    said = [f"- {row.name}: {row.problem or row.slow}" for row in rows if row.problem or row.slow]
    header = ["from", "BatchNorm", "architectures", "passes", "dense", "largest error"]
    return "\n".join([summary(rows), "", table(header, lines), *(["", *said] if said else [])])


def insert(text: str, path: Path) -> None:
    """Replace what stands between the markers."""
    before, rest = path.read_text().split(BEGIN)
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")
