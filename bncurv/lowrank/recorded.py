"""What a recorded graph reads when it is run backward, and whether it is still what it was.

A graph keeps the tensors that it saved, not their values: parameters changed through ``.data``, as by
``vector_to_parameters``, change what it computes without a word. Checkpointed parts keep less: they run the model's
code again, in whatever state and mode the model is then.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from bncurv.marks import RECOMPUTED, metadata
from bncurv.nested import named
from bncurv.precision import full_precision


class Owner(NamedTuple):
    """Whose graph it is, as messages say it: its name, what it can no more, and what to do in two cases."""

    name: str
    refusal: str
    stale: str
    reruns: str


MATRIX_FREE = Owner(
    "This MatrixFreeGGN",
    "has its eigenpairs and no more products",
    "Compute the curvature again; or use LowRankGGN(matrix_free=False), which holds V and does not go stale.",
    "use LowRankGGN(matrix_free=False)",
)
POINT = Owner("This point", "cannot go back to its graph", "Make another one with bncurv.at.", "use bncurv.curvature")


def readable(model: nn.Module, X: Any) -> dict[str, Tensor]:
    """What a graph of ``model(X)`` may read, by what a message calls it."""
    found: dict[str, Tensor] = {f"parameter '{name}'": p for name, p in model.named_parameters()}
    found |= {f"buffer '{name}'": b for name, b in model.named_buffers()}
    known = {id(t) for t in found.values()}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key not in ("_parameters", "_buffers", "_modules"):
                path = f"attribute '{f'{name}.{key}'.lstrip('.')}'"
                found |= {where: t for where, t in named(path, value) if id(t) not in known}
    return found | dict(named("the input", X))


class Reads:
    """The tensors of the model that a graph reads, with copies of their values.

    Args:
        owner: whose graph it is.
        outputs: the graph's outputs.
        parameters: tensors that it is differentiated by.
        named: tensors that may be read, by what a message calls them.
        known: copies made for other graphs, by name; they serve again where the values are the same.
    """

    def __init__(
        self,
        owner: Owner,
        outputs: Iterable[Tensor],
        parameters: Sequence[Tensor],
        named: Mapping[str, Tensor],
        known: dict[str, Tensor],
    ) -> None:
        self._parameters, self._owner = parameters, owner
        leaves, saved, self._reruns = _read_by(outputs)
        watched = {name: t for name, t in named.items() if id(t) in leaves or _storage(t) in saved}
        self._watched = [(name, t, _copy(name, t, known)) for name, t in watched.items()]

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """A block that runs the graph, without hooks and autocast of the day.

        Raises:
            RuntimeError: if the graph is no longer the recorded one.
        """
        for name, t, before in self._watched:
            if not _same(t, before):
                raise RuntimeError(
                    f"{self._owner.name} is stale: {name} has changed since the forward pass, and what is computed "
                    f"runs through its graph, which reads it. {self._owner.stale}"
                )
        if self._reruns:
            raise RuntimeError(
                f"{self._owner.name} {self._owner.refusal}: the network packs what its graph saves "
                "(torch.utils.checkpoint, say), so that the graph would run the model's code again, in the state and "
                f"mode that it has by now. Turn that off, or {self._owner.reruns}."
            )
        try:
            with _hooks_resting(self._parameters), full_precision(self._parameters[0]):
                yield
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            raise RuntimeError(
                f"{self._owner.name} is stale: a tensor that the network's graph reads was modified in place since the "
                f"forward pass, so that PyTorch runs it no more, whatever the values are now. {self._owner.stale}"
            ) from error


@contextmanager
def _hooks_resting(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Hooks that users put on parameters do not act on our passes."""
    tables = [(p._backward_hooks, dict(p._backward_hooks)) for p in parameters if p._backward_hooks]
    try:
        for table, _ in tables:
            table.clear()
        yield
    finally:
        for table, entries in tables:
            table.update(entries)


def _read_by(outputs: Iterable[Tensor]) -> tuple[set[int], set[int], bool]:
    """The graph's leaves (by id), the storages of what its nodes saved, and whether any of it is run again."""
    leaves: set[int] = set()
    saved: set[int] = set()
    stack = [t.grad_fn for t in outputs]
    seen: set[Node | None] = {None}
    reruns = False
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        stack.extend(below for below, _ in node.next_functions)
        leaves.add(id(getattr(node, "variable", None)))
        reruns = reruns or RECOMPUTED in metadata(node)
        if not reruns:  # to look at what is saved would make it
            saved.update(_storage(t) for t in _saved(node))
    return leaves, saved - {0}, reruns


def _saved(node: Node) -> Iterator[Tensor]:
    """Tensors that a node of the graph holds: saved by PyTorch or by a custom function, or on its context."""
    names = [name for name in dir(node) if name.startswith("_saved_")]
    # a batch normalisation, or its backward pass, that does not read its running statistics
    if getattr(node, "_saved_training", False) or getattr(node, "_saved_train", False):
        names = [name for name in names if not name.startswith("_saved_running")]
    values: list[Any] = [getattr(node, name) for name in names]
    values += [getattr(node, "saved_tensors", ()), *getattr(node, "__dict__", {}).values()]
    for value in values:
        for t in value if isinstance(value, tuple | list) else (value,):
            if isinstance(t, Tensor):
                yield t


def _storage(t: Tensor) -> int:
    """Address of a tensor's memory; 0 if it has none of its own."""
    return t.untyped_storage().data_ptr() if t.layout == torch.strided else 0


def _same(t: Tensor, before: Tensor) -> bool:
    where = (t.shape, t.dtype, t.device)
    return where == (before.shape, before.dtype, before.device) and torch.equal(t.detach(), before)


def _copy(name: str, t: Tensor, known: dict[str, Tensor]) -> Tensor:
    if name not in known or not _same(t, known[name]):
        known[name] = t.detach().clone()
    return known[name]
