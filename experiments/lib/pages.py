"""Pages of the documentation that hold what a script measured, between two markers."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]


def insert(page: Path, name: str, text: str) -> None:
    """Put a text between ``<!-- name:begin -->`` and ``<!-- name:end -->``, and say so; LookupError without them."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, opened, rest = page.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not (opened and closed):
        raise LookupError(f"{page} has no place for {name!r}: expected {begin} ... {end}.")
    page.write_text(f"{before}{begin}\n{text}\n{end}{after}")
    print(f"wrote {page}")
