"""What the README says of wrappers, fallbacks and limits, beyond `test_exact.py`."""

import warnings

import pytest
import torch
from backpack import backpack
from cases import EXOTIC, RANDOM, Net
from test_exact import assert_close
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bncurv
from bncurv import ComponentGrad, DiagGGNExact, SlowPathWarning, curvature, reference


def mlp() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 4), nn.BatchNorm1d(4)
        return nn.Sequential(*layers, nn.Tanh(), nn.Linear(4, 3)).double()


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(12, 4, generator=generator).double(), torch.arange(12) % 3


def assert_exact(model: nn.Module, method: str, plain: nn.Module | None = None) -> bncurv.Results:
    """The model's diagonal and components are those of ``plain`` (default: of itself)."""
    plain, loss_fn = plain or model, nn.CrossEntropyLoss()
    quantities = DiagGGNExact(), ComponentGrad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = curvature(model, loss_fn, batch(), *quantities, method=method)
    names = [name for name, _ in plain.named_parameters()]
    for field, oracle in (
        (result.diag_ggn_exact, reference.ggn_diagonal),
        (result.grad_component, reference.component_gradients),
    ):
        expected = oracle(plain, loss_fn, *batch())
        assert_close(dict(zip(names, field.values(), strict=True)), expected)
    return result


@pytest.mark.parametrize("method", ["coupled", "dense", "auto"])
@pytest.mark.parametrize("case", [*EXOTIC, *RANDOM], ids=str)
def test_beyond_the_first_list(case, method):
    model, loss_fn, X, y = case.build()
    torch.manual_seed(5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quantities = DiagGGNExact(), ComponentGrad()
        result = curvature(model, loss_fn, (X, y), *quantities, method=method)
    slow = [w for w in caught if issubclass(w.category, SlowPathWarning)]
    assert bool(slow) == (case.fallback and method != "dense")
    assert_close(result.diag_ggn_exact, reference.ggn_diagonal(model, loss_fn, X, y, seed=5))
    components = reference.component_gradients(model, loss_fn, X, y, seed=5)
    assert_close(result.grad_component, components)


@pytest.mark.parametrize("wrap", [nn.DataParallel, nn.SyncBatchNorm.convert_sync_batchnorm], ids=["dp", "sync"])
def test_wrapped(wrap):
    assert assert_exact(wrap(mlp()), "coupled", mlp()).method == "coupled"


# ---------------------------------------------------------------------- compiled and scripted


@pytest.mark.parametrize("way", ["torch.compile", "module.compile", "child"])
def test_compiled_modules_run_eagerly(way):
    model = mlp()
    if way == "torch.compile":
        model = torch.compile(model, backend="eager")
    elif way == "module.compile":
        model.compile(backend="eager")
    else:
        model[4] = torch.compile(model[4], backend="eager")
    assert assert_exact(model, "coupled", mlp()).method == "coupled"


@pytest.mark.parametrize("order", ["extend, then compile", "compile, then extend"])
def test_compiled_and_extended(order):
    model, loss_fn = mlp(), bncurv.extend(nn.CrossEntropyLoss())
    if order.startswith("extend"):
        model = torch.compile(bncurv.extend(model), backend="eager")
    else:
        model = bncurv.extend(torch.compile(model, backend="eager"))
    X, y = batch()
    with backpack(DiagGGNExact()):
        loss_fn(model(X), y).backward()
    expected = reference.ggn_diagonal(mlp(), loss_fn, X, y)
    got = [p.diag_ggn_exact for p in model.parameters()]
    assert_close(dict(zip(expected, got, strict=True)), expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("part", ["linear", "batch_norm", "whole", "traced"])
def test_scripted_modules_go_the_slow_way(part):
    model = mlp()
    if part == "whole":
        model = torch.jit.script(model)
    elif part == "traced":
        model = torch.jit.trace(model, batch()[0], check_trace=False)
    else:
        i = {"linear": 3, "batch_norm": 4}[part]
        model[i] = torch.jit.script(model[i])
    assert_exact(model, "auto", mlp())
    with pytest.warns(SlowPathWarning, match="No parameter product"):
        curvature(model, nn.CrossEntropyLoss(), batch(), DiagGGNExact())


# -------------------------------------------------------------------------------- checkpoints


def checkpointed(reentrant: bool) -> nn.Module:
    """A checkpoint around a part with a BatchNorm."""

    def forward(net: Net, x: Tensor) -> Tensor:
        return net.out(checkpoint(net.body, net.stem(x), use_reentrant=reentrant))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        body = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh())
        net = Net(forward, stem=nn.Linear(4, 5), body=body, out=nn.Linear(6, 3))
        return net.double()


def test_checkpointed_batch_norm_goes_the_dense_way():
    assert assert_exact(checkpointed(False), "auto").method == "dense"
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match="module 'body.1'"):
        warnings.simplefilter("ignore", SlowPathWarning)
        curvature(checkpointed(False), nn.CrossEntropyLoss(), batch(), DiagGGNExact(), method="coupled")


def test_extended_model_with_checkpointed_batch_norm_trains():
    model, loss_fn, (X, y) = bncurv.extend(checkpointed(False)), nn.CrossEntropyLoss(), batch()
    loss_fn(model(X), y).backward()
    expected = reference.gradient(checkpointed(False), loss_fn, X, y)
    assert_close({n: p.grad for n, p in model.named_parameters()}, expected)


def test_reentrant_checkpoint_is_refused():
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        curvature(checkpointed(True), nn.CrossEntropyLoss(), batch(), DiagGGNExact())


# ---------------------------------------------------------------------------- double backward


def hessian_of_gradient_norm(model: nn.Module) -> list[Tensor]:
    X, y = batch()
    params = list(model.parameters())
    loss = nn.functional.cross_entropy(model(X), y)
    grads = torch.autograd.grad(loss, params, create_graph=True)
    return list(torch.autograd.grad(sum(g.square().sum() for g in grads), params))


def test_double_backward_through_an_extended_model():
    extended = hessian_of_gradient_norm(bncurv.extend(mlp()))
    for got, want in zip(extended, hessian_of_gradient_norm(mlp()), strict=True):
        torch.testing.assert_close(got, want)
