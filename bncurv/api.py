"""`curvature`: exact curvature of an untouched model on a batch or a DataLoader, in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from bncurv.batch import Merged, compute
from bncurv.blocks import Batch
from bncurv.checks import (
    check_finite,
    check_input,
    check_modules,
    check_options,
    check_output,
    check_own,
    check_quantities,
    dtype_of,
)
from bncurv.chosen import Choice, select_parameters
from bncurv.division import Division
from bncurv.graph import trace
from bncurv.heads import as_one
from bncurv.inputs import Forward, batches, output_and_target
from bncurv.loss_at_batch import LossAtBatch
from bncurv.losses import check_loss, name_of
from bncurv.lowrank.recorded import readable
from bncurv.marks import plain_tensor
from bncurv.nested import moved, tensors
from bncurv.placement import check_placement, device_of, values_needed
from bncurv.quantities import Quantity
from bncurv.ranks import Messages, ranks_of
from bncurv.record import Recorder
from bncurv.sampling import generator_of_call
from bncurv.shares import Weights
from bncurv.slow import kinds_of
from bncurv.spread import Indices
from bncurv.twins import Twins
from bncurv.undo import Undo, without_trace
from bncurv.untouched import leave_as_is


@dataclass(frozen=True)
class Results:
    """What `curvature` returns: the quantities as attributes, each by its field name.

    ``results.diag_ggn_exact["fc.weight"]`` is the field of `DiagGGNExact` for the parameter ``fc.weight``.

    Attributes:
        fields: field name → {parameter name → tensor}.
        method: the way taken, ``"coupled"`` or ``"dense"`` (of the last mini-batch); ``"sampled"`` where all that was
            asked is an estimate that went neither.
        passes: backward passes of a whole batch that it took, over all mini-batches; over several ranks this one's.
        batches: number of mini-batches.
        error: with ``tol > 0``, the estimated Frobenius norm of what was dropped from V, by parameter name, over all
            columns of all mini-batches at their weights; empty where nothing was. A diagonal of the GGN with trace t is
            off by at most ``2 √t error + error²`` in the sum of its entries.
        samples: which samples the rows of per-component results are: all in order; over several ranks this rank's,
            counted mini-batch by mini-batch and in each of them rank by rank.
        messages: over several ranks, what was sent: purpose → number, and bytes of this rank's.
    """

    fields: Mapping[str, Any]
    method: str
    passes: int
    batches: int = 1
    error: Mapping[str, float] = field(default_factory=dict)
    samples: Tensor | None = None
    messages: Mapping[str, Messages] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        fields = self.__dict__.get("fields", {})
        if name in fields:
            return fields[name]
        raise AttributeError(f"these results hold {', '.join(sorted(fields))}; '{name}' was not asked for")

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self.fields]

    def __repr__(self) -> str:
        held = ", ".join(sorted(self.fields))
        return f"Results({held}; method={self.method!r}, passes={self.passes}, batches={self.batches})"


def curvature(
    model: nn.Module,
    loss_fn: Callable[[Any, Tensor], Tensor],
    data: Any,
    *quantities: Quantity,
    params: Choice | Iterable[Choice] | None = None,
    forward: Forward | None = None,
    method: str = "auto",
    tol: float = 0.0,
    chunk_size: int | None = None,
    progress: bool = False,
    process_group: Any = None,
    precision: str | torch.dtype | None = None,
) -> Results:
    """Exact curvature of ``loss_fn(model(X), y)`` in the mode that the model is in, BatchNorm coupling included.

    The model is used as it is: nothing is extended, converted or copied. Parameters, ``.grad``, buffers (running
    statistics), hooks, modes and random states (PyTorch's, Python's, NumPy's) are left as they were, also after an
    exception or Ctrl-C at any moment. Only a Monte-Carlo quantity without a generator of its own moves torch's global
    random state on, by one draw. Calls in several threads wait for one another.

    Args:
        model: any module whose output is a tensor with the batch first; or a tuple, list or dict of such tensors, for
            a loss that takes it.
        loss_fn: a differentiable scalar function, or module, of output and y. For the GGN it must be a sum or mean
            over samples, convex in the output, and twice differentiable (checked at every batch);
            ``CrossEntropyLoss``, ``MSELoss``, ``BCEWithLogitsLoss``, their functions and what `register_loss` was
            given have closed forms, all others a Hessian by autograd. For quantities of the gradient alone it need
            not be convex and may compare samples, since g_n = (∂F_n/∂θ)ᵀ ∂L/∂F_n is the part of ∇L that passes
            through output n. Forward hooks of the module take part; parameters of the loss are held constant, and no
            results are made for them.
        data: one batch ``(X, y)``, or an iterable of such pairs (a ``DataLoader``). Output and y have the batch first,
            and equally many samples; y is a tensor, or a tuple, list or dict of tensors for a loss that takes it. X is
            the model's one argument; a tuple or list that cannot be, by number or annotation, is given as
            ``model(*X)`` (where both may be meant, an error asks), and a dictionary whose keys are names of the
            model's arguments as ``model(**X)``.
            Several batches give the curvature of the loss of all their samples: a mean is weighted by what the loss
            divides by in each batch (samples, entries, class weights of the targets that count), sums are added.
            Without BatchNorm that is what one batch of all samples gives. With BatchNorm every mini-batch has its own
            statistics, so this average is another matrix than that of the union, and the composition of the batches is
            part of the definition. Per-component quantities are concatenated in order, at the same weights: they still
            sum to that loss' gradient.
        *quantities: what to compute, e.g. ``DiagGGNExact()``.
        params: the parameters to compute for: names, globs (``"layer1.*"``), modules, parameters, a predicate
            ``f(name, p) -> bool``, or an iterable of these; default: all that require grad.
        forward: ``f(model, batch) -> (output, target)``, for batches that are no pairs (X, y) and models that return
            more than the loss takes. Then a tensor, tuple, object with ``keys`` (a mapping, a batch of graphs) or
            object that is no iterable is one batch, and any other iterable (a list, a ``DataLoader``) yields batches;
            f moves them to the model's device itself.
        method: ``"coupled"``: cut the graph at the batch statistics, cost linear in N. ``"dense"``: one backward pass
            per component, cost quadratic in N. ``"auto"``: the cheaper one by a cost estimate. All are exact.
        tol: largest relative tail of the coupling coefficients that the coupled way may drop (0: none, exact). Saves
            passes where N·C is large; the error it made is estimated in ``Results.error``.
        chunk_size: most vectors (batch-sized cotangents, or rows ``[*p]``) held at once; default: chosen by bytes.
        progress: show a progress bar, in backward passes.
        process_group: over whose ranks the batch is spread. Default: that of a ``DistributedDataParallel`` model; else
            that of its train-mode ``SyncBatchNorm`` layers; else this process alone. Every rank calls, with its own
            samples; or with a model that is neither of these and the same batches as all others: then the work is
            divided. See docs/several_processes.md.
        precision: ``"float32"`` or ``"float64"``: the curvature of the model as it would be in that precision
            (``copy.deepcopy(model).float()`` or ``.double()``, run on data of that dtype), also of one in half
            precision or with autocast regions, which are refused without it. For the call, copies in that dtype stand
            in the modules in place of parameters and buffers, and autocast is off; results have that dtype.

    Returns:
        Frozen results; ``results.<field>[name]`` per quantity.

    Raises:
        TypeError, ValueError: for input that has no such curvature; the message says what arrived and what to do.
        RuntimeError: with ``method="coupled"`` where samples are mixed other than by a known coupled layer.

    Example:
        >>> import torch, bncurv
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
        >>> X, y = torch.randn(8, 4), torch.randint(2, (8,))
        >>> res = bncurv.curvature(model, torch.nn.CrossEntropyLoss(), (X, y), bncurv.DiagGGNExact())
        >>> res.diag_ggn_exact["0.weight"].shape
        torch.Size([3, 4])
    """
    ranks = ranks_of(model, process_group)
    everybody = ranks.everybody
    with everybody.together():
        check_quantities(quantities)
        check_options(method, tol, chunk_size)
        dtype = dtype_of(precision)
        check_loss(loss_fn)
        selected = select_parameters(model, params)
        check_modules(model)
        check_placement(model, selected)

        def run(undo: Undo) -> Results:
            merged, weights, memo = Merged(quantities, name_of(loss_fn)), Weights(), dict[str, Any]()
            passes, way, largest, indices = 0, "", 0, Indices(everybody)
            bar = tqdm(disable=not progress, unit="pass", desc="backward passes", leave=False)
            undo.note(bar.close)
            leave_as_is(undo, model, *([loss_fn] if isinstance(loss_fn, nn.Module) else []))
            twins = Twins(undo, dtype, model, loss_fn)
            wanted, own = twins.of(selected), list(model.parameters())
            recorder = Recorder(model, private=True, ranks=ranks)
            undo.note(recorder.stop)
            division = Division(ranks, model, loss_fn)
            with torch.random.fork_rng(devices=[]):  # a look ahead: the forward passes find the random state as it is
                generator = generator_of_call(quantities, next(iter(wanted.values())).device, everybody.rank)
            for X, y in everybody.in_step(batches(data, forward)):
                shared = division.of((X, y))
                with torch.enable_grad(), twins.meeting(), values_needed(model), recorder:
                    X, y = twins.data((X, y))
                    output, of_output, y = _forward(model, twins.loss_fn, X, y, forward, wanted, largest)
                    twins.check(output)
                    check_own(output, wanted, [*own, *tensors(X)])
                division.check(output)
                y, all_of_them = moved(y, output.device), wanted | twins.others
                scale = 1 / shared.parts.size  # as DistributedDataParallel trains: the mean of the ranks' losses
                loss = LossAtBatch(of_output, output, y, scale, hooked=True, empty_ok=True, parameters=all_of_them)
                traced = trace(output, wanted.values())
                reads, kinds = partial(readable, model, X), partial(kinds_of, model)
                generator = generator if merged.batches else shared.helpers.alike(generator)
                batch = Batch(
                    output, loss, wanted, traced, memo=memo, generator=generator, reads=reads, ranks=shared,
                    spread=indices.of(len(output), shared), kinds=kinds,
                )  # fmt: skip
                parts, engine = compute(batch, quantities, bar, method, chunk_size, tol)
                merged.add(parts, everybody.weight(weights.of(loss)), engine.error)
                passes, way, largest = passes + engine.passes, engine.way, max(largest, len(output))
                del output, loss, traced, batch, parts, engine
            fields = merged.fields()
            return Results(fields, way, passes, merged.batches, merged.error, indices.found(), dict(everybody.messages))

        results = without_trace(run)
        generator_of_call(quantities, torch.device("cpu"))  # moves the global random state on
        return results


def _forward(
    model: nn.Module,
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
    try:
        output, y = output_and_target(model, X, y, forward, device_of(model))
    except ValueError as error:
        count = next((len(t) for t in tensors((y, X)) if t.dim()), 0)
        if not count < largest:
            raise
        raise ValueError(
            f"{error} This is a mini-batch of {count or 'unknown'} sample(s) after one of {largest}: if it is too "
            "small, leave it out with DataLoader(..., drop_last=True)."
        ) from error
    output, loss_fn = as_one(output, loss_fn)
    check_output(output, y, wanted, X)
    check_finite(output, wanted, masks)
    return plain_tensor(output), loss_fn, y
