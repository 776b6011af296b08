"""A layer that only a BatchNorm takes up feels its input less the batch mean: exact, its bias exactly zero."""

from typing import Any

import pytest
import torch
from cases import Case, Net, case, labelled, mlp, padded_conv, padded_conv1d, padded_conv3d
from test_coupling import frozen
from test_exact import assert_close
from torch import Tensor, nn

from bncurv import (
    ComponentGrad,
    CouplingReport,
    DiagGGNExact,
    SqrtGGNExact,
    SumComponentGradSquared,
    curvature,
    reference,
)
from bncurv.budget import Budget
from bncurv.engine import Engine


@pytest.fixture
def centred(monkeypatch) -> list[set[str]]:
    """Names of the centred layers, one set for every engine that is made."""
    found: list[set[str]] = []
    own = Engine.__init__

    def noted(self: Engine, *args: Any, **kwargs: Any) -> None:
        own(self, *args, **kwargs)
        found.append({self.trace.sites[i].call.name for i in self.products.centred})

    monkeypatch.setattr(Engine, "__init__", noted)
    return found


def assert_exact(one: Case, **options: Any) -> Any:
    model, loss_fn, X, y = one.build()
    res = curvature(model, loss_fn, (X, y), DiagGGNExact(), ComponentGrad(), method="coupled", **options)
    assert_close(res.diag_ggn_exact, reference.ggn_diagonal(*one.build()))
    assert_close(res.grad_component, reference.component_gradients(*one.build()))
    return res


# ------------------------------------------------------------------------------------- which are


def convolutions(conv: nn.Module, bn: nn.Module) -> nn.Module:
    """The layer between two BNs, so that statistics above and below it play their part."""
    kind, width = type(conv), bn.num_features
    return nn.Sequential(
        *(kind(2, 4, 1), type(bn)(4), nn.Tanh()),
        *(conv, bn, nn.Tanh(), kind(width, 3, 1), type(bn)(3), nn.Tanh()),
        *(nn.Flatten(), nn.LazyLinear(3)),
    )


def conv_case(name: str, conv: Any, bn: Any, *shape: int) -> Case:
    def model() -> nn.Module:
        net = convolutions(conv(), bn(4))
        net.eval()(torch.zeros(2, *shape[1:]))  # the last layer's width
        return net.train()

    return case(name, model, labelled(*shape))


CONVS = [
    conv_case("grouped", lambda: nn.Conv2d(4, 4, 3, groups=2), nn.BatchNorm2d, 4, 2, 4, 4),
    conv_case("depthwise", lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1), nn.BatchNorm2d, 4, 2, 4, 4),
    conv_case("strided", lambda: nn.Conv2d(4, 4, 3, stride=(2, 1), padding=(1, 2)), nn.BatchNorm2d, 4, 2, 5, 4),
    conv_case("same", lambda: nn.Conv2d(4, 4, (2, 4), padding="same", dilation=(2, 1)), nn.BatchNorm2d, 4, 2, 5, 5),
    conv_case("valid", lambda: nn.Conv2d(4, 4, 2, padding="valid", bias=False), nn.BatchNorm2d, 4, 2, 4, 4),
    conv_case("conv1d", lambda: nn.Conv1d(4, 4, 3, groups=2, stride=2, padding=2), nn.BatchNorm1d, 5, 2, 7),
    conv_case("conv3d", lambda: nn.Conv3d(4, 4, 2, groups=2, stride=(1, 2, 1)), nn.BatchNorm3d, 4, 2, 3, 4, 3),
    conv_case("conv3d_same", lambda: nn.Conv3d(4, 4, (1, 2, 3), padding="same"), nn.BatchNorm3d, 4, 2, 2, 3, 3),
]
DIRECT = {"0", "3", "6"}
PADDED = [
    *(case(f"2d_{m}", lambda m=m: padded_conv(m), labelled(4, 2, 5, 6)) for m in ("zeros", "circular", "reflect")),
    case("1d_circular", lambda: padded_conv1d("circular"), labelled(5, 2, 7)),
    case("3d_replicate", lambda: padded_conv3d("replicate"), labelled(4, 2, 3, 4, 3)),
]


@pytest.mark.parametrize("chunk_size", [None, 1, 3])
@pytest.mark.parametrize("one", CONVS, ids=str)
def test_convolutions(one, chunk_size, centred):
    assert_exact(one, chunk_size=chunk_size)
    assert centred == [DIRECT]


@pytest.mark.parametrize("one", PADDED, ids=str)
def test_padding_modes(one, centred):
    """Padded in front of the layer: the windows' mean is that of the padded input."""
    assert_exact(one)
    assert centred == [{n for n, m in one.model().named_modules() if isinstance(m, nn.modules.conv._ConvNd)}]


@pytest.mark.parametrize("room", [0, 2**20])
@pytest.mark.parametrize("one", CONVS[:3], ids=str)
def test_inputs_kept_or_not(one, room, monkeypatch):
    """Centred operands are made again for every use where they take too much memory."""
    monkeypatch.setattr("bncurv.engine.USUAL", Budget(right=room, row=room))
    assert_exact(one)


# ------------------------------------------------------------------------------- a bias is zero


BIASED = [
    (case("mlp", lambda: mlp(4, 6, 5, 3), labelled(7, 4)), {"0.bias", "3.bias"}),
    *((one, {"0.bias", "3.bias", "6.bias"} - ({"3.bias"} if one.name == "valid" else set())) for one in CONVS),
]


@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("one", "biases"), BIASED, ids=lambda v: str(v) if isinstance(v, Case) else "")
def test_bias_before_a_batch_norm_is_zero(one, biases, dtype, chunk_size):
    """Not a matter of rounding: BN takes it off again."""
    model, loss_fn, X, y = one.build()
    wanted = DiagGGNExact(), ComponentGrad(), SumComponentGradSquared(), SqrtGGNExact()
    batch = X.to(dtype), y
    res = curvature(model.to(dtype), loss_fn, batch, *wanted, method="coupled", chunk_size=chunk_size)
    squares = curvature(model, loss_fn, batch, DiagGGNExact(), method="coupled", chunk_size=chunk_size)
    assert biases <= res.diag_ggn_exact.keys()
    for q in wanted:
        for name, t in getattr(res, q.field).items():
            assert torch.equal(t, torch.zeros_like(t)) == (name in biases), (q.field, name)
    for name, t in squares.diag_ggn_exact.items():
        assert torch.equal(t, torch.zeros_like(t)) == (name in biases), name


def test_constant_feature_is_zero():
    """Of a feature that is the same in all samples nothing reaches the output, whatever its size."""
    model, loss_fn, X, y = BIASED[0][0].build()
    X[:, 1] = 2.0**10
    res = curvature(model, loss_fn, (X, y), DiagGGNExact(), method="coupled")
    assert torch.equal(res.diag_ggn_exact["0.weight"][:, 1], torch.zeros(6).double())
    assert_close(res.diag_ggn_exact, reference.ggn_diagonal(model, loss_fn, X, y))


@pytest.mark.parametrize("rows", [False, True])
def test_near_constant_feature_in_float32(rows):
    """x - x̄ is formed before it is multiplied: 1e-7 where it costs 1e-4 to take the mean's part off afterwards."""
    torch.manual_seed(1)
    model, X, y = mlp(2, 4, 3), torch.randn(16, 2), torch.randint(3, (16,))
    with torch.no_grad():
        model[0].weight[:, 0] = 0  # the outputs, and all behind them, are as accurate as without the feature
        X[:, 0] = 2.0**12 + X[:, 0].mul(64).round() / 2**6  # the mean over the batch is exact too
    also = (SqrtGGNExact(),) if rows else ()
    got = curvature(model, nn.CrossEntropyLoss(), (X, y), DiagGGNExact(), *also, method="coupled").diag_ggn_exact
    want = reference.ggn_diagonal(model, nn.CrossEntropyLoss(), X, y)
    assert float((got["0.weight"] - want["0.weight"])[:, 0].norm()) <= 2e-6 * float(want["0.weight"][:, 0].norm())


# ------------------------------------------------------------------------------ which are not


def skip(how: str) -> Any:
    """A layer whose output goes into a BN and elsewhere."""

    def forward(net: Any, x: Tensor) -> Tensor:
        z = net.first(x)
        y = net.bn(z).tanh()
        if how == "add":
            y = y + z
        elif how == "gate":
            y = y * z.sigmoid()
        elif how == "cat":
            y = y + torch.cat([z[:, 2:], z[:, :2]], 1)
        elif how == "other_bn":
            y = y - net.other(z).relu()
        elif how == "same_bn":
            y = y * net.bn(z)
        elif how == "into_both":
            y = y + net.other(net.second(z))
        elif how == "late":
            return net.out(net.other(net.second(y)).tanh()) + z[:, :3]
        return net.out(net.other(net.second(y)).tanh())

    def model() -> nn.Module:
        return Net(
            forward,
            **{"first": nn.Linear(4, 5), "bn": nn.BatchNorm1d(5), "second": nn.Linear(5, 5)},
            **{"other": nn.BatchNorm1d(5), "out": nn.Linear(5, 3)},
        )

    return model


@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize("how", ["add", "gate", "cat", "other_bn", "same_bn", "into_both", "late"])
def test_taken_up_elsewhere(how, chunk_size, centred):
    """One more way out of the layer that is not through its BN: both moments count, and so does the bias."""
    one = case(how, skip(how), labelled(7, 4))
    res = assert_exact(one, chunk_size=chunk_size)
    [names] = centred
    assert names == {"second"}
    assert not bool((res.grad_component["first.bias"] == 0).all()) or how in ("other_bn", "same_bn")


def flat(net: Any, x: Tensor) -> Tensor:
    return net.out(net.bn(net.first(x).flatten(0, 1)).tanh().unflatten(0, x.shape[:2]).mean(1))


def scaled(net: Any, x: Tensor) -> Tensor:
    return net.out(net.bn(2 * net.first(x)).tanh())


def moved(net: Any, x: Tensor) -> Tensor:
    return net.out(net.bn(net.first(x).add_(1.0)).tanh())


def evaluated(net: Any, x: Tensor) -> Tensor:
    net.bn.eval()
    return net.out(net.bn(net.first(x)).tanh())


@pytest.mark.parametrize("forward", [flat, scaled, moved, evaluated])
def test_not_directly_behind(forward, centred):
    shape = (6, 3, 4) if forward is flat else (6, 4)
    layers = {"first": nn.Linear, "bn": nn.BatchNorm1d, "out": nn.Linear}
    sizes = {"first": (4, 5), "bn": (5,), "out": (5, 3)}
    one = case(
        "one", lambda: Net(forward, **{name: kind(*sizes[name]) for name, kind in layers.items()}), labelled(*shape)
    )
    assert_exact(one)
    assert centred == [set()]


def test_the_output_itself_is_taken_up(centred):
    """The model returns the BN's input beside its output."""

    def forward(net: Any, x: Tensor) -> Tensor:
        z = net.first(x)
        return torch.cat([z, net.bn(z)], 1)

    assert_exact(case("beside", lambda: Net(forward, first=nn.Linear(4, 2), bn=nn.BatchNorm1d(2)), labelled(6, 4, C=4)))
    assert centred == [set()]


# ------------------------------------------------------------- where the own part is asked for


def conv_net() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Tanh(), nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4)),
        *(nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)),
    )


OWN = [BIASED[0][0], case("conv", conv_net, labelled(5, 2, 4, 4))]


@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize("kind", ["weight", "bias"])
@pytest.mark.parametrize("one", OWN, ids=str)
def test_report_centres_nothing(one, kind, chunk_size, centred):
    """The share of the statistics needs the part without them: uncentred, with a bias that counts."""
    model, loss_fn, X, y = one.build()
    names = [n for n, p in model.named_parameters() if n.endswith(kind)]
    asked = CouplingReport(), DiagGGNExact()
    res = curvature(model, loss_fn, (X, y), *asked, params=names, chunk_size=chunk_size)
    assert centred == [set()]
    own = reference.ggn_diagonal(frozen(model, X), loss_fn, X, y, names)
    full = reference.ggn_diagonal(model, loss_fn, X, y, names)
    assert_close(res.diag_ggn_exact, full)
    for name in names:
        entry = res.coupling[name.rpartition(".")[0]]
        assert entry.own_trace == pytest.approx(float(own[name].sum()), rel=1e-9)
        assert entry.full_trace == pytest.approx(float(full[name].sum()), rel=1e-9, abs=1e-14)
    if kind == "bias":
        assert res.coupling["0"].full_trace < 1e-14 < 1e-4 < res.coupling["0"].own_trace


@pytest.mark.parametrize("one", OWN, ids=str)
def test_truncation_centres_nothing(one, centred):
    """The leading directions are those of both moments together."""
    model, loss_fn, X, y = one.build()
    rough = curvature(model, loss_fn, (X, y), DiagGGNExact(), method="coupled", tol=1e-8)
    assert centred == [set()]
    want = reference.ggn_diagonal(model, loss_fn, X, y)
    whole = max(float(t.max()) for t in want.values())
    for name, expected in want.items():
        assert float((rough.diag_ggn_exact[name] - expected).abs().max()) <= 1e-6 * whole, name
    curvature(model, loss_fn, (X, y), DiagGGNExact(), method="coupled")
    assert centred[1] == {"0", "3"}
