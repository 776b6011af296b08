"""The zoo: what it calls wrong, slow, inapplicable; some of its architectures, where their libraries are installed."""

import importlib
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from cases import Net
from torch import Tensor, nn
from zoo.measure import Architecture, measure, relative_error
from zoo.table import by_family, one_by_one

from bncurv import reference

ROOT = Path(__file__).parent.parent
N, C = 6, 3


def toy(between: Callable[[Net, Tensor], Tensor] = lambda net, h: h) -> Architecture:
    """A small net with BatchNorm and dropout, in float32 and eval mode, as a library may build it."""

    def build() -> nn.Module:
        parts = {"a": nn.Linear(4, 5), "n": nn.BatchNorm1d(5), "d": nn.Dropout(0.3), "o": nn.Linear(5, C)}
        parts["v"] = nn.Parameter(torch.zeros(()))
        return Net(lambda net, x: net.o(net.d(between(net, net.n(net.a(x)).tanh()))), **parts).float().eval()

    return Architecture("toy", "none", build, lambda: (torch.randn(N, 4), torch.randint(C, (N,))))


def test_exact_and_fast():
    row = measure(toy())
    assert (row.problem, row.slow, row.norms, row.samples, row.columns) == ("", "", 1, N, C)
    assert 0 < row.error < 1e-13 and row.passes == C
    assert "| toy | none |" in one_by_one([row]) and "0 wrong, 0 with a slow parameter" in by_family([row])


@pytest.mark.parametrize("oracle", ["ggn_diagonal", "component_gradients"])
def test_wrong(oracle, monkeypatch):
    """A value that is off by more than 1e-10, in one parameter."""
    right = getattr(reference, oracle)

    def off(*args: object) -> dict[str, Tensor]:
        return {name: t * (1 + 1e-9 * ("o.bias" in name)) for name, t in right(*args).items()}

    monkeypatch.setattr(reference, oracle, off)
    row = measure(toy())
    assert row.problem in ("relative error 1e-09", "relative error 2e-09")
    assert "1 wrong" in one_by_one([row]) and row.problem in one_by_one([row])


def test_errors_are_relative_to_each_parameter():
    truth = {"small": torch.tensor([1e-6]), "zero": torch.zeros(2), "large": torch.tensor([1.0])}
    assert relative_error(truth, truth) == 0
    assert relative_error(truth | {"small": truth["small"] * 1.5}, truth) == pytest.approx(0.5)
    assert relative_error(truth | {"zero": truth["zero"] + 1e-3}, truth) == pytest.approx(1.41e-3, rel=1e-2)
    assert relative_error(truth | {"large": torch.tensor([torch.nan])}, truth) == float("inf")
    assert relative_error({"large": truth["large"]}, truth) == float("inf")


def test_slow():
    """By name, with the cause; what does not fit is said to be a problem."""
    row = measure(toy(lambda net, h: h.masked_fill(h > 0.5, net.v)))
    assert row.slow == "'v' (used in a function that is no row of the layer table)" and not row.problem
    assert "| 3 + 3 N | 3 N |" in one_by_one([row]) and "- toy: 'v' (used in a function" in by_family([row])
    row = measure(toy(lambda net, h: h * h.softmax(0)))
    assert row.refused and row.slow.startswith("the samples of the batch are mixed in") and not row.problem
    assert "| 3 N | 3 N |" in one_by_one([row])
    assert measure(toy(lambda net, h: h @ h)).problem.startswith("RuntimeError: mat1 and mat2")


def test_written_claims():
    """Nothing wrong, few slow, half of them with BatchNorm; both tables of one run."""
    summaries = []
    for path in ("docs/architectures.md", "experiments/zoo/README.md"):
        text = (ROOT / path).read_text().split("<!-- zoo:begin -->\n")[1].split("\n<!-- zoo:end -->")[0]
        summaries.append(text.splitlines()[0])
    said = re.fullmatch(
        r"(\d+) architectures, (\d+) with BatchNorm: 0 wrong, (\d+) with a slow parameter\.", summaries[0]
    )
    number, norms, slow = map(int, said.groups())
    assert number >= 40 and norms >= number / 2 and slow <= 5 and summaries[1] == summaries[0]
    assert text.count("\n| ") == number + 2


@pytest.mark.parametrize(
    "family, library, names",
    [
        ("vision", "segmentation_models_pytorch", ("VGG", "BEiT", "XCiT", "MobileNetV3")),
        ("graphs", "torch_geometric", ("GIN",)),
        ("sequences", "pytorch_tabnet", ("MPNet", "PatchTST", "TabNet")),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_some_architectures(family, library, names):
    if find_spec(library) is None:
        pytest.skip(f"without {library}, of the extra 'zoo'")
    every = {one.name: one for one in importlib.import_module(f"zoo.models.{family}").ARCHITECTURES}
    for name in names:
        assert measure(every[name]).problem == "", name
