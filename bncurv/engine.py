"""The engine: pull columns of the loss back through a batch, V[k] = own[k] + Σ_q A[q, k] P[q].

Glossary: one meaning per letter in the whole package.

    N, n, m   samples of the mini-batch
    C, c      columns per sample (classes of the loss' factor); also "channel" in statistics.py
    K, k      components, k = (n, c), n slowest: a column of S, non-zero only in row n of the output
    R, q      coupling directions: coordinates of the batch statistics; q also counts batched cotangents
    p         entries of one parameter;  D all of them
    S         symmetric factor of the loss Hessian, S Sᵀ = ∇²_F L.  The scale of the loss' reduction (1/N of a mean)
              sits inside S and inside the gradient, nowhere else
    V[k]      J_θFᵀ s_k, one row per component, J the Jacobian of the whole batch;  GGN = Σ_k V[k] V[k]ᵀ
    own[k]    the part of V[k] with the batch statistics held constant: involves sample n alone
    A[q, k]   (d F / d statistics)ᵀ s_k: read off the same pass, then carried down through the lower statistics
    B[q, q']  ∂ statistics_q / ∂ statistics_q', those of a lower layer, all others held constant
    P[q]      ∂ statistics_q / ∂θ with the statistics of lower layers held constant: one backward pass each

All passes run with closed gates. The coupled way takes C passes for own and A and R passes for P and B, whatever N is;
R = Σ 2·channels over the BatchNorms, and a direction passes only the layers below its BatchNorm. The dense way
backpropagates all N·C columns with open gates. Both are exact.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from bncurv.certificate import find_mixing
from bncurv.costs import Costs, chunks
from bncurv.record import Site, Trace, trace


class SlowPathWarning(UserWarning):
    """The result is exact, but a slower way than usual was taken; the message says why and for what."""


class Source(Protocol):
    """Columns to pull back: ``columns_per_sample`` of them for each sample."""

    @property
    def columns_per_sample(self) -> int: ...

    def columns(self, c: slice) -> Tensor:
        """Columns ``c`` of all samples, each in its own row: ``[c, n, *output]``."""
        ...


@dataclass(frozen=True)
class Mixed:
    """Whole-batch cotangents to pull back, ``[q, n, *output]``; their rows of V come as one block ``[1, q, *p]``."""

    cotangents: Tensor


class Rows(NamedTuple):
    """A block of V: ``values [n, c, *p]`` of parameter ``name`` for the samples ``n`` and columns ``c``."""

    name: str
    values: Tensor
    n: slice
    c: slice


class Engine:
    """Pulls columns back through one recorded forward pass.

    Args:
        output: the model's output ``[N, ...]`` on its graph.
        wanted: parameters by name.
        method: ``"auto"``, ``"coupled"`` or ``"dense"``.
        columns: total number of columns per sample that will be asked for; informs ``"auto"``.
        chunk_size: most vectors (cotangents of the batch, rows of V) held at once; ``None`` chooses by bytes.
        tick: called with the number of backward passes just done.

    Attributes:
        way: ``"coupled"`` or ``"dense"``.
        passes: backward passes of the whole batch so far.

    Raises:
        RuntimeError: with ``method="coupled"`` if samples are mixed by something that is not a known coupling.
    """

    def __init__(
        self,
        output: Tensor,
        wanted: dict[str, Tensor],
        method: str = "auto",
        columns: int = 1,
        chunk_size: int | None = None,
        tick: Callable[[int], object] = int,
    ) -> None:
        self.output, self.wanted, self.passes, self._tick = output, wanted, 0, tick
        self.samples = output.shape[0]
        self.chunk_size = chunk_size
        self.trace: Trace = trace(output, wanted.values())
        self.uses = self._find_uses()
        self.couplings = [j for j, s in enumerate(self.trace.sites) if s.mark.coupling and self._calls_in(s.upstream)]
        self._columns = columns
        self.costs = Costs(self, columns)
        self._directions: tuple[dict[str, Tensor], dict[int, dict[int, Tensor]]] | None = None
        self._slow = self._without_product()
        self.way = self._choose(method)

    # ---------------------------------------------------------------- what the graph holds
    def _find_uses(self) -> dict[str, list[tuple[int, str]]]:
        """Parameter name → the (site, role) pairs that use it; parameters used elsewhere have none."""
        names = {id(p): name for name, p in self.wanted.items()}
        loose = {id(p) for p in self.trace.loose}
        uses: dict[str, list[tuple[int, str]]] = {}
        for j, site in enumerate(self.trace.sites):
            for role, p in site.mark.call.parameters if site.mark.call else ():
                if id(p) in names and id(p) not in loose:
                    uses.setdefault(names[id(p)], []).append((j, role))
        return uses

    def _calls_in(self, sites: int) -> list[int]:
        """Sites of a bit set that hold a wanted parameter's call, in forward order."""
        wanted = {j for uses in self.uses.values() for j, _ in uses}
        return [j for j in sorted(wanted) if sites >> j & 1]

    def _without_product(self) -> list[str]:
        """Parameters that must go the dense way: used outside the table, or in a layer with no sample axis."""
        loose = {id(p) for p in self.trace.loose}
        slow = [name for name, p in self.wanted.items() if id(p) in loose]
        for name, uses in self.uses.items():
            if any(self.trace.sites[j].mark.call.output[0] % self.samples for j, _ in uses):
                slow.append(name)
        return slow

    def _site_edges(self, sites: list[int]) -> list[GradientEdge]:
        return [self.trace.sites[j].edge for j in sites]

    def _couplings_in(self, sites: int) -> list[int]:
        return [j for j in self.couplings if sites >> j & 1]

    # ---------------------------------------------------------------- which way
    def _choose(self, method: str) -> str:
        if method not in ("auto", "coupled", "dense"):
            raise ValueError(f"method={method!r}; expected 'auto', 'coupled' or 'dense'.")
        if method == "dense":
            return "dense"
        if self._slow and self._columns:
            warnings.warn(
                f"No parameter product for {', '.join(map(repr, self._slow))} (used outside the layer table): exact, "
                "but by one backward pass per component (slow). Leave them out with params=..., or add the layer "
                "with bncurv.register_layer.",
                SlowPathWarning,
                stacklevel=4,
            )
        if method == "auto" and (not self._columns or self.costs.dense() <= self.costs.coupled(self._slow)):
            return "dense"
        problem = self._mixing()
        if problem and method == "coupled":
            raise RuntimeError(f"method='coupled' does not apply: {problem} Use method='auto' or method='dense'.")
        if problem:
            warnings.warn(f"{problem} Taking the dense way: exact, one backward pass per component.", SlowPathWarning,
                          stacklevel=4)  # fmt: skip
        return "dense" if problem else "coupled"

    def _mixing(self) -> str | None:
        for site in self.trace.sites:
            if site.mark.coupling and site.mark.rows % self.samples:
                return (
                    f"the input of '{site.mark.coupling.name}' has first axis {site.mark.rows}, which is no multiple "
                    f"of the {self.samples} samples, so its rows cannot be told apart by sample."
                )
        with self._gates("closed"):
            return find_mixing(self.output, self.trace, self._calls_in(-1), self.samples)

    def _gates(self, state: str):
        return _set_gates(self.trace.sites, state)

    def planned(self, columns: int) -> int:
        """Backward passes that ``columns`` columns per sample will take."""
        if not columns:
            return 0
        if self.way == "dense":
            return self.samples * columns
        directions = sum(self.trace.sites[j].mark.coupling.statistics.numel() for j in self.couplings)
        return columns + directions + (self.samples * columns if self._slow else 0)

    # ---------------------------------------------------------------- backward passes
    def vjp(self, output: Tensor, edges: list, cotangents: Tensor) -> list[Tensor | None]:
        """Backward passes of ``cotangents [q, *output]`` at once: ``[q, *edge]`` per edge, ``None`` for zero."""
        if not edges:
            return []
        self.passes += len(cotangents)
        self._tick(len(cotangents))
        if len(cotangents) == 1:
            got = torch.autograd.grad(output, edges, cotangents[0], retain_graph=True, allow_unused=True)
            return [None if g is None else g[None] for g in got]
        return list(
            torch.autograd.grad(
                output, edges, cotangents, retain_graph=True, allow_unused=True, is_grads_batched=True
            )
        )

    def _summed(self, sites: list[int], deltas: list[Tensor | None]) -> dict[str, Tensor]:
        """Parameter products summed over the batch: ``[q, *p]`` per parameter used at ``sites``."""
        cotangent = dict(zip(sites, deltas, strict=True))
        out: dict[str, Tensor] = {}
        for name, uses in self.uses.items():
            for j, role in uses:
                delta = cotangent.get(j)
                if delta is None:
                    continue
                call = self.trace.sites[j].mark.call
                rows = call.layer.unfold(call.product(role, delta).summed(), self.wanted[name].shape)
                out[name] = out[name] + rows if name in out else rows
        return out

    def pull_mixed(self, cotangents: Tensor, names: list[str] | None = None) -> dict[str, Tensor]:
        """``J_θFᵀ`` of whole-batch cotangents ``[q, n, *output]``, coupling included: ``[q, *p]`` per parameter."""
        names = list(self.wanted) if names is None else names
        loose = [name for name in names if name not in self.uses]
        sites = sorted({j for name in names for j, _ in self.uses.get(name, ())})
        q = len(cotangents)
        with torch.no_grad(), self._gates("open"):
            edges = self._site_edges(sites) + [self.wanted[name] for name in loose]
            got = self.vjp(self.output, edges, cotangents)
            summed = self._summed(sites, got[: len(sites)])
        summed |= {name: g for name, g in zip(loose, got[len(sites) :], strict=True) if g is not None}
        return {name: summed.get(name, self._zeros(name, q)) for name in names}

    def _zeros(self, name: str, *lead: int) -> Tensor:
        p = self.wanted[name]
        return torch.zeros((*lead, *p.shape), dtype=self.output.dtype, device=p.device)

    # ---------------------------------------------------------------- the two ways
    @torch.no_grad()
    def pull(self, source: Source | Mixed) -> Iterator[Rows]:
        """All rows of V of a source, in blocks."""
        if isinstance(source, Mixed):
            for q in chunks(len(source.cotangents), self.chunk_size or self.costs.dense_chunk()):
                for name, rows in self.pull_mixed(source.cotangents[q]).items():
                    yield Rows(name, rows[None], slice(0, 1), q)
            return
        if self.way == "dense":
            yield from self._dense(source, list(self.wanted))
            return
        yield from self._coupled(source)
        if self._slow:
            yield from self._dense(source, self._slow)

    def _dense(self, source: Source, names: list[str]) -> Iterator[Rows]:
        size = self.chunk_size or self.costs.dense_chunk()
        per_sample = source.columns_per_sample
        for c in chunks(per_sample, size):
            columns = source.columns(c)
            count = columns.shape[0]
            for n in chunks(self.samples, max(1, size // count)):
                # cotangent (n, c) is column c in row n, zero elsewhere
                index = torch.arange(n.start, n.stop, device=columns.device)
                spread = columns.new_zeros(len(index), *columns.shape)
                spread[torch.arange(len(index)), :, index] = columns[:, index].transpose(0, 1)
                for name, rows in self.pull_mixed(spread.flatten(0, 1), names).items():
                    yield Rows(name, rows.unflatten(0, (len(index), count)), n, c)

    def _coupled(self, source: Source) -> Iterator[Rows]:
        names = [name for name in self.wanted if name not in self._slow]
        calls = sorted({j for name in names for j, _ in self.uses.get(name, ())})
        sites = sorted({*calls, *self.couplings})
        products, _ = self._pull_directions()
        for c in chunks(source.columns_per_sample, self.chunk_size or self.costs.column_chunk()):
            columns = source.columns(c)
            with self._gates("closed"):
                delta = dict(zip(sites, self.vjp(self.output, self._site_edges(sites), columns), strict=True))
            a = self._coefficients(delta, columns.shape[0])
            for name in names:
                A = torch.cat([a[j] for j in self._above(name)], -1) if self._above(name) else None  # [n, c, R]
                for n in self._row_chunks(name, columns.shape[0]):
                    rows = self._own(name, delta, n, columns.shape[0])
                    if A is not None:
                        # V[k] = own[k] + Σ_q A[q, k] P[q]
                        flat = rows.view(-1, self.wanted[name].numel())
                        flat.addmm_(A[n].flatten(0, 1), products[name].reshape(-1, flat.shape[1]))
                    yield Rows(name, rows, n, c)

    def _own(self, name: str, delta: dict[int, Tensor | None], n: slice, count: int) -> Tensor:
        """Rows of V with the statistics held constant, ``[n, c, *p]``, contiguous."""
        total = None
        for j, role in self.uses.get(name, ()):
            if delta[j] is None:
                continue
            call = self.trace.sites[j].mark.call
            t = call.output[0] // self.samples  # rows of the layer's input per sample
            rows = call.product(role, delta[j], slice(n.start * t, n.stop * t)).per_sample()
            if t > 1:
                rows = rows.unflatten(0, (-1, t)).sum(1)
            rows = call.layer.unfold(rows, self.wanted[name].shape)
            total = rows if total is None else total + rows
        return self._zeros(name, n.stop - n.start, count) if total is None else total.contiguous()

    def _above(self, name: str) -> list[int]:
        """Couplings whose statistics depend on a parameter, in forward order."""
        bits = sum({1 << j for j, _ in self.uses.get(name, ())})
        return [j for j in self.couplings if self.trace.sites[j].upstream & bits]

    def _coefficients(self, delta: dict[int, Tensor | None], count: int) -> dict[int, Tensor]:
        """A of every coupling, ``[n, c, R]``: direct part, then what arrives through the couplings above it."""
        _, between = self._pull_directions()
        a: dict[int, Tensor] = {}
        for j in self.couplings:
            coupling, d = self.trace.sites[j].mark.coupling, delta[j]
            if d is None:
                a[j] = self.output.new_zeros(self.samples, count, coupling.statistics.numel())
            else:
                rows = coupling.per_sample(d)  # [c, n·t, R]
                a[j] = rows.reshape(count, self.samples, -1, rows.shape[-1]).sum(2).transpose(0, 1)
        for upper in reversed(self.couplings):
            for lower, b in between[upper].items():
                a[lower] = a[lower] + a[upper] @ b
        return a

    def _pull_directions(self) -> tuple[dict[str, Tensor], dict[int, dict[int, Tensor]]]:
        """P ``[R, *p]`` per parameter for the couplings above it, in order; B by upper and lower coupling."""
        if self._directions is None:
            parts: dict[str, list[Tensor]] = {}
            between: dict[int, dict[int, Tensor]] = {}
            for j in self.couplings:
                rows, between[j] = self._pull_statistics(j)
                for name, r in rows.items():
                    parts.setdefault(name, []).append(r)
            self._directions = {name: torch.cat(rows) for name, rows in parts.items()}, between
        return self._directions

    def _pull_statistics(self, j: int) -> tuple[dict[str, Tensor], dict[int, Tensor]]:
        """P and B of one coupling: its statistics, one coordinate after the other, pulled back."""
        site = self.trace.sites[j]
        statistics, lower = site.mark.coupling.statistics, self._couplings_in(site.upstream)
        sites = sorted({*self._calls_in(site.upstream), *lower})
        names = [name for name in self.uses if j in self._above(name)]
        eye = torch.eye(statistics.numel(), dtype=statistics.dtype, device=statistics.device)
        products: dict[str, list[Tensor]] = {name: [] for name in names}
        between: dict[int, list[Tensor]] = {i: [] for i in lower}
        for q in chunks(len(eye), self.chunk_size or self.costs.direction_chunk(j)):
            cotangents = eye[q].view(-1, *statistics.shape)
            with self._gates("closed"):
                deltas = self.vjp(statistics, self._site_edges(sites), cotangents)
            rows = self._summed(sites, deltas)
            for name in names:
                products[name].append(rows.get(name, self._zeros(name, len(cotangents))))
            for i in lower:
                d, below = deltas[sites.index(i)], self.trace.sites[i].mark.coupling
                zero = eye.new_zeros(len(cotangents), below.statistics.numel())
                between[i].append(zero if d is None else below.summed(d))
        return {n: torch.cat(r) for n, r in products.items()}, {i: torch.cat(b) for i, b in between.items()}

    def _row_chunks(self, name: str, count: int) -> Iterator[slice]:
        if self.chunk_size:
            return chunks(self.samples, max(1, self.chunk_size // count))
        return chunks(self.samples, self.costs.row_chunk(name, count))


class _set_gates:
    """Hold the gates of all couplings of a graph in one state; also where several forward passes meet."""

    def __init__(self, sites: list[Site], state: str) -> None:
        self._gates = {s.mark.coupling.gates for s in sites if s.mark.coupling}
        self._state = state

    def __enter__(self) -> None:
        self._before = {g: g.state for g in self._gates}
        for g in self._gates:
            g.state = self._state

    def __exit__(self, *exc: object) -> None:
        for g, state in self._before.items():
            g.state = state
