"""Parameters outside of plain layers: computed weights, parameters that broadcast against data, matrix products."""

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as nnf
from backpack import backpack
from cases import Net, float64, perturb
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from bncurv import (
    ComponentGrad,
    CouplingReport,
    DiagGGNExact,
    InfluenceGrad,
    InfluenceProjection,
    LowRankGGN,
    Results,
    SlowPathWarning,
    curvature,
    extend,
    reference,
)

P = nn.Parameter
N = 24


def parameter(*shape: int) -> nn.Parameter:
    return P(0.5 + 0.5 * torch.rand(shape))


def images(between: Callable = lambda net, h: h, **parts: Callable) -> Callable[[], nn.Module]:
    """Conv, BatchNorm, something, pooling, linear."""

    def forward(net: Net, x: Tensor) -> Tensor:
        h = torch.tanh(net.n(net.a(x.view(-1, 2, 4, 4))))
        return net.o(between(net, h).mean((2, 3)))

    make = {"a": lambda: nn.Conv2d(2, 4, 3), "n": lambda: nn.BatchNorm2d(4), "o": lambda: nn.Linear(4, 3)}
    return lambda: Net(forward, **{key: m() for key, m in {**make, **parts}.items()})


def rows(between: Callable, tokens: int = 4, width: int = 4, **parts: Callable) -> Callable[[], nn.Module]:
    """Tokens, linear layer, BatchNorm over its features, something, mean, linear."""

    def forward(net: Net, x: Tensor) -> Tensor:
        h = net.a(x.view(-1, tokens, 32 // tokens))
        h = torch.tanh(net.n(h.transpose(1, 2)).transpose(1, 2))
        return net.o(between(net, h).mean(1))

    make = {"a": lambda: nn.Linear(32 // tokens, width), "n": lambda: nn.BatchNorm1d(width)}
    make["o"] = lambda: nn.Linear(width, 3)
    return lambda: Net(forward, **{key: m() for key, m in {**make, **parts}.items()})


class Mask(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w * (torch.arange(w.numel()) % 3 > 0).to(w).view_as(w)


def pruned() -> nn.Module:
    return parametrize.register_parametrization(nn.Conv2d(2, 4, 3), "weight", Mask())


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2, 3), True)) / (w.std((1, 2, 3), keepdim=True) + 1e-3)
        return nnf.conv2d(x, w, self.bias)


class LoRA(nn.Linear):
    def __init__(self, *size: int) -> None:
        super().__init__(*size)
        self.up, self.down = parameter(size[1], 2), parameter(2, size[0])

    def forward(self, x: Tensor) -> Tensor:
        return nnf.linear(x, self.weight + self.up @ self.down, self.bias)


def token(net: Net, h: Tensor) -> Tensor:
    return torch.cat([net.cls.expand(len(h), -1, -1), h], 1) + net.pos


def distances(tokens: int = 4) -> Tensor:
    return torch.arange(tokens)[:, None] - torch.arange(tokens) + tokens - 1


def heads(h: Tensor) -> Tensor:
    """``[n, t, (h d)]`` → ``[(n h), t, d]`` of two heads."""
    return h.unflatten(2, (2, -1)).transpose(1, 2).flatten(0, 1)


FAST: dict[str, Callable[[], nn.Module]] = {
    "weight norm": images(a=lambda: parametrizations.weight_norm(nn.Conv2d(2, 4, 3))),
    "spectral norm": images(a=lambda: parametrizations.spectral_norm(nn.Conv2d(2, 4, 3)).eval()),
    "orthogonal": rows(lambda net, h: net.q(h), q=lambda: parametrizations.orthogonal(nn.Linear(4, 4))),
    "pruned": images(a=pruned),
    "standardised": images(a=lambda: Standardised(2, 4, 3)),
    "LoRA": rows(lambda net, h: net.q(h), q=lambda: LoRA(4, 4)),
    "tied, transposed": rows(lambda net, h: nnf.linear(net.q(h).tanh(), net.q.weight.t()), q=lambda: nn.Linear(4, 5)),
    "straight-through": rows(
        lambda net, h: nnf.linear(h, net.w + (net.w.round() - net.w).detach()), w=lambda: parameter(4, 4)
    ),
    "packed": rows(lambda net, h: nnf.linear(h, net.w[:4]) * nnf.linear(h, net.w[4:]), w=lambda: parameter(8, 4)),
    "computed bias": rows(
        lambda net, h: nnf.linear(h, net.w, net.b.exp()), w=lambda: parameter(4, 4), b=lambda: parameter(4)
    ),
    "LayerScale": images(lambda net, h: h + net.g * net.n2(net.b(h)), g=lambda: parameter(4, 1, 1),
                         b=lambda: nn.Conv2d(4, 4, 1), n2=lambda: nn.BatchNorm2d(4)),
    "LayerScale, viewed": images(lambda net, h: h + h.sin() * net.g.view(1, -1, 1, 1), g=lambda: parameter(4)),
    "0-d temperature": images(lambda net, h: h / net.t, t=lambda: parameter()),
    "0-d exponent": images(lambda net, h: h.square().add(0.1) ** net.t, t=lambda: parameter()),
    "exponential of a gate": images(lambda net, h: h * torch.sigmoid(net.g)[:, None, None], g=lambda: parameter(4)),
    "in place": images(lambda net, h: (h * 1.0).mul_(net.g).add_(net.g), g=lambda: parameter(4, 1, 1)),
    "token and positions": rows(token, cls=lambda: parameter(1, 1, 4), pos=lambda: parameter(1, 5, 4)),
    "positions, sliced": rows(lambda net, h: h + net.pos[:, : h.shape[1]], pos=lambda: parameter(1, 9, 4)),
    "position table": rows(lambda net, h: h + net.e(torch.arange(4)), e=lambda: nn.Embedding(6, 4)),
    "bias of scores": rows(
        lambda net, h: (h @ h.mT + net.b).softmax(-1) @ h, b=lambda: parameter(4, 4)
    ),
    "PReLU": images(lambda net, h: net.p(h), p=lambda: nn.PReLU()),
    "PReLU, channels": images(lambda net, h: net.p(h), p=lambda: nn.PReLU(4)),
    "RMSNorm": rows(lambda net, h: net.r(h), r=lambda: nn.RMSNorm(4)),
    "own RMSNorm": rows(lambda net, h: h * (h.square().mean(-1, True) + 1e-3).rsqrt() * net.g, g=lambda: parameter(4)),
    "matmul": rows(lambda net, h: h @ net.w + net.b, w=lambda: parameter(4, 4), b=lambda: parameter(4)),
    "torch.matmul": rows(lambda net, h: torch.matmul(h, net.w), w=lambda: parameter(4, 4)),
    "addmm": rows(
        lambda net, h: torch.addmm(net.b, h.mean(1), net.w)[:, None], w=lambda: parameter(4, 4), b=lambda: parameter(4)
    ),
    "computed affine of a BatchNorm": rows(
        lambda net, h: nnf.batch_norm(h.transpose(1, 2), None, None, net.g.exp(), None, True).transpose(1, 2),
        g=lambda: parameter(4),
    ),
    "two-dimensional bias by data": rows(lambda net, h: torch.where(h > 0, h, net.g * h), g=lambda: parameter(4, 4)),
    "token, repeated": rows(
        lambda net, h: torch.cat([net.cls.repeat(len(h), 2, 1), h], 1), cls=lambda: parameter(1, 1, 4)
    ),
    "mask of attention": rows(
        lambda net, h: nnf.scaled_dot_product_attention(h, h, h, net.b.mul(2)), b=lambda: parameter(4, 4)
    ),
    "mask of attention, by name": rows(
        lambda net, h: nnf.scaled_dot_product_attention(attn_mask=net.b, query=h, value=h[:, 1:], key=h[:, 1:]),
        b=lambda: parameter(1, 1, 3),
    ),
    "relative positions": rows(
        lambda net, h: (h @ h.mT + net.e(distances()).permute(2, 0, 1).sum(0)[None]).softmax(-1) @ h,
        e=lambda: nn.Embedding(7, 2),
    ),
    "positions by a layer": rows(
        lambda net, h: h + net.p(torch.arange(4)[None, :, None].to(h.dtype).sin()).exp(), p=lambda: nn.Linear(1, 4)
    ),
    "positions that a module holds": rows(
        lambda net, h: h @ net.p(net.table.to(h.dtype)).mT @ h, p=lambda: nn.Linear(2, 4),
        table=lambda: torch.randn(1, 4, 2),
    ),
    "keys of heads, repeated": rows(
        lambda net, h: torch.bmm(heads(h), net.k.exp().repeat(len(h), 1, 1)).view(len(h), 2, 4, 4).sum(1),
        k=lambda: parameter(2, 2, 4),
    ),
    "slope of distances": rows(
        lambda net, h: (h @ h.mT + (net.t * distances())[None]).softmax(-1) @ h, t=lambda: parameter(1)
    ),
    "token of the data": rows(lambda net, h: h + net.e((h[:, 0, :1] > 0).long()), e=lambda: nn.Embedding(2, 4)),
    "table, sliced": rows(lambda net, h: h + net.e(torch.arange(N) % 6)[:4], e=lambda: nn.Embedding(6, 4)),
    "matmul from the left": rows(lambda net, h: net.w @ h, w=lambda: parameter(5, 4)),
    "maximum": rows(lambda net, h: torch.maximum(h, net.g - 0.7), g=lambda: parameter(4)),
    "gate, time first": rows(lambda net, h: (h.transpose(0, 1) * net.g).transpose(0, 1), g=lambda: parameter(4)),
    "table, time first": rows(lambda net, h: (h.transpose(0, 1) * net.g).transpose(0, 1),
                              g=lambda: parameter(4, 1, 4)),
    "table, samples last": rows(lambda net, h: (h.movedim(0, -1) * net.g).movedim(-1, 0), g=lambda: parameter(4, 4, 1)),
}  # fmt: skip


OUTSIDE, NO_SAMPLES = "used in a function that is no row of the layer table", "used on rows that are no samples"
CAUSES = {"e.weight": NO_SAMPLES, "v": OUTSIDE, "t": OUTSIDE}


def filled(net: Net, h: Tensor) -> Tensor:
    return h.masked_fill(h > 0.5, net.v)


SLOW: dict[str, Callable[[], nn.Module]] = {  # exact, but these go the dense way, with a warning by name; no others
    "e.weight": rows(lambda net, h: h + net.e((h[0, :, 0] > 0).long())[:4], e=lambda: nn.Embedding(6, 4)),
    "v": rows(filled, v=lambda: parameter()),
    "t": rows(lambda net, h: torch.cat([net.t.repeat(len(h), 2, 1), h], 1), t=lambda: parameter(1, 2, 4)),
}


def problem(name: str, build: dict[str, Callable[[], nn.Module]]) -> tuple[nn.Module, Tensor, Tensor]:
    with float64(0):
        model = build[name]()
        perturb(model)
        return model, torch.randn(N, 32), torch.randint(3, (N,))


def coupled(model: nn.Module, X: Tensor, y: Tensor) -> Results:
    """Diagonal and components by the coupled way, without a slow path."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowPathWarning)
        return curvature(model, nn.CrossEntropyLoss(), (X, y), DiagGGNExact(), ComponentGrad(), method="coupled")


@pytest.mark.parametrize("name", FAST)
def test_fast_and_exact(name):
    """Coupled passes for all parameters; diagonal and components as the oracle's."""
    model, X, y = problem(name, FAST)
    res = coupled(model, X, y)
    R = sum(2 * m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d))
    assert res.passes <= 2 + 1 + R + 8 < N * 2
    assert_exact(model, X, y, res)


def assert_exact(model: nn.Module, X: Tensor, y: Tensor, res: Results) -> None:
    for oracle, got in (
        (reference.ggn_diagonal, res.diag_ggn_exact),
        (reference.component_gradients, res.grad_component),
    ):
        want = oracle(model, nn.CrossEntropyLoss(), X, y)
        whole = max(float(t.norm()) for t in want.values())
        for key, t in want.items():
            assert float((got[key] - t).norm()) <= 1e-10 * float(t.norm()) + 1e-13 * whole, key


@pytest.mark.parametrize("name", SLOW)
def test_slow_alone(name):
    """One parameter without a product takes the dense way, and no other does."""
    model, X, y = problem(name, SLOW)
    with pytest.warns(SlowPathWarning, match=f"product for '{name}' \\({CAUSES[name]}\\).*without it") as said:
        res = curvature(model, nn.CrossEntropyLoss(), (X, y), DiagGGNExact(), ComponentGrad(), method="coupled")
    assert len(said) == 1
    assert_exact(model, X, y, res)


def test_a_slow_first_function_makes_no_other_parameter_slow():
    """What an unknown function makes of the input and a parameter is data all the same."""
    layers = {"v": parameter(), "a": nn.Linear(32, 4), "n": nn.BatchNorm1d(4), "o": nn.Linear(4, 3)}
    forward = lambda net, x: net.o(net.n(net.a(x.masked_fill(x > 0.5, net.v))).tanh())  # noqa: E731
    model, X, y = problem("", {"": lambda: Net(forward, **layers).double()})
    with pytest.warns(SlowPathWarning, match=f"product for 'v' \\({OUTSIDE}\\).*\\(3 passes without it"):
        res = curvature(model, nn.CrossEntropyLoss(), (X, y), DiagGGNExact(), ComponentGrad(), method="coupled")
    assert_exact(model, X, y, res)


def test_copies_do_not_promote():
    """A 0-d parameter in float64 leaves data in float32 as they are; the forward pass is PyTorch's own, to the bit."""
    torch.manual_seed(0)
    layers = {"a": nn.Linear(4, 5), "n": nn.BatchNorm1d(5), "o": nn.Linear(5, 3), "t": P(torch.tensor(0.3).double())}
    model, dtypes = Net(lambda net, x: net.o(note(net.n(net.a(x)) * net.t)), **layers), []

    def note(h: Tensor) -> Tensor:
        dtypes.append(h.dtype)
        return h

    names = [name for name, _ in model.named_parameters() if name != "t"]
    data = torch.randn(N, 4), torch.randint(3, (N,))
    with pytest.raises(TypeError, match="all float32 or all float64"):
        curvature(model, nn.CrossEntropyLoss(), data, DiagGGNExact())
    curvature(model, nn.CrossEntropyLoss(), data, DiagGGNExact(), params=names)
    assert set(dtypes) == {torch.float32}


@pytest.mark.parametrize("name", ["LayerScale", "token and positions", "orthogonal", "in place"])
def test_forward_and_backward_are_pytorchs(name):
    """Of an extended model: to the bit, but for the order of sums in copied parameters' gradients."""
    model, X, y = problem(name, FAST)
    plain = copy.deepcopy(model)
    plain_output, output = plain(X), extend(model)(X)
    assert torch.equal(output, plain_output)
    for got in (output, plain_output):
        nn.functional.cross_entropy(got, y).backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-13, atol=1e-15)


# ---------------------------------------------------------------------------- rows in another order
def views(net: Net, x: Tensor) -> Tensor:
    """Two views joined along the batch: row i belongs to sample i % N."""
    h = torch.tanh(net.n(net.a(torch.cat([x, x.flip(1)]))))
    one, two = net.b(h).chunk(2)
    return net.o((one - two).abs())


def time_first(net: Net, x: Tensor) -> Tensor:
    """``[T, N, D]`` from the beginning; BatchNorm over ``[T N, D]``."""
    h = net.a(x.view(-1, 4, 8).transpose(0, 1))
    h = torch.tanh(net.n(h.flatten(0, 1)).view_as(h))
    return net.o(net.l(net.b(h)).mean(0))


ORDERED: dict[str, Callable[[], nn.Module]] = {
    "views": lambda: Net(views, a=nn.Linear(32, 5), n=nn.BatchNorm1d(5), b=nn.Linear(5, 4), o=nn.Linear(4, 3)),
    "time first": lambda: Net(
        time_first, a=nn.Linear(8, 5), n=nn.BatchNorm1d(5), b=nn.Linear(5, 4), l=nn.LayerNorm(4), o=nn.Linear(4, 3)
    ),
}


def attention(first: bool) -> Callable[[], nn.Module]:
    """An encoder layer, a BatchNorm in front."""

    def forward(net: Net, x: Tensor) -> Tensor:
        h = net.n(net.a(x.view(-1, 4, 8)).mT).mT
        h = net.e(h if first else h.transpose(0, 1))
        return net.o(h.mean(1 if first else 0))

    encoder = dict(nhead=2, dim_feedforward=6, dropout=0.0, activation="gelu", batch_first=first)
    return lambda: Net(
        forward,
        **{"a": nn.Linear(8, 4), "n": nn.BatchNorm1d(4), "o": nn.Linear(4, 3)},
        e=nn.TransformerEncoderLayer(4, **encoder),
    )


ORDERED |= {"attention": attention(True), "attention, time first": attention(False)}


def ordered(forward: Callable, **more: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """A net of 32 → 5 → 4 → 3 with a BatchNorm, wired as ``forward`` says."""

    def build() -> nn.Module:
        layers = {"a": nn.Linear(32, 5), "n": nn.BatchNorm1d(5), "b": nn.Linear(5, 4), "o": nn.Linear(4, 3)}
        return Net(forward, **layers, **{name: make() for name, make in more.items()})

    return build


def shuffled(net: Net, x: Tensor) -> Tensor:
    """ShuffleBN: the batch in another order inside, in yet another one later."""
    index = torch.arange(len(x)).mul(5).remainder(len(x)) if len(x) % 5 else torch.arange(len(x)).flip(0)
    h = torch.tanh(net.n(net.a(x[index])))
    return net.o(net.b(h.flip(0)).flip(0)[index.argsort()].relu())


def graphs(net: Net, x: Tensor) -> Tensor:
    """Node-wise layers over graphs of 1, 2, 3, 1, 2, 3, ... nodes, read out by index_add."""
    owner = torch.arange(len(x)).repeat_interleave(torch.arange(len(x)) % 3 + 1)
    nodes = x[owner] * torch.linspace(0.5, 1.5, len(owner)).view(-1, 1).to(x)
    h = net.b(torch.tanh(net.n(net.a(nodes))))
    return net.o(h.new_zeros(len(x), 4).index_add(0, owner, h))


def unlabelled(net: Net, x: Tensor) -> Tensor:
    """Rows that no loss looks at set the statistics too: fewer or more than the labelled ones."""
    rows = torch.cat([x.flip(1)[: len(x) // 2 + 1], x])
    return net.o(net.b(torch.tanh(net.n(net.a(rows)))).relu())[len(x) // 2 + 1 :]


def experts(net: Net, x: Tensor) -> Tensor:
    """Every sample goes through one of two layers."""
    h = torch.tanh(net.n(net.a(x)))
    first = torch.arange(len(x)) % 3 > 0
    y = h.new_zeros(len(x), 4)
    y[first], y[~first] = net.b(h[first]), net.c(h[~first])
    return net.o(y)


def ghost(net: Net, x: Tensor) -> Tensor:
    """Ghost BatchNorm: the same layer on parts of the batch."""
    h = net.a(x)
    return net.o(net.b(torch.cat([torch.tanh(net.n(part)) for part in h.split(-(-len(x) // 2))])))


def domains(net: Net, x: Tensor) -> Tensor:
    """Domain-split BatchNorm: one layer for the even rows, one for the odd ones."""
    h = net.a(x)
    y = torch.stack([net.n(h[::2]), net.m(h[1::2])], 1).flatten(0, 1)
    return net.o(net.b(torch.tanh(y)))


def overlapping(net: Net, x: Tensor) -> Tensor:
    """The same BatchNorm on parts of the batch that share rows: no pass can serve both."""
    h, half = net.a(x), len(x) // 2
    first, second = net.n(h[: half + 1]), net.n(h[half - 1 :])
    return net.o(net.b(torch.tanh(torch.cat([first[:half], second[1:]]))))


def channels_last(net: Net, x: Tensor) -> Tensor:
    """Attention over ``[L, N, E]``, L and N in that order, E last."""
    h = net.n(net.a(x)).view(len(x), 5, 1).permute(1, 0, 2) * torch.ones(5).to(x)
    return net.o(net.b(torch.tanh(h)).mean(0))


MIXED_ROWS = {
    "shuffled": (ordered(shuffled), 13),
    "unequal graphs": (ordered(graphs), 13),
    "unlabelled": (ordered(unlabelled), 13),
    "experts": (ordered(experts, c=lambda: nn.Linear(5, 4)), 13),
    "ghost": (ordered(ghost), 13),
    "overlapping": (ordered(overlapping), 23),
    "domains": (ordered(domains, m=lambda: nn.BatchNorm1d(5)), 23),
    "channels last": (ordered(channels_last), 13),
}
ORDERED |= {name: build for name, (build, _) in MIXED_ROWS.items()}


@pytest.mark.parametrize("samples", [N, 4, 1])
@pytest.mark.parametrize("name", ORDERED)
def test_rows_in_another_order(name, samples):
    """As fast and exact as sample by sample, also with as many steps as samples."""
    if samples == 1 and name in MIXED_ROWS:
        pytest.skip("BatchNorm over single values")
    model, X, y = problem(name, ORDERED)
    X, y = X[:samples], y[:samples]
    res = coupled(model, X, y)
    assert res.passes <= MIXED_ROWS.get(name, (0, 3 + 2 * 5))[1]
    assert_exact(model, X, y, res)


@pytest.mark.parametrize("name", ["views", "time first", *MIXED_ROWS])
def test_influence_with_rows_in_another_order(name):
    """Through the cut, against one double pass per sample."""
    model, X, y = problem(name, ORDERED)
    res = curvature(model, nn.CrossEntropyLoss(), (X, y), InfluenceGrad())
    assert res.passes < N or name in ("ghost", "domains", "overlapping")  # twice as many statistics
    direction = {key: torch.ones_like(p) for key, p in model.named_parameters()}
    want = curvature(model, nn.CrossEntropyLoss(), (X, y), InfluenceProjection(direction)).influence_projection
    got = torch.stack([t.flatten(1).sum(1) for t in res.grad_influence.values()]).sum(0)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_influence_where_attention_has_no_second_derivative():
    model, X, y = problem("attention", ORDERED)
    with pytest.raises(RuntimeError, match="Influence gradients differentiate the backward pass, which an operation"):
        curvature(model, nn.CrossEntropyLoss(), (X, y), InfluenceGrad())


# ---------------------------------------------------------------------------- by every way of the engine
ALL = FAST | ORDERED


@pytest.mark.parametrize("name", ALL)
def test_single_passes_and_the_gesture(name):
    """One cotangent at a time, summed on the way by PyTorch's own kernels; BackPACK's gesture; the coupling report."""
    model, X, y = problem(name, ALL)
    options = {"method": "coupled", "chunk_size": 1}
    res = curvature(model, nn.CrossEntropyLoss(), (X[:6], y[:6]), DiagGGNExact(), ComponentGrad(), **options)
    assert_exact(model, X[:6], y[:6], res)
    near = curvature(model, nn.CrossEntropyLoss(), (X[:6], y[:6]), DiagGGNExact(), method="coupled", tol=1e-13)
    report = curvature(model, nn.CrossEntropyLoss(), (X[:6], y[:6]), DiagGGNExact(), CouplingReport())
    extend(model), extend(loss_fn := nn.CrossEntropyLoss())
    with backpack(DiagGGNExact(), LowRankGGN()):
        loss_fn(model(X[:6]), y[:6]).backward()
    for key, p in model.named_parameters():
        want = res.diag_ggn_exact[key]
        bound = dict(rtol=1e-9, atol=1e-12 * float(want.abs().max()) + 1e-28)
        torch.testing.assert_close(p.diag_ggn_exact, want, **bound)
        torch.testing.assert_close(report.diag_ggn_exact[key], want, **bound)
        torch.testing.assert_close(
            near.diag_ggn_exact[key], want, rtol=1e-6, atol=1e-9 * float(want.abs().max()) + 1e-24
        )


@pytest.mark.parametrize("name", ALL)
def test_float32(name):
    model, X, y = problem(name, ALL)
    want = reference.ggn_diagonal(model, nn.CrossEntropyLoss(), X, y)
    got = curvature(
        model.float(), nn.CrossEntropyLoss(), (X.float(), y), DiagGGNExact(), method="coupled"
    ).diag_ggn_exact
    whole = max(float(t.norm()) for t in want.values())
    for key, t in want.items():
        assert float((got[key].double() - t).norm()) <= 1e-4 * float(t.norm()) + 1e-9 * whole, key


def test_the_way_through_a_computed_weight_is_counted():
    """Every row and direction goes through φ: coupled where a plain layer is, not before it pays."""

    def way(N: int, wrap: Callable[[nn.Module], nn.Module] = lambda layer: layer) -> str:
        torch.manual_seed(0)
        layers = wrap(nn.Linear(64, 32)), nn.BatchNorm1d(32), nn.ReLU(), wrap(nn.Linear(32, 32)), nn.BatchNorm1d(32)
        model, X, y = nn.Sequential(*layers, nn.ReLU(), nn.Linear(32, 10)), torch.randn(N, 64), torch.randint(10, (N,))
        return curvature(model, nn.CrossEntropyLoss(), (X, y), DiagGGNExact()).method

    normed = parametrizations.weight_norm
    assert (way(48), way(48, normed), way(256, normed)) == ("coupled", "dense", "coupled")


@pytest.mark.parametrize("product", [torch.matmul, nn.functional.linear], ids=["matmul", "linear"])
def test_a_product_that_is_a_single_number(product):
    """It has no rows: exact, the slow way."""
    with float64(0):
        model = Net(lambda net, x: net.b(torch.stack([product(row, net.w) for row in net.a(x)])[:, None].tanh()),
                    a=nn.Linear(4, 3), w=P(torch.randn(3)), b=nn.Linear(1, 3))  # fmt: skip
        X, y = torch.randn(6, 4), torch.randint(3, (6,))
        with pytest.warns(SlowPathWarning, match="No parameter product for 'w'"):
            got = curvature(model, nn.CrossEntropyLoss(), (X, y), DiagGGNExact(), method="coupled").diag_ggn_exact
        want = reference.ggn_diagonal(model, nn.CrossEntropyLoss(), X, y)
    assert all(torch.allclose(got[name], t, rtol=1e-10, atol=1e-14) for name, t in want.items())
