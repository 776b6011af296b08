"""``precision=``: what a copy of the model in that precision has, for models in half precision and under autocast."""

import copy
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from backpack import backpack
from cases import Net
from state import unchanged
from test_exact import assert_close
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from bncurv import ComponentGrad, DiagGGNExact, DiagGGNMC, InfluenceGrad, LowRankGGN, curvature, extend, reference

N = 8
CE = nn.CrossEntropyLoss()
BF16, F16 = torch.bfloat16, torch.float16
DIGITS = {"float32": 1e-4, "float64": 1e-10}
X = torch.randn(N, 4, generator=torch.Generator().manual_seed(3))
y = torch.arange(N) % 3


def net(first: nn.Module | None = None, **more: Any) -> Any:
    parts = {"a": first or nn.Linear(4, 5, bias=False), "n": nn.BatchNorm1d(5), "o": nn.Linear(5, 3)} | more
    return Net(lambda net, x: net.o(net.n(net.a(x)).tanh()), **parts)


def mixed() -> nn.Module:
    model = net()
    model.a.to(BF16), model.o.to(BF16)
    return model


def attention() -> nn.Module:
    def forward(net: Any, x: Tensor) -> Tensor:
        h = net.l(net.a(x[:, None] * torch.arange(1, 4, dtype=x.dtype)[:, None]))
        return net.o(net.t(h, h, h, need_weights=False)[0].mean(1))

    parts = {"l": nn.LayerNorm(6), "t": nn.MultiheadAttention(6, 2, batch_first=True), "o": nn.Linear(6, 3)}
    return Net(forward, a=nn.Linear(4, 6), **parts)


def tied() -> nn.Module:
    """One weight in two modules and in a list, a bias as a plain attribute."""
    model = net(b=nn.Linear(4, 5, bias=False))
    model.b.weight = model.a.weight
    model.__dict__["listed"], model.__dict__["plain"] = [{"w": model.a.weight}], model.o.bias

    def forward(net: Any, x: Tensor) -> Tensor:
        h = net.a(x) + net.b(x.sin()) + F.linear(x.cos(), net.listed[0]["w"])
        return net.o(net.n(h)).tanh() + net.plain

    model._function = forward
    return model


def recurrent() -> nn.Module:
    model = net(nn.LSTM(4, 5, batch_first=True))
    model._function = lambda net, x: net.o(net.n(net.a(x[:, None])[0][:, 0]))
    return model


def autocast(inner: Callable[..., Tensor] = lambda net, x: net.o(net.n(net.a(x))).exp()) -> nn.Module:
    def forward(net: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", BF16):
            return inner(net, x).to(x.dtype)

    model = net()
    model._function = forward
    return model


def decorated() -> nn.Module:
    model = net()
    model._function = torch.autocast("cpu", F16)(model._function)
    return model


def raw() -> nn.Module:
    """A region inside of what is checkpointed, and a checkpoint inside of a region."""

    def part(net: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", BF16):
            return net.o(x)

    kept = partial(checkpoint, use_reentrant=False)
    return autocast(lambda net, x: kept(part, net, kept(net.a, x)))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "bfloat16": lambda: net().to(BF16),
    "float16": lambda: net().to(F16),
    "mixed": mixed,
    "attention": lambda: attention().to(BF16),
    "tied": lambda: tied().to(BF16),
    "weight_norm": lambda: net(o=weight_norm(nn.Linear(5, 3))).to(BF16),
    "recurrent": lambda: recurrent().to(BF16),
    "autocast": autocast,
    "decorated": decorated,
    "checkpointed": raw,
    "float32": net,
    "float64": lambda: net().double(),
}


@pytest.mark.filterwarnings("ignore:No parameter product", "ignore:.*checkpoint")
@pytest.mark.parametrize("precision", DIGITS)
@pytest.mark.parametrize("kind", MODELS)
def test_exact(kind: str, precision: str) -> None:
    model = MODELS[kind]()
    own, data = getattr(torch, precision), X.to(next(model.parameters()).dtype)
    want = reference.ggn_diagonal(copy.deepcopy(model).to(own), CE, data, y)
    with unchanged(model, CE):
        got = curvature(model, CE, (data, y), DiagGGNExact(), precision=precision).diag_ggn_exact
    assert {t.dtype for t in got.values()} == {own}
    assert_close({name: t.double() for name, t in got.items()}, want, DIGITS[precision])


@pytest.mark.parametrize("method", ["coupled", "dense"])
def test_all_quantities(method: str) -> None:
    """By both ways what the copy gives, over batches in half precision, through ``forward``, of some parameters."""
    model, weighted = net().to(BF16), nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 0.5], dtype=BF16))
    batches = [{"x": X[i : i + 4].to(BF16), "y": y[i : i + 4]} for i in (0, 4)]

    def asked(model: nn.Module, loss_fn: nn.Module, **options: Any) -> dict[str, Tensor]:
        draws = DiagGGNMC(3, generator=torch.Generator().manual_seed(1))
        wanted = ComponentGrad(), DiagGGNExact(), InfluenceGrad(), LowRankGGN(), draws
        options |= {"params": ["a.*", "n.weight"], "method": method}
        res = curvature(model, loss_fn, batches, *wanted, forward=lambda m, b: (m(b["x"]), b["y"]), **options)
        names = ("grad_component", "diag_ggn_exact", "grad_influence", "diag_ggn_mc")
        own = {f"{field} {name}": t for field in names for name, t in getattr(res, field).items()}
        return own | {"eigenvalues": res.ggn.eigenvalues}

    with unchanged(model, weighted):
        got = asked(model, weighted, precision="float64")
    model, weighted = model.double(), weighted.double()
    batches = [{"x": batch["x"].double(), "y": batch["y"]} for batch in batches]
    assert_close(got, asked(model, weighted), 1e-12)


def test_a_matrix_free_ggn_is_that_of_the_copies() -> None:
    """It works after the call, and what becomes of the model means nothing to it."""
    model = net().to(BF16)
    dense = curvature(model, CE, (X, y), LowRankGGN(), precision="float64").ggn
    found = curvature(model, CE, (X, y), LowRankGGN(top=2, matrix_free=True), precision=torch.float64).ggn
    nn.init.ones_(model.a.weight)
    v = {name: torch.randn(p.shape, dtype=torch.float64) for name, p in model.named_parameters()}
    assert_close(found @ v, dense @ v)


def test_targets_and_losses_in_half_precision() -> None:
    """Floating-point targets, and weights in a partial."""
    model, target = net().to(BF16), torch.rand(N, 3).to(BF16)

    def weighted(output: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        return F.nll_loss(output.log_softmax(1), y, weight)

    precise = partial(weighted, weight=target[0].double())
    for loss_fn, by, data in ((nn.MSELoss(), nn.MSELoss(), target), (partial(weighted, weight=target[0]), precise, y)):
        got = curvature(model, loss_fn, (X, data), DiagGGNExact(), precision="float64").diag_ggn_exact
        assert_close(got, reference.ggn_diagonal(model, by, X, data))


def test_attributes_of_parameters() -> None:
    """Code that reads them finds them."""
    model = net()
    model.a.weight.scale = 2.0
    model._function = lambda net, x: net.o(net.n(net.a(x) * net.a.weight.scale))
    assert curvature(model, CE, (X, y), DiagGGNExact(), precision="float64").passes


# ---------------------------------------------------------------------------- no trace
def test_ties_are_put_back() -> None:
    model = tied()
    listed = model.listed
    curvature(model, CE, (X, y), DiagGGNExact(), precision="float64")
    assert model.listed is listed and listed[0]["w"] is model.b.weight is model.a.weight and model.plain is model.o.bias


class Computed(nn.Module):
    """Keeps what its forward has computed, as `torch.nn.utils.prune` does, and how often."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.last, self.none, self.calls = net(), torch.ones(2), None, 0

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.none = self.late = self.net(x)
        self.calls += 1
        return self.last


@pytest.mark.parametrize("precision", [None, "float64"])
def test_plain_attributes_are_put_back(precision: str | None) -> None:
    """No graph lives on in the model, and nothing of another precision; without one, all else is as it was left."""
    model = Computed()
    last = model.last
    with unchanged(model):
        curvature(model, CE, (X, y), DiagGGNExact(), precision=precision)
    assert model.last is last and model.none is None and model.calls == (precision is None)


def test_autocast_of_other_threads_stays_on() -> None:
    """While a call keeps it off; and on again in this thread afterwards, region by region."""
    seen: list[torch.dtype] = []

    def other() -> None:
        with torch.autocast("cpu", BF16):
            seen.append(F.linear(torch.ones(2, 2), torch.ones(2, 2)).dtype)

    def forward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        thread = threading.Thread(target=other)
        thread.start(), thread.join()
        return model(batch[0]), batch[1]

    model = autocast()
    with torch.autocast("cpu", F16), unchanged(model):
        inside = curvature(model, CE, (X, y), DiagGGNExact(), precision="float32", forward=forward).diag_ggn_exact
        seen.append(F.linear(X, X).dtype)
    assert seen == [BF16, F16]
    plain = curvature(model, CE, (X, y), DiagGGNExact(), precision="float32").diag_ggn_exact
    assert all(torch.equal(inside[name], t) for name, t in plain.items())


# ---------------------------------------------------------------------------- refused
@pytest.mark.parametrize("wrong", ["bfloat16", torch.float16, 32, True, "double", ["float32"]], ids=str)
def test_what_precision_may_be(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"precision=.*; expected 'float32', 'float64', or None"):
        curvature(net(), CE, (X, y), DiagGGNExact(), precision=wrong)


def test_half_precision_is_refused_unless_asked_for() -> None:
    """By the parameters' names, in both gestures."""
    model = mixed()
    with pytest.raises(TypeError, match=r"'a.weight', 'o.weight', 'o.bias' in half.*precision='float32'"):
        curvature(model, CE, (X.to(BF16), y), DiagGGNExact())
    with pytest.raises(TypeError, match=r"Module.* 'a'.* in half precision inside .*precision='float32'"):
        model = Net(lambda net, x: net.o(net.n(net.a(x.to(BF16)).float())), a=model.a, n=model.n, o=nn.Linear(5, 3))
        curvature(model, CE, (X, y), DiagGGNExact(), params="o.*")
    extend(model), extend(loss_fn := nn.CrossEntropyLoss())
    with pytest.raises(TypeError, match=r"'a.weight' in half precision.* bncurv.curvature\(.*precision='float32'"):
        with backpack(DiagGGNExact()):
            loss_fn(model(X), y).backward()


def test_a_cast_in_the_code_is_refused() -> None:
    """It stays one, whatever the parameters are."""
    model = Net(lambda net, x: net.o(net.a(x).to(BF16).float()), a=nn.Linear(4, 5), o=nn.Linear(5, 3))
    with unchanged(model), pytest.raises(TypeError, match=r"half precision inside the model .*a cast in the code must"):
        curvature(model, CE, (X, y), DiagGGNExact(), precision="float32")
    with unchanged(model), pytest.raises(TypeError, match=r"precision='float64': two precisions meet .*ouble"):
        curvature(model, CE, (X, y), DiagGGNExact(), precision="float64")


@pytest.mark.parametrize("quantity", [ComponentGrad, DiagGGNExact])
def test_losses_in_half_precision_are_refused(quantity: Any) -> None:
    """Also where their value is no longer; regions of autocast are none where another precision is asked for."""

    def cast(output: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(output.to(BF16), y).float()

    def region(output: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", BF16):
            return F.cross_entropy(output @ torch.eye(3), y).float()

    model = net()
    for loss_fn, options in ((cast, {}), (cast, {"precision": "float32"}), (region, {})):
        with unchanged(model), pytest.raises(TypeError, match="computes in torch.bfloat16 inside .auto.*precision='"):
            curvature(model, loss_fn, (X, y), quantity(), **options)
    assert curvature(model, region, (X, y), quantity(), precision="float32").passes


def test_single_precision_inside_double_is_told() -> None:
    """Whether the model is in double precision, or asked to be."""
    model = Net(lambda net, x: net.o(net.n(net.a(x)).float().tanh().to(x.dtype)), **dict(net().named_children()))
    for options in ({}, {"precision": "float64"}):
        data = (X.double(), y) if not options else (X, y)
        with pytest.warns(UserWarning, match="torch.float32 numbers inside .*TanhBack.* output of module 'o'"):
            curvature(model if options else copy.deepcopy(model).double(), CE, data, DiagGGNExact(), **options)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:No parameter product")
def test_half_precision_that_only_pytorch_sees_is_refused() -> None:
    """In a traced module, no call of the code comes by."""
    model = torch.jit.trace(autocast(lambda net, x: net.o(net.n(net.a(x)))), X, check_trace=False)
    with pytest.raises(TypeError, match="torch.bfloat16 numbers inside the model .*scripted, exported"):
        curvature(model, CE, (X, y), DiagGGNExact())


def test_parameters_that_are_reached_past_the_modules() -> None:
    """By a closure, by the loss."""
    model = net()
    weight = model.a.weight
    model._function = lambda net, x: net.o(net.n(F.linear(x, weight.to(x.dtype))))
    with unchanged(model), pytest.raises(TypeError, match=r"precision='float64': .*'a.weight' past its modules"):
        curvature(model, CE, (X, y), DiagGGNExact(), precision="float64")
    bias, model = model.o.bias, net(o=model.o)
    with unchanged(model), pytest.raises(ValueError, match=r"parameter 'o.bias .the original.' past the model's"):
        loss = lambda o, y: F.cross_entropy(o, y) + bias.square().sum()  # noqa: E731
        curvature(model, loss, (X, y), ComponentGrad(), precision="float64")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_modules_are_refused() -> None:
    model = net(torch.jit.script(nn.Linear(4, 5)))
    with pytest.raises(TypeError, match=r"precision=: module 'a' \(Linear\) is scripted or traced"):
        curvature(model, CE, (X, y), DiagGGNExact(), precision="float64")
