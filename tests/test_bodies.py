"""Functions taken apart into rows of the layer table: products, recurrent layers, bags, PyTorch's own names."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as nnf
from cases import Net
from test_every_parameter import N, assert_exact, coupled, parameter, problem, rows
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from bncurv import ComponentGrad, DiagGGNExact, SlowPathWarning, curvature, extend
from bncurv.record import Recorder


def contracted(equation: str, *shape: int) -> Callable[[], nn.Module]:
    return rows(lambda net, h: h + torch.einsum(equation, net.w, h), w=lambda: parameter(*shape))


def implicit(net: Net, h: Tensor) -> Tensor:
    return h * torch.einsum("zc,ntc", net.w, h).mean(1)[:, None]


def two_weights(net: Net, h: Tensor) -> Tensor:
    return h + torch.einsum("ntc,cr,rd->ntd", [h, net.u, net.w])


def two_inputs(net: Net, h: Tensor) -> Tensor:
    return h + torch.einsum("ntc,cde,nte->ntd", h, net.w, h)


def bags(net: Net, h: Tensor) -> Tensor:
    """Bags of three, and of 1, 2, 3, 1, ... weighted tokens with a padding."""
    index = torch.arange(3 * len(h)).view(-1, 3) % 6
    number = torch.arange(len(h)) % 3 + 1
    flat = torch.arange(int(number.sum())) * 5 % 6
    options = {"mode": "sum", "padding_idx": 1, "per_sample_weights": torch.linspace(1, 2, len(flat)).to(h)}
    return h * (net.e(index) + nnf.embedding_bag(flat, net.f, number.cumsum(0) - number, **options))[:, None]


def mean_of_bags(net: Net, h: Tensor) -> Tensor:
    """With a padding, an empty bag, and the last offset."""
    offsets = torch.arange(len(h) + 1) * 2
    offsets[1] = 0
    return (
        h
        * nnf.embedding_bag(torch.arange(2 * len(h)) % 6, net.f, offsets, padding_idx=-1, include_last_offset=True)[
            :, None
        ]
    )


def other_names(net: Net, h: Tensor) -> Tensor:
    """PyTorch's own names of what torch.nn.functional has others for."""
    h = torch.batch_norm(h, net.n2.weight, net.n2.bias, None, None, True, 0.1, 1e-5, False)
    h = torch.layer_norm(h, (4,), net.w, net.w) + torch.group_norm(h, 2, net.w, net.w)
    h = h + torch.instance_norm(h, net.w, net.w, None, None, True, 0.1, 1e-5, False)
    return h + torch.embedding(net.e.weight, torch.arange(4 * len(h)).view(-1, 4) % 6)


def cells(net: Net, h: Tensor) -> Tensor:
    state, other, last = h[:, 0] * 0, (h[:, 0] * 0, h[:, 0] * 0), h[:, 0]
    for x in h.unbind(1):
        state, other, last = net.g(x, state), net.l(x, other), net.t(x, last)
    return (state + other[0] + last)[:, None]


BODIES: dict[str, Callable[[], nn.Module]] = {
    "einsum, left": contracted("tu,nuc->ntc", 4, 4),
    "einsum, right": contracted("dc,nt...d->nt...c", 4, 4),
    "einsum, groups": contracted("tcd,ntc->ntd", 4, 4, 4),
    "einsum, gate": contracted("c,...c->...c", 4),
    "einsum, implicit": rows(implicit, w=lambda: parameter(4, 4)),
    "einsum, two weights": rows(two_weights, u=lambda: parameter(4, 2), w=lambda: parameter(2, 4)),
    "einsum, two inputs": rows(two_inputs, w=lambda: parameter(4, 4, 4)),
    "matmul from the left": rows(lambda net, h: net.w @ h, w=lambda: parameter(4, 4)),
    "bmm": rows(lambda net, h: torch.bmm(h.transpose(0, 1), net.w).transpose(0, 1), w=lambda: parameter(4, 4, 4)),
    "baddbmm": rows(lambda net, h: torch.baddbmm(net.b, h, h.mT, beta=0.5, alpha=2) @ h, b=lambda: parameter(1, 4, 4)),
    "addmm": rows(
        lambda net, h: torch.addmm(h[:, 0], h[:, 1], net.w, alpha=2)[:, None], w=lambda: parameter(4, 4)
    ),
    "arguments by name": rows(
        lambda net, h: torch.matmul(input=h, other=net.w) + nnf.bilinear(input1=h, input2=h, weight=net.v),
        w=lambda: parameter(4, 4), v=lambda: parameter(4, 4, 4),
    ),
    "axes of one": rows(
        lambda net, h: (h[:, None] @ net.w).sum(1) + torch.einsum("ntc,co->nto", h[..., :1], net.u),
        w=lambda: parameter(1, 3, 4, 4), u=lambda: parameter(4, 4),
    ),
    "vector": rows(lambda net, h: h * (h @ net.w)[..., None], w=lambda: parameter(4)),
    "bilinear": rows(lambda net, h: net.q(h, h.flip(1)), q=lambda: nn.Bilinear(4, 4, 4)),
    "bags": rows(bags, e=lambda: nn.EmbeddingBag(6, 4), f=lambda: parameter(6, 4)),
    "mean of bags": rows(mean_of_bags, f=lambda: parameter(6, 4)),
    "other names": rows(
        other_names, n2=lambda: nn.BatchNorm1d(4), w=lambda: parameter(4), e=lambda: nn.Embedding(6, 4)
    ),
    "cells": rows(cells, g=lambda: nn.GRUCell(4, 4), l=lambda: nn.LSTMCell(4, 4), t=lambda: nn.RNNCell(4, 4)),
}  # fmt: skip


def recurrent(kind: Callable[..., nn.Module], width: int = 4, **options: Any) -> Callable[[], nn.Module]:
    """Over the tokens, batch first or time first."""
    first = options.setdefault("batch_first", True)

    def forward(net: Net, h: Tensor) -> Tensor:
        y, _ = net.r(h if first else h.transpose(0, 1))
        return net.p(y if first else y.transpose(0, 1))

    return rows(forward, r=lambda: kind(4, 3, **options), p=lambda: nn.Linear(width, 4))


BODIES |= {
    "GRU": recurrent(nn.GRU, 3),
    "LSTM, both ways, stacked": recurrent(nn.LSTM, 6, bidirectional=True, num_layers=2),
    "LSTM, projected, no bias": recurrent(nn.LSTM, 2, proj_size=2, bias=False),
    "RNN, time first": recurrent(nn.RNN, 3, batch_first=False, nonlinearity="relu"),
}


@pytest.mark.parametrize("name", BODIES)
def test_fast_and_exact(name):
    """Coupled passes for all parameters; diagonal and components as the oracle's."""
    model, X, y = problem(name, BODIES)
    res = coupled(model, X, y)
    R = sum(2 * m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm1d))
    assert res.passes <= 3 + R < N
    assert_exact(model, X, y, res)


@pytest.mark.parametrize("name", BODIES)
def test_forward_and_backward_are_pytorchs(name):
    """Of an extended model: to rounding; also the same random numbers."""
    model, X, y = problem(name, BODIES)
    plain = copy.deepcopy(model)
    torch.testing.assert_close(extend(model)(X), plain(X), rtol=1e-13, atol=1e-14)
    nnf.cross_entropy(model(X), y).backward(), nnf.cross_entropy(plain(X), y).backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-11, atol=1e-13)


def test_the_watch_goes_on_behind_a_body():
    """Same gates, hooks and constants before and after a function that is taken apart."""
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Bilinear(6, 6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    forward = lambda net, x: net.m[3:](net.m[2](h := net.m[:2](x).tanh(), h)).tanh()  # noqa: E731
    net = Net(forward, m=model)
    recorder = Recorder(net)
    with recorder:
        before = recorder._gates, recorder._constants, recorder._stack
        net(torch.randn(6, 4))
        assert all(a is b for a, b in zip(before, (recorder._gates, recorder._constants, recorder._stack), strict=True))
        assert any(getattr(h, "__self__", None) is recorder for h in torch_module._global_forward_hooks.values())


def test_dropout_between_recurrent_layers_draws_what_pytorch_draws():
    layer = nn.LSTM(4, 3, num_layers=3, dropout=0.5, batch_first=True).double()
    x = torch.randn(5, 6, 4, dtype=torch.float64)
    torch.manual_seed(0)
    want = layer(x)[0]
    torch.manual_seed(0)
    torch.testing.assert_close(extend(layer)(x)[0], want)


def packed(net: Net, h: Tensor) -> Tensor:
    lengths = torch.arange(len(h)) % 4 + 1
    sequence = nn.utils.rnn.pack_padded_sequence(h, lengths, batch_first=True, enforce_sorted=False)
    return net.r(sequence)[1].transpose(0, 1)


def diagonal(net: Net, h: Tensor) -> Tensor:
    return h + torch.einsum("ntc,cc->ntc", h, net.w)


def largest(net: Net, h: Tensor) -> Tensor:
    return h * nnf.embedding_bag(torch.arange(3 * len(h)).view(-1, 3) % 6, net.f, mode="max")[:, None]


def constant(net: Net, h: Tensor) -> Tensor:
    return h @ (net.basis @ net.w)


SLOW = {
    "r": rows(packed, r=lambda: nn.GRU(4, 4, batch_first=True)),
    "w": rows(diagonal, w=lambda: parameter(4, 4)),
    "f": rows(largest, f=lambda: parameter(6, 4)),
}  # fmt: skip


@pytest.mark.parametrize("name", SLOW)
def test_forms_that_are_not_taken_apart(name):
    """They run as they are, and their own parameters go the dense way."""
    model, X, y = problem(name, SLOW)
    with pytest.warns(
        SlowPathWarning, match=f"No parameter product for '{name}.*(no row of the layer table|no samples)"
    ):
        res = curvature(model, nn.CrossEntropyLoss(), (X, y), DiagGGNExact(), ComponentGrad(), method="coupled")
    assert_exact(model, X, y, res)


@pytest.mark.parametrize(
    "product",
    [
        lambda h, w: torch.mm(h, w),
        lambda h, w: torch.bmm(h, w[None]),
        lambda h, w: h[..., :1] @ w,
        lambda h, w: torch.addmm(w, h, w),
    ],
)
def test_what_pytorch_refuses(product):  # fmt: skip
    model, X, y = problem("", {"": rows(lambda net, h: product(h, net.w), w=lambda: parameter(4, 4))})
    with pytest.raises(RuntimeError, match="matri|shapes cannot|Expected size|must be"):
        curvature(model, nn.CrossEntropyLoss(), (X, y), DiagGGNExact())


def test_products_of_buffers_with_parameters_are_weights():
    model, X, y = problem("", {"": rows(constant, w=lambda: parameter(4, 4), basis=lambda: nn.Identity())})
    del model.basis
    model.register_buffer("basis", torch.randn(4, 4, dtype=torch.float64))
    res = coupled(model, X, y)
    assert_exact(model, X, y, res)


class Unknown(nn.Module):
    """A layer in a function without a row."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(-0.5))

    def forward(self, h: Tensor) -> Tensor:
        return h.masked_fill(h > 0.5, self.w).masked_fill(h < -0.5, self.b)


def test_many_slow_parameters_are_summarised_by_type_of_module():
    layers = {f"u{i}": Unknown for i in range(4)}
    forward = lambda net, h: net.u0(h) + net.u1(h) + net.u2(h) * net.u3(h)  # noqa: E731
    model, X, y = problem("", {"": rows(forward, **layers)})
    said = r"8 parameters of 4 Unknown \('u0.w', ...\) \(used in .*\(10 passes without them, 48 with them\)"
    with pytest.warns(SlowPathWarning, match=said):
        curvature(model, nn.CrossEntropyLoss(), (X, y), DiagGGNExact(), method="coupled")
