"""Gradient and Hessian factor of every loss against double backward, at ordinary and extreme outputs."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from backpack import backpack
from cases import LOSSES, Case, case, float64, mlp, regression
from test_exact import assert_close
from torch import Tensor, nn
from torch.nn import functional as F

from bncurv import ComponentGrad, DiagGGNExact, curvature, extend, reference, register_loss
from bncurv.loss_at_batch import LossAtBatch
from bncurv.losses import LOSSES as TABLE
from bncurv.losses import Loss, find_loss

N, C = 5, 4


def hessian(loss_fn: nn.Module, output: Tensor, target: Tensor) -> Tensor:
    """By bncurv: ``S Sᵀ``, one block per sample, ``[n, M, M]``."""
    factor = LossAtBatch(loss_fn, output, target).factor
    S = factor.columns(slice(None)).flatten(2)  # [c, n, M]
    assert S.shape == (factor.columns_per_sample, len(output), output[0].numel())
    return torch.einsum("cni,cnj->nij", S, S)


def blocks_of(H: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """Diagonal blocks ``[n, M, M]`` of a whole-batch Hessian, and what lies outside them."""
    H = H.unflatten(0, (samples, -1)).unflatten(2, (samples, -1)).transpose(1, 2)
    diagonal = torch.eye(samples, dtype=torch.bool)
    return H[diagonal], H[~diagonal]


def assert_factor(loss_fn: nn.Module, output: Tensor, target: Tensor) -> None:
    """Against double backward of the loss module itself."""
    own, across = blocks_of(reference.loss_hessian(loss_fn, output, target), len(output))
    assert not across.any()
    torch.testing.assert_close(hessian(loss_fn, output, target), own, rtol=1e-9, atol=1e-14)


def assert_gradient(loss_fn: nn.Module, output: Tensor, target: Tensor, tol: float = 1e-12) -> None:
    leaf = output.clone().requires_grad_()
    (want,) = torch.autograd.grad(loss_fn(leaf, target), leaf)
    torch.testing.assert_close(LossAtBatch(loss_fn, output, target).gradient, want, rtol=tol, atol=tol)


def at_outputs(one: Case) -> tuple[nn.Module, Tensor, Tensor]:
    model, loss_fn, X, y = one.build()
    return loss_fn, model(X).detach(), y


@pytest.mark.parametrize("one", LOSSES, ids=str)
def test_options(one: Case) -> None:
    loss_fn, output, y = at_outputs(one)
    assert_factor(loss_fn, 3 * output, y)
    assert_gradient(loss_fn, 3 * output, y)


@pytest.mark.parametrize("scale", [0.0, 0.3, 2.0])
@pytest.mark.parametrize("one", LOSSES, ids=str)
def test_scale(one: Case, scale: float) -> None:
    loss_fn, output, y = at_outputs(one)
    plain, scaled = LossAtBatch(loss_fn, output, y), LossAtBatch(loss_fn, output, y, scale)
    torch.testing.assert_close(scaled.gradient, scale * plain.gradient)
    want = scale**0.5 * plain.factor.columns(slice(None))
    torch.testing.assert_close(scaled.factor.columns(slice(None)), want)


@pytest.mark.parametrize("one", LOSSES, ids=str)
def test_columns_in_pieces(one: Case) -> None:
    """A slice of columns is that slice of all columns."""
    loss_fn, output, y = at_outputs(one)
    factor = LossAtBatch(loss_fn, output, y).factor
    whole, count = factor.columns(slice(None)), factor.columns_per_sample
    pieces = [factor.columns(slice(i, i + 2)) for i in range(0, count, 2)]
    assert torch.equal(torch.cat(pieces), whole)


@pytest.mark.parametrize("one", LOSSES, ids=str)
def test_inputs_are_left_alone(one: Case) -> None:
    loss_fn, output, y = at_outputs(one)
    before = output.clone(), y.clone(), copy.deepcopy(loss_fn.state_dict())
    LossAtBatch(loss_fn, output, y)
    assert torch.equal(output, before[0]) and torch.equal(y, before[1])
    assert all(torch.equal(t, before[2][name]) for name, t in loss_fn.state_dict().items())
    assert output.grad is None and not output.requires_grad


# --------------------------------------------------------------------------------- extreme outputs


def softmax_hessian(z: Tensor) -> Tensor:
    """``diag p - p pᵀ`` without cancellation: its diagonal is ``Σ_{j≠i} p_i p_j``."""
    p = (z.double() - z.double().logsumexp(1, keepdim=True)).exp()
    off = p[:, :, None] * p[:, None, :] * (1 - torch.eye(z.shape[1], dtype=torch.float64))
    return torch.diag_embed(off.sum(2)) - off


def logits(size: float) -> Tensor:
    """Every class is far ahead once, far behind once; two draws."""
    z = size * (2 * torch.eye(C) - 1)
    return torch.cat([z, -z, torch.tensor([[size, size, -size, -size]]), torch.zeros(1, C)])


def assert_entrywise(got: Tensor, want: Tensor, tol: float) -> None:
    """Relative to the geometric mean of the diagonal entries: small classes count as much."""
    d = want.diagonal(dim1=1, dim2=2).sqrt()
    scale = d[:, :, None] * d[:, None, :]
    error = (got.double() - want).abs()
    assert bool((error <= tol * scale + 1e-300).all()), (error / scale.clamp(min=1e-300)).max()


@pytest.mark.parametrize("size", [5.0, 20.0, 60.0, 300.0])
def test_confident_cross_entropy(size: float) -> None:
    z = logits(size).double()
    y = torch.arange(len(z)) % C
    got = hessian(nn.CrossEntropyLoss(reduction="sum"), z, y)
    assert bool(got.isfinite().all())
    assert_entrywise(got, softmax_hessian(z), 1e-12)


@pytest.mark.parametrize("size", [5.0, 20.0, 60.0])
def test_confident_cross_entropy_float32(size: float) -> None:
    z = logits(size)
    y = torch.arange(len(z)) % C
    at_batch = LossAtBatch(nn.CrossEntropyLoss(reduction="sum"), z, y)
    S = at_batch.factor.columns(slice(None)).flatten(2)
    assert S.dtype == at_batch.gradient.dtype == torch.float32
    got = torch.einsum("cni,cnj->nij", S.double(), S.double())
    assert_entrywise(got, softmax_hessian(z), 1e-5)


def test_class_of_probability_zero() -> None:
    """Underflow makes a probability exactly zero: its row is zero, the others are right."""
    z = torch.tensor([[0.0, 1.0, -900.0, 0.5], [-900.0, -900.0, 3.0, -900.0]]).double()
    assert_factor(nn.CrossEntropyLoss(), z, torch.tensor([1, 2]))
    assert_factor(nn.CrossEntropyLoss(label_smoothing=0.1), z, torch.tensor([2, 0]))
    assert not hessian(nn.CrossEntropyLoss(), z, torch.tensor([1, 2]))[1].any()


@pytest.mark.parametrize("size", [5.0, 20.0, 60.0, 300.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_confident_binary(size: float, dtype: torch.dtype) -> None:
    size = min(size, 80.0) if dtype == torch.float32 else size  # e^-80 is float32's limit
    z = torch.tensor([[size, -size], [-size, 0.0]]).to(dtype)
    y = torch.tensor([[1.0, 1.0], [0.0, 0.5]]).to(dtype)
    got = LossAtBatch(nn.BCEWithLogitsLoss(reduction="sum"), z, y).factor.columns(slice(None))
    p = z.double().abs().neg().exp()  # σ'(z) = p / (1 + p)²
    want = (p / (1 + p) ** 2).sqrt()
    torch.testing.assert_close(got.sum(0).double(), want, rtol=1e-6, atol=0)


def test_extreme_gradient() -> None:
    z, y = logits(60.0).double(), torch.arange(2 * C + 2) % C
    assert_gradient(nn.CrossEntropyLoss(), z, y)
    assert_gradient(nn.BCEWithLogitsLoss(), z, torch.rand(z.shape).double())


def test_large_squared_error() -> None:
    assert_factor(nn.MSELoss(), 1e8 * torch.randn(N, C).double(), torch.randn(N, C).double())


# ----------------------------------------------------------------------------- unusual targets


def outputs() -> Tensor:
    return torch.randn(N, C).double()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weight", [None, torch.tensor([0.5, 0.0, 2.0, 1.0]).double()])
def test_soft_targets_that_do_not_sum_to_one(reduction: str, smoothing: float, weight: Tensor | None) -> None:
    y = 3 * torch.rand(N, C).double()
    y[1] = 0
    options = {"reduction": reduction, "label_smoothing": smoothing, "weight": weight}
    assert_factor(nn.CrossEntropyLoss(**options), outputs(), y)
    assert_gradient(nn.CrossEntropyLoss(**options), outputs(), y)


def test_soft_targets_with_a_negative_sum() -> None:
    y = torch.rand(N, C).double()
    y[2] = -1.0
    with pytest.raises(ValueError, match="negative.*not convex.*non-negative"):
        _ = LossAtBatch(nn.CrossEntropyLoss(), outputs(), y).factor
    assert_gradient(nn.CrossEntropyLoss(), outputs(), y)  # which needs no convexity


def test_all_targets_ignored() -> None:
    """The mean of nothing is undefined; the sum is zero."""
    y = torch.full((N,), -100)
    with pytest.raises(ValueError, match="CrossEntropyLoss.*no target that counts"):
        LossAtBatch(nn.CrossEntropyLoss(), outputs(), y)
    at_batch = LossAtBatch(nn.CrossEntropyLoss(reduction="sum"), outputs(), y)
    assert not at_batch.gradient.any() and not at_batch.factor.columns(slice(None)).any()


def test_all_weight_on_absent_classes() -> None:
    loss_fn = nn.CrossEntropyLoss(weight=torch.tensor([0.0, 1.0, 1.0, 1.0]).double())
    with pytest.raises(ValueError, match="CrossEntropyLoss"):
        LossAtBatch(loss_fn, outputs(), torch.zeros(N, dtype=torch.long))


@pytest.mark.parametrize("loss", [nn.MSELoss, nn.BCEWithLogitsLoss])
@pytest.mark.parametrize("shape", [(N,), (N, 1), (1, C), (N, C, 1), (N + 1, C), (N, C + 1)])
def test_shapes_must_agree(loss: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"{loss.__name__}.*\(5, 4\).*must be equal.*Reshape"):
        LossAtBatch(loss(), outputs(), torch.rand(shape).double())


@pytest.mark.parametrize("shape", [(N, 1), (N + 1,), (), (N, C)])
def test_shapes_of_indices(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"class indices.*expected \(5,\).*Reshape"):
        LossAtBatch(nn.CrossEntropyLoss(), outputs(), torch.zeros(shape, dtype=torch.long))


def test_output_without_classes() -> None:
    with pytest.raises(ValueError, match=r"\(5,\).*expected \[N, C, ...\]"):
        LossAtBatch(nn.CrossEntropyLoss(), torch.randn(N), torch.zeros(N, dtype=torch.long))


def test_integer_targets_of_squared_error() -> None:
    """They are numbers, also where PyTorch's own backward refuses them (2.6)."""
    z, y = outputs(), torch.randint(3, (N, C))
    assert_factor(nn.MSELoss(), z, y.double())
    assert_gradient(nn.MSELoss(), z, y.double())
    whole, real = (LossAtBatch(nn.MSELoss(), z, target) for target in (y, y.double()))
    torch.testing.assert_close(whole.gradient, real.gradient, rtol=0, atol=0)
    torch.testing.assert_close(hessian(nn.MSELoss(), z, y), hessian(nn.MSELoss(), z, y.double()), rtol=0, atol=0)


def test_one_class() -> None:
    """Cross-entropy of a single class is constant: no curvature, no crash."""
    z, y = torch.randn(N, 1).double(), torch.zeros(N, dtype=torch.long)
    assert not hessian(nn.CrossEntropyLoss(), z, y).any()


# ---------------------------------------------------------------------------- other people's losses


class Focal(nn.CrossEntropyLoss):
    """Another function of the same name."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        p = input.softmax(1).gather(1, target[:, None]).squeeze(1)
        return (-((1 - p) ** 2) * p.log()).mean()


class Doubled(nn.MSELoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return 2 * super().forward(input, target)


class Centred(nn.BCEWithLogitsLoss):
    """Mixes the samples."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(input - input.mean(0), target)


class Renamed(nn.MSELoss):
    """Another name for the same function."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(input, target)


@pytest.mark.parametrize("kind", [Focal, Doubled])
def test_subclasses_are_what_they_compute(kind: type[nn.Module]) -> None:
    """The formula of the base class is not that of the loss; gradient and factor are the loss' own."""
    y = torch.arange(N) % C if kind is Focal else torch.rand(N, C).double()
    assert_gradient(kind(), outputs(), y)
    assert_factor(kind(), outputs() / 4, y)


def test_a_subclass_that_mixes_samples_has_no_factor_by_samples() -> None:
    y = torch.rand(N, C).double()
    assert_gradient(Centred(), outputs(), y)
    with pytest.raises(ValueError, match="Centred compares samples.*DiagGGNExact, DiagGGNMC and LowRankGGN"):
        _ = LossAtBatch(Centred(), outputs(), y).factor


def test_forward_of_one_instance_is_what_counts() -> None:
    loss_fn = nn.MSELoss()
    loss_fn.forward = lambda f, y: 2 * nn.functional.mse_loss(f, y)
    assert_gradient(loss_fn, outputs(), outputs())
    assert_factor(loss_fn, outputs(), outputs())


def test_another_formula_for_a_built_in_loss_is_checked() -> None:
    built_in = TABLE[nn.MSELoss]
    register_loss(nn.MSELoss, Twice())
    try:
        with pytest.raises(ValueError, match="MSELoss.*differs from the formula"):
            _ = LossAtBatch(nn.MSELoss(), outputs(), outputs()).factor
    finally:
        register_loss(nn.MSELoss, built_in)


def test_subclass_with_the_same_function() -> None:
    assert_factor(Renamed(), outputs(), outputs())


def test_subclass_beats_its_base_in_the_table() -> None:
    register_loss(Doubled, Twice())
    try:
        assert_factor(Doubled(), outputs(), outputs())
        assert isinstance(find_loss(nn.MSELoss()), type(TABLE[nn.MSELoss]))
    finally:
        del TABLE[Doubled]


def test_hooks_of_the_users_on_the_loss_stay_silent() -> None:
    """The gradient check does not count as a call."""
    calls: list[Any] = []
    loss_fn = nn.MSELoss()
    loss_fn.register_forward_hook(lambda *args: calls.append(args))
    LossAtBatch(loss_fn, outputs(), outputs())
    assert calls == []


# ------------------------------------------------------------------------------ registered losses


class Twice(Loss):
    """Twice the mean squared error."""

    def check(self, loss: nn.Module, output: Tensor, target: Tensor) -> None:
        if output.shape != target.shape:
            raise ValueError("shapes differ")

    def gradient(self, loss: nn.Module, output: Tensor, target: Tensor) -> Tensor:
        return 4 * (output - target) / output.numel()

    def blocks(self, loss: nn.Module, output: Tensor, target: Tensor) -> Tensor:
        return torch.full_like(output, 4 / output.numel()).sqrt().flatten(1)[..., None, None]


@dataclass
class Elementwise(Loss):
    """A convex loss of single entries by its first two derivatives."""

    first: Any
    second: Any

    def check(self, loss: nn.Module, output: Tensor, target: Tensor) -> None:
        if output.shape != target.shape:
            raise ValueError("shapes differ")

    def _scale(self, loss: nn.Module, output: Tensor) -> float:
        return 1 / output.numel() if loss.reduction == "mean" else 1.0

    def gradient(self, loss: nn.Module, output: Tensor, target: Tensor) -> Tensor:
        return self.first(loss, output, target) * self._scale(loss, output)

    def blocks(self, loss: nn.Module, output: Tensor, target: Tensor) -> Tensor:
        second = self.second(loss, output, target) * self._scale(loss, output)
        return second.sqrt().flatten(1)[..., None, None]


class LogCosh(nn.Module):
    """Not one of PyTorch's losses, not derived from them."""

    reduction = "mean"

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return (input - target).cosh().log().mean()


NEW = {
    nn.PoissonNLLLoss: Elementwise(lambda m, f, y: f.exp() - y, lambda m, f, y: f.exp()),
    nn.HuberLoss: Elementwise(
        lambda m, f, y: (f - y).clamp(-m.delta, m.delta),
        lambda m, f, y: ((f - y).abs() < m.delta).to(f.dtype),
    ),
    LogCosh: Elementwise(lambda m, f, y: (f - y).tanh(), lambda m, f, y: 1 - (f - y).tanh() ** 2),
}


@pytest.fixture
def registered() -> Iterator[None]:
    for kind, loss in NEW.items():
        register_loss(kind, loss)
    yield
    for kind in NEW:
        del TABLE[kind]


def counts() -> tuple[Tensor, Tensor]:
    X, y = regression(6, 4, out=(3,))()
    return X, y.abs().round()


REGISTERED = [
    case("poisson", lambda: mlp(4, 5, 3), counts, nn.PoissonNLLLoss),
    case("poisson_sum", lambda: mlp(4, 5, 3), counts, lambda: nn.PoissonNLLLoss(reduction="sum")),
    case("huber", lambda: mlp(4, 5, 3), regression(6, 4, out=(3,)), nn.HuberLoss),
    case("huber_narrow", lambda: mlp(4, 5, 3), counts, lambda: nn.HuberLoss(delta=0.3)),
    case("log_cosh", lambda: mlp(4, 5, 3), regression(6, 4, out=(3,)), LogCosh),
]


@pytest.mark.parametrize("one", REGISTERED, ids=str)
def test_registered_factor(one: Case, registered: None) -> None:
    loss_fn, output, y = at_outputs(one)
    assert_factor(loss_fn, output, y)
    assert_gradient(loss_fn, output, y)


@pytest.mark.parametrize("method", ["coupled", "dense"])
@pytest.mark.parametrize("one", REGISTERED, ids=str)
def test_registered_curvature(one: Case, method: str, registered: None) -> None:
    model, loss_fn, X, y = one.build()
    res = curvature(model, loss_fn, (X, y), DiagGGNExact(), ComponentGrad(), method=method)
    assert_close(res.diag_ggn_exact, reference.ggn_diagonal(*one.build()))
    assert_close(res.grad_component, reference.component_gradients(*one.build()))


@pytest.mark.parametrize("one", REGISTERED, ids=str)
def test_registered_extend(one: Case, registered: None) -> None:
    model, loss_fn, X, y = one.build()
    extend(model), extend(loss_fn)
    with backpack(DiagGGNExact()):
        loss_fn(model(X), y).backward()
    got = {n: p.diag_ggn_exact for n, p in model.named_parameters()}
    assert_close(got, reference.ggn_diagonal(*one.build()))


def test_registered_loss_may_be_extended_before(request: pytest.FixtureRequest) -> None:
    """The order of extend and register_loss does not matter."""
    model, loss_fn, X, y = REGISTERED[0].build()
    extend(model), extend(loss_fn)
    request.getfixturevalue("registered")
    with backpack(DiagGGNExact()):
        loss_fn(model(X), y).backward()
    got = {n: p.diag_ggn_exact for n, p in model.named_parameters()}
    assert_close(got, reference.ggn_diagonal(*REGISTERED[0].build()))


def test_registered_wrongly() -> None:
    """A wrong formula is found out at once."""
    register_loss(nn.L1Loss, Twice())
    try:
        with float64(0), pytest.raises(ValueError, match="L1Loss.*differs from the formula"):
            _ = LossAtBatch(nn.L1Loss(), torch.randn(N, C), torch.randn(N, C)).factor
    finally:
        del TABLE[nn.L1Loss]


@pytest.mark.parametrize("first, second, what", [(1 + 1e-5, 1.0, "gradient"), (1.0, 1 + 1e-5, "Hessian")])
def test_a_slightly_wrong_formula_is_found(
    first: float, second: float, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = NEW[LogCosh]
    wrong = Elementwise(lambda *a: first * right.first(*a), lambda *a: second * right.second(*a))
    monkeypatch.setitem(TABLE, LogCosh, wrong)
    with pytest.raises(ValueError, match=f"LogCosh: its {what} differs from the formula"):
        _ = LossAtBatch(LogCosh(), outputs(), outputs()).factor


def test_registered_hessian_is_checked() -> None:
    """A right gradient with a wrong factor is found out as well."""
    register_loss(LogCosh, Elementwise(NEW[LogCosh].first, lambda m, f, y: torch.ones_like(f)))
    try:
        with pytest.raises(ValueError, match="LogCosh.*Hessian"):
            _ = LossAtBatch(LogCosh(), outputs(), outputs()).factor
    finally:
        del TABLE[LogCosh]


def test_non_convex_registered_loss() -> None:
    """A negative second derivative gives no factor: refused, not NaN."""
    register_loss(LogCosh, Elementwise(NEW[LogCosh].first, lambda m, f, y: (f - y).tanh() ** 2 - 1))
    try:
        with pytest.raises(ValueError, match="LogCosh.*(convex|finite|Hessian)"):
            _ = LossAtBatch(LogCosh(), outputs(), outputs()).factor
    finally:
        del TABLE[LogCosh]
