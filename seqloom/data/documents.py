"""The documents inside packed rows: their borders, where they lie in a data set, and what a micro-batch says of them.

The borders of a row are its `cu_seqlens`: where each document in it (or piece of one that the end of a row cuts) begins, and the row's
length behind the last. Many rows are held as two arrays, the way Arrow holds a column of lists, so that nothing here loops over rows.
In: the ends of documents while rows are packed, or the column of a data set. Out: borders of rows, or of a whole micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

CU_SEQLENS = "cu_seqlens"  # the column of borders
SCAN_ROWS = 2**16  # read at once when the borders of all rows are looked at


@dataclass(frozen=True)
class Borders:
    """The borders of rows: those of row r are `values[offsets[r] : offsets[r + 1]]`.

    `values` is int32, 0 first in each row and the row's length last; `offsets` is int64 `[rows + 1]`.
    """

    values: np.ndarray
    offsets: np.ndarray


def find_borders(ends: np.ndarray, rows: int, seq_len: int) -> Borders:
    """The borders of `rows` rows of `seq_len` tokens that lie one after the other.

    `ends`: where documents end, as numbers of tokens from the first row's start, in (0, rows * seq_len]; any order, doubles allowed.
    """
    starts = np.unique(np.concatenate((ends[ends < rows * seq_len], np.arange(rows) * seq_len)))
    documents = np.bincount(starts // seq_len, minlength=rows)
    offsets = np.concatenate(([0], np.cumsum(documents + 1)))
    is_start = np.ones(offsets[-1], bool)
    is_start[offsets[1:] - 1] = False
    values = np.full(offsets[-1], seq_len, np.int32)
    values[is_start] = starts % seq_len
    return Borders(values, offsets)


def read_borders(column: pa.ChunkedArray) -> Borders:
    """The borders of rows out of a column of lists. What is null there becomes what `first_bad_row` finds."""
    counts = np.concatenate([np.empty(0, np.int64), *(chunk.value_lengths().fill_null(0).to_numpy() for chunk in column.chunks)])
    values = np.concatenate([np.empty(0, np.int32), *(chunk.flatten().fill_null(-1).to_numpy() for chunk in column.chunks)])
    return Borders(values, np.concatenate(([0], np.cumsum(counts))))


def scan_borders(table: Dataset) -> Iterator[Borders]:
    """The borders of all rows of a data set with such a column, many rows at a time."""
    for batch in table.select_columns([CU_SEQLENS]).with_format("arrow").iter(batch_size=SCAN_ROWS):
        yield read_borders(batch[CU_SEQLENS])


def first_bad_row(borders: Borders, seq_len: int) -> int | None:
    """The first row whose borders do not rise strictly from 0 to `seq_len`, or None."""
    values, offsets = np.append(borders.values.astype(np.int64), 0), borders.offsets  # one more, so that an empty row points at something
    rises = np.append(np.diff(values) > 0, True)
    rises[offsets[1:] - 1] = True  # from one row to the next
    bad = (np.diff(offsets) < 2) | (values[offsets[:-1]] != 0) | (values[offsets[1:] - 1] != seq_len)
    bad |= ~np.logical_and.reduceat(rises, offsets[:-1])
    return int(np.argmax(bad)) if bad.any() else None


def squared_lengths(borders: Borders) -> np.ndarray:
    """The sum of the squared lengths of each row's documents, int64 `[rows]`: in proportion to the work of their attention."""
    lengths = np.append(np.diff(borders.values.astype(np.int64)), 0)
    lengths[borders.offsets[1:] - 1] = 0  # from one row to the next
    return np.add.reduceat(lengths**2, borders.offsets[:-1])


def typical_row(table: Dataset) -> tuple[int, ...]:
    """The lengths of the documents in the row whose sum of squared lengths is the median of all rows.

    Of an even number of rows the lower of the two in the middle, of equal rows the first.
    """
    work = np.concatenate([squared_lengths(borders) for borders in scan_borders(table)])
    row = int(np.argmax(work == np.sort(work)[(len(work) - 1) // 2]))
    return tuple(np.diff(table[row][CU_SEQLENS]).tolist())


def squash(borders: Borders, seq_len: int) -> np.ndarray:
    """The borders of all documents of rows laid one after the other, int64: `[0, ..., seq_len, ..., rows * seq_len]`."""
    rows = len(borders.offsets) - 1
    shifts = np.repeat(np.arange(rows, dtype=np.int64) * seq_len, np.diff(borders.offsets))
    is_start = np.ones(len(borders.values), bool)
    is_start[borders.offsets[1:] - 1] = False
    return np.append((borders.values + shifts)[is_start], rows * seq_len)


def restarting_positions(cu_seqlens: np.ndarray) -> np.ndarray:
    """The position of every token in its document, int64 `[cu_seqlens[-1]]`: 0 at each border."""
    return np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], np.diff(cu_seqlens))
