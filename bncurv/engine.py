"""The engine: pull columns of the loss back through a batch, V[k] = own[k] + Σ_q A[q, k] P[q].

Glossary: one meaning per letter in the whole package.

    N, n, m   samples of the mini-batch
    C, c      columns per sample (classes of the loss' factor); also "channel" in batchnorm.py
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

The coupled way takes C passes for own and A and R passes for P and B, all with closed gates, whatever N is; R =
Σ 2·channels over the BatchNorms, and a direction passes only the layers below its BatchNorm. The dense way
backpropagates all N·C columns with open gates. Both are exact.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Generator, Iterator, Mapping

import torch
from torch import Tensor

from bncurv.agreement import Sum, disagreeing, largest
from bncurv.blocks import Batch, Correction, Rows, Source, Squares, WholeBatch
from bncurv.budget import chunks
from bncurv.certificate import find_mixing
from bncurv.costs import Costs
from bncurv.directions import Directions
from bncurv.passes import Passes, vjp
from bncurv.precision import ROUNDING, ulp
from bncurv.products import Products
from bncurv.slow import listed, user_level, warn_slow
from bncurv.structure import Structure
from bncurv.truncation import TruncatedDirections


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

    Attributes:
        way: ``"coupled"`` or ``"dense"``.
        error: with ``tol``, the estimated Frobenius norm of what was dropped from V, by parameter name.

    Raises:
        RuntimeError: with ``method="coupled"`` if samples are mixed by something that is not a known coupling; where
            the backward passes are not those of a linear map.
    """

    def __init__(
        self,
        batch: Batch,
        sources: Mapping[str, Source | WholeBatch],
        method: str = "auto",
        chunk_size: int | None = None,
        tick: Callable[[int], object] = int,
        tol: float = 0.0,
        keep_own: bool = False,
        squares: Collection[str] = (),
    ) -> None:
        self.output, self.wanted, self.trace = batch.output, dict(batch.parameters), batch.trace
        self.samples = batch.samples
        self._whole = {key: s for key, s in sources.items() if isinstance(s, WholeBatch)}
        self._sources = {key: s for key, s in sources.items() if not isinstance(s, WholeBatch)}
        self._columns = sum(s.columns_per_sample for s in self._sources.values())
        self._method, self._keep_own, self._squares, self._tol = method, keep_own, squares, tol
        self.structure = Structure(self.trace, self.wanted)
        centred = () if keep_own or tol else self.structure.sole  # these need the own part and the mean's directions
        self.products = Products(self.trace, self.structure, self.wanted, self.samples, centred, keep=not chunk_size)
        self.costs = Costs(self.trace, self.structure, self.products, self._columns, bool(squares), chunk_size)
        quiet = [p for name, p in self.wanted.items() if self.structure.vanishes(name)]
        self._passes = Passes(self.output, self.trace, self.structure, tick, quiet)
        self.error: dict[str, float] = {}
        self._between: dict[int, dict[int, Tensor]] = {}
        self._slow = self._without_product()
        self.way = self._choose()

    @property
    def passes(self) -> int:
        """Backward passes of the whole batch so far."""
        return self._passes.count

    # ---------------------------------------------------------------- which way
    def _without_product(self) -> list[str]:
        """Parameters that must go the dense way: used outside the table, or in a layer with no sample axis."""
        loose = {id(p) for p in self.trace.loose}
        slow = [name for name, p in self.wanted.items() if id(p) in loose]
        for name in self.structure.uses:
            if any(self.trace.sites[j].call.output[0] % self.samples for j in self.structure.sites(name)):
                slow.append(name)
        return slow

    def _choose(self) -> str:
        if self._method == "dense":
            return "dense"
        if self._slow and self._columns:
            warn_slow(
                f"No parameter product for {listed(self._slow)} (used outside the layer table, or on rows that are no "
                "samples): exact, but by one backward pass per component (slow). Leave them out with params=..., or "
                "add the layer with bncurv.register_layer."
            )
        if not self._columns:
            return "dense"
        if self._method == "auto" and self.costs.dense() <= self.costs.coupled(self._slow) and not self._offset():
            return "dense"
        problem = self._mixing()
        if problem and self._method == "coupled":
            raise RuntimeError(f"method='coupled' does not apply: {problem} Use method='auto' or method='dense'.")
        if problem:
            warn_slow(f"{problem} Taking the dense way: exact, one backward pass per component.")
        return "dense" if problem else "coupled"

    @property
    def _u(self) -> Tensor:
        """All columns of all sources mixed, ``[n, *output]``: a probe that is nothing else than what is pulled."""
        return torch.stack([source.mixture() for source in self._sources.values()]).sum(0)

    def _offset(self) -> bool:
        """Whether an ordinary pass loses ten times as many digits as the coupled way's centred products.

        Below a BatchNorm Σ_s δ_s = 0 but for rounding, which an ordinary pass multiplies by the mean of the layer's
        input; the loss shows where that is far from zero in units of the standard deviation.
        """
        for j, i in self.structure.direct.items():
            offset = self.trace.sites[j].coupling.offset
            if i is None or i not in self.products.centred or offset <= ROUNDING:
                continue
            call = self.trace.sites[i].call
            (delta,) = vjp([self.output], [self.trace.sites[i].edge], [self._u[None]])
            if delta is None or "weight" not in call.parameters:
                continue
            rows = call.layer.left("weight", call.arguments, delta)  # [1, n, g, o, s]
            left_over = largest(rows.sum((1, 4))) * largest(self.products.mean(i, "weight"))
            truth = largest(self.products.summed_at(i, "weight", delta))
            if left_over > torch.finfo(rows.dtype).eps * offset * truth:
                return True
        return False

    def _mixing(self) -> str | None:
        """What mixes samples beside the known couplings, if anything does; keeps its probe for `_disagreeing`."""
        for site in self.trace.sites:
            if site.mark.coupling and site.mark.rows % self.samples:
                return (
                    f"the input of '{site.coupling.name}' has first axis {site.mark.rows}, which is no multiple "
                    f"of the {self.samples} samples, so its rows cannot be told apart by sample."
                )
        watched = sorted({*self.structure.calls_in(-1), *self.structure.couplings})
        edges = self.structure.edges(watched)
        u = self._u

        def pull(v: Tensor) -> list[Tensor | None]:
            return [None if d is None else d[0] for d in vjp([self.output], edges, [v[None]])] if edges else []

        with self._passes.closed():
            self._passes.demand_linear(edges, u)
            delta = pull(u)
            self._probe = u, {j: None if d is None else d[None] for j, d in zip(watched, delta, strict=True)}
            return find_mixing(pull, u, delta, self.trace)

    def _disagreeing(self, names: list[str], directions: Directions | TruncatedDirections) -> list[str]:
        """Those of the parameters for which the coupled way is not what an ordinary pass is; they go the dense way."""
        u, delta = self._probe
        directions.read(delta, 1)
        coupled = {}
        for name in names:
            own, rest = self.products.summed(name, delta, 1, {})[0], directions.correction(name).summed()
            slack = ROUNDING * self.error.get(name, 0.0)
            if self.structure.vanishes(name):
                slack += ROUNDING**2 * ulp(u.dtype) * self.products.terms(name, delta)
            coupled[name] = Sum(own + rest, largest(own) + largest(torch.as_tensor(rest)), slack)

        def pull(v: Tensor) -> dict[str, Tensor]:
            got = vjp([self.output], [self.wanted[n] for n in names], [v[None]])
            return {n: self.products.zeros(n) if g is None else g[0] for n, g in zip(names, got, strict=True)}

        found = disagreeing(pull, u, coupled, lambda name: self.products.terms(name, delta))
        lost = [name for name, difference in found.items() if difference.cancelled]
        unseen = [name for name in found if name not in lost]
        if unseen:
            warn_slow(
                f"For {listed(unseen)} the coupled way differs from an ordinary backward pass "
                f"({max(found[n].size for n in unseen):.0e} relative): something acts on gradients unseen, such as a "
                "hook on a node of the graph. Taking the dense way for them: exact, one backward pass per component."
            )
        if lost and self._method == "coupled":
            warnings.warn(f"Cancellation: the coupled way loses digits for {listed(lost)} "
                          f"({max(found[n].size for n in lost):.0e} relative). Use method='auto' or 'dense'.",
                          stacklevel=user_level())  # fmt: skip
            return unseen
        if lost:
            warn_slow(
                f"The coupled way loses digits for {listed(lost)} to cancellation "
                f"({max(found[n].size for n in lost):.0e} relative; few values per channel of a BatchNorm?). Taking "
                "the dense way for them: one backward pass per component."
            )
        return unseen + lost

    @property
    def planned(self) -> int:
        """Backward passes that the sources will take."""
        whole = sum(len(s.cotangents) for s in self._whole.values())
        if not self._columns:
            return whole
        if self.way == "dense":
            return whole + self.samples * self._columns
        directions = sum(self.structure.width[j] for j, below in self.structure.below.items() if below)
        return whole + self._columns + directions + (self.samples * self._columns if self._slow else 0)

    # ---------------------------------------------------------------- the two ways
    def pull_whole(self, cotangents: Tensor, names: list[str] | None = None) -> dict[str, Tensor]:
        """``J_θFᵀ`` of whole-batch cotangents ``[q, n, *output]``, coupling included: ``[q, *p]`` per parameter."""
        names = list(self.wanted) if names is None else names
        got = self._passes.vjp(self.output, [self.wanted[name] for name in names], cotangents)
        count = len(cotangents)
        return {n: self.products.zeros(n, count) if g is None else g for n, g in zip(names, got, strict=True)}

    @torch.no_grad()
    def pull(self) -> Iterator[tuple[str, Rows | Squares]]:
        """All rows of V of all sources, in blocks, each with its source's key."""
        for key, whole in self._whole.items():
            for q in chunks(len(whole.cotangents), self.costs.dense_chunk()):
                for name, values in self.pull_whole(whole.cotangents[q]).items():
                    yield key, Rows(name, values[None], slice(0, 1), q)
        if not self._sources:
            return
        coupled = [] if self.way == "dense" else [name for name in self.wanted if name not in self._slow]
        dense = [name for name in self.wanted if name not in coupled]
        for names in self.costs.groups(coupled):
            dense += yield from self._group(names)  # P of one group at a time: it goes with the generator
        for key, source in self._sources.items() if dense else ():
            for rows in self._dense(source, dense):
                yield key, rows

    def _group(self, names: list[str]) -> Generator[tuple[str, Rows | Squares], None, list[str]]:
        """The coupled way for some parameters; gives back those that must go the other."""
        directions = self._pull_directions(list(self._sources.values()), names)
        wrong = self._disagreeing(names, directions)
        names = [name for name in names if name not in wrong]
        for key, source in self._sources.items() if names else ():
            for block in self._coupled(source, names, directions, key in self._squares):
                yield key, block
        return wrong

    def _pull_directions(self, sources: list[Source], names: list[str]) -> Directions | TruncatedDirections:
        """The coupling directions for some parameters; they serve all sources."""
        if self._tol and self.structure.couplings:
            truncated = TruncatedDirections(self._passes, self.products, self.costs, sources, self._tol, names)
            self.error |= truncated.error
            return truncated
        directions = Directions(self._passes, self.products, self.costs, names, self._between)
        self._between = directions.between
        return directions

    def _dense(self, source: Source, names: list[str]) -> Iterator[Rows]:
        size = self.costs.dense_chunk()
        per_sample = source.columns_per_sample
        for c in chunks(per_sample, size):
            columns = source.columns(c)
            count = columns.shape[0]
            for n in chunks(self.samples, max(1, size // count)):
                # cotangent (n, c) is column c in row n, zero elsewhere
                index = torch.arange(n.start, n.stop, device=columns.device)
                spread = columns.new_zeros(len(index), *columns.shape)
                spread[torch.arange(len(index), device=index.device), :, index] = columns[:, index].transpose(0, 1)
                cotangents, own = spread.flatten(0, 1), {}
                if self._keep_own:
                    with self._passes.closed(sums=True):
                        held = self.pull_whole(cotangents, names)
                    own = {name: torch.linalg.vector_norm(rows).square() for name, rows in held.items()}
                for name, rows in self.pull_whole(cotangents, names).items():
                    yield Rows(name, rows.unflatten(0, (len(index), count)), n, c, own.get(name))

    def _coupled(
        self, source: Source, names: list[str], directions: Directions | TruncatedDirections, squares: bool
    ) -> Iterator[Rows | Squares]:
        sites = sorted({*(j for name in names for j in self.structure.sites(name)), *self.structure.couplings})
        for c in chunks(source.columns_per_sample, self.costs.column_chunk(names)):
            columns = source.columns(c)
            delta = self._passes.closed_vjp(self.output, sites, columns)
            directions.read(delta, len(columns))
            for name in names:
                correction = directions.correction(name)
                if squares and self.products.vanishes(name):
                    yield Squares(name, self.products.zeros(name))
                elif squares and self._factored(name, len(columns), delta, correction):
                    yield Squares(name, self.products.sum_squares(name, delta, len(columns), correction))
                else:
                    yield from self._rows(name, delta, c, correction, squares)

    def _factored(self, name: str, count: int, delta: Mapping[int, Tensor | None], correction: Correction) -> bool:
        """Whether the squares come from factors: where that is cheaper, and stays in the dtype's range."""
        return self.costs.factored(name, count) and self.products.in_range(name, delta, correction)

    def _rows(
        self, name: str, delta: dict[int, Tensor | None], c: slice, correction: Correction, squares: bool
    ) -> Iterator[Rows | Squares]:
        count = c.stop - c.start
        for n in chunks(self.samples, self.costs.row_chunk(name, count)):
            rows = self.products.own(name, delta, n, count)
            own = torch.linalg.vector_norm(rows).square() if self._keep_own else None
            correction.add_to(rows, n)  # V[k] = own[k] + Σ_q A[q, k] P[q]
            if squares:
                yield Squares(name, rows.square_().sum((0, 1)))
            else:
                yield Rows(name, rows, n, c, own, correction)
