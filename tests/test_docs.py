"""Pages in docs/: every code block runs, what it says of values is true; all pages and public names are on the site."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from test_readme import GOES_ON, claims

import bncurv

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("**/*.md"))
WITH_CODE = [page for page in PAGES if page != GOES_ON and "```python" in page.read_text()]


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.stem)
def test_page(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict[str, Any] = {"__name__": page.stem}
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        exec(compile(block, page.name, "exec"), namespace)
        for code, value in claims(block):
            got = eval(code, namespace)
            assert (list(got) if isinstance(got, torch.Size) else got) == value, f"{code} is {got}"


def test_links_in_pages_exist():
    for page in (*PAGES, ROOT / "README.md"):
        prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for link in re.findall(r"\]\(([^)#:]+)\)", prose):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_every_public_name_has_its_place_in_the_api():
    api = "\n".join(page.read_text() for page in PAGES if page.parent.name == "api")
    listed = re.findall(r"^::: bncurv\.(\w+)$", api, re.MULTILINE)
    assert sorted({*listed} - {"reference", "plots"}) == sorted(bncurv.__all__)


def test_the_navigation_names_every_page():
    named = re.findall(r": ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    here = [page.relative_to(ROOT / "docs").as_posix() for page in PAGES]
    elsewhere = ["CHANGELOG.md", "CONTRIBUTING.md", "experiments/README.md"]
    assert sorted(named) == sorted([*here, *elsewhere]) and all((ROOT / page).exists() for page in elsewhere)


def test_included_sections_are_there():
    found = 0
    for page in PAGES:
        for source, options in re.findall(r"^\{% include-markdown \"(.+?)\" (.*) %\}$", page.read_text(), re.MULTILINE):
            text = (page.parent / source).read_text()
            marks = {key: mark.replace('\\"', '"') for key, mark in re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', options)}
            begin = text.find(marks.get("start", ""))
            assert begin >= 0 and text.count(marks.get("start", "# bncurv")) == 1, f"{page.name}: {marks}"
            assert text.find(marks["end"], begin + 1) > begin, f"{page.name}: {marks}"
            found += 1
    assert found >= 10
