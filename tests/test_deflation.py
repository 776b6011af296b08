"""The diagonal's estimate with loud directions exact: unbiased, within its passes, its error met, its limits true."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from backpack import backpack
from cases import Net, seeded
from state import unchanged
from test_exact import assert_close
from torch import Tensor, nn

from bncurv import DiagGGNExact, DiagGGNMC, curvature, extend
from bncurv.deflation import Deflated, _freedom
from bncurv.sketch import Basis

CE = nn.CrossEntropyLoss()
N, C = 60, 3


class Pairwise(nn.Module):
    """A loss that compares samples."""

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return (output[:, None] - output).square().mean()


def conv() -> nn.Module:
    layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)
    return nn.Sequential(nn.Unflatten(1, (1, 6, 6)), *layers, nn.Tanh(), nn.Flatten(), nn.Linear(24, C))


def time_first() -> nn.Module:
    """Rows in another order than sample by sample."""

    def forward(net: Any, x: Tensor) -> Tensor:
        rows = net.a(x.unflatten(1, (6, 6)).transpose(0, 1).flatten(0, 1))
        return net.b(torch.tanh(net.n(rows)).unflatten(0, (6, -1)).mean(0))

    return Net(forward, a=nn.Linear(6, 5), n=nn.BatchNorm1d(5), b=nn.Linear(5, C))


def shifted() -> nn.Module:
    """Samples mixed by something that is no known coupling."""
    return Net(lambda net, x: net.b(torch.tanh(net.a(x)).sub(net.a(x).mean(0))), a=nn.Linear(36, 4), b=nn.Linear(4, C))


def at(build: Callable[[], nn.Module], steps: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    """A network, trained for some steps, and its batch."""
    model, X = seeded(build, 0)().double(), seeded(lambda: torch.randn(N, 36), 1)().double()
    y = X[:, :C].argmax(1)  # what can be learnt leaves few samples loud
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        CE(model(X), y).backward()
        optimizer.step()
    model.zero_grad()
    return model, X, y


def worst(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """Largest relative error of a tensor, or of its sum."""
    alive = [name for name, t in want.items() if bool(t.abs().max() > 1e-12)]
    each = [float((got[n] - want[n]).norm() / want[n].norm()) for n in alive]
    return max(each + [float((got[n].sum() / want[n].sum() - 1).abs()) for n in alive])


@pytest.fixture
def all_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws that are every column once, times √K: their mean square is the expectation."""
    made: dict[int, int] = {}

    def every(self: Deflated, count: int) -> Tensor:
        size = len(self._whole) if self._whole is not None else self._batch.samples * self._closed
        first = made.setdefault(id(self), 0)
        made[id(self)] += count
        return size**0.5 * torch.eye(size, dtype=self._batch.output.dtype)[first : first + count]

    monkeypatch.setattr(Deflated, "_normal", every)
    monkeypatch.setattr(Deflated, "_price", lambda *_: float("inf"))


@pytest.mark.parametrize("r", [0, 7])
@pytest.mark.parametrize("build", [conv, time_first, shifted], ids=lambda f: f.__name__)
def test_unbiased_whatever_the_basis(build, r, all_columns, monkeypatch):
    """The mean over all columns is the diagonal, to rounding: what is exact and what is random add up."""
    model, X, y = at(build)
    columns = N * (C - 1)
    monkeypatch.setattr(Basis, "best", lambda self, passes, fewest: passes - columns)
    with unchanged(model, but=("random",)):
        want = curvature(model, CE, (X, y), DiagGGNExact(), method="dense").diag_ggn_exact
        spent = 0 if build is shifted else C - 1  # no sketch
        res = curvature(model, CE, (X, y), DiagGGNMC(passes=spent + r + columns), method="dense")
    assert (res.passes, res.method) == (spent + r + columns, "sampled")
    assert_close(res.diag_ggn_mc, want)


def test_a_loss_that_compares_samples(all_columns, monkeypatch):
    model, X, y = at(conv)
    want = curvature(model, Pairwise(), (X, y), DiagGGNExact()).diag_ggn_exact
    monkeypatch.setattr(Basis, "best", lambda self, passes, fewest: 5)
    columns = curvature(model, Pairwise(), (X, y), DiagGGNExact()).passes
    res = curvature(model, Pairwise(), (X, y), DiagGGNMC(passes=5 + columns))
    assert res.passes == 5 + columns
    assert_close(res.diag_ggn_mc, want)


def test_the_best_of_a_budget():
    """Far nearer than draws alone, in exactly so many passes; beside other quantities too."""
    model, X, y = at(conv, steps=80)
    want = curvature(model, CE, (X, y), DiagGGNExact()).diag_ggn_exact
    torch.manual_seed(0)
    plain = worst(curvature(model, CE, (X, y), DiagGGNMC(60)).diag_ggn_mc, want)
    res = curvature(model, CE, (X, y), DiagGGNMC(passes=60), method="dense")
    both = curvature(model, CE, (X, y), DiagGGNMC(passes=60), DiagGGNExact(), method="dense")
    assert (res.passes, res.method, both.passes) == (60, "sampled", 60 + N * (C - 1))
    for found in (res, both):
        assert worst(found.diag_ggn_mc, want) < 0.1 < 0.2 < plain


@pytest.mark.parametrize("steps", [0, 80])
def test_a_relative_error(steps):
    """Met, and not by accident: in repeats, by parameter, with few passes where directions are loud."""
    model, X, y = at(conv, steps)
    want = curvature(model, CE, (X, y), DiagGGNExact()).diag_ggn_exact
    for seed in range(10):
        torch.manual_seed(seed)
        res = curvature(model, CE, (X, y), DiagGGNMC(rtol=0.2), method="dense")
        assert worst(res.diag_ggn_mc, want) <= 0.2 and res.method == "sampled"
        assert res.passes <= (60 if steps else 120)


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("confidence", [0.95, 0.6])
def test_limits_cover(batches, confidence):
    """As often as they say, in the mean over entries and repeats; over a loader too."""
    model, X, y = at(conv)
    data = list(zip(X.chunk(batches), y.chunk(batches), strict=True))
    want = curvature(model, CE, data, DiagGGNExact()).diag_ggn_exact
    inside = []
    for seed in range(30):
        torch.manual_seed(seed)
        quantity = DiagGGNMC(passes=2 + 13, confidence=confidence)
        res = curvature(model, CE, data, quantity, method="dense")
        for name, t in want.items():
            low, high = res.diag_ggn_mc_lower[name], res.diag_ggn_mc_upper[name]
            assert bool((low <= res.diag_ggn_mc[name]).all() and (res.diag_ggn_mc[name] <= high).all())
            inside.append(((low <= t) & (t <= high)).flatten())
    tolerance = 0.02 if batches == 1 else 0.04  # Welch-Satterthwaite errs on the safe side
    assert torch.cat(inside).double().mean() == pytest.approx(confidence, abs=tolerance)


@pytest.mark.parametrize("goal", [{"passes": 10**4}, {"rtol": 1e-3}], ids=str)
@pytest.mark.parametrize("method", ["auto", "dense"])
def test_the_exact_way_where_it_is_no_dearer(goal, method):
    model, X, y = at(conv)
    X, y = (X, y) if method == "auto" else (X[:20], y[:20])
    want = curvature(model, CE, (X, y), DiagGGNExact(), method=method)
    res = curvature(model, CE, (X, y), DiagGGNMC(**goal), method=method)
    assert res.method == want.method != "sampled"
    assert want.passes <= res.passes <= want.passes + 60  # what it took to see that
    for field in ("diag_ggn_mc", "diag_ggn_mc_lower", "diag_ggn_mc_upper"):
        assert_close(res.fields[field], want.diag_ggn_exact)


def test_draws_already_made_serve_a_larger_basis(all_columns, monkeypatch):
    """Vᵀw less what has become exact: as if they had been drawn after it."""
    model, X, y = at(conv)
    columns = N * (C - 1)
    bases = iter([(4, 12.0), (5, 12.0)])  # half of the way, with the first draws, and the other half
    monkeypatch.setattr(Basis, "cheapest", lambda self, scale, fewest, known: next(bases))
    errors = lambda self, _: (0.5 * (0.999 * columns / self.draws) ** 0.5,) * 2  # noqa: E731
    monkeypatch.setattr("bncurv.deflation._Estimate.errors", errors)
    want = curvature(model, CE, (X, y), DiagGGNExact()).diag_ggn_exact
    res = curvature(model, CE, (X, y), DiagGGNMC(rtol=0.5), method="dense")
    assert res.passes == 2 + 5 + columns
    assert_close(res.diag_ggn_mc, want)


def test_a_sketch_that_is_not_made_costs_nothing():
    """Two passes are two passes, however many columns a sketch would have."""
    X, y = seeded(lambda: torch.randn(600, 36), 1)().double(), torch.arange(600) % C
    res = curvature(seeded(conv, 0)().double(), CE, (X, y), DiagGGNMC(passes=2), method="dense")
    assert (res.passes, res.method) == (2, "sampled")


@pytest.mark.parametrize("entries, freedom", [(1, 1), (60, 1), (60, 60)], ids=str)
def test_freedom_of_a_squared_length(entries, freedom):
    """Of terms that are alike in all entries, one; of independent ones, as many as entries."""
    draws = seeded(lambda: torch.randn(200, freedom), 0)().double().square().expand(-1, entries)
    assert _freedom(draws) == pytest.approx(freedom, rel=0.25)


def test_both_gestures():
    model, X, y = at(conv)
    torch.manual_seed(5)
    res = curvature(model, CE, (X, y), DiagGGNMC(passes=20))
    loss_fn = extend(nn.CrossEntropyLoss())
    extend(model)
    torch.manual_seed(5)
    with backpack(DiagGGNMC(passes=20)):
        loss_fn(model(X), y).backward()
    for field in ("diag_ggn_mc", "diag_ggn_mc_lower", "diag_ggn_mc_upper"):
        assert_close({n: getattr(p, field) for n, p in model.named_parameters()}, res.fields[field])


@pytest.mark.parametrize(
    "arguments, text",
    [
        ({"passes": 0}, "passes=0; expected a positive integer"),
        ({"passes": 1.5}, "passes=1.5; expected a positive integer"),
        ({"rtol": 0.0}, "rtol=0.0; expected a relative error between 0 and 1"),
        ({"rtol": float("nan")}, "rtol=nan; expected a relative error"),
        ({"rtol": 0.1, "confidence": 1.0}, "confidence=1.0; expected a probability between 0 and 1"),
        ({"rtol": 0.1, "passes": 10}, "DiagGGNMC was given passes and rtol; expected one of"),
        ({"mc_samples": 3, "passes": 10}, "DiagGGNMC was given mc_samples and passes"),
        ({"rtol": 0.1, "kind": "labels"}, "kind='labels' goes with mc_samples=M"),
    ],
    ids=str,
)
def test_arguments(arguments, text):
    with pytest.raises(ValueError, match=text):
        DiagGGNMC(**arguments)


@pytest.mark.parametrize("goal", [{"passes": 20}, {"rtol": 0.4}], ids=str)
def test_another_default_device(goal):
    """New tensors go to the model's device, whatever is the default."""
    model, X, y = at(conv)
    found = []
    for device in ("cpu", "meta"):
        torch.manual_seed(1)
        with torch.device(device):
            found.append(curvature(model, CE, (X, y), DiagGGNMC(**goal), method="dense").fields)
    for field, want in found[0].items():
        assert all(torch.equal(found[1][field][name], t) for name, t in want.items())
