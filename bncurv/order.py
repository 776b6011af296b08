"""Whose rows are whose: the rows of a layer's input and output, and the samples that they belong to.

Mostly sample by sample, ``[(n t), ...]``; that is ``None`` wherever an order is asked for. Time-first sequences, two
views joined along the batch, chunks of a batch, graphs of unequal size, shuffled rows have an `Order`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Order:
    """Rows in another order than sample by sample.

    Attributes:
        axes: how many leading axes make up the rows.
        owner: the sample of each row, ``[rows]``.
        samples: N.
    """

    axes: int
    owner: Tensor
    samples: int

    @functools.cached_property
    def rows(self) -> Tensor:
        """The rows sample by sample, ``[rows]``."""
        return self.owner.argsort(stable=True)

    @functools.cached_property
    def starts(self) -> list[int]:
        """Where each sample's rows begin among these, and where they end."""
        return [0, *self.owner.bincount(minlength=self.samples).cumsum(0).tolist()]

    @functools.cached_property
    def even(self) -> bool:
        """Whether all samples have equally many rows."""
        return len({stop - start for start, stop in zip(self.starts, self.starts[1:], strict=False)}) == 1

    def by_sample(self, t: Tensor, lead: int, rows: slice = slice(None)) -> Tensor:
        """``[*lead, *axes, ...]`` → ``[*lead, rows, ...]``, some of the rows sample by sample."""
        return t.flatten(lead, lead + self.axes - 1).index_select(lead, self.rows[rows])


def span(order: Order | None, n: slice, rows: int, samples: int) -> slice:
    """Where the rows of some samples are, of so many rows sample by sample."""
    if order:
        return slice(order.starts[n.start], order.starts[n.stop])
    return slice(n.start * rows // samples, n.stop * rows // samples)


def per_sample(order: Order | None, t: Tensor, n: slice, samples: int) -> Tensor:
    """Rows ``[rows, ...]`` of the samples ``n``, sample by sample, summed for each of them: ``[n, ...]``."""
    count = n.stop - n.start
    if order is None or order.even:
        return t if len(t) == count else t.unflatten(0, (count, -1)).sum(1)
    owner = order.owner[order.rows[order.starts[n.start] : order.starts[n.stop]]]
    return t.new_zeros(count, *t.shape[1:]).index_add_(0, owner - n.start, t)


def summed(order: Order | None, t: Tensor, samples: int) -> Tensor:
    """All rows as they are, ``[rows, ...]``, summed for each sample: ``[n, ...]``."""
    if order is None:
        return t if len(t) == samples else t.unflatten(0, (samples, -1)).sum(1)
    return t.new_zeros(samples, *t.shape[1:]).index_add_(0, order.owner, t)
