"""All other quantities against the oracle's Jacobian on the model cases, and BackPACK where there is no coupling."""

import warnings

import pytest
import torch
from backpack import backpack
from backpack import extend as backpack_extend
from backpack import extensions as bp
from cases import ARCHITECTURES, LOSSES, MODELS
from test_exact import assert_close, quiet
from torch import nn

import bncurv
from bncurv import SlowPathWarning, curvature, reference

EXACT = [*MODELS, *ARCHITECTURES, *LOSSES]
QUANTITIES = [
    bncurv.ComponentL2Grad,
    bncurv.SumComponentGradSquared,
    bncurv.ComponentVariance,
    bncurv.ComponentDiagGGNExact,
    bncurv.SqrtGGNExact,
]


def expected_fields(case):
    g = reference.component_gradients(*case.build())
    return {
        "l2_component": {n: t.reshape(len(t), -1).square().sum(1) for n, t in g.items()},
        "sum_grad_squared": {n: t.square().sum(0) for n, t in g.items()},
        "variance": {n: t.var(0, correction=0) for n, t in g.items()},
        "diag_ggn_exact_component": reference.component_ggn_diagonal(*case.build()),
    }


def flat_rows(fields):
    return torch.cat([t.reshape(t.shape[0] * t.shape[1], -1) for t in fields.values()], 1)


@pytest.mark.parametrize("method", ["coupled", "dense"])
@pytest.mark.parametrize("case", EXACT, ids=str)
def test_curvature(case, method):
    model, loss_fn, X, y = case.build()
    with quiet(case) if method != "dense" else warnings.catch_warnings():
        res = curvature(model, loss_fn, (X, y), *(q() for q in QUANTITIES), method=method)
    for field, expected in expected_fields(case).items():
        assert_close(getattr(res, field), expected)
    V = flat_rows(res.sqrt_ggn_exact)
    width = loss_fn and model(X)[0].numel()
    assert all(t.shape[:2] == (width, len(X)) for t in res.sqrt_ggn_exact.values())
    G = reference.ggn(*case.build())
    assert float((V.T @ V - G).norm()) <= 1e-10 * float(G.norm())


@pytest.mark.parametrize("case", [c for c in EXACT if c.name in ("residual_cnn", "unet", "mlp_bn", "dcgan")], ids=str)
def test_extend(case):
    model, loss_fn, X, y = case.build()
    bncurv.extend(model), bncurv.extend(loss_fn)
    with backpack(*(q() for q in QUANTITIES)):
        loss_fn(model(X), y).backward()
    named = dict(model.named_parameters())
    for field, expected in expected_fields(case).items():
        assert_close({n: getattr(named[n], field) for n in expected}, expected)


def plain_net(batch_norm: bool) -> nn.Module:
    norm = [nn.BatchNorm1d(5).eval()] if batch_norm else []
    return nn.Sequential(nn.Linear(6, 5), *norm, nn.Sigmoid(), nn.Linear(5, 4)).double()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss, nn.MSELoss])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_equals_backpack_without_coupling(batch_norm, loss, reduction):
    torch.manual_seed(0)
    model, loss_fn, X = plain_net(batch_norm), loss(reduction=reduction), torch.randn(7, 6).double()
    y = torch.randint(4, (7,)) if loss is nn.CrossEntropyLoss else torch.randn(7, 4).double()
    pairs = {
        "grad_component": "grad_batch", "l2_component": "batch_l2", "sum_grad_squared": "sum_grad_squared",
        "variance": "variance", "diag_ggn_exact": "diag_ggn_exact",
        "diag_ggn_exact_component": "diag_ggn_exact_batch",
    }  # fmt: skip
    ours = [bncurv.ComponentGrad(), bncurv.DiagGGNExact(), *(q() for q in QUANTITIES)]
    res = curvature(model, loss_fn, (X, y), *ours)

    backpack_extend(model), backpack_extend(loss_fn)
    theirs = [bp.BatchGrad(), bp.BatchL2Grad(), bp.SumGradSquared(), bp.DiagGGNExact(), bp.BatchDiagGGNExact()]
    theirs += [bp.SqrtGGNExact()] + ([] if batch_norm else [bp.Variance()])
    with backpack(*theirs):
        loss_fn(model(X), y).backward()
    for name, p in model.named_parameters():
        if batch_norm and name.startswith("1"):
            continue  # BackPACK's eval-mode BatchNorm has fewer extensions
        for mine, field in pairs.items():
            if hasattr(p, field):
                assert torch.allclose(getattr(res, mine)[name], getattr(p, field), rtol=1e-10, atol=1e-15), (name, mine)
        V, W = res.sqrt_ggn_exact[name].flatten(0, 1).flatten(1), p.sqrt_ggn_exact.flatten(0, 1).flatten(1)
        assert torch.allclose(V.T @ V, W.T @ W, rtol=1e-10, atol=1e-14)


def test_variance_does_not_cancel():
    torch.manual_seed(0)
    model = nn.Linear(3, 1).double()
    with torch.no_grad():
        model.bias += 1e8  # all components' gradients nearly equal
    X, y = torch.randn(9, 3).double(), torch.randn(9, 1).double()
    res = curvature(model, nn.MSELoss(), (X, y), bncurv.ComponentVariance(), chunk_size=2)
    g = 2 * (model(X) - y)[:, 0].detach() / 9
    assert torch.allclose(res.variance["bias"], g.var(correction=0), rtol=1e-6)


@pytest.mark.parametrize("kind", ["rademacher", "labels"])
@pytest.mark.parametrize(
    "case", [c for c in EXACT if c.name in ("mlp_bn", "dcgan", "bce_pos_weight", "segmentation")], ids=str
)
def test_mc_is_unbiased(case, kind):
    model, loss_fn, X, y = case.build()
    draws = 4000
    generator = torch.Generator().manual_seed(1)
    whole = bncurv.DiagGGNMC(draws, kind, generator)
    each = bncurv.ComponentDiagGGNMC(draws, kind, generator)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SlowPathWarning)
        res = curvature(model, loss_fn, (X, y), whole, each)
    exact = reference.ggn_diagonal(model, loss_fn, X, y)
    parts = reference.component_ggn_diagonal(model, loss_fn, X, y)
    total = torch.cat([t.flatten() for t in exact.values()])
    for name, want in exact.items():
        z = (res.diag_ggn_mc[name] - want) / (res.diag_ggn_mc_stderr[name] + 1e-9 * total.max())
        assert float(z.abs().max()) < 5, name
        error = (res.diag_ggn_mc_component[name] - parts[name]).abs().sum(0)
        assert bool((error <= 0.3 * want + 1e-9 * total.max()).all()), name


def test_rademacher_has_less_variance_and_the_error_is_honest():
    case = next(c for c in MODELS if c.name == "residual_cnn")
    model, loss_fn, X, y = case.build()
    exact = torch.cat([t.flatten() for t in reference.ggn_diagonal(model, loss_fn, X, y).values()])
    error, claimed = {}, {}
    for kind in ("rademacher", "labels"):
        res = curvature(model, loss_fn, (X, y), bncurv.DiagGGNMC(3000, kind, torch.Generator().manual_seed(0)))
        got = torch.cat([t.flatten() for t in res.diag_ggn_mc.values()])
        stderr = torch.cat([t.flatten() for t in res.diag_ggn_mc_stderr.values()])
        error[kind], claimed[kind] = float((got - exact).square().mean().sqrt()), float(stderr.square().mean().sqrt())
        assert 0.5 < error[kind] / claimed[kind] < 2
    assert claimed["rademacher"] < claimed["labels"]


def test_sqrt_mc_sums_to_whole_batch_draws():
    case = next(c for c in MODELS if c.name == "residual_cnn")
    model, loss_fn, X, y = case.build()
    rows = curvature(model, loss_fn, (X, y), bncurv.SqrtGGNMC(6, generator=torch.Generator().manual_seed(3)))
    draws = curvature(model, loss_fn, (X, y), bncurv.DiagGGNMC(6, generator=torch.Generator().manual_seed(3)))
    squares = {n: t.sum(1).square().sum(0) for n, t in rows.sqrt_ggn_mc.items()}
    assert_close(squares, draws.diag_ggn_mc)


def test_generator_reproduces_and_leaves_the_global_state():
    case = next(c for c in MODELS if c.name == "residual_cnn")
    model, loss_fn, X, y = case.build()
    before = torch.get_rng_state()
    one, two = (
        curvature(model, loss_fn, (X, y), bncurv.DiagGGNMC(2, generator=torch.Generator().manual_seed(5)))
        for _ in range(2)
    )
    assert all(torch.equal(one.diag_ggn_mc[n], t) for n, t in two.diag_ggn_mc.items())
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("arguments", [{"mc_samples": 0}, {"mc_samples": 1.5}, {"kind": "gauss"}])
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match=f"{next(iter(arguments))}=.*expected"):
        bncurv.DiagGGNMC(**arguments)
