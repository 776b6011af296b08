"""Further traps: each is exact, or refused in words; none is silently wrong."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from backpack import backpack
from cases import EXOTIC, IMAGES, VECTORS, Case, Net, case, checkpointed, labelled, tokens
from test_exact import assert_close
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bncurv import ComponentGrad, DiagGGNExact, SlowPathWarning, curvature, extend, reference


class NumpySine(torch.autograd.Function):
    """A backward that leaves PyTorch: nothing that vmap could batch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.from_numpy(np.sin(x.detach().numpy()))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.from_numpy(g.numpy() * np.cos(x.numpy()))


class Clipped(torch.autograd.Function):
    """A backward that looks at the numbers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g if g.abs().max().item() < 1e6 else g * 0


def sandwich(middle: nn.Module, width: int = 4, out: int = 4) -> nn.Module:
    """Linear, BN, the middle, Linear."""
    return nn.Sequential(*(nn.Linear(4, width), nn.BatchNorm1d(width), middle, nn.Tanh(), nn.Linear(out, 3)))


def functional(function: Any) -> nn.Module:
    return sandwich(Net(lambda net, x: function(x)))


def recurrent(kind: Any, batch_first: bool) -> nn.Module:
    def forward(net: Any, x: Tensor) -> Tensor:
        steps = x if batch_first else x.transpose(0, 1)
        h = net.cell(steps)[0]
        return net.out(net.bn(h[:, -1] if batch_first else h[-1]))

    return Net(
        forward,
        cell=kind(3, 4, batch_first=batch_first),
        bn=nn.BatchNorm1d(4),
        out=nn.Linear(4, 3),
    )


def lstm_cell() -> nn.Module:
    return Net(
        lambda net, x: net.out(net.bn(net.cell(net.cell(x)[0])[1])),
        cell=nn.LSTMCell(4, 4),
        bn=nn.BatchNorm1d(4),
        out=nn.Linear(4, 3),
    )


def encoder_layer() -> nn.Module:
    return Net(
        lambda net, x: net.out(net.bn(net.layer(net.embed(x)).transpose(1, 2)).mean(2)),
        embed=nn.Linear(3, 4),
        layer=nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True),
        bn=nn.BatchNorm1d(4),
        out=nn.Linear(4, 3),
    )


def bag() -> nn.Module:
    return nn.Sequential(nn.EmbeddingBag(6, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))


def checkpointed_bn(outer: bool) -> nn.Module:
    """A BatchNorm in the part that is run twice."""
    body = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 5))
    return Net(
        lambda net, x: net.out(net.bn(checkpoint(net.body, net.stem(x), use_reentrant=False))),
        stem=nn.Linear(4, 5),
        body=body,
        bn=nn.BatchNorm1d(5) if outer else nn.Identity(),
        out=nn.Linear(5, 3),
    )


def spectral() -> nn.Module:
    return sandwich(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)))


def retained() -> nn.Module:
    """A forward that asks for the gradient of an intermediate value, as for saliency maps."""

    def keep(x: Tensor) -> Tensor:
        if x.requires_grad:
            x.retain_grad()
        return x * 1

    return functional(keep)


def registered_hook() -> nn.Module:
    """A tensor hook on an intermediate value that scales its gradient (gradient reversal)."""

    def reverse(x: Tensor) -> Tensor:
        x = x * 1
        if x.requires_grad:
            x.register_hook(lambda g: -0.5 * g)
        return x

    return functional(reverse)


def sorted_features() -> nn.Module:
    return functional(lambda x: x.sort(1).values)


def multi_branch_out() -> nn.Module:
    """An output that is partly a constant."""
    return Net(
        lambda net, x: torch.cat([net.out(net.bn(net.first(x)))[:, :2], x[:, :1].detach()], 1),
        first=nn.Linear(4, 5),
        bn=nn.BatchNorm1d(5),
        out=nn.Linear(5, 3),
    )


def shuffled(x: Tensor) -> Tensor:
    return F.pixel_shuffle(x[..., None, None], 2).flatten(1)


def upsampled() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Upsample(scale_factor=2, mode="bilinear")),
        *(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(8, 3)),
    )


def batch_norm_by_hand() -> nn.Module:
    """The aten function below `F.batch_norm`, which nobody watches."""

    def forward(net: Any, x: Tensor) -> Tensor:
        x = net.first(x)
        return net.out(torch.batch_norm(x, None, None, None, None, True, 0.1, 1e-5, False).tanh())

    return Net(forward, first=nn.Linear(4, 5), out=nn.Linear(5, 3))


def conditional() -> nn.Module:
    """Half of the batch goes through an expert of its own."""

    def forward(net: Any, x: Tensor) -> Tensor:
        x = net.bn(net.first(x))
        return net.out(torch.cat([net.left(x[:3]), net.right(x[3:])]).tanh())

    layers = {"first": nn.Linear(4, 5), "bn": nn.BatchNorm1d(5), "out": nn.Linear(5, 3)}
    return Net(forward, left=nn.Linear(5, 5), right=nn.Linear(5, 5), **layers)


def masked_batch_norm() -> nn.Module:
    """Statistics over the valid steps only: rows are picked out before the BN."""

    def forward(net: Any, x: Tensor) -> Tensor:
        valid = torch.tensor([[True, True], [True, False], [True, True], [False, True]])
        h = net.first(x)
        h = torch.zeros_like(h).masked_scatter(valid[..., None], net.bn(h[valid]))
        return net.out(h.tanh().mean(1))

    return Net(forward, first=nn.Linear(3, 5), bn=nn.BatchNorm1d(5), out=nn.Linear(5, 3))


SEQUENCES = labelled(5, 4, 3)
MORE = [
    *EXOTIC,
    case("numpy_function", lambda: functional(NumpySine.apply), VECTORS),
    case("clipped_function", lambda: functional(Clipped.apply), VECTORS),
    case("gru", lambda: recurrent(nn.GRU, True), SEQUENCES),
    case("lstm_time_first", lambda: recurrent(nn.LSTM, False), SEQUENCES),
    case("lstm_cell", lstm_cell, VECTORS),
    case("encoder_layer", encoder_layer, SEQUENCES),
    case("embedding_bag", bag, tokens(6, 3)),
    case("rms_norm", lambda: sandwich(nn.RMSNorm(4)), VECTORS),
    case("spectral_norm", spectral, VECTORS),
    case("experts", conditional, VECTORS),
    case("retain_grad", retained, VECTORS),
    case("tensor_hook", registered_hook, VECTORS),
    case("sorted", sorted_features, VECTORS),
    case("constant_part", multi_branch_out, VECTORS),
    case("pixel_shuffle", lambda: functional(shuffled), VECTORS),
    case("upsample", upsampled, IMAGES),
    case("aten_batch_norm", batch_norm_by_hand, VECTORS),
    case("masked_batch_norm", masked_batch_norm, labelled(4, 2, 3)),
]
MIXED = [
    case("checkpointed_bn", lambda: checkpointed_bn(False), VECTORS),
    case("checkpointed_bn_and_bn", lambda: checkpointed_bn(True), VECTORS),
]


def compute(one: Case, method: str) -> dict[str, dict[str, Tensor]]:
    model, loss_fn, X, y = one.build()
    if method != "extend":
        res = curvature(model, loss_fn, (X, y), DiagGGNExact(), ComponentGrad(), method=method)
        return {"diagonal": res.diag_ggn_exact, "components": res.grad_component}
    extend(model), extend(loss_fn)
    with backpack(DiagGGNExact(), ComponentGrad()):
        loss_fn(model(X), y).backward()
    named = dict(model.named_parameters())
    diagonal = {n: p.diag_ggn_exact for n, p in named.items()}
    return {"diagonal": diagonal, "components": {n: p.grad_component for n, p in named.items()}}


def assert_exact(one: Case, method: str) -> None:
    got = compute(one, method)
    assert_close(got["diagonal"], reference.ggn_diagonal(*one.build()))
    assert_close(got["components"], reference.component_gradients(*one.build()))


EVERY_WAY = pytest.mark.parametrize("method", ["coupled", "dense", "auto", "extend"])


@EVERY_WAY
@pytest.mark.parametrize("one", MORE, ids=str)
def test_exact(one: Case, method: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if one.fallback else "error", SlowPathWarning)
        assert_exact(one, method)


@pytest.mark.parametrize("one", [c for c in MORE if c.fallback], ids=str)
def test_fallback_is_announced(one: Case) -> None:
    with pytest.warns(SlowPathWarning, match="No parameter product for.*register_layer") as caught:
        compute(one, "coupled")
    assert __file__ in [w.filename for w in caught]  # it points at the line that called `curvature`


@EVERY_WAY
@pytest.mark.parametrize("one", MIXED, ids=str)
def test_exact_or_refused(one: Case, method: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SlowPathWarning)
        if method != "coupled":
            assert_exact(one, method)
            return
        with pytest.raises(RuntimeError, match="method='coupled' does not apply"):
            compute(one, method)


def test_reentrant_checkpoint_is_refused() -> None:
    """PyTorch itself says why and what to do."""

    def forward(net: Any, x: Tensor) -> Tensor:
        return net.out(checkpoint(net.body, net.stem(x), use_reentrant=True))

    def model() -> nn.Module:
        layers = {"stem": nn.Linear(4, 5), "body": nn.Linear(5, 5), "out": nn.Linear(5, 3)}
        return Net(forward, **layers)

    one = case("reentrant", model, VECTORS)
    for method in ("coupled", "dense"):
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            compute(one, method)


@pytest.mark.parametrize("build", [checkpointed, lambda: checkpointed_bn(True)])
def test_checkpoint_in_plain_training_of_an_extended_model(build: Any) -> None:
    """Extended, but no quantity asked for: training goes on as before."""
    one = case("checkpoint", build, VECTORS)
    plain, loss_fn, X, y = one.build()
    loss_fn(plain(X), y).backward()
    model, loss_fn, X, y = one.build()
    extend(loss_fn)(extend(model)(X), y).backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    for b, c in zip(model.buffers(), plain.buffers(), strict=True):
        assert torch.equal(b, c)


def test_sparse_embedding() -> None:
    """Sparse gradients in backward(), dense curvature."""

    def model(sparse: bool) -> Any:
        def forward(net: Any, x: Tensor) -> Tensor:
            return net.out(net.bn(net.embedding(x).mean(1)))

        return lambda: Net(
            forward,
            embedding=nn.Embedding(6, 4, sparse=sparse),
            bn=nn.BatchNorm1d(4),
            out=nn.Linear(4, 3),
        )

    sparse, dense = (case("sparse", model(s), tokens(6, 3)) for s in (True, False))
    want = reference.ggn_diagonal(*dense.build())
    for method in ("coupled", "dense", "extend"):
        assert_close(compute(sparse, method)["diagonal"], want)


def test_functions_of_the_parameters_alone() -> None:
    """A penalty-like output that no sample has a part in, beside one that has."""
    one = case(
        "prior",
        lambda: Net(
            lambda net, x: net.out(net.bn(net.first(x))) + net.prior.square().sum(),
            first=nn.Linear(4, 5),
            bn=nn.BatchNorm1d(5),
            out=nn.Linear(5, 3),
            prior=nn.Parameter(torch.randn(2)),
        ),
        VECTORS,
    )
    assert_exact(one, "coupled")


def test_double_precision_inside_single() -> None:
    """A model that casts up and down again in the middle (as softmax in attention often is)."""
    one = case(
        "cast",
        lambda: functional(lambda x: F.softmax(x.float(), 1).double()),
        VECTORS,
    )
    model, loss_fn, X, y = one.build()
    dense = curvature(model, loss_fn, (X, y), DiagGGNExact(), method="dense").diag_ggn_exact
    coupled = curvature(model, loss_fn, (X, y), DiagGGNExact(), method="coupled").diag_ggn_exact
    assert_close(coupled, dense, tolerance=1e-5)
