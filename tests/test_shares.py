"""Several mini-batches without coupling give what one batch of all samples gives, whatever the loss divides by."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from cases import Case, case, float64, mlp, regression
from state import unchanged
from test_exact import assert_close
from torch import Tensor, nn
from torch.nn import functional as F

import bncurv
from bncurv import curvature, reference, shares
from bncurv.batch import Merged
from bncurv.loss_at_batch import LossAtBatch
from bncurv.losses import LOSSES, Loss
from bncurv.quantities import Quantity
from bncurv.shares import Weights

SIZES = (5, 4, 2)
N, C = sum(SIZES), 3
GRADIENTS = (
    bncurv.ComponentGrad, bncurv.ComponentL2Grad, bncurv.SumComponentGradSquared, bncurv.ComponentVariance,
)  # fmt: skip
CURVATURES = (bncurv.DiagGGNExact, bncurv.ComponentDiagGGNExact, bncurv.SqrtGGNExact)


def net() -> nn.Module:
    """Without coupling: its BatchNorm uses the running statistics."""
    return mlp(4, 5, C).eval()


def pixel_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Conv2d(3, C, 1))


def class_weights() -> Tensor:
    return torch.tensor([0.5, 2.0, 1.0])


def indices(*extra: int, ignored: int = 1) -> Callable[[], tuple[Tensor, Tensor]]:
    """Normal inputs and class labels; of every third sample class ``ignored``."""

    def data() -> tuple[Tensor, Tensor]:
        X = torch.randn(N, 2, 3, 3) if extra else torch.randn(N, 4)
        y = torch.randint(C, (N, *extra))
        y[::3] = ignored
        return X, y

    return data


def ce(**options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.CrossEntropyLoss(**{k: v() if callable(v) else v for k, v in options.items()})


probabilities = regression(N, 4, out=(C,))


def soft() -> tuple[Tensor, Tensor]:
    X, y = probabilities()
    return X, y.softmax(1)


TABLE = [
    case("ce", net, indices(), ce()),
    case("ce_sum", net, indices(), ce(reduction="sum")),
    case("ce_ignore", net, indices(), ce(ignore_index=1)),
    case("ce_weight", net, indices(), ce(weight=class_weights)),
    case("ce_all", net, indices(), ce(weight=class_weights, ignore_index=1, label_smoothing=0.2)),
    case("ce_soft", net, soft, ce(weight=class_weights)),
    case("ce_pixels", pixel_net, indices(2, 2), ce(weight=class_weights, ignore_index=1)),
    case("mse", net, probabilities, nn.MSELoss),
    case("mse_sum", net, probabilities, lambda: nn.MSELoss(reduction="sum")),
    case("bce", net, soft, lambda: nn.BCEWithLogitsLoss(weight=class_weights(), pos_weight=class_weights())),
]  # fmt: skip


def split(one: Case, sizes: tuple[int, ...] = SIZES) -> list[tuple[Tensor, Tensor]]:
    _, _, X, y = one.build()
    return list(zip(X.split(sizes), y.split(sizes), strict=True))


def assert_union(one: Case, *quantities: Callable[[], Quantity], **options: Any) -> None:
    """Every field over mini-batches is that of one batch."""
    model, loss_fn, X, y = one.build()
    want = curvature(model, loss_fn, (X, y), *(q() for q in quantities), **options)
    got = curvature(model, loss_fn, split(one), *(q() for q in quantities), **options)
    assert got.batches == len(SIZES) and want.batches == 1 and want.fields.keys() == got.fields.keys()
    for field, result in want.fields.items():
        assert_close(got.fields[field], result)


@pytest.mark.parametrize("one", TABLE, ids=str)
def test_union(one: Case) -> None:
    assert_union(one, *GRADIENTS, *CURVATURES)


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("one", [c for c in TABLE if c.name in ("ce_sum", "ce_all", "ce_pixels", "mse")], ids=str)
def test_union_of_low_rank(one: Case, free: bool) -> None:
    model, loss_fn, X, y = one.build()
    quantity = bncurv.LowRankGGN(top=3, matrix_free=True) if free else bncurv.LowRankGGN()
    want, got = (curvature(model, loss_fn, data, quantity).ggn for data in ((X, y), split(one)))
    v = torch.randn(want.dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for what in (lambda G: G.eigenvalues[:3], lambda G: G.gradient, lambda G: G @ v, lambda G: G.solve(v, 0.1)):
        torch.testing.assert_close(what(got), what(want), rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(got.curvatures(2), want.curvatures(2), rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(got.slopes(2).abs(), want.slopes(2).abs(), rtol=1e-6, atol=1e-9)


def test_weights_are_what_the_loss_divides_by() -> None:
    """With coupling too: the weighted mean of the mini-batches' own diagonals."""
    one = case("", lambda: mlp(4, 5, C), indices(), ce(weight=class_weights, ignore_index=1))
    model, loss_fn, _, _ = one.build()
    parts = [reference.ggn_diagonal(model, loss_fn, X, y) for X, y in split(one)]
    shares = [float((class_weights()[y] * (y != 1)).sum()) for _, y in split(one)]
    want = {n: sum(s * p[n] for s, p in zip(shares, parts, strict=True)) / sum(shares) for n in parts[0]}
    assert_close(curvature(model, loss_fn, split(one), bncurv.DiagGGNExact()).diag_ggn_exact, want)


# ------------------------------------------------------------------------------- nothing counts


@pytest.mark.parametrize("empty", [0, 1, 2])
def test_a_batch_without_a_target_that_counts(empty: int) -> None:
    """It weighs nothing, and its components are zero."""

    def data() -> tuple[Tensor, Tensor]:
        X, y = indices()()
        y.split(SIZES)[empty][:] = 1
        return X, y

    assert_union(case("", net, data, ce(ignore_index=1)), *GRADIENTS, *CURVATURES)
    assert_union(case("", net, data, ce(weight=lambda: torch.tensor([1.0, 0.0, 2.0]))), *GRADIENTS, *CURVATURES)


@pytest.mark.parametrize("sizes", [(N,), SIZES])
def test_no_target_that_counts(sizes: tuple[int, ...]) -> None:
    one = case("", net, lambda: (torch.randn(N, 4), torch.ones(N).long()), ce(ignore_index=1))
    with pytest.raises(ValueError, match="CrossEntropyLoss averages over nothing.*no target that counts"):
        curvature(one.model(), one.loss(), split(one, sizes), bncurv.DiagGGNExact())


def test_smoothing_of_targets_without_weight_is_refused() -> None:
    """A sum that is not zero over weights that are."""
    weight = torch.tensor([1.0, 0.0, 2.0]).double()
    loss_fn = nn.CrossEntropyLoss(weight, label_smoothing=0.1)
    batch = torch.randn(4, 4).double(), torch.ones(4).long()
    with pytest.raises(ValueError, match="CrossEntropyLoss.*gradient is not finite"):
        curvature(net().double(), loss_fn, [batch, batch], bncurv.ComponentGrad())


def test_cancelling_weights_are_refused() -> None:
    loss_fn = nn.CrossEntropyLoss(weight=torch.tensor([1.0, -1.0, 0.0]).double())
    data = [(torch.randn(4, 4).double(), torch.full((4,), i)) for i in range(2)]
    with pytest.raises(ValueError, match="weights of mini-batches, 4 and -4, cancel"):
        curvature(net().double(), loss_fn, data, bncurv.ComponentGrad())


# ------------------------------------------------------------------------------- any other loss


@dataclass
class Function:
    """A loss by what it does, whatever that is."""

    of: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, output: Tensor, y: Tensor) -> Tensor:
        return self.of(output, y)


class Wrapped(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.inner, self.scale = nn.CrossEntropyLoss(ignore_index=1), scale

    def forward(self, output: Tensor, y: Tensor) -> Tensor:
        return self.scale * self.inner(output, y)


def log_net() -> nn.Module:
    return nn.Sequential(net(), nn.LogSoftmax(1))


OTHERS = [
    case("l1", net, probabilities, nn.L1Loss),
    case("l1_sum", net, probabilities, lambda: nn.L1Loss(reduction="sum")),
    case("huber", net, probabilities, nn.HuberLoss),
    case("nll", log_net, indices(), lambda: nn.NLLLoss(class_weights(), ignore_index=1)),
    case("kl", log_net, soft, lambda: nn.KLDivLoss(reduction="batchmean")),
    case("kl_mean", log_net, soft, nn.KLDivLoss),
    case("multi_margin", net, indices(), nn.MultiMarginLoss),
    case("function", net, indices(), lambda: F.cross_entropy),
    case("partial", net, indices(), lambda: partial(F.cross_entropy, weight=class_weights(), ignore_index=1)),
    case("lambda_sum", net, indices(), lambda: lambda o, y: F.cross_entropy(o, y, reduction="sum")),
    case("callable", net, probabilities, lambda: Function(lambda o, y: -(o * y).sum(1).sigmoid().mean())),
    case("wrapper", net, indices(), lambda: Wrapped(0.3)),
    case("pixels", pixel_net, indices(2, 2), lambda: partial(F.cross_entropy, ignore_index=1)),
]


@pytest.mark.parametrize("one", OTHERS, ids=str)
def test_union_of_other_losses(one: Case) -> None:
    assert_union(one, *GRADIENTS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("sizes", [SIZES, (1, 8, 2)], ids=str)
@pytest.mark.parametrize("quiet", [[0], [1], [0, 1]], ids=str)
def test_union_where_a_gradient_vanishes(quiet: list[int], sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    """A hinge that is satisfied all over a mini-batch still counts its samples."""
    X, y = torch.randn(N, 4).to(dtype), torch.randint(C, (N,))
    model = net().to(dtype)
    for i in quiet:
        y.split(sizes)[i][:] = model(X).argmax(1).split(sizes)[i]
    loss_fn = nn.MultiMarginLoss(margin=1e-6)
    batches = list(zip(X.split(sizes), y.split(sizes), strict=True))
    want, got = (curvature(model, loss_fn, d, bncurv.ComponentGrad()).grad_component for d in ((X, y), batches))
    assert all(torch.allclose(got[n], t, rtol=1e-5, atol=1e-7) for n, t in want.items())
    assert not any(want["3.bias"].split(sizes)[i].any() for i in quiet) and want["3.bias"].any()


@pytest.mark.parametrize("empty", [[0], [1], [2], [0, 2], [1, 2]], ids=str)
def test_masked_means_that_divide_by_one_at_least(empty: list[int]) -> None:
    """A mini-batch without anything that counts weighs nothing, also if it is the first."""

    def masked(o: Tensor, y: Tensor) -> Tensor:
        return ((o - 1).square().sum(1) * y).sum() / y.sum().clamp(min=1)

    def data() -> tuple[Tensor, Tensor]:
        X, y = torch.randn(N, 4), torch.randint(1, 4, (N,))
        for i in empty:
            y.split(SIZES)[i][:] = 0
        return X, y

    assert_union(case("", net, data, lambda: masked), *GRADIENTS)


def test_float32_inside_a_loss() -> None:
    """It is weighed in its own dtype where it has no other."""
    w = torch.rand(C)
    model, X, y = net().float(), torch.randn(N, 4), torch.randn(N, C)
    batches = list(zip(X.split(SIZES), y.split(SIZES), strict=True))
    loss_fn: Callable = lambda o, y: ((o - y) @ w).square().mean()  # noqa: E731
    want, got = (curvature(model, loss_fn, d, bncurv.ComponentGrad()).grad_component for d in ((X, y), batches))
    assert all(torch.allclose(got[n], t, rtol=1e-4, atol=1e-7) for n, t in want.items())


def test_weights_are_read_in_float64() -> None:
    """Of a float32 network as well, where the loss allows it: no digits are lost over many mini-batches."""
    y = torch.randint(C, (N,))
    output, weights = 14 * F.one_hot(y, C) + 0.1 * torch.randn(N, C), Weights()
    loss_fn: Callable = lambda o, y: F.cross_entropy(o, y)  # noqa: E731
    parts = [LossAtBatch(loss_fn, o, t) for o, t in zip(output.split(SIZES), y.split(SIZES), strict=True)]
    assert [weights.of(part) for part in parts] == pytest.approx([1.0, 4 / 5, 2 / 5], rel=1e-12)


class Poisson(Loss):
    """exp(F) - y F, elementwise."""

    def check(self, loss: Any, output: Tensor, target: Tensor) -> None:
        pass

    def gradient(self, loss: Any, output: Tensor, target: Tensor) -> Tensor:
        return (output.exp() - target) / (output.numel() if loss.reduction == "mean" else 1)

    def blocks(self, loss: Any, output: Tensor, target: Tensor) -> Tensor:
        scale = output.numel() if loss.reduction == "mean" else 1
        return (output.exp() / scale).sqrt().reshape(len(output), -1, 1, 1)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_union_of_a_registered_loss(reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOSSES, nn.PoissonNLLLoss, Poisson())
    one = case("", net, probabilities, lambda: nn.PoissonNLLLoss(reduction=reduction))
    assert_union(one, *GRADIENTS, *CURVATURES)


def rms(o: Tensor, y: Tensor) -> Tensor:
    return (o - y).square().mean().sqrt()


def in_batch(o: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(o @ y.T, torch.arange(len(o)))


def centred(o: Tensor, y: Tensor) -> Tensor:
    return (o - o.mean(0) - y).square().mean()


def centred_sum(o: Tensor, y: Tensor) -> Tensor:
    return (o - o.mean(0) - y).square().sum()


def noisy(o: Tensor, y: Tensor) -> Tensor:
    return (o - y + torch.randn(len(o), 1)).square().mean()


def root_n(o: Tensor, y: Tensor) -> Tensor:
    return (o - y).square().sum() / len(o) ** 0.5


def medians(o: Tensor, y: Tensor) -> Tensor:
    return (o - o.median()).abs().mean()


@pytest.mark.parametrize("loss_fn", [rms, in_batch, centred, centred_sum, root_n, medians])
def test_neither_mean_nor_sum_is_refused(loss_fn: Callable) -> None:
    """By name, and only over several mini-batches; at one, g_n is what passes through output n."""
    one = case("", net, probabilities, lambda: loss_fn)
    model, _, X, y = one.build()
    got = curvature(model, loss_fn, (X, y), bncurv.ComponentGrad()).grad_component
    assert_close(got, reference.component_gradients(model, loss_fn, X, y))
    with pytest.raises(ValueError, match=rf"{loss_fn.__name__} is neither a mean nor a sum over samples"):
        curvature(model, loss_fn, split(one), bncurv.ComponentGrad())


def test_neither_mean_nor_sum_is_refused_beside_a_vanishing_gradient() -> None:
    """The other one's share alone would fit any rule."""
    loss_fn: Callable = lambda o, y: (o - y).relu().sum() / len(o) ** 0.5  # noqa: E731
    data = [(torch.randn(4, 4), torch.full((4, C), level)) for level in (1e3, -1e3)]
    for batches in (data, data[::-1]):
        with pytest.raises(ValueError, match="<lambda> is neither a mean nor a sum over samples"):
            curvature(net(), loss_fn, batches, bncurv.ComponentGrad())


def test_what_cannot_be_weighed_is_refused() -> None:
    model = net()
    data = [(torch.randn(4, 4), torch.randn(4, C)) for _ in range(2)]
    with unchanged(model), pytest.raises(ValueError, match=r"noisy is neither.*draws random numbers\?"):
        curvature(model, noisy, data, bncurv.ComponentGrad())
    X, y = torch.randn(4, 4), torch.full((4, C), 1e3)
    satisfied = lambda o, y: (o - y).relu().mean()  # noqa: E731
    with pytest.raises(ValueError, match="<lambda>: its gradient vanishes on mini-batches"):
        curvature(model, satisfied, [(X, y), (X, y)], bncurv.ComponentGrad())
    sequences = nn.Conv1d(1, C, 1)
    data = [(torch.randn(4, 1, length), torch.randint(C, (4, length))) for length in (3, 5)]
    with pytest.raises(ValueError, match=r"Wrapped.*joins them.*\(3, 3\).*\(3, 5\).*equal shapes"):
        curvature(sequences, Wrapped(1.0), data, bncurv.ComponentGrad())
    for loss_fn in (nn.CrossEntropyLoss(), F.cross_entropy):
        curvature(sequences, loss_fn, data, bncurv.DiagGGNExact())  # which know what they divide by


# --------------------------------------------------------------------------------------- rounding


def test_few_parts_are_held() -> None:
    merged = Merged([bncurv.DiagGGNExact()])
    for count in range(1, 40):
        merged.add({"diag_ggn_exact": {"w": torch.ones(())}}, 1.0)
        assert merged.batches == count and len(merged._held) <= 6
    assert torch.equal(merged.fields()["diag_ggn_exact"]["w"], torch.ones(()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_many_batches_do_not_lose_digits(dtype: torch.dtype) -> None:
    with float64(0):
        model, X, y = nn.Linear(4, C), torch.randn(300, 4), torch.randint(C, (300,))
    want = curvature(model, nn.CrossEntropyLoss(), (X, y), bncurv.DiagGGNExact(), bncurv.ComponentVariance())
    model, X = model.to(dtype), X.to(dtype)
    data = zip(X.split(1), y.split(1), strict=True)
    got = curvature(model, nn.CrossEntropyLoss(), data, bncurv.DiagGGNExact(), bncurv.ComponentVariance())
    for field, results in want.fields.items():
        for name, t in results.items():
            error = (got.fields[field][name].double() - t).norm() / t.norm()
            assert error < 20 * torch.finfo(dtype).eps, (field, name)


# ---------------------------------------------------------------------------- down to rounding
@pytest.mark.parametrize("off, agrees", [(1e-8, True), (1e-7, False)])
def test_gradients_agree_relatively(off, agrees):
    g = torch.ones(4, dtype=torch.float64)
    assert shares._agree([g * (1 + off)], [g]) is agrees


@pytest.mark.parametrize("off, agrees", [(1e-14, True), (1e-13, False)])
def test_gradients_agree_down_to_the_rounding_of_the_largest(off, agrees):
    g, nothing = torch.tensor([1.0, 0.0], dtype=torch.float64), torch.tensor([0.0, 0.0], dtype=torch.float64)
    assert shares._agree([g, nothing + off], [g, nothing]) is agrees


@pytest.mark.parametrize("first, weight", [(1e-15, math.inf), (1e-13, 1e13)])
def test_weight_of_a_mini_batch_that_counts_next_to_nothing(first, weight):
    """Class weights of 1e-15 in the first one: nothing of it is left beside the second."""
    loss = nn.CrossEntropyLoss(weight=torch.tensor([first, 1.0], dtype=torch.float64))
    output = torch.tensor([[0.5, -0.5], [0.1, 0.3]], dtype=torch.float64)
    one, two = (LossAtBatch(loss, output, torch.full((2,), c)) for c in (0, 1))
    assert shares._relative(one, two) == pytest.approx(weight)
