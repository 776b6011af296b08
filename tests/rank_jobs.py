"""What several processes do together in `test_ranks.py`: jobs that run on every rank; results are compared there."""

from __future__ import annotations

import os
import re
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from backpack import backpack
from pytest import MonkeyPatch
from state import unchanged
from torch import Tensor, nn

from bncurv import (
    ComponentDiagGGNExact,
    ComponentDiagGGNMC,
    ComponentGrad,
    ComponentL2Grad,
    ComponentVariance,
    CouplingReport,
    DiagGGNExact,
    DiagGGNMC,
    InfluenceGrad,
    InfluenceProjection,
    LowRankGGN,
    SqrtGGNExact,
    SqrtGGNMC,
    SumComponentGradSquared,
    at,
    curvature,
    extend,
)
from bncurv.alarm import INTERVAL
from bncurv.budget import Budget
from bncurv.costs import Costs
from bncurv.deflation import Deflated
from bncurv.passes import Passes
from bncurv.ranks import Ranks
from bncurv.sketch import Basis

CE = nn.CrossEntropyLoss()
DEVICE = torch.device("cpu")  # of models and data; of a process under NCCL its own GPU (`run`)
SHARDS = {2: {"even": (8, 8), "uneven": (9, 3)}, 4: {"uneven": (3, 5, 1, 6)}}


def mlp() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh()]
    return perturbed(nn.Sequential(*layers, nn.Linear(4, 3)))


def dropped(seed: int) -> nn.Module:
    """With a dropout, whose draws begin at a seed."""
    model = nn.Sequential(mlp(), nn.Dropout(0.3))
    torch.manual_seed(seed)
    return model


class Residual(nn.Module):
    """Convolutions, a shortcut, BatchNorm at three places."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.na = nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.b, self.nb = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.n, self.o = nn.BatchNorm2d(3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.na(self.a(x.view(-1, 1, 2, 3))))
        h = self.n(h + self.nb(self.b(h)))
        return self.o(h.mean((2, 3)))


def cnn() -> nn.Module:
    torch.manual_seed(0)
    return perturbed(Residual())


def plain_cnn() -> nn.Module:
    """Convolutions without biases, one after the other."""
    torch.manual_seed(0)
    layers = [nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3), nn.Tanh()]
    layers += [nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten()]
    return perturbed(nn.Sequential(*layers, nn.Linear(24, 3)))


def perturbed(model: nn.Module) -> nn.Module:
    for p in model.parameters():
        nn.init.normal_(p, std=0.5) if p.dim() > 1 else nn.init.uniform_(p, 0.5, 1.5)
    return model.double().to(DEVICE)


NETS: dict[str, Callable[[], nn.Module]] = {"mlp": mlp, "cnn": cnn}


def batch(count: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    X, y = torch.randn(count, 6, generator=g, dtype=torch.float64), torch.randint(3, (count,), generator=g)
    return X.to(DEVICE), y.to(DEVICE)


def mine(shards: tuple[int, ...], seed: int = 1) -> tuple[Tensor, Tensor]:
    """This rank's part of the batch."""
    X, y = batch(sum(shards), seed)
    first = sum(shards[: dist.get_rank()])
    here = slice(first, first + shards[dist.get_rank()])
    return X[here], y[here]


def synced(model: nn.Module, group: Any = None) -> nn.Module:
    """As it is trained: SyncBatchNorm inside DistributedDataParallel."""
    return nn.parallel.DistributedDataParallel(nn.SyncBatchNorm.convert_sync_batchnorm(model, group))


def quantities() -> tuple[Any, ...]:
    return DiagGGNExact(), ComponentGrad(), ComponentVariance(), SumComponentGradSquared(), LowRankGGN()


def everything() -> tuple[Any, ...]:
    """All quantities but the report, which goes one way only."""
    exact = ComponentDiagGGNExact(), SqrtGGNExact(), ComponentL2Grad(), InfluenceGrad(), InfluenceProjection()
    return *quantities(), *exact, DiagGGNMC(5), ComponentDiagGGNMC(2), SqrtGGNMC(2)


def told(res: Any) -> dict[str, Any]:
    """What is compared, without DistributedDataParallel's prefix."""
    found: dict[str, Any] = {"method": res.method, "passes": res.passes, "messages": dict(res.messages)}
    found["samples"] = None if res.samples is None else res.samples.clone()
    for field, value in res.fields.items():
        if isinstance(value, Tensor):
            found[field] = value
        if isinstance(value, dict):
            found[field] = {name.removeprefix("module."): t for name, t in value.items()}
    if "ggn" in res.fields:
        ggn = res.ggn
        flat = torch.linspace(-1, 1, ggn.dim, dtype=torch.float64, device=ggn.device)
        found |= {"eigenvalues": ggn.eigenvalues, "product": ggn @ flat, "solved": ggn.solve(flat, 0.1)}
        found |= {"gradient": ggn.gradient, "curvatures": ggn.curvatures(1)}
        found["newton"] = torch.cat([t.flatten() for t in ggn.newton_step(0.1).values()])
    return found


# ---------------------------------------------------------------------------- the jobs
def exact(net: str, shards: tuple[int, ...], method: str, **options: Any) -> dict[str, Any]:
    return told(curvature(synced(NETS[net]()), CE, mine(shards), *quantities(), method=method, **options))


def limited(shards: tuple[int, ...], method: str) -> dict[str, Any]:
    """At the smallest budget, which is that of the rank that needs most."""
    model, data = synced(cnn()), mine(shards)
    try:
        curvature(model, CE, data, *quantities(), method=method, memory=1)
    except ValueError as error:
        budget = int(re.findall(r"memory=(\d+)", str(error))[1])
    return told(curvature(model, CE, data, *quantities(), method=method, memory=budget)) | {"budget": budget}


def loader(shards: tuple[int, ...]) -> dict[str, Any]:
    data = [mine(shards, seed=1), mine(tuple(reversed(shards)), seed=2)]
    return told(curvature(synced(mlp()), CE, data, *quantities()))


def ghost(shards: tuple[int, ...], method: str) -> dict[str, Any]:
    """Plain BatchNorm under DistributedDataParallel: every rank's own statistics."""
    return told(curvature(nn.parallel.DistributedDataParallel(mlp()), CE, mine(shards), *quantities(), method=method))


def paired() -> nn.Module:
    """Statistics of two ranks each, the loss of all."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    return synced(mlp(), groups[dist.get_rank() // 2])


def pairs(shards: tuple[int, ...], method: str) -> dict[str, Any]:
    return told(curvature(paired(), CE, mine(shards), *quantities(), method=method))


def of_two_minds(shards: tuple[int, ...]) -> dict[str, Any]:
    """Plain BatchNorm; on rank 1 alone the dense way looks cheaper."""
    own, cheap = Costs.dense, dist.get_rank() == 1
    Costs.dense = lambda self: 0.0 if cheap else float("inf")  # type: ignore[method-assign]
    try:
        return ghost(shards, "auto")
    finally:
        Costs.dense = own  # type: ignore[method-assign]


class Mixing(nn.Module):
    """Samples meet; on the other ranks nothing happens."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.5 * x.mean(0) if dist.get_rank() == 1 else x


def mixed_on_one(shards: tuple[int, ...], shared: bool) -> dict[str, Any]:
    """Rank 1 has an unknown coupling: all take the dense way."""
    model = mlp()
    model.insert(3, Mixing())
    ddp = synced(model) if shared else nn.parallel.DistributedDataParallel(model)
    own = Costs.dense
    Costs.dense = lambda self: float("inf")  # type: ignore[method-assign]  # so that it is looked for
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return told(curvature(ddp, CE, mine(shards), *quantities()))
    finally:
        Costs.dense = own  # type: ignore[method-assign]


def monte_carlo(shards: tuple[int, ...], seed: int | None) -> dict[str, Any]:
    """With the same global seed on all ranks, or the same generator."""
    torch.manual_seed(3)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    quantity = DiagGGNMC(mc_samples=3000, generator=generator)
    return told(curvature(synced(mlp()), CE, mine(shards), quantity))


def deflated(shards: tuple[int, ...], statistics: str, goal: dict[str, Any]) -> dict[str, Any]:
    """Draws that are every column once, times √M: their mean square is the expectation, whatever the basis."""
    exact, M, made = 3, 60, [0]

    def every(self: Deflated, count: int) -> Tensor:
        shard, c = self._batch.shard, self._closed
        own = slice(shard.first * c, (shard.first + len(self._batch.output)) * c)
        made[0] += count
        every = torch.eye(M, dtype=torch.float64, device=DEVICE)
        return M**0.5 * every[made[0] - count : made[0], own]

    with MonkeyPatch.context() as patch:
        patch.setattr(Deflated, "_normal", every)
        patch.setattr(Deflated, "_price", lambda *_: float("inf"))
        own_best = dist.get_rank() // 2 if statistics == "pairs" else 0  # each pair would rather have its own
        patch.setattr(Basis, "best", lambda self, passes, fewest: exact + own_best)
        patch.setattr(Basis, "cheapest", lambda self, scale, fewest, known: (exact, float(M)))
        rtol = goal.get("rtol", 0.0)
        patch.setattr("bncurv.deflation._Estimate.errors", lambda e, _: (rtol * (0.999 * M / e.draws) ** 0.5,) * 2)
        if statistics == "same":
            return told(curvature(mlp(), CE, batch(12), DiagGGNMC(**goal), process_group=dist.group.WORLD))
        of = {"own": lambda: nn.parallel.DistributedDataParallel(mlp()), "pairs": paired}
        model = of.get(statistics, lambda: synced(mlp()))()
        return told(curvature(model, CE, mine(shards), DiagGGNMC(**goal)))


def truncated(shards: tuple[int, ...], tol: float, in_pairs: bool = False) -> dict[str, Any]:
    model = paired() if in_pairs else synced(mlp())
    res = curvature(model, CE, mine(shards), DiagGGNExact(), tol=tol, method="coupled")
    return told(res) | {"error": {name.removeprefix("module."): e for name, e in res.error.items()}}


def report(shards: tuple[int, ...]) -> dict[str, Any]:
    coupling = curvature(synced(mlp()), CE, mine(shards), CouplingReport()).coupling
    return {
        layer.removeprefix("module."): (c.own_trace, c.full_trace, c.singular_values) for layer, c in coupling.items()
    }


def messages(shards: tuple[int, ...]) -> dict[str, Any]:
    return told(curvature(synced(plain_cnn()), CE, mine(shards), DiagGGNExact(), method="coupled"))


def matrix_free(shards: tuple[int, ...], plain: bool) -> dict[str, Any]:
    model = nn.parallel.DistributedDataParallel(mlp()) if plain else synced(mlp())
    ggn = curvature(model, CE, mine(shards), LowRankGGN(top=3, matrix_free=True)).ggn
    try:
        said = str(ggn @ ggn.gradient)
    except RuntimeError as e:
        said = str(e)
    found = {"eigenvalues": ggn.eigenvalues, "vectors": ggn.unit_vectors(), "gradient": ggn.gradient}
    return found | {"slopes": ggn.slopes(), "curvatures": ggn.curvatures(), "said": said}


def gesture(shards: tuple[int, ...], plain: bool) -> dict[str, Any]:
    """BackPACK's, with DistributedDataParallel around the extended model."""
    model = extend(mlp())
    ddp = nn.parallel.DistributedDataParallel(model) if plain else synced(model)
    X, y = mine(shards)
    with backpack(DiagGGNExact(), ComponentGrad()):
        extend(nn.CrossEntropyLoss())(ddp(X), y).backward()
    named = dict(model.named_parameters())
    found = {field: {n: getattr(p, field) for n, p in named.items()} for field in ("diag_ggn_exact", "grad_component")}
    return found | {"grad": {n: p.grad for n, p in named.items()}}


def trained(shards: tuple[int, ...]) -> dict[str, Any]:
    """`.grad` of a training step with an extended SyncBatchNorm model."""
    model = extend(mlp())
    ddp, (X, y) = synced(model), mine(shards)
    CE(ddp(X), y).backward()
    return {"grad": {n: p.grad for n, p in model.named_parameters()}, "buffers": dict(model.named_buffers())}


def trace_left(shards: tuple[int, ...]) -> list[str]:
    """What a call changes in the model, if anything."""
    model = synced(mlp())
    before = {name: t.clone() for name, t in (*model.named_parameters(), *model.named_buffers())}
    curvature(model, CE, mine(shards), DiagGGNExact())
    changed = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if not torch.equal(t, before[n])]
    return changed + [name for name, m in model.named_modules() if "forward" in vars(m)]


# ---------------------------------------------------------------------------- the same batch on every rank
def same(net: str, count: int, method: str, **options: Any) -> dict[str, Any]:
    """A plain model and one batch, on all ranks; they have other random states, and one counts passes alone."""
    model, where = NETS[net](), {"method": method, "process_group": dist.group.WORLD} | options
    torch.manual_seed(3 + dist.get_rank())
    found = told(curvature(model, CE, batch(count), *everything(), **where))
    one = curvature(model, CE, batch(count), DiagGGNExact(), **where)
    influence = curvature(model, CE, batch(count), InfluenceGrad(), **where).passes
    return found | {"passes": one.passes, "messages": dict(one.messages), "influence": influence}


def same_rest(count: int) -> dict[str, Any]:
    """What is not in `everything`: report, truncation, matrix-free, a generator, mini-batches, a dropout."""
    group, data = {"process_group": dist.group.WORLD}, batch(count)
    generator = torch.Generator().manual_seed(5 + dist.get_rank())
    free = curvature(mlp(), CE, data, LowRankGGN(top=3, matrix_free=True), **group).ggn
    cut = curvature(mlp(), CE, data, DiagGGNExact(), tol=0.3, method="coupled", **group)
    mixed = curvature(mlp(), CE, data, DiagGGNMC(5, generator=generator), **group).diag_ggn_mc
    dropping = curvature(dropped(4), CE, data, DiagGGNExact(), **group)
    several = [batch(count, seed) for seed in (1, 2)]
    return {
        "report": curvature(mlp(), CE, data, CouplingReport(), **group).coupling,
        "free": {"values": free.eigenvalues, "vectors": free.unit_vectors(), "gradient": free.gradient,
                 "slopes": free.slopes().abs(), "curvatures": free.curvatures(), "product": free @ free.gradient},
        "cut": cut.diag_ggn_exact, "error": dict(cut.error), "passes": cut.passes, "mixed": mixed,
        "dropping": dropping.diag_ggn_exact, "loader": told(curvature(mlp(), CE, several, *quantities(), **group)),
    }  # fmt: skip


def point(count: int, shared: bool) -> list[dict[str, Any]]:
    """Several calls at a recorded batch: divided, or spread unevenly; rank 0 has one row too many to keep."""
    model, data = (synced(mlp()), mine((count - 2, 2))) if shared else (mlp(), batch(count))
    with MonkeyPatch.context() as patch:
        small = 8 * 2 * (count - 2 if shared else -(-count // 2)) * sum(p.numel() for p in model.parameters())
        patch.setattr("bncurv.keeping.USUAL", Budget(small=small - 1))
        with at(model, CE, data, process_group=dist.group.WORLD) as here:
            return [told(here(*asked)) for asked in ([LowRankGGN()], [DiagGGNExact(), LowRankGGN()], [ComponentGrad()])]


def not_same(shards: tuple[int, ...]) -> dict[str, Any]:
    """A plain model with other samples on every rank, and what is neither the same nor other."""
    group = {"process_group": dist.group.WORLD}
    other, late = mlp(), [batch(6), batch(6, seed=2 + dist.get_rank())]
    other[3].bias.data += dist.get_rank()
    weighted = nn.CrossEntropyLoss(weight=1.0 + dist.get_rank() * torch.ones(3)).double().to(DEVICE)
    means = told(curvature(mlp(), CE, mine(shards), *quantities(), **group))
    calls = {"parameters": (other, CE, batch(6)), "loss": (mlp(), weighted, batch(6)), "late": (mlp(), CE, late)}
    calls["function"] = (mlp(), partial(nn.functional.cross_entropy, label_smoothing=0.1 * dist.get_rank()), batch(6))
    calls["compares"] = (mlp(), lambda F, y: (F - F.mean(0)).square().mean(), batch(6))
    calls["dropout"] = (dropped(dist.get_rank()), CE, batch(6))  # last: it sets the seed
    said = {key: raised(partial(curvature, *args, DiagGGNExact(), **group)) for key, args in calls.items()}
    return {"told": means, **said}


class Refusing(DiagGGNExact):
    """Fails on rank 1 in the middle of its work."""

    def add(self, state: Any, key: str, rows: Any) -> None:
        if dist.get_rank() == 1:
            raise ValueError("no more rows")
        super().add(state, key, rows)


def same_failure(method: str) -> str:
    return raised(lambda: curvature(mlp(), CE, batch(6), Refusing(), method=method, process_group=dist.group.WORLD))


def same_failure_early() -> dict[str, Any]:
    """Rank 1 fails at its first rows; rank 0, whose passes are slow, would be long without a message."""
    done, vjp = [0], Passes.vjp

    def slow(self: Passes, *args: Any, **options: Any) -> Any:
        done[0] += 1
        time.sleep(0.05)
        return vjp(self, *args, **options)

    Passes.vjp = slow  # type: ignore[method-assign]
    try:
        options = {"method": "dense", "chunk_size": 1, "process_group": dist.group.WORLD}
        with clock() as times:
            said = raised(partial(curvature, mlp(), CE, batch(80), Refusing(), **options))
        return {"said": said, "passes": done[0], "times": times}
    finally:
        Passes.vjp = vjp  # type: ignore[method-assign]


def heard_once() -> tuple[str, bool, list[float]]:
    """A failure, whether it is still heard afterwards, and what the same ranks say to one another then."""
    everybody = Ranks(dist.group.WORLD)

    def failing() -> None:
        with everybody.together():
            everybody.numbers(0)
            if dist.get_rank() == 1:
                raise ValueError("once")

    said = raised(failing)
    time.sleep(1.1 * INTERVAL)
    return said, everybody._alarm.rings(), everybody.numbers(dist.get_rank())


def raised(call: Callable[[], Any]) -> str:
    """The error of a call, as it reads."""
    try:
        call()
    except BaseException as e:
        return f"{type(e).__name__}: {e}"
    return "nothing"


class Stumbling(nn.Module):
    """Fails in the middle of the forward pass."""

    def __init__(self, error: BaseException | None) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        if self.error is not None:
            raise self.error
        return x


def failure(kind: str) -> dict[str, Any]:
    """What each rank is told when rank 1 fails, how long it takes, and whether the next call works."""
    bad = dist.get_rank() == 1
    error = {"forward": ValueError("a bad layer"), "interrupt": KeyboardInterrupt()}.get(kind) if bad else None
    model = mlp()
    model.insert(3, Stumbling(error))
    net, (X, y), asked = synced(model), mine((8, 8)), [DiagGGNExact()]
    data: Any = (X, y)
    if kind == "nan" and bad:
        data = (X / 0, y)
    if kind == "target" and DEVICE.type == "cuda":  # it would be the last job of this process
        return {}
    if kind == "target" and bad:
        data = (X, y + 7)
    if kind == "loader":
        data = [(X, y)] * (1 if bad else 2)
    if kind == "quantities" and bad:
        asked = [DiagGGNExact(), SumComponentGradSquared()]
    if kind == "none" and bad:
        asked = []
    with unchanged(net), clock() as times:
        said = raised(partial(curvature, net, CE, data, *asked, method="coupled"))
    again = told(curvature(synced(mlp()), CE, mine((8, 8)), DiagGGNExact()))
    return {"said": said, "times": times, "again": again}


@contextmanager
def clock() -> Iterator[dict[str, float]]:
    """When the block began and ended, and when an error in it was about to be told; one clock for all processes."""
    times, agree = {"began": time.monotonic()}, Ranks.agree

    def noting(self: Ranks, error: BaseException | None, about: int = 0) -> None:
        if error is not None:
            times.setdefault("failed", time.monotonic())
        agree(self, error, about)

    Ranks.agree = noting  # type: ignore[method-assign]
    try:
        yield times
    finally:
        Ranks.agree = agree  # type: ignore[method-assign]
        times["ended"] = time.monotonic()


def mixture() -> str:
    """SyncBatchNorm and plain BatchNorm side by side."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(mlp())
    model[4] = nn.BatchNorm1d(4).double().to(DEVICE)
    try:
        curvature(nn.parallel.DistributedDataParallel(model), CE, mine((8, 8)), DiagGGNExact())
    except ValueError as e:
        return str(e)
    return ""


def influence(shards: tuple[int, ...]) -> dict[str, Any]:
    res = curvature(synced(mlp()), CE, mine(shards), InfluenceGrad(), InfluenceProjection())
    return told(res) | {"projection": res.influence_projection}


def run(rank: int, size: int, jobs: dict[str, tuple[Callable, tuple, dict]], folder: str, backend: str) -> None:
    """All jobs on one rank; results and errors by name into a file."""
    global DEVICE
    torch.set_num_threads(1)
    if backend == "nccl":
        DEVICE = torch.device("cuda", rank)
        torch.cuda.set_device(DEVICE)
    else:  # its constructor wants a GPU for SyncBatchNorm, whose own kernels do; ours do not
        nn.parallel.DistributedDataParallel._passing_sync_batchnorm_handle = lambda self, module: None  # type: ignore
    where = f"file://{os.path.join(folder, 'meet')}"
    dist.init_process_group(backend, init_method=where, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    found: dict[str, Any] = {}
    for name, (job, args, options) in jobs.items():
        try:
            found[name] = job(*args, **options)
        except Exception as e:
            found[name] = f"{type(e).__name__}: {e}"
        dist.barrier()
    torch.save(found, os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


