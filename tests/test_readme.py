"""The README, and the page that goes on from it: every code block runs, in order; what they say of values is true."""

import ast
import importlib.util
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cases
import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch

import bncurv
from bncurv import DiagGGNExact, SlowPathWarning, curvature, reference
from bncurv.gate import COUPLED
from bncurv.layers import LAYERS
from bncurv.losses import LOSSES
from bncurv.quantities import Quantity

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
GOES_ON = ROOT / "docs/extending.md"  # with the names that the README has by then
BLOCKS = [
    block
    for block in re.findall(r"^```python\n(.*?)^```", README + GOES_ON.read_text(), re.MULTILINE | re.DOTALL)
    if all(importlib.util.find_spec(name) for name in re.findall(r"^(?:from|import) (\w+)", block, re.MULTILINE))
]  # adapters' libraries may be missing
MARKERS = ("<!-- exactness:", "<!-- bench:", "<!-- estimator:")

matplotlib.use("Agg")


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


def extended(namespace: dict[str, Any]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Model, loss, data and diagonal for what the page registers."""
    poisson, X = torch.nn.PoissonNLLLoss(), namespace["X"]
    for name, model, loss_fn, y in (
        ("critic", namespace["critic"], namespace["loss_fn"], namespace["y"]),
        ("net", namespace["net"], namespace["loss_fn"], namespace["y"]),
        ("poisson", namespace["model"], poisson, namespace["counts"]),
    ):
        res = curvature(model, loss_fn, (X, y), DiagGGNExact(), method="coupled")
        yield name, (model, loss_fn, (X, y), res.diag_ggn_exact)


@pytest.fixture(scope="module")
def after(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """All blocks executed in one namespace, then the registries as they were."""
    tables = [(table, dict(table)) for table in (COUPLED, LAYERS, LOSSES)]
    namespace: dict[str, Any] = {"__name__": "readme", "registered": [], "checked": 0}
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error", SlowPathWarning)
        patch.chdir(tmp_path_factory.mktemp("readme"))
        torch.manual_seed(0)
        for block in BLOCKS:
            exec(compile(block, "README.md", "exec"), namespace)
            for code, value in claims(block):
                got = eval(code, namespace)
                got = list(got) if isinstance(got, torch.Size) else got
                assert got == value, f"{code} is {got}, the README says {value}"
                namespace["checked"] += 1
        namespace["registered"] = [set(table) - set(before) for table, before in tables]
        namespace["pictures"] = sorted(path.name for path in Path.cwd().glob("*.png"))
        namespace["extended"] = dict(extended(namespace))
    for table, before in tables:
        table.clear()
        table.update(before)
    yield namespace
    plt.close("all")


def test_blocks_run_and_their_comments_hold(after):
    assert len(BLOCKS) >= 9 and after["checked"] >= 15


def test_first_block_is_ten_lines_or_so():
    assert sum(bool(line.strip()) for line in BLOCKS[0].splitlines()) <= 13


def test_pictures_are_saved(after):
    assert after["pictures"] == ["coupling.png", "spectrum.png"]


def test_what_is_registered(after):
    coupled, layers, losses = after["registered"]
    assert coupled == {after["MinibatchStdDev"]}
    assert layers == {torch.nn.functional.bilinear}
    assert losses == {torch.nn.PoissonNLLLoss}


@pytest.mark.parametrize("name", ["critic", "net", "poisson"])
def test_extensions_are_exact(after, name):
    model, loss_fn, data, got = after["extended"][name]
    few = [name for name in got if got[name].numel() < 100]
    want = reference.ggn_diagonal(model, loss_fn, *data, few)
    largest = max(float(t.max()) for t in want.values())
    for name, expected in want.items():
        torch.testing.assert_close(got[name].double(), expected, rtol=1e-3, atol=1e-5 * largest)


def test_files_and_links_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
    for path in re.findall(r"`((?:bncurv|tests|experiments|notebooks)/[\w/]+\.\w+)`", README):
        assert (ROOT / path).exists(), path
    for script in re.findall(r"`python (\S+\.py)", README):
        assert (ROOT / script).exists(), script


def test_every_supported_row_names_existing_tests():
    page = (ROOT / "docs/supported.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ")][1:]
    lists = [*cases.DETERMINISTIC, *cases.RANDOM]
    known = {case.name for case in lists}
    assert len(rows) >= 15
    for row in rows:
        names = re.findall(r"`([\w.:]+)`", row.split(" | ")[-1])
        assert names, row
        for name in names:
            file, _, test = name.partition("::")
            text = (ROOT / "tests" / file).read_text() if test else ""
            assert f"def {test}(" in text if test else name in known, name


def test_quantities_of_the_table_exist_and_none_is_missing():
    public = {getattr(bncurv, name) for name in bncurv.__all__}
    quantities = {q.__name__: q for q in public if isinstance(q, type) and issubclass(q, Quantity)}
    rows = re.findall(r"^\| `(\w+)(?:\([^)]*\))?` \| `([\w.]+)`", README, re.MULTILINE)
    assert {name for name, _ in rows} == set(quantities)
    for name, field in rows:
        assert field.removeprefix("Results.") == quantities[name].field


@pytest.mark.parametrize("marker", MARKERS)
def test_markers_are_in_place(marker):
    assert README.count(f"{marker}begin -->") == README.count(f"{marker}end -->") == 1


def run(script: str, *options: str) -> str:
    command = [sys.executable, str(ROOT / "experiments" / script), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_exactness_tables_are_of_this_package():
    """Same families and networks as the script's; every error below what the project promises."""
    quick, written = run("exactness.py", "--quick"), README.split(MARKERS[0])[1]
    first_cells = [line.split("|")[1] for line in quick.splitlines() if line.startswith("|")]
    assert all(f"|{cell}|" in written for cell in first_cells)
    for text in (quick, written):
        errors = [float(e) for e in re.findall(r"\d+e-\d+", text)]
        assert len(errors) >= 15 and max(errors) <= 1e-8


def test_figure_script_runs(tmp_path):
    picture = tmp_path / "readme.png"
    assert str(picture) in run("readme_figure.py", "--quick", "--out", str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG")
