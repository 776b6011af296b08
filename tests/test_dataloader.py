"""Several mini-batches: averages, concatenation, progress, and how the data is walked through."""

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import cross_entropy, float64, labelled, mlp, seeded
from state import unchanged
from test_exact import assert_close
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bncurv import ComponentGrad, DiagGGNExact, curvature, reference

Batch = tuple[Tensor, Tensor]
METHODS = pytest.mark.parametrize("method", ["coupled", "dense", "auto"])
REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "sum"])


def net() -> nn.Module:
    return seeded(lambda: mlp(4, 6, 5, 3), 0)()


def samples(count: int = 20) -> Batch:
    return seeded(labelled(count, 4), 1)()


def split(*sizes: int) -> list[Batch]:
    """Consecutive mini-batches of the given sizes."""
    X, y = samples(sum(sizes))
    return list(zip(X.split(sizes), y.split(sizes), strict=True))


def compute(data: Any, loss_fn: nn.Module | None = None, **options: Any) -> Any:
    loss_fn = loss_fn or nn.CrossEntropyLoss()
    return curvature(net(), loss_fn, data, DiagGGNExact(), ComponentGrad(), **options)


def shares(reduction: str, sizes: tuple[int, ...]) -> list[float]:
    """What each mini-batch counts: a mean by its samples, a sum in full."""
    return [1.0 if reduction == "sum" else size / sum(sizes) for size in sizes]


def weighted(results: list[dict[str, Tensor]], by: list[float]) -> dict[str, Tensor]:
    return {name: sum(w * r[name] for w, r in zip(by, results, strict=True)) for name in results[0]}


def assert_equal(got: Any, want: Any) -> None:
    """Bit for bit."""
    for field in ("diag_ggn_exact", "grad_component"):
        results, expected = getattr(got, field), getattr(want, field)
        assert results.keys() == expected.keys()
        assert all(torch.equal(results[name], t) for name, t in expected.items())


@METHODS
@REDUCTIONS
@pytest.mark.parametrize("sizes", [(8,), (6, 6, 6), (8, 8, 4), (7, 2)], ids=str)
def test_average(sizes: tuple[int, ...], reduction: str, method: str) -> None:
    """The weighted mean, or sum, of the mini-batch quantities; every batch with its own statistics."""
    batches, loss_fn = split(*sizes), cross_entropy(reduction=reduction)()
    res = compute(batches, loss_fn, method=method)
    diagonals = [reference.ggn_diagonal(net(), loss_fn, X, y) for X, y in batches]
    by = shares(reduction, sizes)
    assert_close(res.diag_ggn_exact, weighted(diagonals, by))
    gradients = [reference.gradient(net(), loss_fn, X, y) for X, y in batches]
    summed = {name: g.sum(0) for name, g in res.grad_component.items()}
    assert_close(summed, weighted(gradients, by))
    assert res.batches == len(sizes)


@METHODS
@REDUCTIONS
def test_concatenation(reduction: str, method: str) -> None:
    """Components in the order of the samples, each at its batch's weight."""
    batches, loss_fn = split(8, 8, 4), cross_entropy(reduction=reduction)()
    got = compute(batches, loss_fn, method=method).grad_component
    parts = [reference.component_gradients(net(), loss_fn, X, y) for X, y in batches]
    by = shares(reduction, (8, 8, 4))
    assert_close(got, {n: torch.cat([w * p[n] for w, p in zip(by, parts, strict=True)]) for n in parts[0]})
    assert all(len(g) == 20 for g in got.values())


def test_union_is_another_matrix() -> None:
    """Train-mode BN makes the batch part of the definition."""
    halves, whole = compute(split(10, 10)), compute(samples())
    assert halves.batches == 2 and whole.batches == 1
    name = "0.weight"
    assert not torch.allclose(halves.diag_ggn_exact[name], whole.diag_ggn_exact[name], rtol=0.01)


def test_eval_mode_union_is_the_same() -> None:
    """Without coupling the weighted average is the whole batch's diagonal (`test_shares.py` has all quantities)."""
    model, loss_fn = net().eval(), nn.CrossEntropyLoss()
    whole = curvature(model, loss_fn, samples(), DiagGGNExact()).diag_ggn_exact
    pieces = curvature(model, loss_fn, split(10, 7, 3), DiagGGNExact()).diag_ggn_exact
    assert_close(pieces, whole)


def test_one_batch_in_every_form() -> None:
    X, y = samples()
    want = compute((X, y))
    for data in ([X, y], [(X, y)], ((X, y),), iter([(X, y)]), [[X, y]], _loader(20)):
        assert_equal(compute(data), want)


def _loader(batch_size: int, **options: Any) -> DataLoader:
    return DataLoader(TensorDataset(*samples()), batch_size=batch_size, **options)


def test_two_batches_are_not_taken_for_one() -> None:
    """A list or tuple of exactly two pairs."""
    two = split(10, 10)
    want = compute(iter(two))
    assert want.batches == 2
    for data in (two, tuple(two), [list(pair) for pair in two]):
        assert_equal(compute(data), want)


def test_loader() -> None:
    res = compute(_loader(8))
    assert res.batches == 3
    assert_equal(res, compute(split(8, 8, 4)))
    assert compute(_loader(8, drop_last=True)).batches == 2


def test_passes_add_up() -> None:
    """`passes` counts all mini-batches."""
    batches = split(8, 8, 4)
    alone = [compute(batch).passes for batch in batches]
    assert compute(batches).passes == sum(alone)


def test_quantities_can_be_used_again() -> None:
    """A quantity is a specification: it keeps nothing from call to call."""
    quantities = DiagGGNExact(), ComponentGrad()
    first, second = split(8, 4)
    for data in (first, second, [first, second], first):
        got = curvature(net(), nn.CrossEntropyLoss(), data, *quantities)
        assert_equal(got, compute(data))


def test_shuffled_loader() -> None:
    """The caller's random state decides the order, and is left as it was."""
    state = torch.get_rng_state()
    first = compute(_loader(8, shuffle=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert_equal(compute(_loader(8, shuffle=True)), first)
    torch.manual_seed(7)
    other = compute(_loader(8, shuffle=True))
    assert not torch.equal(first.grad_component["0.weight"], other.grad_component["0.weight"])


def test_loader_with_workers() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about fork and threads
        assert_equal(compute(_loader(8, num_workers=1)), compute(_loader(8)))


# ----------------------------------------------------------------------------- walking through


class Counted:
    """An iterable that notes what is asked of it."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches, self.log = batches, []

    def __iter__(self) -> Iterator[Batch]:
        self.log.append("start")
        for i, batch in enumerate(self.batches):
            self.log.append(i)
            yield batch
        self.log.append("end")


@pytest.mark.parametrize("progress", [False, True])
def test_walked_through_once(progress: bool) -> None:
    data = Counted(split(8, 8, 4))
    compute(data, progress=progress)
    assert data.log == ["start", 0, 1, 2, "end"]


def test_generator_is_consumed_once_and_lazily() -> None:
    """The next batch is asked for when the last one is done."""
    log: list[str] = []
    model, loss_fn = net(), nn.CrossEntropyLoss()
    model.register_forward_hook(lambda *args: log.append("forward"))

    def batches() -> Iterator[Batch]:
        for batch in split(8, 8, 4):
            log.append("asked")
            yield batch

    generator = batches()
    assert curvature(model, loss_fn, generator, DiagGGNExact()).batches == 3
    assert log == 3 * ["asked", "forward"]
    with pytest.raises(ValueError, match="data is empty"):
        curvature(model, loss_fn, generator, DiagGGNExact())


def test_endless_data_may_be_cut() -> None:
    """An error of the caller's own iterator gets through."""

    def endless() -> Iterator[Batch]:
        yield samples()
        raise StopAsyncIteration("enough")

    model = net()
    with unchanged(model), pytest.raises(StopAsyncIteration, match="enough"):
        curvature(model, nn.CrossEntropyLoss(), endless(), DiagGGNExact())


def test_running_statistics_after_many_batches() -> None:
    model = net()
    with unchanged(model):
        curvature(model, nn.CrossEntropyLoss(), split(8, 8, 4), DiagGGNExact(), progress=True)


def test_every_batch_sees_the_same_buffers() -> None:
    """In eval mode nothing carries over from batch to batch, in train mode it does not matter."""
    model, loss_fn = net(), nn.CrossEntropyLoss()
    model[1].eval()
    batches = split(8, 8)
    got = curvature(model, loss_fn, batches, DiagGGNExact()).diag_ggn_exact
    alone = [curvature(model, loss_fn, b, DiagGGNExact()).diag_ggn_exact for b in batches]
    assert_close(got, weighted(alone, [0.5, 0.5]))


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_bad_batch_is_an_error_wherever_it_is(bad: int) -> None:
    batches = split(8, 8, 4)
    batches[bad] = batches[bad][0], batches[bad][1][:-1]
    model = net()
    with unchanged(model), pytest.raises(ValueError, match="X has shape.*y has shape"):
        curvature(model, nn.CrossEntropyLoss(), batches, DiagGGNExact())


def test_last_batch_of_one_sample() -> None:
    """What every PyTorch user meets with drop_last=False."""
    with pytest.raises(ValueError, match=r"at least 2 samples.*1 sample\(s\) after one of 8.*drop_last=True"):
        compute(split(8, 1))


def test_an_error_of_the_model_is_left_alone_where_the_batch_is_not_short() -> None:
    model = net()
    model.register_forward_pre_hook(lambda module, args: int("eight"))
    with pytest.raises(ValueError, match="^invalid literal for int.*'eight'$"):
        curvature(model, nn.CrossEntropyLoss(), split(8, 8), DiagGGNExact())



# ------------------------------------------------------------------------------------ progress


def test_no_bar_by_default(capfd: pytest.CaptureFixture[str]) -> None:
    compute(split(8, 8))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("method", ["coupled", "dense"])
@pytest.mark.parametrize("sizes", [(8,), (8, 8, 4)], ids=str)
def test_bar(sizes: tuple[int, ...], method: str, capfd: pytest.CaptureFixture[str]) -> None:
    """On stderr, and without any effect on the result."""
    data = split(*sizes)
    quiet = compute(data, method=method)
    capfd.readouterr()
    loud = compute(data, method=method, progress=True)
    out, err = capfd.readouterr()
    assert out == "" and "backward passes" in err
    assert_equal(loud, quiet)
    assert loud.passes == quiet.passes


class Bar:
    """Stands in for tqdm: keeps the totals."""

    made: list["Bar"] = []

    def __init__(self, *args: Any, disable: bool = False, **kwargs: Any) -> None:
        self.total, self.n, self.disable = kwargs.get("total"), 0, disable
        Bar.made.append(self)

    def update(self, n: int = 1) -> None:
        self.n += n

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *exc: object) -> None:
        self.closed = True

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


@pytest.mark.parametrize("method", ["coupled", "dense"])
def test_bar_is_full_at_the_end(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was announced is what was done."""
    monkeypatch.setattr("bncurv.call.tqdm", Bar)
    Bar.made.clear()
    res = compute(split(8, 8, 4), method=method, progress=True)
    (bar,) = Bar.made
    assert bar.n == bar.total == res.passes and bar.closed


def test_the_bar_knows_how_many_mini_batches_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """One total over the loader from the first one on; an iterator does not say how many."""

    class Told(Bar):
        totals: list[int] = []

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)
            if name == "total" and value:
                self.totals.append(value)

    monkeypatch.setattr("bncurv.call.tqdm", Told)
    one = compute(split(8), method="dense").passes
    Told.totals.clear()
    compute(split(8, 8, 4), method="dense", progress=True)
    assert Told.totals == [3 * one, 3 * one, 2.5 * one]
    Told.totals.clear()
    compute(iter(split(8, 8, 4)), method="dense", progress=True)
    assert Told.totals == [one, 2 * one, 2.5 * one]


def test_bar_is_closed_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bncurv.call.tqdm", Bar)
    Bar.made.clear()
    with pytest.raises(ValueError):
        compute(split(8, 1), progress=True)
    assert Bar.made[0].closed


# -------------------------------------------------------------------------------- other inputs


def two_inputs() -> tuple[nn.Module, Any, Tensor]:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
            return self.net(pair[0] + pair[1])

    with float64(2):
        return Two(), (torch.randn(8, 4), torch.randn(8, 4)), torch.randint(3, (8,))


def test_structured_input() -> None:
    """X may be whatever the model takes."""
    model, X, y = two_inputs()
    got = curvature(model, nn.CrossEntropyLoss(), (X, y), DiagGGNExact()).diag_ggn_exact
    want = curvature(net(), nn.CrossEntropyLoss(), (X[0] + X[1], y), DiagGGNExact()).diag_ggn_exact
    assert_close(got, {f"net.{name}": t for name, t in want.items()})


def test_non_contiguous_inputs() -> None:
    X, y = samples()
    want = compute((X, y))
    strided = torch.stack([X, X], -1)[..., 0], torch.stack([y, y], -1)[..., 0]
    assert not strided[0].is_contiguous()
    assert_equal(compute(strided), want)
