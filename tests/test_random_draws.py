"""Monte-Carlo quantities: afresh at every call, repeatable, honest over mini-batches; who moves which random state."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from backpack import backpack
from cases import case, labelled, mlp
from state import unchanged
from test_exact import assert_close
from torch import Tensor, nn

import bncurv
from bncurv import ComponentDiagGGNMC, DiagGGNExact, DiagGGNMC, SqrtGGNMC, curvature, extend, reference
from bncurv.loss_at_batch import LossAtBatch
from bncurv.losses import LOSSES
from bncurv.sampling import generator_of_call

SAMPLED = (DiagGGNMC, ComponentDiagGGNMC, SqrtGGNMC)
KINDS = pytest.mark.parametrize("kind", ["rademacher", "labels"])
SIZES = (6, 4, 2)
ONE = case("", lambda: mlp(4, 5, 3), labelled(12, 4))


def dropout() -> nn.Module:
    layers = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(), nn.Linear(5, 3)
    return nn.Sequential(*layers).double()


def call(quantity: Any, data: Any = None, model: nn.Module | None = None) -> dict[str, Tensor]:
    """All numbers of one call of `curvature`."""
    _, loss_fn, X, y = ONE.build()
    fields = curvature(model or ONE.model(), loss_fn, data or (X, y), quantity).fields
    return {f"{field} {name}": t for field, result in fields.items() for name, t in result.items()}


def gesture(quantity: Any, scale: float = 1.0) -> dict[str, Tensor]:
    """The same numbers by BackPACK's gesture."""
    model, loss_fn, X, y = ONE.build()
    extend(model), extend(loss_fn)
    with backpack(quantity):
        (scale * loss_fn(model(X), y)).backward()
    fields = [f for f in vars(model[0].weight) if f.startswith(quantity.field)]
    return {f"{field} {name}": getattr(p, field) for field in fields for name, p in model.named_parameters()}


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(t, two[name]) for name, t in one.items())


def split() -> list[tuple[Tensor, Tensor]]:
    _, _, X, y = ONE.build()
    return list(zip(X.split(SIZES), y.split(SIZES), strict=True))


# -------------------------------------------------------------------------------- afresh, repeatable


@KINDS
@pytest.mark.parametrize("run", [call, gesture])
@pytest.mark.parametrize("quantity", SAMPLED)
def test_every_call_draws_afresh(quantity: Any, run: Callable, kind: str) -> None:
    q = quantity(2, kind)
    torch.manual_seed(3)
    first, second = run(q), run(q)
    torch.manual_seed(3)
    assert equal(run(quantity(2, kind)), first) and equal(run(q), second)
    assert not equal(first, second)


def test_both_gestures_draw_the_same() -> None:
    """And move the global random state on by the same single draw, however much they use."""
    torch.manual_seed(3)
    one, state = call(DiagGGNMC(7)), torch.get_rng_state()
    torch.manual_seed(3)
    two = gesture(DiagGGNMC(7))
    assert torch.equal(torch.get_rng_state(), state)
    assert_close(two, one)
    torch.manual_seed(3)
    torch.randint(2**63 - 1, ())
    assert torch.equal(torch.get_rng_state(), state)


def test_mean_of_calls_converges() -> None:
    """To the exact diagonal, as one call of as many draws does."""
    want = reference.ggn_diagonal(*ONE.build())["0.weight"]
    name, calls = "diag_ggn_mc 0.weight", 300
    mean = sum(call(DiagGGNMC())[name] for _ in range(calls)) / calls
    at_once = call(DiagGGNMC(calls))
    z = (mean - want) / at_once["diag_ggn_mc_stderr 0.weight"]
    assert z.square().mean() < 2  # 3e4 if all calls drew the same


def test_one_call_draws_afresh_for_each_quantity_and_mini_batch() -> None:
    _, loss_fn, X, y = ONE.build()
    twice = [(X, y), (X, y)]
    each = call(SqrtGGNMC(), twice)["sqrt_ggn_mc 0.weight"]
    assert not torch.equal(*each.split(12, 1))
    both = curvature(ONE.model(), loss_fn, (X, y), SqrtGGNMC(), ComponentDiagGGNMC())
    squares = both.sqrt_ggn_mc["0.weight"].square()[0]
    assert not torch.allclose(both.diag_ggn_mc_component["0.weight"], squares)


# ------------------------------------------------------------------------------- the random state


@pytest.mark.parametrize("exact", [True, False])
def test_state_after_a_call(exact: bool) -> None:
    """Exact quantities leave it, dropout or not; with draws it is one draw on."""
    model, before = dropout(), torch.get_rng_state()
    call(DiagGGNExact() if exact else DiagGGNMC(3), split(), model)
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    if not exact:
        torch.randint(2**63 - 1, ())
    assert torch.equal(after, torch.get_rng_state())


def test_dropout_finds_the_state_as_it_is() -> None:
    """The forward passes drop what they drop without draws beside them."""
    model, (_, loss_fn, X, y) = dropout(), ONE.build()
    torch.manual_seed(3)
    got = curvature(model, loss_fn, (X, y), DiagGGNMC(), DiagGGNExact()).diag_ggn_exact
    assert_close(got, reference.ggn_diagonal(model, loss_fn, X, y, seed=3))


def test_a_failed_call_moves_nothing() -> None:
    model, loss_fn, X, y = ONE.build()
    with unchanged(model), pytest.raises(ValueError, match="X has shape"):
        curvature(model, loss_fn, [(X, y), (X, y[:-1])], DiagGGNMC())


@KINDS
def test_a_generator_moves_on_by_itself(kind: str) -> None:
    generator = torch.Generator().manual_seed(5)
    model, loss_fn, X, y = ONE.build()
    with unchanged(model):
        first, second = (call(DiagGGNMC(2, kind, generator), model=model) for _ in range(2))
        again = call(DiagGGNMC(2, kind, torch.Generator().manual_seed(5)), model=model)
    assert equal(first, again) and not equal(first, second)


@KINDS
def test_new_tensors_may_go_elsewhere_by_default(kind: str) -> None:
    model, loss_fn, X, y = ONE.build()
    want = LossAtBatch(loss_fn, model(X), y).sample(2, kind, torch.Generator().manual_seed(5)).blocks
    with torch.device("meta"):
        at_batch = LossAtBatch(loss_fn, model(X), y)
        assert torch.equal(at_batch.sample(2, kind, torch.Generator("cpu").manual_seed(5)).blocks, want)
        assert at_batch.sample(2, kind, generator_of_call([DiagGGNMC()], X.device)).blocks.device == X.device
        assert at_batch.sample(2, kind, None).blocks.device == X.device


# ----------------------------------------------------------------------- one draw, many batches, scales


def test_one_draw_has_no_standard_error() -> None:
    assert {key.split()[0] for key in call(DiagGGNMC(1))} == {"diag_ggn_mc"}
    assert {key.split()[0] for key in call(DiagGGNMC(2))} == {"diag_ggn_mc", "diag_ggn_mc_stderr"}


def test_standard_error_is_that_of_the_draws() -> None:
    """Over the squared whole-batch draws, which the rows of `SqrtGGNMC` are."""
    rows = call(SqrtGGNMC(5, generator=torch.Generator().manual_seed(1)))["sqrt_ggn_mc 0.weight"]
    got = call(DiagGGNMC(5, generator=torch.Generator().manual_seed(1)))
    draws = 5 * rows.sum(1).square()
    torch.testing.assert_close(got["diag_ggn_mc 0.weight"], draws.mean(0))
    torch.testing.assert_close(got["diag_ggn_mc_stderr 0.weight"], draws.std(0) / 5**0.5)


@KINDS
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_over_mini_batches(kind: str, reduction: str) -> None:
    """Estimates at the weight of their batch; their errors, of independent draws, in squares."""
    loss_fn = nn.CrossEntropyLoss(reduction=reduction)
    weights = [1.0 if reduction == "sum" else size / sum(SIZES) for size in SIZES]

    def run(data: list, g: torch.Generator) -> Any:
        quantities = (DiagGGNMC(3, kind, g), ComponentDiagGGNMC(2, kind, g), SqrtGGNMC(2, kind, g))
        return curvature(ONE.model(), loss_fn, data, *quantities)

    got, g = run(split(), torch.Generator().manual_seed(1)), torch.Generator().manual_seed(1)
    parts = [run([batch], g) for batch in split()]
    for name in ("0.weight", "3.bias"):
        pairs = list(zip(weights, parts, strict=True))
        torch.testing.assert_close(got.diag_ggn_mc[name], sum(w * p.diag_ggn_mc[name] for w, p in pairs))
        error = sum((w * p.diag_ggn_mc_stderr[name]) ** 2 for w, p in pairs)
        torch.testing.assert_close(got.diag_ggn_mc_stderr[name], error.sqrt())
        want = torch.cat([w * p.diag_ggn_mc_component[name] for w, p in pairs])
        torch.testing.assert_close(got.diag_ggn_mc_component[name], want)
        want = torch.cat([w**0.5 * p.sqrt_ggn_mc[name] for w, p in pairs], 1)
        torch.testing.assert_close(got.sqrt_ggn_mc[name], want)


@KINDS
@pytest.mark.parametrize("quantity", SAMPLED)
def test_scaled_loss(quantity: Any, kind: str) -> None:
    """(3 L).backward(): everything quadratic in the draws is three times as large."""
    plain, scaled = (gesture(quantity(2, kind, torch.Generator().manual_seed(1)), s) for s in (1.0, 3.0))
    factor = 3**0.5 if quantity is SqrtGGNMC else 3.0
    assert_close(scaled, {name: factor * t for name, t in plain.items()})


def test_labels_of_a_negative_loss_are_refused() -> None:
    with pytest.raises(ValueError, match="multiplied by -1.*no positive semi-definite GGN"):
        gesture(DiagGGNMC(kind="labels"), -1.0)


def test_labels_of_a_wrong_formula_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Cross(nn.CrossEntropyLoss):
        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            return super().forward(2 * input, target)

    model, _, X, y = ONE.build()
    monkeypatch.setitem(LOSSES, Cross, LOSSES[nn.CrossEntropyLoss])
    with pytest.raises(ValueError, match="Cross: its gradient differs from the formula"):
        curvature(model, Cross(), (X, y), bncurv.DiagGGNMC(kind="labels"))
