"""Chunks of a mask as numbers: cells and needed key rows of each, from which an assignment of chunks to ranks is judged.

Role in the pipeline: `dispatch` makes `Chunks` of a mask once and asks it what every candidate assignment (`owners`, the rank of each
chunk) loads and moves.

The key rows are cut into atoms at every border of a chunk and of a needed range, so that a chunk needs an atom whole or not at all;
`needs[c, a]` is 1 where chunk c needs atom a or hosts it. A rank receives the atoms that its chunks need and it does not host, hence

    rows received by r = rows(union over its chunks of `needs`) - rows hosted by r,

and dispatch is a partition of sets whose unions should stay small.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from seqloom.magi import table as tables
from seqloom.magi.mask import AttnMask


@dataclass(frozen=True, eq=False)
class Chunks:
    """The chunks of one mask, as many for every rank; the last ones may be padding, without cells and needs.

    `kept`: how many chunks exist after dispatch (all in even mode; in uneven mode those that have a row of the sequence).
    `areas`: cells per chunk, int64 `[chunks]`. `needs`: float32 `[chunks, atoms]` of 0 and 1 (floating for matrix products, whose sums
    are whole numbers and exact). `sizes`: rows per atom, float `[atoms]`. `homes`: the chunk that hosts each atom, int64 `[atoms]`.
    """

    chunk_size: int
    num_ranks: int
    total_seqlen: int
    kept: int
    areas: np.ndarray
    needs: np.ndarray
    sizes: np.ndarray
    homes: np.ndarray

    @property
    def count(self) -> int:
        """Number of chunks, a multiple of `num_ranks`."""
        return len(self.areas)

    def members(self, owners: np.ndarray) -> np.ndarray:
        """`[ranks, chunks]` of 0 and 1, in the type of `needs`."""
        return (np.arange(self.num_ranks)[:, None] == owners).astype(self.needs.dtype)

    def loads(self, owners: np.ndarray) -> np.ndarray:
        """Cells per rank, int64 `[ranks]`."""
        loads = np.zeros(self.num_ranks, np.int64)
        np.add.at(loads, owners, self.areas)
        return loads

    def rows_moved(self, owners: np.ndarray) -> np.ndarray:
        """`[ranks, ranks]`: key rows that travel to a rank (first index) from another."""
        members = self.members(owners)
        covered = np.where(members @ self.needs > 0, self.sizes, 0)
        rows = covered @ (members[:, self.homes]).T
        np.fill_diagonal(rows, 0)
        return rows


def chunks_of(mask: AttnMask, chunk_size: int, num_ranks: int, uneven: bool) -> Chunks:
    """The chunks of `mask`, filled up with chunks of padding to a multiple of `num_ranks`."""
    total = mask.total_seqlen_q
    real = -(-total // chunk_size)
    count = -(-real // num_ranks) * num_ranks
    starts = np.arange(count) * chunk_size
    pieces = tables.cut(mask.table, tables.ROWS, starts, starts + chunk_size)
    areas = np.zeros(count, np.int64)
    np.add.at(areas, pieces.part, tables.areas(pieces.table))
    host_starts, host_ends = np.minimum(starts, total), np.minimum(starts + chunk_size, total)
    chunk = np.concatenate((np.arange(count), pieces.part))
    begin = np.concatenate((host_starts, pieces.table[:, 2]))
    end = np.concatenate((host_ends, pieces.table[:, 3]))
    borders = np.unique(np.concatenate((begin, end)))
    sizes = np.diff(borders).astype(np.float32 if total < 2**24 else np.float64)
    needs = _covered(chunk, np.searchsorted(borders, begin), np.searchsorted(borders, end), (count, len(sizes)))
    kept = real if uneven else count
    return Chunks(chunk_size, num_ranks, total, kept, areas, needs.astype(sizes.dtype), sizes, borders[:-1] // chunk_size)


def _covered(rows: np.ndarray, begin: np.ndarray, end: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """bool `shape`: columns [begin[n], end[n]) of row `rows[n]` are true."""
    width = shape[1] + 1
    steps = np.bincount(rows * width + begin, minlength=shape[0] * width) - np.bincount(rows * width + end, minlength=shape[0] * width)
    return np.cumsum(steps.astype(np.int32)).reshape(shape[0], width)[:, :-1] > 0
