"""What one forward pass leaves on its autograd graph.

A `Recorder` watches a forward pass without touching the model: it is a ``TorchFunctionMode``, so it sees every
``torch`` call of user code (modules or functional). Calls of the layer table leave a `Call` on the graph node
that they made; train-mode batch normalisations and registered coupled layers run gated and leave a `Coupling`.
Nothing global is kept: the marks live and die with the graph; ``graph.py`` collects them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.overrides import TorchFunctionMode

from bncurv.batchnorm import batch_norm
from bncurv.bodies import ALWAYS, WITH_PARAMETERS
from bncurv.constants import CONSTANT, DATA, OWN, tensors_of
from bncurv.gate import Coupling
from bncurv.layers import EXPANDED, LAYERS
from bncurv.layers.affine import BatchNormTrain
from bncurv.layers.base import Layer
from bncurv.layers.linear import MatMul
from bncurv.marks import (
    HOOKED,
    LOWERED,
    MARK,
    RECOMPUTED,
    TOUCHED,
    UNGATED,
    Call,
    Mark,
    leaves_of,
    metadata,
    plain_tensor,
)
from bncurv.meeting import ELEMENTWISE, EXPANDING, computed, copied, name_of, spread
from bncurv.modes import free, plain_wanted, recomputes
from bncurv.ranks import ALONE, Ranks
from bncurv.sync import arguments_of, sync_batch_norm
from bncurv.watch import Watch

HALF = (torch.float16, torch.bfloat16)
_TRAIN = BatchNormTrain()


def _binds(body: Callable, *args: Any, **kwargs: Any) -> bool:
    """Whether a body takes arguments by these names."""
    try:
        return not kwargs or bool(signature(body).bind(*args, **kwargs))
    except TypeError:
        return False


class Recorder(Watch):
    """Watch the forward pass of ``model`` inside a ``with`` block, and mark what it leaves on the graph.

    Args:
        model: the model that runs in the block.
        private: see `Watch`.
        ranks: those that share the statistics of `torch.nn.SyncBatchNorm`.
    """

    def __init__(self, model: nn.Module, private: bool = False, ranks: Ranks = ALONE) -> None:
        super().__init__(model, private)
        layers = model.modules() if ranks is not ALONE else ()
        self._ranks, self._synced = ranks, [m for m in layers if isinstance(m, nn.SyncBatchNorm)]

    def __enter__(self) -> Watch:
        for m in self._synced:
            vars(m)["forward"] = partial(self._sync_batch_norm, m)  # its own is no torch function, and wants a GPU
        return super().__enter__()

    def stop(self) -> None:
        """Take back all but the function mode itself; may be called again, also if nothing had begun."""
        for m in self._synced:
            if getattr(getattr(vars(m).get("forward"), "func", None), "__self__", None) is self:
                del vars(m)["forward"]
        super().stop()

    def _sync_batch_norm(self, m: nn.SyncBatchNorm, x: Tensor) -> Tensor:
        """In place of the forward of `torch.nn.SyncBatchNorm`."""
        arguments, on_batch = arguments_of(m, x)
        if not on_batch:
            return nnf.batch_norm(**arguments)
        with torch._C.DisableTorchFunction():
            return self._batch_norm(arguments, partial(sync_batch_norm, ranks=self._ranks))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is Tensor.retain_grad:
            return self._retain_grad(args[0])
        if func is Tensor.register_hook and args[0].grad_fn is not None:
            metadata(args[0].grad_fn).setdefault(HOOKED, []).append(args[0].output_nr)
        output = self._run(func, args, kwargs)
        first = output[0] if isinstance(output, tuple) and output else output
        if not isinstance(first, Tensor):
            return output
        if first.grad_fn is not None:
            if first.dtype in HALF:
                metadata(first.grad_fn).setdefault(LOWERED, []).append(self._stack[-1])
            if recomputes():
                metadata(first.grad_fn)[RECOMPUTED] = True
            if any(not t.requires_grad and self._source(t) == DATA for t in tensors_of((*args, *kwargs.values()))):
                metadata(first.grad_fn)[TOUCHED] = True
        elif not first.requires_grad:
            self._constants.note(name_of(func), args, kwargs, output)
        return output

    def _run(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The call itself; marked, where it is one of the table."""
        layer = LAYERS.get(func)
        if not torch.is_grad_enabled():
            return func(*args, **kwargs)
        if layer is None:
            return self._meet(func, args, kwargs)
        arguments = {**dict(zip(layer.arguments, args, strict=False)), **kwargs}
        if isinstance(layer, MatMul) and not (
            layer.accepts(arguments) and self._source(arguments["weight"], data=True) == OWN
        ):
            return self._meet(func, args, kwargs)  # by einsum, where it has a parameter elsewhere
        coupled = (
            func is nnf.batch_norm and arguments.get("training", False) and self._source(arguments["input"]) != OWN
        )
        affine = (arguments.get("weight"), arguments.get("bias"))
        reason = plain_wanted(arguments["input"], *affine) if coupled else None
        if coupled and not reason:
            return self._batch_norm(arguments)
        output = func(*args, **kwargs)
        if func is nnf.linear and output._is_view() and free():  # an in-place operation would replace its node
            output = torch.ops.aten._unsafe_view(output, output.shape)
        if reason and output.grad_fn is not None:
            metadata(output.grad_fn).setdefault(UNGATED, []).append(
                f"module '{self._stack[-1]}' is a BatchNorm inside {reason}, where it cannot be cut at its statistics."
            )
        if layer.accepts(arguments):
            self._mark(output, layer, arguments)
        return output

    def _meet(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """A call of no row of the table; parameters that meet data there are marked."""
        name, body = name_of(func), self._body(func, args, kwargs)
        if body is not None:
            with self._inside():
                output = body(*args, **kwargs)
            if output is not NotImplemented:
                return output
        if name in ELEMENTWISE and free():
            args, kwargs = spread(args, kwargs, self._learnt, self._source, self._mark_copies)
        output = func(*args, **kwargs)
        if name in EXPANDING and free():
            copied(output, args[0], self._learnt, self._mark_copies)
        return output

    def _body(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Callable | None:
        """What is run in place of a function."""
        always, some = ALWAYS.get(func), WITH_PARAMETERS.get(func)
        if always is not None:
            return always if free() and _binds(always, *args, **kwargs) else None
        tensors = list(tensors_of((*args, *kwargs.values()))) if some else []
        if some is None or not any(self._source(t, data=True) for t in tensors if t.requires_grad) or not free():
            return None
        axes = max(t.dim() for t in tensors) if len(tensors) > 1 else 0

        def own(t: Tensor) -> bool:
            repeated = axes == 0 or t.dim() < axes or t.shape[:1] == (1,)
            return computed(t, self._learnt, repeated) if t.requires_grad else id(t) in self._fixed

        return partial(some, own) if _binds(some, own, *args, **kwargs) else None

    def _source(self, x: Tensor, data: bool = False) -> int:
        """Whether data, constants or parameters alone went into a tensor; buffers count as parameters.

        With ``data`` also one that data without gradient went into is computed from parameters, as weights may be.
        """
        if not x.requires_grad:
            return OWN if id(x) in self._fixed else CONSTANT if x in self._constants else DATA
        passed: list[Node] = []
        return DATA if leaves_of(x, self._learnt, passed, data) is None else CONSTANT if passed else OWN

    @contextmanager
    def _inside(self) -> Iterator[None]:
        """See the calls inside of a function too: the mode alone again, the watch goes on."""
        TorchFunctionMode.__enter__(self)
        try:
            yield
        finally:
            TorchFunctionMode.__exit__(self, None, None, None)

    def _mark_copies(self, rows: Tensor, p: Tensor, constant: bool = False) -> None:
        self._mark(rows, EXPANDED, {"weight": p, "shape": rows.shape}, constant=constant)

    def _batch_norm(self, arguments: dict[str, Any], layer: Callable = batch_norm) -> Tensor:
        kind, arguments = type(arguments["input"]), {role: plain_tensor(t) for role, t in arguments.items()}
        x, affine = arguments["input"], {role: arguments.get(role) for role in ("weight", "bias")}
        fused = all(p is None or p.is_leaf for p in affine.values())
        if not fused:  # a computed weight must stay on the graph: normalise, then multiply
            arguments = {**arguments, "weight": None, "bias": None}
        y, coupling, statistics = layer(arguments, self._stack[-1], self._gates)
        self._mark(y, _TRAIN, {**arguments, **statistics}, coupling)
        if not fused:
            axes = (1, -1) + (1,) * (x.dim() - 2)
            for role, combine in (("weight", torch.mul), ("bias", torch.add)):
                p = affine[role]
                both = (y,) if p is None else (y, p.view(axes))
                both, _ = spread(both, {}, self._learnt, self._source, self._mark_copies)
                y = y if p is None else combine(*both)
        return y if isinstance(y, kind) else y.as_subclass(kind)

    def _mark(
        self,
        output: Tensor,
        layer: Layer,
        arguments: dict[str, Any],
        coupling: Coupling | None = None,
        constant: bool = False,
    ) -> None:
        given = {role: arguments.get(role) for role in layer.parameters}
        learnt = {role: p for role, p in given.items() if p is not None and p.requires_grad}
        if output.grad_fn is None or output.dim() == 0 or not (learnt or coupling):  # a single number has no rows
            return
        sources = [DATA if coupling else self._source(arguments[key]) for key in layer.inputs]
        if sources and min(sources) == OWN:  # a part of what computes another parameter
            return
        computed = {role: leaves_of(p, self._learnt) for role, p in learnt.items() if not p.is_leaf}
        leaves = {role: found for role, found in computed.items() if found is not None}
        others = [learnt.pop(role) for role, found in computed.items() if found is None]  # from data: no parameters
        if not (learnt or coupling):
            return
        arguments = {key: plain_tensor(t) for key, t in arguments.items()}
        inputs = [arguments[key] for key in layer.inputs]
        below = [get_gradient_edge(x) for x in (*inputs, *others) if x.requires_grad]
        versions = [x._version for x in inputs]
        call = None
        if learnt:
            call = Call(layer, self._stack[-1], arguments, learnt, output.shape, versions, below, leaves)
            call.constant = constant or bool(sources) and min(sources) == CONSTANT
        metadata(output.grad_fn)[MARK] = Mark(call, coupling, output.output_nr, len(output), tuple(below))
