"""Every statement of the sources has its place, and the experiments' quick runs pass."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

import pytest
import run_all
import spectrum_training
import torch
from lib import command, figures, statements, systems
from lib.command import Run
from lib.statements import CATALOGUE, DOCUMENTED, Row, check, refute, untestable

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
IDS = [
    f"{letter}{i}" for letter, last in {"D": 19, "S": 9, "W": 32, "G": 31, "X": 17}.items() for i in range(1, last + 1)
]

SCRIPTS = statements.scripts()
FAST = {
    "identities",
    "inference",
    "rank_nullspace",
    "structure",
}  # quick runs of the default suite; the others are marked slow


# Acceptances that are not met: the row shows the evidence, and the script ends with status 1.
FAILING = {"real_data": ["X16"]}


# --- the catalogue --------------------------------------------------------------------------------


def test_every_statement_appears_once():
    assert list(CATALOGUE) == IDS


def test_every_statement_has_a_script_or_a_documented_verdict():
    assert {s.id for s in CATALOGUE.values() if not s.script} == set(DOCUMENTED)
    for row in statements.documented_rows():
        assert len(row.measured) > 20 and row.verdict in statements.VERDICTS


def test_scripts_exist():
    assert [name for name in SCRIPTS if not (EXPERIMENTS / f"{name}.py").exists()] == []


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in SCRIPTS])
def test_quick_run_passes(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    script = importlib.import_module(name)
    status = command.main(script.experiment, ["--quick", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    written = json.loads((tmp_path / f"{name}.json").read_text())
    failing = FAILING.get(name, [])
    assert [row["id"] for row in written["rows"] if row["verdict"] == "fails"] == failing, said
    assert status == bool(failing)
    assert [row["id"] for row in written["rows"]] and all(f"{row['id']} · " in said for row in written["rows"])
    for plot in written["plots"]:
        assert (tmp_path / plot["file"]).read_bytes().startswith(b"\x89PNG") and plot["caption"]


# --- the command ----------------------------------------------------------------------------------


def fake(rows: Iterable[Row]) -> command.Experiment:
    """An experiment that yields these rows; the catalogue is patched to expect them."""
    return lambda run: rows


@pytest.fixture
def expected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "statements_of", lambda name: ["D1", "W25"])


@pytest.mark.parametrize(
    "rows, status",
    [
        ([check("D1", True, "yes"), refute("W25", True, "shown")], 0),
        ([check("D1", True, "yes"), untestable("W25", "no GPU")], 0),
        ([check("D1", False, "no"), refute("W25", True, "shown")], 1),
        ([check("D1", True, "yes"), refute("W25", False, "not shown")], 1),
    ],
)
def test_exit_status(expected: None, rows: list[Row], status: int, tmp_path: Path):
    assert command.main(fake(rows), ["--out", str(tmp_path)]) == status


@pytest.mark.parametrize("ids", [["D1"], ["D1", "D1", "W25"], ["D1", "W25", "D2"]])
def test_rows_that_are_missing_or_too_many_are_noticed(expected: None, ids: list[str], tmp_path: Path):
    with pytest.raises(ValueError, match="the catalogue expects"):
        command.main(fake([check(id, True, "") for id in ids]), ["--out", str(tmp_path)])


def test_what_is_written_and_printed(expected: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def experiment(run: Run) -> Iterable[Row]:
        figure, ax = figures.panels()
        ax.plot([0, 1], **figures.look("train"))
        run.save(figure, "A line.")
        assert torch.get_default_dtype() == torch.float64 and run.pick(3, 2) == 2 and run.seeds(4, 2) == [5, 6]
        yield check("D1", True, "0.1", value=torch.tensor([0.5, float("nan")]), inner={1: (2, 3)})
        yield refute("W25", True, "1")

    threads = torch.get_num_threads()
    assert command.main(experiment, ["--quick", "--seed", "5", "--out", str(tmp_path)]) == 0
    assert torch.get_default_dtype() == torch.float32 and torch.get_num_threads() == threads

    name = Path(__file__).stem
    written = json.loads((tmp_path / f"{name}.json").read_text())
    first, second = written["rows"]
    assert first["numbers"] == {"value": [0.5, "nan"], "inner": {"1": [2, 3]}}
    assert second["verdict"] == "refuted" and second["statement"] == CATALOGUE["W25"].text
    assert written["environment"]["quick"] is True and written["environment"]["seed"] == 5
    assert written["plots"] == [{"file": f"{name}.png", "caption": "A line."}]
    said = capsys.readouterr().out
    parts = ("D1", CATALOGUE["D1"].text, "0.1", CATALOGUE["D1"].acceptance, "holds")
    assert " · ".join(parts) in said and str(tmp_path / f"{name}.json") in said


def test_unknown_ids_and_verdicts_are_refused():
    with pytest.raises(KeyError, match="D99"):
        check("D99", True, "")
    with pytest.raises(ValueError, match="maybe"):
        Row("D1", "", "maybe")


def test_the_gpu_experiment_works_at_a_small_size(float64: None):
    row = spectrum_training.cifar_size_row(torch.device("cpu"), n=8, width=4, size=8, draws=20)
    assert row.verdict == "holds" and row.numbers["z"] != 0


# --- systems --------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["bn", "ln", "gn", "none"])
@pytest.mark.parametrize(
    "make", [lambda norm: systems.mlp([64, 8, 8, 10], norm), lambda norm: systems.residual_net(1, 4, norm)]
)
def test_modes_have_the_functions_they_promise(float64: None, make, norm: str):
    X, _ = systems.digits(12)
    model = make(norm).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    kinds = systems.modes(model, X)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    torch.testing.assert_close(kinds["frozen"](X[:5]), model(X)[:5])
    torch.testing.assert_close(kinds["eval"](X[:5]), kinds["eval"](X)[:5])
    same = torch.allclose(kinds["eval"](X), model(X))
    assert same == (norm != "bn")


def test_training_goes_down_and_is_repeatable(float64: None):
    X, y = systems.digits(200, standardised=True)
    ends = []
    for _ in range(2):
        torch.manual_seed(3)
        model, seen = systems.mlp([64, 16, 10]), []
        systems.train(model, (X, y), 30, 0.3, batch_size=50, momentum=0.9, each=seen.append)
        ends.append(model(X))
        assert seen == list(range(30)) and all(p.grad is None for p in model.parameters())
    assert ends[0].equal(ends[1]) and systems.accuracy(model, (X, y)) > 0.9


def test_data(float64: None):
    X, y = systems.digits(100, seed=1)
    assert X.shape == (100, 64) and X.dtype == torch.float64 and 0 <= X.min() and X.max() == 1
    assert not systems.digits(100, seed=2)[0].equal(X)
    for name, shape in (("wine", (178, 13)), ("breast_cancer", (569, 30)), ("diabetes", (442, 10))):
        X, y = systems.table(name)
        assert X.shape == shape and abs(float(X.mean())) < 1e-12
    assert y.shape == (442, 1) and systems.one_hot(torch.tensor([1, 0]), 3).tolist() == [[0, 1, 0], [1, 0, 0]]


def test_slope_of_a_power():
    assert systems.slope([1, 2, 4], [3, 1.5, 0.75]) == pytest.approx(-1)


def test_readme_has_every_statement_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """From results as the scripts write them: rows in order, both seeds' verdicts, links that exist."""
    monkeypatch.setattr(run_all, "HERE", tmp_path)
    for seed in (0, 1):
        for name in statements.scripts():
            run = Run(name, False, seed, torch.device("cpu"), tmp_path / f"seed_{seed}")
            run.plots.append({"file": f"{name}.png", "caption": "Nothing to see."})
            rows = [check(id, (id, seed) != ("D2", 1), "|V| = 1") for id in statements.statements_of(name)]
            command.write(run, rows, 1.0)
            (run.out / f"{name}.png").touch()
    run_all.write_readme(statements.scripts(), run_all.parse(["--out", str(tmp_path)]))
    text = (tmp_path / "README.md").read_text()
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith(tuple(f"| {id} |" for id in IDS))]
    assert [line[0].removeprefix("| ") for line in lines] == IDS
    assert all(len(line) == 6 for line in lines)
    verdicts = dict(zip(IDS, (line[4] for line in lines), strict=True))
    assert verdicts["D1"] == "holds" and verdicts["D2"] == "holds; fails (another seed)"
    assert f"{len(IDS)} statements: {len(IDS) - len(DOCUMENTED)} holds, {len(DOCUMENTED)} not testable here" in text
    links = set(re.findall(r"\(figures/([\w.]+)\)", text))
    assert links == {path.name for path in (tmp_path / "figures").iterdir()} and len(links) == len(statements.scripts())
