"""A single direction at a time, as with ``chunk_size=1`` or where maps are large: summed by PyTorch's own kernels."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from backpack import backpack
from cases import ARCHITECTURES, MODELS, Case, Net, case, labelled, mlp, tokens
from state import unchanged
from test_coupled_layers import COUPLED_CASES, pairs  # noqa: F401
from test_exact import assert_close
from torch import Tensor, nn

from bncurv import ComponentGrad, DiagGGNExact, SumComponentGradSquared, curvature, extend, reference
from bncurv.graph import trace
from bncurv.statistics_passes import StatisticsPasses


@pytest.fixture(params=["chunk_size", "direction_chunk"])
def singly(request, monkeypatch) -> dict[str, int]:
    """Options of `curvature` with which one direction is pulled back at a time: by the user, or by the cost model."""
    if request.param == "chunk_size":
        return {"chunk_size": 1}
    monkeypatch.setattr("bncurv.costs.Costs.direction_chunk", lambda self, j: 1)
    return {}


@pytest.fixture
def summed(monkeypatch) -> Iterator[dict[str, int]]:
    """How many directions of each BatchNorm were summed on the way, by its name."""
    count: dict[str, int] = {}
    own = StatisticsPasses._summed_on_the_way

    def counted(self: StatisticsPasses, j: int, output: Any, cotangent: Tensor, names: list[str]) -> Any:
        assert len(cotangent) == 1
        if self._structure.below[j]:
            name = self._sites[j].coupling.name
            count[name] = count.get(name, 0) + 1
        return own(self, j, output, cotangent, names)

    monkeypatch.setattr(StatisticsPasses, "_summed_on_the_way", counted)
    yield count


def assert_exact(one: Case, params: list[str] | None = None, twin: Case | None = None, **options: Any) -> None:
    """Both kinds of blocks against the oracle, which is run on the ``twin`` if there is one."""
    model, loss_fn, X, y = one.build()
    options |= {"params": params, "method": "coupled"}
    with unchanged(model, loss_fn):
        rows = curvature(model, loss_fn, (X, y), DiagGGNExact(), ComponentGrad(), **options)
        squares = curvature(model, loss_fn, (X, y), DiagGGNExact(), SumComponentGradSquared(), **options)
    built = (twin or one).build()
    diagonal, components = reference.ggn_diagonal(*built), reference.component_gradients(*built)
    names = diagonal if params is None else params
    assert_close(rows.diag_ggn_exact, {n: diagonal[n] for n in names})
    assert_close(squares.diag_ggn_exact, {n: diagonal[n] for n in names})
    assert_close(rows.grad_component, {n: components[n] for n in names})
    assert_close(squares.sum_grad_squared, {n: components[n].square().sum(0) for n in names})


# -------------------------------------------------------------------------------------- networks


def chain(*layers: str, **modules: nn.Module) -> Any:
    """Named layers one after the other, a tanh behind every second one."""

    def forward(net: Any, x: Tensor) -> Tensor:
        for i, name in enumerate(layers):
            x = getattr(net, name)(x)
            x = x.tanh() if i % 2 and i + 1 < len(layers) else x
        return x

    return Net(forward, **modules)


def linears(**sizes: tuple[int, int]) -> dict[str, nn.Module]:
    return {name: nn.Linear(*size) for name, size in sizes.items()}


def norms(width: int, *names: str) -> dict[str, nn.Module]:
    return {name: nn.BatchNorm1d(width) for name in names}


def shared_below(*layers: str) -> Any:
    """A layer ``shared`` at several places of a chain with BNs."""
    return lambda: chain(
        *layers,
        **linears(shared=(4, 4), mid=(4, 4), out=(4, 3)),
        **norms(4, *(name for name in dict.fromkeys(layers) if name.startswith("bn"))),
    )


def two_branches() -> nn.Module:
    """Siamese: a BN directly behind the shared layer in one branch, not in the other."""

    def forward(net: Any, x: Tensor) -> Tensor:
        y = net.bn2(net.mid(net.shared(x).tanh())).tanh()
        return net.out(net.bn1(net.shared(x)).tanh() + y)

    return Net(forward, **linears(shared=(4, 4), mid=(4, 4), out=(4, 3)), **norms(4, "bn1", "bn2"))


def residual() -> nn.Module:
    def forward(net: Any, x: Tensor) -> Tensor:
        x = net.bn1(net.first(x)).tanh()
        x = x + net.bn2(net.second(x)).tanh()
        return net.out(net.bn3(net.third(x)).relu())

    sizes = {"first": (4, 5), "second": (5, 5), "third": (5, 5), "out": (5, 3)}
    return Net(forward, **linears(**sizes), **norms(5, "bn1", "bn2", "bn3"))


def around() -> nn.Module:
    """The lower layer's output goes around its BN: not centred, and direct with both moments."""

    def forward(net: Any, x: Tensor) -> Tensor:
        z = net.first(x)
        return net.out(net.bn2(net.second(net.bn1(z).tanh() * z)).relu())

    return Net(forward, **linears(first=(4, 5), second=(5, 5), out=(5, 3)), **norms(5, "bn1", "bn2"))


def frozen_norms(*names: str) -> nn.Module:
    model = mlp(4, 6, 5, 4, 3)
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


def lookup(sparse: bool) -> Any:
    return lambda: Net(
        lambda net, x: net.out(net.bn2(net.second(net.bn1(net.embedding(x).mean(1)).tanh())).tanh()),
        embedding=nn.Embedding(6, 4, padding_idx=0, sparse=sparse),
        **linears(second=(4, 5), out=(5, 3)),
        **{"bn1": nn.BatchNorm1d(4), "bn2": nn.BatchNorm1d(5)},
    )


def steps() -> nn.Module:
    """Rows of the first BN are steps of samples."""

    def forward(net: Any, x: Tensor) -> Tensor:
        x = net.bn1(net.first(x).flatten(0, 1)).tanh().unflatten(0, x.shape[:2]).mean(1)
        return net.out(net.bn2(net.second(x)))

    return Net(forward, **linears(first=(3, 5), second=(5, 5), out=(5, 3)), **norms(5, "bn1", "bn2"))


VECTORS = labelled(7, 4)
THREE = ("first", "bn1", "second", "bn2", "third", "bn3", "out")
FREE = [
    case("mlp", lambda: mlp(4, 6, 5, 4, 3), VECTORS),
    case("not_affine", lambda: mlp(4, 6, 5, 4, 3, bn=lambda w: nn.BatchNorm1d(w, affine=False)), VECTORS),
    case("frozen_weight", lambda: frozen_norms("1.weight", "4.weight"), VECTORS),
    case("frozen_bias", lambda: frozen_norms("1.bias"), VECTORS),
    case("frozen_affine", lambda: frozen_norms("1.weight", "1.bias"), VECTORS),
    case("frozen_linear", lambda: frozen_norms("3.weight", "0.bias"), VECTORS),
    case("residual", residual, VECTORS),
    case("around", around, VECTORS),
    case("lookup", lookup(False), tokens(7, 3)),
    case("steps", steps, labelled(5, 3, 3)),
]
NAMED = {one.name: one for one in FREE}
STRADDLING = {  # a BatchNorm whose own layer is used below it as well → directions by BatchNorm
    case("twice", shared_below("shared", "bn1", "shared", "bn2", "out"), VECTORS): {"bn2": 8},
    case("shared_block", shared_below("shared", "bn", "shared", "bn", "out"), VECTORS): {"bn": 8},
    case("later", shared_below("mid", "bn1", "shared", "bn2", "shared", "bn3", "out"), VECTORS): {"bn2": 8, "bn3": 8},
    case("shared_norm", shared_below("shared", "bn", "mid", "bn", "out"), VECTORS): {"bn": 8},
}
ABOVE = [
    case("crossed", shared_below("shared", "bn1", "mid", "bn2", "shared", "bn3", "out"), VECTORS),
    case("crossed_twice", shared_below("mid", "bn1", "shared", "bn2", "mid", "bn3", "shared", "bn4", "out"), VECTORS),
    case("branches", two_branches, VECTORS),
]
SOME = [c for c in [*MODELS, *ARCHITECTURES] if c.name in ("two_conv_cnn", "unet", "inplace", "mobilenet", "densenet")]
FIRST = [
    *(c for c in MODELS if c.name == "bn_first"),
    case("frozen_first", lambda: frozen_norms("0.weight", "0.bias"), VECTORS),
]


@pytest.mark.parametrize("one", [*FREE, *SOME, *FIRST], ids=str)
def test_networks(one, singly, summed):
    assert_exact(one, **singly)
    assert summed


@pytest.mark.parametrize("one", STRADDLING, ids=str)
def test_layer_shared_with_one_below(one, singly, summed):
    """The pass starts below the direct layer, so the gradient of a shared parameter holds the lower uses only."""
    assert_exact(one, **singly)
    assert {name: count // 2 for name, count in summed.items()} == STRADDLING[one]  # two calls of `curvature`


@pytest.mark.parametrize("one", ABOVE, ids=str)
def test_layer_shared_with_one_above(one, singly, summed):
    """Centred at one site below the direction's BatchNorm and at one that the direction does not reach."""
    assert_exact(one, **singly)
    assert summed


def test_sparse_embedding(singly, summed):
    """Its gradient comes as a sparse tensor."""
    assert_exact(case("lookup", lookup(True), tokens(7, 3)), twin=NAMED["lookup"], **singly)
    assert summed


@pytest.mark.parametrize(
    "params",
    [
        ["3.bias", "6.bias", "9.bias"],
        ["0.bias", "1.bias"],
        ["1.weight"],
        ["0.weight"],
        ["0.weight", "3.weight"],
        ["4.bias", "9.weight"],
    ],
    ids=" ".join,
)
def test_some_parameters(params, singly):
    assert_exact(NAMED["mlp"], params, **singly)


def test_biases_that_count(singly, summed):
    """Only biases, and not directly in front of a BN: ones for an input, the coupling in full."""

    def model() -> nn.Module:
        return nn.Sequential(
            *(nn.Linear(4, 5), nn.Tanh(), nn.BatchNorm1d(5), nn.Linear(5, 5), nn.ReLU(), nn.BatchNorm1d(5)),
            nn.Linear(5, 3),
        )

    assert_exact(case("biases", model, VECTORS), ["0.bias", "2.bias", "3.bias"], **singly)
    assert set(summed) == {"2", "5"}


@pytest.mark.parametrize("one", COUPLED_CASES, ids=str)
def test_registered_layers(one, singly, pairs):  # noqa: F811
    """Their statistics are read at the copies' edge, a BatchNorm's at its handle, in the same pass."""
    model, loss_fn, X, y = one.build()
    res = curvature(model, loss_fn, (X, y), DiagGGNExact(), ComponentGrad(), method="coupled", **singly)
    assert_close(res.diag_ggn_exact, reference.ggn_diagonal(*one.build()))
    assert_close(res.grad_component, reference.component_gradients(*one.build()))


@pytest.mark.parametrize("name", ["whitening", "ghost", "minibatch_stddev_flat"])
def test_registered_layers_are_summed(name, pairs, summed):  # noqa: F811
    """Between two BatchNorms: its own directions, and those of the upper one."""
    one = next(c for c in COUPLED_CASES if c.name == name)
    model, loss_fn, X, y = one.build()
    curvature(model, loss_fn, (X, y), DiagGGNExact(), method="coupled", chunk_size=1)
    assert set(summed) == {"3", "5"}


@pytest.mark.parametrize("one", [NAMED["mlp"], NAMED["residual"], *SOME], ids=str)
def test_in_float32(one, singly, summed):
    model, loss_fn, X, y = one.build()
    model, X = model.float(), X.float()
    res = curvature(model, loss_fn, (X, y), DiagGGNExact(), method="coupled", **singly)
    want = reference.ggn_diagonal(model, loss_fn, X, y)
    whole = max(float(t.abs().max()) for t in want.values())
    for name, expected in want.items():
        error = float((res.diag_ggn_exact[name] - expected).norm())
        assert error <= 1e-4 * float(expected.norm()) + 1e-6 * whole, name
    assert summed


@pytest.mark.parametrize("one", [NAMED[name] for name in ("mlp", "not_affine", "residual")], ids=str)
def test_as_several_at_once(one, summed):
    """The same directions and the same passes as in chunks, to rounding."""
    model, loss_fn, X, y = one.build()
    single, several = (
        curvature(model, loss_fn, (X, y), ComponentGrad(), method="coupled", chunk_size=size) for size in (1, 2)
    )
    assert single.passes == several.passes
    assert_close(single.grad_component, several.grad_component, 1e-12)
    widths = [m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm1d)]
    assert sum(summed.values()) == 2 * sum(widths[1:])  # nothing but its own layer below the first


# -------------------------------------------------------------------------------- leaves no trace


def test_gradients_and_hooks_of_the_user(singly, summed):
    """The passes end at the user's parameters: no ``.grad`` changes, no hook runs."""
    model, loss_fn, X, y = NAMED["mlp"].build()
    seen: list[str] = []
    for name, p in model.named_parameters():
        p.grad = torch.full_like(p, 2.5)
        p.register_hook(lambda g, name=name: seen.append(name))
        p.register_post_accumulate_grad_hook(lambda p, name=name: seen.append(name))
    grads = {name: p.grad for name, p in model.named_parameters()}
    with unchanged(model, loss_fn):
        curvature(model, loss_fn, (X, y), DiagGGNExact(), method="coupled", **singly)
    assert summed and not seen
    for name, p in model.named_parameters():
        assert p.grad is grads[name] and bool((p.grad == 2.5).all())


@pytest.mark.parametrize("one", [NAMED[name] for name in ("mlp", "not_affine", "frozen_weight", "residual")], ids=str)
def test_extended_model(one, monkeypatch, summed):
    """``backward()`` with open gates: the user's gradient to the bit, nothing at the leaves that we added."""
    monkeypatch.setattr("bncurv.costs.Costs.direction_chunk", lambda self, j: 1)
    monkeypatch.setattr("bncurv.costs.Costs.dense", lambda self: float("inf"))
    plain, loss_fn, X, y = one.build()
    loss_fn(plain(X), y).backward()
    model, loss_fn, X, y = one.build()
    extend(model), extend(loss_fn)
    output = model(X)
    handles = [site.coupling.handle for site in trace(output, model.parameters()).sites if site.mark.coupling]
    assert len(handles) == sum(isinstance(m, nn.BatchNorm1d) for m in model.modules())
    with backpack(DiagGGNExact()):
        loss_fn(output, y).backward()
    assert summed
    assert all(h.is_leaf and h.requires_grad and h.grad is None for h in handles)
    want = reference.ggn_diagonal(*one.build())
    assert_close({n: p.diag_ggn_exact for n, p in model.named_parameters() if p.requires_grad}, want)
    for p, expected in zip(model.parameters(), plain.parameters(), strict=True):
        assert p.grad is None if expected.grad is None else torch.equal(p.grad, expected.grad)


def test_plain_backward_of_an_extended_model():
    """Without any quantity, twice on one graph."""
    model, loss_fn, X, y = NAMED["mlp"].build()
    extend(model), extend(loss_fn)
    output = model(X)
    handles = [site.coupling.handle for site in trace(output, model.parameters()).sites if site.mark.coupling]
    loss = loss_fn(output, y)
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in model.parameters()]
    loss.backward()
    assert all(torch.equal(p.grad, 2 * g) for p, g in zip(model.parameters(), once, strict=True))
    assert len(handles) == 3 and all(h.grad is None for h in handles)
