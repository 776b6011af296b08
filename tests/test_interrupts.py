"""Ctrl-C at any moment leaves nothing behind: raised at every line of bncurv, and as real signals."""

import gc
import random
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
import torch
from backpack import backpack
from backpack.extensions import BatchGrad
from cases import float64, perturb
from state import differences, snapshot
from torch import nn

import bncurv
from bncurv import ComponentGrad, DiagGGNExact, curvature, extend
from bncurv.undo import Undo, without_trace

PACKAGE = str(Path(bncurv.__file__).parent)
with float64(1):
    X, y = torch.randn(6, 4), torch.randint(3, (6,))


@pytest.fixture(autouse=True)
def nothing_else_runs() -> Iterator[None]:
    """No warning and no collection of other garbage in the middle."""
    gc.disable()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    gc.enable()


def net() -> nn.Module:
    with float64(0):
        model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.2), nn.Linear(5, 3))
        perturb(model)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    model[3].register_full_backward_hook(lambda m, gi, go: None)
    model[3].weight.register_hook(lambda g: None)
    return model


def by_curvature(model: nn.Module, loss_fn: nn.Module) -> None:
    curvature(model, loss_fn, [(X, y), (X, y)], DiagGGNExact(), ComponentGrad())


def in_float32(model: nn.Module, loss_fn: nn.Module) -> None:
    curvature(model, loss_fn, (X, y), DiagGGNExact(), precision="float32")


def by_gesture(model: nn.Module, loss_fn: nn.Module) -> None:
    with backpack(DiagGGNExact(), ComponentGrad()):
        loss_fn(model(X), y).backward()


def beside_backpack(model: nn.Module, loss_fn: nn.Module) -> None:
    with backpack(DiagGGNExact(), BatchGrad()):
        loss_fn(model(X), y).backward()


PLAIN = [by_curvature, in_float32]
CALLS = [*PLAIN, by_gesture, beside_backpack]
# what the user's own forward and backward pass change, and the results
OWN = "buffer", "grad", "random state", "attributes"


class AtLine:
    """A trace function that raises KeyboardInterrupt at the n-th line of bncurv that runs."""

    def __init__(self, at: int) -> None:
        self.at, self.seen = at, list[tuple[CodeType, int]]()

    def __call__(self, frame: FrameType, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            self.seen.append((frame.f_code, frame.f_lineno))
            if len(self.seen) == self.at:
                raise KeyboardInterrupt
        return self

    @staticmethod
    def name(line: tuple[CodeType, int]) -> str:
        code, number = line
        return f"{Path(code.co_filename).name}:{code.co_name}:{number - code.co_firstlineno}"


def left_behind(call: Callable, interrupt: Callable[[Callable[[], None]], bool]) -> list[str]:
    """What is not as before after an interrupted call, and half a result."""
    model, loss_fn = net(), nn.CrossEntropyLoss()
    if call not in PLAIN:
        extend(model), extend(loss_fn)
    before = snapshot(model, loss_fn)
    if not interrupt(lambda: call(model, loss_fn)):
        return []
    left = differences(before, snapshot(model, loss_fn))
    if call not in PLAIN:
        left = [entry for entry in left if not any(own in entry for own in OWN)]
    fields = [sorted(field for field in vars(p) if field != "grad_batch") for p in model.parameters()]
    return left + ([] if all(f == fields[0] for f in fields) else ["half of the results"])


def traced(call: Callable, at: int) -> tuple[list[str], list[str]]:
    """What an interrupt at a line leaves, and the lines up to there."""
    lines = AtLine(at)

    def interrupt(run: Callable[[], None]) -> bool:
        sys.settrace(lines)
        try:
            run()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(None)
        return False

    return left_behind(call, interrupt), [lines.name(line) for line in (lines.seen if at == 0 else lines.seen[-1:])]


def first_runs(call: Callable) -> dict[str, int]:
    """When each line runs first."""
    traced(call, 0)
    return {line: at for at, line in reversed(list(enumerate(traced(call, 0)[1], 1)))}


GUARDS = (
    *("undo.py", "untouched.py", "turns.py", "eager.py", "context.py", "recording.py", "backward.py", "extension.py"),
    *("record.py:__enter__", "record.py:__exit__", "record.py:stop"),
)


@pytest.mark.parametrize("call", [by_curvature, beside_backpack])
def test_interrupt_at_the_lines_that_guard(call: Callable) -> None:
    """And at some of the others."""
    first = first_runs(call)
    chosen = [at for line, at in first.items() if line.startswith(GUARDS) or at % 29 == 0]
    assert len(chosen) > 100
    assert {line: left for line, at in first.items() if at in chosen and (left := traced(call, at)[0])} == {}


def test_interrupt_while_twins_are_put_in_place() -> None:
    first = first_runs(in_float32)
    chosen = [at for line, at in first.items() if line.startswith(("twins.py", "autocast.py"))]
    assert len(chosen) > 50
    call = in_float32
    assert {line: left for line, at in first.items() if at in chosen and (left := traced(call, at)[0])} == {}


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS)
def test_interrupt_at_every_line(call: Callable) -> None:
    count = len(traced(call, 0)[1])
    found = {}
    for at in range(1, count + 1):
        left, lines = traced(call, at)
        if left:
            found[lines[-1]] = left
        if at % 100 == 0:
            gc.collect()
    assert found == {}


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS)
def test_two_thousand_signals(call: Callable) -> None:
    """At random moments; what PyTorch, BackPACK and the standard library do in the meantime counts too."""
    rng, arrived, took = random.Random(0), [], list[float]()

    def timed(run: Callable[[], None]) -> bool:
        start = time.perf_counter()
        run()
        took.append(time.perf_counter() - start)
        return False

    for _ in range(5):
        left_behind(call, timed)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)

    def interrupt(run: Callable[[], None]) -> bool:
        try:
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, min(took)))
                run()
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            arrived.append(run)
            return True
        return False

    try:
        left = {i: left for i in range(4000) if len(arrived) < 2000 and (left := left_behind(call, interrupt))}
    finally:
        signal.signal(signal.SIGALRM, before)
    assert left == {} and len(arrived) > 1000


# -------------------------------------------------------------------------------------- undoing


def test_an_interrupted_undo_goes_on() -> None:
    """And the interrupt is raised when all is undone."""
    done, undo = list[str](), Undo()
    raising = iter([KeyboardInterrupt, KeyboardInterrupt, None])

    def interrupted() -> None:
        error = next(raising)
        if error:
            raise error
        done.append("second")

    undo.note(lambda: done.append("first"))
    undo.note(interrupted)
    undo.note(lambda: done.append("third"))
    with pytest.raises(KeyboardInterrupt):
        undo.run()
    assert done == ["third", "second", "first"]
    undo.run()
    assert done == ["third", "second", "first"]


def test_what_cannot_be_undone_does_not_stop_the_rest() -> None:
    done = []

    def body(undo: Undo) -> None:
        undo.note(lambda: done.append(1))
        undo.note(lambda: 1 / 0)

    with pytest.raises(ZeroDivisionError):
        without_trace(body)
    assert done == [1]
