"""Whether the coupled way holds on a graph, asked with the columns that it is to pull back (letters: ``engine.py``).

Before: is there coupling that the gates do not cover (``certificate.py``); would an ordinary pass lose more digits than
it. Once the directions are known: is what it gives what an ordinary pass gives (``agreement.py``).
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from bncurv.agreement import Difference, Sum, differences, largest
from bncurv.blocks import Correction, Source
from bncurv.certificate import find_mixing, unowned
from bncurv.graph import Trace
from bncurv.layers.copies import Embedding, Expanded
from bncurv.passes import Passes, vjp
from bncurv.precision import ROUNDING, ulp
from bncurv.products import Products
from bncurv.slow import listed, user_level, warn_slow
from bncurv.spread import Shard, whole
from bncurv.structure import ALL

FEW = 4  # samples that are looked at one by one, at most

Probe = tuple[Tensor, dict[int, Tensor | None]]  # cotangents of the output, and at the sites with closed gates


class Corrections(Protocol):
    """What makes the corrections of rows (``directions.py``, ``truncation.py``)."""

    def read(self, delta: Mapping[int, Tensor | None], count: int) -> None:
        """Take A from the cotangents of ``count`` columns with closed gates."""
        ...

    def correction(self, name: str) -> Correction:
        """The correction of one parameter's rows for the columns last read."""
        ...


class Assurance:
    """Checks of the coupled way on one graph; their passes are not counted.

    Args:
        passes: passes through the graph.
        trace: the traced graph.
        products: parameter products there.
        sources: the columns that will be pulled back.
        shard: which samples of the batch are here; default: all.

    Attributes:
        strange: once `mixing` was asked, the sites whose rows are no samples': their parameters have no product.
    """

    def __init__(
        self, passes: Passes, trace: Trace, products: Products, sources: list[Source], shard: Shard | None = None
    ) -> None:
        self._ranks, everything = passes.ranks, whole(passes.samples)
        self._shard = everything if shard is None or passes.ranks.divides else shard  # what is divided all check alike
        self._passes, self._trace, self._products, self._sources = passes, trace, products, sources
        self._output, self._structure = passes.output, passes.structure
        self.strange: set[int] = set()

    @functools.cached_property
    def _u(self) -> Tensor:
        """All columns of all sources mixed, ``[n, *output]``: a probe that is nothing else than what is pulled."""
        return torch.stack([source.mixture() for source in self._sources]).sum(0)

    def offset(self) -> bool:
        """Whether an ordinary pass loses ten times as many digits as the coupled way's centred products.

        Below a BatchNorm Σ_s δ_s = 0 but for rounding, which an ordinary pass multiplies by the mean of the layer's
        input; the loss shows where that is far from zero in units of the standard deviation.
        """
        for j, i in self._structure.direct.items():
            offset = self._trace.sites[j].coupling.offset
            if i is None or i not in self._products.centred or not self._ranks.everybody.any(offset > ROUNDING):
                continue
            call = self._trace.sites[i].call
            (delta,) = vjp([self._output], [self._trace.sites[i].edge], [self._u[None]])
            if delta is None or "weight" not in call.parameters:
                continue
            rows = call.layer.left("weight", call.arguments, delta)  # [1, n, g, o, s]
            left_over = largest(rows.sum((1, 4))) * largest(self._products.mean(i, "weight"))
            truth = largest(self._products.summed_at(i, "weight", delta))
            if self._ranks.everybody.any(left_over > torch.finfo(rows.dtype).eps * offset * truth):
                return True
        return False

    def mixing(self) -> str | None:
        """What mixes samples beside the known couplings, if anything does; keeps its probe for `disagreeing`."""
        watched = sorted({*self._structure.calls_in(ALL), *self._structure.couplings})
        edges, u = self._structure.edges(watched), self._u

        def pull(v: Tensor, edges: list[GradientEdge] = edges) -> list[Tensor | None]:
            return [None if d is None else d[0] for d in vjp([self._output], edges, [v[None]])] if edges else []

        with self._passes.closed():
            self._passes.demand_linear(edges, u)
            delta = pull(u)
            self._probe = u, {j: None if d is None else d[None] for j, d in zip(watched, delta, strict=True)}
            marks = [self._trace.sites[j].mark for j in watched]
            bad, orders = unowned(pull, u, delta, {i: mark.row_axes for i, mark in enumerate(marks)}, len(u))
            for i, order in orders.items():
                marks[i].take(order)
            self._products.forget()
            mixed = {watched[i] for i in bad}
            self.strange = {j for j in mixed if self._strange(j)}
            return find_mixing(pull, u, self._trace, mixed) if mixed - self.strange else None

    def _strange(self, j: int) -> bool:
        """Whether a site whose rows are no samples' makes only its own parameters slow."""
        mark = self._trace.sites[j].mark
        table = mark.call is not None and isinstance(mark.call.layer, Expanded | Embedding)
        return not mark.coupling and (table or mark.rows % self._passes.samples > 0)

    def disagreeing(
        self, names: list[str], directions: Corrections, error: Mapping[str, float], method: str
    ) -> list[str]:
        """Parameters whose coupled way is not what an ordinary pass is, with a warning: they go the dense way.

        Args:
            names: the parameters to look at.
            directions: the coupling directions for these.
            error: by name, what a truncation has dropped on purpose.
            method: with ``"coupled"`` lost digits are the user's choice, and no reason to go another way.
        """
        found = self._differences(names, directions, error, [lambda: self._probe])
        doubtful = [name for name, d in found.items() if d.theirs]
        anywhere = self._ranks.everybody.union(doubtful, names)
        if anywhere:
            samples = self._shard.total
            make = self._alone if self._products.budget.bounded else functools.cache(self._alone)
            probes = [functools.partial(make, n) for n in range(0, samples, -(-samples // FEW))]
            alone = self._differences(anywhere, directions, error, probes)
            found |= {n: d._replace(cancelled=True) for n, d in alone.items() if n in doubtful}  # their sum agreed
        return self._said({name: d for name, d in found.items() if not d.theirs}, method)

    def _alone(self, n: int) -> Probe:
        """The probe of one sample: where samples meet, an ordinary pass can lose digits that it keeps of each."""
        (u, delta), one = self._probe, torch.zeros_like(self._probe[0])
        own, _ = self._shard.here(slice(n, n + 1))
        one[own] = u[own]
        with self._passes.closed():
            alone = vjp([self._output], self._structure.edges(list(delta)), [one[None]])
        return one, dict(zip(delta, alone, strict=True))

    def _differences(
        self,
        names: list[str],
        directions: Corrections,
        error: Mapping[str, float],
        probes: Sequence[Callable[[], Probe]],
    ) -> dict[str, Difference]:
        """How the coupled way of some probes, made one after the other, differs from ordinary passes."""
        sums: dict[str, list[Sum]] = {name: [] for name in names}
        us = list[Tensor]()
        for probe in probes:
            u, delta = probe()
            us.append(u)
            directions.read(delta, 1)
            for name in names:
                sums[name].append(self._sum(name, delta, directions.correction(name), error.get(name, 0.0)))
            del delta  # before the next one is made
        values = self._ranks.sums({n: torch.stack([s.value for s in of]) for n, of in sums.items()}, "check")
        coupled = {
            name: Sum(
                values[name],
                max(self._ranks.numbers(max(s.terms for s in of))),
                max(self._ranks.numbers(max(s.slack for s in of))),
            )
            for name, of in sums.items()
        }

        def pull(v: Tensor) -> dict[str, Tensor]:
            got = vjp([self._output], [self._products.wanted[n] for n in names], [v], singly=True)
            rows = {n: self._products.zeros(n, len(v)) if g is None else g for n, g in zip(names, got, strict=True)}
            return self._ranks.sums(rows, "check")

        terms: dict[str, float] = {}

        def anywhere(some: list[str]) -> list[str]:
            found = self._ranks.everybody.union(some, names)
            for name in found:  # on all ranks, whether they need it or not
                own = max(self._products.terms(name, probe()[1]) for probe in probes)
                terms[name] = max(self._ranks.numbers(own))
            return found

        return differences(pull, torch.stack(us), coupled, terms.__getitem__, anywhere)

    def _said(self, found: Mapping[str, Difference], method: str) -> list[str]:
        """Warn of differences; the names of those that go the dense way."""
        beyond = [name for name, d in found.items() if not math.isfinite(d.size)]
        lost = {name: d.size for name, d in found.items() if d.cancelled and name not in beyond}
        unseen = {name: d.size for name, d in found.items() if not d.cancelled and name not in beyond}
        if beyond:
            warn_slow(
                f"For {listed(beyond)} the coupled way leaves the range of {self._output.dtype} (the values of a "
                "BatchNorm, squared?). Taking the dense way for them: exact, one backward pass per component."
            )
        if unseen:
            warn_slow(
                f"For {listed(unseen)} the coupled way differs from an ordinary backward pass "
                f"({max(unseen.values()):.0e} relative): something acts on gradients unseen, such as a hook on a node "
                "of the graph. Taking the dense way for them: exact, one backward pass per component."
            )
        if lost and method == "coupled":
            warnings.warn(
                f"The coupled way loses digits for {listed(lost)} to cancellation ({max(lost.values()):.0e} relative). "
                "Use method='auto' or 'dense'.",
                stacklevel=user_level(),
            )
        elif lost:
            warn_slow(
                f"The coupled way loses digits for {listed(lost)} to cancellation ({max(lost.values()):.0e} relative; "
                "few values per channel of a BatchNorm?). Taking the dense way for them: one backward pass per "
                "component."
            )
        return [*beyond, *unseen, *(lost if method != "coupled" else ())]

    def _sum(self, name: str, delta: Mapping[int, Tensor | None], correction: Correction, dropped: float) -> Sum:
        """Σ_k w_k V[k] of a parameter by the coupled way, from the probe's cotangents."""
        own = self._products.summed(name, dict(delta), 1, {})[0]
        rest, slack = correction.summed(own), ROUNDING * dropped
        if self._structure.vanishes(name):  # there an ordinary pass gives the rounding of its terms
            slack += ROUNDING**2 * ulp(own.dtype) * self._products.terms(name, delta)
        return Sum(own + rest, largest(own) + largest(rest), slack)
