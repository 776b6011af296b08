"""Every case, every way, both gestures: exact in float64 against the dense oracle on the whole batch."""

import warnings

import pytest
import torch
from backpack import backpack
from cases import ARCHITECTURES, COUPLED_UNKNOWN, LOSSES, MODELS, Case

from bncurv import ComponentGrad, DiagGGNExact, SlowPathWarning, curvature, extend, reference

EXACT = [*MODELS, *ARCHITECTURES, *LOSSES]


def assert_close(got, want, tolerance=1e-10):
    """Relative per tensor; tensors that are zero by symmetry are measured on the scale of the whole result."""
    assert got.keys() == want.keys()
    whole = max(float(t.abs().max()) for t in want.values())
    for name, expected in want.items():
        assert got[name].shape == expected.shape, name
        error = float((got[name] - expected).norm())
        assert error <= tolerance * float(expected.norm()) + 1e-14 * whole * expected.numel() ** 0.5, (name, error)


def quiet(case: Case):
    """Expect the slow-path warning where the case says so, and no other."""
    if case.fallback:
        return pytest.warns(SlowPathWarning)
    return warnings.catch_warnings()


@pytest.fixture(scope="module")
def oracle():
    """The oracle's answers, computed once per case."""
    known = {}

    def answers(case):
        if case.name not in known:
            built = case.build()
            known[case.name] = reference.ggn_diagonal(*built), reference.component_gradients(*built)
        return known[case.name]

    return answers


@pytest.mark.parametrize("method", ["coupled", "dense", "auto"])
@pytest.mark.parametrize("case", EXACT, ids=str)
def test_curvature(case, method, oracle):
    model, loss_fn, X, y = case.build()
    with quiet(case) if method != "dense" else warnings.catch_warnings():
        if not case.fallback:
            warnings.simplefilter("error", SlowPathWarning)
        res = curvature(model, loss_fn, (X, y), DiagGGNExact(), ComponentGrad(), method=method)
    diagonal, components = oracle(case)
    assert_close(res.diag_ggn_exact, diagonal)
    assert_close(res.grad_component, components)
    assert all(bool((t >= 0).all()) for t in res.diag_ggn_exact.values())


@pytest.mark.parametrize("case", EXACT, ids=str)
def test_extend(case, oracle):
    model, loss_fn, X, y = case.build()
    plain = [p.grad for p in model.parameters()]
    loss_fn(model(X), y).backward()
    plain = [p.grad for p in model.parameters()]

    model, loss_fn, X, y = case.build()
    extend(model), extend(loss_fn)
    with quiet(case), backpack(DiagGGNExact(), ComponentGrad()):
        loss_fn(model(X), y).backward()
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    diagonal, components = oracle(case)
    assert_close({n: p.diag_ggn_exact for n, p in named.items()}, diagonal)
    assert_close({n: p.grad_component for n, p in named.items()}, components)
    for p, expected in zip(model.parameters(), plain, strict=True):
        assert p.grad is None if expected is None else torch.equal(p.grad, expected)


@pytest.mark.parametrize("method", ["coupled", "dense"])
@pytest.mark.parametrize("chunk_size", [1, 3])
@pytest.mark.parametrize(
    "case", [c for c in EXACT if c.name in ("residual_cnn", "unet", "segmentation", "conv3d")], ids=str
)
def test_chunk_size(case, method, chunk_size, oracle):
    model, loss_fn, X, y = case.build()
    res = curvature(model, loss_fn, (X, y), DiagGGNExact(), ComponentGrad(), method=method, chunk_size=chunk_size)
    assert_close(res.diag_ggn_exact, oracle(case)[0])
    assert_close(res.grad_component, oracle(case)[1])


@pytest.mark.parametrize("case", COUPLED_UNKNOWN, ids=str)
def test_unknown_coupling(case, oracle):
    model, loss_fn, X, y = case.build()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SlowPathWarning)
        res = curvature(model, loss_fn, (X, y), DiagGGNExact(), ComponentGrad())
    assert_close(res.diag_ggn_exact, oracle(case)[0])
    assert_close(res.grad_component, oracle(case)[1])
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match="method='coupled' does not apply") as error:
        warnings.simplefilter("ignore", SlowPathWarning)
        curvature(model, loss_fn, (X, y), DiagGGNExact(), method="coupled")
    assert f"'{case.culprit or type(model).__name__}'" in str(error.value)


@pytest.mark.parametrize("case", ARCHITECTURES, ids=str)
def test_float32(case, oracle):
    model, loss_fn, X, y = case.build()
    model, X = model.float(), X.float()
    y = y.float() if y.is_floating_point() else y
    for method in ("coupled", "dense"):
        res = curvature(model, loss_fn, (X, y), DiagGGNExact(), ComponentGrad(), method=method)
        for got, want in zip((res.diag_ggn_exact, res.grad_component), oracle(case), strict=True):
            whole = max(float(t.abs().max()) for t in want.values())
            for name, expected in want.items():
                error = float((got[name] - expected).norm())
                assert error <= 1e-4 * float(expected.norm()) + 1e-6 * whole * expected.numel() ** 0.5, (method, name)
