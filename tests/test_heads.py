"""Several outputs: one GGN of the loss that joins them."""

from collections import OrderedDict, namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import case, labelled, mlp
from state import unchanged
from test_exact import assert_close
from torch import Tensor, nn
from torch.nn import functional as F

from bncurv import ComponentGrad, DiagGGNExact, LowRankGGN, curvature, reference

N, C = 6, 3
Pair = namedtuple("Pair", "logits size")
CONTAINERS: dict[str, Callable] = {
    "tuple": lambda a, b: (a, b),
    "list": lambda a, b: [a, b],
    "dict": lambda a, b: {"a": a, "b": b},
    "ordered": lambda a, b: OrderedDict(a=a, b=b),
    "named": Pair,
    "nested": lambda a, b: (None, {"a": a}, [b]),
}


def parts(output: Any) -> tuple[Tensor, Tensor]:
    if len(output) == 3:
        return output[1]["a"], output[2][0]
    return tuple(output.values()) if isinstance(output, dict) else tuple(output)


class TwoHeads(nn.Module):
    """Classes, and a number of no further axis."""

    def __init__(self, container: str) -> None:
        super().__init__()
        self.body, self.a, self.b, self.container = mlp(4, 5, 4), nn.Linear(4, C), nn.Linear(4, 1), container

    def forward(self, x: Tensor) -> Any:
        h = self.body(x)
        return CONTAINERS[self.container](self.a(h), self.b(h).squeeze(1))


def weighted(output: Any, y: Tensor) -> Tensor:
    a, b = parts(output)
    return F.cross_entropy(a, y) + 0.3 * F.huber_loss(b, y.to(b.dtype), delta=5.0)


def joining(output: Any, y: Tensor) -> Tensor:
    a, b = parts(output)
    return (a.logsumexp(1) + (b + a[:, 0]) ** 2).mean()


class Scaled(nn.Module):
    """A loss module, with a tensor that must come along to float64."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("w", torch.linspace(0.5, 2, C))

    def forward(self, output: Any, y: Tensor) -> Tensor:
        a, b = parts(output)
        return F.cross_entropy(a, y, self.w) + b.exp().mean()


class Flat(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        a, b = parts(self.model(x))
        return torch.cat([a, b[:, None]], 1)


def oracle(of: Callable, model: nn.Module, loss_fn: Callable, X: Tensor, y: Tensor) -> dict[str, Tensor]:
    found = of(Flat(model), lambda o, y: loss_fn((o[:, :C], o[:, C]), y), X, y)
    return {name.removeprefix("model."): t for name, t in found.items()}


@pytest.mark.parametrize("method", ["coupled", "dense"])
@pytest.mark.parametrize(
    ("container", "loss_fn"),
    [*((c, weighted) for c in CONTAINERS), ("tuple", joining), ("dict", Scaled)],
)
def test_exact(container: str, loss_fn: Any, method: str) -> None:
    loss_of = loss_fn if isinstance(loss_fn, type) else lambda: loss_fn
    model, loss, X, y = case("", lambda: TwoHeads(container), labelled(N, 4, C=C), loss_of).build()
    with unchanged(model):
        got = curvature(model, loss, (X, y), DiagGGNExact(), ComponentGrad(), LowRankGGN(), method=method)
    assert_close(got.diag_ggn_exact, oracle(reference.ggn_diagonal, model, loss, X, y))
    assert_close(got.grad_component, oracle(reference.component_gradients, model, loss, X, y))
    torch.testing.assert_close(got.ggn.trace, sum(t.sum() for t in got.diag_ggn_exact.values()))


def test_passes_are_those_of_the_columns() -> None:
    """C - 1 of the classes, one of the number: not one per head and entry."""
    model, loss, X, y = case("", lambda: TwoHeads("tuple"), labelled(N, 4, C=C), lambda: weighted).build()
    assert curvature(model, loss, (X, y), DiagGGNExact(), method="dense").passes == N * C


def test_mini_batches() -> None:
    model, loss, X, y = case("", lambda: TwoHeads("dict").eval(), labelled(N, 4, C=C), lambda: weighted).build()
    want = curvature(model, loss, (X, y), DiagGGNExact()).diag_ggn_exact
    got = curvature(model, loss, [(X[:4], y[:4]), (X[4:], y[4:])], DiagGGNExact()).diag_ggn_exact
    assert_close(got, want)


class Returns(nn.Module):
    def __init__(self, what: Callable) -> None:
        super().__init__()
        self.net, self.what = nn.Linear(4, C), what

    def forward(self, x: Tensor) -> Any:
        return self.what(self.net(x))


@pytest.mark.parametrize(
    ("what", "loss_fn", "says"),
    [
        (lambda o: (o, o.argmax(1)), joining, r"tuple of tensors \(6, 3\) \(float32\), \(6,\) \(int64\); expected"),
        (lambda o: (o, o.mean(0)), joining, r"\(3,\) \(float32\); expected floating-point.*Wrap the model"),
        (lambda o: (None,), joining, r"tuple of tensors \(none\)"),
        (lambda o: (o, o), nn.CrossEntropyLoss(), r"the model returns tuple with \[0\] .*; expected one tensor"),
        (lambda o: (o, o), F.cross_entropy, r"the model returns tuple with \[0\] .*; expected one tensor"),
    ],
)
def test_refused(what: Callable, loss_fn: Any, says: str) -> None:
    with pytest.raises(TypeError, match=says):
        curvature(Returns(what), loss_fn, (torch.randn(N, 4), torch.zeros(N).long()), DiagGGNExact())
