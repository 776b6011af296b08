"""Bytes held at once, and the slices that keep to them."""

from __future__ import annotations

from collections.abc import Iterator

CHUNK_BYTES = 16 * 2**20  # cotangents of all layers held at once
WIDEST_BYTES = 3 * 2**20  # the widest of them, or of a parameter's rows: stays in cache, and in pages the process has
RIGHT_BYTES = 16 * 2**20  # unfolded inputs of all layers kept for reuse
DIRECTION_BYTES = 2 * 2**30  # P of the parameters that are worked on at once
ROW_BYTES = 4 * 2**20  # rows of V of one parameter held at once: stays in cache while they are squared
BLOCK_BYTES = 8 * 2**20  # of P at once, or of Σ_c A δ, in the squares from factors: stays in cache
SMALL_BYTES = 32 * 2**20  # V of this size is cheaper than working through the graph


def chunks(total: int, size: int) -> Iterator[slice]:
    """Slices of at most ``size`` that cover ``range(total)``."""
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))
