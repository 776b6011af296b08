"""Backward passes and their examination: what a network can make go wrong there."""

import warnings
from typing import Any

import kinds
import pytest
import torch
from cases import Net, float64
from test_exact import assert_close
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bncurv import ComponentGrad, DiagGGNExact, SlowPathWarning, curvature, reference
from bncurv.agreement import Sum, differences
from bncurv.certificate import leaks
from bncurv.linearity import Verdict, examine
from bncurv.passes import vjp


def test_cotangents_are_not_views():
    """The backward of ``as_strided_scatter`` reads a cotangent's storage from its beginning."""
    x = torch.randn(4, requires_grad=True)
    u = torch.randn(3, 4)
    pulled = [vjp([x.as_strided_scatter(x[:2] * 3, (2,), (2,), 0)], [x], [u], singly)[0] for singly in (False, True)]
    assert torch.allclose(*pulled)


def test_what_does_not_fit_is_not_tried_again():
    x, tries = torch.randn(4, requires_grad=True), []

    def full(g: Tensor) -> None:
        tries.append(1)
        raise torch.OutOfMemoryError

    y = x * 2
    y.register_hook(full)
    with pytest.raises(torch.OutOfMemoryError):
        vjp([y * 1], [x], [torch.ones(2, 4)])
    assert len(tries) == 1


@pytest.mark.parametrize("method", ["dense", "coupled"])
def test_bias_before_a_batch_norm_alone(method):
    """All of its rows are rounding: nothing is left to be compared."""
    with float64(0):
        model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
        X, y = torch.randn(5, 4), torch.randint(2, (5,))
        res = curvature(model, nn.CrossEntropyLoss(), (X, y), DiagGGNExact(), params=["0.bias"], method=method)
        assert float(res.diag_ggn_exact["0.bias"].abs().max()) < 1e-28


@pytest.mark.parametrize("method", ["dense", "coupled"])
def test_expert_that_gets_no_row_at_all(method):
    """The only recorded call has no output."""
    with float64(0):
        model = Net(lambda net, x: torch.cat([x, net.a(x[:0])]), a=nn.Linear(3, 3))
        X, y = torch.randn(5, 3), torch.randint(3, (5,))
        res = curvature(model, nn.CrossEntropyLoss(), (X, y), DiagGGNExact(), ComponentGrad(), method=method)
        assert not any(bool(t.any()) for t in [*res.diag_ggn_exact.values(), *res.grad_component.values()])
        assert res.grad_component["a.weight"].shape == (5, 3, 3)


@pytest.mark.filterwarnings("ignore::bncurv.SlowPathWarning")
@pytest.mark.parametrize("method", ["dense", "coupled", "auto"])
def test_batch_norm_with_a_computed_weight(method):
    """Its own affine map is no layer product; the statistics are cut all the same."""

    def forward(net: Any, x: Tensor) -> Tensor:
        h = nn.functional.batch_norm(net.a(x), None, None, net.scale.exp(), 2 * net.shift, training=True)
        return net.o(torch.tanh(h))

    with float64(0):
        parts = {name: nn.Parameter(torch.randn(5)) for name in ("scale", "shift")}
        model, loss_fn = Net(forward, a=nn.Linear(4, 5), o=nn.Linear(5, 3), **parts), nn.CrossEntropyLoss()
        X, y = torch.randn(7, 4), torch.randint(3, (7,))
        res = curvature(model, loss_fn, (X, y), DiagGGNExact(), ComponentGrad(), method=method)
        assert_close(res.diag_ggn_exact, reference.ggn_diagonal(model, loss_fn, X, y))
        assert_close(res.grad_component, reference.component_gradients(model, loss_fn, X, y))


def blind(x: Tensor) -> Tensor:
    x.register_hook(lambda g: 0 * g)
    return x


@pytest.mark.filterwarnings("ignore::bncurv.SlowPathWarning")
@pytest.mark.parametrize("method", ["dense", "coupled", "auto"])
def test_hook_that_the_sum_does_not_show(method):
    """Behind BatchNorm c a shift of its input is nothing, with b's hook or without: but not component by component."""
    with float64(0):
        parts = {"a": nn.Linear(4, 3, bias=False), "b": nn.BatchNorm1d(3), "l": nn.Linear(3, 3), "c": nn.BatchNorm1d(3)}
        model = Net(lambda net, x: net.o(torch.tanh(net.c(net.l(blind(net.b(net.a(x))))))), **parts, o=nn.Linear(3, 2))
        X, y, loss_fn = torch.randn(6, 4), torch.randn(6, 2), nn.MSELoss()
        for params in (["b.bias"], ["b.bias", "l.weight"], None):
            res = curvature(model, loss_fn, (X, y), ComponentGrad(), DiagGGNExact(), params=params, method=method)
            assert_close(res.grad_component, reference.component_gradients(model, loss_fn, X, y, params))
            assert_close(res.diag_ggn_exact, reference.ggn_diagonal(model, loss_fn, X, y, params))


@pytest.mark.parametrize("method", ["dense", "coupled"])
def test_wrong_batching_rule_that_few_rows_show(method):
    """Most columns of the loss get nothing back from these distances; the others are wrong in a batch."""

    def forward(net: Any, x: Tensor) -> Tensor:
        h = net.b(net.a(x))
        return net.o(torch.where(torch.arange(len(x))[:, None] == 5, -torch.cdist(h, 0.5 * torch.eye(3), p=1), h * 0))

    with float64(0):
        model = Net(forward, a=nn.Linear(4, 3), b=nn.BatchNorm1d(3), o=nn.Linear(3, 3))
        X, y, loss_fn = torch.randn(12, 4), torch.randint(3, (12,)), nn.CrossEntropyLoss()
        with pytest.warns(SlowPathWarning, match="go one by one"):
            res = curvature(model, loss_fn, (X, y), DiagGGNExact(), ComponentGrad(), method=method)
        assert_close(res.diag_ggn_exact, reference.ggn_diagonal(model, loss_fn, X, y))
        assert_close(res.grad_component, reference.component_gradients(model, loss_fn, X, y))


# ---------------------------------------------------------------------------- the examination itself
@pytest.mark.parametrize("rows,ordinary", [(None, 1.0), (1.0, None), (1.0, 0.5), (0.0, 1.0)])
def test_rows_that_an_ordinary_pass_does_not_give(rows, ordinary):
    """``None`` is zero: nothing comes back along that edge."""
    u = torch.randn(4, 3, dtype=torch.float64)
    given = None if rows is None else rows * u
    assert examine(lambda v: [None if ordinary is None else ordinary * v], u, [given]) is Verdict.OTHER_ROWS


def test_quiet_rows_do_not_hide_behind_loud_ones():
    """One row is wrong, and a millionth of the others."""
    u = torch.randn(6, 3, dtype=torch.float64)
    gain = torch.ones(6, 1, dtype=torch.float64)
    gain[4] = 1e-12
    rows = gain * u
    assert examine(lambda v: [v], u * gain, [rows]) is Verdict.RIGHT
    rows[4] *= 1 + 1e-3
    assert examine(lambda v: [v], u * gain, [rows]) is Verdict.OTHER_ROWS


def test_rows_that_vanish_do_not_drown_the_others():
    """What rounding leaves of one cotangent is no reason to blow it up."""
    d = torch.nn.functional.normalize(torch.randn(7, dtype=torch.float64), dim=0)
    projection, u = torch.eye(7, dtype=torch.float64) - torch.outer(d, d), torch.randn(4, 7, dtype=torch.float64)
    u[3] = d
    rows = u @ projection
    assert 0 < float(rows[3].abs().max()) < 1e-15
    assert examine(lambda v: [v @ projection], u, [rows]) is Verdict.RIGHT
    rows[1] *= 1 + 1e-3
    assert examine(lambda v: [v @ projection], u, [rows]) is Verdict.OTHER_ROWS


def test_rows_of_every_class_are_picked():
    u = torch.randn(48, 3, dtype=torch.float64)
    for classes in (2, 3):
        wrong = 1 + 1e-3 * (torch.arange(48) % classes == 1)[:, None]
        assert examine(lambda v: [v], u, [wrong * u]) is Verdict.OTHER_ROWS


def test_passes_that_are_not_linear():
    u = torch.randn(4, 3, dtype=torch.float64)
    assert examine(lambda v: [v.clamp(-0.1, 0.1)], u, [u]) is Verdict.NOT_LINEAR


def test_rows_are_picked_from_all():
    u = torch.randn(200, 3, dtype=torch.float64)
    wrong = 1 + 1e-3 * (torch.arange(200) > 100)[:, None]
    assert examine(lambda v: [v], u, [wrong * u]) is Verdict.OTHER_ROWS


@pytest.mark.parametrize(
    "samples,chunk,method,expected",
    [(4, None, "dense", 2), (4, None, "auto", 2), (60, None, "dense", 2), (60, 30, "dense", 3)],
)
def test_examination_takes_one_pass(samples, chunk, method, expected, monkeypatch):
    """Also where rows are nothing but rounding: those of a bias before a BatchNorm."""
    model, passes = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)), []
    own = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **kwargs: (passes.append(1), own(*args, **kwargs))[1])
    data = torch.randn(samples, 4), torch.randint(2, (samples,))
    curvature(model, nn.CrossEntropyLoss(), data, DiagGGNExact(), method=method, chunk_size=chunk)
    assert len(passes) == expected


def test_rows_that_vanish_wrongly():
    """However small the others are."""
    u = torch.randn(4, 3, dtype=torch.float64)
    rows = 1e-9 * u
    rows[2] = 0
    assert examine(lambda v: [1e-9 * v], u, [rows]) is Verdict.OTHER_ROWS


def test_rounding_is_none_of_an_examinations_business():
    """Two products in another order; and what is rounding beside another edge."""
    d = torch.nn.functional.normalize(torch.randn(7, dtype=torch.float64), dim=0)
    into, out = (
        torch.outer(torch.randn(7, dtype=torch.float64), d),
        torch.eye(7, dtype=torch.float64) - torch.outer(d, d),
    )
    u = torch.randn(4, 7, dtype=torch.float64)
    assert not torch.allclose(u @ into @ out, u @ (into @ out), rtol=0.1, atol=0)
    assert examine(lambda v: [v @ into @ out], u, [u @ (into @ out)]) is Verdict.RIGHT
    assert examine(lambda v: [v, 1e-16 * v.abs()], u, [u, 1e-16 * u.abs()]) is Verdict.RIGHT
    assert examine(lambda v: [v.abs()], u, [u.abs()]) is Verdict.OTHER_ROWS


# ---------------------------------------------------------------------------- the certificate itself
def test_coupling_of_samples_whose_last_digits_agree():
    """Sample n feels n - 32 only, which has the same last digit, and all are equally loud."""
    u = torch.ones(64, 3)
    couple = lambda v: [v + 0.5 * v.roll(32, 0)]  # noqa: E731
    assert leaks(couple, u, couple(u), 64)


@pytest.mark.parametrize("sizes", [(1.0, 2.0, 4.0), (4.0, 2.0, 1.0), (1.0, 0.5, 1.0)])
def test_coupling_of_samples_whose_loudness_makes_up_for_their_place(sizes):
    u = torch.tensor(sizes, dtype=torch.float64)[:, None]
    for shift in (1, 2):
        couple = lambda v, shift=shift: [v + 1e-3 * v.roll(shift, 0)]  # noqa: E731
        assert leaks(couple, u, couple(u), 3)


def test_coupling_below_the_rounding_of_a_loud_sample():
    """It is made as loud as the other one before it is looked for."""
    u = torch.tensor([[1e20], [1.0]], dtype=torch.float64)
    couple = lambda v: [v + torch.stack([v[1], 0 * v[1]])]  # noqa: E731
    assert torch.equal(couple(u)[0], u) and leaks(couple, u, couple(u), 2)
    beside = lambda v: [*couple(v), 0 * v]  # noqa: E731  an edge that nothing reaches
    assert leaks(beside, u, beside(u), 2)


def test_rounding_that_scaling_changes_is_no_coupling():
    u = torch.randn(4, 3, dtype=torch.float64)
    rounded = lambda v: [torch.where(v.abs() > 1, v * (1 + 2.0**-52), v)]  # noqa: E731
    assert not leaks(rounded, u, rounded(u), 4)


def test_batch_norm_that_cannot_be_cut_is_named():
    layers = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    model = Net(lambda net, x: net.o(checkpoint(net.layers, x, use_reentrant=False)), layers=layers, o=nn.Linear(3, 2))
    with pytest.raises(RuntimeError, match="'layers.1' is a BatchNorm inside torch.utils.checkpoint, where it cannot"):
        data = torch.randn(5, 4), torch.randint(2, (5,))
        curvature(model, nn.CrossEntropyLoss(), data, DiagGGNExact(), method="coupled")


def test_edge_that_no_scaled_cotangent_reaches():
    u = torch.randn(4, 3)
    assert leaks(lambda v: [None], u, [u], 4) and not leaks(lambda v: [2 * v], u, [2 * u], 4)


def test_pytorchs_hint_is_on_again():
    """It asks to report an operation that it cannot batch; silent during our passes only."""
    layer, X = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), torch.randn(5, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        curvature(nn.Sequential(layer), nn.MSELoss(), (X, torch.randn(5, 3)), DiagGGNExact(), method="dense")
    y, parameters = layer(X), list(layer.parameters())
    with pytest.warns(UserWarning, match="batching rule"):
        torch.vmap(lambda u: torch.autograd.grad(y, parameters, u, retain_graph=True))(torch.randn(2, 5, 3))


class WrongBesides(kinds.WrongInside):
    """Right for cotangents that have one entry each."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor) -> tuple[Tensor, Any]:
        return (2 if bool(((x != 0).flatten(1).sum(1) <= 1).all()) else 4) * x, in_dims[0]


def test_columns_of_every_quantity_are_examined():
    """Those of the Hessian's factor have one entry each, the gradient's have several."""
    act = kinds.function(WrongBesides.apply, lambda x: 2 * x)
    with float64(0):
        model, X, y = Net(lambda net, x: act(net.a(x)), a=nn.Linear(4, 3)), torch.randn(5, 4), torch.randn(5, 3)
        quantities = DiagGGNExact(), ComponentGrad()
        with pytest.warns(SlowPathWarning, match="differs from ordinary ones"):
            found = curvature(model, nn.MSELoss(), (X, y), *quantities, method="dense").grad_component
        expected = reference.component_gradients(model, nn.MSELoss(), X, y)
        assert all(torch.allclose(found[name], t) for name, t in expected.items())


# ---------------------------------------------------------------------------- the coupled way against an ordinary pass
def noisy(u: Tensor) -> dict[str, Tensor]:
    """A parameter of which an ordinary pass gives nothing but rounding, which a power of two does not change."""
    mantissa, exponent = torch.frexp(u)
    return {"p": torch.ldexp(1e-16 * torch.sin(1e6 * mantissa), exponent)}


def test_two_kinds_of_rounding_are_no_disagreement():
    """The coupled way's is larger, but nothing is there to be lost."""
    u, value = torch.randn(5, dtype=torch.float64), torch.full((5,), 1e-14, dtype=torch.float64)
    assert differences(noisy, u, {"p": Sum(value, terms=1.0)}, lambda name: 0.0)["p"].theirs
    assert differences(noisy, u, {"p": Sum(value, terms=1e-3)}, lambda name: 0.0)["p"][1:] == (False, False)
    found = differences(lambda u: {"p": 1e-9 * u}, u, {"p": Sum(1e-9 * u + value, terms=1.0)}, float)
    assert found["p"][1:] == (True, False)


@pytest.mark.parametrize("value, theirs", [(1e-14, True), (1e-13, False)])
def test_rounding_that_is_much_larger_than_an_ordinary_pass(value, theirs):
    u = torch.randn(5, dtype=torch.float64)
    sums = {"p": Sum(torch.full_like(u, value), terms=1e3)}
    assert differences(noisy, u, sums, lambda name: 0.0)["p"][1:] == (True, theirs)


def test_what_is_another_one_each_time_is_no_rounding():
    u = torch.randn(5, dtype=torch.float64)
    found = differences(lambda u: {"p": torch.rand_like(u) * u}, u, {"p": Sum(0.5 * u, terms=1e20)}, float)["p"]
    assert found[1:] == (False, False)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_no_agreement(value):
    sums = {"p": Sum(torch.full((3,), value), terms=value)}
    found = differences(lambda u: {"p": u}, torch.ones(3), sums, lambda name: float("inf"))["p"]
    assert found.size == float("inf") and not found.theirs


def test_what_an_ordinary_pass_does_not_give():
    found = differences(lambda u: {"p": 0 * u}, torch.ones(3), {"p": Sum(torch.ones(3), terms=1.0)}, lambda name: 0.0)
    assert found["p"].size == 1


def test_checks_of_the_coupled_way_take_few_passes(monkeypatch):
    """Also where rows are nothing but rounding."""
    passes, own = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **kwargs: (passes.append(1), own(*args, **kwargs))[1])
    with float64(0):
        layers = [nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 3), nn.BatchNorm1d(3)]
        model, data = nn.Sequential(*layers, nn.Linear(3, 3)), (torch.randn(20, 4), torch.randint(3, (20,)))
        res = curvature(model, nn.CrossEntropyLoss(), data, DiagGGNExact(), method="coupled")
    assert res.passes == 2 + 6  # columns; statistics of the upper BatchNorm, all at once each
    assert len(passes) == 2 + 4  # a row of the columns again, the certificate's probe and its scaled one, the sum


@pytest.mark.parametrize("hooked", ["c", "d"])
def test_parameters_below_a_tensor_hook_are_said(hooked):
    """And are all: neither what is above nor, below a hooked layer, what lies below its BatchNorm."""

    def forward(net: Any, x: Tensor) -> Tensor:
        for name in "abcd":
            x = getattr(net, name)(x)
            x = halved(x) if name == hooked else x
        return net.o(torch.tanh(x))

    with float64(0), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        parts = {"a": nn.Linear(4, 3), "b": nn.BatchNorm1d(3), "c": nn.Linear(3, 3), "d": nn.BatchNorm1d(3)}
        model, data = Net(forward, **parts, o=nn.Linear(3, 2)), (torch.randn(9, 4), torch.randint(2, (9,)))
        curvature(model, nn.CrossEntropyLoss(), data, DiagGGNExact(), method="coupled")
    many = "4 parameters of 2 Linear ('a.weight', ...), 4 parameters of 2 BatchNorm1d ('b.weight', ...)"
    below = {"c": "'c.weight', 'c.bias'", "d": many}[hooked]
    assert len(said) == 1 and f"No parameter product for {below}" in str(said[0].message)


def halved(x: Tensor) -> Tensor:
    x.register_hook(lambda g: 0.5 * g)
    return x
