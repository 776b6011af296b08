"""Layers that join by `register_coupled`: exact in the coupled way, and found out where the pair is wrong."""

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from backpack import backpack
from cases import Case, Net, case, labelled
from state import unchanged
from test_exact import assert_close
from torch import Tensor, nn
from torch.nn import functional as F

from bncurv import (
    ComponentGrad,
    DiagGGNExact,
    SlowPathWarning,
    curvature,
    extend,
    reference,
    register_coupled,
)
from bncurv.gate import COUPLED

# ------------------------------------------------------------------------------------- the layers


class MinibatchStddev(nn.Module):
    """Progressive GAN: the mean standard deviation over the batch as one more channel."""

    def forward(self, x: Tensor) -> Tensor:
        spread = (x.var(0, unbiased=False) + 1e-8).sqrt().mean()
        return torch.cat([x, spread.expand(len(x), 1, *x.shape[2:])], 1)


def stddev_stats(module: nn.Module, x: Tensor) -> Tensor:
    return (x.var(0, unbiased=False) + 1e-8).sqrt().mean()


def stddev_apply(module: nn.Module, x: Tensor, copies: Tensor) -> Tensor:
    channel = copies.view(-1, 1, *(1,) * (x.dim() - 2)).expand(-1, 1, *x.shape[2:])
    return torch.cat([x, channel], 1)


class Whitening(nn.Module):
    """Decorrelated batch normalisation by a Cholesky factor, then a learnt rotation and scale."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.mix = nn.Linear(features, features)

    def forward(self, x: Tensor) -> Tensor:
        return whitening_apply(self, x, whitening_stats(self, x).expand(len(x), -1, -1))


def whitening_stats(module: nn.Module, x: Tensor) -> Tensor:
    """Mean and covariance stacked, ``[1 + d, d]``."""
    mean = x.mean(0)
    centred = x - mean
    covariance = centred.T @ centred / len(x) + 0.1 * torch.eye(x.shape[1], dtype=x.dtype)
    return torch.cat([mean[None], covariance])


def whitening_apply(module: nn.Module, x: Tensor, copies: Tensor) -> Tensor:
    factor = torch.linalg.cholesky(copies[:, 1:])
    centred = (x - copies[:, 0])[..., None]
    return module.mix(torch.linalg.solve_triangular(factor, centred, upper=False)[..., 0])


class GhostBatchNorm(nn.Module):
    """Batch statistics of two halves of the batch."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.scale = nn.Conv1d(features, features, 1, groups=features)

    def forward(self, x: Tensor) -> Tensor:
        halves = [F.batch_norm(half, None, None, training=True) for half in x.chunk(2)]
        return self.scale(torch.cat(halves)[..., None])[..., 0]


def ghost_stats(module: nn.Module, x: Tensor) -> Tensor:
    """``[half, moment, channel]``."""
    halves = x.unflatten(0, (2, -1))
    return torch.stack([halves.mean(1), halves.var(1, unbiased=False)], 1)


def ghost_apply(module: nn.Module, x: Tensor, copies: Tensor) -> Tensor:
    half = torch.arange(len(x)) // (len(x) // 2)
    mean, var = copies[torch.arange(len(x)), half].unbind(1)
    return module.scale(((x - mean) * (var + 1e-5).rsqrt())[..., None])[..., 0]


class Centring(nn.Module):
    """Mean-only batch normalisation with a learnt shift in its statistics."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.head = nn.Linear(features, features)

    def forward(self, x: Tensor) -> Tensor:
        return x - self.head(x).mean(0)


def centring_stats(module: nn.Module, x: Tensor) -> Tensor:
    return module.head(x).mean(0)


def centring_apply(module: nn.Module, x: Tensor, copies: Tensor) -> Tensor:
    return x - copies


class RunningCentring(nn.Module):
    """Uses the batch's mean when training and a stored one in eval mode."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.randn(features))

    def forward(self, x: Tensor) -> Tensor:
        return x - (x.mean(0) if self.training else self.mean)


def running_stats(module: nn.Module, x: Tensor) -> Tensor:
    return x.mean(0) if module.training else module.mean


PAIRS = {
    MinibatchStddev: (stddev_stats, stddev_apply),
    Whitening: (whitening_stats, whitening_apply),
    GhostBatchNorm: (ghost_stats, ghost_apply),
    Centring: (centring_stats, centring_apply),
    RunningCentring: (running_stats, centring_apply),
}


@pytest.fixture
def pairs() -> Iterator[dict]:
    """The table of coupled layers, emptied afterwards."""
    before = dict(COUPLED)
    for kind, pair in PAIRS.items():
        register_coupled(kind, *pair)
    yield COUPLED
    COUPLED.clear()
    COUPLED.update(before)


# -------------------------------------------------------------------------------------- the nets


def between(layer: nn.Module, width: int = 5, then: int = 5) -> nn.Module:
    """A BN before and one behind the layer."""
    return nn.Sequential(
        *(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Tanh(), layer),
        *(nn.Linear(then, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)),
    )


def alone(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), layer, nn.Tanh(), nn.Linear(5, 3))


def used_twice() -> nn.Module:
    return Net(
        lambda net, x: net.out(net.norm(net.second(net.norm(net.first(x)).tanh())).tanh()),
        first=nn.Linear(4, 5),
        norm=Whitening(5),
        second=nn.Linear(5, 5),
        out=nn.Linear(5, 3),
    )


def critic() -> nn.Module:
    def forward(net: Any, x: Tensor) -> Tensor:
        x = net.stddev(net.bn(net.conv(x)).relu())
        return net.out(net.last(x).relu().mean((2, 3)))

    return Net(
        forward,
        conv=nn.Conv2d(2, 3, 3, padding=1),
        bn=nn.BatchNorm2d(3),
        stddev=MinibatchStddev(),
        last=nn.Conv2d(4, 3, 3, padding=1),
        out=nn.Linear(3, 3),
    )


def residual() -> nn.Module:
    return Net(
        lambda net, x: net.out((net.first(x) + net.norm(net.first(x)).tanh()).relu()),
        first=nn.Linear(4, 5),
        norm=GhostBatchNorm(5),
        out=nn.Linear(5, 3),
    )


def last() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), Centring(3))


def in_eval() -> nn.Module:
    model = between(RunningCentring(5))
    model[3].eval()
    return model


def in_place_behind() -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(4, 5), Whitening(5), nn.ReLU(inplace=True), nn.Linear(5, 5)),
        *(Centring(5), nn.ReLU(inplace=True), nn.Linear(5, 3)),
    )


VECTORS = labelled(6, 4)
WHITENED = case("whitening", lambda: between(Whitening(5)), labelled(8, 4))
COUPLED_CASES = [
    case("minibatch_stddev", critic, labelled(5, 2, 4, 4)),
    case("minibatch_stddev_flat", lambda: between(MinibatchStddev(), 5, 6), VECTORS),
    WHITENED,
    case("whitening_alone", lambda: alone(Whitening(5)), labelled(8, 4)),
    case("whitening_twice", used_twice, labelled(8, 4)),
    case("ghost", lambda: between(GhostBatchNorm(5)), VECTORS),
    case("ghost_alone", lambda: alone(GhostBatchNorm(5)), VECTORS),
    case("ghost_residual", residual, VECTORS),
    case("centring", lambda: between(Centring(5)), VECTORS),
    case("centring_last", last, VECTORS),
    case("running_centring", lambda: between(RunningCentring(5)), VECTORS),
    case("running_centring_eval", in_eval, VECTORS),
    case("in_place_behind", in_place_behind, labelled(8, 4)),
]


def assert_exact(one: Case, method: str, **options: Any) -> Any:
    model, loss_fn, X, y = one.build()
    quantities = DiagGGNExact(), ComponentGrad()
    res = curvature(model, loss_fn, (X, y), *quantities, method=method, **options)
    assert_close(res.diag_ggn_exact, reference.ggn_diagonal(*one.build()))
    assert_close(res.grad_component, reference.component_gradients(*one.build()))
    return res


@pytest.mark.parametrize("method", ["coupled", "dense", "auto"])
@pytest.mark.parametrize("one", COUPLED_CASES, ids=str)
def test_exact(one: Case, method: str, pairs: dict) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowPathWarning)
        assert_exact(one, method)


@pytest.mark.parametrize("one", COUPLED_CASES, ids=str)
def test_in_chunks(one: Case, pairs: dict) -> None:
    assert_exact(one, "coupled", chunk_size=2)


@pytest.mark.parametrize("one", COUPLED_CASES, ids=str)
def test_extend(one: Case, pairs: dict) -> None:
    plain, loss_fn, X, y = one.build()
    loss_fn(plain(X), y).backward()
    model, loss_fn, X, y = one.build()
    extend(model), extend(loss_fn)
    with backpack(DiagGGNExact()):
        loss_fn(model(X), y).backward()
    named = dict(model.named_parameters())
    want = reference.ggn_diagonal(*one.build())
    assert_close({n: p.diag_ggn_exact for n, p in named.items()}, want)
    for name, p in plain.named_parameters():
        torch.testing.assert_close(named[name].grad, p.grad)


@pytest.mark.parametrize("one", COUPLED_CASES, ids=str)
def test_unregistered(one: Case) -> None:
    """Without the pair: noticed, and exact by the dense way; chunks of a BatchNorm need none."""
    mixes = one.name != "running_centring_eval" and not one.name.startswith("ghost")
    with pytest.warns(SlowPathWarning) if mixes else warnings.catch_warnings():
        assert_exact(one, "auto") if not mixes else assert_exact_dense(one)
    if mixes:
        with pytest.raises(RuntimeError, match="method='coupled' does not apply"):
            assert_exact(one, "coupled")


def assert_exact_dense(one: Case) -> None:
    """`auto` on these small nets may be dense anyway; insist on looking."""
    try:
        assert_exact(one, "coupled")
    except RuntimeError as error:
        warnings.warn(str(error), SlowPathWarning, stacklevel=1)
    assert assert_exact(one, "auto").method == "dense"


def test_pair_that_uses_another_samples_copy(pairs: dict) -> None:
    """Each copy is one sample's still, and the certificate sees whose."""
    register_coupled(Whitening, whitening_stats, swapping_apply)
    assert assert_exact(WHITENED, "coupled").method == "coupled"


def test_unregistered_again_is_unknown_again(pairs: dict) -> None:
    one = COUPLED_CASES[-1]
    assert_exact(one, "coupled")
    del pairs[Whitening]
    with pytest.raises(RuntimeError, match=r"mixed in or before module '1(\.mix)?'"):
        assert_exact(one, "coupled")


def test_cost_does_not_grow_with_the_batch(pairs: dict) -> None:
    """The same number of backward passes for any N."""
    model = WHITENED.model()
    passes = set()
    for n in (8, 16, 32):
        batch = torch.randn(n, 4).double(), torch.randint(3, (n,))
        res = curvature(model, nn.CrossEntropyLoss(), batch, DiagGGNExact(), method="coupled")
        passes.add(res.passes)
    assert len(passes) == 1


@pytest.mark.parametrize("gesture", ["curvature", "extend"])
def test_leaves_no_trace(gesture: str, pairs: dict) -> None:
    model, loss_fn, X, y = WHITENED.build()
    if gesture == "curvature":
        with unchanged(model, loss_fn):
            curvature(model, loss_fn, (X, y), DiagGGNExact(), method="coupled")
        return
    extend(model), extend(loss_fn)
    with unchanged(model, loss_fn, but=("buffer", "grad", "attributes")):
        with backpack(DiagGGNExact()):
            loss_fn(model(X), y).backward()


# ------------------------------------------------------------------------------------ wrong pairs


def doubled_apply(module: nn.Module, x: Tensor, copies: Tensor) -> Tensor:
    return 2 * whitening_apply(module, x, copies)


def narrow_apply(module: nn.Module, x: Tensor, copies: Tensor) -> Tensor:
    return whitening_apply(module, x, copies)[:, :-1]


def mixing_apply(module: nn.Module, x: Tensor, copies: Tensor) -> Tensor:
    """Takes the mean from the batch, not from the statistics."""
    factor = torch.linalg.cholesky(copies[:, 1:])
    centred = (x - x.mean(0))[..., None]
    return module.mix(torch.linalg.solve_triangular(factor, centred, upper=False)[..., 0])


def swapping_apply(module: nn.Module, x: Tensor, copies: Tensor) -> Tensor:
    """Sample n uses the copy of sample n + 1: the same values, another sample's."""
    return whitening_apply(module, x, copies.roll(1, 0))


def first_copy_apply(module: nn.Module, x: Tensor, copies: Tensor) -> Tensor:
    """Everybody uses sample 0's copy."""
    return whitening_apply(module, x, copies[:1].expand_as(copies))


def own_statistics_apply(module: nn.Module, x: Tensor, copies: Tensor) -> Tensor:
    """Ignores the copies."""
    return whitening_apply(module, x, whitening_stats(module, x).expand_as(copies))


def test_pair_that_is_another_function(pairs: dict) -> None:
    register_coupled(Whitening, whitening_stats, doubled_apply)
    for method in ("coupled", "dense", "auto"):
        with pytest.raises(ValueError, match="Whitening does not reproduce.*'3'.*difference"):
            assert_exact(WHITENED, method)


def test_pair_of_another_shape(pairs: dict) -> None:
    register_coupled(Whitening, whitening_stats, narrow_apply)
    with pytest.raises(ValueError, match="Whitening does not reproduce.*'3'"):
        assert_exact(WHITENED, "coupled")


def test_pair_that_gives_no_tensor(pairs: dict) -> None:
    register_coupled(Whitening, lambda module, x: (x.mean(0), x.var(0)), whitening_apply)
    with pytest.raises(TypeError, match="Whitening.*stats.*tuple.*one tensor"):
        assert_exact(WHITENED, "coupled")


@pytest.mark.parametrize(
    "apply",
    [mixing_apply, first_copy_apply, own_statistics_apply],
)
def test_pair_that_uses_other_samples(apply: Any, pairs: dict) -> None:
    """The certificate does not trust the registration."""
    register_coupled(Whitening, whitening_stats, apply)
    with pytest.raises(RuntimeError, match=r"method='coupled' does not apply.*'3(\.mix)?'"):
        assert_exact(WHITENED, "coupled")
    assert assert_exact(WHITENED, "dense").method == "dense"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SlowPathWarning)
        assert assert_exact(WHITENED, "auto").method == "dense"


def test_statistics_held_constant_by_mistake(pairs: dict) -> None:
    """Detached statistics are another derivative than the module's own; the gradient shows it."""
    register_coupled(Whitening, lambda m, x: whitening_stats(m, x).detach(), whitening_apply)
    model, loss_fn, X, y = WHITENED.build()
    want = reference.component_gradients(*WHITENED.build())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SlowPathWarning)
        try:
            res = curvature(model, loss_fn, (X, y), ComponentGrad(), method="coupled")
        except (ValueError, RuntimeError):
            return
    assert_close(res.grad_component, want)


# ------------------------------------------------------------------------------ how it is called


class Subclass(Whitening):
    """Registered classes are matched exactly: a subclass may do anything."""


class Sidestep(nn.Module):
    """Calls its child by keyword and passes on what it does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = Whitening(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x=x)


def test_subclass_is_not_the_class(pairs: dict) -> None:
    one = case("subclass", lambda: between(Subclass(5)), labelled(8, 4))
    with pytest.raises(RuntimeError, match=r"'3(\.mix)?'"):
        assert_exact(one, "coupled")


def test_called_by_keyword(pairs: dict) -> None:
    assert_exact(case("keyword", lambda: between(Sidestep()), labelled(8, 4)), "coupled")


@pytest.mark.parametrize("gesture", ["curvature", "extend"])
def test_coupled_layer_as_the_model(gesture: str, pairs: dict) -> None:
    one = case("root", lambda: Whitening(3), labelled(8, 3))
    if gesture == "curvature":
        assert_exact(one, "coupled")
        return
    model, loss_fn, X, y = one.build()
    extend(model), extend(loss_fn)
    with backpack(DiagGGNExact()):
        loss_fn(model(X), y).backward()
    got = {n: p.diag_ggn_exact for n, p in model.named_parameters()}
    assert_close(got, reference.ggn_diagonal(*one.build()))


def test_frozen_layer_below(pairs: dict) -> None:
    """The statistics depend on no parameter: nothing to couple, nothing to go wrong."""

    def model() -> nn.Module:
        net = alone(Whitening(5))
        net[0].requires_grad_(False)
        return net

    assert_exact(case("frozen", model, labelled(8, 4)), "coupled")


def test_parameter_in_stats_above_a_frozen_layer(pairs: dict) -> None:
    """`head` sits inside the statistics although the layer's input needs no gradient."""

    def model() -> nn.Module:
        net = alone(Centring(5))
        net[0].requires_grad_(False)
        return net

    assert_exact(case("frozen_below", model, VECTORS), "coupled")
    assert_exact(case("first", lambda: nn.Sequential(Centring(4), nn.Linear(4, 3)), VECTORS), "auto")
