"""Every notebook runs from top to bottom, wherever it lies."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


def execute(path: Path, folder: Path) -> None:
    """Raise at the first cell that fails; no file lies beside the notebook."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": folder}}).execute()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Path, Future[None]]]:
    """All notebooks, two at a time, a thread each."""
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield {path: pool.submit(execute, path, tmp_path_factory.mktemp(path.stem)) for path in NOTEBOOKS}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path, runs: dict[Path, Future[None]]) -> None:
    runs[path].result()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_outputs_are_complete(path: Path) -> None:
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    pictures = [o for c in cells for o in c.outputs if "image/png" in o.get("data", {})]

    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))
    assert pictures, "a notebook is committed with its pictures"
    assert not any(o.output_type == "error" for c in cells for o in c.outputs)
    printed = "".join(o.get("text", "") for c in cells for o in c.outputs)
    assert "site-packages" not in printed, "warnings and paths of a machine do not belong in here"
