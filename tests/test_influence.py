"""Influence gradients against their definition: weighted BatchNorm from primitives, differentiated twice."""

import copy
import warnings
from typing import Any

import kinds
import pytest
import torch
from backpack import backpack
from cases import Net, bn_twice, float64, mlp, residual_cnn, two_conv_cnn
from test_dataloader import Bar
from test_exact import assert_close
from torch import Tensor, nn

import bncurv
from bncurv import ComponentGrad, InfluenceGrad, InfluenceProjection, SlowPathWarning, curvature, extend, weighting


def weighted_batch_norm(bn: Any, x: Tensor, w: Tensor) -> Tensor:
    """BatchNorm whose moments weigh sample n by w_n."""
    p = (w / w.sum()).view(-1, *(1,) * (x.dim() - 1))
    axes, count = (0, *range(2, x.dim())), x[0, 0].numel()
    shape = (1, -1, *(1,) * (x.dim() - 2))
    centred = x - ((p * x).sum(axes) / count).view(shape)
    y = centred / ((p * centred.square()).sum(axes) / count + bn.eps).sqrt().view(shape)
    return y if bn.weight is None else y * bn.weight.view(shape) + bn.bias.view(shape)


def weighted_loss(model: nn.Module, loss_fn: Any, X: Tensor, y: Tensor, w: Tensor) -> Tensor:
    """Σ w_n ℓ_n times what makes it the loss as reduced at its own weights."""
    model = copy.copy(model)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for m in norms:
        m.forward = lambda x, m=m: weighted_batch_norm(m, x, w)
    try:
        output = model(X)
    finally:
        for m in norms:
            del m.forward
    each = type(loss_fn)(reduction="none")(output, y)
    return (
        w
        * (
            each.flatten(1).mean(1)
            if each.dim() > 1 and loss_fn.reduction == "mean"
            else each.reshape(len(X), -1).sum(1)
        )
    ).sum()


def brute_force(model: nn.Module, loss_fn: Any, X: Tensor, y: Tensor) -> dict[str, Tensor]:
    """w_n ∂_{w_n} ∇L, one double backward pass per sample."""
    value = 1 / len(X) if loss_fn.reduction == "mean" else 1.0
    w = torch.full((len(X),), value, requires_grad=True)
    parameters = dict(model.named_parameters())
    (by_weight,) = torch.autograd.grad(weighted_loss(model, loss_fn, X, y, w), w, create_graph=True)
    rows = [
        torch.autograd.grad(u, list(parameters.values()), retain_graph=True, allow_unused=True, materialize_grads=True)
        for u in by_weight
    ]
    return {name: value * torch.stack([row[i] for row in rows]) for i, name in enumerate(parameters)}


def sequence() -> nn.Module:
    return nn.Sequential(nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3))


def last() -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3), nn.BatchNorm1d(3, affine=False)
    )


VECTORS, IMAGES, STEPS = (4,), (2, 6, 6), (2, 6)
NETS = {"mlp": (lambda: mlp(4, 6, 5, 3), VECTORS), "cnn": (two_conv_cnn, None), "residual": (residual_cnn, None),
        "shared": (bn_twice, VECTORS), "sequence": (sequence, STEPS), "last": (last, VECTORS)}  # fmt: skip
WAYS = {"one by one": float("inf"), "cut": 0.0}


def problem(name: str, samples: int, loss_fn: Any) -> tuple[nn.Module, Any, Tensor, Tensor]:
    factory, shape = NETS[name]
    model = factory()
    if shape is None:
        first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
        shape = (first.in_channels, 6, 6)
    X = torch.randn(samples, *shape)
    C = model(X).shape[1]
    return (
        model,
        loss_fn,
        X,
        torch.randint(C, (samples,)) if isinstance(loss_fn, nn.CrossEntropyLoss) else torch.randn(samples, C),
    )


@pytest.mark.parametrize("samples", [5, 14])
@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss, nn.MSELoss])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NETS)
def test_definition(name, way, reduction, loss, samples, monkeypatch):
    monkeypatch.setattr(weighting, "WORTHWHILE", WAYS[way] if WAYS[way] else 1e-9)
    with float64(0):
        one = problem(name, samples, loss(reduction=reduction))
        res = curvature(*one[:2], one[2:], InfluenceGrad())
        assert_close(res.grad_influence, brute_force(*one))


@pytest.mark.parametrize("way", WAYS)
def test_sums_to_the_gradient_and_is_no_component(way, monkeypatch):
    monkeypatch.setattr(weighting, "WORTHWHILE", WAYS[way] or 1e-9)
    with float64(0):
        model, loss_fn, X, y = problem("mlp", 12, nn.CrossEntropyLoss())
        res = curvature(model, loss_fn, (X, y), InfluenceGrad(), ComponentGrad())
        gradient = torch.autograd.grad(loss_fn(model(X), y), list(model.parameters()))
        for (name, g), whole in zip(res.grad_influence.items(), gradient, strict=True):
            assert torch.allclose(g.sum(0), whole, atol=1e-14), name
        assert float((res.grad_influence["0.weight"] - res.grad_component["0.weight"]).norm()) > 1e-3


def test_without_batch_norm_they_are_per_sample_gradients():
    with float64(0):
        model, X, y = (
            nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
            torch.randn(7, 4),
            torch.randint(3, (7,)),
        )
        res = curvature(model, nn.CrossEntropyLoss(), (X, y), InfluenceGrad(), ComponentGrad())
        assert_close(res.grad_influence, res.grad_component)


def leave_one_out_errors(samples: int) -> list[float]:
    """Of influence and component gradients, by the pseudo-values N g(X) - (N - 1) g(X without n)."""
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))  # kinks would count
    X, y, loss_fn = torch.randn(samples, 4), torch.randint(3, (samples,)), nn.CrossEntropyLoss()

    def gradient(keep: Tensor) -> Tensor:
        found = torch.autograd.grad(loss_fn(model(X[keep]), y[keep]), list(model.parameters()))
        return torch.cat([g.flatten() for g in found])

    every = torch.arange(samples)
    whole = samples * gradient(every)
    pseudo = torch.stack([whole - (samples - 1) * gradient(every[every != n]) for n in range(samples)])
    res = curvature(model, loss_fn, (X, y), InfluenceGrad(), ComponentGrad())
    flat = [torch.cat([t.flatten(1) for t in f.values()], 1) for f in (res.grad_influence, res.grad_component)]
    return [float((samples * rows - pseudo).norm() / pseudo.norm()) for rows in flat]


def test_leaving_one_out():
    """To O(1/N) for influence; not for components."""
    with float64(0):
        influences, components = zip(*(leave_one_out_errors(samples) for samples in (16, 64, 256)), strict=True)
    a, b, c = influences
    assert a > 2.5 * b > 6 * c and c < 0.03
    assert components[-1] > 5 * c


@pytest.mark.parametrize("name", ["mlp", "residual", "shared"])
def test_projections(name):
    with float64(0):
        model, loss_fn, X, y = problem(name, 9, nn.CrossEntropyLoss())
        v = {n: torch.randn_like(p) for n, p in model.named_parameters()}
        res = curvature(model, loss_fn, (X, y), InfluenceGrad(), InfluenceProjection(v))
        expected = sum(torch.tensordot(res.grad_influence[n].flatten(1), t.flatten(), 1) for n, t in v.items())
        assert torch.allclose(res.influence_projection, expected, atol=1e-13)


def test_projections_on_the_gradient_itself_sum_to_its_squared_norm():
    with float64(0):
        model, loss_fn, X, y = problem("residual", 9, nn.CrossEntropyLoss())
        found = curvature(model, loss_fn, (X, y), InfluenceProjection()).influence_projection
        gradient = torch.autograd.grad(loss_fn(model(X), y), list(model.parameters()))
        assert float(found.sum()) == pytest.approx(sum(float(g.square().sum()) for g in gradient), rel=1e-12)


def test_loss_without_curvature():
    with float64(0):
        model, _, X, y = problem("mlp", 9, nn.MSELoss())
        y = torch.randn(9, 3)
        res = curvature(model, lambda output, y: (output * y).mean(), (X, y), InfluenceGrad(), ComponentGrad())
        assert_close({n: t.sum(0) for n, t in res.grad_influence.items()},
                     {n: t.sum(0) for n, t in res.grad_component.items()})  # fmt: skip


def test_direction_that_plays_no_part():
    with float64(0):
        model, loss_fn, X, y = problem("mlp", 9, nn.CrossEntropyLoss())
        model.register_parameter("unused", nn.Parameter(torch.ones(2)))
        found = curvature(model, loss_fn, (X, y), InfluenceProjection({"unused": torch.ones(2)}))
        assert torch.equal(found.influence_projection, torch.zeros(9))


def test_projection_takes_two_passes():
    model, X, y = mlp(4, 6, 3), torch.randn(50, 4), torch.randint(3, (50,))
    v = {"0.weight": torch.ones(6, 4)}
    assert curvature(model, nn.CrossEntropyLoss(), (X, y), InfluenceProjection(v)).passes == 2


def test_passes(monkeypatch):
    """The cheaper way is taken: N double passes, or R for Λ, those for P, and one."""
    model, loss_fn = mlp(4, 6, 5, 3), nn.CrossEntropyLoss()  # 12 + 10 statistics, 10 with layers below

    def passes(samples: int) -> int:
        data = torch.randn(samples, 4), torch.randint(3, (samples,))
        return curvature(model, loss_fn, data, InfluenceGrad()).passes

    assert passes(20) == 20
    assert passes(200) == 1 + 10 + 22
    parts = {"a": nn.Linear(4, 5), "b": nn.BatchNorm1d(5), "w": nn.Parameter(torch.tensor(0.5))}
    model = Net(lambda net, x: (h := net.b(net.a(x))).masked_fill(h > 0.5, net.w), **parts)  # w has no product
    assert passes(60) == 60


@pytest.mark.parametrize("samples", [20, 200])
@pytest.mark.parametrize("quantity", [InfluenceGrad(), InfluenceProjection({"0.weight": torch.ones(6, 4)})], ids=repr)
def test_announced_passes(quantity, samples, monkeypatch):
    """Those of either way, and of projections."""
    monkeypatch.setattr("bncurv.call.tqdm", Bar)
    Bar.made.clear()
    data = torch.randn(samples, 4), torch.randint(3, (samples,))
    res = curvature(mlp(4, 6, 5, 3), nn.CrossEntropyLoss(), data, quantity, progress=True)
    assert Bar.made[0].total == res.passes


def test_mini_batches():
    """Concatenated, and still the gradient of the mean over all samples."""
    with float64(0):
        model, loss_fn, X, y = problem("mlp", 12, nn.CrossEntropyLoss())
        both = [(X[:8], y[:8]), (X[8:], y[8:])]
        found = curvature(model, loss_fn, both, InfluenceGrad()).grad_influence["0.weight"]
        parts = [
            share * curvature(model, loss_fn, d, InfluenceGrad()).grad_influence["0.weight"]
            for d, share in zip(both, (2 / 3, 1 / 3), strict=True)
        ]
        assert torch.allclose(found, torch.cat(parts), atol=1e-15)


def test_in_backpacks_gesture():
    with float64(0):
        model, loss_fn, X, y = problem("residual", 6, nn.CrossEntropyLoss())
        expected = curvature(model, loss_fn, (X, y), InfluenceGrad()).grad_influence
        v = {n: torch.randn_like(p) for n, p in model.named_parameters()}
        projection = InfluenceProjection(v)
        extend(model), extend(loss_fn)
        with backpack(InfluenceGrad(), projection):
            loss_fn(model(X), y).backward()
        assert_close({n: p.grad_influence for n, p in model.named_parameters()}, expected)
        total = sum(float((p.grad * v[n]).sum()) for n, p in model.named_parameters())
        assert float(projection.result.sum()) == pytest.approx(total)


def test_float32():
    with float64(0):
        model, loss_fn, X, y = problem("mlp", 40, nn.CrossEntropyLoss())
        expected = curvature(model, loss_fn, (X, y), InfluenceGrad()).grad_influence
    found = curvature(model.float(), loss_fn, (X.float(), y), InfluenceGrad()).grad_influence
    largest = max(t.abs().max() for t in expected.values())
    for name, t in expected.items():
        assert float((found[name].double() - t).abs().max()) < 1e-4 * max(
            float(t.abs().max()), 1e-3 * float(largest)
        ), name


def test_wrong_cut_is_not_handed_out(monkeypatch):
    """The rows are held against a double pass; where they differ, the samples go one by one."""
    own = weighting._less_weighting
    monkeypatch.setattr(weighting, "WORTHWHILE", 1e-9)
    monkeypatch.setattr(weighting, "_less_weighting", lambda a, d, *rest: own(a, 1.001 * d, *rest))
    with float64(0):
        one = problem("mlp", 9, nn.CrossEntropyLoss())
        assert_close(curvature(*one[:2], one[2:], InfluenceGrad()).grad_influence, brute_force(*one))


def test_faulty_rule_for_batches_of_double_passes():
    """A function whose backward is right one by one only: the double passes go one by one."""
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), kinds.Inside("wrong_rule"), nn.Linear(3, 2))
    with float64(0):
        one = model.double(), nn.MSELoss(), torch.randn(5, 4), torch.randn(5, 2)
        with pytest.warns(SlowPathWarning, match="differs from ordinary ones"):
            found = curvature(*one[:2], one[2:], InfluenceGrad()).grad_influence
        assert_close(found, brute_force(*one))


# ---------------------------------------------------------------------------- refused
def test_other_coupling_is_refused():
    model = Net(
        lambda net, x: net.o(net.b(net.a(x)).softmax(0)), a=nn.Linear(4, 5), b=nn.BatchNorm1d(5), o=nn.Linear(5, 3)
    )
    with pytest.raises(
        RuntimeError, match="weight the samples in the loss and in BatchNorm's statistics, but the samples"
    ):
        curvature(model, nn.CrossEntropyLoss(), (torch.randn(8, 4), torch.randint(3, (8,))), InfluenceGrad())


def test_registered_layers_are_refused():
    class Centre(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean(0)

    bncurv.register_coupled(Centre, lambda m, x: x.mean(0), lambda m, x, copies: x - copies)
    model = nn.Sequential(nn.Linear(4, 5), Centre(), nn.Linear(5, 3))
    try:
        with pytest.raises(TypeError, match="in '1', a layer given to bncurv.register_coupled, is not known"):
            curvature(model, nn.CrossEntropyLoss(), (torch.randn(8, 4), torch.randint(3, (8,))), InfluenceGrad())
    finally:
        del bncurv.gate.COUPLED[Centre]


def test_loss_that_compares_samples_is_refused():
    def spread(output: Tensor, y: Tensor) -> Tensor:
        return (output @ output.T).square().mean()

    with pytest.raises(ValueError, match="spread compares samples"):
        curvature(mlp(4, 5, 3), spread, (torch.randn(8, 4), torch.randint(3, (8,))), InfluenceGrad())


@pytest.mark.parametrize("error", [NotImplementedError("nothing of it"), RuntimeError("derivative is not implemented")])
def test_backward_that_cannot_be_differentiated_is_said(error):
    """As PyTorch says it of its own operations, in one version or another."""

    def fails(g: Tensor) -> Tensor:
        raise error

    once = kinds.function(kinds.function(fails))
    model = Net(lambda net, x: once(net.b(net.a(x))), a=nn.Linear(4, 5), b=nn.BatchNorm1d(5))
    with pytest.raises(RuntimeError, match=f"differentiate the backward pass, which an operation .*: {error}"):
        curvature(model, nn.CrossEntropyLoss(), (torch.randn(8, 4), torch.randint(3, (8,))), InfluenceGrad())


@pytest.mark.parametrize(
    "direction,text",
    [
        ({}, "names nothing"),
        ({"x": torch.ones(1)}, "'x'"),
        ({"0.weight": torch.ones(4, 6)}, "expected the parameter's"),
    ],
)
def test_direction_that_does_not_fit(direction, text):
    with pytest.raises(ValueError, match=text):
        data = torch.randn(8, 4), torch.randint(3, (8,))
        curvature(mlp(4, 6, 3), nn.CrossEntropyLoss(), data, InfluenceProjection(direction))


def test_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        curvature(mlp(4, 6, 3), nn.CrossEntropyLoss(), (torch.randn(60, 4), torch.randint(3, (60,))), InfluenceGrad())
