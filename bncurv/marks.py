"""Marks that a recorded forward pass leaves on its graph's nodes (``record.py``), to be found by ``graph.py``."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from bncurv.gate import Coupling
from bncurv.layers.base import Layer
from bncurv.order import Order, span

# Notes in a node's metadata, besides what autograd keeps there
MARK = "bncurv"  # a Mark
MODULE = "bncurv.module"  # of a module's output: its name, shape, output number
MODEL = "bncurv.model"  # of an extended model's output: its Recording
LOSS = "bncurv.loss"  # of an extended loss' value: tokens
RETAINED = "bncurv.retained"  # references to tensors with retain_grad()
HOOKED = "bncurv.hooked"  # output numbers of tensors with a hook
RECOMPUTED = "bncurv.recomputed"  # saved tensors are made again in the backward pass
UNGATED = "bncurv.ungated"  # sentences: which coupled layer runs without a gate, and why
TOUCHED = "bncurv.touched"  # data without gradient went in
LOWERED = "bncurv.lowered"  # modules that computed in half precision


def metadata(node: Node) -> dict[str, Any]:
    """The notes that a graph node carries (torch's stubs take this attribute for a method)."""
    notes: Any = node.metadata
    return notes


def leaves_of(
    t: Tensor, learnt: Container[int], passed: list[Node] | None = None, data: bool = True, most: int = 1000
) -> list[Tensor] | None:
    """The parameters that a tensor is computed from, by operations that leave no mark.

    Args:
        t: the tensor.
        learnt: ids of the parameters.
        passed: takes the nodes of calls on constants, which then count as such operations too.
        data: whether tensors without gradient may have gone in that are no constants.
        most: nodes to look at.

    Returns:
        ``None`` if there is anything else on its graph: a marked call, a hook, another leaf, or too much of it.
    """
    found: dict[int, Tensor] = {}
    seen: set[Node] = set()
    if t.is_leaf:
        return [t] if t.requires_grad and id(t) in learnt else None
    stack = [t.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        notes, variable = metadata(node), getattr(node, "variable", None)
        mark: Mark | None = notes.get(MARK)
        if mark and passed is not None and mark.call and mark.call.constant:
            passed.append(node)
        elif mark or HOOKED in notes or len(seen) > most or (TOUCHED in notes and not data):
            return None
        if variable is not None:
            if id(variable) not in learnt:
                return None
            found[id(variable)] = variable
        stack.extend(below for below, _ in node.next_functions)
    return list(found.values()) or None


def edges_below(node: Node) -> list[GradientEdge]:
    """Where a node's inputs come from."""
    return [GradientEdge(below, output_nr) for below, output_nr in node.next_functions if below is not None]


def plain_tensor(t: Any) -> Any:
    """A tensor without its subclass (images, metadata): the same storage, history and version."""
    plain = not isinstance(t, Tensor) or type(t) in (Tensor, nn.Parameter)
    return t if plain else t.as_subclass(Tensor)


@dataclass(eq=False)
class Call:
    """One use of a table layer: the input it saw and the parameters it used.

    Attributes:
        layer: its row of the table.
        name: qualified name of the module that made the call.
        arguments: of the function, by name.
        parameters: those among the arguments that the output was differentiable by, by role.
        order: of the rows of input and output; ``None``: sample by sample, as far as is known.
        leaves: of a parameter that is computed, W = φ(θ), what it is computed from, by role.
        output: shape of the output.
        versions: of the inputs, to tell later changes in place.
        below: where the inputs come from.
        constant: whether the input is the same whatever the data are, as far as is known.
    """

    layer: Layer
    name: str
    arguments: dict[str, Any]
    parameters: dict[str, Tensor]
    output: torch.Size
    versions: list[int]
    below: list[GradientEdge]
    leaves: dict[str, list[Tensor]] = field(default_factory=dict)
    order: Order | None = None
    constant: bool = False

    @property
    def rows(self) -> int:
        """How many rows its input and output have."""
        return self.output[: self.order.axes if self.order else 1].numel()

    def by_sample(self, delta: Tensor) -> Tensor:
        """Cotangents ``[q, *output]`` with the rows sample by sample."""
        return self.order.by_sample(delta, 1) if self.order else delta

    def span(self, n: slice, samples: int) -> slice:
        """Where the rows of some samples are among those."""
        return span(self.order, n, self.rows, samples)

    def learnt(self) -> Iterator[tuple[str, Tensor]]:
        """Roles and the parameters θ behind them."""
        for role, p in self.parameters.items():
            for leaf in self.leaves.get(role, (p,)):
                yield role, leaf

    def right(self, role: str, rows: slice = slice(None)) -> Tensor | None:
        """Right operand of a parameter product for some ``rows`` of the input, sample by sample."""
        inputs, order = {key: self.arguments[key] for key in self.layer.inputs}, self.order
        some = {key: x.detach() for key, x in inputs.items()}
        sliced = {key: order.by_sample(x, 0, rows) if order else x[rows] for key, x in some.items()}
        right = self.layer.right(role, self.arguments | sliced, sliced.get("input"))
        if right is not None and [x._version for x in inputs.values()] != self.versions:
            raise RuntimeError(
                f"The input of layer '{self.name}' was modified in place after the layer had used it, so its "
                "gradient cannot be computed. Replace the in-place operation after this layer by its "
                "out-of-place form."
            )
        return right


class Mark(NamedTuple):
    """Contents of a marked node: a table call, a coupling, or both; ``rows`` is the output's first axis."""

    call: Call | None = None
    coupling: Coupling | None = None
    output_nr: int = 0
    rows: int = 0
    below: tuple[GradientEdge, ...] = ()

    def take(self, order: Order) -> None:
        """The order of the rows, once it is known."""
        for part in (self.call, self.coupling):
            if part:
                part.order = order

    @property
    def row_axes(self) -> int:
        """How many leading axes may make up the rows."""
        return 1 if self.call is None or self.coupling else self.call.layer.row_axes(self.call.arguments)
