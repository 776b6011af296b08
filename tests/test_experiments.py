"""The demo as a user runs it, and the functions that it shares with the notebook."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import digits_resnet as demo
import estimator
import pytest
import tolerance
import torch
from lib import estimates, resnet, systems
from lib.plain import relative_error

EXPERIMENTS = Path(__file__).parent.parent / "experiments"


def run_demo(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXPERIMENTS / "digits_resnet.py"), "--quick", "--out", str(out)]
    return subprocess.run([*command, *options], capture_output=True, text=True, timeout=300)


def test_demo_prints_its_tables_and_saves_its_plots(tmp_path: Path) -> None:
    done = run_demo(tmp_path)

    assert done.returncode == 0, done.stdout + done.stderr
    for heading in ("trace", "largest", "own part", "coupling", "seconds", "passes", "limit"):
        assert heading in done.stdout
    for layer in ("block1.conv1", "block2.bn2", "fc", "all layers"):
        assert f"\n{layer} " in done.stdout
    assert "FAILED" not in done.stdout
    assert "100%" in done.stderr  # progress bars

    plots = sorted(tmp_path.glob("*.png"))
    assert len(plots) == 3
    for plot in plots:
        assert str(plot) in done.stdout
        assert plot.read_bytes().startswith(b"\x89PNG") and plot.stat().st_size > 10_000


def test_demo_fails_when_the_accuracy_is_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "train", lambda model, digits, epochs: None)
    monkeypatch.setattr(sys, "argv", ["digits_resnet.py", "--batch-size", "8", "--out", str(tmp_path)])
    assert demo.main() == 1
    assert "FAILED" in capsys.readouterr().out


def test_frozen_copy_has_the_same_outputs_but_independent_samples() -> None:
    X = resnet.load_data().train_x[:16].double()
    model = resnet.SmallResNet(width=4).double().train()
    frozen = systems.frozen(model, X)

    assert not any(m.training for m in frozen.modules() if isinstance(m, torch.nn.BatchNorm2d))
    torch.testing.assert_close(frozen(X[:3]), model(X)[:3])


def test_freezing_leaves_the_model_as_it_was() -> None:
    X = resnet.load_data().train_x[:16]
    model = resnet.SmallResNet(width=4).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    systems.frozen(model, X)

    assert all(m.training for m in model.modules())
    assert not model.bn._forward_pre_hooks
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_a_wrong_value_fails_its_check() -> None:
    truth = {"weight": torch.tensor([1.0, -4.0])}
    wrong = {"weight": torch.tensor([1.0, -3.0])}

    assert relative_error(truth, truth) == 0
    assert relative_error(wrong, truth) == 0.25
    assert demo.Check("", 0.1, 0.2).passed and not demo.Check("", 0.3, 0.2).passed
    assert demo.Check("", 0.3, 0.2, at_least=True).passed
    assert not demo.Check("", float("nan"), 0.2).passed


def run_script(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=300)


def test_growth_counts_the_passes_that_are_taken() -> None:
    done = run_script(str(EXPERIMENTS / "growth.py"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ResNet-50" in done.stdout and "but bncurv took" not in done.stdout


def test_benchmark_runs_and_its_table_and_plot_are_made(tmp_path: Path) -> None:
    bench = EXPERIMENTS / "benchmark"
    grid = ["--nets", "cnn", "--sizes", "8,12", "--jobs", "diag", "--chunks", "16", "--only", "vmap,bncurv"]
    effort = ["--budget", "1", "--patience", "0", "--repeats", "1", "--min-time", "0.01", "--threads", "1"]
    results = tmp_path / "results.jsonl"
    done = run_script(str(bench / "run.py"), *grid, *effort, "--out", str(results))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout and "| cnn | 8 | func vmap(vjp), 16 |" in done.stdout
    rows = [json.loads(line) for line in results.read_text().splitlines()[1:]]
    assert len(rows) == 8 and all(row["seconds"] and row["flops"] for row in rows)
    plot = run_script(str(bench / "plot.py"), str(results))
    assert plot.returncode == 0, plot.stdout + plot.stderr
    assert list(tmp_path.glob("*.png"))


def test_equal_accuracy_scales_what_falls_by_a_law_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXPERIMENTS / "benchmark"))
    import accuracy

    for name, value in {"GOALS": (0.3, 0.1), "BUDGETS": (16, 64), "REPEATS": 2, "MOST": 32}.items():
        monkeypatch.setattr(accuracy, name, value)
    case, _ = estimates.cases({"MLP": estimator.BUILDERS["MLP"]}, 32, epochs=1)
    options = {"device": torch.device("cpu"), "clock": "cpu", "repeats": 1, "patience": 0, "budget": 1}
    rows = accuracy.measure_accuracy(case, Namespace(**options))
    found = {(row["competitor"], row["rtol"]): row for row in rows}

    assert found["bncurv", 0.0]["passes"] == case.passes
    assert found["bncurv", 0.1]["error"] < 0.1 and not found["bncurv", 0.1]["extrapolated"]
    coarse, fine = (found["draws alone", goal] for goal in (0.3, 0.1))
    assert fine["extrapolated"] and fine["passes"] == pytest.approx(9 * coarse["passes"], abs=5)
    assert fine["seconds"] / coarse["seconds"] == pytest.approx(9)
    measured = estimates.error(case, accuracy.LAWS["draws alone"], coarse["passes"], 8)
    assert 0.15 < measured < 0.6  # so many draws are off by about that much


def test_page_on_speed_shows_the_results_kept() -> None:
    table = run_script(str(EXPERIMENTS / "benchmark/table.py"))
    assert table.returncode == 0, table.stderr
    assert table.stdout in (EXPERIMENTS.parent / "docs/speed.md").read_text()
    for part in ("| ~11.7 s | 326 ms | **35.9×** | 2304 /", "cnn 0.84 (best peer 1.82)", "| ResNet, trained | 1 %"):
        assert part in table.stdout


def test_tolerance_claims_the_error_that_it_makes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["tolerance.py", "--batch-size", "24", "--epochs", "1"])
    assert tolerance.main() == 0
    assert "| 0.01 |" in capsys.readouterr().out


def test_estimator_keeps_its_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A small MLP at few goals: met, and limits that hold."""
    monkeypatch.setattr(estimator, "BUDGETS", (40,))
    monkeypatch.setattr(estimator, "GOALS", (0.1,))
    monkeypatch.setattr(estimator, "BUILDERS", {"MLP": estimator.BUILDERS["MLP"]})
    options = ["--epochs", "1", "--repeats", "4", "--batch-size", "32", "--figure", str(tmp_path / "error.png")]
    monkeypatch.setattr(sys, "argv", ["estimator.py", *options])
    assert estimator.main() == 0
    told = capsys.readouterr().out
    assert "| MLP, trained: deflated |" in told and "| MLP, initial | 0.1 |" in told
    assert (tmp_path / "error.png").stat().st_size > 10_000
