"""Backward passes through a recorded graph: several cotangents at once, gates closed or as they are."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from bncurv.graph import Site, Trace
from bncurv.structure import Structure

Ends = Sequence[GradientEdge | Tensor]


def vjp(outputs: Ends, edges: Ends, cotangents: list[Tensor]) -> list[Tensor | None]:
    """Backward passes of ``cotangents [q, *output]`` at once: ``[q, *edge]`` per edge, ``None`` for zero."""
    count = len(cotangents[0])
    pull = functools.partial(torch.autograd.grad, retain_graph=True, allow_unused=True)
    if count > 1 and not torch.is_anomaly_enabled():
        try:
            return _batched(pull, outputs, edges, cotangents)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # a backward that vmap cannot batch (item(), numpy, anomaly mode): one by one
            pass
    rows = [[_strided(g) for g in pull(outputs, edges, [t[i] for t in cotangents])] for i in range(count)]
    stack = torch.stack if count > 1 else lambda g: g[0][None]
    return [None if g[0] is None else stack(g) for g in zip(*rows, strict=True)]


def _batched(pull: Callable[..., tuple], outputs: Ends, edges: Ends, cotangents: list[Tensor]) -> list[Tensor | None]:
    """All cotangents in one vectorised pass; ``torch.vmap`` has rules where ``is_grads_batched`` loops."""
    reached: list[bool] = []

    def one(*cotangent: Tensor) -> list[Tensor]:
        got = pull(outputs, edges, cotangent)
        reached[:] = [g is not None for g in got]
        return [g for g in got if g is not None]

    found = iter(torch.vmap(one)(*cotangents))
    return [next(found) if there else None for there in reached]


def _strided(g: Tensor | None) -> Tensor | None:
    """An embedding's sparse gradient as an ordinary tensor."""
    return g if g is None or g.layout == torch.strided else g.to_dense()


@contextmanager
def closed_gates(sites: list[Site], sums: bool = False) -> Iterator[None]:
    """Hold the statistics of a graph constant; also where several forward passes meet."""
    gates = {s.coupling.gates for s in sites if s.mark.coupling}
    for g in gates:
        g.closed, g.sums = True, sums
    try:
        yield
    finally:
        for g in gates:
            g.closed = g.sums = False


class Passes:
    """Counted backward passes through one traced graph.

    Args:
        output: the model's output ``[N, ...]`` on its graph.
        trace: the traced graph.
        structure: its structure.
        tick: called with the number of backward passes just done.

    Attributes:
        samples: N.
        count: backward passes of the whole batch so far.
    """

    def __init__(self, output: Tensor, trace: Trace, structure: Structure, tick: Callable[[int], object]) -> None:
        self.output, self.sites, self.structure = output, trace.sites, structure
        self.samples, self.count, self._tick = output.shape[0], 0, tick

    def vjp(
        self, outputs: Tensor | GradientEdge | list[Tensor], edges: Ends, cotangents: Tensor | list[Tensor]
    ) -> list[Tensor | None]:
        """`vjp`, counted; of one output or of several."""
        several = [cotangents] if isinstance(cotangents, Tensor) else cotangents
        count = len(several[0])
        if not edges or not count:
            return [None] * len(edges)
        self.count += count
        self._tick(count)
        return vjp(outputs if isinstance(outputs, list) else [outputs], edges, several)

    def closed(self, sums: bool = False) -> AbstractContextManager[None]:
        """The statistics held constant meanwhile (``sums``: see `Gates`)."""
        return closed_gates(self.sites, sums)

    def closed_vjp(
        self, output: Tensor | GradientEdge, sites: list[int], cotangents: Tensor
    ) -> dict[int, Tensor | None]:
        """Cotangents at ``sites`` with the statistics held constant, by site."""
        with self.closed():
            return dict(zip(sites, self.vjp(output, self.structure.edges(sites), cotangents), strict=True))

    def coefficients(self, delta: Mapping[int, Tensor | None], count: int) -> dict[int, Tensor]:
        """A of every coupling before the chain through lower statistics, ``[n, c, R]``, from ``count`` cotangents."""
        a: dict[int, Tensor] = {}
        for j in self.structure.couplings:
            d = delta[j]
            if d is None:
                a[j] = self.output.new_zeros(self.samples, count, self.structure.width[j])
            else:
                a[j] = self.sites[j].coupling.per_sample(d, self.samples)
        return a
