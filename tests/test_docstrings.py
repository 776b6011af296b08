"""The examples in the docstrings run, and every public name has one."""

import ast
import doctest
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch

import bncurv
from bncurv.layers import LAYERS
from bncurv.quantities import Quantity
from bncurv.report import LayerCoupling

matplotlib.use("Agg")
PACKAGE = Path(bncurv.__path__[0])
MODULES = ["bncurv", *(m.name for m in pkgutil.walk_packages(bncurv.__path__, "bncurv."))]
APART = [PACKAGE / "reference.py", PACKAGE / "plots.py", *(PACKAGE / "adapters").glob("[!_]*.py")]  # public modules
TABLES = LAYERS, importlib.import_module("bncurv.losses").LOSSES, importlib.import_module("bncurv.gate").COUPLED


def load(name: str) -> Any:
    """A module; skips where it is an adapter of a library that is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not name.startswith("bncurv.adapters."):
            raise
        pytest.skip(str(error))


@pytest.fixture
def tables_kept() -> Iterator[None]:
    """What examples register is taken back."""
    before = [dict(table) for table in TABLES]
    yield
    for table, entries in zip(TABLES, before, strict=True):
        table.clear()
        table.update(entries)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name, tables_kept):
    """Each stands for itself, but for those of methods: they go on where that of their class ended."""
    module, runner = load(name), doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    names: dict[str, dict[str, Any]] = {}
    for example in sorted(doctest.DocTestFinder().find(module, name), key=lambda found: found.name):
        torch.manual_seed(0)
        example.globs = dict(names.get(example.name.rpartition(".")[0], {"__name__": "__main__"}))
        runner.run(example, clear_globs=False)
        names[example.name] = example.globs
    plt.close("all")
    assert runner.summarize(verbose=False).failed == 0  # doctest prints what it expected and got


def methods(kind: type) -> list[str]:
    """Public methods and properties that a class defines itself; a quantity's are for those who write one."""
    named = {name: m for name, m in vars(kind).items() if not name.startswith("_")}
    if issubclass(kind, Quantity):
        return ["result"] if isinstance(named.get("result"), property) else []
    return [name for name, m in named.items() if inspect.isroutine(m) or isinstance(m, property)]


PUBLIC: dict[str, Callable[[], str | None]] = {}
for owner in [*(getattr(bncurv, name) for name in bncurv.__all__), LayerCoupling]:
    PUBLIC[owner.__name__] = partial(inspect.getdoc, owner)
    for name in methods(owner) if isinstance(owner, type) else ():
        PUBLIC[f"{owner.__name__}.{name}"] = partial(inspect.getdoc, vars(owner)[name])
for path in APART:
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            PUBLIC[f"{path.stem}.{node.name}"] = partial(ast.get_docstring, node)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_an_example(name):
    _, _, example = (PUBLIC[name]() or "").partition("Example:\n")
    assert doctest.DocTestParser().get_examples(example), f"the docstring of {name} has no example"


def test_what_is_public():
    assert len(PUBLIC) > 75
    assert {"LowRank.diagonal", "Results.flat", "reference.ggn", "laplace.BncurvGGN"} <= set(PUBLIC)
