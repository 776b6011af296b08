"""What is alive at once: the table by which a limit on memory is divided, and by which it is refused.

Everything that is held above the recorded forward pass and its graph, in bytes of one number (letters: ``engine.py``;
Δ: cotangents at all recorded layers; pass: what autograd holds for one cotangent on its way, `pass_bytes`; D: of all
parameters, p: of the largest one; x̂: normalised inputs of all BatchNorms):

    always      on CPUs, holes that freed memory leaves (24 MiB, or as much as there is)
                results of this mini-batch and of those before, copies of the model's values, factor S of the loss

    coupled     x̂ + B + P of the layers below a BatchNorm (2 D) + Δ of the check     held until the end
                P of a group of parameters                                            held while it is worked on
                unfolded inputs that are kept for reuse                               held until the end
                and the largest of these, which come one after the other:
        check       pass + 4 widest;  pass + 8 D
        P           q (pass + 3 widest);  4 times the input of a BatchNorm
        columns     c (pass + N (2 R + Σ R above, of the layers)) + rows of V of one parameter, 3 times
        squares     the same with blocks of P, 4 times, in place of rows

    dense       q (pass + 2 p + 2 output) + 2 D for the check of the first rows

The least sizes are those of one cotangent, one sample, one parameter; what there is beyond makes chunks, rows and
groups larger, up to what is of use (`Budget.within`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from bncurv.blocks import Batch, WholeBatch
from bncurv.budget import TALL, USUAL, Budget, MiB, Sizes
from bncurv.factor import Factor
from bncurv.frontier import graph_bytes, pass_bytes, size_at
from bncurv.structure import ALL, Structure

HOLES = 24 * MiB  # on CPUs, freed memory that the C library keeps between what is in use, once so much was in use
BATCHED = 1.5  # what a cotangent takes among several: PyTorch's rules for batches copy


class Allowance(NamedTuple):
    """A limit, and what of it is taken already.

    Attributes:
        total: bytes, of the whole call.
        results: what the quantities hold of this mini-batch.
        earlier: copies of the model, and what quantities hold of other mini-batches at most.
        merging: what joining them takes.
    """

    total: int
    results: int
    earlier: int = 0
    merging: int = 0


class _Way(NamedTuple):
    """What a way holds until its end, the smallest sizes of the rest, and how much more is of use."""

    held: int
    least: Sizes
    useful: Sizes


class Memory:
    """Bytes that each way needs at one recorded batch.

    Args:
        batch: the recorded forward pass; it says what there is.
        structure: structure of its graph.
        sources: what will be pulled back, by key.
        allowance: the limit.
        truncated: whether the coupling is.

    Attributes:
        dense: of one cotangent in the dense way, with its rows.
        column: of one column in the coupled way, with its coefficients.
        spare: for the examination of the first of several cotangents.
    """

    def __init__(
        self,
        batch: Batch,
        structure: Structure,
        sources: Mapping[str, object],
        allowance: Allowance,
        truncated: bool = False,
    ) -> None:
        self._batch, self._structure, self._allowance = batch, structure, allowance
        self._sites = sorted({*structure.calls_in(ALL), *structure.couplings})
        output, edges = batch.output, structure.edges(self._sites)
        self._number, self._sizes = output.element_size(), [size_at((e.node, e.output_nr)) for e in edges]
        size = self._number * output.numel()
        self._holes = HOLES if output.device.type == "cpu" else 0
        self._graph, columns = graph_bytes(output), self._columns()
        self._to_parameters = columns + pass_bytes(output, list(batch.parameters.values()))
        to_sites = columns + pass_bytes(output, edges)
        self._D, self._p = (f(self._bytes(p.numel() for p in batch.parameters.values())) for f in (sum, max))
        self.dense = self._to_parameters + 2 * self._p + 2 * size
        self.column = to_sites + self._coefficients() + 2 * size
        self._on_the_way, widest = to_sites - sum(self._sizes), max([size, *self._sizes])
        self._direction = self._on_the_way + 3 * widest
        self.spare = 2 * max(sum(self._sizes), self._D)
        always = allowance.earlier + allowance.results + sum(self._of_source(s, size) for s in sources.values())
        self._ways = {"coupled": self._coupled(always, sources if truncated else {}), "dense": self._dense(always)}
        self._agree()

    def _agree(self) -> None:
        """All ranks take the same way, in passes of as many cotangents."""
        numbers, a = self._batch.ranks.everybody.numbers, self._allowance

        def most(size: int) -> int:
            return int(max(numbers(size)))

        own = self.dense, self.column, self._direction, self.spare
        self.dense, self.column, self._direction, self.spare = map(most, own)
        for key, way in self._ways.items():
            self._ways[key] = _Way(most(way.held), *(Sizes(*map(most, sizes)) for sizes in way[1:]))
        self._graph = most(self._graph)
        self._allowance = a._replace(total=-most(-a.total), merging=most(a.merging))

    # ---------------------------------------------------------------- the table
    def _dense(self, always: int) -> _Way:
        useful = Sizes(self._usual(self.dense, 128))
        return _Way(always, Sizes(self.dense + 2 * self._D), useful)

    def _coupled(self, always: int, truncated: Mapping[str, object]) -> _Way:
        structure, captured = self._structure, sum(self._sizes)
        together = {i for j, *others in structure.sisters if others for i in structure.below[j]}
        width, inputs = structure.width, self._bytes(self._inputs())
        between = self._bytes(width[j] * width[i] for j in structure.couplings for i in structure.lower(j))
        held = always + sum(inputs) + sum(between) + 2 * self._D + captured
        if truncated:  # A of all columns; AᵀA and its eigenvectors in float64
            K = sum(getattr(s, "columns_per_sample", 0) for s in truncated.values()) * len(self._batch.output)
            held += 2 * self._number * K * sum(width.values()) + 32 * sum(width.values()) ** 2
        one = max(self._direction + captured, self._to_parameters)
        chunk = max(
            self.column + (0 if self._batch.trace.plain else 2 * captured),
            self._on_the_way + captured + 4 * max(self._sizes, default=0),
            self._to_parameters + 8 * self._D,  # at several scales, where it is in doubt
            one + max(self._bytes(2 * entries * rows for entries, rows in self._unfolded(together)), default=0),
            self._at_once(bool(truncated)),
        )
        rows = max(self._p, *self._bytes(3 * one for one, _ in self._unfolded(self._sites)), 0)
        P, block = self._P(), self._block()
        useful = Sizes(
            self._usual(max(self.column, self._direction + captured), max(width.values(), default=1)),
            min(USUAL.right, sum(self._bytes(one * n for one, n in self._unfolded(self._sites)))),
            sum(P),
            max(USUAL.row, TALL * self._p),
            max(USUAL.block, block),
        )
        return _Way(held, Sizes(chunk, direction=max(P), row=rows, block=block), useful)

    def _usual(self, each: int, most: int) -> int:
        """Bytes of as many cotangents as are taken without a limit (`Costs`)."""
        count = min(USUAL.chunk // max(1, sum(self._sizes)), USUAL.widest // max([1, *self._sizes, self._p]), most)
        return int(BATCHED * each * max(1, count)) + self.spare

    def _at_once(self, uncentred: bool) -> int:
        """Cotangents of all statistics right behind a layer, the variances' alone where centred, and their making."""
        structure, sites = self._structure, self._batch.trace.sites
        found = [0]
        for j, i in structure.direct.items():
            channelled = sites[j].coupling.channelled
            if i is not None and channelled is not None:
                found.append((8 if uncentred or i not in structure.exclusive else 4) * channelled.numel())
        return max(self._bytes(found))

    def _bytes(self, numbers: Iterable[int]) -> list[int]:
        return [self._number * n for n in numbers]

    def _inputs(self) -> list[int]:
        """Entries of the inputs of all BatchNorms."""
        couplings = [self._batch.trace.sites[j].coupling for j in self._structure.couplings]
        return [c.channelled.numel() for c in couplings if c.channelled is not None]

    def _coefficients(self) -> int:
        """A of one column: as it comes, and joined for the parameters of each layer."""
        width = self._structure.width
        joined = {tuple(above) for above in self._structure.pulled_from.values()}
        entries = 2 * sum(width.values()) + sum(width[j] for above in joined for j in above)
        return self._number * len(self._batch.output) * entries

    def _unfolded(self, sites: Iterable[int]) -> list[tuple[int, int]]:
        """Entries of the unfolded input of one row, and the number of rows, of calls at some sites."""
        calls = [self._batch.trace.sites[j].mark.call for j in sites]
        rights = [(call.right(role, slice(0, 1)), call.rows) for call in calls if call for role in call.parameters]
        return [(right.numel(), rows) for right, rows in rights if right is not None]

    def _columns(self) -> int:
        """Unfolded input of a whole batch: on CPUs, PyTorch's convolutions in float64 make it in every pass."""
        slow = self._number == 8 and self._batch.output.device.type == "cpu"
        return max(self._bytes(one * rows for one, rows in self._unfolded(self._sites)), default=0) if slow else 0

    def _P(self) -> list[int]:
        """P of each parameter."""
        entries = self._structure.entries
        return self._bytes(entries[name] * p.numel() for name, p in self._batch.parameters.items())

    def _block(self) -> int:
        """One direction of P of a matrix, or of Σ_c A δ beside it."""
        outputs = [len(p) * len(self._batch.output) for p in self._batch.parameters.values() if p.dim() == 2]
        return max([*self._bytes(outputs), self._p])

    def _of_source(self, source: object, size: int) -> int:
        """Its columns: in float64, in the model's dtype, and what they were made from."""
        if isinstance(source, Factor):
            return 6 * self._number * source.blocks.numel()
        return 2 * self._number * source.cotangents.numel() if isinstance(source, WholeBatch) else 2 * size

    # ---------------------------------------------------------------- what follows
    def least(self, way: str) -> int:
        """Bytes that a way needs at least, for the whole call."""
        held, least, _ = self._ways[way]
        size = max(held + least.total, self._allowance.merging)
        return size + min(self._holes, self._graph + size)

    @property
    def _usable(self) -> int:
        """The limit less the holes."""
        total = self._allowance.total
        return max(total - self._holes, (total - self._graph) // 2)

    def direction(self, j: int) -> int:
        """Bytes of one direction of coupling ``j``."""
        below = set(self._structure.below[j])
        return self._direction + sum(size for i, size in zip(self._sites, self._sizes, strict=True) if i in below)

    def fits(self, way: str) -> bool:
        """Whether a way keeps to the limit."""
        return self.least(way) <= self._allowance.total

    def demand(self, ways: Iterable[str], why: str = "") -> None:
        """Raise ValueError unless one of these ways keeps to the limit.

        Args:
            ways: ``"coupled"``, ``"dense"``.
            why: a sentence on why it must be one of these.
        """
        way = min(ways, key=self.least)
        if self.fits(way):
            return
        need, total, chunk = self.least(way), self._allowance.total, self._ways[way].least.chunk
        results = self._allowance.earlier + self._allowance.results
        parts = [f"{size / MiB:.1f} MiB" for size in (results, chunk, need - results - chunk)]
        raise ValueError(
            f"memory={total} ({total / MiB:.1f} MiB) is not enough.{f' {why}' if why else ''} The smallest budget that "
            f"would do is memory={need} ({need / MiB:.1f} MiB), by the {way} way: results {parts[0]}, one cotangent at "
            f"a time {parts[1]}, the rest {parts[2]}. Fewer samples per mini-batch or fewer parameters (params=...) "
            "need less."
        )

    def budget(self, way: str) -> Budget:
        """Sizes with which a way keeps to the limit."""
        held, least, useful = self._ways[way]
        return Budget.within(self._usable - held - least.total, least, useful)
