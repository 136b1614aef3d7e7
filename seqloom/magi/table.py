"""Many bands at once: int64 arrays `[bands, 6]` whose columns are the fields of `Band`, in their order.

Role in the pipeline: dispatch and exchange cut hundreds of bands to hundreds of ranges for every mask of every batch; here one numpy call
does what `Band.tight`, `Band.area` and `Band.cut` do for one band. Rows of a table are in global or local coordinates, as the caller says.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from seqloom.magi.bands import Band

ROWS, COLUMNS = 0, 2  # first column of a table for the row range and for the column range


@dataclass(frozen=True)
class Pieces:
    """Bands cut to ranges: `table[n]` is the tight cut of band `band[n]` to range `part[n]`; without empty ones, by band, then by range."""

    table: np.ndarray
    band: np.ndarray
    part: np.ndarray


def areas(table: np.ndarray) -> np.ndarray:
    """Number of cells of every band of a tight `table`, int64 `[bands]`."""
    q_start, q_end, k_start, k_end, lo, hi = table.T
    return _cells_up_to(q_start, q_end, k_start, k_end, hi) - _cells_up_to(q_start, q_end, k_start, k_end, lo - 1)


def cut(table: np.ndarray, axis: int, starts: np.ndarray, ends: np.ndarray) -> Pieces:
    """Every band of `table` cut to every range [starts[n], ends[n]) that it meets, of rows (`axis=ROWS`) or columns (`axis=COLUMNS`).

    The ranges rise and share nothing.
    """
    first = np.searchsorted(ends, table[:, axis], side="right")
    count = np.maximum(np.searchsorted(starts, table[:, axis + 1], side="left") - first, 0)
    band = np.repeat(np.arange(len(table)), count)
    part = ramps(first, count)
    cut_table = table[band]
    cut_table[:, axis] = np.maximum(cut_table[:, axis], starts[part])
    cut_table[:, axis + 1] = np.minimum(cut_table[:, axis + 1], ends[part])
    cut_table, kept = tight(cut_table)
    return Pieces(cut_table, band[kept], part[kept])


def tight(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The bands of `table` that have a cell, tight, and their indices in `table`."""
    q_start, q_end, k_start, k_end, lo, hi = table.T
    first, last = np.maximum(q_start, k_start - hi), np.minimum(q_end, k_end - lo)
    kept = np.flatnonzero((lo <= hi) & (k_start < k_end) & (first < last))
    first, last, k_start, k_end, lo, hi = (column[kept] for column in (first, last, k_start, k_end, lo, hi))
    left, right = np.maximum(k_start, first + lo), np.minimum(k_end, last + hi)
    rows = (first, last, left, right, np.maximum(lo, left - last + 1), np.minimum(hi, right - 1 - first))
    return np.stack(rows, axis=1), kept


def shift(table: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """`table` in coordinates that are larger by `rows[n]` and `columns[n]` for band n."""
    turn = columns - rows
    return table + np.stack((rows, rows, columns, columns, turn, turn), axis=1)


def to_bands(table: np.ndarray) -> tuple[Band, ...]:
    """The bands of `table` as objects."""
    return tuple(Band(*row) for row in table.tolist())


def ramps(first: np.ndarray, count: np.ndarray) -> np.ndarray:
    """first[0], first[0] + 1, ... (count[0] numbers), then the same from first[1], and so on."""
    ends = np.cumsum(count)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(first - (ends - count), count)


def _cells_up_to(q_start: np.ndarray, q_end: np.ndarray, k_start: np.ndarray, k_end: np.ndarray, diagonal: np.ndarray) -> np.ndarray:
    """As `Band._cells_up_to`, for arrays."""
    first, last, columns = q_start + diagonal + 1 - k_start, q_end + diagonal - k_start, k_end - k_start
    return _triangle(last) - _triangle(first - 1) - _triangle(last - columns) + _triangle(first - columns - 1)


def _triangle(n: np.ndarray) -> np.ndarray:
    n = np.maximum(n, 0)
    return n * (n + 1) // 2
