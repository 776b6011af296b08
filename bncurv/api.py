"""`curvature`: exact curvature of an untouched model on a batch or a DataLoader, in one call."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from bncurv.engine import Engine, Mixed
from bncurv.foreign import set_aside
from bncurv.loss_at_batch import LossAtBatch
from bncurv.losses import find_loss
from bncurv.quantities import Quantity
from bncurv.record import Recorder


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


def compute(
    output: Tensor,
    at_batch: LossAtBatch,
    wanted: dict[str, Tensor],
    quantities: Iterable[Quantity],
    method: str,
    chunk_size: int | None,
    bar: tqdm,
    tol: float = 0.0,
) -> tuple[dict[str, Any], Engine]:
    """All quantities at one recorded forward pass, nothing computed twice.

    Args:
        output: the model's output on its graph.
        at_batch: the loss' gradient and factor there.
        wanted: parameters by name.
        quantities: what to compute.
        method: which way, see `curvature`.
        chunk_size: see `curvature`.
        bar: progress bar, counted in backward passes.
        tol: see `curvature`.

    Returns:
        For each quantity's field what its `finish` gave, and the engine that made them.
    """
    quantities = list(quantities)
    asked = {q.field: q.sources(at_batch, output, wanted) for q in quantities}
    sources = {key: source for wants in asked.values() for key, source in wants.items()}
    columns = {key: s.columns_per_sample for key, s in sources.items() if not isinstance(s, Mixed)}
    total = sum(columns.values())
    if any(q.coupled_only for q in quantities) and method == "auto":
        method = "coupled"
    keep_own = any(q.coupled_only for q in quantities)
    squares = {key for key in columns if all(q.squares_only for q in quantities if key in asked[q.field])}
    engine = Engine(output, wanted, method, total, chunk_size, bar.update, tol, keep_own, squares)
    mixed = sum(len(s.cotangents) for s in sources.values() if isinstance(s, Mixed))
    bar.total = (bar.total or 0) + engine.planned(total) + mixed
    states = {q.field: q.start(wanted, len(output), columns) for q in quantities}
    for key, rows in engine.pull(sources):
        for q in quantities:
            if key in asked[q.field]:
                q.add(states[q.field], key, rows)
    return {q.field: q.finish(states[q.field]) for q in quantities}, engine


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
    batches: list[dict[str, Any]] = []
    passes, way, error = 0, "", {}
    bar = tqdm(disable=not progress, unit="pass", desc="backward passes", leave=False)
    for q in quantities:
        q.begin(graph_survives=True)
    with torch.inference_mode(False), set_aside(model.parameters(), model.modules()), left_as_is(model), bar:
        for X, y in _batches(data):
            with torch.enable_grad(), Recorder(model, private=True):
                output = _forward(getattr(model, "_orig_mod", model), X, y, wanted)  # torch.compile: the eager code
            at_batch = LossAtBatch(loss_fn, output, y.to(output.device))
            fields, engine = compute(output, at_batch, wanted, quantities, method, chunk_size, bar, tol)
            batches.append(fields)
            passes, way, error = passes + engine.passes, engine.way, engine.error
            del output, at_batch, engine
        if not batches:
            raise ValueError("data is empty: expected a batch (X, y) or an iterable with at least one such pair.")
        merged: dict[str, Any] = {}
        for q in quantities:
            merged |= q.merge([b[q.field] for b in batches])
    return Results(merged, way, passes, len(batches), error)


def check_quantities(quantities: Iterable[Any]) -> None:
    """Raise TypeError/ValueError unless these are distinct bncurv quantities, at least one."""
    names = []
    for q in quantities:
        if not isinstance(q, Quantity):
            hint = f"{q.__name__}()" if isinstance(q, type) else "e.g. bncurv.DiagGGNExact()"
            raise TypeError(f"quantity {q!r} is not an instance of a bncurv quantity; expected {hint}.")
        names.append(q.field)
    if not names:
        raise ValueError("no quantity asked for; pass at least one, e.g. bncurv.DiagGGNExact().")
    if len(set(names)) < len(names):
        raise ValueError(f"quantities {names} name the same field twice; ask for each once.")


def check_options(method: str, tol: float, chunk_size: int | None) -> None:
    """Raise ValueError for a method, tolerance or chunk size that means nothing."""
    if method not in ("auto", "coupled", "dense"):
        raise ValueError(f"method={method!r}; expected 'auto', 'coupled' or 'dense'.")
    if isinstance(tol, bool) or not isinstance(tol, int | float) or not 0 <= tol < 1:
        raise ValueError(f"tol={tol!r}; expected a relative tolerance, 0 <= tol < 1.")
    if chunk_size is not None and (not isinstance(chunk_size, int) or isinstance(chunk_size, bool) or chunk_size < 1):
        raise ValueError(f"chunk_size={chunk_size!r}; expected None or a positive integer (vectors held at once).")


def select_parameters(model: nn.Module, params: Iterable[str] | None) -> dict[str, Tensor]:
    """Parameters by name: those named in ``params``, or all that require grad.

    Raises:
        ValueError: for an unknown name, a frozen parameter, or none at all.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; expected a torch.nn.Module.")
    named = dict(model.named_parameters())
    if isinstance(params, str):
        raise TypeError(f"params={params!r} is a string; expected an iterable of names, e.g. params=[{params!r}].")
    if not (params is None or isinstance(params, Iterable)):
        raise TypeError(f"params={params!r}; expected an iterable of parameter names.")
    names = [n for n, p in named.items() if p.requires_grad] if params is None else list(params)
    if not names and params is not None:
        raise ValueError("params is empty; expected at least one name, or None for all that require grad.")
    for name in names:
        if name not in named:
            close = difflib.get_close_matches(str(name), named, n=3) or list(named)[:3]
            raise ValueError(
                f"params names '{name}', which {type(model).__name__} does not have; did you mean {close}?"
            )
        if not named[name].requires_grad:
            raise ValueError(f"params names '{name}', which has requires_grad=False; set it to True, or leave it out.")
    if not names:
        raise ValueError(
            f"{type(model).__name__} has no parameter that requires grad; there is nothing to compute curvature for."
        )
    return {name: named[name] for name in names}


def _batches(data: Any) -> Iterator[tuple[Any, Tensor]]:
    """One pair, or an iterable of pairs."""
    if isinstance(data, tuple | list) and len(data) == 2 and any(isinstance(t, Tensor) for t in data):
        data = [data]
    if not isinstance(data, Iterable):
        raise TypeError(f"data is {type(data).__name__}; expected one batch (X, y), or an iterable of such pairs.")
    for pair in data:
        if not (isinstance(pair, tuple | list) and len(pair) == 2):
            length = f" of length {len(pair)}" if isinstance(pair, tuple | list) else ""
            raise TypeError(f"data yields {type(pair).__name__}{length}; expected pairs (X, y) with a tensor y.")
        if not isinstance(pair[1], Tensor):
            raise TypeError(f"y is {type(pair[1]).__name__}; expected a tensor, the second of a pair (X, y).")
        yield pair[0], pair[1]


def _forward(model: nn.Module, X: Any, y: Tensor, wanted: dict[str, Tensor]) -> Tensor:
    device = next(iter(wanted.values())).device
    if isinstance(X, Tensor):
        if X.shape[:1] != y.shape[:1]:
            raise ValueError(
                f"X has shape {tuple(X.shape)} and y has shape {tuple(y.shape)}; expected equal first axes."
            )
        if X.numel() == 0:
            raise ValueError(f"the batch is empty: X has shape {tuple(X.shape)}; expected at least one sample.")
        if X.is_floating_point() and not bool(X.isfinite().all()):
            bad = (~X.isfinite()).reshape(len(X), -1).any(1).nonzero().flatten().tolist()
            raise ValueError(f"X has NaN or inf in sample(s) {bad[:5]}; curvature is undefined there. Remove them.")
        X = X.to(device)
    output = model(X)
    check_output(output, y, wanted)
    return output


def check_output(output: Any, y: Tensor, wanted: Mapping[str, Tensor]) -> None:
    """Raise unless the model's output can be differentiated sample by sample.

    Raises:
        TypeError: not a tensor, or in half precision.
        ValueError: no batch axis of y's length, empty, not finite, or without parameters behind it.
    """
    if not isinstance(output, Tensor):
        raise TypeError(
            f"the model returns {type(output).__name__}; expected one tensor [N, ...]. Wrap the model so that its "
            "forward returns the tensor that the loss takes (e.g. drop auxiliary outputs)."
        )
    n = y.shape[0] if y.dim() else 0
    if output.dim() == 0 or output.shape[0] != n:
        raise ValueError(
            f"the model's output has shape {tuple(output.shape)} and y has shape {tuple(y.shape)}; expected the batch "
            "first and of equal length in both."
        )
    if n == 0:
        raise ValueError(f"the batch is empty: the output has shape {tuple(output.shape)}; expected N > 0 samples.")
    kinds = {str(p.dtype) for p in wanted.values()} | {str(output.dtype)}
    if kinds not in ({"torch.float32"}, {"torch.float64"}):
        raise TypeError(
            f"parameters and output have dtypes {sorted(kinds)}; expected all float32 or all float64 (half precision "
            "and autocast lose the digits that curvature needs). Call model.float() or model.double(), and X likewise."
        )
    if not bool(output.isfinite().all()):
        raise ValueError(
            "the model's output contains NaN or inf, so it has no curvature; check the inputs and parameters."
        )
    if not output.requires_grad:
        raise ValueError("the model's output depends on no parameter that requires grad (forward under no_grad?).")


@contextmanager
def left_as_is(model: nn.Module) -> Iterator[None]:
    """Restore the model's buffers and the random state on leaving the block, whatever happens."""
    tables = [(m._buffers, dict(m._buffers)) for m in model.modules() if isinstance(m._buffers, dict)]
    values = [(b, b.clone()) for b in model.buffers()]
    devices = {p.device for p in model.parameters() if p.is_cuda}
    with torch.random.fork_rng(devices=[d.index for d in devices]):
        try:
            yield
        finally:
            for table, entries in tables:
                table.clear()
                table.update(entries)
            with torch.no_grad():
                for buffer, value in values:  # by value: batch_norm bumps no version of its running statistics
                    if not torch.equal(buffer, value):
                        buffer.data.copy_(value)
