"""Nothing is left behind: by an ordinary call, by any failure, by a repeated or a nested one."""

import copy
import gc
import io
import pickle
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import backpack as backpack_package
import pytest
import torch
from backpack import backpack
from backpack.context import CTX
from backpack.extensions import BatchGrad
from cases import Net, float64, perturb
from state import differences, snapshot, unchanged
from test_exact import assert_close
from torch import Tensor, nn

from bncurv import ComponentGrad, DiagGGNExact, SlowPathWarning, curvature, extend, reference, unextend

N, C = 6, 3


class Boom(Exception):
    """Raised in the middle of things."""


BACKPACKS_WARNING = pytest.mark.filterwarnings("ignore:Full backward hook is firing")
FAILURES = [Boom, KeyboardInterrupt]


def net() -> nn.Module:
    """Two BatchNorms, one of them with its own average; a frozen one; an in-place activation."""
    with float64(0):
        model = nn.Sequential(
            *(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(inplace=True)),
            *(nn.Linear(5, 5), nn.BatchNorm1d(5, momentum=None), nn.Tanh()),
            *(nn.BatchNorm1d(5).eval(), nn.Linear(5, C)),
        )
        perturb(model)
    return model


def dropout_net() -> nn.Module:
    with float64(0):
        return nn.Sequential(
            *(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)),
            *(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, C)),
        )


def batch() -> tuple[Tensor, Tensor]:
    with float64(1):
        return torch.randn(N, 4), torch.randint(C, (N,))


def compute(model: nn.Module, *quantities: Any, **options: Any) -> Any:
    chosen = quantities or (DiagGGNExact(), ComponentGrad())
    return curvature(model, nn.CrossEntropyLoss(), batch(), *chosen, **options)


def gesture(model: nn.Module, *quantities: Any, loss_fn: nn.Module | None = None) -> None:
    loss_fn = loss_fn or extend(nn.CrossEntropyLoss())
    X, y = batch()
    with backpack(*(quantities or (DiagGGNExact(), ComponentGrad()))):
        loss_fn(model(X), y).backward()


def with_gradients(model: nn.Module) -> nn.Module:
    """Some parameters have a gradient already, one is frozen."""
    for p in list(model.parameters())[::2]:
        p.grad = torch.full_like(p, 0.25)
    model[0].bias.requires_grad_(False)
    return model


def raising(error: type[BaseException]) -> Callable[..., None]:
    def hook(*args: Any) -> None:
        raise error

    return hook


class FailingLoss(nn.CrossEntropyLoss):
    """Fails when it is called."""

    def __init__(self, error: type[BaseException]) -> None:
        super().__init__()
        self.error = error

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        raise self.error


class FailingQuantity(DiagGGNExact):
    """Fails at its second block."""

    field = "failing"

    def __init__(self, error: type[BaseException]) -> None:
        super().__init__()
        self.error, self.blocks = error, 0

    def add(self, *args: Any) -> None:
        self.blocks += 1
        if self.blocks == 2:
            raise self.error
        super().add(*args)


def remove_fields(model: nn.Module) -> None:
    for p in model.parameters():
        vars(p).clear()


# --------------------------------------------------------------- the snapshot sees what it must see


def _change_buffer(model: nn.Module) -> None:
    torch.nn.functional.batch_norm(
        torch.randn(N, 5).double(), model[1].running_mean, model[1].running_var, training=True
    )


def _change_grad(model: nn.Module) -> None:
    model[3].weight.grad = torch.zeros_like(model[3].weight)


def _change_parameter(model: nn.Module) -> None:
    model[0].weight.data[0, 0] += 1e-15


def _replace_buffer(model: nn.Module) -> None:
    model[1].running_mean = model[1].running_mean.clone()


CHANGES = {
    "buffer": _change_buffer,
    "grad": _change_grad,
    "parameter": _change_parameter,
    "buffer object": _replace_buffer,
    "hook": lambda model: model[2].register_forward_hook(print),
    "mode": lambda model: model[1].eval(),
    "attribute": lambda model: setattr(model[1], "input0", 1),
    "savefield": lambda model: setattr(model[0].weight, "diag_ggn_exact", 1),
    "random state": lambda model: torch.rand(1),
    "requires_grad": lambda model: model[0].weight.requires_grad_(False),
    "counter": lambda model: model[1].num_batches_tracked.add_(1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_snapshot_sees(change: Callable[[nn.Module], Any]) -> None:
    model = net()
    before = snapshot(model)
    assert differences(before, snapshot(model)) == []
    change(model)
    assert differences(before, snapshot(model)) != []


# ------------------------------------------------------------------------------------ curvature()


@pytest.mark.parametrize("method", ["coupled", "dense", "auto"])
@pytest.mark.parametrize("build", [net, dropout_net])
def test_ordinary_call(build: Callable[[], nn.Module], method: str) -> None:
    model, loss_fn = with_gradients(build()), nn.CrossEntropyLoss(weight=torch.ones(C).double())
    with unchanged(model, loss_fn):
        curvature(model, loss_fn, batch(), DiagGGNExact(), ComponentGrad(), method=method)


def test_inputs_are_left_alone() -> None:
    X, y = batch()
    X.requires_grad_()
    before = X.clone(), y.clone()
    curvature(net(), nn.CrossEntropyLoss(), (X, y), DiagGGNExact())
    assert torch.equal(X, before[0]) and torch.equal(y, before[1])
    assert X.grad is None and X.requires_grad


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("error", FAILURES)
@pytest.mark.parametrize("place", ["0", "3", "4", "7", ""])
def test_failure_in_forward(place: str, error: type[BaseException]) -> None:
    model = with_gradients(net())
    model.get_submodule(place).register_forward_hook(raising(error))
    with unchanged(model), pytest.raises(error):
        compute(model)


@pytest.mark.parametrize("error", FAILURES)
def test_failure_in_loss(error: type[BaseException]) -> None:
    model, loss_fn = with_gradients(net()), FailingLoss(error)
    with unchanged(model, loss_fn), pytest.raises(error):
        curvature(model, loss_fn, batch(), DiagGGNExact())


@pytest.mark.parametrize("error", FAILURES)
@pytest.mark.parametrize("method", ["coupled", "dense"])
def test_failure_in_quantity(method: str, error: type[BaseException]) -> None:
    model = with_gradients(net())
    with unchanged(model), pytest.raises(error):
        compute(model, ComponentGrad(), FailingQuantity(error), method=method, chunk_size=1)


@pytest.mark.parametrize("error", FAILURES)
def test_failure_in_loader(error: type[BaseException]) -> None:
    def loader() -> Iterator[Any]:
        yield batch()
        torch.rand(3)
        raise error

    model = with_gradients(net())
    with unchanged(model), pytest.raises(error):
        curvature(model, nn.CrossEntropyLoss(), loader(), DiagGGNExact(), progress=True)


@pytest.mark.parametrize("error", FAILURES)
def test_works_after_a_failure(error: type[BaseException]) -> None:
    model = net()
    handle = model[4].register_forward_hook(raising(error))
    with pytest.raises(error):
        compute(model)
    handle.remove()
    assert_same(compute(model), compute(net()))


def assert_same(got: Any, want: Any) -> None:
    """Bit for bit."""
    for field, result in want.fields.items():
        assert got.fields[field].keys() == result.keys()
        assert all(torch.equal(got.fields[field][name], t) for name, t in result.items())


def test_repeated_calls_are_bit_identical() -> None:
    model = net()
    first = compute(model)
    for _ in range(3):
        assert_same(compute(model), first)
    model.double()(batch()[0]).sum().backward()
    model.zero_grad()
    assert_same(compute(model), first)  # running statistics moved: they do not matter in train mode


def test_pending_graph_of_the_user_survives() -> None:
    """A backward of the user's after our call: nothing it saved was touched."""
    model, (X, y) = net(), batch()
    plain, loss = net(), nn.CrossEntropyLoss()
    loss(plain(X), y).backward()
    pending = loss(model(X), y)
    compute(model)
    pending.backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


# --------------------------------------------------------------------------------- randomness


def seeded(model: nn.Module, method: str, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return compute(model, method=method)


@pytest.mark.parametrize("method", ["coupled", "dense"])
def test_dropout_is_drawn_once(method: str) -> None:
    (X, y), loss_fn = batch(), nn.CrossEntropyLoss()
    got = seeded(dropout_net(), method, seed=3)
    assert_close(got.diag_ggn_exact, reference.ggn_diagonal(dropout_net(), loss_fn, X, y, seed=3))
    components = reference.component_gradients(dropout_net(), loss_fn, X, y, seed=3)
    assert_close(got.grad_component, components)
    other = seeded(dropout_net(), method, seed=4).diag_ggn_exact["0.weight"]
    assert not torch.allclose(got.diag_ggn_exact["0.weight"], other)


def test_dropout_in_extend_is_pytorchs() -> None:
    """The same random numbers are used and left over as without extend."""
    plain, extended = dropout_net(), extend(dropout_net())
    torch.manual_seed(3)
    nn.CrossEntropyLoss()(plain(batch()[0]), batch()[1]).backward()
    state = torch.get_rng_state()
    torch.manual_seed(3)
    gesture(extended)
    assert torch.equal(torch.get_rng_state(), state)
    want = reference.ggn_diagonal(dropout_net(), nn.CrossEntropyLoss(), *batch(), seed=3)
    assert_close({n: p.diag_ggn_exact for n, p in extended.named_parameters()}, want)
    for p, q in zip(extended.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_mini_batches_draw_differently() -> None:
    """As in training: the second batch continues the random sequence."""
    X, y = batch()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        got = curvature(dropout_net(), nn.CrossEntropyLoss(), [(X, y), (X, y)], ComponentGrad())
    first, second = got.grad_component["0.weight"].chunk(2)
    assert not torch.allclose(first, second)


# ------------------------------------------------------------------------------------ extend


def test_extend_unextend_leaves_no_trace() -> None:
    model, loss_fn = with_gradients(net()), nn.CrossEntropyLoss()
    with unchanged(model, loss_fn):
        unextend(extend(model)), unextend(extend(loss_fn))
        unextend(extend(extend(model))), unextend(unextend(loss_fn))


def test_extend_twice_is_once() -> None:
    once, twice = extend(net()), extend(extend(net()))
    assert extend(once) is once
    gesture(once), gesture(twice, loss_fn=extend(extend(nn.CrossEntropyLoss())))
    hooks = {k: len(v) for k, v in vars(once).items() if k.endswith("_hooks") and v}
    assert hooks == {k: len(v) for k, v in vars(twice).items() if k.endswith("_hooks") and v}
    for p, q in zip(once.parameters(), twice.parameters(), strict=True):
        assert torch.equal(p.diag_ggn_exact, q.diag_ggn_exact) and torch.equal(p.grad, q.grad)


def plainly(model: nn.Module) -> nn.Module:
    X, y = batch()
    nn.CrossEntropyLoss()(model(X), y).backward()
    return model


@pytest.mark.parametrize("quantities", [(), (DiagGGNExact(),)], ids=["idle", "active"])
def test_extend_is_plain_pytorch(quantities: tuple[Any, ...]) -> None:
    """After forward and backward: gradients, running statistics and counters to the bit."""
    plain, extended = plainly(with_gradients(net())), extend(with_gradients(net()))
    loss_fn, (X, y) = extend(nn.CrossEntropyLoss()), batch()
    with unchanged(extended, loss_fn, but=("grad", "buffer", "attributes")):
        with backpack(*quantities):
            loss_fn(extended(X), y).backward()
    for (name, p), q in zip(extended.named_parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or torch.equal(p.grad, q.grad), name
        assert list(vars(p)) == (["diag_ggn_exact"] if quantities and p.requires_grad else [])
    for (name, b), c in zip(extended.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(b, c), name
    for m in extended.modules():
        assert not [a for a in vars(m) if a.startswith("input") or a == "output"]


def test_extended_eval_and_no_grad() -> None:
    """Inference with an extended model is inference with the model."""
    model, X = net(), batch()[0]
    expected = net().eval()(X)
    extend(model).eval()
    with unchanged(model):
        assert torch.equal(model(X), expected)
        with torch.no_grad():
            assert torch.equal(model(X), expected)
        with torch.inference_mode():
            assert torch.equal(model(X), expected)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("error", FAILURES)
@pytest.mark.parametrize("place", ["0", "4", "7", ""])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize("order", ["extend_first", "hook_first"])
def test_failure_in_extended_forward(order: str, kind: str, place: str, error: type[BaseException]) -> None:
    model = net()
    if order == "extend_first":
        extend(model)
    getattr(model.get_submodule(place), kind)(raising(error))
    extend(model)
    with unchanged(model, but=("buffer",)), pytest.raises(error):
        gesture(model)


@pytest.mark.parametrize("error", FAILURES)
def test_failure_in_extended_loss(error: type[BaseException]) -> None:
    model, loss_fn = extend(net()), extend(FailingLoss(error))
    with unchanged(model, loss_fn, but=("buffer",)), pytest.raises(error):
        gesture(model, loss_fn=loss_fn)


@pytest.mark.parametrize("error", FAILURES)
def test_failure_in_extended_backward(error: type[BaseException]) -> None:
    """Neither gradients nor half the quantities are written; the next run is a good one."""
    model, loss_fn = extend(with_gradients(net())), extend(nn.CrossEntropyLoss())
    with unchanged(model, loss_fn, but=("buffer",)), pytest.raises(error):
        gesture(model, DiagGGNExact(), FailingQuantity(error), loss_fn=loss_fn)
    gesture(model, loss_fn=loss_fn)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    want = reference.ggn_diagonal(with_gradients(net()), nn.CrossEntropyLoss(), *batch())
    assert_close({n: p.diag_ggn_exact for n, p in named.items()}, want)


@pytest.mark.parametrize("error", FAILURES)
def test_works_after_a_failure_in_extend(error: type[BaseException]) -> None:
    model = extend(net())
    handle = model[4].register_forward_hook(raising(error))
    with pytest.raises(error):
        gesture(model)
    handle.remove()
    gesture(model)
    want = reference.ggn_diagonal(net(), nn.CrossEntropyLoss(), *batch())
    assert_close({n: p.diag_ggn_exact for n, p in model.named_parameters()}, want)


def test_inner_extended_model_fails_and_outer_recovers() -> None:
    """An extended part may fail inside an extended whole that catches it."""

    def forward(whole: Any, x: Tensor) -> Tensor:
        try:
            x = whole.part(x)
        except Boom:
            pass
        return whole.out(whole.bn(x))

    with float64(0):
        part, bn, out = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, C)
    part.register_forward_pre_hook(raising(Boom))
    model = extend(Net(forward, part=extend(part), bn=bn, out=out))
    gesture(model)
    want = reference.ggn_diagonal(model, nn.CrossEntropyLoss(), *batch())
    assert_close({n: p.diag_ggn_exact for n, p in model.named_parameters()}, want)


# ------------------------------------------------------------------------- copies and pickles


def copied(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module)


def pickled(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


def saved(module: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = pytest.mark.parametrize("duplicate", [copied, pickled, saved])


@COPIES
def test_extended_copy_is_extended(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model, loss_fn = extend(net()), extend(nn.CrossEntropyLoss())
    twin, twin_loss = duplicate(model), duplicate(loss_fn)
    with unchanged(model, loss_fn):
        gesture(twin, loss_fn=twin_loss)
    gesture(model, loss_fn=loss_fn)
    for p, q in zip(twin.parameters(), model.parameters(), strict=True):
        assert p is not q and torch.equal(p.diag_ggn_exact, q.diag_ggn_exact)


@COPIES
def test_copy_uses_its_own_parameters(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model, X = extend(net()), batch()[0]
    twin = duplicate(model)
    with torch.no_grad():
        twin[7].bias.add_(1.0)
    assert torch.allclose(twin(X), model(X) + 1.0)


@COPIES
def test_copy_can_be_unextended(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model, loss_fn = extend(net()), extend(nn.CrossEntropyLoss())
    twin, twin_loss = unextend(duplicate(model)), unextend(duplicate(loss_fn))
    assert sorted(vars(twin)) == sorted(vars(net()))
    assert not twin._forward_hooks and not twin._forward_pre_hooks
    assert not twin_loss._forward_hooks and not twin_loss._forward_pre_hooks
    gesture(model, loss_fn=loss_fn)
    plainly(twin)
    assert not any(vars(p) for p in twin.parameters())


@COPIES
def test_copy_after_unextend(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model, X = extend(net()), batch()[0]
    gesture(model)
    remove_fields(model)
    twin = duplicate(unextend(model))
    assert sorted(vars(twin)) == sorted(vars(net()))
    assert torch.equal(twin(X), model(X))
    assert plainly(twin)[0].weight.grad is not None


def test_state_dict_is_untouched() -> None:
    assert list(extend(net()).state_dict()) == list(net().state_dict())
    model = net()
    extend(model).load_state_dict(net().state_dict())


def test_forward_of_the_users_own() -> None:
    """A `forward` set on the instance survives extend and unextend."""
    model, X = net(), batch()[0]
    expected = 2 * net()(X)
    forward = model.forward
    model.forward = lambda x: 2 * forward(x)
    own = model.forward
    assert torch.equal(extend(model)(X), expected)
    assert unextend(model).forward is own
    assert torch.equal(model(X), expected)


# ------------------------------------------------------------------------------------ memory


class Witness(torch.autograd.Function):
    """Identity whose graph node holds an object that can be watched."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Any) -> Tensor:
        ctx.token = token
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return g, None


class Watched(nn.Module):
    """Passes its input on and keeps weak references to the output and to the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[weakref.ref] = []

    def forward(self, x: Tensor) -> Tensor:
        token = type("Token", (), {})()
        y = Witness.apply(x, token)
        self.seen += [weakref.ref(y), weakref.ref(token)]
        return y


def watched_net() -> nn.Module:
    model = net()
    return nn.Sequential(*model[:2], Watched(), *model[2:], Watched())


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Reference counting alone must free what is left."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def failed_gesture(model: nn.Module) -> None:
    with pytest.raises(Boom):
        gesture(extend(model), FailingQuantity(Boom))
    with pytest.raises(ValueError):
        (X, y), loss_fn = batch(), extend(nn.CrossEntropyLoss())
        with backpack(DiagGGNExact()):
            (-loss_fn(model(X), y)).backward()


def failed_curvature(model: nn.Module) -> None:
    with pytest.raises(Boom):
        compute(model, FailingQuantity(Boom))


USES = {
    "coupled": lambda model: compute(model, method="coupled"),
    "dense": lambda model: compute(model, method="dense"),
    "auto": lambda model: compute(model),
    "failed curvature": failed_curvature,
    "gesture": lambda model: gesture(extend(model)),
    "failed gesture": failed_gesture,
    "idle": lambda model: plainly(extend(model)),
    "forward only": lambda model: extend(model)(batch()[0]).shape,
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_graph_dies_with_the_call(use: Callable[[nn.Module], Any], no_collector: None) -> None:
    model = watched_net()
    result = use(model)
    alive = [r() is not None for m in model.modules() if isinstance(m, Watched) for r in m.seen]
    assert len(alive) >= 4 and not any(alive)
    del result


def live_tensors() -> int:
    return sum(issubclass(type(o), Tensor) for o in gc.get_objects())


@pytest.mark.parametrize("use", ["coupled", "dense", "gesture", "idle"])
def test_memory_is_flat(use: str, no_collector: None) -> None:
    model = net()
    for _ in range(3):
        USES[use](model)
    before = live_tensors()
    for _ in range(50):
        USES[use](model)
    assert live_tensors() == before


# -------------------------------------------------------------------------------------- nesting


def test_inside_a_backpack_block() -> None:
    model, expected = extend(net()), compute(net())
    loss_fn, (X, y) = extend(nn.CrossEntropyLoss()), batch()
    with backpack(DiagGGNExact(), ComponentGrad()):
        loss = loss_fn(model(X), y)
        with unchanged(model, loss_fn):
            assert_same(compute(model), expected)
        loss.backward()
    for name, p in model.named_parameters():
        assert torch.equal(p.diag_ggn_exact, expected.diag_ggn_exact[name])


@BACKPACKS_WARNING
def test_on_a_model_in_backpacks_hands() -> None:
    """Extended by BackPACK: nothing of its runs, nothing is stored, nothing is deleted."""
    with float64(0):
        model = nn.Sequential(nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, C))
    expected = compute(model)
    X, y = batch()
    backpack_package.extend(model), (loss_fn := backpack_package.extend(nn.CrossEntropyLoss()))
    with backpack(BatchGrad()):
        loss = loss_fn(model(X), y)
        with unchanged(model):
            assert_same(compute(model), expected)
        loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad_batch, expected.grad_component[name])


@BACKPACKS_WARNING
def test_in_backpacks_extension_hook() -> None:
    """Called from the middle of a backward pass."""
    results = []
    with float64(0):
        model = nn.Sequential(nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, C))
    expected = compute(model)
    X, y = batch()
    backpack_package.extend(model), (loss_fn := backpack_package.extend(nn.CrossEntropyLoss()))
    with backpack(BatchGrad(), extension_hook=lambda m: results.append(compute(model))):
        loss_fn(model(X), y).backward()
    assert len(results) == 4
    for result in results:
        assert_same(result, expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_inside_grad_modes(mode: Any) -> None:
    model, data, expected = net(), batch(), compute(net())
    with mode(), unchanged(model):
        got = curvature(model, nn.CrossEntropyLoss(), data, DiagGGNExact(), ComponentGrad())
    assert_same(got, expected)
    assert not any(t.is_inference() for t in got.diag_ggn_exact.values())


def test_inputs_made_in_inference_mode() -> None:
    """PyTorch's own error, which says what to do."""
    model = net()
    with torch.inference_mode():
        data = batch()
    with unchanged(model), pytest.raises(RuntimeError, match="make a clone"):
        curvature(model, nn.CrossEntropyLoss(), data, DiagGGNExact())


def test_of_an_extended_model() -> None:
    model = extend(net())
    with unchanged(model):
        assert_same(compute(model), compute(net()))


def test_of_a_part_while_the_whole_runs() -> None:
    """curvature() called in a forward pass that is itself recorded."""
    inner: list[Any] = []

    def forward(whole: Any, x: Tensor) -> Tensor:
        inner.append(compute(whole.part))
        return whole.part(x)

    model = Net(forward, part=net())
    outer = compute(model)
    expected = compute(net())
    assert_same(inner[0], expected)
    for name, t in expected.diag_ggn_exact.items():
        assert torch.equal(outer.diag_ggn_exact[f"part.{name}"], t)


def test_results_are_plain_tensors() -> None:
    """No graph hangs on what is handed out."""
    res, model = compute(net()), extend(net())
    gesture(model)
    handed = [*res.diag_ggn_exact.values(), *res.grad_component.values()]
    handed += [t for p in model.parameters() for t in (p.diag_ggn_exact, p.grad_component)]
    assert all(t.grad_fn is None and not t.requires_grad for t in handed)
    assert CTX.get_active_exts() == ()


# ---------------------------------------------------------------------------------- user's hooks


def count_calls(model: nn.Module) -> list[str]:
    calls: list[str] = []
    for name, m in model.named_modules():
        m.register_forward_pre_hook(lambda m, a, name=name: calls.append(f"pre {name}"))
        m.register_forward_hook(lambda m, a, o, name=name: calls.append(f"post {name}"))
    return calls


@pytest.mark.parametrize("use", ["coupled", "dense", "gesture"])
@pytest.mark.parametrize("first", ["hooks", "extend"])
def test_forward_hooks_fire_once(use: str, first: str) -> None:
    model = extend(net()) if first == "extend" and use == "gesture" else net()
    calls = count_calls(model)
    model(batch()[0])
    once = list(calls)
    calls.clear()
    USES[use](model)
    assert calls == once and len(once) == 2 * len(list(model.modules()))


def scaled_output(m: nn.Module, args: Any, output: Tensor) -> Tensor:
    return 1.5 * output.tanh()


def scaled_input(m: nn.Module, args: Any) -> Any:
    return (2 * args[0].sin(),)


def hooked_net(place: str, kind: str, hook: Any) -> nn.Module:
    model = net()
    getattr(model.get_submodule(place), kind)(hook)
    return model


@pytest.mark.parametrize(
    ("kind", "hook"),
    [("register_forward_hook", scaled_output), ("register_forward_pre_hook", scaled_input)],
    ids=["output", "input"],
)
@pytest.mark.parametrize("place", ["0", "1", "4", "6", ""])
@pytest.mark.parametrize("use", ["coupled", "dense", "hooked_extended", "extended_hooked"])
def test_hooks_that_replace_are_respected(use: str, place: str, kind: str, hook: Any) -> None:
    want = reference.ggn_diagonal(hooked_net(place, kind, hook), nn.CrossEntropyLoss(), *batch())
    unhooked = reference.ggn_diagonal(net(), nn.CrossEntropyLoss(), *batch())
    assert any(not torch.allclose(want[name], unhooked[name]) for name in want)
    if use in ("coupled", "dense"):
        assert_close(compute(hooked_net(place, kind, hook), method=use).diag_ggn_exact, want)
        return
    model = hooked_net(place, kind, hook) if use == "hooked_extended" else extend(net())
    if use == "extended_hooked":
        getattr(model.get_submodule(place), kind)(hook)
    gesture(extend(model))
    assert_close({n: p.diag_ggn_exact for n, p in model.named_parameters()}, want)


@pytest.mark.parametrize("use", ["coupled", "dense", "gesture"])
def test_backward_hooks_that_read_numbers(use: str) -> None:
    """A user's logging hook does not break the call; gradients of backward() are as ever."""
    norms: list[float] = []
    model = net()
    model[3].register_full_backward_hook(lambda m, gi, go: norms.append(float(go[0].norm())))
    USES[use](model)
    plain = plainly(net())
    if use == "gesture":
        assert all(torch.equal(p.grad, q.grad) for p, q in _pairs(model, plain))


def hooked_inside(hook: Callable[..., Any]) -> nn.Module:
    """Backward hooks of every kind on layers and BatchNorms, not on the model itself."""
    model = net()
    for place, kind in ((0, "full_"), (1, ""), (3, "full_"), (4, "full_"), (6, "")):
        getattr(model[place], f"register_{kind}backward_hook")(hook)
    model[4].register_full_backward_pre_hook(lambda m, go: hook(m, go, go))
    return model


@BACKPACKS_WARNING
@pytest.mark.parametrize("use", ["coupled", "dense"])
def test_backward_hooks_of_modules_take_no_part_in_curvature(use: str) -> None:
    """Not even where they would change the gradients: curvature is that of the function."""
    fired: list[nn.Module] = []

    def doubled(module: nn.Module, gi: Any, go: Any) -> Any:
        fired.append(module)
        return tuple(None if g is None else 2 * g for g in gi)

    model = hooked_inside(doubled)
    with unchanged(model):
        got = compute(model, method=use)
    assert fired == []
    assert_close(got.diag_ggn_exact, reference.ggn_diagonal(net(), nn.CrossEntropyLoss(), *batch()))


@BACKPACKS_WARNING
def test_backward_hooks_of_modules_fire_once_in_extend() -> None:
    """They see the user's pass only, and the gradients are those of PyTorch."""
    seen: dict[str, list[Tensor]] = {"extended": [], "plain": []}

    def note(who: str) -> Callable[..., None]:
        return lambda m, gi, go: seen[who].extend(g.clone() for g in go if g is not None)

    model, plain = hooked_inside(note("extended")), plainly(hooked_inside(note("plain")))
    extend(model)
    with unchanged(model, but=("grad", "buffer", "attributes")):
        gesture(model)
    assert len(seen["plain"]) >= 6
    assert all(torch.equal(a, b) for a, b in zip(seen["extended"], seen["plain"], strict=True))
    assert all(torch.equal(p.grad, q.grad) for p, q in _pairs(model, plain))
    want = reference.ggn_diagonal(net(), nn.CrossEntropyLoss(), *batch())
    assert_close({n: p.diag_ggn_exact for n, p in model.named_parameters()}, want)


@BACKPACKS_WARNING
def test_backward_hook_that_changes_gradients_is_named_in_extend() -> None:
    model = net()
    model[4].register_full_backward_hook(lambda m, gi, go: tuple(2 * g for g in gi))
    with pytest.raises(RuntimeError, match="backward hook changes gradients.*bncurv.curvature"):
        gesture(extend(model))


def test_backward_pre_hook_of_the_extended_module_is_refused() -> None:
    model = net()
    model.register_full_backward_pre_hook(lambda m, go: tuple(2 * g for g in go))
    with pytest.raises(RuntimeError, match="DiagGGNExact.*Sequential itself has a full backward pre-hook.*curvature"):
        gesture(extend(model))
    want = reference.ggn_diagonal(net(), nn.CrossEntropyLoss(), *batch())
    assert_close(compute(unextend(model)).diag_ggn_exact, want)


class Retaining(nn.Module):
    """Keeps the gradient of an intermediate value, as for saliency maps."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor) -> Tensor:
        self.hidden = self.net[:2](x)
        self.hidden.retain_grad()
        return self.net[2:](self.hidden * 1)


def test_retained_gradients_are_those_of_backward() -> None:
    plain = plainly(Retaining())
    model = extend(Retaining())
    with pytest.warns(SlowPathWarning, match=r"retain_grad\(\).*\(6, 5\).*DiagGGNExact.*one by one"):
        gesture(model)
    assert torch.equal(model.hidden.grad, plain.hidden.grad)
    want = reference.ggn_diagonal(Retaining(), nn.CrossEntropyLoss(), *batch())
    assert_close({n: p.diag_ggn_exact for n, p in model.named_parameters()}, want)
    assert torch.equal(plainly(extend(Retaining())).hidden.grad, plain.hidden.grad)  # no quantity asked for


def test_retained_gradient_of_the_output() -> None:
    model, loss_fn, (X, y) = extend(net()), extend(nn.CrossEntropyLoss()), batch()
    output = model(X)
    output.retain_grad()
    with backpack(DiagGGNExact()), pytest.warns(SlowPathWarning, match="retain_grad"):
        loss_fn(output, y).backward()
    leaf = output.detach().requires_grad_()
    (want,) = torch.autograd.grad(nn.CrossEntropyLoss()(leaf, y), leaf)
    assert torch.equal(output.grad, want)


@pytest.mark.parametrize("method", ["coupled", "dense"])
def test_nothing_is_retained_in_curvature(method: str) -> None:
    model, hidden = Retaining(), []
    model.net[1].register_forward_hook(lambda module, inputs, output: hidden.append(output))
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowPathWarning)
        got = compute(model, method=method).diag_ggn_exact
    assert len(hidden) == 1 and not hidden[0].retains_grad
    assert_close(got, reference.ggn_diagonal(Retaining(), nn.CrossEntropyLoss(), *batch()))


def _pairs(model: nn.Module, other: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(model.parameters(), other.parameters(), strict=True)


@pytest.mark.parametrize("use", ["coupled", "dense"])
def test_parameter_hooks_stay_silent_in_curvature(use: str) -> None:
    fired: list[Tensor] = []
    model = net()
    for p in model.parameters():
        p.register_hook(fired.append)
    USES[use](model)
    assert fired == []


def test_parameter_hooks_fire_once_in_extend() -> None:
    fired: list[Tensor] = []
    model = net()
    for p in model.parameters():
        p.register_hook(lambda g: fired.append(g))
    gesture(extend(model))
    assert len(fired) == len(list(model.parameters()))


def test_parameter_hook_that_scales() -> None:
    """Gradient clipping by hooks is no composed loss; `.grad` is PyTorch's."""
    model, plain = net(), net()
    for m in (model, plain):
        for p in m.parameters():
            p.register_hook(lambda g: 0.1 * g)
    gesture(extend(model))
    plainly(plain)
    want = reference.ggn_diagonal(net(), nn.CrossEntropyLoss(), *batch())
    assert_close({n: p.diag_ggn_exact for n, p in model.named_parameters()}, want)
    assert all(torch.equal(p.grad, q.grad) for p, q in _pairs(model, plain))


def test_optimiser_in_backward() -> None:
    """Post-accumulate hooks that step and free the gradient."""
    model = net()
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    gesture(extend(model))
    assert all(p.grad is None and hasattr(p, "diag_ggn_exact") for p in model.parameters())


# ------------------------------------------------------------------- the rest of PyTorch's world


def stateless() -> nn.Module:
    """No running statistics: what function transforms ask of a train-mode BN."""
    with float64(0):
        norm = nn.BatchNorm1d(5, track_running_stats=False)
        return nn.Sequential(nn.Linear(4, 5), norm, nn.Tanh(), nn.Linear(5, C))


def by_func_grad(model: nn.Module) -> Tensor:
    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, parameters, (batch()[0],)).square().sum()

    return torch.func.grad(loss)({n: p.detach() for n, p in model.named_parameters()})["0.weight"]


def by_func_jvp(model: nn.Module) -> Tensor:
    X = batch()[0]
    return torch.func.jvp(lambda x: model(x), (X,), (X.cos(),))[1]


def by_vmap(model: nn.Module) -> Tensor:
    X = batch()[0]
    return torch.func.vmap(lambda x: model(x))(torch.stack([X, X.cos()]))


def by_forward_mode(model: nn.Module) -> Tensor:
    X = batch()[0]
    with torch.autograd.forward_ad.dual_level():
        output = model(torch.autograd.forward_ad.make_dual(X, X.cos()))
        return torch.autograd.forward_ad.unpack_dual(output).tangent


def by_double_backward(model: nn.Module) -> Tensor:
    X, y = batch()
    loss = nn.CrossEntropyLoss()(model(X), y)
    (g,) = torch.autograd.grad(loss, model[0].weight, create_graph=True)
    return torch.autograd.grad(g.square().sum(), model[0].weight)[0]


def by_gradient_penalty(model: nn.Module) -> Tensor:
    X = batch()[0].requires_grad_()
    (g,) = torch.autograd.grad(model(X).square().sum(), X, create_graph=True)
    return torch.autograd.grad(g.norm(), model[0].weight)[0]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize(
    "transform",
    [by_func_grad, by_func_jvp, by_vmap, by_forward_mode, by_double_backward, by_gradient_penalty],
)
def test_function_transforms_of_an_extended_model(transform: Any) -> None:
    torch.testing.assert_close(transform(extend(stateless())), transform(stateless()))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::bncurv.SlowPathWarning")
def test_script_modules() -> None:
    """TorchScript shows no calls: the dense way, exact; and the buffers are restored."""
    model, want = torch.jit.script(net()), compute(net())
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    assert_close(compute(model).diag_ggn_exact, want.diag_ggn_exact)
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())


def test_compiled_model() -> None:
    """Its eager code is what is differentiated."""
    want = compute(net())
    compiled = torch.compile(net(), backend="eager")
    for method in ("coupled", "dense"):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            got = compute(compiled, method=method).diag_ggn_exact
        assert_close({n.removeprefix("_orig_mod."): t for n, t in got.items()}, want.diag_ggn_exact)


def test_two_extended_models() -> None:
    """An encoder and a decoder, extended one by one, under one loss."""
    whole, loss_fn, (X, y) = net(), extend(nn.CrossEntropyLoss()), batch()
    encoder, decoder = extend(whole[:3]), extend(whole[3:])
    with backpack(DiagGGNExact()):
        loss_fn(decoder(encoder(X)), y).backward()
    want = reference.ggn_diagonal(net(), nn.CrossEntropyLoss(), X, y)
    assert_close({n: p.diag_ggn_exact for n, p in whole.named_parameters()}, want)


@pytest.mark.filterwarnings("ignore::bncurv.SlowPathWarning")
@pytest.mark.parametrize("extended", [slice(0, 3), slice(3, 8)], ids=["first", "last"])
def test_one_part_extended(extended: slice) -> None:
    """Its parameters only, and the other part's coupling is noticed."""
    whole, loss_fn, (X, y) = net(), extend(nn.CrossEntropyLoss()), batch()
    extend(part := whole[extended])
    first, last = (part, whole[3:]) if extended.start == 0 else (whole[:3], part)
    with backpack(DiagGGNExact()):
        loss_fn(last(first(X)), y).backward()
    named = {n: p for n, p in whole.named_parameters() if hasattr(p, "diag_ggn_exact")}
    want = reference.ggn_diagonal(net(), nn.CrossEntropyLoss(), X, y)
    assert set(map(id, named.values())) == set(map(id, part.parameters()))
    assert_close({n: p.diag_ggn_exact for n, p in named.items()}, {n: want[n] for n in named})


def test_backward_twice_and_autograd_grad() -> None:
    """Every backward pass of the loss delivers; `torch.autograd.grad` accumulates nothing."""
    model, loss_fn, (X, y) = extend(net()), extend(nn.CrossEntropyLoss()), batch()
    with backpack(DiagGGNExact()):
        loss = loss_fn(model(X), y)
        torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        first = {n: p.diag_ggn_exact for n, p in model.named_parameters()}
        assert all(p.grad is None for p in model.parameters())
        remove_fields(model)
        loss.backward(retain_graph=True)
        loss.backward()
    for name, p in model.named_parameters():
        assert torch.equal(p.diag_ggn_exact, first[name])


def test_anomaly_mode() -> None:
    """Allowed, and without a report of errors that are none."""
    with warnings.catch_warnings(record=True) as caught, torch.autograd.detect_anomaly():
        warnings.simplefilter("always")
        got = compute(net())
    assert [str(w.message) for w in caught if "Error detected" in str(w.message)] == []
    want = compute(net())
    assert_close(got.diag_ggn_exact, want.diag_ggn_exact)
    assert_close(got.grad_component, want.grad_component)
