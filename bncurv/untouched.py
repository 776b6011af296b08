"""Leave no trace: what a call changes is put back, and what others hooked in rests meanwhile (`undo.py`: how)."""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, MutableMapping
from functools import partial
from itertools import chain
from typing import Any, cast

import backpack
import numpy as np
import torch
from backpack.context import CTX
from backpack.utils.hooks import no_op
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode

from bncurv.turns import take_turn
from bncurv.undo import Undo


def leave_as_is(undo: Undo, *roots: nn.Module) -> None:
    """All that a call on the user's model and loss must leave as it is; calls of other threads wait.

    Parameters, their ``.grad`` and hooks, buffers, modes, hooks of modules, and no graph as their attribute; random
    states; PyTorch's modes of this thread; BackPACK's context.
    """
    named = [pair for root in roots for pair in root.named_modules()]
    modules, values = [m for _, m in named], [_held(named, table) for table in ("_parameters", "_buffers")]
    parameters = [p for _, p in values[0]]
    take_turn(undo, "bncurv.curvature")
    keep_modes(undo)
    keep_random_states(undo, parameters)
    rest_backpack(undo)
    leave_inference_mode(undo)
    keep_grads(undo, parameters)
    keep_tables(undo, modules)
    keep_values(undo, chain(*values))
    rest_hooks(undo, parameters, modules)
    rest_storing(undo, modules)


def _held(modules: Iterable[tuple[str, nn.Module]], table: str) -> Collection[tuple[str, Tensor]]:
    """The tensors in a table of modules, each once, with a name."""
    entries = ((f"{name}.{key}".lstrip("."), t) for name, m in modules for key, t in getattr(m, table).items())
    return {id(t): (name, t) for name, t in entries if t is not None}.values()


def keep_modes(undo: Undo) -> None:
    """PyTorch's modes of this thread: gradients, function modes and whether they act, function transforms."""
    grad, modes, depth = torch.is_grad_enabled(), _get_current_function_mode_stack(), _transforms()
    deaf = torch._C._is_torch_function_all_disabled()

    def restore() -> None:
        while _transforms() > depth:
            torch._C._functorch.pop_dynamic_layer_stack()
        cast(Any, torch._C._functorch)._set_vmap_fallback_warning_enabled(True)
        if torch._C._is_torch_function_all_disabled() and not deaf:  # Python 3.10 leaves `with` open after Ctrl-C there
            torch._C.DisableTorchFunction().__exit__(None, None, None)
        if _get_current_function_mode_stack() != modes:
            while _get_current_function_mode_stack():
                _pop_mode()
            for mode in modes:
                _push_mode(mode)
        torch.set_grad_enabled(grad)

    undo.note(restore)


def leave_inference_mode(undo: Undo) -> None:
    """Graphs are recorded outside of it."""
    if torch.is_inference_mode_enabled():
        normal = torch.inference_mode(False)
        undo.note(lambda: normal.__exit__(None, None, None) if vars(normal).get("_inference_mode_context") else None)
        normal.__enter__()


def _transforms() -> int:
    """How many function transforms (vmap and the like) this thread is in."""
    return torch._C._functorch.get_dynamic_layer_stack_depth()


def keep_random_states(undo: Undo, tensors: Iterable[Tensor]) -> None:
    """PyTorch's on the CPU and on the tensors' devices, Python's and NumPy's."""
    undo.note(partial(torch.set_rng_state, torch.get_rng_state()))
    for device in {t.device for t in tensors if t.device.type not in ("cpu", "meta")}:
        one, where = torch.get_device_module(device), () if device.type == "mps" else (device,)
        undo.note(partial(one.set_rng_state, one.get_rng_state(*where), *where))
    undo.note(partial(random.setstate, random.getstate()))
    undo.note(partial(np.random.set_state, np.random.get_state()))


# ------------------------------------------------------------------------ tensors
def keep_attributes(undo: Undo, tensors: Iterable[Tensor]) -> Callable[[], None]:
    """The fields that quantities store on parameters are put back, unless the function that this returns was called."""
    kept: list[bool] = []
    for t in tensors:
        undo.note(partial(_set_attributes, t, dict(vars(t)), kept))
    return lambda: kept.append(True)


def _set_attributes(t: Tensor, attributes: dict[str, Any], kept: list[bool]) -> None:
    if not kept:
        vars(t).clear()
        vars(t).update(attributes)


def keep_grads(undo: Undo, tensors: Iterable[Tensor]) -> None:
    """``.grad``: the same object; meanwhile there is none that could be added to."""
    for t in tensors:
        if t.is_leaf or t.retains_grad:
            undo.note(partial(setattr, t, "grad", t.grad))
            t.grad = None


def keep_tables(undo: Undo, modules: Iterable[nn.Module]) -> None:
    """Which parameters and buffers a module has, and its mode; no attribute is left that holds a graph of ours."""
    for m in modules:
        undo.note(partial(_refill_attributes, vars(m), dict(vars(m)), _holds_graph))
        undo.note(partial(_set_mode, m, m.training))
        for table in (m._parameters, m._buffers):
            if isinstance(table, dict):  # those of script modules are not
                undo.note(partial(_refill, table, dict(table)))


def keep_attributes_of(undo: Undo, modules: Iterable[nn.Module]) -> None:
    """The plain attributes of modules: the same objects."""
    for m in modules:
        undo.note(partial(_refill_attributes, vars(m), dict(vars(m)), lambda value: True))


def _refill_attributes(attributes: dict[str, Any], found: dict[str, Any], only: Callable[[Any], bool]) -> None:
    now = dict(attributes)
    for key in now | found:
        value = found.get(key, found)  # itself: there was none
        if now.get(key, found) is not value and only(now.get(key)):
            attributes.__setitem__(key, value) if key in found else attributes.pop(key, None)


def _holds_graph(value: Any) -> bool:
    return isinstance(value, Tensor) and value.grad_fn is not None


def _set_mode(module: nn.Module, training: bool) -> None:
    if module.training != training:
        module.training = training


def _refill(table: MutableMapping, entries: Mapping) -> None:
    if [(key, id(t)) for key, t in table.items()] != [(key, id(t)) for key, t in entries.items()]:
        table.clear()
        table.update(entries)


def keep_values(undo: Undo, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Values, layouts and storages of tensors, whatever their kind.

    Raises:
        ValueError: for one that has no value yet.
    """
    for name, t in tensors:
        if is_lazy(t):
            raise ValueError(f"'{name}' is not initialised yet (a lazy module). Call the model once on a batch first.")
        found = t.data  # its writes are not counted as changes of t
        undo.note(partial(_put_back, t, found, [(part, part.clone()) for part in _memory(found)]))


def bytes_kept(*roots: nn.Module) -> int:
    """Bytes of what `leave_as_is` keeps: parameters, their ``.grad`` and buffers."""
    named = [pair for root in roots for pair in root.named_modules()]
    parameters, buffers = ([t for _, t in _held(named, table)] for table in ("_parameters", "_buffers"))
    tensors = [*parameters, *buffers, *(p.grad for p in parameters if p.grad is not None)]
    return sum(part.numel() * part.element_size() for t in tensors for part in _memory(t.detach()))


def _plain(t: Tensor) -> bool:
    """Whether a tensor is numbers in a storage, and nothing else."""
    usual = type(t) in (Tensor, nn.Parameter) and t.layout == torch.strided
    return usual and not (t.is_meta or t.is_quantized or t.is_nested)


def _memory(t: Tensor) -> list[Tensor]:
    """Plain tensors that are the memory of a tensor, each cell once."""
    if _plain(t) and t.is_contiguous():
        return [t]
    if t.is_meta or t.is_mkldnn:  # there is none, or none that is accessible
        return []
    if t.is_quantized:
        return [torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.untyped_storage())]
    if t.is_nested and t.layout == torch.strided:
        return list(t.unbind())
    if hasattr(t, "__tensor_flatten__"):
        inside = [getattr(t, name) for name in t.__tensor_flatten__()[0]]
        return [part for inner in inside if isinstance(inner, Tensor) for part in _memory(inner)]
    if t.layout == torch.sparse_coo:
        return [t._indices(), t._values()]
    if t.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [t.crow_indices(), t.col_indices(), t.values()]
    if t.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [t.ccol_indices(), t.row_indices(), t.values()]
    if t.layout != torch.strided or t.is_contiguous():
        return [t]
    span = 1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
    return [t.as_strided((span,), (1,))]  # also of an expanded tensor, whose cells are read several times


def _place(t: Tensor) -> list[Any]:
    """Where the memory of a tensor lies, and how it is read."""
    if _plain(t):
        return [t.data_ptr(), t.shape, t.stride()]
    read = [] if t.layout != torch.strided or t.is_nested else [t.shape, t.stride()]
    return read + [(part.data_ptr(), part.shape) for part in _memory(t)]


def _put_back(t: Tensor, found: Tensor, memory: list[tuple[Tensor, Tensor]]) -> None:
    for part, value in memory:
        if not torch.equal(part, value):
            with torch.no_grad():
                part.copy_(value)
    if _place(t) != _place(found):
        t.data = found


# -------------------------------------------------------------------------- hooks
def rest_hooks(undo: Undo, parameters: Iterable[Tensor], modules: Iterable[nn.Module] = ()) -> None:
    """Hooks of parameters rest; backward hooks of modules stay off the graphs recorded meanwhile."""
    for p in parameters:
        _rest(undo, p._backward_hooks)
        _rest(undo, p._post_accumulate_grad_hooks)
    for m in modules:
        _rest(undo, m._backward_hooks)
        _rest(undo, m._backward_pre_hooks)


def rest_storing(undo: Undo, modules: Iterable[nn.Module]) -> None:
    """BackPACK does not store what its modules take and return."""
    for m in modules:
        _rest(undo, m._forward_hooks, backpack.hook_store_io)


def _rest(undo: Undo, table: MutableMapping | None, only: Callable | None = None) -> None:
    """Take the hooks out of a table, or only this one."""
    resting = [key for key, hook in (table or {}).items() if only in (None, hook)]
    if table is not None and resting:
        undo.note(partial(_refill, table, dict(table)))
        for key in resting:
            del table[key]


def quieten(undo: Undo, message: str) -> None:
    """A warning of PyTorch that begins so is the user's in the user's own pass; in ours it is not shown."""
    entry, filters = ("ignore", re.compile(message), UserWarning, None, 0), cast("list[Any]", warnings.filters)
    undo.note(lambda: filters.remove(entry) if entry in filters else None)
    filters.insert(0, entry)  # `warnings` is not told, or it would forget what it has shown once


def rest_backpack(undo: Undo) -> None:
    """An active context of BackPACK does not act on our passes; what its modules have stored stays."""
    if CTX.active_exts or CTX.extension_hook is not no_op:
        for name, value in (("active_exts", ()), ("extension_hook", no_op), ("retain_graph", True)):
            undo.note(partial(setattr, CTX, name, getattr(CTX, name)))
            setattr(CTX, name, value)
