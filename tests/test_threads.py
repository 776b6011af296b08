"""Two threads at once: right numbers, nothing left behind, and who only trains beside is not watched."""

import copy
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import backpack as backpack_package
import pytest
import torch
import torch._dynamo  # importing it changes the snapshot
from backpack import backpack
from backpack.extensions import BatchGrad
from cases import float64, perturb
from state import unchanged
from torch import Tensor, nn

from bncurv import ComponentGrad, DiagGGNExact, curvature, extend, reference, turns
from bncurv.quantities import Quantity

TIMES = 6
loss = nn.CrossEntropyLoss()


def build(seed: int) -> tuple[nn.Module, Tensor, Tensor, dict[str, Tensor]]:
    """A net with dropout behind its statistics, a batch, the diagonal without dropout."""
    with float64(seed):
        model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
        perturb(model)
        X, y = torch.randn(8, 4), torch.randint(3, (8,))
    return model, X, y, reference.ggn_diagonal(model, loss, X, y)


BUILT = [build(seed) for seed in range(4)]


def of(i: int) -> tuple[nn.Module, Tensor, Tensor, dict[str, Tensor]]:
    model, *rest = BUILT[i]
    return (copy.deepcopy(model), *rest)


@pytest.fixture(autouse=True)
def switch_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def together(*jobs: Callable[[], Any]) -> None:
    """Run in threads at once; raise what one of them raised."""
    errors: list[BaseException] = []

    def run(job: Callable[[], Any]) -> None:
        try:
            job()
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert not any(t.is_alive() for t in threads)
    if errors:
        raise errors[0]


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    for name, t in want.items():
        torch.testing.assert_close(got[name], t, rtol=1e-10, atol=1e-14)


def calls(i: int, model: nn.Module | None = None) -> Callable[[], None]:
    own, X, y, want = of(i)

    def job() -> None:
        for _ in range(TIMES):
            assert_same(curvature(model or own, loss, (X, y), DiagGGNExact()).diag_ggn_exact, want)

    return job


def gestures(i: int, *others: Any, model: nn.Module | None = None, loss_fn: nn.Module | None = None) -> Callable:
    own, X, y, want = of(i)
    used, loss_fn = extend(model or own), loss_fn or extend(nn.CrossEntropyLoss())

    def job() -> None:
        for _ in range(TIMES):
            with backpack(DiagGGNExact(), *others):
                loss_fn(used(X), y).backward()
                assert_same({n: p.diag_ggn_exact for n, p in used.named_parameters()}, want)

    return job


def trains(i: int, extended: bool = False) -> Callable[[], None]:
    model, X, y, _ = of(i)
    plain, own_loss = copy.deepcopy(model), nn.CrossEntropyLoss()
    loss(plain(X), y).backward()
    if extended:
        extend(model), extend(own_loss)

    def job() -> None:
        for _ in range(5 * TIMES):
            model.zero_grad()
            output = model(X)
            own_loss(output, y).backward()
            assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), plain.parameters(), strict=True))
            assert not any(vars(p) for p in model.parameters())
            assert extended or not any("bncurv" in note for note in output.grad_fn.metadata)

    return job


def fails(i: int) -> Callable[[], None]:
    model, X, _, _ = of(i)
    model.append(nn.Linear(7, 7).double())

    def job() -> None:
        for _ in range(20 * TIMES):
            with pytest.raises(RuntimeError, match="mat1 and mat2"):
                model(X)

    return job


def backpack_alone(i: int) -> Callable[[], None]:
    model, X, y, _ = of(i)
    model, loss_fn = backpack_package.extend(model[2:]), backpack_package.extend(nn.CrossEntropyLoss())

    def job() -> None:
        for _ in range(TIMES):
            model.zero_grad()
            with backpack(BatchGrad()):
                loss_fn(model(torch.cat([X, X[:, :1]], 1)), y).backward()
            torch.testing.assert_close(model[1].weight.grad_batch.sum(0), model[1].weight.grad)

    return job


JOBS: dict[str, Callable[[int], Callable[[], None]]] = {
    "calls": calls,
    "gestures": gestures,
    "trains": trains,
    "trains extended": lambda i: trains(i, True),
    "fails": fails,
    "BackPACK": backpack_alone,
}
PAIRS = [(a, b) for a in ("calls", "gestures") for b in JOBS]


@pytest.mark.filterwarnings("ignore:Full backward hook")
@pytest.mark.parametrize("pair", PAIRS, ids=" and ".join)
def test_two_models(pair: tuple[str, str]) -> None:
    jobs = [JOBS[name](i) for i, name in enumerate(pair)]
    with unchanged():
        together(*jobs)


@pytest.mark.filterwarnings("ignore:Full backward hook")
def test_all_at_once() -> None:
    jobs = [make(i % 4) for i, make in enumerate(JOBS.values())]
    with unchanged():
        together(*jobs)


def test_one_model() -> None:
    """In three threads: each waits for its turn."""
    model = of(0)[0]
    with unchanged(model):
        together(*(calls(0, model) for _ in range(3)))
    extend(model), extend(loss_fn := nn.CrossEntropyLoss())
    together(calls(0, model), *(gestures(0, model=model, loss_fn=loss_fn) for _ in range(2)))


class Nested(Quantity):
    """Calls both gestures while the outer call runs."""

    field = "nested"

    def __init__(self, inner: Callable[[], Any]) -> None:
        super().__init__()
        self.inner = inner

    def add(self, *args: Any) -> None:
        inner, self.inner = self.inner, lambda: None
        inner()


@pytest.mark.parametrize("inner", [calls, gestures])
def test_nested_calls(inner: Callable[[int], Callable[[], None]]) -> None:
    """From inside a quantity, of another model, and of a model that the outer call uses."""
    model, X, y, want = of(0)
    job = inner(1)
    with unchanged(model):
        got = curvature(model, loss, (X, y), DiagGGNExact(), Nested(job))
    assert_same(got.diag_ggn_exact, want)
    got = curvature(model, loss, (X, y), Nested(calls(0, model)), DiagGGNExact())
    assert_same(got.diag_ggn_exact, want)
    extend(model), extend(loss_fn := nn.CrossEntropyLoss())
    with backpack(Nested(inner(2)), DiagGGNExact(), ComponentGrad()):
        loss_fn(model(X), y).backward()
    assert_same({n: p.diag_ggn_exact for n, p in model.named_parameters()}, want)


def test_a_long_wait_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "PATIENCE", 0.0)
    model, X, y, _ = of(0)
    started, told = threading.Event(), threading.Event()

    def holds() -> None:
        with backpack(BatchGrad()):
            started.set()
            told.wait(30)

    def waits() -> None:
        started.wait(30)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UserWarning, match="curvature has been waiting .* for a block.*backpack.*take turns"):
                curvature(model, loss, (X, y), DiagGGNExact())
        told.set()

    with unchanged(model):
        together(holds, waits)
