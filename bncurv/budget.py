"""Bytes held at once, and the slices that keep to them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

MiB = 2**20
UNITS = {f"{letter}{i}B": (1024 if i else 1000) ** k for k, letter in enumerate("KMGT", 1) for i in ("", "i")}


TALL = 128  # rows and directions from which on the correction is bound by arithmetic
ROW_COPIES = 3  # rows of V, and what is made of them on the way
BLOCK_COPIES = 4  # likewise


@dataclass(frozen=True)
class Budget:
    """Most bytes held at once of everything that comes in pieces; the defaults are fast.

    Attributes:
        chunk: cotangents of all layers held at once.
        widest: the widest of them, or of a parameter's rows: stays in cache, and in pages the process has.
        right: unfolded inputs of all layers kept for reuse.
        direction: P of the parameters that are worked on at once.
        row: rows of V of one parameter held at once, or of a layer's unfolded input: stays in cache while they are
            squared.
        block: of P at once, or of Σ_c A δ, in the squares from factors: stays in cache.
        small: V of this size is cheaper than working through the graph.
        bounded: whether there is a limit to all of it together (`within`), and not to the parts alone.
    """

    chunk: int = 16 * MiB
    widest: int = 3 * MiB
    right: int = 16 * MiB
    direction: int = 2048 * MiB
    row: int = 4 * MiB
    block: int = 8 * MiB
    small: int = 32 * MiB
    bounded: bool = False

    @classmethod
    def within(cls, room: int, least: Sizes, useful: Sizes) -> Budget:
        """Sizes that take at most ``room`` bytes more than the least ones, and no more than is useful."""
        rows = max(ROW_COPIES * useful.row, BLOCK_COPIES * useful.block)
        chunk, right, direction, rows = divided(room, [useful.chunk, useful.right, useful.direction, rows])
        return cls(
            chunk=least.chunk + chunk,
            right=least.right + right,
            direction=least.direction + direction,
            row=least.row + rows // ROW_COPIES,
            block=least.block + rows // BLOCK_COPIES,
            bounded=True,
        )


USUAL = Budget()  # without a limit


class Sizes(NamedTuple):
    """Bytes of what comes in pieces, see `Budget`."""

    chunk: int
    right: int = 0
    direction: int = 0
    row: int = 0
    block: int = 0

    @property
    def total(self) -> int:
        """All of them together; rows and blocks are not there at once."""
        rows = max(ROW_COPIES * self.row, BLOCK_COPIES * self.block)
        return self.chunk + self.right + self.direction + rows


def divided(room: int, wishes: Sequence[int]) -> list[int]:
    """Equal shares of a room, but nobody gets more than a wish; what is left goes to the others."""
    shares = [0] * len(wishes)
    for number, i in enumerate(sorted(range(len(wishes)), key=wishes.__getitem__)):
        shares[i] = min(wishes[i], room // (len(wishes) - number))
        room -= shares[i]
    return shares


def bytes_of(memory: Any) -> int | None:
    """A number of bytes, or a string such as ``"2GB"`` or ``"512 MiB"``.

    Raises:
        ValueError: for anything else.
    """
    if memory is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B)", memory.strip()) if isinstance(memory, str) else None
    size = int(float(found[1]) * UNITS[found[2]]) if found else memory
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(
            f"memory={memory!r}; expected a positive number of bytes, or a string such as '2GB' or '512MiB' (KB, MB, "
            "GB, TB: powers of 1000; KiB, MiB, GiB, TiB: of 1024)."
        )
    return size


def chunks(total: int, size: int) -> Iterator[slice]:
    """Slices of at most ``size`` that cover ``range(total)``."""
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))
