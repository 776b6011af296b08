"""From cotangents at the recorded calls to cotangents of their parameters: per sample, summed, squared and summed.

Letters: heads of ``engine.py`` and ``layers/base.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from bncurv.blocks import Correction
from bncurv.budget import USUAL, Budget, chunks
from bncurv.graph import Trace
from bncurv.layers.base import Layer, Product
from bncurv.linearity import Verdict, examine
from bncurv.marks import Call
from bncurv.order import Order, per_sample
from bncurv.passes import vjp
from bncurv.precision import within_range
from bncurv.ranks import ALONE, Ranks
from bncurv.squares import sum_squares
from bncurv.structure import Structure


class Products:
    """Parameter products at the sites of a traced graph.

    Args:
        trace: the traced graph.
        structure: its structure.
        wanted: parameters by name.
        samples: N.
        centred: sites that nothing but the BatchNorm directly behind takes up. They feel their input less its batch
            mean only: for z = W x the mean's part of the coupling makes Σ_s δ_s x_s to Σ_s δ_s (x_s - x̄). Centring x
            does it for nothing, and what cancels (a bias, a constant feature) is never formed.
        keep: whether operands made from the layers' inputs are kept for the next use.
        budget: how much of them, and how much is made of them at once.
        ranks: those that share batch statistics: means are over the samples of all of them.
    """

    def __init__(
        self,
        trace: Trace,
        structure: Structure,
        wanted: Mapping[str, Tensor],
        samples: int,
        centred: Collection[int] = (),
        keep: bool = True,
        ranks: Ranks = ALONE,
        budget: Budget = USUAL,
    ) -> None:
        self._ranks, self.budget = ranks, budget
        self._trace, self._structure, self.wanted, self.samples = trace, structure, wanted, samples
        self.uses, self.centred = structure.uses, centred
        self._room = budget.right if keep else 0
        self._rights: dict[tuple[int, str], Tensor] = {}
        self._first: dict[tuple[int, str], Tensor | None] = {}
        self._kept: dict[tuple[int, str], bool] = {}
        self._means: dict[tuple[int, str], Tensor] = {}
        self._examined: set[tuple[int, str, str]] = set()  # ways through φ
        self._singly: set[tuple[int, str, str]] = set()  # of these, where PyTorch's batched pass is another one

    def zeros(self, name: str, *lead: int) -> Tensor:
        """Zero rows ``[*lead, *p]`` of a parameter."""
        return self.wanted[name].new_zeros((*lead, *self.wanted[name].shape))

    def vanishes(self, name: str) -> bool:
        """Whether all rows of a parameter are zero: a bias whose BatchNorm takes it off again."""
        uses = self.uses.get(name, ())
        return bool(uses) and all(self._centred_ones(j, role) for j, role in uses)

    def terms(self, name: str, delta: Mapping[int, Tensor | None]) -> float:
        """Largest entry of a parameter's product with ``delta [1, n, ...]``, all terms taken positive.

        Times the offset of the BatchNorm directly above, whose own rounding is that much larger.
        """
        total, above = 0.0, {i: j for j, i in self._structure.direct.items()}
        for j, role in self.uses.get(name, ()):
            d, call = delta[j], self._trace.sites[j].call
            if d is not None:
                d = call.by_sample(d)

                def positive(rows: slice, call: Call = call, role: str = role, d: Tensor = d) -> Tensor:
                    left, right = call.layer.left(role, call.arguments, d[:, rows]), call.right(role, rows)
                    return Product(left.abs(), None if right is None else right.abs()).summed()

                size = float(self._over_rows(j, role, positive).amax())
                total += size * max(1.0, self._trace.sites[above[j]].coupling.offset if j in above else 0.0)
        return total

    def forget(self) -> None:
        """What was made of the layers' inputs, before the order of their rows was known."""
        for kept in (self._rights, self._first, self._kept):
            kept.clear()

    # ---------------------------------------------------------------- the layer's input
    def _one_row(self, j: int, role: str) -> Tensor | None:
        """Right operand of the first row of the layer's input, ``[g, 1, s, i]``, without its values; ``None``: ones."""
        if (j, role) not in self._first:
            one = self._trace.sites[j].call.right(role, slice(0, 1))
            self._first[j, role] = None if one is None else one.to("meta")
        return self._first[j, role]

    def _size(self, j: int, role: str) -> int:
        """Bytes of one input row's right operand; 0 for ones."""
        one = self._one_row(j, role)
        return 0 if one is None else one.numel() * one.element_size()

    def piece(self, j: int, role: str) -> int:
        """So many input rows' operands that are not kept are made at once: they stay in cache."""
        return max(1, self.budget.row // max(1, self._size(j, role)))

    def _centred_ones(self, j: int, role: str) -> bool:
        """Whether an operand is zero: a bias's ones, less their mean."""
        return j in self.centred and self._one_row(j, role) is None

    def right(self, j: int, role: str, rows: slice = slice(None)) -> Tensor | None:
        """Right operand of a product, ``[g, n, s, i]``, kept as long as all of them stay small.

        Centred where the site is; then not asked for where it is ones (`_centred_ones`): there is nothing left of them.
        """
        key = j, role
        if self._keep(j, role) and key not in self._rights:
            right = self._trace.sites[j].call.right(role)
            assert right is not None  # its size is not 0
            if j in self.centred:
                known = self.mean(j, role) if self._ranks.size > 1 or key in self._means else right.mean((1, 2), True)
                right = right - self._means.setdefault(key, known)
            self._rights[key] = right
        return self._rights[key][:, rows] if key in self._rights else self._make_right(j, role, rows)

    def _keep(self, j: int, role: str) -> bool:
        """Decide once whether an operand is kept."""
        if (j, role) not in self._kept:
            size = self._size(j, role) * self._trace.sites[j].call.rows
            self._kept[j, role] = 0 < size <= self._room
            self._room -= size if self._kept[j, role] else 0
        return self._kept[j, role]

    def _make_right(self, j: int, role: str, rows: slice) -> Tensor | None:
        right = self._trace.sites[j].call.right(role, rows)
        return right - self.mean(j, role) if right is not None and j in self.centred else right

    def mean(self, j: int, role: str) -> Tensor:
        """Batch mean of a right operand, ``[g, 1, 1, i]``."""
        if (j, role) not in self._means:
            call = self._trace.sites[j].call
            parts = (call.right(role, n) for n in chunks(call.rows, self.piece(j, role)))
            sums, count = [], 0
            for x in parts:
                assert x is not None  # of ones there is no mean
                sums.append(x.sum((1, 2), True))
                count += x.shape[1:3].numel()
            total, number = self._ranks.sum([torch.stack(sums).sum(0), sums[0].new_tensor([count])], "means of inputs")
            self._means[j, role] = total / number
        return self._means[j, role]

    def prepare_means(self) -> None:
        """All means of centred operands, now and in one order on all ranks."""
        for name in self.wanted if self._ranks.size > 1 else ():
            for j, role in self.uses.get(name, ()):
                if j in self.centred and self._one_row(j, role) is not None:
                    self.mean(j, role)

    # ---------------------------------------------------------------- products
    def summed_at(self, j: int, role: str, delta: Tensor) -> Tensor:
        """The product with ``delta [q, ...]`` of what is used at one site, summed over the batch: ``[q, *W]``."""
        call = self._trace.sites[j].call
        shape = call.arguments[role].shape
        if self._centred_ones(j, role):
            return delta.new_zeros(len(delta), *shape)
        delta = call.by_sample(delta)

        def product(rows: slice) -> Tensor:
            left = call.layer.left(role, call.arguments, delta[:, rows])
            return Product(left, self.right(j, role, rows)).summed()

        return call.layer.unfold(role, self._over_rows(j, role, product), shape)

    def _over_rows(self, j: int, role: str, product: Callable[[slice], Tensor]) -> Tensor:
        """A sum over all rows of a site, some at a time where their operands would take too much."""
        rows = self._trace.sites[j].call.rows
        whole = self._keep(j, role) or not self.budget.bounded or not self._size(j, role)
        return functools.reduce(torch.add, map(product, chunks(rows, rows if whole else self.piece(j, role))))

    def summed(self, name: str, delta: dict[int, Tensor | None], count: int, sums: Mapping[int, Tensor]) -> Tensor:
        """A parameter's product with ``count`` cotangents at its sites, summed over the batch: ``[q, *p]``.

        Args:
            name: the parameter.
            delta: cotangents by site.
            count: q.
            sums: by site, what a coupled layer's own parameters receive, where known (`Coupling.summed`).
        """
        total = None
        for j, role in self.uses.get(name, ()):
            d = delta.get(j)
            if d is not None:
                rows = sums[j][:, ("bias", "weight").index(role)] if j in sums else self.summed_at(j, role, d)
                rows = self._through(j, role, name, rows)
                total = rows if total is None else total + rows
        return self.zeros(name, count) if total is None else total

    def by_group(
        self,
        name: str,
        delta: Mapping[int, Tensor | None],
        rows: Mapping[int, Order | None],
        groups: int,
        count: int,
    ) -> Tensor:
        """A parameter's product with ``count`` cotangents, summed over the rows of each group: ``[g, q, *p]``.

        Args:
            name: the parameter.
            delta: cotangents by site.
            rows: by site, the group of each row.
            groups: their number.
            count: q.
        """
        total = self.zeros(name, groups, count)
        for j, role in self.uses.get(name, ()):
            d = delta.get(j)
            if d is None or self._centred_ones(j, role):
                continue
            call = replace(self._trace.sites[j].call, order=rows[j])
            left, right = call.layer.left(role, call.arguments, call.by_sample(d)), call.right(role)
            for g in range(groups):
                some = call.span(slice(g, g + 1), groups)
                part = None if right is None else right[:, some]
                if part is not None and j in self.centred:
                    part = part - self.mean(j, role)
                product = call.layer.unfold(role, Product(left[:, some], part).summed(), call.arguments[role].shape)
                total[g] += self._through(j, role, name, product)
        return total

    def own(self, name: str, delta: dict[int, Tensor | None], n: slice, count: int) -> Tensor:
        """Rows of V with the statistics held constant, ``[n, c, *p]``, contiguous."""
        total = None
        for j, role in self.uses.get(name, ()):
            d = delta[j]
            if d is None or self._centred_ones(j, role):
                continue
            rows = self._own_at(j, role, d, n)
            rows = self._through(j, role, name, rows.flatten(0, 1)).unflatten(0, rows.shape[:2])
            total = rows if total is None else total + rows
        return self.zeros(name, n.stop - n.start, count) if total is None else total.contiguous()

    def _own_at(self, j: int, role: str, delta: Tensor, n: slice) -> Tensor:
        call = self._trace.sites[j].call
        delta, shape = call.by_sample(delta), call.arguments[role].shape
        whole = call.span(n, self.samples)
        if whole.start == whole.stop:
            return delta.new_zeros(n.stop - n.start, len(delta), *shape)
        piece = whole.stop if self._keep(j, role) else self.piece(j, role)
        parts = []
        for some in chunks(whole.stop - whole.start, piece):
            rows = slice(whole.start + some.start, whole.start + some.stop)
            left = call.layer.left(role, call.arguments, delta[:, rows])
            parts.append(Product(left, self.right(j, role, rows)).per_sample())
        found = per_sample(call.order, torch.cat(parts) if parts[1:] else parts[0], n, self.samples)
        return call.layer.unfold(role, found, shape)

    def _through(self, j: int, role: str, name: str, rows: Tensor) -> Tensor:
        """Rows ``[q, *W]`` of a computed parameter W = φ(θ) pulled back through φ: ``[q, *θ]``; else themselves."""
        call, p = self._trace.sites[j].call, self.wanted[name]
        if role not in call.leaves or not len(rows):
            return rows

        def pull(u: Tensor) -> list[Tensor | None]:
            return vjp([call.parameters[role]], [p], [u], singly=True)

        key = j, role, name
        (got,) = vjp([call.parameters[role]], [p], [rows], singly=key in self._singly)
        if key not in self._examined:
            self._examined.add(key)
            if examine(pull, rows, [got]) is not Verdict.RIGHT:
                self._singly.add(key)
                (got,) = pull(rows)
        return self.zeros(name, len(rows)) if got is None else got

    def centre(self, name: str, product: Tensor, received: Mapping[int, Tensor]) -> Tensor:
        """Σ δ x → Σ δ (x - x̄) in ``product [q, *p]``; by site, what its BatchNorm's mean ``received [q, o]``: -Σ δ."""
        if self.vanishes(name):
            return torch.zeros_like(product)
        for j, role in self.uses[name]:
            if j not in received:  # not below this direction
                continue
            if self._centred_ones(j, role):
                product = product + received[j]
            elif j in self.centred:
                mean = self.mean(j, role)  # [g, 1, 1, i]
                shift = received[j].view(len(product), len(mean), -1, 1) * mean[:, 0]
                product = product + shift.view_as(product)
        return product

    # ---------------------------------------------------------------- squares from factors
    def factors(self, name: str) -> bool:
        """Whether a parameter's rows are products of one call, each of one row of its input."""
        uses = self.uses.get(name, ())
        if len(uses) != 1 or uses[0][1] in self._trace.sites[uses[0][0]].call.leaves:
            return False
        call = self._trace.sites[uses[0][0]].call
        right = self._one_row(*uses[0])
        single = call.rows == self.samples and (call.order is None or call.order.even)
        one = right is not None and right.shape[:2] == (1, 1) and single
        return one and type(call.layer).unfold is Layer.unfold

    def positions(self, name: str) -> tuple[int, int]:
        """Positions s and features i of its input's operand; where `factors`."""
        right = self._one_row(*self.uses[name][0])
        assert right is not None
        return right.shape[2], right.shape[3]

    def in_range(self, name: str, delta: Mapping[int, Tensor | None], correction: Correction) -> bool:
        """Whether squares of the factors stay in the dtype's range."""
        ((j, role),) = self.uses[name]
        d, right = delta[j], self.right(j, role)
        assert right is not None
        coefficients = [correction.A, *(a.flatten(2) for a, _ in correction.direct)]
        factors = [right[0].flatten(1), None if d is None else d.flatten(2), *coefficients]
        return all(within_range(t) for t in factors if t is not None)

    def sum_squares(
        self, name: str, delta: dict[int, Tensor | None], count: int, correction: Correction, n: slice = slice(None)
    ) -> Tensor:
        """Σ V² over samples ``n``, whose correction it is, and ``count`` columns of each, ``[*p]``; where `factors`."""
        ((j, role),) = self.uses[name]
        call, d, right = self._trace.sites[j].call, delta[j], self.right(j, role)
        assert right is not None
        d = right.new_zeros(count, *call.output) if d is None else d
        left = call.layer.left(role, call.arguments, call.by_sample(d))[:, :, 0]
        return sum_squares(left[:, n], right[0, n], correction, self.budget).view_as(self.wanted[name])
