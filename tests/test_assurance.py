"""Never a silently wrong number: each of these inputs is exact, said, or refused."""

import copy
import warnings
from typing import Any

import pytest
import torch
from cases import Net, float64
from test_exact import assert_close
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import bncurv
from bncurv import ComponentGrad, DiagGGNExact, SlowPathWarning, curvature, reference

CE = nn.CrossEntropyLoss()
LARGE = 200  # samples from which on `auto` goes the coupled way


def data(samples: int = LARGE) -> tuple[Tensor, Tensor]:
    return torch.randn(samples, 6), torch.randint(3, (samples,))


def two_layers(middle: Any, end: Any = lambda x: x) -> nn.Module:
    """Linear, ``middle``, BatchNorm, ReLU, Linear, ``end``."""
    parts = {"a": nn.Linear(6, 5), "b": nn.BatchNorm1d(5), "o": nn.Linear(5, 3)}
    return Net(lambda net, x: end(net.o(torch.relu(net.b(middle(net.a(x)))))), **parts)


def components(model: nn.Module, X: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Per-component gradients by one ordinary backward pass each, hooks and all."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    output = model(X)
    u = (output.softmax(1) - F.one_hot(y, output.shape[1])) / len(X)

    def pull(v: Tensor) -> list[Tensor]:
        return list(
            torch.autograd.grad(output, parameters, v, retain_graph=True, allow_unused=True, materialize_grads=True)
        )

    rows = [pull(u * (torch.arange(len(X)) == n)[:, None]) for n in range(len(X))]
    return {name: torch.stack([row[i] for row in rows]) for i, name in enumerate(names)}


# ---------------------------------------------------------------------------- batched passes
class Shake(torch.autograd.Function):
    """Shake-shake: the backward pass draws again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.rand(len(x), 1) * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return torch.rand(len(g), 1) * g


class Sign(torch.autograd.Function):
    """Sign descent: of degree 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.sign()


class Largest(torch.autograd.Function):
    """Keeps the larger half of a gradient: of degree 1, but not additive."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * (g.abs() >= g.abs().mean(-1, keepdim=True))


class Stateful(torch.autograd.Function):
    """Another map at every pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.passes = 0
        return x * 1

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        ctx.passes += 1
        return g / ctx.passes


class Doubled(torch.autograd.Function):
    """Linear, and nothing that was recorded."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g


def clipped(x: Tensor) -> Tensor:
    x.register_hook(lambda g: g.clamp(-1e-4, 1e-4))
    return x


def forgetful(x: Tensor) -> Tensor:
    return checkpoint(lambda t: F.dropout(t, 0.5), x, use_reentrant=False, preserve_rng_state=False)


NOT_LINEAR = {"shake": Shake.apply, "sign": Sign.apply, "largest": Largest.apply, "stateful": Stateful.apply,
              "clip": clipped, "checkpointed_dropout": forgetful}  # fmt: skip


@pytest.mark.parametrize(
    "quantity", [DiagGGNExact(), ComponentGrad(), bncurv.DiagGGNMC(), bncurv.DiagGGNMC(3)], ids=str
)
@pytest.mark.parametrize("method", ["dense", "coupled", "auto"])
@pytest.mark.parametrize("middle", NOT_LINEAR.values(), ids=NOT_LINEAR)
def test_backward_that_is_no_linear_map_is_refused(middle, method, quantity):
    with float64(0), pytest.raises(RuntimeError, match="is not one fixed linear map of the incoming gradient"):
        curvature(two_layers(middle), CE, data(8), quantity, method=method)


def test_refusal_names_the_module():
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), Net(lambda net, x: Sign.apply(x)), nn.Linear(5, 3))
    with pytest.raises(RuntimeError, match="in or before module '2'"):
        curvature(model, CE, data(8), DiagGGNExact())


def test_large_maps_one_pass_at_a_time_are_examined_too():
    with float64(0), pytest.raises(RuntimeError, match="not one fixed linear map"):
        curvature(two_layers(Largest.apply), CE, data(8), DiagGGNExact(), chunk_size=1, method="dense")


@pytest.mark.parametrize("method", ["dense", "coupled"])
def test_wrong_batching_rule(method):
    """PyTorch's vmapped backward of cdist is another map: the passes go one by one."""
    with float64(0):
        model, (X, y) = two_layers(lambda x: x, lambda h: -torch.cdist(h, torch.eye(3))), data(12)
        with pytest.warns(SlowPathWarning, match=r"torch.vmap\) differs from ordinary ones in or before module 'Net'"):
            res = curvature(model, CE, (X, y), DiagGGNExact(), ComponentGrad(), method=method)
        assert res.method == method
        assert_close(res.diag_ggn_exact, reference.ggn_diagonal(model, CE, X, y))
        assert_close(res.grad_component, components(model, X, y))


@pytest.mark.parametrize("method", ["dense", "coupled"])
def test_wrong_batching_rule_in_any_operation(method, monkeypatch):
    """Whatever the operation: here every batched pass is off by one part in a thousand in its second row."""
    own = torch.vmap

    def skewed(f, *args, **kwargs):
        return lambda *x: [
            t * (1 + 1e-3 * (torch.arange(len(t)) > 0)).view(-1, *(1,) * (t.dim() - 1)) for t in own(f)(*x)
        ]

    with float64(0):
        model, (X, y) = two_layers(lambda x: x), data(12)
        monkeypatch.setattr(torch, "vmap", skewed)
        with pytest.warns(SlowPathWarning, match="go one by one"):
            res = curvature(model, CE, (X, y), DiagGGNExact(), method=method)
        monkeypatch.undo()
        assert_close(res.diag_ggn_exact, reference.ggn_diagonal(model, CE, X, y))


@pytest.mark.parametrize("function", [Doubled.apply, lambda x: x.sort(-1).values, lambda x: x.clamp(-1, 1)])
def test_linear_backward_needs_no_warning(function):
    with float64(0), warnings.catch_warnings():
        warnings.simplefilter("error")
        model, (X, y) = two_layers(function), data(12)
        res = curvature(model, CE, (X, y), DiagGGNExact(), bncurv.DiagGGNMC(), method="coupled")
        assert_close(res.diag_ggn_exact, reference.ggn_diagonal(model, CE, X, y))


def test_no_hint_of_pytorch_reaches_the_user():
    """PyTorch would ask to report an operation that it cannot batch."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        model = nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)), nn.BatchNorm1d(5), nn.Linear(5, 3)
        )
        curvature(model, CE, data(8), DiagGGNExact(), method="dense")
    assert not [w for w in found if "batching rule" in str(w.message)]


# ---------------------------------------------------------------------------- gradients changed unseen
def tensor_hook(x: Tensor) -> Tensor:
    x.register_hook(lambda g: 0.1 * g)
    return x


def node_prehook(x: Tensor) -> Tensor:
    x.grad_fn.register_prehook(lambda gs: tuple(None if g is None else 0.1 * g for g in gs))
    return x


def node_posthook(x: Tensor) -> Tensor:
    x.grad_fn.register_hook(lambda gs, _: tuple(None if g is None else 0.1 * g for g in gs))
    return x


def several_hooks(x: Tensor) -> Tensor:
    return node_posthook(tensor_hook(tensor_hook(x)))


HOOKS = {"tensor": tensor_hook, "prehook": node_prehook, "posthook": node_posthook, "several": several_hooks}


def hooked(hook: Any, where: str) -> nn.Module:
    """A net with a hook on the output of a layer, of a BatchNorm, or of what lies between."""
    parts = {"a": nn.Linear(6, 5), "b": nn.BatchNorm1d(5), "c": nn.Linear(5, 4), "d": nn.BatchNorm1d(4)}

    def forward(net: Any, x: Tensor) -> Tensor:
        for name in "abcd":
            x = getattr(net, name)(x)
            x = hook(x) if name == where else x
            x = torch.tanh(x) if name in "bd" else x
            x = hook(x) if name + "t" == where else x
        return net.o(x)

    return Net(forward, **parts, o=nn.Linear(4, 3))


@pytest.mark.filterwarnings("ignore::bncurv.SlowPathWarning")
@pytest.mark.parametrize("method", ["auto", "coupled", "dense"])
@pytest.mark.parametrize("where", ["a", "b", "bt", "c", "d"])
@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS)
def test_hooks_inside_the_model_act_as_autograd_sees_them(hook, where, method):
    with float64(0):
        model, (X, y) = hooked(hook, where), data(60)
        res = curvature(model, CE, (X, y), ComponentGrad(), DiagGGNExact(), method=method)
        truth = components(model, X, y)
        assert_close(res.grad_component, truth)
        assert_close(res.diag_ggn_exact, curvature(model, CE, (X, y), DiagGGNExact(), method="dense").diag_ggn_exact)


def test_unseen_hook_is_said():
    with float64(0), pytest.warns(SlowPathWarning, match=r"For .*'c.weight'.* differs from an ordinary backward pass"):
        curvature(hooked(node_prehook, "c"), CE, data(60), DiagGGNExact(), method="coupled")


def test_backward_inside_a_backward_is_refused():
    class Reversible(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, layer: nn.Module) -> Tensor:
            with torch.enable_grad():
                ctx.x = x.detach().requires_grad_()
                ctx.y = layer(ctx.x)
            return ctx.y.detach()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
            torch.autograd.backward(ctx.y, g, retain_graph=True)
            return ctx.x.grad, None

    parts = {"c": nn.Linear(6, 6), "a": nn.Linear(6, 5), "b": nn.BatchNorm1d(5), "o": nn.Linear(5, 3)}
    model = Net(lambda net, x: net.o(net.b(Reversible.apply(net.c(x), net.a))), **parts)
    for method in ("dense", "coupled"):
        with pytest.raises(RuntimeError, match="backward"):
            curvature(model, CE, data(8), DiagGGNExact(), method=method)


# ---------------------------------------------------------------------------- the certificate
def neighbours(x: Tensor) -> Tensor:
    """Sample n feels sample n - 1, but for the first two."""
    return x - 0.5 * torch.cat([0 * x[:1], x[1:].roll(1, 0)])


def mixing_beside(gain: Tensor, end: Any = lambda x: x) -> nn.Module:
    parts = {"a": nn.Linear(6, 5), "n": nn.LayerNorm(5), "o": nn.Linear(5, 3)}
    return Net(lambda net, x: net.o(end(net.n, neighbours(net.a(x)) * gain)), **parts)


@pytest.mark.parametrize("dtype,loud", [(torch.float32, 2e5), (torch.float32, 1e-5), (torch.float64, 1e13)])
@pytest.mark.parametrize("ignored", [True, False])
@pytest.mark.parametrize("end", [lambda norm, x: x, lambda norm, x: norm(x)], ids=["plain", "behind a LayerNorm"])
def test_coupling_beside_a_loud_sample_is_found(end, ignored, dtype, loud):
    torch.manual_seed(0)
    gain = torch.ones(300, 1, dtype=dtype)
    gain[0] = loud
    model, (X, y) = mixing_beside(gain, end).to(dtype), data(300)
    y[0] = -100 if ignored else y[0]
    with pytest.warns(SlowPathWarning, match="samples of the batch are mixed in or before module"):
        assert curvature(model, CE, (X.to(dtype), y), DiagGGNExact(), ComponentGrad()).method == "dense"


def test_coupling_from_a_quiet_sample_into_a_loud_one_is_found():
    """Its share in the loud one's row is 1e-9, and all of the quiet one's own."""
    with float64(0):
        gain = torch.ones(64, 1)
        gain[1:] = 1e-9

        def forward(net: Any, x: Tensor) -> Tensor:
            h = net.a(x)
            return net.o(h * gain + torch.cat([h[:1], 0 * h[1:]]).roll(1, 0) * gain)  # sample 1 feels sample 0

        model = Net(forward, a=nn.Linear(6, 5), o=nn.Linear(5, 3))
        with pytest.raises(RuntimeError, match="mixed"):
            curvature(model, CE, data(64), ComponentGrad(), method="coupled")


def test_coupling_of_quiet_features_is_found():
    """Half of the features are mixed over the batch, the other half is 1e8 times as loud."""

    def forward(net: Any, x: Tensor) -> Tensor:
        h = net.a(x)
        return net.o(torch.cat([h[:, :2] * 1e8, neighbours(h[:, 2:])], 1))

    model = Net(forward, a=nn.Linear(6, 5), o=nn.Linear(5, 3))
    with pytest.raises(RuntimeError, match="mixed"):
        curvature(model, CE, data(64), ComponentGrad(), method="coupled")


def test_coupling_that_the_loss_does_not_see_is_none():
    """A second head, mixed over the batch, whose output does not reach the loss."""
    with float64(0), warnings.catch_warnings():
        warnings.simplefilter("error")
        parts = {"a": nn.Linear(6, 5), "b": nn.BatchNorm1d(5), "o": nn.Linear(5, 3), "p": nn.Linear(5, 3)}
        model = Net(lambda net, x: net.o(h := torch.tanh(net.b(net.a(x)))) + 0 * net.p(h.detach()).softmax(0), **parts)
        X, y = data()
        res = curvature(model, CE, (X, y), ComponentGrad(), DiagGGNExact(), params=["a.weight", "o.bias"])
        assert res.method == "coupled"


# ---------------------------------------------------------------------------- what a call recorded
def test_weight_frozen_while_its_layer_runs():
    def forward(net: Any, x: Tensor) -> Tensor:
        h = torch.relu(net.b(net.a(x)))
        net.o.weight.requires_grad_(False)
        q = net.o(h.square())
        net.o.weight.requires_grad_(True)
        return q + net.o(h)

    with float64(0):
        model, (X, y) = Net(forward, a=nn.Linear(6, 5), b=nn.BatchNorm1d(5), o=nn.Linear(5, 3)), data()
        for method in ("coupled", "dense"):
            res = curvature(model, CE, (X, y), ComponentGrad(), method=method)
            assert_close(res.grad_component, components(model, X, y))


SHAPES = {"vector": ((6,), None), "one": ((5, 6), (1,)), "row": ((5, 6), (1, 5)), "per_row": ((5, 6), (LARGE, 5))}


@pytest.mark.filterwarnings("ignore::bncurv.SlowPathWarning")
@pytest.mark.parametrize("weight,bias", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("method", ["auto", "coupled"])
def test_linear_with_unusual_shapes(weight, bias, method):
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(weight))
            self.c = None if bias is None else nn.Parameter(torch.randn(bias))
            self.b, self.o = nn.BatchNorm1d(5 if len(weight) > 1 else 1), nn.Linear(5 if len(weight) > 1 else 1, 3)

        def forward(self, x: Tensor) -> Tensor:
            z = F.linear(x, self.w, self.c)
            return self.o(torch.relu(self.b(z if z.dim() > 1 else z[:, None])))

    with float64(0):
        model, (X, y) = Odd(), data()
        res = curvature(model, CE, (X, y), ComponentGrad(), method=method)
        assert_close(res.grad_component, components(model, X, y))


class Experts(nn.Module):
    """Rows go to one of three experts; the third never gets any."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.b, self.o = nn.ModuleList(nn.Linear(6, 5) for _ in range(3)), nn.BatchNorm1d(5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        z, choice = x.new_zeros(len(x), 5), (x[:, 0] > 0).long()
        for i, expert in enumerate(self.e):
            z[choice == i] = expert(x[choice == i])
        return self.o(torch.relu(self.b(z)))


@pytest.mark.filterwarnings("ignore::bncurv.SlowPathWarning")
@pytest.mark.parametrize("method", ["auto", "coupled", "dense"])
def test_expert_without_rows(method):
    with float64(0):
        model, (X, y) = Experts(), data(20)
        res = curvature(model, CE, (X, y), DiagGGNExact(), ComponentGrad(), method=method)
        assert_close(res.grad_component, components(model, X, y))
        assert not res.diag_ggn_exact["e.2.weight"].any()


def test_frozen_weight_whose_input_is_changed_in_place_later():
    def forward(net: Any, x: Tensor) -> Tensor:
        h = net.a(x)
        z = net.b(h)
        h.mul_(2)
        return net.o(z.tanh() + h)

    with float64(0):
        model, (X, y) = Net(forward, a=nn.Linear(6, 5), b=nn.Linear(5, 5), o=nn.Linear(5, 3)), data()
        model.b.weight.requires_grad_(False)
        res = curvature(model, CE, (X, y), ComponentGrad(), method="coupled")
        truth = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert set(res.grad_component) == set(truth)
        gradient = torch.autograd.grad(CE(model(X), y), list(truth.values()))
        for g, name in zip(gradient, truth, strict=True):
            assert torch.allclose(res.grad_component[name].sum(0), g, atol=1e-12)


class Image(Tensor):
    """A tensor with metadata, as libraries for images have it."""


@pytest.mark.parametrize("method", ["dense", "coupled"])
def test_tensor_subclass(method):
    with float64(0):
        layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 3)]
        model, X, y = nn.Sequential(*layers), torch.randn(5, 1, 6, 6), torch.randint(3, (5,))
        res = curvature(model, CE, (X.as_subclass(Image), y), DiagGGNExact(), ComponentGrad(), method=method)
        assert_close(res.diag_ggn_exact, reference.ggn_diagonal(model, CE, X, y))
        assert {type(t) for t in [*res.diag_ggn_exact.values(), *res.grad_component.values()]} == {Tensor}


@pytest.mark.parametrize("method", ["dense", "coupled"])
def test_another_default_device(method):
    model, (X, y) = two_layers(lambda x: x), data(8)
    expected = curvature(model, CE, (X, y), DiagGGNExact(), method=method).diag_ggn_exact
    with torch.device("meta"):
        found = curvature(model, CE, (X, y), DiagGGNExact(), method=method).diag_ggn_exact
    assert all(torch.equal(found[name], t) for name, t in expected.items())


@pytest.mark.parametrize("samples", [8, LARGE])
@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_inside_is_refused(samples, lower):
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.o = nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", lower):
                h = self.b(self.a(x))
            return self.o(h.float())

    with pytest.raises(TypeError, match="Module.s. 'a'.* in half precision inside the model .autocast"):
        curvature(Half(), CE, data(samples), DiagGGNExact())


# ---------------------------------------------------------------------------- digits
def errors(model: nn.Module, X: Tensor, y: Tensor, **options: Any) -> tuple[str, dict[str, float]]:
    """Relative errors of a float32 diagonal by the float64 one, tensor by tensor, zeros left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        res = curvature(model, CE, (X, y), DiagGGNExact(), **options)
        precise = copy.deepcopy(model).double(), CE, (X.double(), y)
        truth = curvature(*precise, DiagGGNExact(), method="dense").diag_ggn_exact
    largest = max(float(t.norm()) for t in truth.values())
    found = res.diag_ggn_exact
    return res.method, {
        n: float((found[n].double() - t).norm() / t.norm()) for n, t in truth.items() if t.norm() > 1e-22 * largest
    }


def stacked(classes: int) -> nn.Module:
    blocks = [q for _ in range(4) for q in (nn.Linear(5, 5, bias=False), nn.BatchNorm1d(5), nn.Tanh())]
    return nn.Sequential(nn.Linear(6, 5), *blocks, nn.Linear(5, classes))


@pytest.mark.parametrize("samples", [2, 3])
def test_two_values_per_channel(samples):
    """Stacked BatchNorms over two values: the coupled way cancels, and `auto` does not hand that out."""
    torch.manual_seed(0)
    model, X, y = stacked(400), torch.randn(samples, 6), torch.randint(400, (samples,))
    dense = errors(model, X, y, method="dense")[1]
    for name, error in errors(model, X, y)[1].items():
        assert error <= 10 * dense[name] + 1e-6, name


def test_two_values_per_channel_are_said():
    torch.manual_seed(0)
    model, X, y = stacked(400), torch.randn(2, 6), torch.randint(400, (2,))
    with pytest.warns(SlowPathWarning, match="loses digits for '0.weight'.* to cancellation"):
        curvature(model, CE, (X, y), DiagGGNExact())
    with pytest.warns(UserWarning, match="loses digits for .*Use method='auto' or 'dense'"):
        res = curvature(model, CE, (X, y), DiagGGNExact(), method="coupled")
    assert res.passes < 2 * 400  # none of the columns goes the dense way


def loud(gain: float) -> nn.Module:
    """The second sample is louder, before a BatchNorm over two values."""

    class Loud(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.tensor([[1.0], [gain]])

    torch.manual_seed(0)
    layers = [nn.Linear(4, 3), nn.BatchNorm1d(3), Loud(), nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(3, 2))


def test_nothing_but_rounding_is_said():
    """The gradient is 1e-20: an ordinary pass gives rounding of 1e-12 sample by sample, 1e-7 for both as the other."""
    model, data = loud(1e13), (torch.randn(2, 4), torch.randn(2, 2))
    with pytest.warns(UserWarning, match="loses digits for '0.weight' to cancellation"):
        res = curvature(model, nn.MSELoss(), data, ComponentGrad(), method="coupled")
    dense = curvature(model, nn.MSELoss(), data, ComponentGrad(), method="dense").grad_component
    assert res.grad_component["0.weight"].norm() > 1e3 * dense["0.weight"].norm()


def test_rounding_of_what_vanishes_is_not_said():
    """A bias that BatchNorm takes off behind a pooling layer: both ways give its rounding."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 3, 2), nn.AvgPool2d(2), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)]
    data = torch.randn(6, 1, 5, 5), torch.randint(2, (6,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        res = curvature(nn.Sequential(*layers), CE, data, ComponentGrad(), method="coupled")
    assert 0 < res.grad_component["0.bias"].abs().max() < 1e-6


@pytest.mark.parametrize("method", ["auto", "coupled"])
def test_a_batch_norm_whose_squares_leave_the_range(method):
    """Its variance is 1e40: no number in float32, and no reason for one that is none in the result."""
    model, data = loud(1e20), (torch.randn(2, 4), torch.randint(400, (2,)))
    model[-1] = nn.Linear(3, 400)  # the coupled way is cheaper
    with pytest.warns(SlowPathWarning, match="For '0.weight'.* the coupled way leaves the range of torch.float32"):
        got = curvature(model, CE, data, DiagGGNExact(), method=method).diag_ggn_exact
    assert all(bool(t.isfinite().all()) for t in got.values())
    dense = curvature(model, CE, data, DiagGGNExact(), method="dense").diag_ggn_exact
    assert torch.equal(got["0.weight"], dense["0.weight"])


@pytest.mark.parametrize("mean", [1e2, 1e3, 1e4])
@pytest.mark.parametrize("samples", [8, 64])
def test_inputs_far_from_zero(samples, mean):
    """An ordinary pass multiplies its rounding by the mean: `auto` takes centred products, whatever they cost."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5))
    X, y = torch.randn(samples, 6) + mean, torch.randint(5, (samples,))
    (way, auto), (_, coupled) = errors(model, X, y), errors(model, X, y, method="coupled")
    dense = errors(model, X, y, method="dense")[1]
    assert way == "coupled" and dense["0.weight"] > 10 * auto["0.weight"]
    assert all(error <= 2 * coupled[name] for name, error in auto.items())


@pytest.mark.parametrize("scale", [1e-18, 1e-12, 1e-9, 1e9, 1e12, 1e18])
def test_squares_stay_in_range(scale):
    """BatchNorm makes the network indifferent to the scale of its inputs; squares of factors are not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8, eps=0), nn.ReLU(), nn.Linear(8, 5))
    X, y = torch.randn(300, 6) * scale, torch.randint(5, (300,))
    assert max(errors(model, X, y, method="coupled")[1].values()) < 1e-5


def test_weights_out_of_range():
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 5)]
    model = nn.Sequential(*layers)
    with torch.no_grad():
        model[0].weight *= 1e13
        model[3].weight *= 1e15
    X, y = torch.randn(300, 6), torch.randint(5, (300,))
    found = errors(model, X, y, method="coupled")[1]
    dense = errors(model, X, y, method="dense")[1]
    assert all(error <= 10 * dense[name] + 1e-5 for name, error in found.items())


@pytest.mark.parametrize("method", ["coupled", "dense"])
def test_a_derivative_that_is_not_defined(method):
    """The network's own backward pass gives NaN: told so, by module."""

    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * (x > 0)).square().sqrt()  # inf times 0 at a dead unit

    with float64(0):
        model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), Root(), nn.Linear(5, 3))
        X, y = data(8)
        said = "in or before module '2' gives NaN or inf, though the output is finite.*add an eps"
        with pytest.raises(RuntimeError, match=said):
            curvature(model, CE, (X, y), DiagGGNExact(), method=method)
        behind = curvature(model, CE, (X, y), DiagGGNExact(), method=method, params="3.*").diag_ggn_exact
        want = reference.ggn_diagonal(model[3], CE, model[:3](X).detach(), y)
        assert_close({name.removeprefix("3."): t for name, t in behind.items()}, want)
