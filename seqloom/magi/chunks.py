"""Chunks of a mask as numbers: cells and needed key rows of each, from which an assignment of chunks to ranks is judged.

Role in the pipeline: `dispatch` makes `Chunks` of a mask once and asks it what every candidate assignment (`owners`, the rank of each
chunk) loads and moves.

The key rows are cut into atoms at every border of a chunk and of a needed range, so that a chunk needs an atom whole or not at all;
`needs[c, a]` says whether chunk c needs atom a or hosts it. A rank receives the atoms that its chunks need and it does not host, hence

    rows received by r = rows(union over its chunks of `needs`) - rows hosted by r,

and dispatch is a partition of sets whose unions should stay small. All numbers are whole, so every rank finds the same ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from seqloom.magi import table as tables
from seqloom.magi.mask import AttnMask


@dataclass(frozen=True, eq=False)
class Chunks:
    """The chunks of one mask, as many for every rank; the last ones may be padding, without cells and needs.

    `kept`: how many chunks exist after dispatch (all in even mode; in uneven mode those that have a row of the sequence).
    `areas`: cells per chunk, int64 `[chunks]`. `needs`: bool `[chunks, atoms]`. `borders`: the first row of every atom and the end of the
    last, int64 `[atoms + 1]`.
    """

    chunk_size: int
    num_ranks: int
    kept: int
    areas: np.ndarray
    needs: np.ndarray
    borders: np.ndarray

    @property
    def total_seqlen(self) -> int:
        """Rows of the sequence, without padding."""
        return int(self.borders[-1])

    @property
    def count(self) -> int:
        """Number of chunks, a multiple of `num_ranks`."""
        return len(self.areas)

    @cached_property
    def sizes(self) -> np.ndarray:
        """Rows per atom, int64 `[atoms]`."""
        return np.diff(self.borders)

    @cached_property
    def homes(self) -> np.ndarray:
        """The first atom of every chunk and the end of the last chunk's, int64 `[chunks + 1]`; padding has no atoms."""
        return np.searchsorted(self.borders[:-1], np.arange(self.count + 1) * self.chunk_size)

    @cached_property
    def hosted(self) -> np.ndarray:
        """Rows of the sequence in every chunk, int64 `[chunks]`."""
        return self.borders[self.homes[1:]] - self.borders[self.homes[:-1]]

    @cached_property
    def spans(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`needs` as runs of atoms: (first run of each chunk, first atom of each run, end of each run); every chunk has at least one run,
        if an empty one."""
        steps = np.diff(self.needs.astype(np.int8), axis=1, prepend=0, append=0)
        chunk, first = np.nonzero(steps > 0)
        end = np.nonzero(steps < 0)[1]
        empty = np.setdiff1d(np.arange(self.count), chunk)
        order = np.argsort(np.concatenate((chunk, empty)), kind="stable")
        first, end = (np.concatenate((column, np.zeros_like(empty)))[order] for column in (first, end))
        return np.searchsorted(np.sort(np.concatenate((chunk, empty))), np.arange(self.count)), first, end

    def slots(self, owners: np.ndarray) -> np.ndarray:
        """The chunks of every rank, `[ranks, chunks per rank]`, rising."""
        return np.argsort(owners, kind="stable").reshape(self.num_ranks, -1)

    def loads(self, owners: np.ndarray) -> np.ndarray:
        """Cells per rank, int64 `[ranks]`."""
        return self.areas[self.slots(owners)].sum(axis=1)

    def rows_moved(self, owners: np.ndarray) -> np.ndarray:
        """`[ranks, ranks]`: key rows that travel to a rank (first index) from another."""
        slots = self.slots(owners)
        covered = np.where(self.needs[slots].any(axis=1), self.sizes, 0)
        before = np.concatenate((np.zeros((self.num_ranks, 1), np.int64), np.cumsum(covered, axis=1)), axis=1)
        by_chunk = before[:, self.homes[1:]] - before[:, self.homes[:-1]]
        rows = by_chunk[:, slots].sum(axis=2)
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
    needs = _covered(chunk, np.searchsorted(borders, begin), np.searchsorted(borders, end), (count, len(borders) - 1))
    return Chunks(chunk_size, num_ranks, real if uneven else count, areas, needs, borders)


def _covered(rows: np.ndarray, begin: np.ndarray, end: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """bool `shape`: columns [begin[n], end[n]) of row `rows[n]` are true."""
    width = shape[1] + 1
    steps = np.bincount(rows * width + begin, minlength=shape[0] * width) - np.bincount(rows * width + end, minlength=shape[0] * width)
    return np.cumsum(steps.astype(np.int32)).reshape(shape[0], width)[:, :-1] > 0
