"""`curvature`: exact curvature of an untouched model on a batch or a DataLoader, in one call; `at`: in several."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from bncurv.call import Call, Options
from bncurv.checks import check_quantities
from bncurv.chosen import Choice
from bncurv.inputs import Forward
from bncurv.point import Point
from bncurv.quantities import Quantity
from bncurv.ranks import ranks_of
from bncurv.results import Results
from bncurv.sampling import generator_of_call
from bncurv.undo import Undo, without_trace


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
    memory: int | str | None = None,
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
        tol: largest relative tail of the coupling, A weighted by ‖P‖, that the coupled way may drop (0: none, exact).
            Saves passes where N·C is large; the error it made is estimated in ``Results.error``.
        chunk_size: most vectors (batch-sized cotangents, or rows ``[*p]``) held at once; default: chosen by bytes.
        memory: most bytes that the call may hold above the recorded forward pass and its graph: a number, or a string
            such as ``"2GB"`` or ``"512MiB"`` (KB, MB, GB, TB, KiB, MiB, GiB, TiB). Everything that bncurv holds counts:
            results, copies of the model's values, what is kept for reuse, and what backward passes need on their way;
            on CPUs also up to 24 MiB for holes that freed memory leaves. Not the model, the data, the graph, what
            checkpoints compute again, what a `LowRank` computes when it is asked later, and workspaces of libraries.
            Chunks, groups of parameters, rows or graph for `LowRankGGN`, and the way are chosen by it; ``chunk_size``
            may ask for less. Default: no limit to all of it together, sizes that are fast.
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
        TypeError, ValueError: for input that has no such curvature; the message says what arrived and what to do. Where
            ``memory`` is not enough, it names the smallest number of bytes that would do.
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
    with ranks.everybody.together():
        check_quantities(quantities)
        options = Options(method, tol, chunk_size, progress, memory)
        call = Call(model, loss_fn, forward, params, precision, options, ranks)

        def run(undo: Undo) -> Results:
            call.leave_as_is(undo)
            return call.compute(undo, call.record(undo, data), quantities)

        results = without_trace(run)
        generator_of_call(quantities, torch.device("cpu"))  # moves the global random state on
        return results


def at(
    model: nn.Module,
    loss_fn: Callable[[Any, Tensor], Tensor],
    data: Any,
    *,
    params: Choice | Iterable[Choice] | None = None,
    forward: Forward | None = None,
    method: str = "auto",
    tol: float = 0.0,
    chunk_size: int | None = None,
    progress: bool = False,
    process_group: Any = None,
    precision: str | torch.dtype | None = None,
) -> Point:
    """A batch recorded once, for several calls: what one has done, the next ones need not do again.

    The forward pass is run and checked now. Each ``point(*quantities)`` gives what `curvature` would; rows of V (where
    they are small) and coupling directions (where they fit together) are kept for the next. Between the calls the model
    is yours, untouched. The graph, and copies of what it reads, live until the block ends. There is no ``memory``: what
    later calls will ask for, and what is best kept for them, is not known.

    Args:
        model: as for `curvature`, and so are all others.
        loss_fn: the loss.
        data: one batch, or an iterable of batches: the graphs of all of them are kept.
        params: the parameters to compute for.
        forward: ``f(model, batch) -> (output, target)``.
        method: ``"auto"``, ``"coupled"`` or ``"dense"``.
        tol: relative tail of the coupling that may be dropped.
        chunk_size: most vectors held at once.
        progress: show a progress bar for each call.
        process_group: over whose ranks the batch is spread.
        precision: of copies that stand in for parameters and buffers.

    Returns:
        A `Point`: ``with bncurv.at(...) as point:``.

    Raises:
        RuntimeError: by a call at a point that is closed, or no longer what was recorded; else as `curvature`.

    Example:
        >>> import torch, bncurv
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
        >>> X, y = torch.randn(8, 4), torch.randint(2, (8,))
        >>> with bncurv.at(model, torch.nn.CrossEntropyLoss(), (X, y)) as point:
        ...     eigenvalues = point(bncurv.LowRankGGN()).ggn.eigenvalues
        ...     point(bncurv.DiagGGNExact()).passes
        0
    """
    ranks = ranks_of(model, process_group)
    with ranks.everybody.together():
        options = Options(method, tol, chunk_size, progress)
        call = Call(model, loss_fn, forward, params, precision, options, ranks)
    return Point(call, data, ranks)
