"""Code in Markdown: its blocks, what their comments say of values, and a run of them that leaves no registration."""

import ast
import importlib.util
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from bncurv import SlowPathWarning
from bncurv.gate import COUPLED
from bncurv.layers import LAYERS
from bncurv.losses import LOSSES

ROOT = Path(__file__).parent.parent
TABLES = COUPLED, LAYERS, LOSSES


def blocks_of(page: Path) -> list[str]:
    """Python blocks, but those that need a library which is missing."""
    found = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [b for b in found if all(map(importlib.util.find_spec, re.findall(r"^(?:from|import) (\w+)", b, re.M)))]


def claims(block: str) -> Iterator[tuple[str, Any]]:
    """Expressions on a line of their own whose comment is a literal, and that literal."""
    for statement in ast.parse(block).body:
        line = block.splitlines()[statement.end_lineno - 1]
        code, _, comment = line.partition("  # ")
        if isinstance(statement, ast.Expr) and statement.lineno == statement.end_lineno:
            try:
                yield code, ast.literal_eval(comment.strip())
            except (SyntaxError, ValueError):
                continue


@contextmanager
def executed(page: Path, folder: Path, first: int = 0) -> Iterator[Mapping[str, Any]]:
    """All blocks in one namespace, after the first ones of the README; in a folder, and without slow ways.

    Args:
        page: with the blocks.
        folder: where they write.
        first: number of blocks of the README that the page goes on from.

    Yields:
        the namespace, with what was ``checked`` and ``registered``.
    """
    tables = [(table, dict(table)) for table in TABLES]
    namespace: dict[str, Any] = {"__name__": page.stem, "checked": 0}
    try:
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("error", SlowPathWarning)
            patch.chdir(folder)
            torch.manual_seed(0)
            for block in (*blocks_of(ROOT / "README.md")[:first], *blocks_of(page)):
                exec(compile(block, page.name, "exec"), namespace)
                for code, value in claims(block):
                    got = eval(code, namespace)
                    got = list(got) if isinstance(got, torch.Size) else got
                    assert got == value, f"{code} is {got}, {page.name} says {value}"
                    namespace["checked"] += 1
            yield namespace | {"registered": [set(table) - set(before) for table, before in tables]}
    finally:
        for table, before in tables:
            table.clear()
            table.update(before)
