"""What the plots show: labels, marks, bars and the numbers drawn."""

import builtins
from collections.abc import Iterator
from dataclasses import dataclass

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch
from cases import MODELS

import bncurv
from bncurv import plots

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def closed_figures() -> Iterator[None]:
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def results():
    model, loss_fn, X, y = next(c for c in MODELS if c.name == "residual_cnn").build()
    quantities = bncurv.LowRankGGN(), bncurv.CouplingReport()
    return bncurv.curvature(model, loss_fn, (X, y), *quantities)


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def widths(ax):
    return [[bar.get_width() for bar in bars] for bars in ax.containers]


def test_spectrum_draws_all_eigenvalues_and_marks_rank_and_cutoff(results):
    ggn, ax = results.ggn, plots.spectrum(results.ggn)

    points, rank, cutoff = ax.get_lines()
    assert list(points.get_xdata()) == list(range(1, ggn.rank + 1))
    assert torch.tensor(points.get_ydata()).equal(ggn.eigenvalues)
    assert list(rank.get_xdata()) == [ggn.rank, ggn.rank]
    assert list(cutoff.get_ydata()) == [ggn.cutoff, ggn.cutoff]
    assert f"rank {ggn.rank} of at most {min(ggn.components, ggn.dim)}" in legend(ax)
    assert ax.get_yscale() == "log" and ax.get_xscale() == "linear"
    assert "index" in ax.get_xlabel() and "eigenvalue" in ax.get_ylabel()
    share = float(ggn.eigenvalues[:10].sum() / ggn.trace)
    leading = min(10, ggn.rank)
    assert ax.get_title() == f"The {leading} largest eigenvalues hold {share:.0%} of the trace"


def test_spectrum_of_one_eigenvalue():
    model, X, y = torch.nn.Linear(2, 1), torch.randn(1, 2), torch.randn(1, 1)
    batch = (X, y)
    ggn = bncurv.curvature(model, torch.nn.MSELoss(), batch, bncurv.LowRankGGN()).ggn
    assert plots.spectrum(ggn).get_title() == "The largest eigenvalue holds 100% of the trace"


@pytest.mark.parametrize("matrix_free", [False, True])
def test_spectrum_of_the_top_only(matrix_free):
    model, loss_fn, X, y = next(c for c in MODELS if c.name == "residual_cnn").build()
    quantity = bncurv.LowRankGGN(top=3, matrix_free=matrix_free)
    ax = plots.spectrum(bncurv.curvature(model, loss_fn, (X, y), quantity).ggn)
    assert "top 3" in legend(ax) and len(ax.get_lines()[0].get_xdata()) == 3
    assert ax.get_title().startswith("The 3 largest eigenvalues")
    assert ("of the trace" in ax.get_title()) != matrix_free


def test_spectrum_of_groups_says_what_to_pass():
    model, loss_fn, X, y = next(c for c in MODELS if c.name == "residual_cnn").build()
    groups = bncurv.curvature(model, loss_fn, (X, y), bncurv.LowRankGGN(groups="layer")).ggn
    with pytest.raises(TypeError, match=r"pass one of them, e\.g\. result\['conv1'\]"):
        plots.spectrum(groups)
    assert plots.spectrum(groups["conv1"]).get_yscale() == "log"


def test_coupling_draws_two_bars_per_layer(results):
    ax = plots.coupling(results.coupling)

    assert legend(ax) == ["exact", "batch statistics held constant"]
    exact, own = widths(ax)
    assert exact == [layer.full_trace for layer in results.coupling.values()]
    assert own == [layer.own_trace for layer in results.coupling.values()]
    assert [text.get_text() for text in ax.get_yticklabels()] == list(results.coupling)
    assert ax.get_xscale() == "log" and "trace" in ax.get_xlabel()
    low, high = ax.get_xlim()
    assert low < min(*exact, *own) and high > max(*exact, *own)


@dataclass
class Layer:
    own_trace: float
    full_trace: float


@pytest.mark.parametrize("make", [Layer, lambda own, full: {"own": own, "full": full}])
@pytest.mark.parametrize(
    "own, sentence",
    [(8.0, "'conv' looks 4.0 times as curved"), (0.5, "'conv' looks 0.2 times as curved")],
)
def test_coupling_names_the_layer_farthest_off(make, own, sentence):
    ax = plots.coupling({"fc": make(3.0, 3.0), "conv": make(own, 2.0), "bn": make(1.5, 1.0)})
    assert ax.get_title().startswith(sentence)


def test_coupling_of_uncoupled_and_of_zero_layers():
    ax = plots.coupling({"fc": Layer(3.0, 3.0), "unused": Layer(0.0, 0.0)})
    assert ax.get_title() == "No layer's curvature runs through the batch statistics"
    assert widths(ax) == [[3.0, 0.0], [3.0, 0.0]]
    ax.figure.canvas.draw()  # a zero on a logarithmic scale is no error
    with pytest.raises(ValueError, match="report is empty"):
        plots.coupling({})


@pytest.mark.parametrize("draw", ["spectrum", "coupling"])
def test_given_axes_are_used(draw, results):
    figure, ax = plt.subplots()
    field = {"spectrum": results.ggn, "coupling": results.coupling}[draw]
    assert getattr(plots, draw)(field, ax) is ax
    assert plt.get_fignums() == [figure.number]


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch, results):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"pip install bncurv\[plots\]"):
        plots.spectrum(results.ggn)
