"""The zoo: what it calls wrong, slow, inapplicable; some of its architectures, where their libraries are installed."""

import importlib
from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch
from cases import Net
from torch import Tensor, nn
from zoo.measure import Architecture, measure, relative_error, slow_parameters
from zoo.table import by_family, one_by_one

from bncurv import reference

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
    assert (row.problem, row.slow, row.norms, row.samples, row.outputs) == ("", {}, 1, N, C)
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
    assert row.slow == {"v": "used in a function that is no row of the layer table"} and not row.problem
    assert "| 3 + 3 N | 3 N |" in one_by_one([row]) and "- toy: v: used in a function" in by_family([row])
    row = measure(toy(lambda net, h: h * h.softmax(0)))
    assert list(row.slow) == ["all"] and "samples of the batch are mixed" in row.slow["all"] and not row.problem
    assert "| 3 N | 3 N |" in one_by_one([row])
    assert measure(toy(lambda net, h: h @ h)).problem.startswith("RuntimeError: mat1 and mat2")


def test_slow_parameters_of_a_message():
    said = (
        "No parameter product for 'a.w', 'b' (used here (twice)), 'c' and 2 more (there): exact, but by one (3 passes"
    )
    assert slow_parameters(said) == {
        "a.w": "used here (twice)",
        "b": "used here (twice)",
        "c": "there",
        "and 2 more": "there",
    }
    assert slow_parameters("The coupled way loses digits for 'a' (1e-3 relative)") == {}


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
