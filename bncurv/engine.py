"""The engine: pull columns of the loss back through a batch, V[k] = own[k] + Σ_q A[q, k] P[q].

Glossary: one meaning per letter in the whole package.

    N, n, n'  samples of the mini-batch
    t         steps of a sample: rows of a layer's input that belong to it, positions of its output that the loss sees
    C, c      columns per sample (classes of the loss' factor); in batchnorm.py channels
    K, k      components, k = (n, c), n slowest: a column of S, non-zero only in row n of the output
    R, q      coupling directions: coordinates of the batch statistics; q also counts batched cotangents
    m         moments of a channel's statistics: mean, variance
    p         entries of one parameter;  D all of them
    i, j      sites of the graph (layers/base.py: i, o features of a layer's input, output; losses.py: j columns of a t)
    u, δ      cotangents of the output; of a layer's output
    S         symmetric factor of the loss Hessian, S Sᵀ = ∇²_F L.  The scale of the loss' reduction (1/N of a mean)
              sits inside S and inside the gradient, nowhere else
    V[k]      J_θFᵀ s_k, one row per component, J the Jacobian of the whole batch;  GGN = Σ_k V[k] V[k]ᵀ
    own[k]    the part of V[k] with the batch statistics held constant: involves sample n alone
    A[q, k]   (d F / d statistics)ᵀ s_k: read off the same pass, then carried down through the lower statistics
    B[q, q']  ∂ statistics_q / ∂ statistics_q', those of a lower layer, all others held constant
    P[q]      ∂ statistics_q / ∂θ with the statistics of lower layers held constant: one backward pass each

The coupled way takes C passes for own and A and R passes for P and B, all with closed gates, whatever N is; R =
Σ 2·channels over the BatchNorms, and a direction passes only the layers below its BatchNorm. The dense way
backpropagates all N·C columns with open gates. Both are exact.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from bncurv.assurance import Assurance
from bncurv.blocks import Batch, Correction, Rows, Source, Squares, WholeBatch
from bncurv.budget import USUAL, Budget, chunks
from bncurv.costs import Costs
from bncurv.directions import Directions
from bncurv.keeping import Keeping
from bncurv.memory import Allowance, Memory
from bncurv.passes import Passes
from bncurv.plan import Plan
from bncurv.products import Products
from bncurv.structure import Structure
from bncurv.truncation import PROBES, Leading, TruncatedDirections


class Procedure(ABC):
    """A source with a way of its own: it starts elsewhere than at the output, or takes more than backward passes."""

    @abstractmethod
    def planned(self, engine: Engine) -> int:
        """Backward passes that it will take."""

    @abstractmethod
    def pull(self, engine: Engine) -> Iterator[Any]:
        """Blocks for the quantity that asked for it."""


class Engine:
    """Pulls columns back through one recorded forward pass.

    Args:
        batch: the recorded forward pass.
        sources: what to pull back, by key.
        method: ``"auto"``, ``"coupled"`` or ``"dense"``.
        chunk_size: most vectors (cotangents of the batch, rows of V) held at once; ``None`` chooses by bytes.
        tick: called with the number of backward passes just done.
        tol: relative tail of the coupling that may be dropped (``truncation.py``); 0: none.
        keep_own: hand out the squared norm of the own part with each block.
        squares: keys of the sources of which `Squares` are enough.
        allowance: a limit to the memory.

    Attributes:
        method: as given.
        way: ``"coupled"``, ``"dense"``, or what a procedure calls its own.
        back: backward passes through the graph.
        error: with ``tol``, the estimated Frobenius norm of what was dropped from V, by parameter name.

    Raises:
        ValueError: where no way keeps to the limit.
        RuntimeError: with ``method="coupled"`` if samples are mixed by something that is not a known coupling; where
            the backward passes are not those of a linear map.
    """

    def __init__(
        self,
        batch: Batch,
        sources: Mapping[str, Source | WholeBatch | Procedure],
        method: str = "auto",
        chunk_size: int | None = None,
        tick: Callable[[int], object] | None = None,
        tol: float = 0.0,
        keep_own: bool = False,
        squares: Collection[str] = (),
        allowance: Allowance | None = None,
    ) -> None:
        self.output, self.wanted, self.trace = batch.output, dict(batch.parameters), batch.trace
        self.shard, self.ranks, samples = batch.shard, batch.ranks, len(batch.output)
        self._whole = {key: s for key, s in sources.items() if isinstance(s, WholeBatch)}
        self._procedures = {key: s for key, s in sources.items() if isinstance(s, Procedure)}
        self._sources = {key: s for key, s in sources.items() if not isinstance(s, WholeBatch | Procedure)}
        row = sum(p.numel() * p.element_size() for p in self.wanted.values())
        self._keeping = Keeping(batch.kept, self.shard.own, self.ranks.everybody, row, whole=not (tol or keep_own))
        self._known = self._keeping.ways(list(self._sources))
        self._sources = {key: s for key, s in self._sources.items() if key not in self._known}
        self._kept = batch.kept
        self._columns = sum(s.columns_per_sample for s in self._sources.values())
        self._keep_own, self._squares, self._tol = keep_own, squares, tol
        self.method, self._chunk_size, self._tick = method, chunk_size, tick
        self.structure = Structure(self.trace, self.wanted)
        self._allowance = allowance
        self.memory = Memory(batch, self.structure, sources, allowance, bool(tol)) if allowance else None
        budget = self._budget()
        uncentred = keep_own or tol  # these need the own part and the mean's directions as such
        centred = () if uncentred else self.structure.exclusive
        self.products = Products(
            self.trace, self.structure, self.wanted, samples, centred, not chunk_size, self.ranks, budget
        )
        self.costs = Costs(
            self.trace, self.structure, self.products, self._columns, bool(squares), chunk_size, shard=self.shard,
            budget=budget, memory=self.memory,
        )  # fmt: skip
        quiet = [p for name, p in self.wanted.items() if self.structure.vanishes(name)]
        self.back = Passes(self.output, self.trace, self.structure, tick, quiet, self.ranks)
        self._checks = Assurance(self.back, self.trace, self.products, list(self._sources.values()), self.shard)
        self.error = dict.fromkeys(self.wanted, 0.0) if tol else {}
        self._between: dict[int, dict[int, Tensor]] = {}
        leads = self._leads if self._truncates else None
        self._plan = Plan(
            batch, self.structure, self.costs, self._checks, self.memory, self._columns, self.method, leads
        )
        self.way = self._plan.choose() if self._columns else next(iter(self._known.values()), "dense")
        if self._columns and self.way == "dense":
            self.costs = self._plan.dense_costs
        if self.way == "coupled":
            self.products.prepare_means()

    def beside(self, batch: Batch, sources: Mapping[str, Source | WholeBatch], squares: Collection[str]) -> Engine:
        """Another one at the same batch, for sources that turn out to be wanted."""
        allowance = self._allowance
        return Engine(
            batch, sources, self.method, self._chunk_size, self._tick, squares=squares, allowance=allowance
        )

    def went(self, way: str, passes: int = 0) -> None:
        """Note a procedure's way, where there are no other sources to have one, and passes it took beside this."""
        self.way = self.way if self._columns else way
        self.back.count += passes

    @property
    def passes(self) -> int:
        """Backward passes of the whole batch so far."""
        return self.back.count

    @property
    def slow(self) -> list[str]:
        """Parameters without a product."""
        return self._plan.slow

    @property
    def _truncates(self) -> bool:
        return bool(self._tol and self.structure.couplings)

    @functools.cached_property
    def _leading(self) -> Leading:
        """With ``tol``: what of the coupling is kept."""
        return Leading(self.back, self.costs, list(self._sources.values()), list(self.wanted.values()), self._tol)

    def _leads(self) -> int:
        """How many directions are kept, and looked at."""
        return self._leading.kept + 2 * PROBES

    # ---------------------------------------------------------------- which way
    def _budget(self) -> Budget:
        """How many bytes; and which ways keep to the limit."""
        if self.memory is None:
            return USUAL
        ways = ["coupled", "dense"] if self.method == "auto" else [self.method]
        ways = ways if self._columns else ["dense"]
        self.memory.demand(ways)
        if self._procedures:  # they choose for themselves
            ways = ["coupled", *ways]
        way = next(way for way in ways if self.memory.fits(way))
        self.method = "dense" if way == "dense" and self._columns else self.method
        return self.memory.budget(way)

    @property
    def planned(self) -> int:
        """Backward passes that the sources will take."""
        whole = sum(-(-len(s.cotangents) // self.shard.helpers) for s in self._whole.values())
        whole += sum(procedure.planned(self) for procedure in self._procedures.values())
        if not self._columns:
            return whole
        if self.way == "dense":
            return whole + self.shard.total * self._columns
        return whole + self._columns + self._plan.directions + (self.shard.total * self._columns if self.slow else 0)

    # ---------------------------------------------------------------- the two ways
    def pull_whole(self, cotangents: Tensor) -> dict[str, Tensor]:
        """`pull_rows` of cotangents that are divided over the ranks where all have the same batch."""
        helpers, count = self.ranks.helpers, len(cotangents)
        rows = self.pull_rows(cotangents[helpers.share(count)], list(self.wanted))
        return helpers.joined(rows, count, "rows of the dense way")

    def pull_rows(self, cotangents: Tensor, names: list[str]) -> dict[str, Tensor]:
        """``J_θFᵀ`` of whole-batch cotangents ``[q, n, *output]``, coupling included: ``[q, *p]`` per parameter."""
        got = self.back.vjp(self.output, [self.wanted[name] for name in names], cotangents)
        count = len(cotangents)
        rows = {n: self.products.zeros(n, count) if g is None else g for n, g in zip(names, got, strict=True)}
        return self.ranks.sums(rows, "rows of the dense way")

    @torch.no_grad()
    def pull(self) -> Iterator[tuple[str, Rows | Squares]]:
        """All rows of V of all sources, in blocks, each with its source's key."""
        for key, whole in self._whole.items():
            for q in chunks(len(whole.cotangents), self.costs.dense_chunk() * self.shard.helpers):
                for name, values in self.pull_whole(whole.cotangents[q]).items():
                    yield key, Rows(name, values[None], slice(0, 1), q)
        for key, procedure in self._procedures.items():
            for block in procedure.pull(self):
                yield key, block
        for key in self._known:
            for rows in self._keeping.again(key):
                yield key, rows
        if self._sources:
            yield from self._keeping.watched(self.way, self._sources, self._pull_sources())

    def _pull_sources(self) -> Iterator[tuple[str, Rows | Squares]]:
        coupled = [] if self.way == "dense" else [name for name in self.wanted if name not in self.slow]
        dense = [name for name in self.wanted if name not in coupled]
        for names in self.costs.groups(coupled):
            dense += yield from self._group(names)  # P of one group at a time: it goes with the generator
        for key, source in self._sources.items() if dense else ():
            for rows in self._dense(source, dense):
                yield key, rows

    def _group(self, names: list[str]) -> Generator[tuple[str, Rows | Squares], None, list[str]]:
        """The coupled way for some parameters; gives back those that must go the other."""
        directions = self._pull_directions(names)
        wrong = self._checks.disagreeing(names, directions, self.error, self.method)
        wrong = self.ranks.everybody.union(wrong, names)
        names = [name for name in names if name not in wrong]
        for key, source in self._sources.items() if names else ():
            for block in self._coupled(source, names, directions, key in self._squares):
                yield key, block
        return wrong

    def _pull_directions(self, names: list[str]) -> Directions | TruncatedDirections:
        """The coupling directions for some parameters; they serve all sources."""
        if self._truncates and self._leading.kept + PROBES < sum(self._plan.widths):  # else all of it is no dearer
            truncated = TruncatedDirections(self.back, self.products, self.costs, self._leading, names)
            self.error |= truncated.error
            return truncated
        key = tuple(names), frozenset(self.products.centred)
        if self._kept is not None and key in self._kept:
            return self._kept[key]
        directions = Directions(self.back, self.products, self.costs, names, self._between)
        self._between = directions.between
        if self._kept is not None and len(self.costs.groups(names)) == len(self.costs.groups(list(self.wanted))) == 1:
            self._kept[key] = directions
        return directions

    def _dense(self, source: Source, names: list[str]) -> Iterator[Rows]:
        self.back.begin(source)
        size = self.costs.dense_chunk()
        per_sample = source.columns_per_sample
        for c in chunks(per_sample, size):
            columns = source.columns(c)
            count = columns.shape[0]
            for n in chunks(self.shard.total, max(1, size // count)):  # samples of all ranks
                # cotangent (n, c) is column c in row n, zero elsewhere
                own, place = self.shard.here(n)
                rows = self.shard.rows(own)
                index = torch.arange(rows.start, rows.stop, device=columns.device)
                spread = columns.new_zeros(n.stop - n.start, *columns.shape)
                spread[index + place.start - rows.start, :, index] = columns[:, rows].transpose(0, 1)
                cotangents, squares = spread.flatten(0, 1), {}
                if self._keep_own:
                    with self.back.closed(sums=True):
                        held = self.pull_rows(cotangents, names)
                    squares = {name: torch.linalg.vector_norm(values).square() for name, values in held.items()}
                for name, values in self.pull_rows(cotangents, names).items():
                    if len(index):
                        yield Rows(name, values.unflatten(0, (-1, count))[place], own, c, squares.get(name))

    def _coupled(
        self, source: Source, names: list[str], directions: Directions | TruncatedDirections, squares: bool
    ) -> Iterator[Rows | Squares]:
        self.back.begin(source)
        own = self.shard.rows()
        sites = sorted({*(j for name in names for j in self.structure.sites(name)), *self.structure.couplings})
        for c in chunks(source.columns_per_sample, self.costs.column_chunk(names)):
            columns = source.columns(c)
            delta = self.back.closed_vjp(self.output, sites, columns)
            directions.read(delta, len(columns))
            for name in names:
                correction = directions.correction(name).of(own)
                if squares and self.products.vanishes(name):
                    yield Squares(name, self.products.zeros(name))
                elif squares and self._factored(name, len(columns), delta, correction):
                    yield Squares(name, self.products.sum_squares(name, delta, len(columns), correction, own))
                else:
                    yield from self._rows(name, delta, c, correction, squares)

    def _factored(self, name: str, count: int, delta: Mapping[int, Tensor | None], correction: Correction) -> bool:
        """Whether the squares come from factors: where that is cheaper, and stays in the dtype's range."""
        return self.costs.factored(name, count) and self.products.in_range(name, delta, correction)

    def _rows(
        self, name: str, delta: dict[int, Tensor | None], c: slice, correction: Correction, squares: bool
    ) -> Iterator[Rows | Squares]:
        count = c.stop - c.start
        parts = chunks(self.shard.own, self.costs.row_chunk(name, count))
        for n in parts if self.shard.own else (slice(0, 0),):  # without samples, what goes with them all the same
            rows = self.products.own(name, delta, self.shard.rows(n), count)
            own = torch.linalg.vector_norm(rows).square() if self._keep_own else None
            correction.add_to(rows, n)  # V[k] = own[k] + Σ_q A[q, k] P[q]
            if squares:
                yield Squares(name, rows.square_().sum((0, 1)))
            else:
                yield Rows(name, rows, n, c, own, correction)
