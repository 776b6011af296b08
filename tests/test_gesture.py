"""BackPACK's gesture: what backward() may be called on, BackPACK beside us, roots and copies of every form."""

import collections
import contextlib
import copy
import dataclasses
import threading
import warnings
from collections.abc import Callable
from typing import Any

import backpack as backpack_package
import pytest
import torch
from backpack import backpack, disable, extensions
from backpack.context import CTX
from cases import float64
from state import unchanged
from test_exact import assert_close
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bncurv import ComponentGrad, DiagGGNExact, SlowPathWarning, extend, reference, unextend

with float64(1):
    X, y, labels = torch.randn(8, 4), torch.randn(8, 2), torch.randint(2, (8,))
BACKPACKS_WARNING = pytest.mark.filterwarnings("ignore:Full backward hook is firing")


def net() -> nn.Module:
    with float64(0):
        return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 2))


def smooth_net() -> nn.Module:
    """One that all of BackPACK's extensions take."""
    with float64(0):
        return nn.Sequential(nn.Linear(4, 3), nn.Sigmoid(), nn.Linear(3, 2))


def diagonal(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.diag_ggn_exact for name, p in model.named_parameters()}


WANT = reference.ggn_diagonal(net(), nn.MSELoss(), X, y)


# -------------------------------------------------------- what backward() may be called on


class Cube(torch.autograd.Function):
    """A function that remembers a number: nothing on the graph tells that it is not linear."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.slope = 3 * float(x) ** 2
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return ctx.slope * g


def hooked(model: nn.Module) -> None:
    for p in model.parameters():
        p.register_hook(lambda g: g.clamp(-1, 1))


def stepped(model: nn.Module) -> None:
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))


def called_on(root: Callable[..., Tensor], prepare: Callable[[nn.Module], None] | None = None) -> nn.Module:
    """``backward()`` on a function of the loss, the model, its output and the extended loss module."""
    model, loss_fn = extend(net()), extend(nn.MSELoss())
    if prepare:
        prepare(model)
    with backpack(DiagGGNExact(), ComponentGrad()):
        output = model(X)
        root(loss_fn(output, y), model, output, loss_fn).backward()
    return model


s = torch.tensor(0.5, dtype=torch.double, requires_grad=True)
MULTIPLES: dict[str, tuple[Callable[..., Tensor], float]] = {
    "quotient": (lambda loss, *_: loss / 4, 0.25),
    "two minuses": (lambda loss, *_: 1 - loss.neg(), 1),
    "mean of a list": (lambda loss, *_: torch.stack([loss, loss]).mean(), 1),
    "weights": (lambda loss, *_: torch.stack([loss, loss]) @ torch.tensor([1.0, 2.0]).double(), 3),
    "in place": (lambda loss, *_: loss.mul_(2).add_(1), 2),
    "scaler": (lambda loss, *_: torch.amp.GradScaler("cpu", init_scale=1024.0).scale(loss), 1024),
    "reshaped": (lambda loss, *_: loss.view(1, 1)[0].squeeze().expand(3).sum(), 3),
    "cast": (lambda loss, *_: loss.float().double() * 2, 2),
    "chosen": (lambda loss, *_: torch.where(loss < 1e9, loss, 0.0), 1),
    "flooded": (lambda loss, *_: (loss - 0.01).abs() + 0.01, 1),
    "clamped away": (lambda loss, *_: loss.clamp(max=0.0), 0),
    "learnt factor": (lambda loss, *_: s.exp() * loss - s, 1.6487212707001282),
    "detached factor": (lambda loss, *_: loss / loss.detach(), None),
    "checkpointed": (lambda loss, *_: checkpoint(lambda t: 2 * t, loss, use_reentrant=False), 2),
    "another model's term": (lambda loss, *_: loss + nn.Linear(2, 1).double()(y).square().sum(), 1),
}


@pytest.mark.parametrize("prepare", [None, hooked, stepped])
@pytest.mark.parametrize("name", MULTIPLES)
def test_multiples_of_the_loss(name: str, prepare: Any) -> None:
    root, factor = MULTIPLES[name]
    model = called_on(root, prepare)
    if factor is None:
        factor = 1 / nn.MSELoss()(net()(X), y).item()
    assert_close(diagonal(model), {n: factor * t for n, t in WANT.items()})


OTHERS: dict[str, Callable[..., Tensor]] = {
    "root": lambda loss, *_: loss.sqrt(),
    "square": lambda loss, *_: loss**2,
    "exponential": lambda loss, *_: loss.exp(),
    "logarithm": lambda loss, *_: (loss + 1).log(),
    "reciprocal": lambda loss, *_: -1 / loss,
    "product with itself": lambda loss, *_: loss * loss,
    "self-weighted": lambda loss, *_: loss * loss.sigmoid(),
    "norm of a list": lambda loss, *_: torch.stack([loss, loss]).norm(),
    "view in place": lambda loss, *_: (loss * 1).view(1).sqrt_().sum(),
    "Function": lambda loss, *_: Cube.apply(loss),
}
COMPOSED: dict[str, Callable[..., Tensor]] = {
    "weight decay": lambda loss, model, *_: loss + sum(p.square().sum() for p in model.parameters()),
    "a trace of it": lambda loss, model, *_: loss + 1e-12 * model[0].weight.sum(),
    "penalty on the output": lambda loss, model, output, _: loss + 1e-12 * output.square().sum(),
    "second loss": lambda loss, model, output, loss_fn: loss + loss_fn(output, 2 * y),
    "second batch": lambda loss, model, output, loss_fn: loss + loss_fn(model(2 * X), y),
    "product of losses": lambda loss, model, output, loss_fn: loss * loss_fn(model(2 * X), y),
    "parameter as a factor": lambda loss, model, *_: loss * model[3].bias[0].exp(),
    "in place": lambda loss, model, *_: loss.add_(model[3].bias.sum()),
}


@pytest.mark.parametrize("prepare", [None, hooked, stepped])
@pytest.mark.parametrize(
    ("root", "says"),
    [(f, "composed with other terms that depend on the model") for f in COMPOSED.values()]
    + [(f, "a function of MSELoss that is no multiple of it") for f in OTHERS.values()],
    ids=[*COMPOSED, *OTHERS],
)
def test_what_is_no_multiple_is_refused(root: Callable[..., Tensor], says: str, prepare: Any) -> None:
    with pytest.raises(RuntimeError, match=says):
        called_on(root, prepare)


def test_several_roots_and_partial_backward() -> None:
    model, loss_fn = extend(net()), extend(nn.MSELoss())
    with backpack(DiagGGNExact()):
        loss = loss_fn(model(X), y)
        torch.autograd.grad(2 * loss, list(model.parameters()), retain_graph=True)
        assert_close(diagonal(model), {n: 2 * t for n, t in WANT.items()})
        (3 * loss).backward(inputs=[model[0].weight], retain_graph=True)
        assert_close(diagonal(model), {n: 3 * t for n, t in WANT.items()})
        torch.autograd.backward([loss, s.exp()], retain_graph=True)
        assert_close(diagonal(model), WANT)
        with pytest.raises(RuntimeError, match="composed with other terms"):
            torch.autograd.backward([loss, model[0].bias.sum()])


def test_unknown_start_of_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bncurv.composed.backward_frame", lambda thread=None: None)
    with pytest.raises(RuntimeError, match=r"not known what backward\(\) was called on.*MSELoss.*loss.backward\(\)"):
        called_on(lambda loss, *_: loss)


def test_the_loss_twice_in_turn() -> None:
    model, loss_fn = extend(net()), extend(nn.MSELoss())
    with backpack(DiagGGNExact()):
        loss_fn(model(X), y).backward()
        loss_fn(model(2 * X), y).backward()
    assert_close(diagonal(model), reference.ggn_diagonal(net(), nn.MSELoss(), 2 * X, y))


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize("accumulated", [False, True])
def test_create_graph_is_named(accumulated: bool) -> None:
    """And the gradient is checked as ever."""
    model, loss_fn = extend(net()), extend(nn.MSELoss())
    for p in model.parameters():
        p.grad = torch.ones_like(p) if accumulated else None
    with backpack(DiagGGNExact()), pytest.warns(UserWarning, match="create_graph=True.*DiagGGNExact.*detached") as seen:
        loss_fn(model(X), y).backward(create_graph=True)
    assert [w.filename for w in seen if "detached" in str(w.message)] == [__file__]
    assert_close(diagonal(model), WANT)
    assert model[0].weight.grad.requires_grad
    model[1].register_full_backward_hook(lambda m, gi, go: tuple(2 * g for g in gi))
    with pytest.raises(RuntimeError, match="backward hook changes gradients"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with backpack(DiagGGNExact()):
            loss_fn(model(X), y).backward(create_graph=True)


# ----------------------------------------------------------------------- BackPACK beside us

ALL = [
    *("BatchGrad", "BatchL2Grad", "SumGradSquared", "Variance", "DiagGGNExact", "DiagGGNMC", "BatchDiagGGNExact"),
    *("SqrtGGNExact", "SqrtGGNMC", "KFAC", "KFLR", "KFRA", "DiagHessian", "BatchDiagHessian", "HMP", "GGNMP", "PCHMP"),
]
EXTENDED: dict[str, Callable[[nn.Module], Any]] = {
    "BackPACK": backpack_package.extend,
    "bncurv": extend,
    "both": lambda m: extend(backpack_package.extend(m)),
    "both, other order": lambda m: backpack_package.extend(extend(m)),
}


def of_backpack(name: str, who: str, make: Callable[[], nn.Module] = smooth_net) -> dict[Any, Any]:
    """What BackPACK's extension stores, and the gradients; after two steps, or the error."""
    model, loss_fn = make(), nn.CrossEntropyLoss()
    EXTENDED[who](model), EXTENDED[who](loss_fn)
    ours = [] if who == "BackPACK" else [ComponentGrad()]
    torch.manual_seed(0)
    try:
        for _ in range(2):
            model.zero_grad()
            with backpack(getattr(extensions, name)(), *ours):
                loss_fn(model(X), labels).backward()
    except Exception as e:
        return {type(e): str(e)}
    stored = {(n, f): v for n, p in model.named_parameters() for f, v in vars(p).items() if f != "grad_component"}
    for (n, f), v in stored.items():
        p = model.get_parameter(n)
        stored[n, f] = v(torch.ones(1, *p.shape).double()) if callable(v) else v
    return stored | {(n, "grad"): p.grad for n, p in model.named_parameters()}


@BACKPACKS_WARNING
@pytest.mark.parametrize("who", [who for who in EXTENDED if who != "BackPACK"])
@pytest.mark.parametrize("name", ALL)
def test_backpacks_extensions_beside_ours(name: str, who: str) -> None:
    torch.testing.assert_close(of_backpack(name, who), of_backpack(name, "BackPACK"))


def refused_net(part: nn.Module) -> Callable[[], nn.Module]:
    with float64(0):
        model = nn.Sequential(nn.Linear(4, 3), part, nn.Linear(3, 2)).double()
    return lambda: copy.deepcopy(model)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = smooth_net()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@BACKPACKS_WARNING
@pytest.mark.filterwarnings("ignore:Encountered BatchNorm module", "ignore:.*does not have an extension")
@pytest.mark.filterwarnings("ignore::bncurv.SlowPathWarning")
@pytest.mark.parametrize(
    "make",
    [refused_net(nn.ReLU(inplace=True)), refused_net(nn.BatchNorm1d(3)), refused_net(nn.PReLU()), Plain]
    + [lambda: nn.Linear(4, 2).double()],
    ids=["in place", "BatchNorm", "PReLU", "container", "single layer"],
)
@pytest.mark.parametrize("name", ["DiagGGNExact", "BatchGrad", "KFAC"])
def test_backpacks_refusals_are_its_own(name: str, make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    make = (lambda model: lambda: copy.deepcopy(model))(make())
    ours, its = of_backpack(name, "bncurv", make), of_backpack(name, "BackPACK", make)
    errors = [{k: v for k, v in got.items() if isinstance(v, str)} for got in (ours, its)]
    assert errors[0] == errors[1]
    if not errors[0]:
        torch.testing.assert_close(ours, its)


@BACKPACKS_WARNING
def test_nothing_of_backpack_stays() -> None:
    """Its hooks are there for the block; none of them is kept."""
    model, loss_fn = extend(smooth_net()), extend(nn.CrossEntropyLoss())
    with unchanged(model, loss_fn, but=("grad", "attributes")):
        with backpack(extensions.BatchGrad(), DiagGGNExact()):
            loss = loss_fn(model(X), labels)
            assert all(m._backward_hooks for m in (*model, loss_fn))
            loss.backward()
        with pytest.raises(KeyError), backpack(extensions.BatchGrad()):
            model(X)
            raise KeyError
    assert not any("input0" in vars(m) or "_backpack_extend" in vars(m) for m in (*model, loss_fn))
    inside, handles = smooth_net(), list(CTX.hook_handles)
    with backpack(extensions.BatchGrad()):
        extend(loss_fn)(extend(inside)(X), labels).backward()
    assert inside[0].weight.grad_batch.shape == (8, 3, 4)
    assert not inside[0]._forward_hooks and not inside[0]._backward_hooks and CTX.hook_handles == handles


@BACKPACKS_WARNING
def test_extension_hook_is_called() -> None:
    """On every module, after all extensions, ours included; also with quantities of ours alone."""
    model, loss_fn, seen = extend(net()), extend(nn.CrossEntropyLoss()), []
    with backpack(ComponentGrad(), extension_hook=lambda m: seen.append((type(m), all(map(vars, m.parameters()))))):
        loss_fn(model(X), labels).backward()
    assert [kind for kind, _ in seen] == [nn.CrossEntropyLoss, nn.Linear, nn.Tanh, nn.BatchNorm1d, nn.Linear]
    assert all(stored for _, stored in seen)


def test_disable_is_respected() -> None:
    """A pass under it is a plain one."""
    model, loss_fn = extend(net()), extend(nn.MSELoss())
    with backpack(DiagGGNExact()):
        with disable():
            loss_fn(model(X), y).backward()
        assert not any(vars(p) for p in model.parameters()) and model[0].weight.grad is not None
        loss_fn(model(X), y).backward()
    assert_close(diagonal(model), WANT)
    with pytest.raises(RuntimeError, match=r"did not run.*not under BackPACK's disable\(\)"):
        with backpack(DiagGGNExact()), disable():
            loss_fn(model(X), y).backward()
    with pytest.raises(RuntimeError, match=r"forward pass.*ran under BackPACK's disable\(\)"):
        with backpack(DiagGGNExact()):
            with disable():
                output = model(X)
            loss_fn(output, y).backward()


@pytest.mark.parametrize("active", [False, True])
def test_hooks_on_the_loss_fire_as_without_us(active: bool) -> None:
    def run(prepare: Callable[[nn.Module], Any], quantities: tuple[Any, ...]) -> list[Any]:
        model, loss_fn, seen = prepare(net()), prepare(nn.MSELoss()), []
        loss_fn.register_forward_pre_hook(lambda m, a: seen.append(("pre", len(a))))
        loss_fn.register_forward_hook(lambda m, a, o: seen.append(("post", o.item())))
        loss_fn.register_full_backward_pre_hook(lambda m, go: seen.append(("back pre", float(go[0]))))
        loss_fn.register_full_backward_hook(lambda m, gi, go: seen.append(("back", gi[0].tolist(), float(go[0]))))
        with backpack(*quantities):
            (2 * loss_fn(model(X), y)).backward()
        return [*seen, [p.grad.tolist() for p in model.parameters()]]

    plain = run(lambda m: m, ())
    assert len(plain) == 5 and run(extend, (DiagGGNExact(), ComponentGrad()) if active else ()) == plain


@pytest.mark.parametrize("first", [False, True])
def test_forward_hooks_of_the_loss_take_part(first: bool) -> None:
    model, loss_fn = extend(net()), nn.MSELoss()
    for hook in (extend, lambda m: m.register_forward_hook(lambda m, a, o: 3 * o))[:: -1 if first else 1]:
        hook(loss_fn)
    with backpack(DiagGGNExact()):
        loss_fn(model(X), y).backward()
    assert_close(diagonal(model), {n: 3 * t for n, t in WANT.items()})


def test_pre_hooks_of_the_loss() -> None:
    """They may replace what it sees; with a backward hook besides only those known before."""
    model, loss_fn = extend(net()), extend(nn.MSELoss())
    loss_fn.register_forward_pre_hook(lambda m, args: (args[0] / 2, args[1]))
    with backpack(DiagGGNExact()):
        loss_fn(model(X), y).backward()
    assert_close(diagonal(model), {n: t / 4 for n, t in WANT.items()})
    loss_fn.register_full_backward_hook(lambda m, gi, go: None)
    with pytest.raises(RuntimeError, match="MSELoss.*pre-hook registered after bncurv.extend"):
        with backpack(DiagGGNExact()):
            loss_fn(model(X), y).backward()
    extend(unextend(loss_fn))
    with backpack(DiagGGNExact()):
        loss_fn(model(X), y).backward()
    assert_close(diagonal(model), {n: t / 4 for n, t in WANT.items()})


# ------------------------------------------------------------------- roots, copies, warnings


@dataclasses.dataclass
class Heads:
    first: Any
    second: Any


class Holder:
    def __init__(self, *heads: Any) -> None:
        self.heads = list(heads)


Pair = collections.namedtuple("Pair", "first second")
ROOTS: dict[str, tuple[Callable[..., Any], Callable[[Any], Tensor]]] = {
    "tuple": (lambda a, b: (a, b), lambda out: out[0]),
    "list in a dict": (lambda a, b: {"heads": [3, a, None], "aux": b}, lambda out: out["heads"][1]),
    "named tuple": (Pair, lambda out: out.first),
    "dataclass": (Heads, lambda out: out.first),
    "object": (Holder, lambda out: out.heads[0]),
    "view of one": (lambda a, b: (b, a), lambda out: out[1].view(4, 2, 2).flatten(0, 1)),
    "slice of one": (lambda a, b: torch.cat([b, a], 1), lambda out: out[:, 2:]),
    "chunks": (lambda a, b: torch.cat([a, b], 1).chunk(2, 1), lambda out: out[0]),
    "function of one": (lambda a, b: (a, b), lambda out: (out[0] / 2).mul_(2)),
}


class TwoHeads(nn.Module):
    def __init__(self, root: Callable[..., Any]) -> None:
        super().__init__()
        with float64(0):
            self.trunk = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh())
            self.first, self.second = nn.Linear(3, 2), nn.Linear(3, 2)
        self.root = root

    def forward(self, x: Tensor) -> Any:
        h = self.trunk(x)
        return self.root(self.first(h), self.second(h))


@pytest.mark.parametrize("name", ROOTS)
def test_roots_that_return_several_tensors(name: str) -> None:
    root, choose = ROOTS[name]
    want = reference.ggn_diagonal(TwoHeads(lambda a, b: choose(root(a, b))), nn.MSELoss(), X, y)
    model, loss_fn = extend(TwoHeads(root)), extend(nn.MSELoss())
    with backpack(DiagGGNExact()):
        loss_fn(choose(model(X)), y).backward()
    assert_close(diagonal(model), want)


def test_shallow_copies_are_refused_until_extended() -> None:
    model, loss_fn = extend(net()), extend(nn.MSELoss())
    twin = copy.copy(model)
    with pytest.raises(RuntimeError, match="Sequential is a shallow copy.*bncurv.extend.*deepcopy"):
        twin(X)
    assert extend(twin) is twin and twin.forward is not model.forward
    with backpack(DiagGGNExact()):
        loss_fn(twin(X), y).backward()
    assert_close(diagonal(twin), WANT)
    assert torch.equal(unextend(twin)(X), model(X))
    with backpack(DiagGGNExact()):
        loss_fn(model(X), y).backward()


class Filled(nn.Module):
    """A layer that is no row of the table."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.5))

    def forward(self, h: Tensor) -> Tensor:
        return h.masked_fill(h > 0.5, self.w)


def user_line(model: nn.Module, loss_fn: nn.Module) -> None:
    loss_fn(model(X), y).backward()  # the line that the warning names


def test_warnings_name_the_users_line() -> None:
    with float64(0):
        model = extend(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), Filled(), nn.Linear(3, 2)))
    with backpack(DiagGGNExact()), pytest.warns(SlowPathWarning) as seen:
        user_line(model, extend(nn.MSELoss()))
    line = user_line.__code__.co_firstlineno + 1
    assert {(w.filename, w.lineno) for w in seen} == {(__file__, line)}


@BACKPACKS_WARNING
def test_pytorchs_warning_comes_from_the_users_pass_only() -> None:
    """That of backward hooks on modules without gradients at the input, which BackPACK adds; torch 2.6 has none."""

    def warned(*exts: Any) -> list[str]:
        model, loss_fn = extend(smooth_net()), extend(nn.CrossEntropyLoss())
        with warnings.catch_warnings(record=True) as seen, backpack(*exts):
            warnings.simplefilter("always")
            loss_fn(model(X), labels).backward()
        return [w.filename for w in seen]

    its_own = warned(extensions.BatchGrad())
    assert its_own in ([__file__], []) and warned(extensions.BatchGrad(), DiagGGNExact()) == its_own


def test_blocks_entered_in_other_ways() -> None:
    """By hand, by an ExitStack, one in the other, the same one again."""
    model, loss_fn, block = extend(net()), extend(nn.MSELoss()), backpack(DiagGGNExact())

    def work() -> None:
        for p in model.parameters():
            vars(p).clear()
        loss_fn(model(X), y).backward()
        assert_close(diagonal(model), WANT)

    with unchanged(model, loss_fn, but=("grad", "buffer", "attributes")):
        block.__enter__()
        work()
        block.__exit__(None, None, None)
        with contextlib.ExitStack() as stack:
            stack.enter_context(block)
            work()
        with block, backpack(ComponentGrad()):
            loss_fn(model(X), y).backward()
            with backpack(DiagGGNExact()):
                work()
            loss_fn(model(X), y).backward()
            assert hasattr(model[0].weight, "grad_component")
            with pytest.raises(RuntimeError, match="DiagGGNExact did not run"), backpack(DiagGGNExact()):
                pass
            with block:
                work()
    with pytest.raises(AttributeError):
        backpack(DiagGGNExact()).__exit__(None, None, None)


class Wrapping(nn.Module):
    """A loss around an extended one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = extend(nn.MSELoss())

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return self.inner(input, target)


def test_an_extended_loss_in_an_extended_loss() -> None:
    model, loss_fn = extend(net()), extend(Wrapping())
    with backpack(ComponentGrad()):
        loss_fn(model(X), y).backward()
    summed = {n: p.grad_component.sum(0) for n, p in model.named_parameters()}
    assert_close(summed, reference.gradient(net(), nn.MSELoss(), X, y))


def test_backward_in_another_thread_than_forward() -> None:
    model, loss_fn = extend(net()), extend(nn.MSELoss())
    losses: list[Tensor] = []
    thread = threading.Thread(target=lambda: losses.append(loss_fn(model(X), y)))
    thread.start(), thread.join()
    with backpack(DiagGGNExact()):
        losses[0].backward()
    assert_close(diagonal(model), WANT)


def test_a_quantity_keeps_nothing_of_a_run() -> None:
    q = DiagGGNExact()
    before = set(vars(q))
    model, loss_fn = extend(net()), extend(nn.MSELoss())
    with backpack(q):
        loss_fn(model(X), y).backward()
    assert set(vars(q)) == before
    with pytest.raises(RuntimeError, match="DiagGGNExact did not run"), backpack(q):
        pass
