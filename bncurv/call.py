"""A call: its forward passes, recorded and checked one by one, and what is computed of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bncurv.bars import tqdm
from bncurv.batch import Limit, Merged, compute
from bncurv.blocks import Batch
from bncurv.budget import bytes_of
from bncurv.checks import (
    check_finite,
    check_input,
    check_modules,
    check_options,
    check_output,
    check_own,
    dtype_of,
)
from bncurv.chosen import Choice, select_parameters
from bncurv.division import Division
from bncurv.graph import trace
from bncurv.heads import as_one
from bncurv.inputs import Forward, batches, number_of_batches, output_and_target
from bncurv.loss_at_batch import LossAtBatch
from bncurv.losses import check_loss, name_of
from bncurv.lowrank.recorded import readable
from bncurv.marks import plain_tensor
from bncurv.nested import moved, tensors
from bncurv.placement import check_placement, device_of, values_needed
from bncurv.quantities import Quantity
from bncurv.ranks import Ranks
from bncurv.record import Recorder
from bncurv.results import Results
from bncurv.sampling import generator_of_call
from bncurv.shares import Weights
from bncurv.slow import kinds_of
from bncurv.spread import Indices
from bncurv.twins import Twins
from bncurv.undo import Undo
from bncurv.untouched import bytes_kept, leave_as_is


@dataclass(frozen=True)
class Options:
    """How to compute, see `bncurv.curvature`."""

    method: str = "auto"
    tol: float = 0.0
    chunk_size: int | None = None
    progress: bool = False
    memory: int | str | None = None


class Call:
    """What is differentiated by what; checked here.

    Args:
        model: see `bncurv.curvature`, as all others.
        loss_fn: the loss.
        forward: the forward pass, where it is the user's.
        params: the parameters.
        precision: of the copies that stand in.
        options: how to compute.
        ranks: over which the batch is spread.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Tensor], Tensor],
        forward: Forward | None,
        params: Choice | Iterable[Choice] | None,
        precision: str | torch.dtype | None,
        options: Options,
        ranks: Ranks,
    ) -> None:
        check_options(options.method, options.tol, options.chunk_size)
        self._memory = bytes_of(options.memory)
        self._dtype = dtype_of(precision)
        check_loss(loss_fn)
        self._selected = select_parameters(model, params)
        check_modules(model)
        check_placement(model, self._selected)
        self._model, self._loss_fn, self._forward, self._ranks = model, loss_fn, forward, ranks
        self._options, self._indices = options, Indices(ranks.everybody)

    def leave_as_is(self, undo: Undo) -> None:
        """All that is the user's."""
        roots = [self._model, *([self._loss_fn] if isinstance(self._loss_fn, nn.Module) else [])]
        leave_as_is(undo, *roots)
        self._copies = bytes_kept(*roots) if self._memory else 0

    def record(self, undo: Undo, data: Any) -> Iterator[Batch]:
        """The mini-batches, each recorded when it is asked for."""
        model, loss_fn, ranks, everybody = self._model, self._loss_fn, self._ranks, self._ranks.everybody
        memo, largest = dict[str, Any](), 0
        twins = Twins(undo, self._dtype, model, loss_fn)
        self._copies, self._several = self._copies + twins.bytes, number_of_batches(data, self._forward)
        wanted, own = twins.of(self._selected), list(model.parameters())
        recorder = Recorder(model, private=True, ranks=ranks)
        undo.note(recorder.stop)
        division = Division(ranks, model, loss_fn)
        for X, y in everybody.in_step(batches(data, self._forward)):
            shared = division.of((X, y))
            with torch.enable_grad(), twins.meeting(), values_needed(model):
                X, y = twins.data((X, y))
                output, of_output, y = _forward(model, recorder, twins.loss_fn, X, y, self._forward, wanted, largest)
                twins.check(output)
                check_own(output, wanted, [*own, *tensors(X)])
            y, all_of_them, largest = moved(y, output.device), wanted | twins.others, max(largest, len(output))
            scale = 1 / shared.parts.size  # as DistributedDataParallel trains: the mean of the ranks' losses
            loss = LossAtBatch(of_output, output, y, scale, hooked=True, empty_ok=True, parameters=all_of_them)
            division.check(loss)
            reads, kinds = partial(readable, model, X), partial(kinds_of, model)
            spread, traced = self._indices.of(len(output), shared), trace(output, wanted.values())
            batch = Batch(
                output, loss, wanted, traced, memo=memo, reads=reads, ranks=shared, spread=spread, kinds=kinds,
                memory=self._memory,
            )  # fmt: skip
            found = [batch]
            del output, loss, traced, batch  # nothing here keeps the graph
            yield found.pop()

    def compute(self, undo: Undo, recorded: Iterable[Batch], quantities: Sequence[Quantity]) -> Results:
        """All quantities at these mini-batches."""
        everybody, options = self._ranks.everybody, self._options
        merged, weights, passes, way = Merged(quantities, name_of(self._loss_fn)), Weights(), 0, ""
        limit: Limit | None = None
        bar = tqdm(disable=not options.progress, unit="pass", desc="backward passes", leave=False)
        undo.note(bar.close)
        device = next(iter(self._selected.values())).device
        with torch.random.fork_rng(devices=[]):  # a look ahead: the forward passes find the random state as it is
            generator = generator_of_call(quantities, device, everybody.rank)
        for batch in recorded:
            generator = generator if merged.batches else batch.ranks.helpers.alike(generator)
            at = replace(batch, generator=generator)
            if self._memory:
                limit = limit or Limit(self._memory, quantities, self._copies, self._several)
            left = self._several - merged.batches
            parts, engine = compute(at, quantities, bar, options.method, options.chunk_size, options.tol, limit, left)
            merged.add(parts, everybody.weight(weights.of(batch.loss)), engine.error)
            passes, way = passes + engine.passes, engine.way
            del batch, at, parts, engine
        fields, samples = merged.fields(), self._indices.found()
        shapes = {name: p.shape for name, p in self._selected.items()}
        return Results(fields, way, passes, merged.batches, merged.error, samples, dict(everybody.messages), shapes)


def _forward(
    model: nn.Module,
    recorder: Recorder,
    loss_fn: Callable,
    X: Any,
    y: Any,
    forward: Forward | None,
    wanted: Mapping[str, Tensor],
    largest: int,
) -> tuple[Tensor, Callable, Any]:
    """The model's output as one tensor, checked, the loss of that, and the target; X goes to the model's device."""
    masks = check_input(X, "X" if forward is None else "batch")
    model = getattr(model, "_orig_mod", model)  # torch.compile: the eager code
    if isinstance(model, nn.parallel.DistributedDataParallel):  # its own messages are not wanted
        model = model.module
    device = device_of(model)
    try:
        with recorder:  # nothing else: it slows every call of PyTorch
            output, y = output_and_target(model, X, y, forward, device)
            output, loss_fn = as_one(output, loss_fn)
    except ValueError as error:
        count = next((len(t) for t in tensors((y, X)) if t.dim()), 0)
        if not count < largest:
            raise
        raise ValueError(
            f"{error} This is a mini-batch of {count or 'unknown'} sample(s) after one of {largest}: if it is too "
            "small, leave it out with DataLoader(..., drop_last=True)."
        ) from error
    check_output(output, y, wanted, X)
    check_finite(output, wanted, masks)
    return plain_tensor(output), loss_fn, y
