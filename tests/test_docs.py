"""Pages in docs/: every code block runs, page by page, and what it says of values is true."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from test_readme import claims

PAGES = sorted((Path(__file__).parent.parent / "docs").glob("**/*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
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
    for page in (*PAGES, Path(__file__).parent.parent / "README.md"):
        prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for link in re.findall(r"\]\(([^)#:]+)\)", prose):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"
