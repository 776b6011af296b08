"""What recorded forward passes left on a graph (``record.py``), found again from its output."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node

from bncurv.gate import Coupling
from bncurv.marks import (
    HOOKED,
    LOWERED,
    MARK,
    MODULE,
    RECOMPUTED,
    UNGATED,
    Call,
    Mark,
    edges_below,
    metadata,
)
from bncurv.precision import ulp


@dataclass
class Site:
    """A marked node of a traced graph.

    Attributes:
        edge: where the output's cotangent is read.
        upstream: bit set of the sites that the node's input depends on (bit j: ``trace.sites[j]``).
    """

    mark: Mark
    edge: GradientEdge
    upstream: int

    @property
    def name(self) -> str:
        """Qualified name of the module that it belongs to."""
        return self.mark.coupling.name if self.mark.coupling else self.call.name

    @property
    def call(self) -> Call:
        """The table call of a site that has one (see ``mark.call``)."""
        assert self.mark.call is not None
        return self.mark.call

    @property
    def coupling(self) -> Coupling:
        """The coupling of a site that has one (see ``mark.coupling``)."""
        assert self.mark.coupling is not None
        return self.mark.coupling


@dataclass
class Trace:
    """The marked part of a graph in forward order.

    Attributes:
        sites: the marked nodes.
        modules: outputs of modules: name, shape and edge.
        loose: parameters used outside the marked calls.
        consumers: how many inputs of the graph's nodes a node's output feeds.
        hooked: edges of tensors with a hook of the model's own code.
        ungated: what runs a coupled layer without a gate, a sentence each.
        lowered: modules whose output is in half precision, or was cast down to it.
        plain: whether PyTorch's own nodes are all there is, without hooks seen: their passes are linear.
    """

    sites: list[Site] = field(default_factory=list)
    modules: list[tuple[str, torch.Size, GradientEdge]] = field(default_factory=list)
    loose: list[Tensor] = field(default_factory=list)
    consumers: Counter[tuple[Node, int]] = field(default_factory=Counter)
    hooked: set[tuple[Node, int]] = field(default_factory=set)
    ungated: list[str] = field(default_factory=list)
    lowered: list[str] = field(default_factory=list)
    plain: bool = True


def trace(output: Tensor, wanted: Iterable[Tensor]) -> Trace:
    """Walk the graph behind ``output``.

    Args:
        output: the model's output.
        wanted: the parameters asked for; those reached past the marked calls end in ``Trace.loose``.

    Returns:
        What the forward pass left, in forward order.
    """
    ids = {id(p) for p in wanted}
    found = Trace(loose=[output] if id(output) in ids else [])
    reach: dict[Node, int] = {}  # node → bit set of the sites at or before it
    stack: list[tuple[Node, bool]] = [(output.grad_fn, False)] if output.grad_fn is not None else []
    while stack:
        node, children_done = stack.pop()
        if node in reach:
            continue
        mark: Mark | None = metadata(node).get(MARK)
        edges = mark.below if mark else edges_below(node)
        if not children_done:
            stack.append((node, True))
            stack.extend((e.node, False) for e in edges if e.node not in reach)
            continue
        upstream = 0
        for e in edges:
            upstream |= reach[e.node]
            found.consumers[e.node, e.output_nr] += 1
        if mark:
            found.sites.append(Site(mark, GradientEdge(node, mark.output_nr), upstream))
            upstream |= 1 << (len(found.sites) - 1)
        reach[node] = upstream
        _take_notes(found, node)
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) in ids:
            found.loose.append(variable)
    return found


def _take_notes(found: Trace, node: Node) -> None:
    """What the recorder noted at one node."""
    notes = metadata(node)
    module = notes.get(MODULE)
    if module:
        found.modules.append((module[0], module[1], GradientEdge(node, module[2])))
    found.hooked |= {(node, output_nr) for output_nr in notes.get(HOOKED, ())}
    found.ungated += notes.get(UNGATED, ())
    found.lowered += notes.get(LOWERED, ())
    foreign = isinstance(node, BackwardCFunction) and not getattr(node._forward_cls, "is_linear", False)
    if foreign or HOOKED in notes or RECOMPUTED in notes:
        found.plain = False


def edges(output: Tensor) -> Iterator[tuple[Node, int, str]]:
    """All edges of a graph, from its output on: a node and which of its outputs, and a module whose output lies above.

    A node comes before those that it depends on.
    """
    seen: set[tuple[Node, int]] = set()
    stack = [(output.grad_fn, output.output_nr, "")]
    while stack:
        node, output_nr, module = stack.pop()
        if node is None or (node, output_nr) in seen:
            continue
        seen.add((node, output_nr))
        module = metadata(node).get(MODULE, (module,))[0]
        yield node, output_nr, module
        stack.extend((below, nr, module) for below, nr in node.next_functions)


def leaves(output: Tensor) -> Iterator[Tensor]:
    """The leaves of a graph that need gradients, but for those that our gates put there."""
    gates: set[int] = set()  # each is met after the node that carries its mark
    for node, _, _ in edges(output):
        mark, leaf = metadata(node).get(MARK), getattr(node, "variable", None)
        if mark and mark.coupling:
            gates.add(id(mark.coupling.handle))
        if leaf is not None and id(leaf) not in gates:
            yield leaf


def coarsest(output: Tensor) -> tuple[torch.dtype, str, str]:
    """The dtype of least precision in a graph, at which node (an operation), and the module above it."""
    found = output.dtype, "", ""
    for node, output_nr, module in edges(output):
        dtype = node._input_metadata[output_nr].dtype
        if dtype.is_floating_point or dtype.is_complex:
            if ulp(dtype) > ulp(found[0]) and getattr(node, "variable", None) is None:
                found = dtype, node.name(), module
    return found
