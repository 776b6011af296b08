"""All other quantities against the oracle's Jacobian on the model cases, and BackPACK where there is no coupling."""

import gc
import warnings
import weakref

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


class Inside(bncurv.quantities.Quantity):
    """Does something in the middle of a call."""

    field = "inside"

    def __init__(self, action):
        super().__init__()
        self.action = action

    def add(self, state, key, rows):
        action, self.action = self.action, None
        if action:
            action()


@pytest.mark.parametrize("free", [False, True])
def test_one_quantity_in_two_calls_at_once(free):
    """It is a specification: a call inside a call shares nothing with it."""
    outer, inner = (next(c for c in MODELS if c.name == name).build() for name in ("mlp_bn", "two_bns"))
    quantities = bncurv.LowRankGGN(top=2, matrix_free=free), bncurv.ComponentVariance(), bncurv.DiagGGNExact()
    want = curvature(*outer[:2], outer[2:], *quantities)
    nested = Inside(lambda: curvature(*inner[:2], inner[2:], *quantities))
    got = curvature(*outer[:2], outer[2:], *quantities, nested)
    assert nested.action is None
    assert_close(got.variance, want.variance), assert_close(got.diag_ggn_exact, want.diag_ggn_exact)
    assert torch.allclose(got.ggn.gradient, want.ggn.gradient, rtol=1e-12)
    assert torch.allclose(got.ggn.eigenvalues, want.ggn.eigenvalues, rtol=1e-9)


@pytest.mark.parametrize("free", [False, True])
def test_a_failed_call_leaves_nothing_on_a_quantity(free):
    model, loss_fn, X, y = next(c for c in MODELS if c.name == "mlp_bn").build()
    graphs: weakref.WeakSet = weakref.WeakSet()
    model.register_forward_hook(lambda module, args, out: graphs.add(out))
    quantities = bncurv.LowRankGGN(top=2, matrix_free=free), bncurv.DiagGGNMC(2), bncurv.ComponentVariance()
    before = [dict(vars(q)) for q in quantities]
    with pytest.raises(IndexError):
        curvature(model, loss_fn, (X, y), *quantities, Inside(lambda: [][0]))
    gc.collect()
    assert [vars(q) for q in quantities] == before and not graphs


@pytest.mark.parametrize("method, tol", [("dense", 0.0), ("coupled", 0.0), ("coupled", 0.1)])
def test_another_default_device(method, tol):
    """New tensors go to the model's device, whatever is the default; so do all numbers of the results."""
    model, loss_fn, X, y = next(c for c in MODELS if c.name == "mlp_bn").build()
    batches, options = [(X[:3], y[:3]), (X[3:], y[3:])], {"method": method, "tol": tol}
    everything = [bncurv.ComponentGrad(), bncurv.DiagGGNExact(), bncurv.CouplingReport(), *(q() for q in QUANTITIES)]
    lows = bncurv.LowRankGGN(), bncurv.LowRankGGN(top=2, matrix_free=True)
    want = curvature(model, loss_fn, batches, *everything, **options)
    with torch.device("meta"):
        got = curvature(model, loss_fn, batches, *everything, **options)
        spectra = [curvature(model, loss_fn, batches, low, **options).ggn.eigenvalues[:2] for low in lows]
    for field in ("grad_component", "diag_ggn_exact", "variance", "sqrt_ggn_exact"):
        assert all(torch.equal(getattr(got, field)[n], t) for n, t in getattr(want, field).items())
    assert {t.device.type for t in spectra} == {"cpu"}


def one_image(head):
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 2), nn.BatchNorm2d(2), *head
    model = nn.Sequential(*layers).double()
    nn.init.uniform_(model[1].weight), nn.init.normal_(model[1].bias)
    return model, torch.randn(1, 2, 5, 5).double()


@pytest.mark.parametrize("method", ["coupled", "dense"])
@pytest.mark.parametrize("head", ["pixels", "classes"])
def test_one_image(head, method):
    """N = 1: positions make the statistics, and nothing is there to be coupled but the sample with itself."""
    model, X = one_image([] if head == "pixels" else [nn.Tanh(), nn.Flatten(), nn.Linear(18, 3)])
    y = torch.randint(2, (1, 3, 3) if head == "pixels" else (1,))
    res = curvature(model, nn.CrossEntropyLoss(), (X, y), bncurv.DiagGGNExact(), bncurv.ComponentGrad(), method=method)
    whole = reference.ggn_diagonal(model, nn.CrossEntropyLoss(), X, y)
    assert_close(res.diag_ggn_exact, whole)
    gradient = reference.gradient(model, nn.CrossEntropyLoss(), X, y)
    assert_close(res.grad_component, {n: t[None] for n, t in gradient.items()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradient_of_a_saturated_batch(dtype):
    """A label of probability zero: its gradient is no combination of the factor's columns, which vanish there."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).to(dtype)
    with torch.no_grad():
        model[2].bias[1] -= 900
    X, y, loss_fn = torch.randn(6, 4).to(dtype), torch.tensor([0, 1, 2, 0, 1, 2]), nn.CrossEntropyLoss()
    for quantity in (bncurv.LowRankGGN(), bncurv.LowRankGGN(top=1, matrix_free=True)):
        G = curvature(model, loss_fn, (X, y), quantity, method="coupled").ggn
        want = torch.cat([t.flatten() for t in reference.gradient(model, loss_fn, X, y).values()])
        assert float((G.gradient - want).norm() / want.norm()) < 100 * torch.finfo(dtype).eps


@pytest.mark.parametrize("arguments", [{"mc_samples": 0}, {"mc_samples": 1.5}, {"kind": "gauss"}])
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match=f"{next(iter(arguments))}=.*expected"):
        bncurv.DiagGGNMC(**arguments)


@pytest.mark.parametrize(
    "quantity, text",
    [
        (bncurv.DiagGGNExact(), "DiagGGNExact()"),
        (bncurv.DiagGGNMC(3, generator=torch.Generator()), "DiagGGNMC(mc_samples=3)"),
        (bncurv.DiagGGNMC(rtol=0.1, confidence=0.9), "DiagGGNMC(rtol=0.1, confidence=0.9)"),
        (bncurv.LowRankGGN(top=3, groups="layer"), "LowRankGGN(top=3, groups='layer')"),
        (bncurv.InfluenceProjection({"a": torch.zeros(2)}), "InfluenceProjection()"),
    ],
    ids=str,
)
def test_a_quantity_reads_as_it_was_made(quantity, text):
    """What was given, but for tensors and generators."""
    assert repr(quantity) == text
