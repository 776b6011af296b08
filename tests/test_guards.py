"""Lines that act in rare moments only: something fails between two of our steps, another thread, an interrupt."""

import contextlib
import threading
from typing import Any

import backpack as backpack_package
import pytest
import torch
import torch._dynamo.eval_frame as compiler
from backpack import backpack
from backpack.context import CTX
from cases import Net, float64
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode
from torch.utils.checkpoint import checkpoint

from bncurv import ComponentGrad, DiagGGNExact, context, curvature, extend
from bncurv.record import Recorder
from bncurv.undo import Undo

with float64(0):
    X, y = torch.randn(6, 4), torch.randint(3, (6,))
CE = nn.CrossEntropyLoss()


class Boom(Exception):
    """Raised in the middle of things."""


class Fails(ComponentGrad):
    """Fails in one of its steps."""

    field = "fails"

    def __init__(self, step: str) -> None:
        super().__init__()
        self.step = step

    def start(self, batch: Any) -> Any:
        for site in batch.trace.sites if self.step == "closed" else ():
            if site.mark.coupling:
                site.coupling.gates.closed = True  # as an interrupt in `closed_gates` could leave it
        if self.step in ("start", "closed"):
            raise Boom
        return super().start(batch)

    def deliver(self, *args: Any) -> None:
        if self.step == "deliver":
            raise Boom
        super().deliver(*args)


def net(part: Any = None) -> nn.Module:
    with float64(0):
        parts = {"a": nn.Linear(4, 5), "b": nn.BatchNorm1d(5), "o": nn.Linear(5, 3)}
        return Net(part or (lambda net, x: net.o(torch.tanh(net.b(net.a(x))))), **parts)


def test_gradient_mode_that_a_loader_leaves() -> None:
    def loader() -> Any:
        yield X, y
        torch.set_grad_enabled(False)

    curvature(net(), CE, loader(), ComponentGrad())
    assert torch.is_grad_enabled()


def test_all_fields_or_none() -> None:
    model, loss_fn = extend(net()), extend(nn.CrossEntropyLoss())
    model.o.weight.diag_ggn_exact = "an older one"
    with pytest.raises(Boom), backpack(DiagGGNExact(), Fails("deliver")):
        loss_fn(model(X), y).backward()
    assert [vars(p) for p in model.parameters()] == [{}] * 4 + [{"diag_ggn_exact": "an older one"}, {}]


def test_gates_are_open_for_the_user() -> None:
    model, loss_fn = extend(net()), extend(nn.CrossEntropyLoss())
    x = X.clone().requires_grad_()
    (expected,) = torch.autograd.grad(CE(net()(x), y), x)
    loss = loss_fn(model(x), y)
    with pytest.raises(Boom), backpack(Fails("closed")):
        loss.backward(retain_graph=True)
    assert torch.allclose(torch.autograd.grad(loss, x)[0], expected)


@pytest.mark.filterwarnings("ignore")
def test_what_backpack_has_stored_stays() -> None:
    """Our passes run a checkpointed part again."""
    model = extend(net(lambda net, x: net.o(checkpoint(lambda x: net.b(net.a(x)), x, use_reentrant=False))))
    loss_fn = extend(nn.CrossEntropyLoss())
    for part in (model.a, model.b, model.o):
        backpack_package.extend(part)
    with pytest.raises(Boom), backpack(DiagGGNExact(), Fails("deliver")):
        loss = loss_fn(model(X), y)
        stored = [part.output for part in (model.a, model.b, model.o)]
        loss.backward()
    assert all(part.output is t for part, t in zip((model.a, model.b, model.o), stored, strict=True))


def test_modules_that_another_thread_runs() -> None:
    """The recorder does not take them for its own thread's."""
    inside, done = threading.Event(), threading.Event()

    def waits(module: nn.Module, args: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            inside.set(), done.wait(10)

    def forward(net: Any, x: Tensor) -> Tensor:
        beside = threading.Thread(target=net.o, args=(torch.ones(1, 5, dtype=x.dtype),))
        beside.start(), inside.wait(10)
        try:
            return nn.functional.batch_norm(net.a(x[:1]), None, None, training=True)
        finally:
            done.set(), beside.join()

    model = net(forward)
    model.o.register_forward_pre_hook(waits)
    with pytest.raises(ValueError, match="BatchNorm 'Net' is in training mode"):
        curvature(model, CE, (X, y), ComponentGrad())


def test_function_modes_act_again() -> None:
    """An interrupt may come where the recorder reads on its own."""

    def forward(net: Any, x: Tensor) -> Tensor:
        torch._C.DisableTorchFunction().__enter__()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        curvature(net(forward), CE, (X, y), ComponentGrad())
    assert not torch._C._is_torch_function_all_disabled()


def test_recorder_that_pytorch_holds_apart() -> None:
    """An interrupt may come while its function mode is off the stack."""
    recorder = Recorder(net())
    with TorchFunctionMode() as other:
        recorder.__enter__()
        _pop_mode()
        recorder.__exit__(None, None, None)
        assert _get_current_function_mode_stack() == [other]


def test_compilers_stance() -> None:
    seen = []
    model = net(lambda net, x: (seen.append(compiler._stance.stance), net.o(net.b(net.a(x))))[1])
    curvature(model, CE, (X, y), ComponentGrad())
    assert (seen, compiler._stance.stance) == (["force_eager"], "default")


def test_block_that_fails_at_its_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(exts: Any) -> None:
        raise Boom

    monkeypatch.setattr(CTX, "set_active_exts", fails)
    with pytest.raises(Boom), contextlib.ExitStack() as stack:
        stack.enter_context(backpack(DiagGGNExact()))
    assert not context._BLOCKS


def test_interrupt_as_a_block_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(Undo):
        """At the first line of its first run."""

        runs = 0

        def run(self) -> None:
            self.runs += 1
            if self.runs == 1:
                raise KeyboardInterrupt
            super().run()

    monkeypatch.setattr(context, "Undo", Interrupted)
    with pytest.raises(KeyboardInterrupt), contextlib.ExitStack() as stack:
        stack.enter_context(backpack(DiagGGNExact()))
    assert not context._BLOCKS
