"""Pages in docs/: every code block runs, what it says of values is true; all pages and public names are on the site."""

import re

import cases
import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch
from lib.pages import insert
from pages import ROOT, blocks_of, executed

import bncurv
from bncurv import DiagGGNExact, curvature, reference

PAGES = sorted((ROOT / "docs").glob("**/*.md"))
EXTENDING = ROOT / "docs/extending.md"
WITH_CODE = [page for page in PAGES if page != EXTENDING and "```python" in page.read_text()]
# blocks and checked values of pages, so that none is lost; where libraries may be missing, none is counted
LEAST = {"gestures": (5, 8), "quantities": (1, 5), "memory": (1, 1), "estimator": (1, 1)}

matplotlib.use("Agg")


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.stem)
def test_page(page, tmp_path):
    goes_on = "/README.md): `model`" in page.read_text()
    with executed(page, tmp_path, first=goes_on) as after:
        blocks, checked = LEAST.get(page.stem, (0, 0))
        assert len(blocks_of(page)) >= blocks and after["checked"] - 2 * goes_on >= checked
    plt.close("all")
    if page.stem == "quantities":
        assert sorted(path.name for path in tmp_path.glob("*.png")) == ["coupling.png", "spectrum.png"]


# --- extending ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def after(tmp_path_factory: pytest.TempPathFactory):
    """The page on extending, executed, and model, loss, data and diagonal for what it registers."""
    with executed(EXTENDING, tmp_path_factory.mktemp("extending"), first=1) as names:
        found = {}
        for name, model, loss_fn, y in (
            ("critic", names["critic"], names["loss_fn"], names["y"]),
            ("net", names["net"], names["loss_fn"], names["y"]),
            ("poisson", names["model"], torch.nn.PoissonNLLLoss(), names["counts"]),
        ):
            res = curvature(model, loss_fn, (names["X"], y), DiagGGNExact(), method="coupled")
            found[name] = model, loss_fn, (names["X"], y), res.diag_ggn_exact
        yield {**names, "extended": found}


def test_what_is_registered(after):
    coupled, layers, losses = after["registered"]
    assert coupled == {after["MinibatchStdDev"]}
    assert layers == {torch.nn.functional.bilinear}
    assert losses == {torch.nn.PoissonNLLLoss}
    assert len(blocks_of(EXTENDING)) >= 4 and after["checked"] >= 4


@pytest.mark.parametrize("name", ["critic", "net", "poisson"])
def test_extensions_are_exact(after, name):
    model, loss_fn, data, got = after["extended"][name]
    few = [name for name in got if got[name].numel() < 100]
    want = reference.ggn_diagonal(model, loss_fn, *data, few)
    largest = max(float(t.max()) for t in want.values())
    for name, expected in want.items():
        torch.testing.assert_close(got[name].double(), expected, rtol=1e-3, atol=1e-5 * largest)


# --- what pages say -------------------------------------------------------------------------------


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


def test_warnings_of_a_slow_way_are_explained_as_they_are_worded():
    page = (ROOT / "docs/supported.md").read_text().split("## What is supported")[0]
    quoted = re.findall(r"\*\*\*(.+?)\*\*\*", page, re.DOTALL)
    code = "".join(path.read_text() for path in sorted((ROOT / "bncurv").glob("*.py")))
    code = re.sub(r'"\s+f?"', "", code)  # strings that go on in the next line
    parts = [part.strip() for text in quoted for part in re.split(r"'name'|\.\.\.|[()]", " ".join(text.split()))]
    assert len(quoted) >= 6 and [part for part in parts if part not in code] == []


def test_every_quantity_is_defined():
    page = (ROOT / "docs/quantities.md").read_text()
    headings = " ".join(re.findall(r"^### (.+)$", page, re.MULTILINE))
    quantities = [name for name in bncurv.__all__ if isinstance(getattr(bncurv, name), type)]
    quantities = [name for name in quantities if issubclass(getattr(bncurv, name), bncurv.quantities.Quantity)]
    scales = page.split("factor of the loss' reduction inside")[1].split("\n\n")[0]
    for name in quantities:
        assert name in headings.split() and f"`{name}`" in scales, name


def test_what_a_script_measured_goes_between_its_markers(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- x:begin -->\nold\n<!-- x:end -->\nb\n")
    insert(page, "x", "new")
    assert page.read_text() == "a\n<!-- x:begin -->\nnew\n<!-- x:end -->\nb\n" and str(page) in capsys.readouterr().out
    with pytest.raises(LookupError, match="page.md has no place for 'y': expected <!-- y:begin -->"):
        insert(page, "y", "new")


def test_links_in_pages_exist():
    for page in (*PAGES, ROOT / "README.md"):
        prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", prose):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_every_public_name_has_its_place_in_the_api():
    api = "\n".join(page.read_text() for page in PAGES if page.parent.name == "api")
    listed = re.findall(r"^::: bncurv\.(\w+)$", api, re.MULTILINE)
    assert sorted({*listed} - {"reference", "plots"}) == sorted(bncurv.__all__)


def test_the_navigation_names_every_page():
    named = re.findall(r": ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    here = [page.relative_to(ROOT / "docs").as_posix() for page in PAGES]
    elsewhere = ["CHANGELOG.md", "CONTRIBUTING.md", "experiments/README.md"]
    notebooks = [f"notebooks/{path.stem}.md" for path in (ROOT / "notebooks").glob("*.ipynb")]
    assert sorted(named) == sorted([*here, *elsewhere, *notebooks])
    assert all((ROOT / page).exists() for page in elsewhere)


def test_included_sections_are_there():
    """The start page is the README, whole: no text is held twice, and no page shows a part of another."""
    tags = [(page.stem, re.findall(r"\{% include-markdown (.+?) %\}", page.read_text())) for page in PAGES]
    assert [(page, found) for page, found in tags if found] == [("index", ['"../README.md" comments=false'])]
