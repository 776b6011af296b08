"""Several processes, one batch: what the ranks of a process group add up, gather and agree on.

All messages of the package go through here, each preceded by an agreement of one number per rank: that nobody has
failed, and that all are about to send as much. A rank that fails says so at the others' next agreement, so that all of
them raise, and nobody waits for a message that does not come. Between passes they listen for it (``alarm.py``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bncurv.alarm import Alarm

BATCH_NORMS = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm


class RankFailure(RuntimeError):
    """Another rank has failed; the message says which one, and why."""


class Messages(NamedTuple):
    """Messages of one purpose that a rank has taken part in: how many, and bytes of its own."""

    number: int = 0
    bytes: int = 0


class Ranks:
    """The ranks of a process group, or this process alone.

    Args:
        group: the process group; ``None``: that of all processes.
        everybody: those whom a failure concerns, among them these; default: these.
        alone: this process alone, whatever groups there are.
        divides: whether everybody has the same batch, and does a part of the work.
        plain: whether nothing but the call says over which ranks to work: then they may have the same batch.

    Attributes:
        size: W, their number.
        rank: this one's.
        everybody: those whom a failure concerns.
        messages: what was sent, by purpose.
    """

    def __init__(
        self,
        group: Any = None,
        everybody: Ranks | None = None,
        alone: bool = False,
        divides: bool = False,
        plain: bool = False,
    ) -> None:
        self._group, self.everybody = group, everybody or self
        self.divides, self.plain = divides, plain
        self.size = 1 if alone else dist.get_world_size(group)
        self.rank = 0 if alone else dist.get_rank(group)
        self.messages: dict[str, Messages] = everybody.messages if everybody else {}
        cuda = self.size > 1 and "nccl" in str(dist.get_backend(group))
        self._alarm = Alarm()
        self._device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")

    @property
    def helpers(self) -> Ranks:
        """Those that have the same batch and divide the work; where there are none, this process alone."""
        return self.everybody if self.divides else ALONE

    @property
    def parts(self) -> Ranks:
        """Those whose losses make up the loss; where all have the same batch, this process alone."""
        return ALONE if self.divides else self.everybody

    @property
    def passing(self) -> Ranks:
        """Those that go through the same passes; where they divide them, this process alone."""
        return ALONE if self.divides else self

    def share(self, count: int) -> slice:
        """Which of ``count`` things are this rank's, as evenly as may be."""
        least, more = divmod(count, self.size)
        start = self.rank * least + min(self.rank, more)
        return slice(start, start + least + (self.rank < more))

    # ---------------------------------------------------------------- data
    def sum(self, ts: Sequence[Tensor], purpose: str) -> list[Tensor]:
        """Σ over ranks of several tensors, in one message; equal to the bit on all of them."""
        if self.size == 1 or not ts:
            return list(ts)
        flat = torch.cat([self._sendable(t).reshape(-1) for t in ts])  # a copy
        self._about_to_send(flat, purpose)
        dist.all_reduce(flat, group=self._group)
        parts = zip(flat.split([t.numel() for t in ts]), ts, strict=True)
        return [part.view(t.shape).to(t.device) for part, t in parts]

    def sums(self, by_name: Mapping[str, Tensor], purpose: str) -> dict[str, Tensor]:
        """`sum` of tensors by name."""
        return dict(zip(by_name, self.sum(list(by_name.values()), purpose), strict=True))

    def gather(self, t: Tensor, purpose: str) -> list[Tensor]:
        """Every rank's tensor of the same shape, in the order of the ranks."""
        if self.size == 1:
            return [t]
        mine = self._sendable(t).contiguous()
        self._about_to_send(mine, purpose)
        found = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(found, mine, group=self._group)
        return [part.to(t.device) for part in found]

    def first(self, t: Tensor, purpose: str) -> Tensor:
        """Rank 0's tensor, for all."""
        return self.gather(t, purpose)[0]

    def alike(self, generator: torch.Generator | None) -> torch.Generator | None:
        """A generator that was just seeded, with rank 0's seed on all ranks."""
        if generator is not None and self.size > 1:
            seed = torch.tensor([generator.initial_seed()], device=self._device)
            generator.manual_seed(int(self.first(seed, "seed")))
        return generator

    def joined(self, rows: Mapping[str, Tensor], count: int, purpose: str) -> dict[str, Tensor]:
        """Of ``count`` rows every rank has its `share`: all of them ``[count, ...]``, by name."""
        if self.size == 1:
            return dict(rows)
        found = {name: t.new_zeros(count, *t.shape[1:]) for name, t in rows.items()}
        for name, t in rows.items():
            found[name][self.share(count)] = t
        return self.sums(found, purpose)

    def rows(self, t: Tensor, purpose: str) -> Tensor:
        """Every rank's rows ``[n, ...]``, unequally many, in the order of the ranks."""
        if self.size == 1:
            return t
        counts = [int(c) for c in self.numbers(len(t))]
        padded = t.new_zeros(max(counts), *t.shape[1:])
        padded[: len(t)] = t
        return torch.cat([part[:c] for part, c in zip(self.gather(padded, purpose), counts, strict=True)])

    def _sendable(self, t: Tensor) -> Tensor:
        """The tensor where the group can send it from: NCCL sends from GPUs only."""
        return t.to(self._device) if self._device.type == "cuda" else t

    def _about_to_send(self, t: Tensor, purpose: str) -> None:
        self.everybody.agree(None, t.numel() if self.everybody is self else 0)
        before = self.messages.get(purpose, Messages())
        self.messages[purpose] = Messages(before.number + 1, before.bytes + t.numel() * t.element_size())

    # ---------------------------------------------------------------- decisions
    def numbers(self, number: float) -> list[float]:
        """Every rank's number."""
        if self.size == 1:
            return [number]
        self.everybody.agree(None)
        return [float(t) for t in self._control([number])]

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        return any(self.numbers(float(flag)))

    def all(self, flag: bool) -> bool:
        """Whether it is so on all ranks."""
        return all(self.numbers(float(flag)))

    def union(self, some: Iterable[str], of: Iterable[str]) -> list[str]:
        """Names that any rank has among its own."""
        some, of = list(some), list(of)
        if self.size == 1:
            return some
        self.everybody.agree(None)
        flags = torch.stack(self._control([float(name in some) for name in of])).amax(0).tolist() if of else []
        return [name for name, flag in zip(of, flags, strict=True) if flag]

    def _control(self, numbers: Sequence[float]) -> list[Tensor]:
        mine = torch.tensor(numbers, dtype=torch.float64, device=self._device)
        found = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(found, mine, group=self._group)
        return found

    def weight(self, own: float | None) -> float | None:
        """What the mean of a mini-batch divides by on all ranks together."""
        return own if own is None or self.size == 1 else math.fsum(self.numbers(own))

    # ---------------------------------------------------------------- failures
    def agree(self, error: BaseException | None, about: int = 0) -> None:
        """Raise on all ranks if one has an error, or if they are about to send different amounts.

        Raises:
            RankFailure: which rank has failed, and why; on that rank its own error.
        """
        if self.size == 1:
            if error is not None:
                raise error
            return
        if error is not None:
            self._alarm.ring()
        told = torch.stack(self._control([float(error is not None), float(about), float(self._alarm.proposed)]))
        self._alarm.agreed = int(told[0, 2])
        failed = [rank for rank, flag in enumerate(told[:, 0].tolist()) if flag]
        if failed:
            self._alarm = Alarm()  # what it rang for is known to all
            messages: list[Any] = [None] * self.size
            dist.all_gather_object(messages, error and f"{type(error).__name__}: {error}", group=self._group)
            if error is not None:
                raise error
            raise RankFailure(f"rank {failed[0]} of {self.size} failed: {messages[failed[0]]}")
        if len(set(told[:, 1].tolist())) > 1:
            raise RankFailure(
                f"the ranks are about to send messages of different sizes ({told[:, 1].long().tolist()} numbers): "
                "their models, parameters or quantities differ. All ranks must ask for the same."
            )

    def listen(self) -> None:
        """Between passes: raise if another rank has failed. Costs no message.

        Raises:
            RankFailure: which rank has failed, and why.
        """
        if self.size > 1 and self._alarm.rings():
            self.agree(None)  # the next message of a rank that has failed is this one

    @contextmanager
    def together(self) -> Iterator[None]:
        """An error or interrupt inside the block is raised on all ranks, whatever they wait for."""
        try:
            yield
            self.agree(None)
        except RankFailure:
            raise
        except BaseException as error:
            self.agree(error)
            raise

    def in_step(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches of an iterable.

        Raises:
            ValueError: where one rank has more than another.
        """
        iterator, missing = iter(batches), object()
        while True:
            batch = next(iterator, missing)
            there = [bool(n) for n in self.numbers(float(batch is not missing))]
            if any(there) and not all(there):
                out = [rank for rank, flag in enumerate(there) if not flag]
                raise ValueError(
                    f"rank(s) {out} have no mini-batch left while others have: every rank needs as many "
                    "(DistributedSampler with drop_last or padding sees to that)."
                )
            if batch is missing:
                return
            yield batch


ALONE = Ranks(alone=True)


def ranks_of(model: nn.Module, process_group: Any = None) -> Ranks:
    """Those that share the batch statistics of a model; ``.everybody``: those over which the batch is spread.

    Args:
        model: one in `DistributedDataParallel`, or with train-mode `SyncBatchNorm`, or any with a group.
        process_group: over whose ranks the batch is spread; default: as the model says.

    Raises:
        ValueError: for a model whose layers take their statistics over different ranks.
    """
    if not isinstance(model, nn.Module):  # told so later
        return ALONE
    wrapped = isinstance(model, nn.parallel.DistributedDataParallel)
    training = [(name, m) for name, m in model.named_modules() if isinstance(m, BATCH_NORMS) and m.training]
    synced = {name: m for name, m in training if isinstance(m, nn.SyncBatchNorm)}
    if not (dist.is_available() and dist.is_initialized()) or not (process_group or wrapped or synced):
        return ALONE
    own = model.process_group if wrapped else next(iter(synced.values())).process_group if synced else None
    everybody = Ranks(process_group or own)
    if not synced:  # statistics of every rank's own samples
        return Ranks(everybody=everybody, alone=True, plain=not wrapped)
    plain = [name for name, m in training if name not in synced]
    if plain:
        raise ValueError(
            f"'{plain[0]}' ({type(dict(training)[plain[0]]).__name__}) takes its statistics from one rank, "
            f"'{next(iter(synced))}' (SyncBatchNorm) from several: what samples mean to one another differs by layer. "
            "Convert all with torch.nn.SyncBatchNorm.convert_sync_batchnorm, or put one kind in eval mode."
        )
    groups = {m.process_group or dist.group.WORLD for m in synced.values()}
    if len(groups) > 1:
        raise ValueError("the SyncBatchNorm layers have different process groups; expected one for all of them.")
    (group,) = groups
    return everybody if group == (process_group or own or dist.group.WORLD) else Ranks(group, everybody)


def wrapper_of(model: nn.Module) -> nn.Module:
    """The `DistributedDataParallel` that runs a model just now; else the model."""
    active: Any = nn.parallel.DistributedDataParallel._active_ddp_module
    return active if active is not None and any(m is model for m in active.modules()) else model


class Sum(torch.autograd.Function):  # noqa: D101
    # Σ over ranks as a node of the graph: of batches of cotangents too, and any number of times differentiable

    is_linear = True

    @staticmethod
    def forward(t, ranks):  # noqa: D102
        return ranks.sum([t], "statistics, backward")[0]

    @staticmethod
    def setup_context(ctx, inputs, output):  # noqa: D102
        ctx.ranks = inputs[1]

    @staticmethod
    def backward(ctx, g):  # noqa: D102
        return Sum.apply(g, ctx.ranks), None

    @staticmethod
    def vmap(info, in_dims, t, ranks):  # noqa: D102
        return Sum.apply(t, ranks), in_dims[0]
