"""Every notebook runs from top to bottom, wherever it lies."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}})  # no file beside it

    client.execute()  # raises at the first cell that fails


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_outputs_are_complete(path: Path) -> None:
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    pictures = [o for c in cells for o in c.outputs if "image/png" in o.get("data", {})]

    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))
    assert pictures, "a notebook is committed with its pictures"
    assert not any(o.output_type == "error" for c in cells for o in c.outputs)
    printed = "".join(o.get("text", "") for c in cells for o in c.outputs)
    assert "site-packages" not in printed, "warnings and paths of a machine do not belong in here"
