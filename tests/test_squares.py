"""Σ V² from factors: against explicit rows, also where the terms cancel, and in networks against the dense oracle."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import Case, Net, case, labelled, mlp, tokens
from test_exact import assert_close
from torch import Tensor, nn

import bncurv.squares
from bncurv import ComponentDiagGGNExact, DiagGGNExact, SumComponentGradSquared, curvature, reference
from bncurv.budget import Budget
from bncurv.costs import Costs
from bncurv.directions import Correction
from bncurv.products import Products
from bncurv.squares import sum_squares

Factors = tuple[Tensor, Tensor, Correction]
N, C, O, I = 6, 3, 4, 5  # noqa: E741
TIGHT = {torch.float64: 1e-12, torch.float32: 1e-5}


# ------------------------------------------------------------------------------------- by itself


def in_dtype(factors: Factors, dtype: torch.dtype) -> Factors:
    left, right, c = factors
    A, P = (None if t is None else t.to(dtype) for t in (c.A, c.P))
    return left.to(dtype), right.to(dtype), Correction(A, P, tuple((a.to(dtype), p.to(dtype)) for a, p in c.direct))


def row_form(left: Tensor, right: Tensor, correction: Correction) -> Tensor:
    """Every row of V written out, then squared and summed."""
    rows = torch.einsum("cnos,nsi->ncoi", left, right)
    if correction.A is not None:
        rows = rows + torch.einsum("ncq,qoi->ncoi", correction.A, correction.P.view(-1, O, right.shape[2]))
    for a, p in correction.direct:
        rows = rows + torch.einsum("ncmo,moi->ncoi", a, p.view(-1, O, right.shape[2]))
    return rows.square().sum((0, 1))


def errors(got: Tensor, factors: Factors) -> Tensor:
    """Relative error of every entry."""
    want = row_form(*in_dtype(factors, torch.float64))
    return (got - want).abs() / want


def drawn(directions: int | None, moments: tuple[int, ...], tail: tuple[int, ...] = (), positions: int = 1) -> Factors:
    """Normal factors; ``tail`` are further axes of the parameter."""
    A, P = (None, None) if directions is None else (torch.randn(N, C, directions), torch.randn(directions, O, I, *tail))
    direct = tuple((torch.randn(N, C, m, O), torch.randn(m, O, I, *tail)) for m in moments)
    return torch.randn(C, N, O, positions), torch.randn(N, positions, I), Correction(A, P, direct)


@pytest.mark.parametrize("dtype", TIGHT)
@pytest.mark.parametrize("directions", [None, 0, 1, 7])
@pytest.mark.parametrize("moments", [(), (0,), (1,), (2,), (2, 2)])
@pytest.mark.parametrize("positions", [1, 3])
def test_random_factors(positions, directions, moments, dtype):
    factors = in_dtype(drawn(directions, moments, positions=positions), dtype)
    got = sum_squares(*factors)
    assert got.dtype == dtype and float(errors(got, factors).max()) < TIGHT[dtype]


def test_rows_without_their_correction_in_parts(float64, monkeypatch):
    factors, slices = drawn(7, (2,), positions=3), []
    chunks = bncurv.squares.chunks
    monkeypatch.setattr("bncurv.squares.chunks", lambda *a: slices.append(list(chunks(*a))) or chunks(*a))
    budget = Budget(row=2 * 8 * C * O * I)
    assert float(errors(sum_squares(*factors, budget), factors).max()) < 1e-12
    assert [s.stop - s.start for s in slices[0]] == [2] * (N // 2)


@pytest.mark.parametrize("moments", [(), (1,), (2,)])
@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_chunks_of_directions(at_once, moments, monkeypatch, float64):
    factors = drawn(7, moments)
    budget = Budget(block=at_once * O * max(N, I) * 8)
    slices = []
    chunks = bncurv.squares.chunks
    monkeypatch.setattr("bncurv.squares.chunks", lambda *a: slices.append(list(chunks(*a))) or chunks(*a))
    assert float(errors(sum_squares(*factors, budget), factors).max()) < 1e-12
    assert [len(s) for s in slices] == [-(-7 // at_once)]


def test_kernel_axes_and_arguments_left_alone(float64):
    """A convolution's directions have more axes; nothing is written into the factors."""
    left, right, c = drawn(7, (2,), (1, 1))
    given = [left, right, c.A, c.P, *c.direct[0]]
    before = [t.clone() for t in given]
    assert float(errors(sum_squares(left, right, c), (left, right, c)).max()) < 1e-12
    assert all(torch.equal(t, b) for t, b in zip(given, before, strict=True))


def constant_features(kind: str, noise: Tensor) -> Factors:
    left, right, correction = _constant(kind, noise)
    return left[..., None], right[:, None], correction


def _constant(kind: str, noise: Tensor) -> Factors:
    """Features constant + noise and a correction that takes their mean off: Σ V² is noise² of its terms.

    The mean sits in single directions, in one direct moment, or half in each; or twice and cancels itself, in
    "opposite" directions or in two direct "moments".
    """
    left, right = torch.randn(C, N, O), 1 + torch.rand(len(noise)) + noise * torch.randn(N, len(noise))
    mean, a = right.mean(0).repeat(1, O, 1), -left.permute(1, 0, 2)  # [1, o, i], [n, c, o]
    single = torch.eye(O)[:, :, None] * mean  # [q, o, i]
    if kind == "directions":
        return left, right, Correction(a, single)
    if kind == "direct":
        return left, right, Correction(direct=((a[:, :, None], mean),))
    if kind == "both":
        return left, right, Correction(a, 0.5 * single, ((a[:, :, None], 0.5 * mean),))
    left, right = noise.max() * left, right - mean[0, :1]  # the own part is small itself
    opposite = -a * (1 + noise.max() * torch.randn(a.shape))
    if kind == "opposite":
        return left, right, Correction(torch.cat([a, opposite], 2), single.repeat(2, 1, 1))
    return left, right, Correction(direct=((torch.stack([a, opposite], 2), mean.repeat(2, 1, 1)),))


KINDS = ["directions", "direct", "both"]


@pytest.mark.parametrize("dtype", TIGHT)
@pytest.mark.parametrize("kind", [*KINDS, "opposite", "moments"])
def test_cancellation(kind, dtype, monkeypatch, float64):
    """The sum is 1e-8 of its terms: as accurate as the rows, which it is not without `_entries`."""
    factors = in_dtype(constant_features(kind, torch.full((3,), 1e-4)), dtype)
    by_rows = float(errors(row_form(*factors), factors).max())
    got = float(errors(sum_squares(*factors), factors).max())
    assert got <= 3 * by_rows + TIGHT[dtype]
    monkeypatch.setattr("bncurv.squares.KEPT", dict.fromkeys(TIGHT, 0.0))
    rounding = 1e4 * torch.finfo(dtype).eps  # of the rows, relative; that of the sum is its square
    assert float(errors(sum_squares(*factors), factors).max()) > 100 * max(got, rounding)


@pytest.mark.parametrize("dtype", TIGHT)
@pytest.mark.parametrize("kind", KINDS)
def test_any_degree_of_cancellation(kind, dtype, float64):
    """Entries that have lost little beside entries that have lost everything, on both sides of the threshold."""
    factors = in_dtype(constant_features(kind, torch.logspace(0, -5, 60)), dtype)
    by_rows = errors(row_form(*factors), factors).amax(0)
    got = errors(sum_squares(*factors), factors).amax(0)
    kept = torch.finfo(dtype).eps / bncurv.squares.KEPT[dtype]
    assert bool((got <= 3 * by_rows + 5 * kept).all())


@pytest.mark.parametrize("dtype", TIGHT)
@pytest.mark.parametrize("kind", KINDS)
def test_never_negative(kind, dtype, monkeypatch, float64):
    """Nothing is left but rounding."""
    factors = in_dtype(constant_features(kind, torch.zeros(100)), dtype)
    assert bool((sum_squares(*factors) >= 0).all())
    monkeypatch.setattr("bncurv.squares.KEPT", dict.fromkeys(TIGHT, -1.0))
    assert bool((sum_squares(*factors) < 0).any())


@pytest.mark.parametrize("at_once", [1, 7])
def test_entries_are_recomputed_in_parts(at_once, monkeypatch, float64):
    factors = constant_features("both", torch.logspace(-3, -1, 20))
    whole = sum_squares(*factors)
    budget = Budget(row=at_once * N * C)  # of 8 bytes, 8 times
    sizes, entries = [], bncurv.squares._entries
    monkeypatch.setattr("bncurv.squares._entries", lambda *a: sizes.append(len(a[-1])) or entries(*a))
    assert torch.allclose(sum_squares(*factors, budget), whole, rtol=1e-12)
    assert len(sizes) > 1 and max(sizes) == at_once


# ---------------------------------------------------------------------------------- in a network


def relu_first(*widths: int) -> nn.Sequential:
    """Linear-ReLU-BN for every hidden width: no layer's output goes into a BatchNorm directly."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in zip(widths[:-2], widths[1:-1], strict=True):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU(), nn.BatchNorm1d(fan_out)]
    return nn.Sequential(*layers, nn.Linear(*widths[-2:]))


def one_pixel(conv: nn.Module, bn: nn.Module) -> nn.Module:
    """The layer in front of a BN, behind it one more and a Linear; maps have one pixel behind the first layer."""
    width = bn.num_features
    return nn.Sequential(conv, bn, nn.Tanh(), type(conv)(width, 4, 1), nn.Tanh(), nn.Flatten(), nn.Linear(4, 3))


def conv_map(width: int) -> nn.Module:
    """Several positions, strides and padding."""
    first, second = nn.Conv2d(2, width, 3, padding=1), nn.Conv2d(width, 3, 3, stride=2, padding=1)
    return nn.Sequential(first, nn.BatchNorm2d(width), nn.Tanh(), second, nn.Tanh(), nn.Flatten(), nn.Linear(12, 3))


def steps() -> nn.Module:
    """A linear layer at several steps of a sample."""
    return Net(
        lambda net, x: net.out(net.bn(net.first(x).transpose(1, 2)).tanh().mean(2)),
        first=nn.Linear(4, 5),
        bn=nn.BatchNorm1d(5),
        out=nn.Linear(5, 3),
    )


def twice() -> nn.Module:
    return Net(
        lambda net, x: net.out(net.bn(net.shared(net.shared(x).tanh())).tanh()),
        shared=nn.Linear(4, 4),
        bn=nn.BatchNorm1d(4),
        out=nn.Linear(4, 3),
    )


def words() -> nn.Module:
    """One token per sample: the embedding's rows are outer products too, but with another order of axes."""
    return Net(
        lambda net, x: net.out(net.bn(net.first(net.embedding(x[:, 0]))).tanh()),
        embedding=nn.Embedding(6, 4),
        first=nn.Linear(4, 5),
        bn=nn.BatchNorm1d(5),
        out=nn.Linear(5, 3),
    )


def one_step() -> nn.Module:
    return Net(
        lambda net, x: net.out(net.bn(net.first(x).transpose(1, 2)).flatten(1)),
        first=nn.Linear(4, 5),
        bn=nn.BatchNorm1d(5),
        out=nn.Linear(5, 3),
    )


def flat_steps() -> nn.Module:
    return Net(
        lambda net, x: net.out(net.bn(net.first(x.flatten(0, 1))).tanh().unflatten(0, x.shape[:2]).mean(1)),
        first=nn.Linear(4, 5),
        bn=nn.BatchNorm1d(5),
        out=nn.Linear(5, 3),
    )


def skipped() -> nn.Module:
    """The first layer's output goes around its BN as well: both moments are direct."""

    def forward(net: Any, x: Tensor) -> Tensor:
        z = net.first(x)
        return net.out(net.bn(z).tanh() + z)

    return Net(forward, first=nn.Linear(4, 5), bn=nn.BatchNorm1d(5), out=nn.Linear(5, 3))


def two_norms() -> nn.Module:
    """Two BNs take up the same output."""

    def forward(net: Any, x: Tensor) -> Tensor:
        z = net.first(x)
        return net.out(net.a(z).tanh() * net.b(z).relu())

    return Net(forward, first=nn.Linear(4, 5), a=nn.BatchNorm1d(5), b=nn.BatchNorm1d(5), out=nn.Linear(5, 3))


VECTORS = labelled(7, 4)
ALL = {"0.weight", "3.weight", "6.weight"}
FACTORED: dict[Case, set[str]] = {
    case("mlp", lambda: mlp(4, 6, 5, 3), VECTORS): ALL,
    case("relu_first", lambda: relu_first(4, 6, 5, 3), VECTORS): ALL,
    case("pair", lambda: mlp(4, 6, 5, 3), labelled(2, 4)): ALL,
    case("pair_relu_first", lambda: relu_first(4, 6, 3), labelled(2, 4)): {"0.weight", "3.weight"},
    case("width_one", lambda: mlp(4, 1, 3), VECTORS): {"0.weight", "1.weight", "3.weight"},
    case("no_bn", lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), VECTORS): {
        "0.weight",
        "2.weight",
    },
    case("conv_1x1", lambda: one_pixel(nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5)), labelled(6, 4, 1, 1)): ALL,
    case("conv_whole_map", lambda: one_pixel(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5)), labelled(6, 2, 3, 3)): ALL,
    case("conv1d_whole_map", lambda: one_pixel(nn.Conv1d(2, 5, 3), nn.BatchNorm1d(5)), labelled(6, 2, 3)): ALL,
    case("conv_grouped", lambda: one_pixel(nn.Conv2d(4, 6, 1, groups=2), nn.BatchNorm2d(6)), labelled(6, 4, 1, 1)): {
        "3.weight",
        "6.weight",
    },
    case("conv_transpose", lambda: one_pixel(nn.ConvTranspose2d(4, 5, 1), nn.BatchNorm2d(5)), labelled(6, 4, 1, 1)): {
        "6.weight"
    },
    case("shared", twice, VECTORS): {"out.weight"},
    case("conv_positions", lambda: conv_map(4), labelled(6, 2, 4, 4)): {"0.weight", "3.weight", "6.weight"},
    case("steps", steps, labelled(6, 3, 4)): {"first.weight", "out.weight"},
    case("embedding", words, tokens(7, 1)): {"first.weight", "out.weight"},
    case("one_step", one_step, labelled(6, 1, 4)): {"first.weight", "out.weight"},
    case("flat_steps", flat_steps, labelled(5, 3, 4)): {"out.weight"},
    case("skipped", skipped, VECTORS): {"first.weight", "out.weight"},
    case("two_norms", two_norms, VECTORS): {"first.weight", "out.weight"},
}
MLP = next(iter(FACTORED))


@pytest.fixture
def factored(monkeypatch) -> Iterator[set[str]]:
    """Factors wherever they can be used, whatever they cost; the parameters for which they were."""
    names: set[str] = set()
    own = Products.sum_squares
    monkeypatch.setattr(Products, "sum_squares", lambda self, name, *a: names.add(name) or own(self, name, *a))
    monkeypatch.setattr(Costs, "factored", lambda self, name, columns: self._products.factors(name))
    yield names


def squares(model, loss_fn, X, y, **options):
    """Both quantities that need no more than squares."""
    res = curvature(model, loss_fn, (X, y), DiagGGNExact(), SumComponentGradSquared(), method="coupled", **options)
    assert all(bool((t >= 0).all()) for r in (res.diag_ggn_exact, res.sum_grad_squared) for t in r.values())
    return res.diag_ggn_exact, res.sum_grad_squared


def oracle(model, loss_fn, X, y):
    components = reference.component_gradients(model, loss_fn, X, y)
    return reference.ggn_diagonal(model, loss_fn, X, y), {n: t.square().sum(0) for n, t in components.items()}


@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize("one", FACTORED, ids=str)
def test_networks(one, chunk_size, factored):
    found = squares(*one.build(), chunk_size=chunk_size)
    assert factored == FACTORED[one]
    for got, want in zip(found, oracle(*one.build()), strict=True):  # two samples: BN's outputs are ±1, V almost zero
        assert_close(got, want, 1e-9 if "pair" in one.name else 1e-10)


def single(one: Case) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    model, loss_fn, X, y = one.build()
    return model.float(), loss_fn, X.float() if X.is_floating_point() else X, y


def assert_as_good_as_rows(one, monkeypatch):
    """Float32: what the rows lose to the rounding of the forward pass may be lost, but no more."""
    found = squares(*single(one))
    monkeypatch.setattr(Costs, "factored", lambda *a: False)
    rows = squares(*single(one))
    for got, by_rows, want in zip(found, rows, oracle(*single(one)), strict=True):
        for name, expected in want.items():
            error, lost = (got[name] - expected).abs().amax(0), (by_rows[name] - expected).abs().amax(0)
            assert bool((error <= 3 * lost + 1e-4 * expected.amax(0)).all()), name


@pytest.mark.parametrize("one", FACTORED, ids=str)
def test_networks_in_float32(one, factored, monkeypatch):
    assert_as_good_as_rows(one, monkeypatch)
    assert factored == FACTORED[one]


def near_constant():
    """One input feature 1e3 with a little noise."""
    X, y = labelled(8, 4)()
    X[:, 0] = 1e3 + 0.1 * X[:, 0]
    return X, y


CONSTANT = [
    case("relu_first", lambda: relu_first(4, 6, 3), near_constant),
    case("relu_first_deep", lambda: relu_first(4, 6, 5, 3), near_constant),
    case("bn_first", lambda: mlp(4, 6, 3), near_constant),
    case("bn_first_deep", lambda: mlp(4, 6, 5, 3), near_constant),
]


@pytest.mark.parametrize("one", CONSTANT, ids=str)
def test_near_constant_feature(one, factored, monkeypatch):
    for got, want in zip(squares(*one.build()), oracle(*one.build()), strict=True):
        assert_close(got, want)
        # by the feature: the constant one has the smallest entries, V² is 1e-8 of its terms
        assert_close({"0": got["0.weight"][:, 0]}, {"0": want["0.weight"][:, 0]}, 1e-9)
    assert_as_good_as_rows(one, monkeypatch)
    assert "0.weight" in factored


def test_near_constant_feature_needs_the_rows(factored, monkeypatch):
    """The check above would notice a sum that has lost its digits."""
    monkeypatch.setattr("bncurv.squares.KEPT", dict.fromkeys(TIGHT, -1.0))
    with pytest.raises(AssertionError):
        found = [t["0.weight"] for t in squares(*single(CONSTANT[0]))]
        for got, want in zip(found, oracle(*single(CONSTANT[0])), strict=True):
            assert bool(((got - want["0.weight"]).norm(dim=0) <= 1e-2 * want["0.weight"].norm(dim=0)).all())


def test_some_parameters_only(factored):
    names = ["3.weight", "6.bias"]
    for got, want in zip(squares(*MLP.build(), params=names), oracle(*MLP.build()), strict=True):
        assert_close(got, {n: want[n] for n in names})
    assert factored == {"3.weight"}


def test_with_truncated_directions(factored):
    """The leading directions enter as one pair of factors."""
    for got, want in zip(squares(*MLP.build(), tol=1e-7), oracle(*MLP.build()), strict=True):
        assert_close(got, want, 1e-5)
    assert factored == FACTORED[MLP]


def test_who_needs_rows_gets_rows(factored):
    """Squares alone do for one quantity, not for the other, and both share the columns."""
    model, loss_fn, X, y = MLP.build()
    res = curvature(model, loss_fn, (X, y), DiagGGNExact(), ComponentDiagGGNExact(), method="coupled")
    assert not factored
    assert_close(res.diag_ggn_exact, reference.ggn_diagonal(model, loss_fn, X, y))


@pytest.mark.parametrize(("samples", "width", "cheaper"), [(3, 32, False), (64, 5, True)])
def test_taken_where_it_is_cheaper(samples, width, cheaper, monkeypatch):
    """By the cost model itself: rows for few samples under many statistics, factors for many under few."""
    used, own = set(), Products.sum_squares
    monkeypatch.setattr(Products, "sum_squares", lambda self, name, *a: used.add(name) or own(self, name, *a))
    model, loss_fn, X, y = case("mlp", lambda: mlp(4, 6, width, 3), labelled(samples, 4)).build()
    res = curvature(model, loss_fn, (X, y), DiagGGNExact(), method="coupled")
    assert ("0.weight" in used) == cheaper
    assert_close(res.diag_ggn_exact, reference.ggn_diagonal(model, loss_fn, X, y))
