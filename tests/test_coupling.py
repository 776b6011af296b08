"""What coupling contributes: the report, and truncation of its directions with an honest error."""

import copy
import weakref
from typing import Any

import pytest
import torch
from backpack import backpack
from cases import ARCHITECTURES, MODELS
from torch import Tensor, nn

import bncurv
from bncurv import CouplingReport, DiagGGNExact, SqrtGGNExact, curvature, reference, truncation
from bncurv.budget import Budget
from bncurv.directions import Directions

CE = nn.CrossEntropyLoss()
NAMES = ("residual_cnn", "two_bns", "resnet", "densenet", "block_twice")
SOME = [c for c in [*MODELS, *ARCHITECTURES] if c.name in NAMES]
SLOW = [c for c in MODELS if c.name in ("weight_norm", "tied_weights")]  # parameters without a layer product


def frozen(model, X):
    """The same network with its batch statistics of ``X`` held constant: eval-mode BatchNorms with those statistics."""
    held, seen = copy.deepcopy(model), {}

    def note(module, args):
        x = args[0]
        axes = [0, *range(2, x.dim())]
        seen[module] = x.mean(axes), x.var(axes, correction=0)

    layers = [m for m in held.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    handles = [m.register_forward_pre_hook(note) for m in layers]
    held(X)
    for handle in handles:
        handle.remove()
    for module, (mean, var) in seen.items():
        module.running_mean, module.running_var = mean.detach(), var.detach()
        module.eval()
    return held


@pytest.mark.filterwarnings("ignore::bncurv.SlowPathWarning")
@pytest.mark.parametrize("case", [c for c in [*SOME, *SLOW] if c.name != "block_twice"], ids=str)
def test_report_is_frozen_and_full_trace(case):
    model, loss_fn, X, y = case.build()
    report = curvature(model, loss_fn, (X, y), CouplingReport()).coupling
    full = reference.ggn_diagonal(model, loss_fn, X, y)
    own = reference.ggn_diagonal(frozen(model, X), loss_fn, X, y)
    for layer, entry in report.items():
        names = [n for n in full if n.rpartition(".")[0] == layer]
        assert entry.full_trace == pytest.approx(float(sum(full[n].sum() for n in names)), rel=1e-9)
        assert entry.own_trace == pytest.approx(float(sum(own[n].sum() for n in names)), rel=1e-9)


@pytest.mark.parametrize("case", SOME, ids=str)
def test_singular_values_are_those_of_the_correction(case):
    model, loss_fn, X, y = case.build()
    res = curvature(model, loss_fn, (X, y), CouplingReport(), SqrtGGNExact(), method="coupled")
    held = frozen(model, X) if case.name != "block_twice" else None
    for entry in res.coupling.values():
        values = entry.singular_values
        assert len(values) == entry.directions
        assert bool((values.diff() <= 1e-12 * values.max()).all()) if len(values) else True
    if held is None:
        return
    own = curvature(held, loss_fn, (X, y), SqrtGGNExact(), method="coupled").sqrt_ggn_exact
    for layer, entry in res.coupling.items():
        names = [n for n in own if n.rpartition(".")[0] == layer]
        gap = torch.cat([(res.sqrt_ggn_exact[n] - own[n]).flatten(0, 1).flatten(1) for n in names], 1)
        want = torch.linalg.svdvals(gap)[: len(entry.singular_values)]
        got, slack = entry.singular_values[: len(want)].double(), 1e-7 * float(gap.norm() + 1e-9)
        assert torch.allclose(got, want, rtol=1e-6, atol=slack)


class ScaledTwice(nn.Module):
    """Uses its BatchNorm's weight a second time, so that it has no product of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.norm(self.first(x))) * self.norm.weight)


@pytest.mark.filterwarnings("ignore::bncurv.SlowPathWarning")
def test_report_of_a_parameter_without_a_product(float64):
    model, loss_fn = ScaledTwice(), nn.CrossEntropyLoss()
    X, y = torch.randn(8, 4), torch.randint(3, (8,))
    entry = curvature(model, loss_fn, (X, y), CouplingReport()).coupling["norm"]
    own = reference.ggn_diagonal(frozen(model, X), loss_fn, X, y)
    assert entry.own_trace == pytest.approx(float(own["norm.weight"].sum() + own["norm.bias"].sum()), rel=1e-9)


@pytest.mark.parametrize("method", ["auto", "dense"])
def test_report_where_the_dense_way_is_cheaper(method):
    """The report asks for the coupled way; told to go the dense way, it still has both traces."""
    model, loss_fn, X, y = SOME[0].build()
    assert curvature(model, loss_fn, (X, y), DiagGGNExact()).method == "dense"
    got = curvature(model, loss_fn, (X, y), CouplingReport(), DiagGGNExact(), method=method)
    want = curvature(model, loss_fn, (X, y), CouplingReport(), method="coupled").coupling
    assert got.method == ("coupled" if method == "auto" else "dense")
    for layer, entry in want.items():
        assert got.coupling[layer].own_trace == pytest.approx(entry.own_trace, rel=1e-9)
        assert got.coupling[layer].full_trace == pytest.approx(entry.full_trace, rel=1e-9)
        assert got.coupling[layer].directions == (entry.directions if method == "auto" else 0)


def test_report_over_mini_batches_is_the_first_ones():
    model, loss_fn, X, y = SOME[0].build()
    batches = [(X[:3], y[:3]), (X[3:], y[3:])]
    got, want = (curvature(model, loss_fn, data, CouplingReport()).coupling for data in (batches, batches[0]))
    assert {n: (e.own_trace, e.full_trace) for n, e in got.items()} == {
        n: (e.own_trace, e.full_trace) for n, e in want.items()
    }


def test_report_in_the_context():
    model, loss_fn, X, y = SOME[0].build()
    report = CouplingReport()
    bncurv.extend(model), bncurv.extend(loss_fn)
    with backpack(report):
        loss_fn(model(X), y).backward()
    direct = curvature(model, loss_fn, (X, y), CouplingReport()).coupling
    traces = {layer: entry.full_trace for layer, entry in direct.items()}
    assert {layer: entry.full_trace for layer, entry in report.result.items()} == pytest.approx(traces)


def trained_resnet():
    """A small residual network after a few steps on random classes: couplings with a decaying spectrum."""
    torch.manual_seed(0)
    case = next(c for c in ARCHITECTURES if c.name == "resnet")
    model, loss_fn, _, _ = case.build()
    X, y = torch.randn(24, *case.build()[2].shape[1:]).double(), torch.randint(3, (24,))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(30):
        optimiser.zero_grad()
        loss_fn(model(X), y).backward()
        optimiser.step()
    return model, loss_fn, X, y


@pytest.mark.parametrize("tol", [0.3, 0.1, 0.01, 1e-3])
def test_tol(tol):
    model, loss_fn, X, y = trained_resnet()
    exact = curvature(model, loss_fn, (X, y), SqrtGGNExact(), DiagGGNExact(), method="coupled")
    rough = curvature(model, loss_fn, (X, y), SqrtGGNExact(), DiagGGNExact(), method="coupled", tol=tol)
    made = {n: float((rough.sqrt_ggn_exact[n] - t).norm()) for n, t in exact.sqrt_ggn_exact.items()}
    total = sum(e**2 for e in made.values()) ** 0.5
    claimed = sum(e**2 for e in rough.error.values()) ** 0.5
    norm = sum(float(t.square().sum()) for t in exact.sqrt_ggn_exact.values()) ** 0.5
    assert total / norm < 3 * tol
    if tol == 1e-3:  # all of it is no dearer than what would be kept
        assert claimed == 0 and total < 1e-12 * norm
    else:
        assert total > 0 and 0.5 < claimed / total < 2
    for name, diagonal in exact.diag_ggn_exact.items():
        bound = 2 * float(diagonal.sum()) ** 0.5 * made[name] + made[name] ** 2
        assert float((rough.diag_ggn_exact[name] - diagonal).abs().sum()) <= bound * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_error_over_mini_batches(reduction):
    """Of V stacked over the mini-batches at their weights."""
    model, _, X, y = trained_resnet()
    loss_fn, batches = nn.CrossEntropyLoss(reduction=reduction), [(X[:16], y[:16]), (X[16:], y[16:])]
    shares = (1.0, 1.0) if reduction == "sum" else (2 / 3, 1 / 3)
    got = curvature(model, loss_fn, batches, DiagGGNExact(), method="coupled", tol=0.1).error
    alone = [curvature(model, loss_fn, b, DiagGGNExact(), method="coupled", tol=0.1).error for b in batches]
    for name, error in got.items():
        squares = sum(s * each.get(name, 0.0) ** 2 for s, each in zip(shares, alone, strict=True))
        assert error == pytest.approx(squares**0.5)
    assert got.keys() == alone[0].keys() | alone[1].keys()


def test_zero_tol_is_exact_and_has_no_error():
    model, loss_fn, X, y = trained_resnet()
    assert curvature(model, loss_fn, (X, y), DiagGGNExact(), method="coupled").error == {}


@pytest.mark.parametrize("budget", [0, 20_000])
@pytest.mark.parametrize("tol", [0.0, 1e-9])
def test_directions_in_groups_of_parameters(budget, tol, monkeypatch):
    """Where P does not fit into the budget, parameters are worked on in groups: the same numbers, more passes."""
    model, loss_fn, X, y = SOME[-1].build()
    whole = curvature(model, loss_fn, (X, y), DiagGGNExact(), bncurv.ComponentGrad(), method="coupled")
    monkeypatch.setattr("bncurv.engine.USUAL", Budget(direction=budget))
    parts = curvature(model, loss_fn, (X, y), DiagGGNExact(), bncurv.ComponentGrad(), method="coupled", tol=tol)
    assert parts.passes > whole.passes
    for field in ("diag_ggn_exact", "grad_component"):
        for name, t in getattr(whole, field).items():
            assert torch.allclose(getattr(parts, field)[name], t, rtol=1e-6 if tol else 1e-9, atol=1e-12), name


def test_error_in_groups_of_parameters(monkeypatch):
    """That of every parameter, whatever group it was in."""
    model, loss_fn, X, y = trained_resnet()
    whole = curvature(model, loss_fn, (X, y), DiagGGNExact(), method="coupled", tol=0.1)
    monkeypatch.setattr("bncurv.engine.USUAL", Budget(direction=0))
    parts = curvature(model, loss_fn, (X, y), DiagGGNExact(), method="coupled", tol=0.1)
    assert parts.passes > whole.passes and len(whole.error) > 3
    assert parts.error == pytest.approx(whole.error)


def test_one_group_of_directions_at_a_time(monkeypatch):
    """P of a group is gone before that of the next one is made."""
    alive: weakref.WeakSet[Directions] = weakref.WeakSet()
    made = []
    own = Directions.__init__

    def counted(self, *args):
        alive.add(self)
        made.append(len(alive))
        own(self, *args)

    model, loss_fn, X, y = SOME[-1].build()
    monkeypatch.setattr(Directions, "__init__", counted)
    monkeypatch.setattr("bncurv.engine.USUAL", Budget(direction=0))
    curvature(model, loss_fn, (X, y), DiagGGNExact(), bncurv.ComponentGrad(), method="coupled")
    assert len(made) > 2 and set(made) == {1}


def test_lengths_of_directions(monkeypatch):
    """‖P_q‖ from random z, to the error of so many of them."""
    model, loss_fn, X, y = trained_resnet()
    found, own = [], truncation.Leading._lengths

    def noted(self: truncation.Leading, wanted: list[Tensor]) -> Tensor:
        found.append((self, own(self, wanted)))
        return found[0][1]

    monkeypatch.setattr(truncation, "PROBES", 300)
    monkeypatch.setattr(truncation.Leading, "_lengths", noted)
    curvature(model, loss_fn, (X, y), DiagGGNExact(), method="coupled", tol=0.1)
    leading, lengths = found[0]
    passes, wanted = leading._passes, list(model.parameters())
    statistics = [passes.sites[j].coupling.statistics for j in passes.structure.couplings]
    rows = []
    for s in statistics:
        for unit in torch.eye(s.numel(), dtype=s.dtype):
            got = torch.autograd.grad(s, wanted, unit.view_as(s), retain_graph=True, allow_unused=True)
            rows.append(sum(float(g.square().sum()) for g in got if g is not None) ** 0.5)
    torch.testing.assert_close(lengths, torch.tensor(rows, dtype=lengths.dtype), rtol=0.2, atol=1e-3 * max(rows))


def test_a_graph_that_is_differentiated_once_only():
    """No lengths: directions by A alone, their error claimed as well."""

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.tanh()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g * (1 - ctx.saved_tensors[0].tanh() ** 2)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 12), nn.Linear(12, 12), nn.Linear(12, 3)
            self.n, self.m = nn.BatchNorm1d(12), nn.BatchNorm1d(12)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.tanh(self.m(self.b(Once.apply(self.n(self.a(x)))))))

    torch.manual_seed(0)
    model, X, y = Net().double(), torch.randn(80, 4).double(), torch.randint(3, (80,))
    V = curvature(model, CE, (X, y), SqrtGGNExact(), method="coupled").sqrt_ggn_exact
    rough = curvature(model, CE, (X, y), SqrtGGNExact(), method="coupled", tol=0.3)
    made = sum(float((rough.sqrt_ggn_exact[n] - t).square().sum()) for n, t in V.items()) ** 0.5
    assert 0.5 < sum(e**2 for e in rough.error.values()) ** 0.5 / made < 2


def test_auto_decides_when_it_knows_how_much_is_kept():
    """Where all directions cost more than the plain passes, and the few that count cost less."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(20, 48)]
    for _ in range(3):
        layers += [nn.BatchNorm1d(48), nn.Tanh(), nn.Linear(48, 48)]
    model = nn.Sequential(*layers, nn.BatchNorm1d(48), nn.Tanh(), nn.Linear(48, 3)).double()
    X, y = torch.randn(90, 20).double(), torch.randint(3, (90,))
    ways = [curvature(model, CE, (X, y), DiagGGNExact(), tol=tol).method for tol in (0.0, 1e-6, 0.5)]
    assert ways == ["dense", "dense", "coupled"]
