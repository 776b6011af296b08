"""The gallery's scripts run, save their picture, and print the table whose full figures are on their page."""

import importlib
import re

import pytest
import quantity_figures
from lib import gallery
from pages import ROOT

QUICK = {"ntk"}  # of the default suite; the others are marked slow
SCRIPTS = sorted(path.stem for path in (ROOT / "docs/gallery").glob("*.md"))


def first_cells(text: str) -> list[str]:
    """Of each row of a table."""
    return [line.split("|")[1].split(",")[0] for line in text.splitlines() if line.startswith("| ")]


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in SCRIPTS])
def test_script(name, tmp_path, capsys):
    script = importlib.import_module(name)
    assert gallery.show(script.application, ["--quick", "--out", str(tmp_path)]) == 0
    said, picture = capsys.readouterr().out, tmp_path / f"{name}.png"
    assert str(picture) in said and picture.read_bytes().startswith(b"\x89PNG")
    page = (ROOT / f"docs/gallery/{name}.md").read_text().split(f"<!-- {name}:begin -->")[1]
    assert first_cells(said) and first_cells(said) == first_cells(page)


def test_every_quantity_has_its_picture():
    page = (ROOT / "docs/quantities.md").read_text()
    shown = re.findall(r"\]\(quantities/(\w+)\.png\)\n\n\*", page)
    assert sorted(shown) == sorted(quantity_figures.PICTURES) and len(set(shown)) == len(shown)


@pytest.mark.slow
def test_pictures_of_quantities_are_drawn(tmp_path, capsys):
    assert quantity_figures.main(["--quick", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    for name in quantity_figures.PICTURES:
        assert str(tmp_path / f"{name}.png") in said
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_write_goes_to_page_and_figure(monkeypatch, tmp_path, capsys):
    def application(run):
        figure, ax = gallery.figures.panels()
        ax.plot([0, 1])
        run.save(figure, "A line.")
        return gallery.table(["a", "b"], [[1, 2.5]])

    monkeypatch.setattr(gallery, "ROOT", tmp_path)
    page = tmp_path / "docs/gallery/test_gallery.md"
    page.parent.mkdir(parents=True)
    page.write_text("<!-- test_gallery:begin -->\n<!-- test_gallery:end -->\n")
    assert gallery.show(application, ["--write"]) == 0
    assert "-->\n| a | b |\n| --- | --- |\n| 1 | 2.5 |\n<!--" in page.read_text()
    assert (tmp_path / "experiments/figures/test_gallery.png").exists() and str(page) in capsys.readouterr().out
