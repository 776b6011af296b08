"""A batch recorded once: the same numbers, nothing done twice, told when it is no longer the point, and freed."""

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from cases import labelled, mlp
from state import unchanged
from test_exact import assert_close
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bncurv
from bncurv import (
    ComponentGrad,
    ComponentVariance,
    CouplingReport,
    DiagGGNExact,
    DiagGGNMC,
    InfluenceGrad,
    LowRankGGN,
    SumComponentGradSquared,
    at,
    curvature,
)
from bncurv.budget import Budget

CE = nn.CrossEntropyLoss()
N, C, R = 60, 3, 4 * 2 + 3 * 2


class Counted(nn.Module):
    """Counts its forward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.calls = mlp(5, 4, 3, 3), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.body(x)


def made() -> tuple[Counted, Tensor, Tensor]:
    torch.manual_seed(0)
    model = Counted().double()
    X, y = labelled(N, 5, C=C)()
    return model, X.double(), y


@pytest.fixture
def nothing_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bncurv.keeping.USUAL", Budget(small=0))


@pytest.mark.parametrize("method", ["coupled", "dense"])
def test_the_same_numbers(method):
    """Whatever was asked before, in one forward pass; between the calls the model is as it was."""
    model, X, y = made()
    asked: list[Any] = [DiagGGNExact(), LowRankGGN(), DiagGGNExact(), ComponentGrad(), ComponentVariance()]
    asked += [LowRankGGN(top=2), SumComponentGradSquared(), InfluenceGrad(), CouplingReport()]
    asked += [DiagGGNExact(), ComponentGrad()]
    asked = [q for q in asked if method == "coupled" or not isinstance(q, CouplingReport)]
    want = [curvature(copy.deepcopy(model), CE, (X, y), q, method=method) for q in asked]
    with unchanged(model), at(model, CE, (X, y), method=method) as point:
        for q, expected in zip(asked, want, strict=True):
            with unchanged(model):
                res = point(q)
            for field, value in expected.fields.items():
                if isinstance(value, dict) and isinstance(next(iter(value.values())), Tensor):
                    assert_close(res.fields[field], value)
                elif field == "ggn":
                    torch.testing.assert_close(res.ggn.eigenvalues, value.eigenvalues)
                    torch.testing.assert_close(res.ggn.gradient, value.gradient)
                else:
                    assert [c.full_trace for c in res.coupling.values()] == pytest.approx(
                        [c.full_trace for c in value.values()]
                    )
            assert res.method == expected.method
    assert model.calls == 1


def test_small_rows_serve_again():
    """And are the point's own: what is done to results does not reach them."""
    model, X, y = made()
    with at(model, CE, (X, y), method="coupled") as point:
        first = point(LowRankGGN())
        assert first.passes == R - 2 * 4 + C - 1  # the layer below the first BatchNorm needs no pass
        spectrum = point(LowRankGGN(top=3))
        diagonal = point(DiagGGNExact())
        assert (spectrum.passes, diagonal.passes, diagonal.method) == (0, 0, "coupled")
        want = {name: t.clone() for name, t in diagonal.diag_ggn_exact.items()}
        gradients = curvature(model, CE, (X, y), ComponentGrad()).grad_component
        for _ in range(3):
            diagonal, found = point(DiagGGNExact()).diag_ggn_exact, point(ComponentGrad()).grad_component
            assert_close(diagonal, want)
            assert_close(found, gradients)
            for t in (*found.values(), *diagonal.values()):
                t.zero_()


def test_directions_serve_again(nothing_small):
    """Only the columns' own passes are left to do: C, for another quantity or another source."""
    model, X, y = made()
    with at(model, CE, (X, y), method="coupled") as point:
        first, second, other = point(DiagGGNExact()), point(LowRankGGN(matrix_free=False)), point(ComponentGrad())
    assert (first.passes, second.passes, other.passes) == (R - 2 * 4 + C - 1, C - 1, 1)
    with at(model, CE, (X, y), method="dense") as point:
        assert [point(DiagGGNExact()).passes for _ in range(2)] == [N * (C - 1)] * 2


def test_mini_batches():
    model, X, y = made()
    data = list(zip(X.split(25), y.split(25), strict=True))
    want = curvature(model, CE, data, DiagGGNExact(), ComponentGrad())
    with at(model, CE, data) as point:
        for _ in range(2):
            res = point(DiagGGNExact(), ComponentGrad())
            assert_close(res.diag_ggn_exact, want.diag_ggn_exact)
            assert_close(res.grad_component, want.grad_component)
            assert res.samples.tolist() == list(range(N)) and res.batches == 3
    assert res.passes == 0


def test_random_draws():
    """Afresh at every call, repeatable by the seed before it."""
    model, X, y = made()
    torch.manual_seed(3)
    with at(model, CE, (X, y)) as point:
        first, second = (point(DiagGGNMC(4)).diag_ggn_mc["body.0.weight"] for _ in range(2))
        torch.manual_seed(3)
        again = point(DiagGGNMC(4)).diag_ggn_mc["body.0.weight"]
    assert torch.equal(first, again) and not torch.equal(first, second)


CHANGES = {
    "step": (lambda model, X: model.body[0].weight.data.mul_(1.1), "parameter 'body.0.weight' has changed"),
    "in place": (lambda model, X: model.body[3].weight.detach().add_(1), "parameter 'body.3.weight'"),
    "data": (lambda model, X: X.mul_(2), "the input has changed"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_stale(change):
    model, X, y = made()
    act, said = CHANGES[change]
    with at(model, CE, (X, y)) as point:
        before = point(DiagGGNExact()).diag_ggn_exact
        kept = copy.deepcopy(model.state_dict()), X.clone()
        act(model, X)
        with pytest.raises(RuntimeError, match=f"This point is stale: {said}.*Make another one with bncurv.at"):
            point(DiagGGNExact())
        model.body[0].weight.data.copy_(kept[0]["body.0.weight"])
        if change == "step":  # changed back, it is the point again
            assert_close(point(DiagGGNExact()).diag_ggn_exact, before)


def test_a_checkpoint_cannot_go_back():
    model, X, y = made()
    wrapped = nn.Sequential(model.body[:3], nn.Identity(), model.body[3:])
    wrapped[1].forward = lambda x: checkpoint(torch.tanh, x, use_reentrant=False)
    with at(wrapped, CE, (X, y)) as point:
        with pytest.raises(RuntimeError, match="This point cannot go back to its graph: .*use bncurv.curvature"):
            point(DiagGGNExact())


def test_freed():
    model, X, y = made()
    with at(model, CE, (X, y)) as point:
        point(DiagGGNExact(), LowRankGGN(top=2, matrix_free=True))
        graph = weakref.ref(point._recorded[0].trace)
        assert repr(point) == "Point(1 mini-batch(es) recorded)"
    gc.collect()
    assert graph() is None and repr(point) == "Point(closed)"
    with pytest.raises(RuntimeError, match="this point is closed, and its graph is gone: call it inside of 'with"):
        point(DiagGGNExact())


def test_an_error_leaves_the_point_usable():
    class Broken(DiagGGNExact):
        def add(self, state: Any, key: str, rows: Any) -> None:
            raise KeyboardInterrupt

    model, X, y = made()
    with at(model, CE, (X, y)) as point:
        with unchanged(model), pytest.raises(KeyboardInterrupt):
            point(Broken())
        with pytest.raises(ValueError, match="no quantity asked for"):
            point()
        assert_close(point(DiagGGNExact()).diag_ggn_exact, curvature(model, CE, (X, y), DiagGGNExact()).diag_ggn_exact)


def test_errors_at_the_start():
    model, X, y = made()
    with unchanged(model), pytest.raises(ValueError, match="X has NaN or inf"):
        bncurv.at(model, CE, (X / 0, y))
    with pytest.raises(ValueError, match="method='fast'"):
        bncurv.at(model, CE, (X, y), method="fast")


def test_another_default_device():
    model, X, y = made()
    want = curvature(model, CE, (X, y), DiagGGNExact()).diag_ggn_exact
    with torch.device("meta"), at(model, CE, (X, y)) as point:
        for _ in range(2):
            assert_close(point(DiagGGNExact(), LowRankGGN()).diag_ggn_exact, want)
