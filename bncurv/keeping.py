"""What a point keeps of one call for the next: rows of V where they are small (`point.py`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bncurv.blocks import Rows, Source, Squares
from bncurv.budget import USUAL
from bncurv.ranks import Ranks

Block = Rows | Squares


class Keeping:
    """Rows of V by source, as they came.

    Args:
        kept: what the batch keeps; ``None``: nothing.
        samples: of this process.
        ranks: all of them keep the same, for they meet again in messages.
        row: bytes of one row, all parameters together.
        whole: whether the rows are all there is to know: nothing was dropped, nothing is asked of their own parts.
    """

    def __init__(self, kept: dict[Any, Any] | None, samples: int, ranks: Ranks, row: int, whole: bool) -> None:
        self._rows: dict[str, tuple[str, list[Rows]]] | None = None
        if kept is not None and whole:
            self._rows = kept.setdefault("rows", {})
        self._samples, self._ranks, self._row = samples, ranks, row

    def ways(self, keys: list[str]) -> dict[str, str]:
        """Of sources whose rows are here, the way that they came."""
        return {key: self._rows[key][0] for key in keys if self._rows and key in self._rows}

    def again(self, key: str) -> Iterator[Rows]:
        """The rows of a source once more; whoever takes them may change them."""
        assert self._rows is not None
        for rows in self._rows[key][1]:
            yield rows._replace(values=rows.values.clone())

    def watched(self, way: str, sources: dict[str, Source], blocks: Iterator[tuple[str, Block]]) -> Iterator[Any]:
        """The blocks as they come; those of sources whose rows are small are kept, once all have come."""
        found: dict[str, list[Rows] | None] = {}
        for key, source in sources.items() if self._rows is not None else ():
            size = self._samples * source.columns_per_sample * self._row
            found[key] = [] if size <= USUAL.small else None
        for key, block in blocks:
            rows = found.get(key)
            if rows is not None:
                if isinstance(block, Rows):
                    rows.append(block._replace(values=block.values.clone(), correction=None))
                else:
                    found[key] = None  # squares do not make rows
            yield key, block
        for key, rows in found.items():
            if self._ranks.all(rows is not None) and rows is not None and self._rows is not None:
                self._rows[key] = way, rows
