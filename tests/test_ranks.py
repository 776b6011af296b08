"""Several processes, one batch: real processes on gloo against one process with the whole batch."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import growth
import pytest
import rank_jobs as jobs
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from bncurv import (
    ComponentGrad,
    CouplingReport,
    DiagGGNExact,
    DiagGGNMC,
    InfluenceGrad,
    InfluenceProjection,
    LowRankGGN,
    curvature,
)

UNEVEN, FOUR, MANY = (9, 3), (3, 5, 1, 6), (30, 20)
IMPORTED = ["rank_jobs", "torch._dynamo", "torch.distributed.fsdp", "einops._torch_specific"]  # once, for all processes
WAYS = ["coupled", "dense"]
SCRIPTS = Path(__file__).parent.parent / "experiments"
EXACT = {
    f"{net} {shards} {method} {options}": (jobs.exact, (net, shards, method), options)
    for net in jobs.NETS
    for shards in ((8, 8), UNEVEN)
    for method in WAYS
    for options in ({}, {"chunk_size": 1})
}
FAILURES = {
    "forward": "ValueError: a bad layer",
    "interrupt": "KeyboardInterrupt",
    "nan": r"ValueError: X has NaN or inf in sample(s) [0, 1, 2, 3, 4]; curvature is undefined there. Remove them.",
    "target": "Target",
    "none": "ValueError: no quantity asked for",
    "quantities": "different sizes",
    "loader": "rank(s) [1] have no mini-batch left while others have",
}
STATISTICS = "shared", "own", "same"
TWO: dict[str, tuple[Callable, tuple, dict]] = EXACT | {
    "loader": (jobs.loader, (UNEVEN,), {}),
    **{f"limited {method}": (jobs.limited, (UNEVEN, method), {}) for method in WAYS},
    "ghost coupled": (jobs.ghost, (UNEVEN, "coupled"), {}),
    "ghost dense": (jobs.ghost, (UNEVEN, "dense"), {}),
    "ghost of two minds": (jobs.of_two_minds, (UNEVEN,), {}),
    "mixed on one, shared": (jobs.mixed_on_one, (UNEVEN, True), {}),
    "mixed on one, own": (jobs.mixed_on_one, (UNEVEN, False), {}),
    "monte carlo": (jobs.monte_carlo, (UNEVEN, None), {}),
    **{f"deflated {kind}": (jobs.deflated, (UNEVEN, kind, {"passes": 2 + 3 + 60}), {}) for kind in STATISTICS},
    **{f"deflated {kind}, rtol": (jobs.deflated, (UNEVEN, kind, {"rtol": 0.5}), {}) for kind in STATISTICS},
    "monte carlo, generator": (jobs.monte_carlo, (UNEVEN, 5), {}),
    "truncated 0.3": (jobs.truncated, (UNEVEN, 0.3), {}),
    "messages": (jobs.messages, (UNEVEN,), {}),
    "report": (jobs.report, (UNEVEN,), {}),
    "gesture": (jobs.gesture, (UNEVEN, False), {}),
    "gesture, plain": (jobs.gesture, (UNEVEN, True), {}),
    "trained": (jobs.trained, (UNEVEN,), {}),
    "trace": (jobs.trace_left, (UNEVEN,), {}),
    "mixture": (jobs.mixture, (), {}),
    **{f"influence {shards}": (jobs.influence, (shards,), {}) for shards in (UNEVEN, MANY)},
    "matrix-free": (jobs.matrix_free, (UNEVEN, False), {}),
    "matrix-free, plain": (jobs.matrix_free, (UNEVEN, True), {}),
    **{f"failure {kind}": (jobs.failure, (kind,), {}) for kind in FAILURES},
    "same mlp 5 coupled": (jobs.same, ("mlp", 5, "coupled"), {}),
    "same mlp 5 dense": (jobs.same, ("mlp", 5, "dense"), {}),
    "same cnn 30 coupled": (jobs.same, ("cnn", 30, "coupled"), {}),
    "same, rest": (jobs.same_rest, (6,), {}),
    "not same": (jobs.not_same, (UNEVEN,), {}),
    **{f"same, failure {method}": (jobs.same_failure, (method,), {}) for method in WAYS},
    "same, early failure": (jobs.same_failure_early, (), {}),
    "heard once": (jobs.heard_once, (), {}),
    "point": (jobs.point, (5, False), {}),
    "point, spread": (jobs.point, (7, True), {}),
}
OF_FOUR: dict[str, tuple[Callable, tuple, dict]] = {
    "coupled": (jobs.exact, ("cnn", FOUR, "coupled"), {}),
    "dense": (jobs.exact, ("mlp", FOUR, "dense"), {}),
    **{f"pairs {method}": (jobs.pairs, (FOUR, method), {}) for method in (*WAYS, "auto")},
    "pairs deflated": (jobs.deflated, (FOUR, "pairs", {"passes": 2 + 3 + 60}), {}),
    "pairs truncated": (jobs.truncated, (FOUR, 0.3, True), {}),
    "same cnn 3 coupled": (jobs.same, ("cnn", 3, "coupled"), {"chunk_size": 1}),
    "same mlp 3 dense": (jobs.same, ("mlp", 3, "dense"), {}),
    "same, rest": (jobs.same_rest, (3,), {}),
}


def backends(size: int) -> list[Any]:
    """On CPUs; and on GPUs where there is one for each process."""
    few = torch.cuda.device_count() < size or not dist.is_nccl_available()
    return ["gloo", pytest.param("nccl", marks=pytest.mark.skipif(few, reason=f"NCCL needs {size} GPUs"))]


def together(size: int, work: dict, backend: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """The jobs' results by name, one for each rank."""
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:  # one process imports everything, for all that are started
        patch.syspath_prepend(here := str(Path(__file__).parent))
        patch.setenv("PYTHONPATH", os.pathsep.join([here, str(SCRIPTS.parent), os.environ.get("PYTHONPATH", "")]))
        mp.get_context("forkserver").set_forkserver_preload(IMPORTED)
        mp.start_processes(jobs.run, (size, work, str(folder), backend), size, start_method="forkserver")
    gpus = {f"cuda:{rank}": "cuda:0" for rank in range(size)}
    by_rank = [torch.load(folder / f"{rank}.pt", gpus, weights_only=False) for rank in range(size)]
    return {name: [found[name] for found in by_rank] for name in work}


@pytest.fixture(scope="module", params=backends(2))
def two(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return together(2, TWO, request.param, tmp_path_factory)


@pytest.fixture(scope="module", params=backends(4))
def four(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return together(4, OF_FOUR, request.param, tmp_path_factory)


@pytest.fixture(autouse=True)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process computes where they do: random numbers are others elsewhere."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if "nccl" in (parameters.get("two"), parameters.get("four")):
        monkeypatch.setattr(jobs, "DEVICE", torch.device("cuda", 0))


class Spread(nn.Module):
    """The mean of the ranks' mean losses, as DistributedDataParallel trains, in one process."""

    def __init__(self, shards: tuple[int, ...]) -> None:
        super().__init__()
        self.weights = torch.cat([torch.full((n,), 1 / (len(shards) * n), dtype=torch.float64) for n in shards])

    def forward(self, F: Tensor, y: Tensor) -> Tensor:
        return (self.weights.to(F) * nn.functional.cross_entropy(F, y, reduction="none")).sum()


class Ghost(nn.Module):
    """The model on each shard by itself."""

    def __init__(self, model: nn.Module, shards: tuple[int, ...]) -> None:
        super().__init__()
        self.model, self.shards = model, shards

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.model(part) for part in x.split(self.shards)])


def alone(net: str, shards: tuple[int, ...], *quantities: Any, groups: tuple[int, ...] = (), **options: Any) -> Any:
    """One process with the whole batch."""
    model = jobs.NETS[net]()
    model = Ghost(model, groups) if groups else model
    return curvature(model, Spread(shards), jobs.batch(sum(shards)), *(quantities or jobs.quantities()), **options)


def assert_same(found: list[dict[str, Any]], want: Any, shards: tuple[int, ...], tolerance: float = 1e-12) -> None:
    """Every rank's results against one process'; sums equal to the bit on all ranks."""
    samples = torch.cat([part["samples"] for part in found])
    assert torch.equal(samples, torch.arange(sum(shards)))
    for field in ("diag_ggn_exact", "sum_grad_squared", "variance"):
        for name, t in getattr(want, field).items():
            name = name.removeprefix("model.")
            assert_close(found[0][field][name], t, tolerance)
            assert all(torch.equal(part[field][name], found[0][field][name]) for part in found)
    for name, t in want.grad_component.items():
        assert_close(torch.cat([part["grad_component"][name.removeprefix("model.")] for part in found]), t, tolerance)
    flat = torch.linspace(-1, 1, want.ggn.dim, dtype=torch.float64, device=jobs.DEVICE)
    newton = torch.cat([t.flatten() for t in want.ggn.newton_step(0.1).values()])
    wanted = {"gradient": want.ggn.gradient, "curvatures": want.ggn.curvatures(1), "newton": newton}
    wanted |= {"eigenvalues": want.ggn.eigenvalues, "product": want.ggn @ flat, "solved": want.ggn.solve(flat, 0.1)}
    for key, t in wanted.items():
        assert_close(found[0][key], t, tolerance)
        assert all(torch.equal(part[key], found[0][key]) for part in found)


def assert_close(got: Tensor, want: Tensor, tolerance: float) -> None:
    assert float((got - want).norm()) <= tolerance * float(want.norm()) + 1e-15


# ---------------------------------------------------------------------------- the numbers
@pytest.mark.parametrize("name", EXACT)
def test_exact(name, two):
    _, (net, shards, method), options = EXACT[name]
    want = alone(net, shards, method=method, **options)
    assert_same(two[name], want, shards)
    assert all((part["method"], part["passes"]) == (method, want.passes) for part in two[name])


@pytest.mark.parametrize("method", WAYS)
def test_limited_memory(method, two):
    """All ranks name the same budget and go through the same passes with it."""
    assert_same(two[f"limited {method}"], alone("cnn", UNEVEN, method=method), UNEVEN)
    assert len({(part["budget"], part["passes"]) for part in two[f"limited {method}"]}) == 1


@pytest.mark.parametrize("method", WAYS)
def test_four_ranks(method, four):
    assert_same(four[method], alone("cnn" if method == "coupled" else "mlp", FOUR, method=method), FOUR)


@pytest.mark.parametrize("way", [*WAYS, "auto"])
def test_statistics_of_pairs_of_ranks(way, four):
    """The loss is everybody's, statistics are those of two ranks each; all go through equally many passes."""
    assert_same(four[f"pairs {way}"], alone("mlp", FOUR, groups=(8, 7)), FOUR)
    assert len({part["passes"] for part in four[f"pairs {way}"]}) == 1


def test_deflated_estimates_in_pairs_of_ranks(four):
    """Each pair has a basis of its own, and all take as many directions of it."""
    exact = alone("mlp", FOUR, DiagGGNExact(), groups=(8, 7)).diag_ggn_exact
    for part in four["pairs deflated"]:
        assert (part["passes"], part["method"]) == (2 + 3 + 60, "sampled")
        for name, t in ((name.removeprefix("model."), t) for name, t in exact.items()):
            assert_close(part["diag_ggn_mc"][name], t, 1e-12)


def test_truncation_in_pairs_of_ranks(four):
    """Each pair has statistics of its own, and all keep as many directions; off by no more than is said."""
    found, want = four["pairs truncated"], alone("mlp", FOUR, DiagGGNExact(), groups=(8, 7)).diag_ggn_exact
    assert len({part["passes"] for part in found}) == 1
    dropped = [sum(e**2 for e in part["error"].values()) ** 0.5 for part in found]
    bound = sum(2 * sum(float(t.sum()) for t in want.values()) ** 0.5 * e + e**2 for e in dropped)
    off = {n: part - want[f"model.{n}"] for n, part in found[0]["diag_ggn_exact"].items()}
    assert 1e-6 < sum(float(t.abs().sum()) for t in off.values()) <= bound
    for part in found:
        assert all(torch.equal(t, found[0]["diag_ggn_exact"][n]) for n, t in part["diag_ggn_exact"].items())


def test_all_ranks_take_the_same_way(two):
    """Where one would rather take another, and where one finds its samples mixed."""
    assert_same(two["ghost of two minds"], alone("mlp", UNEVEN, groups=UNEVEN), UNEVEN)
    assert [part["method"] for part in two["ghost of two minds"]] == ["coupled", "coupled"]
    for kind in ("shared", "own"):
        one, other = two[f"mixed on one, {kind}"]
        assert one["method"] == other["method"] == "dense"
        assert all(torch.equal(t, other["diag_ggn_exact"][name]) for name, t in one["diag_ggn_exact"].items())


@pytest.mark.parametrize("method", WAYS)
def test_every_rank_its_own_statistics(method, two):
    """Plain BatchNorm under DistributedDataParallel: the mean of the ranks' matrices."""
    assert_same(two[f"ghost {method}"], alone("mlp", UNEVEN, groups=UNEVEN), UNEVEN)


def test_loader(two):
    """Mini-batches at the weights of a mean over all samples; indices go on from batch to batch."""
    first, second = two["loader"]
    assert first["samples"].tolist() == [*range(9), *range(12, 15)]
    assert second["samples"].tolist() == [*range(9, 12), *range(15, 24)]
    parts = [curvature(jobs.mlp(), Spread(s), jobs.batch(12, seed), DiagGGNExact(), ComponentGrad())
             for s, seed in ((UNEVEN, 1), (UNEVEN[::-1], 2))]  # fmt: skip
    for name, t in first["diag_ggn_exact"].items():
        assert_close(t, sum(part.diag_ggn_exact[name] for part in parts) / 2, 1e-12)
        assert torch.equal(t, second["diag_ggn_exact"][name])
    for name, t in first["grad_component"].items():
        assert_close(t, torch.cat([parts[0].grad_component[name][:9], parts[1].grad_component[name][:3]]) / 2, 1e-12)


@pytest.mark.parametrize("name", ["monte carlo", "monte carlo, generator"])
def test_monte_carlo(name, two):
    """Unbiased though all ranks have the same seed, and the same on all of them."""
    first, second = (part["diag_ggn_mc"] for part in two[name])
    want = alone("mlp", UNEVEN, DiagGGNExact()).diag_ggn_exact
    error = sum(float((first[n] - t).square().sum()) for n, t in want.items()) ** 0.5
    assert error <= 0.06 * sum(float(t.square().sum()) for t in want.values()) ** 0.5
    assert all(torch.equal(first[n], second[n]) for n in want)
    one = alone("mlp", UNEVEN, DiagGGNMC(mc_samples=3000)).diag_ggn_mc_stderr
    for n, t in two[name][0]["diag_ggn_mc_stderr"].items():
        torch.testing.assert_close(t, one[n], rtol=0.25, atol=1e-4)


@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("goal", ["", ", rtol"])
def test_deflated_estimates(goal, statistics, two):
    """Exact and random parts are of all ranks' columns; of each rank's own; or divided."""
    shards, groups = (12,) if statistics == "same" else UNEVEN, UNEVEN if statistics == "own" else ()
    exact = alone("mlp", shards, DiagGGNExact(), groups=groups).diag_ggn_exact
    found = two[f"deflated {statistics}{goal}"]
    assert {part["method"] for part in found} == {"sampled"}
    passes = [2 + 2 + 30, 2 + 1 + 30] if statistics == "same" else [2 + 3 + 60] * 2
    assert [part["passes"] for part in found] == passes
    for name, t in ((name.removeprefix("model."), t) for name, t in exact.items()):
        assert_close(found[0]["diag_ggn_mc"][name], t, 1e-12)
        assert torch.equal(found[0]["diag_ggn_mc"][name], found[1]["diag_ggn_mc"][name])


def test_truncation(two):
    want = alone("mlp", UNEVEN, DiagGGNExact(), tol=0.3, method="coupled")
    for part in two["truncated 0.3"]:
        assert 0 < part["passes"] <= want.passes
        for name, t in want.diag_ggn_exact.items():
            assert_close(part["diag_ggn_exact"][name], t, 1e-10)
            assert part["error"].get(name, 0.0) == pytest.approx(want.error.get(name, 0.0), rel=1e-8)


def test_coupling_report(two):
    want = alone("mlp", UNEVEN, CouplingReport()).coupling
    for part in two["report"]:
        for layer, c in want.items():
            own, full, values = part[layer]
            assert (own, full) == (pytest.approx(c.own_trace), pytest.approx(c.full_trace))
            torch.testing.assert_close(values, c.singular_values, rtol=1e-7, atol=1e-7)


# ---------------------------------------------------------------------------- the gesture
@pytest.mark.parametrize("name", ["gesture", "gesture, plain"])
def test_gesture(name, two):
    """The same numbers; `.grad` is what DistributedDataParallel makes of it."""
    groups = UNEVEN if name == "gesture, plain" else ()
    want = alone("mlp", UNEVEN, DiagGGNExact(), ComponentGrad(), groups=groups)
    for rank, part in enumerate(two[name]):
        here = slice(0, 9) if rank == 0 else slice(9, 12)
        for full, t in want.diag_ggn_exact.items():
            key = full.removeprefix("model.")
            assert_close(part["diag_ggn_exact"][key], t, 1e-12)
            assert_close(part["grad_component"][key], want.grad_component[full][here], 1e-12)
            torch.testing.assert_close(part["grad"][key], want.grad_component[full].sum(0), rtol=1e-9, atol=1e-15)


def test_training_of_an_extended_model(two):
    """Gradients and running statistics are those of one process."""
    model = jobs.mlp()
    X, y = jobs.batch(12)
    Spread(UNEVEN)(model(X), y).backward()
    for part in two["trained"]:
        for name, p in model.named_parameters():
            torch.testing.assert_close(part["grad"][name], p.grad, rtol=1e-9, atol=1e-15)
        for name, b in model.named_buffers():
            torch.testing.assert_close(part["buffers"][name], b, rtol=1e-12, atol=0)


def test_no_trace(two):
    assert two["trace"] == [[], []]


# ---------------------------------------------------------------------------- what goes wrong
@pytest.mark.parametrize("kind", FAILURES)
def test_all_ranks_raise_when_one_fails(kind, two):
    """At once, with the rank and the reason; the next call works."""
    want = alone("mlp", (8, 8), DiagGGNExact()).diag_ggn_exact
    other, failed = two[f"failure {kind}"]
    if not failed:
        pytest.skip("on a GPU PyTorch ends a process whose targets are out of range")
    assert FAILURES[kind] in failed["said"]
    assert FAILURES[kind] in other["said"]
    if kind not in ("quantities", "loader"):  # there both notice
        assert other["said"].startswith("RankFailure: rank 1 of 2 failed: ")
    print_delay(other, failed)
    for part in (other, failed):
        assert part["times"]["ended"] - part["times"]["began"] < 10
        for name, t in want.items():
            assert_close(part["again"]["diag_ggn_exact"][name], t, 1e-12)


def print_delay(other: dict[str, Any], failed: dict[str, Any]) -> None:
    """From the failure on one rank to the raise on the other."""
    if "failed" in failed["times"]:
        print(f"the other rank raised {1e3 * (other['times']['ended'] - failed['times']['failed']):.0f} ms later")


def test_mixture_is_refused(two):
    for said in two["mixture"]:
        assert "'module.4' (BatchNorm1d) takes its statistics from one rank, 'module.1' (SyncBatchNorm) from" in said


@pytest.mark.parametrize("name", ["matrix-free", "matrix-free, plain"])
def test_matrix_free(name, two):
    """Complete when it is handed out: eigenpairs, gradient, slopes, curvatures of all samples; no products later."""
    groups = UNEVEN if name == "matrix-free, plain" else ()
    want = alone("mlp", UNEVEN, LowRankGGN(top=3), groups=groups).ggn
    for part in two[name]:
        assert_close(part["eigenvalues"], want.eigenvalues, 1e-8)
        assert_close(part["gradient"], want.gradient, 1e-12)
        assert_close(part["slopes"].abs(), want.slopes().abs(), 1e-6)
        assert_close(part["curvatures"], want.curvatures(), 1e-6)
        assert "that of a batch on 2 processes" in part["said"]
        assert all(torch.equal(part[key], two[name][0][key]) for key in ("eigenvalues", "vectors", "slopes"))


@pytest.mark.parametrize("shards", [UNEVEN, MANY], ids=str)
def test_influence(shards, two):
    """With few samples by a pass for each, with many through the cut."""
    want = alone("mlp", shards, InfluenceGrad(), InfluenceProjection())
    first = 0
    for part in two[f"influence {shards}"]:
        here = slice(first, first := first + len(part["samples"]))
        assert part["passes"] == want.passes
        assert_close(part["projection"], want.influence_projection[here], 1e-11)
        for name, t in want.grad_influence.items():
            assert float((part["grad_influence"][name] - t[here]).norm()) <= 1e-11 * float(t.norm()) + 1e-14


# ---------------------------------------------------------------------------- the same batch on every rank
BY_SAMPLE = {
    "grad_component": 0, "l2_component": 0, "diag_ggn_exact_component": 0, "diag_ggn_mc_component": 0,
    "grad_influence": 0, "influence_projection": 0, "sqrt_ggn_exact": 1, "sqrt_ggn_mc": 1,
}  # fmt: skip


def flat(value: Any, axis: int = 0) -> Tensor:
    """A field's tensors as one, the samples first."""
    parts = [value] if isinstance(value, Tensor) else [value[name] for name in sorted(value)]
    return torch.cat([t.movedim(axis, 0).flatten(1) if t.dim() > 1 else t[:, None] for t in parts], 1)


def assert_divided(name: str, found: list[dict[str, Any]]) -> None:
    """All quantities are those of one process, with rank 0's random numbers; passes are a W-th."""
    _, (net, count, way), options = (TWO | OF_FOUR)[name]
    model = jobs.NETS[net]()
    torch.manual_seed(3)
    res = curvature(model, jobs.CE, jobs.batch(count), *jobs.everything(), method=way, **options)
    assert_same(found, res, (count,))
    for field, value in res.fields.items():
        axis = BY_SAMPLE.get(field)
        if axis is not None:
            got = torch.cat([flat(part[field], axis) for part in found])
            assert_close(got, flat(value, axis), 1e-11 if "influence" in field else 1e-12)
        elif field != "ggn":
            for n, t in value.items():
                assert_close(found[0][field][n], t, 1e-12)
                assert all(torch.equal(part[field][n], found[0][field][n]) for part in found)
    C, W = 2, len(found)
    shares = [len(part["samples"]) for part in found]
    assert max(shares) - min(shares) <= 1
    alone, influence = (curvature(model, jobs.CE, jobs.batch(count), q, method=way, **options).passes
                        for q in (DiagGGNExact(), InfluenceGrad()))  # fmt: skip
    width = 8 if net == "mlp" else 6  # of each BatchNorm with passes
    assert alone == (C * count if way == "dense" else C + (alone - C) // width * width)
    directions = [width // W + (rank < width % W) for rank in range(W)]
    for part, share, q in zip(found, shares, directions, strict=True):
        assert part["passes"] == (C * share if way == "dense" else C + (alone - C) // width * q)
        assert part["influence"] == (share if influence == count else 1 + (influence - 1) // width * q)


@pytest.mark.parametrize("name", [name for name in TWO if name.startswith(("same mlp", "same cnn"))])
def test_same_batch(name, two):
    assert_divided(name, two[name])


@pytest.mark.parametrize("name", [name for name in OF_FOUR if name.startswith(("same mlp", "same cnn"))])
def test_same_batch_on_four_ranks(name, four):
    assert_divided(name, four[name])


def test_same_batch_otherwise(two):
    assert_divided_otherwise(two["same, rest"], 6)
    samples = [part["loader"]["samples"].tolist() for part in two["same, rest"]]
    assert samples == [[0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11]]


def test_same_batch_otherwise_on_four_ranks(four):
    """One of them without a sample."""
    assert_divided_otherwise(four["same, rest"], 3)


def assert_divided_otherwise(found: list[dict[str, Any]], count: int) -> None:
    """Report, truncation, matrix-free, a generator's draws, dropout of one seed, mini-batches."""
    data = jobs.batch(count)
    res = curvature(jobs.mlp(), jobs.CE, data, CouplingReport(), LowRankGGN(top=3, matrix_free=True))
    cut = curvature(jobs.mlp(), jobs.CE, data, DiagGGNExact(), tol=0.3, method="coupled")
    dropping = curvature(jobs.dropped(4), jobs.CE, data, DiagGGNExact()).diag_ggn_exact
    loader = curvature(jobs.mlp(), jobs.CE, [jobs.batch(count, 1), jobs.batch(count, 2)], *jobs.quantities())
    seed = int(torch.randint(2**63 - 1, (), generator=torch.Generator().manual_seed(5)))  # of rank 0's generator
    drawn = DiagGGNMC(5, generator=torch.Generator().manual_seed(seed))
    mixed = curvature(jobs.mlp(), jobs.CE, data, drawn).diag_ggn_mc
    free = {"values": res.ggn.eigenvalues, "vectors": res.ggn.unit_vectors(), "gradient": res.ggn.gradient,
            "slopes": res.ggn.slopes().abs(), "curvatures": res.ggn.curvatures(),
            "product": res.ggn @ res.ggn.gradient}  # fmt: skip
    for part in found:
        for layer, c in res.coupling.items():
            assert part["report"][layer].own_trace == pytest.approx(c.own_trace)
            torch.testing.assert_close(part["report"][layer].singular_values, c.singular_values)
        for key, t in free.items():
            assert_close(part["free"][key], t, 1e-9)
            assert torch.equal(part["free"][key], found[0]["free"][key])
        for n, t in cut.diag_ggn_exact.items():
            assert_close(part["cut"][n], t, 1e-10)
        assert part["passes"] < cut.passes and part["error"] == found[0]["error"]
        assert part["error"] == pytest.approx(cut.error, rel=1e-8)
        for n, t in dropping.items():
            assert_close(part["dropping"][n], t, 1e-12)
        for n, t in mixed.items():
            assert_close(part["mixed"][n], t, 1e-12)
            assert torch.equal(part["mixed"][n], found[0]["mixed"][n])
        for n, t in loader.diag_ggn_exact.items():
            assert_close(part["loader"]["diag_ggn_exact"][n], t, 1e-12)
            rows = loader.grad_component[n][part["loader"]["samples"]]
            assert_close(part["loader"]["grad_component"][n], rows, 1e-12)
        assert_close(part["loader"]["eigenvalues"], loader.ggn.eigenvalues, 1e-12)


@pytest.mark.parametrize(("name", "shards"), [("point", (5,)), ("point, spread", (5, 2))])
def test_point(name, shards, two):
    """All ranks keep the same of one call for the next."""
    res = alone("mlp", shards, DiagGGNExact(), ComponentGrad(), LowRankGGN())
    for first, second, third in two[name]:
        for part in (first, second):
            assert_close(part["eigenvalues"], res.ggn.eigenvalues, 1e-12)
        for n, t in res.diag_ggn_exact.items():
            assert_close(second["diag_ggn_exact"][n], t, 1e-12)
            assert_close(third["grad_component"][n], res.grad_component[n][third["samples"]], 1e-12)


def test_other_batches(two):
    """A plain model with other samples on every rank: the mean of the ranks' matrices. What is neither is refused."""
    assert_same([part["told"] for part in two["not same"]], alone("mlp", UNEVEN, groups=UNEVEN), UNEVEN)
    for part in two["not same"]:
        assert "parameter '3.bias' is not the same on all 2 ranks" in part["parameters"]
        assert "'weight' of the loss is not the same on all 2 ranks" in part["loss"]
        assert "mini-batch 2 is not the same on all 2 ranks" in part["late"]
        assert "output are the same on all 2 ranks, but the loss is not ([" in part["function"]
        assert "Its columns are not divided over processes: leave process_group out." in part["compares"]
        assert "the model's output is not (rank 1, sample(s) [" in part["dropout"]


@pytest.mark.parametrize("method", WAYS)
def test_same_batch_when_a_rank_fails(method, two):
    other, failed = two[f"same, failure {method}"]
    assert failed == "ValueError: no more rows"
    assert other == "RankFailure: rank 1 of 2 failed: ValueError: no more rows"


def test_a_failure_is_heard_between_passes(two):
    """Not only at the next message, which here would be after all 80 passes of a rank."""
    other, failed = two["same, early failure"]
    assert failed["said"] == "ValueError: no more rows"
    assert other["said"] == "RankFailure: rank 1 of 2 failed: ValueError: no more rows"
    assert other["passes"] < 60
    print_delay(other, failed)


def test_a_failure_is_heard_once(two):
    """Ranks that go on after it, as in a second backward of a recorded forward, hear of it no more."""
    said, still, numbers = zip(*two["heard once"], strict=True)
    assert said == ("RankFailure: rank 1 of 2 failed: ValueError: once", "ValueError: once")
    assert still == (False, False)
    assert numbers == ([0, 1], [0, 1])


# ---------------------------------------------------------------------------- messages
def test_messages_do_not_depend_on_the_number_of_samples(two):
    """The coupled way sends statistics, B, P and the results: Σ numbers as the README counts them."""
    few, many = (two[f"mlp {shards} coupled {{}}"][0]["messages"] for shards in (UNEVEN, (8, 8)))
    assert {key: m.bytes for key, m in few.items() if key != "V"} == {
        key: m.bytes for key, m in many.items() if key != "V"
    }
    assert few["statistics"].bytes == 8 * (2 * 5 + 1 + 2 * 4 + 1)  # mean, spread, count
    assert few["B"].bytes == 8 * (2 * 4) * (2 * 5)
    assert few["P"].bytes == 8 * (2 * 4) * (6 * 5 + 5 + 5)  # statistics above, entries below but a vanishing bias


def test_experiment(tmp_path):
    """As its head says to start it."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*start, str(SCRIPTS / "several_processes.py"), "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "passes: 138 on every rank, 138 on one process" in done.stdout
    assert "passes with the whole batch on every rank, divided: 74" in done.stdout
    assert (tmp_path / "several_processes.png").exists()


def test_experiment_without_torchrun(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setattr(sys, "argv", ["several_processes.py"])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(SCRIPTS / "several_processes.py"), run_name="__main__")
    assert left.value.code == 2 and "start it with torchrun --standalone" in capsys.readouterr().err


def test_messages_counted_on_paper(two, monkeypatch):
    """Those of a sequential network without biases, as `experiments/growth.py` counts them."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from growth import count, messages

    counted = messages(count(jobs.plain_cnn(), jobs.batch(1)[0]))
    sent = two["messages"][0]["messages"]
    assert {purpose: 8 * n for purpose, n in counted.items()} == {purpose: sent[purpose].bytes for purpose in counted}


@pytest.mark.parametrize("name", ["mlp 5 coupled", "mlp 5 dense", "cnn 30 coupled"])
def test_growth_counts_what_each_rank_takes(name, two):
    """experiments/growth.py: N·(C - 1)/W passes, or C - 1 + R/W, at most."""
    net, count, method = name.split()
    X, _ = jobs.batch(int(count))
    plain, coupled = growth.divided(growth.count(jobs.NETS[net](), X[:1]), int(count), 3, ranks=2)
    assert max(part["passes"] for part in two[f"same {name}"]) == (coupled if method == "coupled" else plain)
