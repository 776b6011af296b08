"""`curvature`: exact curvature of an untouched model on a batch or a DataLoader, in one call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from bncurv.batch import Merged, compute
from bncurv.blocks import Batch
from bncurv.checks import batches, check_input, check_options, check_output, check_quantities, select_parameters
from bncurv.graph import trace
from bncurv.loss_at_batch import LossAtBatch
from bncurv.losses import find_loss
from bncurv.marks import plain_tensor
from bncurv.quantities import Quantity
from bncurv.record import Recorder
from bncurv.untouched import left_as_is, set_aside


@dataclass(frozen=True)
class Results:
    """What `curvature` returns: the quantities as attributes, each by its field name.

    ``results.diag_ggn_exact["fc.weight"]`` is the field of `DiagGGNExact` for the parameter ``fc.weight``.

    Attributes:
        fields: field name → {parameter name → tensor}.
        method: the way taken, ``"coupled"`` or ``"dense"`` (of the last mini-batch).
        passes: backward passes of a whole batch that it took, over all mini-batches.
        batches: number of mini-batches averaged over.
        error: with ``tol > 0``, the estimated Frobenius norm of what was dropped from V, by parameter name and summed
            over all columns of the last mini-batch; empty where nothing was. A diagonal of the GGN with trace t is off
            by at most ``2 √t error + error²`` in the sum of its entries.
    """

    fields: Mapping[str, Any]
    method: str
    passes: int
    batches: int = 1
    error: Mapping[str, float] = field(default_factory=dict)

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
    loss_fn: nn.Module,
    data: tuple[Any, Tensor] | Iterable[tuple[Any, Tensor]],
    *quantities: Quantity,
    params: Iterable[str] | None = None,
    method: str = "auto",
    tol: float = 0.0,
    chunk_size: int | None = None,
    progress: bool = False,
) -> Results:
    """Exact curvature of ``loss_fn(model(X), y)`` in the mode that the model is in, BatchNorm coupling included.

    The model is used as it is: nothing is extended, converted or copied, and parameters, ``.grad``, buffers (running
    statistics), hooks, modes and the random state are left as they were, also after an exception.

    Args:
        model: any module whose output is a tensor with the batch first.
        loss_fn: ``CrossEntropyLoss``, ``MSELoss`` or ``BCEWithLogitsLoss`` with reduction ``"mean"`` or ``"sum"``.
        data: one batch ``(X, y)``, or an iterable of such pairs (a ``DataLoader``). Over several batches each quantity
            is the average of the mini-batch quantities; every mini-batch has its own statistics, so this is another
            matrix than that of the union of the batches. Per-component quantities are concatenated in order and
            divided by the number of batches, so that they still sum to the averaged gradient.
        *quantities: what to compute, e.g. ``DiagGGNExact()``.
        params: names of the parameters to compute for; default: all that require grad.
        method: ``"coupled"``: cut the graph at the batch statistics, cost linear in N. ``"dense"``: one backward pass
            per component, cost quadratic in N. ``"auto"``: the cheaper one by a cost estimate. All are exact.
        tol: largest relative tail of the coupling coefficients that the coupled way may drop (0: none, exact). Saves
            passes where N·C is large; the error it made is estimated in ``Results.error``.
        chunk_size: most vectors (batch-sized cotangents, or rows ``[*p]``) held at once; default: chosen by bytes.
        progress: show a progress bar, in backward passes.

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
    check_quantities(quantities)
    check_options(method, tol, chunk_size)
    find_loss(loss_fn)
    wanted = select_parameters(model, params)
    merged, memo = Merged(quantities), dict[str, Any]()
    passes, way, error = 0, "", {}
    bar = tqdm(disable=not progress, unit="pass", desc="backward passes", leave=False)
    with torch.inference_mode(False), set_aside(model.parameters(), model.modules()), left_as_is(model), bar:
        for X, y in batches(data):
            with torch.enable_grad(), Recorder(model, private=True):
                output = _forward(getattr(model, "_orig_mod", model), X, y, wanted)  # torch.compile: the eager code
            loss = LossAtBatch(loss_fn, output, y.to(output.device))
            batch = Batch(output, loss, wanted, trace(output, wanted.values()), memo=memo)
            parts, engine = compute(batch, quantities, bar, method, chunk_size, tol)
            merged.add(parts, 1.0)
            passes, way, error = passes + engine.passes, engine.way, engine.error
            del output, loss, batch, parts, engine
        if not merged.batches:
            raise ValueError("data is empty: expected a batch (X, y) or an iterable with at least one such pair.")
        fields = merged.fields()
    return Results(fields, way, passes, merged.batches, error)


def _forward(model: nn.Module, X: Any, y: Tensor, wanted: Mapping[str, Tensor]) -> Tensor:
    """The model's output, checked; a tensor X goes to the parameters' device."""
    check_input(X, y)
    output = model(X.to(next(iter(wanted.values())).device) if isinstance(X, Tensor) else X)
    check_output(output, y, wanted)
    return plain_tensor(output)
