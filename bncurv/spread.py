"""Where a rank's samples are: among all samples, and among those of its graph."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bncurv.ranks import Ranks


class Shard(NamedTuple):
    """The samples of one rank among those of the ranks that it shares batch statistics with.

    Attributes:
        first: index of the first one.
        own: how many there are here.
        total: how many those ranks have together; of several such groups, the one with most.
        largest: how many the rank with most has. All decide by this and by the total, and so do alike.
        everywhere: how many all ranks have.
        offset: of the first one among the samples of the graph: other than 0 where every rank has the whole batch.
        helpers: how many ranks have the whole batch and divide the work; the total is then what this one does.
    """

    first: int
    own: int
    total: int
    largest: int
    everywhere: int
    offset: int = 0
    helpers: int = 1

    @property
    def held(self) -> int:
        """How many samples the graph of the rank with most holds."""
        return self.everywhere if self.helpers > 1 else self.largest

    def rows(self, n: slice | None = None) -> slice:
        """Samples ``n`` of this rank (default: all) among those of its graph."""
        start, stop = (0, self.own) if n is None else (n.start, n.stop)
        return slice(self.offset + start, self.offset + stop)

    def here(self, n: slice) -> tuple[slice, slice]:
        """Of samples ``n``: which of this rank's they are, and where these are in ``n``."""
        start, stop = (min(max(k - self.first, 0), self.own) for k in (n.start, n.stop))
        shift = self.first - n.start
        return slice(start, stop), slice(start + shift, stop + shift)


def whole(samples: int) -> Shard:
    """All samples on one process."""
    return Shard(0, samples, samples, samples, samples)


class Indices:
    """Where this rank's samples are among all samples of several mini-batches.

    Args:
        everybody: all ranks.
    """

    def __init__(self, everybody: Ranks) -> None:
        self._everybody, self._before, self._found = everybody, 0, list[Tensor]()

    def of(self, samples: int, sharing: Ranks) -> Shard:
        """Of another mini-batch, with the ranks that share its statistics."""
        if sharing.divides:
            mine = sharing.helpers.share(samples)
            own, most = mine.stop - mine.start, -(-samples // sharing.helpers.size)
            self._found.append(torch.arange(self._before + mine.start, self._before + mine.stop, device="cpu"))
            self._before += samples
            return Shard(0, own, own, most, samples, mine.start, sharing.helpers.size)
        counts = [int(n) for n in self._everybody.numbers(samples)]
        first = self._before + sum(counts[: self._everybody.rank])
        self._found.append(torch.arange(first, first + samples, device="cpu"))
        self._before += sum(counts)
        together = [int(n) for n in sharing.numbers(samples)]
        most = int(max(self._everybody.numbers(sum(together))))
        return Shard(sum(together[: sharing.rank]), samples, most, max(counts), sum(counts))

    def found(self) -> Tensor:
        """Indices of all samples of this rank."""
        return torch.cat(self._found)
