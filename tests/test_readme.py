"""The README: every code block runs, in order; what they say of values is true; its tables are those of the docs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from pages import ROOT, blocks_of, executed

import bncurv
from bncurv.quantities import Quantity

PAGE = ROOT / "README.md"
README = PAGE.read_text()
MARKERS = {
    "README.md": "exactness-brief",
    "docs/exactness.md": "exactness",
    "docs/speed.md": "bench",
    "docs/estimator.md": "estimator",
    "docs/growth.md": "growth",
    "docs/memory.md": "memory",
}


def test_blocks_run_and_their_comments_hold(tmp_path):
    with executed(PAGE, tmp_path) as after:
        assert len(blocks_of(PAGE)) >= 3 and after["checked"] >= 4


def test_first_block_is_ten_lines_or_so():
    assert sum(bool(line.strip()) for line in blocks_of(PAGE)[0].splitlines()) <= 13


def test_it_is_short():
    assert README.count("\n") <= 220


def test_files_and_links_exist():
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
    for path in re.findall(r"`((?:bncurv|tests|experiments|notebooks)/[\w/]+\.\w+)`", README):
        assert (ROOT / path).exists(), path
    for script in re.findall(r"`python (\S+\.py)", README):
        assert (ROOT / script).exists(), script


def test_quantities_of_the_table_exist_and_none_is_missing():
    public = {getattr(bncurv, name) for name in bncurv.__all__}
    quantities = {q.__name__: q for q in public if isinstance(q, type) and issubclass(q, Quantity)}
    rows = re.findall(r"^\| `(\w+)(?:\([^)]*\))?` \| `([\w.]+)`", README, re.MULTILINE)
    assert {name for name, _ in rows} == set(quantities)
    for name, field in rows:
        assert field.removeprefix("Results.") == quantities[name].field


@pytest.mark.parametrize("page, marker", MARKERS.items())
def test_markers_are_in_place(page, marker):
    text = (ROOT / page).read_text()
    assert text.count(f"<!-- {marker}:begin -->") == text.count(f"<!-- {marker}:end -->") == 1


def rows_of(text: str) -> list[set[str]]:
    """Cells of each row of all tables."""
    return [{cell.strip() for cell in line.strip("|").split("|")} for line in text.splitlines() if line[:1] == "|"]


def test_figures_of_speed_are_those_of_its_page():
    known = rows_of((ROOT / "docs/speed.md").read_text().split("**Exact GGN diagonal**")[1])
    rows = rows_of(README.split("## Speed")[1].split("\n## ")[0])[2:]
    assert len(rows) >= 6 and all(any(row <= other for other in known) for row in rows)


def run(script: str, *options: str) -> str:
    command = [sys.executable, str(ROOT / "experiments" / script), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_exactness_tables_are_of_this_package():
    """Same families and networks as the script's; every error below what the project promises."""
    quick = run("exactness.py", "--quick")
    written = (ROOT / "docs/exactness.md").read_text().split("<!-- exactness:")[1]
    first_cells = [line.split("|")[1] for line in quick.splitlines() if line.startswith("|")]
    assert all(f"|{cell}|" in written for cell in first_cells)
    for text in (quick, written):
        errors = [float(e) for e in re.findall(r"\d+e-\d+", text)]
        assert len(errors) >= 15 and max(errors) <= 1e-8


def test_exactness_in_brief():
    from exactness import brief

    written = (ROOT / "docs/exactness.md").read_text().split("<!-- exactness:begin -->\n")[1]
    assert f"-->\n{brief(written)}\n<!-- exactness-brief:end" in README


def test_figure_script_runs(tmp_path: Path):
    picture = tmp_path / "readme.png"
    assert str(picture) in run("readme_figure.py", "--quick", "--out", str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG")
