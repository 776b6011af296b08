"""``memory=``: parsed, kept by the count of PyTorch's own allocator, refused with the smallest that does."""

import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import memory as experiment
import pytest
import torch
from cases import Net, float64
from test_exact import assert_close
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, TensorDataset

import bncurv
from bncurv import ComponentGrad, DiagGGNExact, LowRankGGN, curvature
from bncurv.budget import Budget, Sizes, bytes_of
from bncurv.frontier import pass_bytes
from bncurv.layers.convolution import Conv

MiB = 2**20
QUANTITIES = {
    "diagonal": DiagGGNExact,
    "components": ComponentGrad,
    "component diagonals": bncurv.ComponentDiagGGNExact,
    "variance": bncurv.ComponentVariance,
    "V": bncurv.SqrtGGNExact,
    "spectrum": LowRankGGN,
    "report": bncurv.CouplingReport,
    "influence": bncurv.InfluenceGrad,
    "draws": lambda: bncurv.DiagGGNMC(20, generator=torch.Generator().manual_seed(0)),
}


USUAL = "diagonal", "spectrum", "report", "draws"  # the others with the slow tests


def peak(call: Callable[[], Any]) -> tuple[Any, int, int]:
    """The result, and bytes that PyTorch's allocator held at the peak and at the end above those of before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        result = call()
    events = [(e.start_ns(), i, e.nbytes()) for i, e in enumerate(prof.profiler.kineto_results.events())
              if e.name() == "[memory]"]  # fmt: skip
    held = most = 0
    for *_, size in sorted(events):
        held += size
        most = max(most, held)
    return result, most, held


def network() -> nn.Module:
    """Two convolutions and a linear layer, each with a BatchNorm behind; unfolded inputs larger than activations."""
    torch.manual_seed(0)
    convolutions = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
    head = nn.ReLU(), nn.Flatten(), nn.Linear(288, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 5)
    return nn.Sequential(*convolutions, *head)


def samples(count: int = 16) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(count, 1, 8, 8), torch.randint(5, (count,))


@pytest.fixture(scope="module", autouse=True)
def made() -> None:
    """Before anything is measured."""
    with float64(0):
        KEPT["model"], KEPT["data"] = network(), samples()


KEPT: dict[str, Any] = {}


def compute(*quantities: Any, data: Any = None, **options: Any) -> Any:
    data = KEPT["data"] if data is None else data
    return curvature(KEPT["model"], nn.CrossEntropyLoss(), data, *quantities, **options)


def smallest(*quantities: Any, **options: Any) -> int:
    """The budget that the error names."""
    with pytest.raises(ValueError, match="is not enough.* The smallest budget that would do is memory=") as caught:
        compute(*quantities, memory=1, **options)
    return int(re.findall(r"memory=(\d+)", str(caught.value))[1])


def graph() -> int:
    """Bytes of the model's own graph."""
    return peak(lambda: KEPT["model"](KEPT["data"][0]))[2]


# ---------------------------------------------------------------------------- what may be given
@pytest.mark.parametrize(
    "memory,size",
    [("2GB", 2 * 10**9), ("1.5 KiB", 1536), ("512MiB", 2**29), ("1TB", 10**12), (17, 17), (None, None)],
)
def test_bytes_of_a_string(memory, size):
    assert bytes_of(memory) == size


@pytest.mark.parametrize("memory", ["2 gigabytes", "2", "GB", "-1GB", "2gb", 0, -5, 1.5, True, "0.1"])
def test_what_is_no_memory_is_told(memory):
    with pytest.raises(ValueError, match=r"memory=.*; expected a positive number of bytes, or a string such as '2GB'"):
        compute(DiagGGNExact(), memory=memory)


# ---------------------------------------------------------------------------- how it is divided
def test_sizes_shrink_with_the_room_and_add_up_to_it():
    least, useful = Sizes(1000, 0, 500, 10, 20), Sizes(MiB, MiB, 100 * MiB, MiB, MiB)
    rooms = 0, 4096, MiB, 16 * MiB, 1024 * MiB
    budgets = [Budget.within(room, least, useful) for room in rooms]
    sizes = [Sizes(*(getattr(some, key) for key in Sizes._fields)) for some in budgets]
    assert sizes[0] == least and all(b > a for few, many in pairwise(sizes[:3]) for a, b in zip(few, many, strict=True))
    assert all(some.total <= least.total + room for some, room in zip(sizes, rooms, strict=True))
    assert sizes[3].total > least.total + 0.99 * rooms[3]  # nothing is left over
    assert sizes[4][:3] == (MiB + 1000, MiB, 100 * MiB + 500)  # no more than is useful


def test_rehearsed_pass_is_the_real_one():
    """What the engine holds for one cotangent is known without a pass."""
    model, (X, _) = network(), samples()
    output, u = model(X), torch.randn(16, 5)
    ends = list(model.parameters())
    pull = lambda: torch.autograd.grad(output, ends, u, retain_graph=True)  # noqa: E731
    pull()
    assert 0.5 * pass_bytes(output, ends) < peak(pull)[1] <= pass_bytes(output, ends)


# ---------------------------------------------------------------------------- that it is kept
def plain(results: Any) -> dict[str, Tensor]:
    """All numbers of results by a name."""
    found = {}
    for field, value in results.fields.items():
        if isinstance(value, dict):
            for name, t in value.items():
                numbers = t if isinstance(t, Tensor) else torch.tensor([t.own_trace, t.full_trace])
                found[f"{field} {name}"] = numbers
        else:
            found[field] = value.eigenvalues
    return found


CASES = [
    *(pytest.param(name, "coupled", marks=[] if name in USUAL else pytest.mark.slow) for name in QUANTITIES),
    ("components", "dense"),
]


@pytest.mark.parametrize("name,method", CASES)
def test_smallest_budget_does(name, method):
    """The same numbers, within the bytes that the error names."""
    quantity, options = QUANTITIES[name], {"method": method}
    budget, own = smallest(quantity(), **options), graph()
    found, most, _ = peak(lambda: compute(quantity(), memory=budget, **options))
    assert most - own <= budget / 2  # the other half is for holes
    assert_close(plain(found), plain(compute(quantity(), **options)), tolerance=1e-12)


def test_larger_budgets_take_fewer_passes():
    """P of all parameters at once, or of a few at a time: the passes are taken once more for each group."""
    smallest_one, own, passes = smallest(DiagGGNExact(), method="coupled"), graph(), []
    for tenths in (10, 13, 40):
        budget = smallest_one * tenths // 10
        found, most, _ = peak(lambda budget=budget: compute(DiagGGNExact(), memory=budget, method="coupled"))
        assert most - own <= budget / 2
        passes.append(found.passes)
    assert passes[0] > passes[1] >= passes[2] == compute(DiagGGNExact(), method="coupled").passes


def test_way_that_fits_is_taken():
    """The dense way needs less; where it is demanded, or where both fit, it is as without a limit."""
    dense, coupled = (smallest(DiagGGNExact(), method=method) for method in ("dense", "coupled"))
    assert smallest(DiagGGNExact()) == dense < coupled
    assert compute(DiagGGNExact(), memory=coupled - 1).method == "dense"
    for data, way in ((samples(12), "dense"), (samples(40), "coupled")):
        data = data[0].double(), data[1]
        found = [compute(DiagGGNExact(), data=data, memory=memory).method for memory in (None, 4 * coupled)]
        assert found == [way, way]
    with pytest.raises(ValueError, match="by the coupled way: results"):
        compute(DiagGGNExact(), memory=coupled - 1, method="coupled")


def test_why_the_dense_way_must_do():
    """Samples that meet outside of the known layers are noticed when the coupled way has begun to fit."""
    torch.manual_seed(0)
    parts = {"a": nn.Linear(4, 40), "b": nn.BatchNorm1d(40), "o": nn.Linear(40, 3)}
    model = Net(lambda net, x: net.o(torch.tanh(net.b(net.a(x)) - 0.1 * net.a(x).mean(0))), **parts)
    data = torch.randn(200, 4), torch.randint(3, (200,))
    ask = lambda memory: curvature(model, nn.CrossEntropyLoss(), data, DiagGGNExact(), memory=memory)  # noqa: E731
    with pytest.raises(ValueError, match="is not enough") as caught:
        ask(1)
    with pytest.warns(bncurv.SlowPathWarning, match="Taking the dense way"):
        assert ask(40 * MiB).method == "dense"
    assert "by the dense way" in str(caught.value)


def test_stored_rows_or_the_graph():
    """V where it is small beside the budget, the graph where only that fits."""
    X, y = samples(32)
    options = {"data": (X.double(), y), "method": "dense"}
    rows, free = (smallest(LowRankGGN(top=2, matrix_free=choice), **options) for choice in (False, None))
    assert free < rows
    few, many = (compute(LowRankGGN(top=2), memory=memory, **options).ggn for memory in (free, 8 * rows))
    assert isinstance(few, bncurv.MatrixFreeGGN) and isinstance(many, bncurv.LowRank)
    assert torch.allclose(few.eigenvalues, many.eigenvalues, rtol=1e-8)


def test_chunk_size_beside_it():
    """Neither of the two is exceeded."""
    budget = smallest(DiagGGNExact(), method="dense")
    one, most, _ = peak(lambda: compute(DiagGGNExact(), memory=budget, chunk_size=64, method="dense"))
    assert most - graph() <= budget / 2
    few = compute(DiagGGNExact(), memory="1GB", chunk_size=2, method="dense")
    assert_close(few.diag_ggn_exact, one.diag_ggn_exact, tolerance=1e-12)


def test_inputs_are_unfolded_in_pieces(monkeypatch):
    """Where there is a limit, never of more rows than fit."""
    expected, unfolded, own = compute(DiagGGNExact(), method="coupled"), [], Conv.right
    monkeypatch.setattr("bncurv.engine.USUAL", Budget(right=0, row=1, bounded=True))

    def right(self: Conv, role: str, arguments: dict[str, Any], x: Tensor) -> Tensor | None:
        unfolded.append(len(x) if role == "weight" else 1)
        return own(self, role, arguments, x)

    monkeypatch.setattr(Conv, "right", right)
    found = compute(DiagGGNExact(), method="coupled", chunk_size=2)
    assert max(unfolded) == 1
    assert_close(found.diag_ggn_exact, expected.diag_ggn_exact, tolerance=1e-12)


def test_experiment_measures_a_row():
    row = experiment.measure("mlp", 64, "coupled", 2, torch.device("cpu"))
    assert row["way"] == "coupled" and row["apart"] < 1e-5 and row["passes"] >= 209
    assert experiment.line("mlp", 64, row)[:3] == ["mlp", "64", "coupled"]


# ---------------------------------------------------------------------------- over a loader
@pytest.mark.parametrize("name,known", [("diagonal", True), ("components", True), ("components", False)])
def test_over_a_loader(name, known):
    """What has been computed already counts; how much comes is known of a loader, and seen of an iterator."""
    X, y = samples(24)
    loader = DataLoader(TensorDataset(X.double(), y), batch_size=8)
    data = (lambda: loader) if known else (lambda: (pair for pair in loader))
    budget, quantity = smallest(QUANTITIES[name](), data=data()), QUANTITIES[name]
    if not known:
        with pytest.raises(ValueError, match="The smallest budget that would do is memory=") as caught:
            compute(quantity(), data=data(), memory=budget)
        assert int(re.findall(r"memory=(\d+)", str(caught.value))[1]) > budget
        budget *= 8
    found, most, _ = peak(lambda: compute(quantity(), data=data(), memory=budget))
    one = peak(lambda: KEPT["model"](X[:8].double()))[2]
    assert most - one <= budget
    assert_close(plain(found), plain(compute(quantity(), data=data())), tolerance=1e-12)
