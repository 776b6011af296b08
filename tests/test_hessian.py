"""Hessian factors by autograd: their structure, what they cost, what is refused or said."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from backpack import backpack
from cases import case, labelled, mlp
from loss_zoo import Penalised
from test_exact import assert_close
from test_losses import assert_factor, assert_gradient, hessian
from torch import Tensor, nn
from torch.nn import functional as F

import bncurv
from bncurv import DiagGGNExact, LowRankGGN, curvature, extend, reference
from bncurv import hessian as by_autograd
from bncurv.loss_at_batch import LossAtBatch
from bncurv.probes import pattern

N, C = 6, 4
ONE = case("", lambda: mlp(4, 5, C), labelled(N, 4, C=C), Penalised)


def outputs(*shape: int) -> Tensor:
    return torch.randn(shape or (N, C), generator=torch.Generator().manual_seed(0)).double()


def classes(*shape: int) -> Tensor:
    return torch.randint(C, shape or (N,), generator=torch.Generator().manual_seed(1))


def own_ce(o: Tensor, y: Tensor) -> Tensor:
    return 0.3 * F.cross_entropy(o, y)


def classes_last(o: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(o.flatten(0, 1), y.flatten())


def soft_plus(o: Tensor, y: Tensor) -> Tensor:
    return F.softplus(o).sum(1).mean() - (o * 0.1).sum()


def rows(o: Tensor, y: Tensor) -> Tensor:
    return (o.flatten(1).logsumexp(1)).sum()


# ----------------------------------------------------------------------------------- structure


@pytest.mark.parametrize(
    ("loss_fn", "output", "target", "blocks", "last"),
    [
        (soft_plus, outputs(), classes(), (N, C, 1, 1), False),
        (own_ce, outputs(), classes(), (N, 1, C, C - 1), False),
        (own_ce, outputs(N, C, 2, 3), classes(N, 2, 3), (N, 6, C, C - 1), False),
        (classes_last, outputs(N, 3, C), classes(N, 3), (N, 3, C, C - 1), True),
        (classes_last, outputs(N, C, C), classes(N, C), (N, C, C, C - 1), True),
        (rows, outputs(N, 2, 3), classes(), (N, 1, 6, 5), False),
        (lambda o, y: (o.sum(1) ** 2).sum(), outputs(), classes(), (N, 1, C, 1), False),
        (own_ce, outputs(1, C), classes(1), (1, 1, C, C - 1), False),
    ],
)  # fmt: skip
def test_structure(loss_fn: Callable, output: Tensor, target: Tensor, blocks: tuple[int, ...], last: bool) -> None:
    """The finest partition of the output, and as many columns as the largest rank."""
    at_batch = LossAtBatch(loss_fn, output, target)
    factor = at_batch.factor
    assert tuple(factor.blocks.shape) == blocks and factor.last == last
    assert_factor(loss_fn, output, target)
    assert_gradient(loss_fn, output, target)
    u = torch.randn_like(output)
    want = reference.loss_hessian(loss_fn, output, target) @ u.flatten()
    torch.testing.assert_close(factor.hessian_product(u).flatten(), want, rtol=1e-10, atol=1e-14)
    S = factor.columns(slice(None))
    torch.testing.assert_close((S * u).flatten(2).sum(2).T, factor.coefficients(u))
    weights = pattern((*factor.blocks.shape[:2], factor.blocks.shape[3]), u).flatten(1)
    torch.testing.assert_close(factor.mixture(), factor.combination(weights))
    if loss_fn in (own_ce, classes_last):  # the gradient lies in the range of S
        torch.testing.assert_close(factor.combination(at_batch.weights), at_batch.gradient)


@pytest.mark.parametrize("method", ["coupled", "dense"])
def test_no_more_passes_than_the_closed_form(method: str) -> None:
    model, loss_fn, X, y = ONE.build()
    known = nn.CrossEntropyLoss(weight=loss_fn.inner.weight, label_smoothing=0.1)
    got, want = (
        curvature(model, f, (X, y), DiagGGNExact(), LowRankGGN(), method=method) for f in (loss_fn, known)
    )  # fmt: skip
    assert got.passes == want.passes
    assert_close(got.diag_ggn_exact, {n: 0.3 * t for n, t in want.diag_ggn_exact.items()})
    torch.testing.assert_close(got.ggn.eigenvalues, 0.3 * want.ggn.eigenvalues, rtol=1e-9, atol=1e-12)
    step = [res.ggn.newton_step(damping=1e-3 * f)["0.weight"] for res, f in ((got, 0.3), (want, 1.0))]
    torch.testing.assert_close(*step, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2}, {"ignore_index": 1}, {"reduction": "sum"}], ids=str)
def test_functions_of_the_table_are_their_modules(options: dict[str, Any]) -> None:
    at_batch = LossAtBatch(partial(F.cross_entropy, **options), outputs(), classes())
    assert at_batch.plain and at_batch.name == "cross_entropy"
    want = LossAtBatch(nn.CrossEntropyLoss(**options), outputs(), classes()).factor.blocks
    assert torch.equal(at_batch.factor.blocks, want)


@pytest.mark.parametrize("function", [partial(F.mse_loss, reduction="none"), partial(F.cross_entropy, reduce=True)])
def test_other_options_are_no_module(function: Callable) -> None:
    assert by_autograd and bncurv.loss_calls.as_module(function) is function


# ------------------------------------------------------------------------------- what acts on it


def test_float32_is_that_of_float64() -> None:
    """Also of options inside a partial or a module; a closure keeps its own dtype."""
    w = torch.linspace(0.5, 2, C)
    closure: Callable = lambda o, y: F.cross_entropy(2 * o, y, weight=w)  # noqa: E731
    for loss_fn in (Penalised(), partial(lambda o, y, w: F.cross_entropy(2 * o, y, w), w=w), closure):
        wide = LossAtBatch(loss_fn, outputs().float(), classes())._hessian().output.dtype
        assert wide == (torch.float32 if loss_fn is closure else torch.float64)
        got = hessian(loss_fn, outputs().float(), classes()).double()
        H = torch.autograd.functional.hessian(lambda o, f=loss_fn: f(o, classes()), outputs().float())
        want = torch.einsum("nanb->nab", H)
        torch.testing.assert_close(got, want.double(), rtol=1e-4, atol=1e-6)


def test_gesture() -> None:
    model, loss_fn, X, y = ONE.build()
    extend(model), extend(loss_fn)
    ggn = LowRankGGN()
    with backpack(DiagGGNExact(), ggn):
        (2 * loss_fn(model(X), y)).backward()
    want = reference.ggn_diagonal(*ONE.build())
    assert_close({n: p.diag_ggn_exact for n, p in model.named_parameters()}, {n: 2 * t for n, t in want.items()})


@pytest.mark.parametrize("kind", ["rademacher", "labels"])
def test_draws_have_the_hessian_as_covariance(kind: str) -> None:
    o, y = outputs(2, 3, C), classes(2, 3)
    draws = LossAtBatch(classes_last, o, y).sample(20000, kind, torch.Generator().manual_seed(0))
    S = draws.columns(slice(None)).flatten(1)
    want = reference.loss_hessian(classes_last, o, y)
    mixed = torch.block_diag(*torch.ones(2, 3 * C, 3 * C)) > 0  # columns of different samples add to no covariance
    got = (S.T @ S / len(S))[mixed]
    assert (got - want[mixed]).abs().max() < 0.03 * want.abs().max()


def test_mini_batches() -> None:
    """Without coupling what one batch gives."""
    model, X, y = nn.Linear(4, C).double(), outputs(N, 4), classes()
    want = curvature(model, own_ce, (X, y), DiagGGNExact(), LowRankGGN())
    got = curvature(model, own_ce, [(X[:4], y[:4]), (X[4:], y[4:])], DiagGGNExact(), LowRankGGN())
    assert_close(got.diag_ggn_exact, want.diag_ggn_exact)
    torch.testing.assert_close(got.ggn.eigenvalues[:3], want.ggn.eigenvalues[:3])


def test_masked_targets_of_any_dtype() -> None:
    """The target arrives as it is."""
    mask = outputs() > 0
    assert_factor(lambda o, y: o[y].square().sum(), outputs(), mask)


def test_penalties_past_the_output_are_said() -> None:
    model, _, X, y = ONE.build()
    penalty: Callable = lambda o, y: own_ce(o, y) + model[0].weight.square().sum()  # noqa: E731
    with pytest.warns(UserWarning, match="depends on the parameter.*'0.weight' past the model's output.*not in it"):
        got = curvature(model, penalty, (X, y), DiagGGNExact()).diag_ggn_exact
    assert_close(got, reference.ggn_diagonal(model, own_ce, X, y))
    with pytest.raises(ValueError, match="depends on the parameter '0.weight' past"):
        curvature(model, penalty, (X, y), LowRankGGN())


# ---------------------------------------------------------------------------------- what is refused


def test_large_blocks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    says = "rows: its Hessian couples 6 output entries of a sample.*up to 5 entries.*register_loss"
    monkeypatch.setattr(by_autograd, "LARGEST_BLOCK", 5)
    with pytest.raises(ValueError, match=says):
        _ = LossAtBatch(rows, outputs(N, 6), classes()).factor
    _ = LossAtBatch(soft_plus, outputs(N, 6), classes()).factor
    monkeypatch.setattr(by_autograd, "BLOCK_BYTES", N * 16 * 8 - 1)
    with pytest.raises(ValueError, match="couples 4 output entries.* GiB for 6 samples"):
        _ = LossAtBatch(own_ce, outputs(), classes()).factor


def test_random_losses_are_refused() -> None:
    noisy: Callable = lambda o, y: own_ce(F.dropout(o, 0.5), y)  # noqa: E731
    with pytest.raises(ValueError, match="<lambda>.*draws random numbers"):
        _ = LossAtBatch(noisy, outputs(), classes()).factor
    with pytest.raises(ValueError, match="<lambda>: its gradient in float64 is another one than in torch.float32"):
        _ = LossAtBatch(noisy, outputs().float(), classes()).factor
    w = torch.ones(C)
    narrow: Callable = lambda o, y: F.cross_entropy(F.dropout(o, 0.5), y, w)  # noqa: E731
    with pytest.raises(ValueError, match="<lambda> gives another gradient when it is called again: it draws random"):
        _ = LossAtBatch(narrow, outputs().float(), classes()).factor


def test_a_loss_may_change_the_output_in_place() -> None:
    got = LossAtBatch(lambda o, y: F.cross_entropy(o.mul_(2), y), outputs(), classes()).factor.blocks
    assert torch.equal(got, LossAtBatch(lambda o, y: F.cross_entropy(o * 2, y), outputs(), classes()).factor.blocks)


def test_half_precision_inside_is_refused() -> None:
    with pytest.raises(TypeError, match="<lambda> computes in torch.bfloat16 inside.*take the cast out"):
        _ = LossAtBatch(lambda o, y: F.cross_entropy(o.bfloat16(), y), outputs(), classes()).factor


class Blind(torch.autograd.Function):
    """o² / 2, whose backward hides from autograd that it depends on o."""

    @staticmethod
    def forward(ctx: Any, o: Tensor) -> Tensor:
        ctx.o = o.detach()
        return o.square() / 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.o


class Seeing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, o: Tensor) -> Tensor:
        ctx.save_for_backward(o)
        return o.square() / 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0]


def test_custom_functions_are_held_against_differences() -> None:
    assert_factor(lambda o, y: Seeing.apply(o).mean(), outputs(), classes())
    with pytest.raises(ValueError, match="autograd's second derivative is not that.*custom autograd Function Blind"):
        _ = LossAtBatch(lambda o, y: Blind.apply(o).mean(), outputs(), classes()).factor


class Hinge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, o: Tensor) -> Tensor:
        ctx.save_for_backward(o)
        return o.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * (ctx.saved_tensors[0] > 0)


def test_differences_across_a_kink_tell_nothing() -> None:
    o = outputs()
    o[0] = 0
    assert_factor(lambda o, y: (Hinge.apply(o) + o.square()).mean(), o, classes())


def test_infinite_curvature_is_refused() -> None:
    z = outputs().abs()
    z[0, 0] = 0
    with pytest.raises(ValueError, match="its (Hessian|gradient) is not finite"):
        _ = LossAtBatch(lambda o, y: (o**1.5).sum(), z, classes()).factor


def test_slightly_concave_is_refused_and_rounding_is_not() -> None:
    """A negative eigenvalue of 1e-6 of the largest, at one sample; a singular block."""
    slightly: Callable = lambda o, y: (  # noqa: E731
        (o[:, 0] + o[:, 1]) ** 2 - 1e-6 * (y == 2) * (o[:, 0] - o[:, 1]) ** 2
    ).sum()
    y = torch.tensor([0, 1, 0, 2, 1, 2])
    with pytest.raises(ValueError, match=r"not convex in the model's output at sample 3: .*eigenvalue -4e-06 .*is 4\)"):
        _ = LossAtBatch(slightly, outputs(), y).factor
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_factor(lambda o, y: ((o @ torch.full((C, C), 1 / 3).double()) ** 2).sum(), outputs(), y)


# ------------------------------------------------------------------------------------ lost digits


@pytest.mark.parametrize("size", [15.0, 30.0, 60.0])
def test_saturated_outputs_are_said(size: float) -> None:
    """The closed form keeps its digits there."""
    o, y = size * F.one_hot(classes(), C).double(), classes()
    with pytest.warns(UserWarning, match="own_ce: PyTorch's second derivative has lost digits.*CrossEntropyLoss"):
        _ = LossAtBatch(own_ce, o, y).factor
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _ = LossAtBatch(F.cross_entropy, o, y).factor
        _ = LossAtBatch(own_ce, torch.cat([o, outputs()]), torch.cat([y, y])).factor  # beside it nothing is lost


def test_float32_inside_a_float64_model_is_said() -> None:
    with pytest.warns(UserWarning, match="lost digits.*part of it is computed in float32"):
        got = hessian(lambda o, y: F.cross_entropy(o.float(), y), outputs(), classes())
    torch.testing.assert_close(got, hessian(nn.CrossEntropyLoss(), outputs(), classes()), rtol=1e-4, atol=1e-7)


# ------------------------------------------------------------------- losses that compare samples


def centred_sum(o: Tensor, y: Tensor) -> Tensor:
    """Of rank (N - 1) C."""
    return (o - o.mean(0)).square().sum() + 0.1 * o.sum()


WHOLE = case("", lambda: mlp(4, 5, C), labelled(N, 4, C=C), lambda: centred_sum)


def test_whole_factor() -> None:
    columns = LossAtBatch(centred_sum, outputs(), classes(), scale=3.0).whole.columns
    assert columns.shape == ((N - 1) * C, N, C)
    S = columns.flatten(1)
    torch.testing.assert_close(S.T @ S, 3 * reference.loss_hessian(centred_sum, outputs(), classes()))


def test_whole_passes_and_low_rank() -> None:
    model, loss_fn, X, y = WHOLE.build()
    res = curvature(model, loss_fn, (X, y), DiagGGNExact())
    assert res.passes == (N - 1) * C and res.method == "dense"
    ggn = curvature(model, loss_fn, (X, y), LowRankGGN()).ggn
    G = reference.ggn(model, loss_fn, X, y)
    torch.testing.assert_close(ggn.eigenvalues, torch.linalg.eigvalsh(G).flip(0)[: len(ggn.eigenvalues)])
    e = ggn.unit_vectors(2)
    g = reference.component_gradients(model, loss_fn, X, y)
    torch.testing.assert_close(ggn.slopes(2), torch.cat([t.flatten(1) for t in g.values()], 1) @ e)
    want = -torch.linalg.solve(G + 0.1 * torch.eye(len(G)), ggn.gradient)
    torch.testing.assert_close(torch.cat([t.flatten() for t in ggn.newton_step(0.1).values()]), want)
    with pytest.raises(ValueError, match="rows of V belong to no sample.*no curvatures by sample"):
        ggn.curvatures(2)


@pytest.mark.parametrize("kind", ["rademacher", "labels"])
def test_whole_draws(kind: str) -> None:
    draws = LossAtBatch(centred_sum, outputs(), classes()).sample(20000, kind, torch.Generator().manual_seed(0))
    S = draws.columns(slice(None)).flatten(1)
    want = reference.loss_hessian(centred_sum, outputs(), classes())
    assert (S.T @ S / len(S) - want).abs().max() < 0.03 * want.abs().max()


@pytest.mark.parametrize(
    "quantity",
    [
        bncurv.ComponentDiagGGNExact(),
        bncurv.SqrtGGNExact(),
        bncurv.ComponentDiagGGNMC(),
        bncurv.SqrtGGNMC(kind="labels"),
        bncurv.CouplingReport(),
        LowRankGGN(top=1, matrix_free=True),
    ],
    ids=lambda q: type(q).__name__,
)
def test_whole_has_no_part_per_sample(quantity: Any) -> None:
    model, loss_fn, X, y = WHOLE.build()
    with pytest.raises(ValueError, match=rf"^{type(quantity).__name__}.* goes by samples, but centred_sum compares"):
        curvature(model, loss_fn, (X, y), quantity)


def test_whole_is_refused_beyond_its_size_and_over_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    model, loss_fn, X, y = WHOLE.build()
    with pytest.raises(ValueError, match="centred_sum is neither a mean nor a sum over samples"):
        curvature(model, loss_fn, [(X, y), (X, y)], DiagGGNExact())
    monkeypatch.setattr(by_autograd, "LARGEST_WHOLE", N * C - 1)
    with pytest.raises(ValueError, match="centred_sum compares samples.*has 24 rows; bncurv takes up to 23.*any loss"):
        curvature(model, loss_fn, (X, y), DiagGGNExact())


def test_whole_gesture() -> None:
    class Centred(nn.Module):
        def forward(self, o: Tensor, y: Tensor) -> Tensor:
            return centred_sum(o, y)

    (model, _, X, y), loss_fn = WHOLE.build(), extend(Centred())
    extend(model)
    with backpack(DiagGGNExact()):
        loss_fn(model(X), y).backward()
    want = reference.ggn_diagonal(*WHOLE.build())
    assert_close({n: p.diag_ggn_exact for n, p in model.named_parameters()}, want)
