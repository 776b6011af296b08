"""The oracle against facts that do not come from it; the cases against what they claim to be."""

import copy
from collections import Counter
from typing import Any

import cases
import pytest
import torch
from backpack import backpack, extend
from backpack.extensions import BatchGrad, DiagGGNExact
from cases import Case
from torch import Tensor, nn

from bncurv import reference

ALL = [*cases.DETERMINISTIC, *cases.RANDOM]
SOME = ["mlp_bn", "bn_twice", "bn_last", "unet", "embedding", "functional_bn", "inplace", "resnet"]
BY_NAME = {case.name: case for case in ALL}

each_case = pytest.mark.parametrize("case", ALL, ids=str)


def assert_same(result: dict[str, Tensor], truth: dict[str, Tensor], tol: float = 1e-11) -> None:
    """Equal names, shapes and values, relative to the largest entry of all."""
    assert list(result) == list(truth)
    scale = max(float(value.abs().max()) for value in truth.values())
    for name, value in truth.items():
        assert result[name].shape == value.shape, name
        torch.testing.assert_close(result[name], value, rtol=tol, atol=tol * scale, msg=name)


def plain_gradient(case: Case) -> dict[str, Tensor]:
    """What the user gets from `loss.backward()`."""
    model, loss_fn, X, y = case.build()
    loss_fn(model(X), y).backward()
    named = model.named_parameters()
    return {
        n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in named if p.requires_grad
    }


# ------------------------------------------------------------------------------ first order


@each_case
def test_components_sum_to_the_gradient(case: Case) -> None:
    torch.manual_seed(5)
    truth = plain_gradient(case)
    components = reference.component_gradients(*case.build(), seed=5)
    assert_same(reference.gradient(*case.build(), seed=5), truth)
    assert_same({name: g.sum(0) for name, g in components.items()}, truth)


@pytest.mark.parametrize("name", SOME)
def test_jacobian_is_torch_funcs(name: str) -> None:
    model, _, X, _ = BY_NAME[name].build()
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    parameters = {n: p.detach() for n, p in model.named_parameters()}

    def output(parameters: dict[str, Tensor]) -> Tensor:
        copies = {n: b.clone() for n, b in buffers.items()}
        return torch.func.functional_call(model, {**parameters, **copies}, X).flatten()

    assert_same(reference.jacobian(model, X), torch.func.jacrev(output)(parameters))


@pytest.mark.parametrize(
    "name", ["block_twice", "tied_weights", "root_functional_bn", "conv1d_reflect"]
)
def test_jacobian_is_the_limit_of_differences(name: str) -> None:
    model, _, X, _ = BY_NAME[name].build()
    J = reference.jacobian(model, X)
    torch.manual_seed(1)
    step, direction = 1e-5, {n: torch.randn_like(p) for n, p in model.named_parameters()}

    @torch.no_grad()
    def output(sign: float) -> Tensor:
        moved = copy.deepcopy(model)
        for n, p in moved.named_parameters():
            p += sign * step * direction[n]
        return moved(X).flatten()

    slope = (output(1.0) - output(-1.0)) / (2 * step)
    product = sum(torch.tensordot(J[n], d, d.ndim) for n, d in direction.items())
    torch.testing.assert_close(product, slope, rtol=1e-6, atol=1e-7)


def test_components_depend_on_every_sample() -> None:
    model, loss_fn, X, y = BY_NAME["mlp_bn"].build()
    moved = torch.cat([X[:-1], 2 * X[-1:]])
    before = reference.component_gradients(model, loss_fn, X, y)["0.weight"]
    after = reference.component_gradients(model, loss_fn, moved, y)["0.weight"]
    change = (after - before).flatten(1).norm(dim=1)
    assert (change > 1e-3 * before.norm()).all()


def test_components_in_eval_mode_are_backpacks(float64: None) -> None:
    model, loss_fn, X, y = eval_net()
    components = reference.component_gradients(model, loss_fn, X, y)
    assert_same(components, backpacks(BatchGrad(), model, loss_fn, X, y, "grad_batch"))


# ----------------------------------------------------------------------------- second order


@each_case
def test_diagonals_are_the_diagonal_of_a_psd_matrix(case: Case) -> None:
    G = reference.ggn(*case.build(), seed=5)
    diagonal = reference.ggn_diagonal(*case.build(), seed=5)
    shares = reference.component_ggn_diagonal(*case.build(), seed=5)
    scale = float(G.diagonal().max())
    torch.testing.assert_close(G, G.T, rtol=0, atol=1e-12 * scale)
    assert torch.linalg.eigvalsh(G).min() > -1e-12 * scale
    flat = torch.cat([d.flatten() for d in diagonal.values()])
    torch.testing.assert_close(flat, G.diagonal(), rtol=0, atol=1e-12 * scale)
    assert_same({name: share.sum(0) for name, share in shares.items()}, diagonal)
    assert min(float(share.min()) for share in shares.values()) > -1e-12 * scale


@pytest.mark.parametrize("loss_fn", [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum")])
def test_ggn_of_a_linear_model_is_its_hessian(float64: None, loss_fn: nn.Module) -> None:
    model, X, y = nn.Linear(4, 3, bias=False), torch.randn(5, 4), torch.randint(3, (5,))

    def loss(weight: Tensor) -> Tensor:
        return loss_fn(nn.functional.linear(X, weight), y)

    hessian = torch.autograd.functional.hessian(loss, model.weight.detach()).reshape(12, 12)
    torch.testing.assert_close(reference.ggn(model, loss_fn, X, y), hessian)


def test_diagonal_in_eval_mode_is_backpacks(float64: None) -> None:
    model, loss_fn, X, y = eval_net()
    diagonal = reference.ggn_diagonal(model, loss_fn, X, y)
    assert_same(diagonal, backpacks(DiagGGNExact(), model, loss_fn, X, y, "diag_ggn_exact"))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_diagonal_is_the_sum_of_squared_columns(float64: None, reduction: str) -> None:
    """`V = J^T S` with the factor of cross-entropy as it stands in the literature."""
    model, X, y = cases.mlp(4, 6, 3), torch.randn(6, 4), torch.randint(3, (6,))
    p = model(X).detach().softmax(1)
    S = torch.diag_embed(p.sqrt()) - p[:, :, None] * p.sqrt()[:, None, :]  # [n, row, column]
    S = S / 6**0.5 if reduction == "mean" else S
    truth = {
        name: torch.einsum("nr...,nrc->nc...", rows.unflatten(0, (6, 3)), S).square().sum(1)
        for name, rows in reference.jacobian(model, X).items()
    }
    loss_fn = nn.CrossEntropyLoss(reduction=reduction)
    assert_same(reference.component_ggn_diagonal(model, loss_fn, X, y), truth)


def test_rank_through_batchnorm(float64: None) -> None:
    """theory.md, F22: rank N(C-1) for cross-entropy, N C for the squared error."""
    N, C = 5, 4
    model, X = cases.mlp(6, 8, 8, C), torch.randn(N, 6)
    cross_entropy = reference.ggn(model, nn.CrossEntropyLoss(), X, torch.randint(C, (N,)))
    squared = reference.ggn(model, nn.MSELoss(), X, torch.randn(N, C))
    assert torch.linalg.matrix_rank(cross_entropy, hermitian=True, rtol=1e-11) == N * (C - 1)
    assert torch.linalg.matrix_rank(squared, hermitian=True, rtol=1e-11) == N * C


@pytest.mark.parametrize("name", ["mlp_bn", "two_conv_cnn", "weight_norm", "bn1d_ncl"])
def test_bias_before_batchnorm_has_no_curvature(name: str) -> None:
    diagonal = reference.ggn_diagonal(*BY_NAME[name].build())
    scale = max(float(d.max()) for d in diagonal.values())
    assert diagonal["0.bias"].abs().max() < 1e-25 * scale


# ------------------------------------------------------------------------------ loss Hessian


def test_loss_hessian_of_cross_entropy(float64: None) -> None:
    F, y = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    p = F.softmax(1)
    truth = torch.block_diag(*(torch.diag(q) - torch.outer(q, q) for q in p)) / 4
    torch.testing.assert_close(reference.loss_hessian(nn.CrossEntropyLoss(), F, y), truth)


def test_loss_hessian_of_squared_error(float64: None) -> None:
    F, y = torch.randn(4, 3, 2), torch.randn(4, 3, 2)
    torch.testing.assert_close(reference.loss_hessian(nn.MSELoss(), F, y), 2 * torch.eye(24) / 24)


def test_loss_hessian_of_binary_cross_entropy(float64: None) -> None:
    F, y = torch.randn(4, 3), torch.rand(4, 3)
    p = F.sigmoid().flatten()
    truth = torch.diag(p * (1 - p))
    loss_fn = nn.BCEWithLogitsLoss(reduction="sum")
    torch.testing.assert_close(reference.loss_hessian(loss_fn, F, y), truth)


def test_loss_hessian_of_a_loss_that_mixes_samples(float64: None) -> None:
    F, y = torch.randn(3, 2), torch.randn(3, 2)
    H = reference.loss_hessian(lambda F, y: (F - y).sum().square(), F, y)
    torch.testing.assert_close(H, torch.full((6, 6), 2.0))


# ------------------------------------------------------------------------- manners and errors


def state(model: nn.Module, *tensors: Tensor) -> tuple[Any, ...]:
    """Everything a caller could find changed."""
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()},
        [module.training for module in model.modules()],
        [tensor.clone() for tensor in tensors],
        torch.get_rng_state(),
    )


@pytest.mark.parametrize(
    "name", ["mlp_bn", "inplace", "no_momentum", "frozen_parameters", "dropout"]
)
def test_nothing_of_the_callers_changes(name: str) -> None:
    model, loss_fn, X, y = BY_NAME[name].build()
    model = nn.Sequential(nn.ReLU(inplace=True), model)  # in place on X itself
    before = state(model, X, y)
    reference.jacobian(model, X, seed=3)
    for oracle in (
        reference.gradient,
        reference.component_gradients,
        reference.component_ggn_diagonal,
        reference.ggn,
    ):
        oracle(model, loss_fn, X, y)
    torch.testing.assert_close(state(model, X, y), before, rtol=0, atol=0)


def test_float32_models_are_answered_in_float64() -> None:
    model, X, y = cases.mlp(4, 5, 3), torch.randn(6, 4), torch.randint(3, (6,))
    diagonal = reference.ggn_diagonal(model, nn.CrossEntropyLoss(), X, y)
    truth = reference.ggn_diagonal(model.double(), nn.CrossEntropyLoss(), X.double(), y)
    assert {d.dtype for d in diagonal.values()} == {torch.float64}
    assert_same(diagonal, truth)


def test_params_are_picked_by_name_in_the_models_order() -> None:
    model, loss_fn, X, y = BY_NAME["frozen_parameters"].build()
    everything = reference.jacobian(model, X, [name for name, _ in model.named_parameters()])
    assert list(reference.jacobian(model, X)) == ["0.bias", "1.weight", "3.weight", "3.bias"] + [
        "4.bias",
        "6.weight",
    ]
    picked = reference.jacobian(model, X, iter(["6.weight", "0.weight"]))  # one of them frozen
    assert_same(picked, {name: everything[name] for name in ("0.weight", "6.weight")}, tol=0)
    block = reference.ggn(model, loss_fn, X, y, ["3.bias", "3.weight"])
    diagonal = reference.ggn_diagonal(model, loss_fn, X, y, ["3.weight", "3.bias"])
    assert list(diagonal) == ["3.weight", "3.bias"]
    flat = torch.cat([d.flatten() for d in diagonal.values()])
    torch.testing.assert_close(block.diagonal(), flat)


def test_seed_repeats_the_random_draws() -> None:
    model, _, X, _ = BY_NAME["dropout"].build()
    first, again, other = (reference.jacobian(model, X, seed=s) for s in (1, 1, 2))
    assert_same(first, again, tol=0)
    assert (first["4.weight"] - other["4.weight"]).abs().max() > 1e-3


def test_works_on_extended_models_and_without_grad_mode() -> None:
    model, loss_fn, X, y = BY_NAME["googlenet"].build()
    truth = reference.ggn_diagonal(model, loss_fn, X, y)
    gradient = reference.gradient(model, loss_fn, X, y)
    extend(model), extend(loss_fn)
    with torch.no_grad():
        assert_same(reference.ggn_diagonal(model, loss_fn, X, y), truth, tol=0)
        assert_same(reference.gradient(model, loss_fn, X, y), gradient, tol=0)


def test_errors_say_what_is_wrong() -> None:
    model, loss_fn, X, y = BY_NAME["mlp_bn"].build()
    with pytest.raises(ValueError, match="fc.weight.*the model has"):
        reference.jacobian(model, X, ["fc.weight"])
    with pytest.raises(ValueError, match="no parameter requires gradients"):
        reference.jacobian(copy.deepcopy(model).requires_grad_(False), X)
    with pytest.raises(ValueError, match="must be a scalar.*6"):
        reference.gradient(model, nn.CrossEntropyLoss(reduction="none"), X, y)
    with pytest.raises(TypeError, match="must return one tensor.*tuple"):
        reference.jacobian(cases.Net(lambda net, x: (net.inner(x), x), inner=model), X)


def eval_net() -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """A net that BackPACK supports: BN in eval mode."""
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 5),
        nn.BatchNorm1d(5),
        nn.Sigmoid(),
        nn.Linear(5, 3),
    )
    cases.perturb(model)
    return model.eval(), nn.CrossEntropyLoss(), torch.randn(5, 2, 4, 4), torch.randint(3, (5,))


def backpacks(
    extension: Any, model: nn.Module, loss_fn: nn.Module, X: Tensor, y: Tensor, savefield: str
) -> dict[str, Tensor]:
    """BackPACK's own answer."""
    model, loss_fn = extend(copy.deepcopy(model)), extend(copy.deepcopy(loss_fn))
    with backpack(extension):
        loss_fn(model(X), y).backward()
    return {name: getattr(p, savefield).detach() for name, p in model.named_parameters()}


# ---------------------------------------------------------------------------------- the cases

VALUES_MIX = {  # batch statistics even in eval mode, or values (not derivatives) that mix
    "not_tracking",
    "not_tracking_eval",
    "bare_bn",
    "functional_bn",
    "root_functional_bn",
    "roll",  # moves samples
    "roll_before_bn",
    "detached_mean",
}


def test_case_names_are_unique() -> None:
    assert [name for name, times in Counter(case.name for case in ALL).items() if times > 1] == []


@each_case
def test_cases_are_float64_tiny_and_always_the_same(case: Case) -> None:
    (model, _, X, y), (again, _, X2, y2) = case.build(), case.build()
    torch.testing.assert_close(model.state_dict(), again.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close((X, y), (X2, y2), rtol=0, atol=0)
    assert {t.dtype for t in (*model.parameters(), X, y)} <= {torch.float64, torch.int64}
    assert sum(p.numel() for p in model.parameters()) < 1000
    assert 4 <= len(X) <= 8
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize(
    "case", [case for case in cases.DETERMINISTIC if case.name not in VALUES_MIX], ids=str
)
def test_culprits_are_the_first_to_mix_samples(case: Case) -> None:
    model, _, X, _ = case.build()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    truth = outputs(model, X)
    mixing = set()
    for n in range(len(X)):
        replaced = X.clone()
        replaced[n] = X[n - 1]
        rows = outputs(model, replaced)
        others = torch.arange(len(X)) != n
        mixing |= {call for call in truth if not rows[call][others].equal(truth[call][others])}
    first = next((name for name, call in truth if (name, call) in mixing), None)
    assert first == case.culprit


def outputs(model: nn.Module, X: Tensor) -> dict[tuple[str, int], Tensor]:
    """Every module call's output as [N, ...], in the order in which the calls return."""
    seen: dict[tuple[str, int], Tensor] = {}

    def record(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            seen[name, len(seen)] = value.detach().clone().unflatten(0, (len(X), -1))

        return hook

    handles = [m.register_forward_hook(record(n)) for n, m in model.named_modules()]
    model(X.clone())
    for handle in handles:
        handle.remove()
    return seen
