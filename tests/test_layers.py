"""Every row of the table of parameter products against autograd on that layer alone."""

import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from backpack import backpack
from cases import Net, bilinear_net, case, labelled
from einops import rearrange
from test_exact import assert_close
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from bncurv import (
    ComponentGrad,
    DiagGGNExact,
    SlowPathWarning,
    curvature,
    extend,
    reference,
    register_layer,
)
from bncurv.layers import LAYERS, Layer
from bncurv.layers.affine import BatchNormTrain
from bncurv.layers.base import Product
from bncurv.layers.windows import Geometry, windows

N, Q = 3, 2


@dataclass
class Seen:
    """A call of a table function."""

    row: Layer
    arguments: dict[str, Any]


class Spy(TorchFunctionMode):
    """Notes the calls of table functions, with the arguments by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Seen] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in LAYERS:
            names = LAYERS[func].arguments
            arguments = {**dict(zip(names, args, strict=False)), **kwargs}
            self.calls.append(Seen(LAYERS[func], arguments))
        return func(*args, **kwargs)


@dataclass(frozen=True)
class OneLayer:
    """A module of one table layer and the shape (or the indices) of its input."""

    name: str
    build: Callable[[], nn.Module]
    x: Callable[[], Tensor]

    def __str__(self) -> str:
        return self.name


def layer(name: str, build: Callable[[], nn.Module], *shape: int) -> OneLayer:
    return OneLayer(name, build, lambda: torch.randn(N, *shape))


def tokens(name: str, build: Callable[[], nn.Module], *shape: int) -> OneLayer:
    return OneLayer(name, build, lambda: torch.randint(5, (N, *shape)))


def randomised(module: nn.Module) -> nn.Module:
    """Random affine parameters and running statistics."""
    for p in module.parameters():
        nn.init.normal_(p)
    for name, b in module.named_buffers():
        if b.is_floating_point():
            b.uniform_(0.5, 2.0) if "var" in name else b.normal_()
    return module


SIZES = {1: (7,), 2: (5, 6), 3: (4, 5, 3)}
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
PADDING_MODES = ["zeros", "circular", "reflect", "replicate"]

CONV_OPTIONS: list[dict[str, Any]] = [
    {"kernel_size": 1},
    {"kernel_size": 3, "bias": False},
    {"kernel_size": 2, "stride": 2},
    {"kernel_size": 2, "stride": 3, "padding": 1},
    {"kernel_size": 3, "padding": 2, "stride": 2},
    {"kernel_size": 2, "dilation": 2},
    {"kernel_size": 3, "groups": 2},
    {"kernel_size": 2, "groups": 4, "stride": 2, "padding": 1},
    {"kernel_size": 3, "padding": "same"},
    {"kernel_size": 2, "padding": "same", "groups": 2},
    {"kernel_size": 3, "padding": "valid"},
    {"kernel_size": 2, "dilation": 2, "padding": 2, "stride": 2, "groups": 2},
]
CONV2D_OPTIONS: list[dict[str, Any]] = [
    {"kernel_size": (2, 3), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)},
    {"kernel_size": (1, 4), "padding": (0, 3), "stride": (3, 2)},
    {"kernel_size": (2, 4), "dilation": (2, 1), "padding": "same"},
    {"kernel_size": (5, 6), "groups": 2},
    {"kernel_size": (3, 1), "stride": (1, 4), "dilation": (2, 3), "padding": (2, 1), "groups": 4},
]
TRANSPOSED_OPTIONS: list[dict[str, Any]] = [
    {"kernel_size": 1},
    {"kernel_size": 3, "bias": False},
    {"kernel_size": 2, "stride": 2},
    {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
    {"kernel_size": 2, "stride": 3, "output_padding": 2},
    {"kernel_size": 2, "stride": 3, "output_padding": 1, "groups": 2},
    {"kernel_size": 3, "padding": 2},
    {"kernel_size": 2, "dilation": 2, "output_padding": 1},
    {"kernel_size": 2, "dilation": 2, "stride": 2, "padding": 1, "groups": 4},
]


def named(options: dict[str, Any]) -> str:
    return "-".join(f"{k}={v}" for k, v in options.items()).replace(" ", "")


def conv(kind: dict[int, Any], dims: int, options: dict[str, Any]) -> OneLayer:
    build = lambda: kind[dims](4, 8, **options)  # noqa: E731
    return layer(f"{kind[dims].__name__}-{named(options)}", build, 4, *SIZES[dims])


def padded(dims: int, mode: str, padding: Any) -> OneLayer:
    options = {"kernel_size": 3, "padding": padding, "padding_mode": mode, "groups": 2}
    return conv(CONV, dims, options)


LINEAR = [
    layer("Linear", lambda: nn.Linear(4, 3), 4),
    layer("Linear-no_bias", lambda: nn.Linear(4, 3, bias=False), 4),
    layer("Linear-one_output", lambda: nn.Linear(4, 1), 4),
    layer("Linear-one_input", lambda: nn.Linear(1, 3), 1),
    layer("Linear-sequence", lambda: nn.Linear(4, 3), 5, 4),
    layer("Linear-grid", lambda: nn.Linear(4, 3), 2, 5, 4),
]
CONVS = [
    *(conv(CONV, dims, o) for dims in (1, 2, 3) for o in CONV_OPTIONS),
    *(conv(CONV, 2, o) for o in CONV2D_OPTIONS),
    *(padded(dims, mode, 1) for dims in (1, 2) for mode in PADDING_MODES),
    *(padded(3, mode, 1) for mode in PADDING_MODES),
    *(padded(2, mode, "same") for mode in PADDING_MODES),
    *(padded(2, mode, (1, 2)) for mode in PADDING_MODES),
    *(conv(TRANSPOSED, dims, o) for dims in (1, 2, 3) for o in TRANSPOSED_OPTIONS),
]
NORMS = [
    layer("LayerNorm", lambda: nn.LayerNorm(4), 4),
    layer("LayerNorm-sequence", lambda: nn.LayerNorm(4), 5, 4),
    layer("LayerNorm-two_axes", lambda: nn.LayerNorm((5, 4), eps=0.1), 5, 4),
    layer("LayerNorm-two_of_three", lambda: nn.LayerNorm((3, 2)), 4, 3, 2),
    layer("LayerNorm-no_bias", lambda: nn.LayerNorm(4, bias=False), 3, 4),
    layer("GroupNorm", lambda: nn.GroupNorm(2, 4), 4, 5),
    layer("GroupNorm-flat", lambda: nn.GroupNorm(2, 4), 4),
    layer("GroupNorm-one_group", lambda: nn.GroupNorm(1, 4, eps=0.1), 4, 2, 3),
    layer("GroupNorm-all_groups", lambda: nn.GroupNorm(4, 4), 4, 2, 3),
    layer("InstanceNorm1d", lambda: nn.InstanceNorm1d(4, affine=True), 4, 5),
    layer("InstanceNorm2d", lambda: nn.InstanceNorm2d(4, affine=True, eps=0.1), 4, 3, 2),
    layer(
        "InstanceNorm2d-tracking",
        lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        *(4, 3, 2),
    ),
    layer(
        "InstanceNorm3d-running",
        lambda: nn.InstanceNorm3d(4, affine=True, track_running_stats=True).eval(),
        *(4, 3, 2, 2),
    ),
    layer("BatchNorm1d-eval", lambda: nn.BatchNorm1d(4).eval(), 4),
    layer("BatchNorm1d-eval-sequence", lambda: nn.BatchNorm1d(4, eps=0.1).eval(), 4, 5),
    layer("BatchNorm2d-eval", lambda: nn.BatchNorm2d(4).eval(), 4, 3, 2),
    layer("BatchNorm3d-eval", lambda: nn.BatchNorm3d(4).eval(), 4, 3, 2, 2),
]
EMBEDDINGS = [
    tokens("Embedding", lambda: nn.Embedding(5, 4), 6),
    tokens("Embedding-one_token", lambda: nn.Embedding(5, 4)),
    tokens("Embedding-grid", lambda: nn.Embedding(5, 4), 2, 3),
    tokens("Embedding-padding", lambda: nn.Embedding(5, 4, padding_idx=2), 6),
    tokens("Embedding-padding_from_end", lambda: nn.Embedding(5, 4, padding_idx=-1), 6),
    tokens("Embedding-one_feature", lambda: nn.Embedding(5, 1), 3),
]
OTHERS = [
    layer("RMSNorm", lambda: nn.RMSNorm(4), 4),
    layer("RMSNorm-two_axes", lambda: nn.RMSNorm((5, 4), eps=0.1), 3, 5, 4),
    layer("PReLU", lambda: nn.PReLU(), 4, 3),
    layer("PReLU-flat", lambda: nn.PReLU(4), 4),
    layer("PReLU-channels", lambda: nn.PReLU(4), 4, 3, 2),
    layer("matmul", lambda: Net(lambda net, x: x @ net.w, w=nn.Parameter(torch.randn(4, 3))), 4),
    layer(
        "matmul-sequence", lambda: Net(lambda net, x: torch.matmul(x, net.w), w=nn.Parameter(torch.randn(4, 3))), 5, 4
    ),
    layer(
        "addmm",
        lambda: Net(
            lambda net, x: torch.addmm(net.b, x, net.w),
            w=nn.Parameter(torch.randn(4, 3)),
            b=nn.Parameter(torch.randn(3)),
        ),
        4,
    ),
]
TABLE = [*LINEAR, *CONVS, *NORMS, *EMBEDDINGS, *OTHERS]


@pytest.fixture(autouse=True)
def in_float64(float64: None) -> None:
    pass


def assert_product(seen: Seen, role: str, delta: Tensor, want: Tensor) -> None:
    """Per sample, and summed over the samples."""
    row, arguments, shape = seen.row, seen.arguments, want.shape[2:]
    right = row.right(role, arguments, arguments["input"].detach())
    product = Product(row.left(role, arguments, delta), right)
    per_sample, summed = product.per_sample(), product.summed()
    torch.testing.assert_close(row.unfold(role, per_sample, shape).detach(), want)
    torch.testing.assert_close(row.unfold(role, summed, shape).detach(), want.sum(0))


def by_autograd(p: Tensor, y: Tensor, delta: Tensor) -> Tensor:
    """``[n, q, *p]``: one ordinary backward pass per sample and cotangent."""

    def row(n: int, q: int) -> Tensor:
        return torch.autograd.grad(y[n], p, delta[q, n], retain_graph=True)[0]

    return torch.stack([torch.stack([row(n, q) for q in range(Q)]) for n in range(N)])


@pytest.mark.parametrize("one", TABLE, ids=str)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_products(one: OneLayer) -> None:
    module, x = randomised(one.build()), one.x()
    with Spy() as spy:
        y = module(x)
    (seen,) = spy.calls
    assert seen.row.accepts(seen.arguments)
    delta, parameters = torch.randn(Q, *y.shape), list(module.parameters())
    roles = [r for r in seen.row.parameters if seen.arguments.get(r) is not None]
    assert len(roles) == len(parameters) > 0
    for role in roles:
        p = seen.arguments[role]
        assert_product(seen, role, delta, by_autograd(p, y, delta))


def test_every_row_is_covered() -> None:
    """No row without a case."""
    seen: set[type] = set()
    for one in TABLE:
        with Spy() as spy:
            one.build()(one.x())
        seen |= {type(call.row) for call in spy.calls}
    assert seen == {type(row) for row in LAYERS.values()}


@pytest.mark.parametrize("shape", [(N, 4), (N, 4, 5), (N, 4, 2, 3)], ids=str)
def test_train_mode_batch_norm(shape: tuple[int, ...]) -> None:
    """Its affine part, the batch's statistics given."""
    x, axes = torch.randn(shape), (1, -1, *(1,) * (len(shape) - 2))
    weight, bias = (torch.randn(4, requires_grad=True) for _ in range(2))
    mean, invstd = torch.randn(4), torch.rand(4) + 0.5
    hat = (x - mean.view(axes)) * invstd.view(axes)
    y = hat * weight.view(axes) + bias.view(axes)
    delta = torch.randn(Q, *shape)
    seen = Seen(BatchNormTrain(), {"input": x, "mean": mean, "invstd": invstd})
    for role, p in (("weight", weight), ("bias", bias)):
        assert_product(seen, role, delta, by_autograd(p, y, delta))


def call_of(function: Callable[[], Any]) -> Seen:
    with Spy() as spy:
        function()
    (seen,) = spy.calls
    return seen


REFUSED = {
    "conv_unbatched": lambda: nn.Conv2d(4, 2, 1)(torch.randn(4, 3, 3)),
    "conv_transpose_unbatched": lambda: nn.ConvTranspose1d(4, 2, 1)(torch.randn(4, 3)),
    "linear_unbatched": lambda: nn.Linear(4, 2)(torch.randn(4)),
    "layer_norm_over_samples": lambda: nn.LayerNorm((N, 4))(torch.randn(N, 4)),
    "embedding_of_one_index": lambda: nn.Embedding(5, 4)(torch.tensor(2)),
    "embedding_max_norm": lambda: nn.Embedding(5, 4, max_norm=1.0)(torch.arange(3)),
    "embedding_by_frequency": lambda: nn.Embedding(5, 4, scale_grad_by_freq=True)(torch.arange(3)),
    "batch_norm_train": lambda: nn.BatchNorm1d(4)(torch.randn(N, 4)),
}


@pytest.mark.parametrize("function", REFUSED.values(), ids=REFUSED)
def test_refused(function: Callable[[], Any]) -> None:
    seen = call_of(function)
    assert not seen.row.accepts(seen.arguments)


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding", "dilation"),
    [
        ((6,), (3,), (1,), [(0, 0)], (1,)),
        ((6,), (2,), (2,), [(1, 2)], (3,)),
        ((5, 6), (2, 3), (2, 1), [(1, 1), (0, 2)], (1, 2)),
        ((4, 3, 5), (2, 1, 3), (1, 2, 2), [(0, 1), (1, 1), (2, 0)], (2, 1, 1)),
    ],
)
def test_windows(size: Any, kernel: Any, stride: Any, padding: Any, dilation: Any) -> None:
    """Entry by entry, as the docstring says."""
    x = torch.randn(2, 3, *size)
    seen = windows(x, Geometry(kernel, stride, padding, dilation))
    full = F.pad(x, [p for pair in reversed(padding) for p in pair])
    dims = len(size)
    assert seen.shape[: 2 + dims] == (2, 3, *kernel)
    for index in itertools.product(*(range(n) for n in seen.shape[2:])):
        k, position = index[:dims], index[dims:]
        at = [s * o + d * i for s, o, d, i in zip(stride, position, dilation, k, strict=True)]
        assert torch.equal(seen[(..., *k, *position)], full[(..., *at)])


# ---------------------------------------------------------------------------- a new row: bilinear


class Bilinear(Layer):
    """``y_o = x1ᵀ W_o x2 + b_o``; samples on the first axis of both inputs."""

    arguments = ("input", "other", "weight", "bias")
    inputs = ("input", "other")

    def right(self, role: str, arguments: dict[str, Any], x: Tensor) -> Tensor | None:
        outer = torch.einsum("n...i,n...j->n...ij", x, arguments["other"]).flatten(-2)
        right = outer.reshape(len(x), -1, outer.shape[-1])
        return rearrange(right, "n s i -> 1 n s i") if role == "weight" else None

    def left(self, role: str, arguments: dict[str, Any], delta: Tensor) -> Tensor:
        q, n, *_, o = delta.shape
        return rearrange(delta.reshape(q, n, -1, o), "q n s o -> q n 1 o s")


@pytest.fixture
def bilinear() -> Iterator[None]:
    register_layer(F.bilinear, Bilinear())
    yield
    del LAYERS[F.bilinear]


def both_learnt() -> nn.Module:
    """Both inputs behind layers of their own, one of them normalised, without a bias."""
    return Net(
        lambda net, x: net.out(net.mix(net.bn(net.first(x)), net.second(x).tanh())),
        first=nn.Linear(4, 3),
        bn=nn.BatchNorm1d(3),
        second=nn.Linear(4, 2),
        mix=nn.Bilinear(3, 2, 5, bias=False),
        out=nn.Linear(5, 3),
    )


def same_twice() -> nn.Module:
    def forward(net: Any, x: Tensor) -> Tensor:
        x = net.bn(net.first(x))
        return net.mix(x, x)

    return Net(forward, first=nn.Linear(4, 3), bn=nn.BatchNorm1d(3), mix=nn.Bilinear(3, 3, 3))


BILINEAR = [case(f.__name__, f, labelled(6, 4)) for f in (bilinear_net, both_learnt, same_twice)]


@pytest.mark.parametrize("method", ["coupled", "dense", "auto"])
@pytest.mark.parametrize("chunk_size", [None, 2, 7])
@pytest.mark.parametrize("one", BILINEAR, ids=str)
def test_registered_layer(one: Any, chunk_size: int | None, method: str, bilinear: None) -> None:
    model, loss_fn, X, y = one.build()
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowPathWarning)
        quantities = DiagGGNExact(), ComponentGrad()
        options = {"method": method, "chunk_size": chunk_size}
        res = curvature(model, loss_fn, (X, y), *quantities, **options)
    assert_close(res.diag_ggn_exact, reference.ggn_diagonal(*one.build()))
    assert_close(res.grad_component, reference.component_gradients(*one.build()))


@pytest.mark.parametrize("one", BILINEAR, ids=str)
def test_registered_layer_in_extend(one: Any, bilinear: None) -> None:
    model, loss_fn, X, y = one.build()
    extend(model), extend(loss_fn)
    with warnings.catch_warnings(), backpack(DiagGGNExact()):
        warnings.simplefilter("error", SlowPathWarning)
        loss_fn(model(X), y).backward()
    got = {n: p.diag_ggn_exact for n, p in model.named_parameters()}
    assert_close(got, reference.ggn_diagonal(*one.build()))


def test_without_registration_there_is_a_warning() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        h = net.bn(net.first(x))
        return net.out(torch.conv_tbc(h[None], net.w, net.b)[0].relu())

    layers = {"first": nn.Linear(4, 5), "bn": nn.BatchNorm1d(5), "out": nn.Linear(3, 3)}
    model = Net(forward, w=nn.Parameter(torch.randn(1, 5, 3)), b=nn.Parameter(torch.randn(3)), **layers).double()
    X, y, loss_fn = torch.randn(6, 4).double(), torch.randint(3, (6,)), nn.CrossEntropyLoss()
    with pytest.warns(SlowPathWarning, match="'w', 'b'.*register_layer"):
        res = curvature(model, loss_fn, (X, y), DiagGGNExact(), method="coupled")
    assert_close(res.diag_ggn_exact, reference.ggn_diagonal(model, loss_fn, X, y))


# ------------------------------------------------------ traps: no samples where samples should be


def latent(**layers: nn.Module) -> Callable[[], nn.Module]:
    """A layer fed with a learnt vector, shared by all samples."""

    def forward(net: Any, x: Tensor) -> Tensor:
        return net.out(net.bn(net.first(x) + net.style(net.latent)))

    return lambda: Net(
        forward,
        first=nn.Linear(4, 6),
        bn=nn.BatchNorm1d(6),
        style=nn.Linear(3, 6),
        latent=nn.Parameter(torch.randn(3)),
        out=nn.Linear(6, 3),
    )


def first_sample_for_all() -> nn.Module:
    """One sample's features are added to every sample's: a coupling that nobody declared."""
    return Net(
        lambda net, x: net.out(net.first(x) + net.style(x[0]).tanh()),
        first=nn.Linear(4, 6),
        style=nn.Linear(4, 6),
        out=nn.Linear(6, 3),
    )


def constant_token() -> nn.Module:
    return Net(
        lambda net, x: net.out(net.bn(net.first(x)) + net.token(torch.tensor(1))),
        first=nn.Linear(4, 6),
        bn=nn.BatchNorm1d(6),
        token=nn.Embedding(2, 6),
        out=nn.Linear(6, 3),
    )


def constant_tokens() -> nn.Module:
    """As many positions as samples, summed up: looks like a batch and is none."""
    return Net(
        lambda net, x: net.out(net.bn(net.first(x)) + net.token(torch.arange(6)).sum(0)),
        first=nn.Linear(4, 6),
        bn=nn.BatchNorm1d(6),
        token=nn.Embedding(6, 6),
        out=nn.Linear(6, 3),
    )


def norm_over_samples() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.LayerNorm((6, 5)), nn.Linear(5, 3))


def time_first() -> nn.Module:
    """As many steps as samples, steps first."""
    return Net(
        lambda net, x: net.out(net.bn(net.first(x.transpose(0, 1)).tanh().mean(0))),
        first=nn.Linear(4, 5),
        bn=nn.BatchNorm1d(5),
        out=nn.Linear(5, 3),
    )


def output_is_a_parameter() -> nn.Module:
    return Net(lambda net, x: net.table, table=nn.Parameter(torch.randn(6, 3)))


def output_is_an_expanded_parameter() -> nn.Module:
    return Net(lambda net, x: net.prior.expand(6, 3), prior=nn.Parameter(torch.randn(3)))


def sub_batches() -> nn.Module:
    """Ghost batch normalisation: the same BN on both halves of the batch."""
    return Net(
        lambda net, x: net.out(torch.cat([net.bn(half) for half in net.first(x).chunk(2)]).relu()),
        first=nn.Linear(4, 6),
        bn=nn.BatchNorm1d(6),
        out=nn.Linear(6, 3),
    )


def two_views() -> nn.Module:
    """Contrastive fashion: two views of every sample share one batch normalisation."""

    def forward(net: Any, x: Tensor) -> Tensor:
        a, b = net.bn(net.first(torch.cat([x, x.flip(1)]))).chunk(2)
        return net.out((a - b).tanh())

    return Net(forward, first=nn.Linear(4, 6), bn=nn.BatchNorm1d(6), out=nn.Linear(6, 3))


def interleaved_views() -> nn.Module:
    def forward(net: Any, x: Tensor) -> Tensor:
        views = torch.stack([x, x.flip(1)], 1).flatten(0, 1)
        return net.out(net.bn(net.first(views)).tanh().unflatten(0, (6, 2)).sum(1))

    return Net(forward, first=nn.Linear(4, 6), bn=nn.BatchNorm1d(6), out=nn.Linear(6, 3))


def batch_as_channels() -> nn.Module:
    return Net(
        lambda net, x: net.out(net.bn(net.first(x).T).T.tanh()),
        first=nn.Linear(4, 6),
        bn=nn.BatchNorm1d(6),
        out=nn.Linear(6, 3),
    )


def then_bn_over(*axes: int) -> Callable[[], nn.Module]:
    """The features of a Linear are the last axis, the channels of the BN behind it are axis 1."""
    bn = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d}[len(axes)]
    features = 4 * torch.Size(axes).numel()
    return lambda: nn.Sequential(*(nn.Linear(3, 4), bn(axes[0]), nn.Tanh(), nn.Flatten(), nn.Linear(features, 3)))


def bn_straight_away() -> nn.Module:
    """Channels of a Linear become the time axis of the output."""
    return Net(
        lambda net, x: net.bn(net.first(x)).transpose(1, 2),
        first=nn.Linear(3, 3),
        bn=nn.BatchNorm1d(3),
    )


def layer_before_bn_used_twice() -> nn.Module:
    """One convolution, directly below two BNs and on a shortcut."""

    def forward(net: Any, x: Tensor) -> Tensor:
        first = net.conv(x)
        second = net.conv(net.bn1(first).tanh())
        return net.out((net.bn2(second) + net.bn3(second) * first).mean((2, 3)))

    return Net(
        forward,
        conv=nn.Conv2d(2, 2, 3, padding=1),
        bn1=nn.BatchNorm2d(2),
        bn2=nn.BatchNorm2d(2),
        bn3=nn.BatchNorm2d(2),
        out=nn.Linear(2, 3),
    )


def bn_on_bn() -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.BatchNorm1d(5, affine=False), nn.BatchNorm1d(5)),
        *(nn.Tanh(), nn.Linear(5, 3)),
    )


def scaled_in_place_before_bn() -> nn.Module:
    return Net(
        lambda net, x: net.out(net.bn(net.first(x).mul_(0.5).add_(1.0)).tanh()),
        first=nn.Linear(4, 5),
        bn=nn.BatchNorm1d(5),
        out=nn.Linear(5, 3),
    )


VECTORS, SEQUENCES = labelled(6, 4), labelled(6, 6, 4)
TRAPS = [
    case("latent", latent(), VECTORS),
    case("latent_of_one", latent(), labelled(2, 4)),
    *(
        case(f.__name__, f, VECTORS)
        for f in (
            *(first_sample_for_all, constant_token, constant_tokens, norm_over_samples),
            *(output_is_a_parameter, output_is_an_expanded_parameter, sub_batches),
            *(two_views, interleaved_views, batch_as_channels),
            *(bn_on_bn, scaled_in_place_before_bn),
        )
    ),
    case("linear_then_bn_over_time", then_bn_over(4), labelled(6, 4, 3)),
    case("linear_then_bn_over_other_time", then_bn_over(5), labelled(6, 5, 3)),
    case("linear_then_bn_over_rows", then_bn_over(4, 2), labelled(6, 4, 2, 3)),
    case("bn_straight_away", bn_straight_away, labelled(6, 3, 3, extra=(3,))),
    case("layer_before_bn_used_twice", layer_before_bn_used_twice, labelled(5, 2, 4, 4)),
    case("time_first", time_first, SEQUENCES),
]


@pytest.mark.filterwarnings("ignore::bncurv.SlowPathWarning")
@pytest.mark.parametrize("method", ["coupled", "dense", "auto"])
@pytest.mark.parametrize("one", TRAPS, ids=str)
def test_traps(one: Any, method: str) -> None:
    """Exact, or refused where ``coupled`` was insisted on; never a wrong number."""
    model, loss_fn, X, y = one.build()
    try:
        res = curvature(model, loss_fn, (X, y), DiagGGNExact(), ComponentGrad(), method=method)
    except RuntimeError as error:
        assert method == "coupled" and "method='coupled' does not apply" in str(error)
        return
    assert_close(res.diag_ggn_exact, reference.ggn_diagonal(*one.build()))
    assert_close(res.grad_component, reference.component_gradients(*one.build()))


def over_pairs() -> nn.Module:
    """Normalising two values leaves their sign: gradients below cancel to eps, and to rounding."""
    return nn.Sequential(
        *(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.GroupNorm(4, 8)),
        *(nn.Linear(8, 2), nn.LayerNorm(2), nn.Linear(2, 3)),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("samples", [3, 20])
def test_no_false_alarm_where_gradients_cancel(samples: int, dtype: torch.dtype) -> None:
    model, loss_fn, X, y = case("over_pairs", over_pairs, labelled(samples, 4)).build()
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowPathWarning)
        batch = X.to(dtype), y
        curvature(model.to(dtype), loss_fn, batch, DiagGGNExact(), method="coupled")


@pytest.mark.parametrize("pair", [(0, 1), (0, 16), (3, 35), (18, 39), (39, 18), (22, 6)])
def test_every_pair_is_watched(pair: tuple[int, int]) -> None:
    """One sample among forty feels one other, weakly."""
    n, m = pair

    def forward(net: Any, x: Tensor) -> Tensor:
        h = net.first(x)
        h = torch.cat([h[:n], h[n : n + 1] + 1e-3 * h[m : m + 1], h[n + 1 :]])
        return net.out(net.bn(h).tanh())

    def model() -> nn.Module:
        layers = {"first": nn.Linear(4, 5), "bn": nn.BatchNorm1d(5), "out": nn.Linear(5, 3)}
        return Net(forward, **layers)

    one = case("pair", model, labelled(40, 4))
    net, loss_fn, X, y = one.build()
    with pytest.raises(RuntimeError, match="mixed in or before module 'bn'"):
        curvature(net, loss_fn, (X, y), DiagGGNExact(), method="coupled")


def test_one_sample_without_batch_norm() -> None:
    """N = 1: a layer without a sample axis is not taken for one of a single sample."""
    one = case(
        "one",
        lambda: Net(
            lambda net, x: net.out(net.first(x[0]).tanh()[None]),
            first=nn.Linear(4, 5),
            out=nn.Linear(5, 3),
        ),
        labelled(1, 4),
    )
    model, loss_fn, X, y = one.build()
    with pytest.warns(SlowPathWarning, match="'first.weight'"):
        res = curvature(model, loss_fn, (X, y), DiagGGNExact(), method="coupled")
    assert_close(res.diag_ggn_exact, reference.ggn_diagonal(*one.build()))
