"""Quantities of the gradient take any differentiable loss of the output; what else it does is honoured or refused."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from backpack import backpack
from cases import Case, case, labelled, mlp, regression
from state import unchanged
from test_exact import assert_close
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook

import bncurv
from bncurv import ComponentGrad, DiagGGNExact, curvature, extend, reference, unextend
from bncurv.loss_at_batch import LossAtBatch
from bncurv.losses import LOSSES, Loss

N, C = 6, 3
FIRST = (ComponentGrad, bncurv.ComponentL2Grad, bncurv.SumComponentGradSquared, bncurv.ComponentVariance)


def net() -> nn.Module:
    return mlp(4, 5, C)


def log_net() -> nn.Module:
    return nn.Sequential(net(), nn.LogSoftmax(1))


class Margin(nn.Module):
    """log p/(1 - p) of the label: concave in the output."""

    def forward(self, o: Tensor, y: Tensor) -> Tensor:
        label = o.gather(1, y[:, None])[:, 0]
        return (label - o.scatter(1, y[:, None], -torch.inf).logsumexp(1)).sum()


class Focal(nn.CrossEntropyLoss):
    """A subclass of a loss in the table, with a plain tensor as an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha = torch.tensor([0.5, 1.0, 2.0])

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        p = input.softmax(1).gather(1, target[:, None])[:, 0]
        return -(self.alpha[target] * (1 - p) ** 2 * p.log()).mean()


class Wrapper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.CrossEntropyLoss(label_smoothing=0.1)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return 0.5 * self.inner(logits, labels)


class Scaled(nn.Module):
    """With a parameter of its own, and state that each call changes."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, o: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return F.cross_entropy(o * self.temperature, y)


class InBatch(nn.Module):
    """Compares samples."""

    def forward(self, o: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(o @ y.T, torch.arange(len(o)))


numbers, classes = regression(N, 4, out=(C,)), labelled(N, 4, C=C)
MODULES = [
    case("l1", net, numbers, nn.L1Loss),
    case("huber_sum", net, numbers, lambda: nn.HuberLoss(reduction="sum")),
    case("nll", log_net, classes, nn.NLLLoss),
    case("margin", net, classes, Margin),
    case("focal", net, classes, Focal),
    case("wrapper", net, classes, Wrapper),
    case("scaled", net, classes, Scaled),
    case("in_batch", net, numbers, InBatch),
]
FUNCTIONS = [
    case("function", net, classes, lambda: F.cross_entropy),
    case("partial", net, classes, lambda: partial(F.cross_entropy, label_smoothing=0.3)),
    case("lambda", net, numbers, lambda: lambda o, y: (o * y).sum(1).cos().mean()),
    case("of_length_one", net, numbers, lambda: lambda o, y: (o * y).mean().reshape(1)),
]


def assert_first_order(one: Case, fields: dict[str, dict[str, Tensor]]) -> None:
    g = reference.component_gradients(*one.build())
    assert_close(fields["grad_component"], g)
    assert_close(fields["l2_component"], {n: t.flatten(1).square().sum(1) for n, t in g.items()})
    assert_close(fields["sum_grad_squared"], {n: t.square().sum(0) for n, t in g.items()})
    assert_close(fields["variance"], {n: t.var(0, correction=0) for n, t in g.items()})


@pytest.mark.parametrize("method", ["coupled", "dense"])
@pytest.mark.parametrize("one", [*MODULES, *FUNCTIONS], ids=str)
def test_curvature(one: Case, method: str) -> None:
    model, loss_fn, X, y = one.build()
    watched = [m for m in (model, loss_fn) if isinstance(m, nn.Module)]
    with unchanged(*watched):
        res = curvature(model, loss_fn, (X, y), *(q() for q in FIRST), method=method)
    assert_first_order(one, dict(res.fields))


@pytest.mark.parametrize("one", [c for c in MODULES if c.name != "scaled"], ids=str)
def test_extend(one: Case) -> None:
    model, loss_fn, X, y = one.build()
    extend(model), extend(loss_fn)
    with backpack(*(q() for q in FIRST)):
        loss_fn(model(X), y).backward()
    named = dict(model.named_parameters())
    fields = {f: {n: getattr(p, f) for n, p in named.items()} for f in ("grad_component", "l2_component",
              "sum_grad_squared", "variance")}  # fmt: skip
    assert_first_order(one, fields)
    assert_close({n: p.grad for n, p in named.items()}, reference.gradient(*one.build()))
    assert not vars(unextend(loss_fn)).keys() ^ vars(one.loss()).keys()


def test_extend_negative_multiple() -> None:
    """A gradient has one, a GGN has not."""
    model, loss_fn, X, y = MODULES[3].build()
    extend(model), extend(loss_fn)
    with backpack(ComponentGrad()):
        (-2 * loss_fn(model(X), y)).backward()
    want = reference.component_gradients(*MODULES[3].build())
    assert_close({n: -p.grad_component / 2 for n, p in model.named_parameters()}, want)


@pytest.mark.parametrize("reverse", [False, True])
def test_extend_arguments_by_name(reverse: bool) -> None:
    one = next(c for c in MODULES if c.name == "wrapper")
    model, loss_fn, X, y = one.build()
    extend(model), extend(loss_fn)
    given = {"logits": model(X), "labels": y}
    with backpack(ComponentGrad()):
        loss_fn(**dict(reversed(given.items()) if reverse else given.items())).backward()
    want = reference.component_gradients(*one.build())
    assert_close({n: p.grad_component for n, p in model.named_parameters()}, want)


def test_float32_is_what_pytorch_gives() -> None:
    """Also where a loss holds float32 tensors that no module knows of."""
    one = next(c for c in MODULES if c.name == "focal")
    model, _, X, y = one.build()
    model, X, loss_fn = model.float(), X.float(), Focal()
    g = curvature(model, loss_fn, (X, y), ComponentGrad()).grad_component
    loss_fn(model(X), y).backward()
    assert all(torch.allclose(g[n].sum(0), p.grad, rtol=1e-5, atol=1e-7) for n, p in model.named_parameters())


def test_a_loss_may_change_the_output_in_place() -> None:
    model, _, X, y = MODULES[0].build()
    got = curvature(model, lambda o, y: o.sub_(y).abs_().mean(), (X, y), ComponentGrad()).grad_component
    assert_close(got, reference.component_gradients(*MODULES[0].build()))


class GradientOnly(Loss):
    """Half a registration."""

    def check(self, loss: Any, output: Tensor, target: Tensor) -> None:
        raise NotImplementedError

    gradient = blocks = check  # type: ignore[assignment]


def test_half_registered_loss_is_enough_for_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOSSES, Margin, GradientOnly())
    model, loss_fn, X, y = MODULES[3].build()
    got = curvature(model, loss_fn, (X, y), ComponentGrad()).grad_component
    assert_close(got, reference.component_gradients(*MODULES[3].build()))
    with pytest.raises(NotImplementedError):
        curvature(model, loss_fn, (X, y), DiagGGNExact())


# ------------------------------------------------------------------------------- hooks of the loss


def doubled(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return 2 * out


def cooled(module: nn.Module, args: Any) -> Any:
    return args[0] / 3, args[1]


def watched(module: nn.Module, args: Any, out: Tensor) -> None:
    module.last = float(out.detach())


def hooked(where: str) -> tuple[nn.Module, Callable]:
    """A cross-entropy with a hook, and the same loss as a function."""
    loss_fn = nn.CrossEntropyLoss()
    if where == "pre":
        loss_fn.register_forward_pre_hook(cooled)
        return loss_fn, lambda o, y: F.cross_entropy(o / 3, y)
    loss_fn.register_forward_hook(doubled)
    return loss_fn, lambda o, y: 2 * F.cross_entropy(o, y)


@pytest.mark.parametrize("where", ["pre", "forward"])
def test_hooks_of_the_loss_take_part(where: str) -> None:
    model, _, X, y = FUNCTIONS[0].build()
    loss_fn, same = hooked(where)
    with unchanged(model, loss_fn):
        got = curvature(model, loss_fn, (X, y), ComponentGrad()).grad_component
    assert_close(got, reference.component_gradients(model, same, X, y))
    with unchanged(model, loss_fn):
        got = curvature(model, loss_fn, (X, y), DiagGGNExact()).diag_ggn_exact
    assert_close(got, reference.ggn_diagonal(model, same, X, y))


@pytest.mark.parametrize("quantity", [ComponentGrad, DiagGGNExact])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("where", ["pre", "forward"])
def test_extend_hooks_of_the_loss(where: str, when: str, quantity: Any) -> None:
    """What they make of the output, and a multiple that they make of the value, are honoured."""
    model, _, X, y = FUNCTIONS[0].build()
    loss_fn, (hooked_fn, same) = extend(nn.CrossEntropyLoss()), hooked(where)
    if when == "after":
        add = loss_fn.register_forward_pre_hook if where == "pre" else loss_fn.register_forward_hook
        add(cooled if where == "pre" else doubled)
    else:
        loss_fn = extend(hooked_fn)
    extend(model)
    with backpack(quantity()):
        loss_fn(model(X), y).backward()
    oracle = reference.component_gradients if quantity is ComponentGrad else reference.ggn_diagonal
    want = oracle(FUNCTIONS[0].model(), same, X, y)
    assert_close({n: getattr(p, quantity.field) for n, p in model.named_parameters()}, want)


def test_hook_that_only_watches() -> None:
    model, _, X, y = FUNCTIONS[0].build()
    loss_fn = nn.CrossEntropyLoss()
    loss_fn.register_forward_hook(watched)
    got = curvature(model, loss_fn, (X, y), DiagGGNExact(), ComponentGrad())
    assert_close(got.diag_ggn_exact, reference.ggn_diagonal(model, F.cross_entropy, X, y))
    assert loss_fn.last == pytest.approx(float(F.cross_entropy(model(X), y).detach()))


def test_global_hooks_take_part() -> None:
    model, _, X, y = FUNCTIONS[0].build()
    handle = register_module_forward_hook(lambda m, args, out: 2 * out if isinstance(m, nn.CrossEntropyLoss) else None)
    try:
        got = curvature(model, nn.CrossEntropyLoss(), (X, y), ComponentGrad()).grad_component
    finally:
        handle.remove()
    assert_close(got, reference.component_gradients(model, hooked("forward")[1], X, y))


def test_backward_hooks_of_the_loss_take_no_part() -> None:
    """As those of the model."""
    model, _, X, y = FUNCTIONS[0].build()
    for loss_fn in (nn.CrossEntropyLoss(), Wrapper()):
        want = curvature(model, loss_fn, (X, y), ComponentGrad()).grad_component
        loss_fn.register_full_backward_hook(lambda module, into, out: (2 * into[0], None))
        with unchanged(model, loss_fn):
            assert_close(curvature(model, loss_fn, (X, y), ComponentGrad()).grad_component, want)


def test_overridden_call_takes_part() -> None:
    class Doubled(nn.CrossEntropyLoss):
        def __call__(self, *args: Any) -> Tensor:
            return 2 * super().__call__(*args)

    model, _, X, y = FUNCTIONS[0].build()
    got = curvature(model, Doubled(), (X, y), ComponentGrad(), DiagGGNExact())
    assert_close(got.grad_component, reference.component_gradients(model, hooked("forward")[1], X, y))
    assert_close(got.diag_ggn_exact, reference.ggn_diagonal(model, hooked("forward")[1], X, y))


def test_extended_loss_in_curvature() -> None:
    """Hooks of BackPACK and bncurv don't count."""
    model, _, X, y = FUNCTIONS[0].build()
    loss_fn = extend(nn.CrossEntropyLoss())
    with unchanged(model, loss_fn):
        got = curvature(model, loss_fn, [(X, y), (X, y * 0)], DiagGGNExact()).diag_ggn_exact
    want = curvature(model, nn.CrossEntropyLoss(), [(X, y), (X, y * 0)], DiagGGNExact()).diag_ggn_exact
    assert all(torch.equal(got[n], t) for n, t in want.items())
    assert LossAtBatch(loss_fn, model(X), y, hooked=True).plain


class Columns(nn.Module):
    """Σ_c w_c (F_c - y_c)², with w in a plain attribute, and a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.tensor([1.0, 2.0, 0.5])
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, o: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return ((o - y).square() @ self.w).mean()


class OfColumns(Loss):
    def check(self, loss: Any, output: Tensor, target: Tensor) -> None:
        pass

    def gradient(self, loss: Any, output: Tensor, target: Tensor) -> Tensor:
        return 2 * (output - target) * loss.w / len(output)

    def blocks(self, loss: Any, output: Tensor, target: Tensor) -> Tensor:
        return (2 * loss.w / len(output)).sqrt().expand_as(output)[..., None, None]


@pytest.mark.parametrize("hooked", [True, False])
def test_a_registered_loss_is_compared_in_float64_without_a_trace(
    hooked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a copy of the module with all of its tensors."""
    monkeypatch.setitem(LOSSES, Columns, OfColumns())
    loss_fn, (model, _, X, y) = Columns(), MODULES[0].build()
    at_batch = LossAtBatch(loss_fn, model.float()(X.float()), y.float(), hooked=hooked)
    want = reference.loss_hessian(lambda o, y: ((o - y).square() @ loss_fn.w.double()).mean(), at_batch.output, y)
    S = at_batch.factor.columns(slice(None)).flatten(2).double()
    got = torch.block_diag(*torch.einsum("cni,cnj->nij", S, S))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)
    assert loss_fn.calls == (1 if hooked else 0) and loss_fn.w.dtype == torch.float32


# ---------------------------------------------------------------------------------- what is refused


def call(loss_fn: Any, quantity: Any = None) -> None:
    model, _, X, y = FUNCTIONS[0].build()
    with unchanged(model):
        curvature(model, loss_fn, (X, y), quantity or ComponentGrad())


@pytest.mark.parametrize(
    ("loss_fn", "error", "says"),
    [
        (nn.MSELoss, TypeError, r"loss_fn is <class.*expected a loss module or a function.*e.g. MSELoss\(\)"),
        ("cross_entropy", TypeError, r"loss_fn is 'cross_entropy'; expected a loss module or a function"),
        (nn.NLLLoss(reduction="none"), ValueError, "NLLLoss has reduction='none'; expected 'mean' or 'sum'"),
        (partial(F.cross_entropy, reduction="none"), ValueError, r"cross_entropy returned shape \(6,\); expected"),
        (lambda o, y: float(o.detach().sum()), TypeError, "<lambda> returned float; expected a scalar tensor"),
        (lambda o, y: F.cross_entropy(o.detach(), y), ValueError, "<lambda> returned a value without a graph"),
        (lambda o, y: (o * torch.nan).sum(), ValueError, "<lambda>: its value is not finite"),
        (lambda o, y: (o - o).abs().sqrt().sum(), ValueError, "<lambda>: its gradient is not finite"),
        (lambda o, y: torch.ones((), requires_grad=True) * 2, ValueError, "<lambda> does not depend on the model's o"),
    ],
)  # fmt: skip
def test_refused(loss_fn: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        call(loss_fn)


def test_curvature_needs_convexity() -> None:
    for quantity in (DiagGGNExact(), bncurv.DiagGGNMC(), bncurv.DiagGGNMC(kind="labels"), bncurv.LowRankGGN()):
        with pytest.raises(ValueError, match="Margin is not convex in the model's output at sample 0.*take any loss"):
            call(Margin(), quantity)


def test_terms_past_the_output_are_refused() -> None:
    """Σ g_n would not be the gradient."""
    model, _, X, y = FUNCTIONS[0].build()
    penalty: Callable = lambda o, y: F.cross_entropy(o, y) + model[0].weight.square().sum()  # noqa: E731
    again: Callable = lambda o, y: F.cross_entropy(o, y) + model(X).square().mean()  # noqa: E731
    for loss_fn in (penalty, again):
        says = "<lambda> depends on the parameter '0.weight' past the model's output"
        with unchanged(model), pytest.raises(ValueError, match=says):
            curvature(model, loss_fn, (X, y), ComponentGrad())
    got = curvature(model, penalty, (X, y), ComponentGrad(), params=["3.bias"]).grad_component  # which it spares
    assert_close(got, reference.component_gradients(model, F.cross_entropy, X, y, ["3.bias"]))


def test_a_loss_may_look_into_the_network() -> None:
    """Below the parameters that are asked for."""
    model, _, X, y = FUNCTIONS[0].build()
    seen: list[Tensor] = []
    model[0].register_forward_hook(lambda module, args, out: seen.append(out))
    loss_fn: Callable = lambda o, y: F.cross_entropy(o, y) + seen[-1].square().mean()  # noqa: E731
    got = curvature(model, loss_fn, (X, y), ComponentGrad(), params=["3.bias"]).grad_component
    assert_close(got, reference.component_gradients(FUNCTIONS[0].model(), F.cross_entropy, X, y, ["3.bias"]))
    with pytest.raises(ValueError, match="depends on the parameter '0.weight' past the model's output"):
        curvature(model, loss_fn, (X, y), ComponentGrad())


def test_a_refused_penalty_keeps_its_graph() -> None:
    """It is the user's, who may have built it before."""
    model, _, X, y = FUNCTIONS[0].build()
    penalty = model[0].weight.square().sum()
    with pytest.raises(ValueError, match="past the model's output"):
        curvature(model, lambda o, y: F.cross_entropy(o, y) + penalty, (X, y), ComponentGrad())
    penalty.backward()
    torch.testing.assert_close(model[0].weight.grad, 2 * model[0].weight.detach())


def test_parameters_of_the_loss_are_constants() -> None:
    loss_fn = Scaled()
    model, _, X, y = FUNCTIONS[0].build()
    curvature(model, loss_fn, (X, y), ComponentGrad())
    assert loss_fn.temperature.grad is None and not loss_fn.calls
    with pytest.raises(ValueError, match="params names 'temperature', which Sequential does not have"):
        curvature(model, loss_fn, (X, y), ComponentGrad(), params=["temperature"])


# -------------------------------------------------------------------------------------- targets


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64], ids=str)
def test_class_indices(dtype: torch.dtype) -> None:
    """As many classes as uint8 has; the index of what is ignored is no uint8."""
    with_many = nn.Linear(4, 256).double()
    X, y = torch.randn(N, 4).double(), torch.tensor([156, 255, 0, 3, 156, 7])
    got = curvature(with_many, nn.CrossEntropyLoss(), (X, y.to(dtype)), DiagGGNExact(), ComponentGrad())
    assert_close(got.diag_ggn_exact, reference.ggn_diagonal(with_many, nn.CrossEntropyLoss(), X, y))
    assert_close(got.grad_component, reference.component_gradients(with_many, nn.CrossEntropyLoss(), X, y))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.bool], ids=str)
def test_other_integers_are_no_class_indices(dtype: torch.dtype) -> None:
    """PyTorch refuses them too."""
    model, _, X, y = FUNCTIONS[0].build()
    with pytest.raises(TypeError, match=rf"CrossEntropyLoss got a target of dtype {dtype}.*int64 or uint8.*y.long\(\)"):
        curvature(model, nn.CrossEntropyLoss(), (X, y.to(dtype)), DiagGGNExact())


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.float16, torch.float32], ids=str)
def test_numbers_of_any_kind(dtype: torch.dtype) -> None:
    model, _, X, y = MODULES[0].build()
    y = (y > 0).to(dtype)
    got = curvature(model, nn.MSELoss(), (X, y), DiagGGNExact(), ComponentGrad())
    assert_close(got.grad_component, reference.component_gradients(model, nn.MSELoss(), X, y.double()))
    loss_fn = nn.BCEWithLogitsLoss()
    if y.is_floating_point():
        got = curvature(model, loss_fn, (X, y), ComponentGrad())
        assert_close(got.grad_component, reference.component_gradients(model, loss_fn, X, y.double()))
    else:
        with pytest.raises(TypeError, match=rf"BCEWithLogitsLoss got a target of dtype {dtype}.*y.float\(\)"):
            curvature(model, loss_fn, (X, y), ComponentGrad())


class Labelled(nn.Module):
    """All rows make the statistics, some have a label."""

    def __init__(self, rows: Any) -> None:
        super().__init__()
        self.net, self.rows = net(), rows

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)[self.rows]


@pytest.mark.filterwarnings("error::bncurv.SlowPathWarning")
@pytest.mark.parametrize("method", ["auto", "coupled", "dense"])
@pytest.mark.parametrize("rows", [slice(0, 4), slice(None, None, 2), [5, 1, 2], slice(0, 1)], ids=str)
def test_unlabelled_rows(rows: Any, method: str) -> None:
    one = case("", lambda: Labelled(rows), lambda: (torch.randn(8, 4), torch.randint(C, (8,))[rows]))
    model, loss_fn, X, y = one.build()
    got = curvature(model, loss_fn, (X, y), DiagGGNExact(), ComponentGrad(), method=method)
    assert_close(got.diag_ggn_exact, reference.ggn_diagonal(*one.build()))
    assert_close(got.grad_component, reference.component_gradients(*one.build()))
