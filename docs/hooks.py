"""What the site shows beside docs/: experiments and notebooks as they lie, links between all of them, the gallery.

`mkdocs.yml` names this file twice: as hooks of MkDocs (`on_files`, `on_page_markdown`) and as an extension of the
reader of docstrings (`Linked`).
"""

import ast
import base64
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
SHOWN = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "experiments/README.md",
    "experiments/*/README.md",
    "experiments/*.py",
    "experiments/figures/*.png",
    "experiments/benchmark/results/*.png",
    "notebooks/*.ipynb",
)
LINK = re.compile(r"(?<=\]\()([^)\s]+)(?=\))")
FENCE = re.compile(r"(^[ ]*```.*?^[ ]*```)", re.MULTILINE | re.DOTALL)


def public_names() -> list[str]:
    """``bncurv.__all__``, read without importing torch."""
    for statement in ast.parse((ROOT / "bncurv/__init__.py").read_text()).body:
        if isinstance(statement, ast.Assign) and getattr(statement.targets[0], "id", "") == "__all__":
            return ast.literal_eval(statement.value)
    raise LookupError("bncurv/__init__.py has no __all__")


WORDS = {"at"}  # too short to be a reference without its package's name
NAME = re.compile(r"(?<![`\[\w])`(bncurv\.)?(" + "|".join(public_names()) + r")(\([^`]*\))?`(?![`\]])")


def linked(prose: str) -> str:
    """Public names in single backticks as links to their place in the API."""

    def link(match: re.Match[str]) -> str:
        package, name, _ = match.groups()
        return match[0] if name in WORDS and not package else f"[{match[0]}][bncurv.{name}]"

    return NAME.sub(link, prose)


class Linked(griffe.Extension):
    """Docstrings, with links, and "Example:" read as the section that griffe knows as "Examples:"."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Every object that has a docstring."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", linked(obj.docstring.value), flags=re.MULTILINE)


# ---------------------------------------------------------------- files from outside of docs/
def on_files(files: Any, config: Any) -> Any:
    """Add what is shown of the repository, at its own path."""
    for path in sorted(path for pattern in SHOWN for path in ROOT.glob(pattern)):
        where = path.relative_to(ROOT).as_posix()
        if path.suffix == ".ipynb":
            for name, content in notebook(path):
                files.append(File.generated(config, name, content=content))
        else:
            files.append(File.generated(config, where, abs_src_path=str(path)))
    return files


def notebook(path: Path) -> Iterator[tuple[str, str | bytes]]:
    """A notebook with its stored outputs: (path on the site, content) of its pictures, then of the page."""
    page, pictures = [], 0
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        page.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                pictures += 1
                yield f"notebooks/{path.stem}/{pictures}.png", base64.b64decode("".join(data["image/png"]))
                page.append(f"![Plot of the cell above]({path.stem}/{pictures}.png)")
            elif text := "".join(output.get("text", data.get("text/plain", ""))):
                page.append(f"```text\n{text.rstrip()}\n```")
    yield f"notebooks/{path.stem}.md", "\n\n".join(page)


# ---------------------------------------------------------------- pages
def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Links as they lead in the repository → on the site; public names → API; the gallery's place → the gallery."""
    markdown = markdown.replace("<!-- gallery -->", gallery())
    pieces = FENCE.split(markdown)
    for i in range(0, len(pieces), 2):  # the odd ones are code
        prose = LINK.sub(lambda match: of_site(match[1], page.file.src_uri), pieces[i])
        pieces[i] = prose if page.file.src_uri.startswith("api/") else linked(prose)
    return "".join(pieces)


def of_site(target: str, page: str) -> str:
    """The target of a link on a page (its path on the site), as a link between pages of the site."""
    here = PurePosixPath(page).parent.as_posix()
    if re.match(r"[a-z]+:|#", target):
        return target
    home = "docs/" if (ROOT / "docs" / page).exists() else ""
    path, mark, anchor = os.path.normpath(f"{home}{here}/{target}").partition("#")
    path = "index.md" if path == "README.md" else re.sub(r"^docs/", "", path)
    path = re.sub(r"^(notebooks/.*)\.ipynb$", r"\1.md", path)
    return os.path.relpath(path, here) + mark + anchor


def gallery() -> str:
    """One card for each figure of the experiments: picture, linked to its page; what the script says it is; command."""
    cards = []
    for script in sorted((ROOT / "experiments").glob("*.py")):
        if not (ROOT / f"experiments/figures/{script.stem}.png").exists():
            continue
        title = (ast.get_docstring(ast.parse(script.read_text())) or "").split("\n\n")[0].replace("\n", " ")
        picture, page = f"../experiments/figures/{script.stem}.png", f"gallery/{script.stem}.md"
        target = page if (ROOT / "docs" / page).exists() else picture
        cards.append(
            f"<div markdown>\n[![{script.stem}]({picture})]({target})\n\n{title}\n\n"
            f"[`python experiments/{script.name}`](../experiments/{script.name})\n</div>"
        )
    return '<div class="gallery" markdown>\n' + "\n".join(cards) + "\n</div>"
