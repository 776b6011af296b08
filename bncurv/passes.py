"""Backward passes through a recorded graph: several cotangents at once, gates closed or as they are."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from bncurv.graph import Site, Trace
from bncurv.linearity import Ends, Pull, Verdict, examine
from bncurv.probes import pattern
from bncurv.ranks import ALONE, RankFailure, Ranks
from bncurv.slow import warn_slow
from bncurv.structure import Structure


def vjp(outputs: Ends, edges: Ends, cotangents: list[Tensor], singly: bool = False) -> list[Tensor | None]:
    """Backward passes of ``cotangents [q, *output]``, at once or singly: ``[q, *edge]`` per edge, ``None`` for zero."""
    count = len(cotangents[0])
    pull = functools.partial(torch.autograd.grad, retain_graph=True, allow_unused=True)
    if count > 1 and not singly and not torch.is_anomaly_enabled():
        try:
            return _batched(pull, outputs, edges, cotangents)
        except (torch.OutOfMemoryError, RankFailure):
            raise
        except RuntimeError:  # a backward that vmap cannot batch (item(), numpy, anomaly mode): one by one
            pass
    # copies: the backward of `as_strided_scatter` reads a cotangent's storage from its beginning
    rows = [[_strided(g) for g in pull(outputs, edges, [t[i].clone() for t in cotangents])] for i in range(count)]
    stack = torch.stack if count > 1 else lambda g: g[0][None]
    return [None if g[0] is None else stack(g) for g in zip(*rows, strict=True)]


def _batched(pull: Callable[..., tuple], outputs: Ends, edges: Ends, cotangents: list[Tensor]) -> list[Tensor | None]:
    """All cotangents in one vectorised pass; ``torch.vmap`` has rules where ``is_grads_batched`` loops."""
    reached: list[bool] = []

    def one(*cotangent: Tensor) -> list[Tensor]:
        got = pull(outputs, edges, cotangent)
        reached[:] = [g is not None for g in got]
        return [g for g in got if g is not None]

    with _no_hint():
        found = iter(torch.vmap(one)(*cotangents))
    return [next(found) if there else None for there in reached]


@contextmanager
def _no_hint() -> Iterator[None]:
    """Without PyTorch's request to report an operation that it cannot batch: it is none of the user's business."""
    switch: Any = torch._C._functorch
    switch._set_vmap_fallback_warning_enabled(False)
    try:
        yield
    finally:
        switch._set_vmap_fallback_warning_enabled(True)


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
    """Counted and examined backward passes through one traced graph.

    Args:
        output: the model's output ``[N, ...]`` on its graph.
        trace: the traced graph.
        structure: its structure.
        tick: called with the number of backward passes just done.
        quiet: parameters whose rows are nothing but rounding.
        ranks: those that share batch statistics, and go through the same passes unless they divide them.

    Attributes:
        samples: N.
        count: backward passes of the whole batch so far, those of checks left out.
    """

    def __init__(
        self,
        output: Tensor,
        trace: Trace,
        structure: Structure,
        tick: Callable[[int], object] | None = None,
        quiet: Iterable[Tensor] = (),
        ranks: Ranks = ALONE,
    ) -> None:
        self.ranks = ranks
        self.output, self.sites, self.structure = output, trace.sites, structure
        self.samples, self.count, self._tick, self._trace = output.shape[0], 0, tick, trace
        self._gates, self._examined, self._singly = "open", set[str](), False
        self._quiet = {id(p) for p in quiet}
        self._source: object = None

    def vjp(
        self,
        outputs: Tensor | GradientEdge | list[Tensor],
        edges: Ends,
        cotangents: Tensor | list[Tensor],
        beyond: str | None = None,
    ) -> list[Tensor | None]:
        """`vjp`, counted; of one output or of several.

        Args:
            outputs: where the passes start.
            edges: where they are read.
            cotangents: ``[q, *output]`` each.
            beyond: name of a graph beyond the recorded one, whose first passes are to be examined too.

        Raises:
            RuntimeError: where the passes are not those of a linear map.
        """
        several = [cotangents] if isinstance(cotangents, Tensor) else cotangents
        count = len(several[0])
        if not edges or not count:
            return [None] * len(edges)
        self.ranks.everybody.listen()
        self.note(count)
        starts = outputs if isinstance(outputs, list) else [outputs]
        rows = vjp(starts, edges, several, self._singly)
        graph = self._gates if outputs is self.output else beyond
        due = graph is not None and graph not in self._examined and (count > 1 or not self._trace.plain)
        if graph is not None and due and any(id(end) not in self._quiet for end in edges):
            self._examined.add(graph)
            rows = self._examine(starts[0], edges, several[0], rows)
        return rows

    def begin(self, source: object) -> None:
        """The columns of another source follow: a faulty rule for batches may show in these alone."""
        if source is not self._source:
            self._source = source
            self._examined.clear()

    def note(self, count: int) -> None:
        """Count backward passes that were just done."""
        self.count += count
        if self._tick is not None:
            self._tick(count)

    def _examine(
        self, start: Tensor | GradientEdge, edges: Ends, u: Tensor, rows: list[Tensor | None]
    ) -> list[Tensor | None]:
        """The first rows of a graph: as they are, or one by one where that helps, or refused."""
        watched = [i for i, end in enumerate(edges) if id(end) not in self._quiet]
        verdict, pull = self._verdict(start, [edges[i] for i in watched], u, [rows[i] for i in watched])
        if verdict is Verdict.OTHER_ROWS and len(u) > 1:
            rows, self._singly = vjp([start], edges, [u], singly=True), True
            verdict = Verdict.RIGHT
            if not self._trace.plain:
                verdict = examine(pull, u, [rows[i] for i in watched], self.ranks.passing)
            if verdict is Verdict.RIGHT:
                warn_slow(
                    f"PyTorch's batched backward pass (torch.vmap) differs from ordinary ones {self._where(edges)}. "
                    "The passes go one by one: exact, but slower. Replace the operation there to have them at once."
                )
        if verdict is Verdict.NOT_FINITE:
            raise RuntimeError(
                f"The backward pass {self._where(edges)} gives NaN or inf, though the output is finite: the derivative "
                "of an operation there is not defined at these data (a root or norm at 0, 0/0, an overflow). Curvature "
                "is not defined there either; add an eps, or compute for parameters behind it only (params=...)."
            )
        if verdict is not Verdict.RIGHT:
            raise RuntimeError(
                f"The backward pass {self._where(edges)} is not one fixed linear map of the incoming gradient: it "
                "draws random numbers, clips, selects or keeps state (a custom autograd Function, a tensor hook, or "
                "a checkpoint that does not restore the random state). Curvature is not defined there; remove it, "
                "or compute for parameters behind it only (params=...)."
            )
        return rows

    def _verdict(
        self, output: Tensor | GradientEdge, edges: Ends, u: Tensor, rows: list[Tensor | None]
    ) -> tuple[Verdict, Pull]:
        """What ordinary passes say of rows; and such passes."""

        def pull(v: Tensor) -> list[Tensor | None]:
            return vjp([output], edges, [v], singly=True)

        if len(u) == 1 and not self._trace.plain:  # one cotangent tells no linear map from another: beside a second one
            u = torch.cat([u, pattern(u.shape, u)])
            rows = pull(u)
        return examine(pull, u, rows, self.ranks.passing), pull

    def demand_linear(self, edges: Ends, u: Tensor) -> None:
        """Raise RuntimeError unless passes of the output's cotangent ``u`` are those of a linear map."""
        if edges and not self._trace.plain:
            self._examine(self.output, edges, u[None], vjp([self.output], edges, [u[None]]))

    def _where(self, edges: Ends) -> str:
        """The first module whose own passes are not right."""
        for name, shape, edge in self._trace.modules:
            if shape:
                u = pattern((2, *shape), self.output)
                if self._verdict(edge, edges, u, vjp([edge], edges, [u]))[0] is not Verdict.RIGHT:
                    return f"in or before module '{name}'"
        return "behind the last module"

    @contextmanager
    def closed(self, sums: bool = False) -> Iterator[None]:
        """The statistics held constant meanwhile (``sums``: see `Gates`)."""
        before, self._gates = self._gates, "closed, summing" if sums else "closed"
        try:
            with closed_gates(self.sites, sums):
                yield
        finally:
            self._gates = before

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
            d, coupling = delta[j], self.sites[j].coupling
            if d is None:
                a[j] = self.output.new_zeros(self.samples, count, self.structure.width[j])
            else:
                a[j] = coupling.per_sample(d, self.samples, coupling.order)
        return a
