"""A model in another precision for the time of a call: twins of its tensors stand in its modules.

The originals are not cast, since others hold them: optimisers, autograd's accumulators, other threads. A twin stands
wherever a module holds an original: as parameter, as buffer, as plain attribute. Ties stay ties.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bncurv.autocast import keep_off
from bncurv.graph import leaves
from bncurv.loss_calls import cast
from bncurv.loss_calls import twin as twin_of_loss
from bncurv.nested import mapped
from bncurv.slow import listed
from bncurv.undo import Undo
from bncurv.untouched import keep_attributes_of


class Twins:
    """A model and its loss in a dtype, until ``undo`` runs; without a dtype they are as they are.

    Args:
        undo: takes it back; the modules' tables must be noted there already (`leave_as_is`).
        dtype: of all floating-point tensors, also of the data.
        model: whose.
        loss_fn: the loss.

    Attributes:
        loss_fn: to be called in place of the loss.
    """

    def __init__(self, undo: Undo, dtype: torch.dtype | None, model: nn.Module, loss_fn: Callable) -> None:
        self._dtype, self.loss_fn = dtype, loss_fn
        self._twins: dict[int, Tensor] = {}  # by id of the original, which the notes in ``undo`` keep alive
        self._originals: dict[str, Tensor] = {}
        if dtype is None:
            return
        _refuse_scripted(model)
        roots = [root for root in (model, loss_fn) if isinstance(root, nn.Module)]
        keep_off(undo, (t for root in roots for t in root.parameters()))
        modules = [m for root in roots for m in root.modules()]
        named = dict(model.named_parameters())
        for table in (table for m in modules for table in (m._parameters, m._buffers)):
            self._replace(table)
        self._originals = {name: p for name, p in named.items() if id(p) in self._twins}
        keep_attributes_of(undo, modules)
        for m in modules:
            self._replace_attributes(m)
        if isinstance(loss_fn, functools.partial):
            self.loss_fn = twin_of_loss(loss_fn, dtype)

    def _replace(self, table: dict[str, Any]) -> None:
        for key, t in list(table.items()):
            if t is not None and t.is_floating_point() and t.dtype != self._dtype:
                if id(t) not in self._twins:
                    self._twins[id(t)] = _twin(t, self._dtype)
                table[key] = self._twins[id(t)]

    def _replace_attributes(self, module: nn.Module) -> None:
        for key, value in list(vars(module).items()):
            if key not in ("_parameters", "_buffers", "_modules"):
                vars(module)[key] = mapped(self._of, value)

    def _of(self, t: Tensor) -> Tensor:
        return self._twins.get(id(t), t)

    def of(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameters that take part in the call."""
        return {name: self._of(p) for name, p in parameters.items()}

    def data(self, value: Any) -> Any:
        """Floating-point tensors of the data, also in containers, in the dtype."""
        return cast(value, self._dtype)

    @property
    def bytes(self) -> int:
        """Of all twins."""
        return sum(t.numel() * t.element_size() for t in self._twins.values())

    @property
    def others(self) -> dict[str, Tensor]:
        """The originals, by what a message calls them: nothing may depend on them."""
        return {f"{name} (the original)": p for name, p in self._originals.items() if p.requires_grad}

    @contextmanager
    def meeting(self) -> Iterator[None]:
        """A forward pass of the model.

        Raises:
            TypeError: where PyTorch refuses to compute with two precisions at once.
        """
        try:
            yield
        except RuntimeError as error:
            if self._dtype is None or not re.search("same dtype|scalar type|same type|input type", str(error).lower()):
                raise
            raise TypeError(
                f"{self._asked}: two precisions meet in the forward pass ({error}). A cast in the code (.float(), "
                "dtype=...), or a tensor that is no parameter, no buffer, and not in the batch's tuples, lists and "
                "mappings, keeps its own: let it follow x.dtype, or call model.float() or model.double() before."
            ) from error

    @property
    def _asked(self) -> str:
        return f"precision={str(self._dtype).removeprefix('torch.')!r}"

    def check(self, output: Tensor) -> None:
        """Raise TypeError where the output depends on an original."""
        reached = {id(leaf) for leaf in leaves(output)} if self._originals else set()
        held = [name for name, p in self._originals.items() if id(p) in reached]
        if held:
            raise TypeError(
                f"{self._asked}: the model's code reaches the parameter(s) "
                f"{listed(held)} past its modules (a closure, or an object that is no module, holds the tensor), so "
                "they would stay in their own precision. Let the code read them from the module, or call "
                "model.float() or model.double() before."
            )


def _refuse_scripted(model: nn.Module) -> None:
    for name, m in model.named_modules():
        if isinstance(m, torch.jit.ScriptModule):
            raise TypeError(
                f"precision=: module '{name}' ({m.original_name}) is scripted or traced, with its precision fixed in "
                "its code. Use the module that it was made from, or call model.float() or model.double() before."
            )


def _twin(t: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The tensor in another dtype, of the same kind; a buffer keeps its graph, if it has one."""
    if not isinstance(t, nn.Parameter):
        return t.to(dtype)
    data = t.detach().to(dtype)
    plain = type(data) is Tensor
    twin = Tensor._make_subclass(type(t), data, t.requires_grad) if plain else nn.Parameter(data, t.requires_grad)
    vars(twin).update(vars(t))
    return twin
