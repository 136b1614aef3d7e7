"""A band cut into what fused attention kernels know: full rectangles, lower triangles (causal squares) and upper triangles.

Role: `slices` runs a kernel for each; the planner counts their areas before there is any kernel, so nothing here imports PyTorch.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from seqloom.magi.bands import Band

Form = Literal["full", "lower", "upper"]


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows [q_start, q_end) x columns [k_start, k_end): all cells, or of a square those under (over) its diagonal, with it."""

    q_start: int
    q_end: int
    k_start: int
    k_end: int
    form: Form


@functools.lru_cache(maxsize=1024)
def pieces(band: Band) -> tuple[Piece, ...]:
    """The cells of a band as full rectangles and triangles, each cell once."""
    return tuple(_pieces(band))


def _pieces(band: Band) -> Iterator[Piece]:
    tight = band.tight()
    if tight is None:
        return
    low = tight.lo > tight.k_start - (tight.q_end - 1)  # the lower diagonal cuts cells off
    high = tight.hi < tight.k_end - 1 - tight.q_start
    if not low and not high:
        yield Piece(tight.q_start, tight.q_end, tight.k_start, tight.k_end, "full")
    elif low and high:
        yield from _between(tight)
    elif high:
        yield from _under(tight)
    else:
        yield from _over(tight)


def _under(band: Band) -> Iterator[Piece]:
    """Cells with j - i <= hi: a triangle where the diagonal crosses, full columns to its left, full rows below."""
    end = min(band.q_end, band.k_end - band.hi)  # the first row that sees all columns, or behind the last
    start = max(band.q_start, band.k_start - band.hi)
    left = start + band.hi  # of the triangle's first row: its last column
    if left > band.k_start:
        yield Piece(start, end, band.k_start, left, "full")
    yield Piece(start, end, left, end + band.hi, "lower")
    if end < band.q_end:
        yield Piece(end, band.q_end, band.k_start, band.k_end, "full")


def _over(band: Band) -> Iterator[Piece]:
    """Cells with j - i >= lo: as `_under`, turned round."""
    mirrored = Band(-band.q_end, -band.q_start, -band.k_end, -band.k_start, -band.hi, -band.lo)
    turned: dict[Form, Form] = {"full": "full", "lower": "upper"}
    for piece in _under(mirrored):
        yield Piece(1 - piece.q_end - 1, 1 - piece.q_start - 1, -piece.k_end, -piece.k_start, turned[piece.form])


def _between(band: Band) -> Iterator[Piece]:
    """Cells between two diagonals: stretches of rows no longer than the band is wide, each cut at the column where the diagonals part."""
    width = band.hi - band.lo + 1
    for start in range(band.q_start, band.q_end, width):
        end = min(start + width, band.q_end)
        middle = start + band.hi  # row `start` ends here: further columns know no lower diagonal in this stretch but the first
        for columns in ({"k_end": middle + 1}, {"k_start": middle + 1}):
            part = band.cut(q_start=start, q_end=end, **columns)
            if part is not None:
                yield from _pieces(part)
