"""Bytes that one backward pass holds at its peak, from the graph alone: a rehearsal of the autograd engine.

The engine runs nodes from the last recorded one on; each holds what has arrived for it until it runs, and what is
asked for stays. Shapes are known without a pass, so that nothing is computed.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Collection
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

KERNEL = 2  # of a node's cotangents, what its kernel takes besides at most (copies in another layout, say)

Edge = tuple[Node, int]


def edge_of(end: GradientEdge | Tensor) -> Edge:
    """Where a gradient is read, as a node and which of its outputs."""
    edge = get_gradient_edge(end) if isinstance(end, Tensor) else end
    return edge.node, edge.output_nr


def size_at(edge: Edge) -> int:
    """Bytes of a cotangent there."""
    node, output_nr = edge
    there: Any = node._input_metadata[output_nr]
    return math.prod(there.shape) * there.dtype.itemsize


def pass_bytes(output: Tensor, ends: Collection[GradientEdge | Tensor]) -> int:
    """Peak of one pass from ``output`` to ``ends``, what is read there included.

    Args:
        output: a tensor on its graph.
        ends: where gradients are read.
    """
    asked, start = {edge_of(end) for end in ends}, edge_of(output)
    below = _needed(start[0], {node for node, _ in asked})
    waiting = Counter(node for nodes in below.values() for node in {n for n, _ in nodes})
    arrived: dict[Node, dict[int, int]] = defaultdict(dict)
    arrived[start[0]][start[1]] = live = size_at(start)
    peak, ready = live, [(-start[0]._sequence_nr(), 0, start[0])]
    while ready:
        *_, node = heapq.heappop(ready)
        inputs = arrived.pop(node)
        kept = sum(size for nr, size in inputs.items() if (node, nr) in asked)
        sizes = [(child, size_at(child)) for child in below[node]]
        made, used = sum(size for _, size in sizes), sum(inputs.values())
        peak = max(peak, live + made + KERNEL * max(used, *(size for _, size in sizes), 0) if sizes else live)
        live += kept - used
        for (child, nr), size in sizes:
            if nr not in arrived[child]:
                arrived[child][nr] = size
                live += size
            else:
                peak = max(peak, live + size)  # before it is added to what is there
        for child in {c for (c, _), _ in sizes}:
            waiting[child] -= 1
            if not waiting[child]:
                heapq.heappush(ready, (-child._sequence_nr(), id(child), child))
    return peak


def _needed(start: Node, ends: set[Node]) -> dict[Node, list[Edge]]:
    """Nodes on the ways to the ends, and what each hands on to."""
    below: dict[Node, list[Edge]] = {}
    useful: set[Node] = set(ends)
    seen: set[Node] = set()
    stack = [(start, False)]
    while stack:
        node, done = stack.pop()
        if done:
            below[node] = [(n, nr) for n, nr in node.next_functions if n is not None and n in useful]
            if below[node]:
                useful.add(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((n, False) for n, _ in node.next_functions if n is not None)
    return {node: edges for node, edges in below.items() if node in useful}


def graph_bytes(output: Tensor) -> int:
    """Bytes of the cotangents at all nodes: about what a graph of the backward pass itself keeps."""
    total, seen, stack = 0, set[Node](), [output.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            total += sum(size_at((node, nr)) for nr in range(len(node._input_metadata)))
            stack.extend(n for n, _ in node.next_functions)
    return total
