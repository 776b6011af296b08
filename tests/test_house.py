"""Imports go one way: no cycle, and nothing that computes imports the gestures, the oracle or the plots."""

import ast
import re
import sys
from pathlib import Path

import pytest

import bncurv

PACKAGE = Path(__file__).parent.parent / "bncurv"
FILES = {
    ".".join(("bncurv", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}
# From the bottom up; a module imports from its own row and those above it in this list only.
FLOORS = [
    {"undo", "slow", "turns", "bars", "eager", "autocast", "nested", "alarm", "ranks", "spread"},
    {"budget", "precision", "probes", "order", "gate", "batchnorm", "sync", "einsum", "recurrent", "layers", "factor",
     "losses", "loss_calls", "heads", "bodies"},
    {"constants", "marks", "meeting", "modes", "watch", "record", "graph", "structure"},
    {"blocks", "frontier", "memory", "squares", "products", "linearity", "passes", "costs", "statistics_passes",
     "directions", "truncation", "certificate", "hessian", "loss_at_batch", "shares", "agreement", "assurance",
     "engine", "weighting", "sketch", "deflation", "keeping", "plan"},
    {"lowrank"},
    {"quantities", "sampling", "report", "lowrank_quantity", "influence"},
    {"batch", "checks", "chosen", "inputs", "untouched", "twins", "placement", "results", "division"},
    {"recording", "context", "composed", "backward"},
    {"call", "point"},
    {"api", "extension"},
    {""},
]  # fmt: skip
APART = {"reference", "plots", "adapters"}  # nothing of the package imports these


def imports(path: Path) -> set[str]:
    """Modules of the package that a file imports, at run time or for types."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "bncurv":
            inner = {f"{node.module}.{a.name}" for a in node.names}
            found |= inner & set(FILES) or {node.module}
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.split(".")[0] == "bncurv"}
    return found


GRAPH = {name: imports(path) - {name} for name, path in FILES.items()}


def room(module: str) -> str:
    """``bncurv.lowrank.rows`` → ``lowrank``."""
    return module.split(".")[1] if "." in module else ""


def test_no_cycle():
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " → ".join((*way, module))
        if module not in done:
            for other in GRAPH[module]:
                visit(other, (*way, module))
            done.add(module)

    for module in GRAPH:
        visit(module, ())
    assert len(done) > 20


@pytest.mark.parametrize("module", GRAPH)
def test_floors(module):
    floor = {name: i for i, rooms in enumerate(FLOORS) for name in rooms}
    for other in GRAPH[module]:
        assert room(other) not in APART, f"{module} imports {other}"
        if room(module) not in APART:
            assert floor[room(other)] <= floor[room(module)], f"{module} imports {other}, which stands above it"


def test_no_weak_way_back():
    """A circle that imports don't show: a part that keeps a proxy of its owner."""
    assert not [name for name, path in FILES.items() if "weakref.proxy" in path.read_text()]


def test_map_for_contributors():
    """Floors follow each other in CONTRIBUTING.md as they do here; what it names exists."""
    lines = (PACKAGE.parent / "CONTRIBUTING.md").read_text().splitlines()
    rows = [re.findall(r"`(\w+)`", line.split("|")[1]) for line in lines if line.startswith("| `")]
    floors = [{i for i, rooms in enumerate(FLOORS) if rooms & set(row)} for row in rows]
    assert all(len(floor) == 1 for floor in floors) and not {n for row in rows for n in row} - set().union(*FLOORS)
    assert (order := [floor.pop() for floor in floors]) == sorted(order) and len(order) > 20


def test_completion_shows_what_is_public(monkeypatch):
    """Names of ``__all__`` and public modules, imported when asked for; inner modules are neither."""
    modules = {"adapters", "layers", "losses", "plots", "quantities", "reference"}
    assert set(dir(bncurv)) == {*bncurv.__all__, *modules, "__version__"}
    for name in modules:
        monkeypatch.delattr(bncurv, name, raising=False)
        assert getattr(bncurv, name) is sys.modules[f"bncurv.{name}"]
    with pytest.raises(AttributeError, match="module 'bncurv' has no attribute 'oracle'"):
        bncurv.oracle  # noqa: B018
