"""All transfers of an exchange as arrays: the exact rows that each rank needs and does not host, by source and by stage.

Role in the pipeline: `exchange` reads every rank's sends and receives from this one list, made alike on all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from seqloom.magi import table as tables
from seqloom.magi.dispatch import Dispatch
from seqloom.magi.mask import AttnMask
from seqloom.magi.stages import choose_degree, range_areas, stage_cuts


@dataclass(frozen=True, eq=False)
class Transfers:
    """Entry n: the global rows [start[n], end[n]) go from rank `source[n]` to rank `target[n]` in stage `stage[n]`; all int64.

    Sorted by target, stage, source, start: the order of the receive buffers.
    """

    target: np.ndarray
    source: np.ndarray
    stage: np.ndarray
    start: np.ndarray
    end: np.ndarray

    def picked(self, chosen: np.ndarray) -> Transfers:
        """The entries that `chosen`, indices or a mask, picks."""
        return Transfers(self.target[chosen], self.source[chosen], self.stage[chosen], self.start[chosen], self.end[chosen])

    def to(self, rank: int) -> Transfers:
        """What `rank` receives."""
        return self.picked(self.target == rank)

    def of(self, rank: int) -> Transfers:
        """What `rank` sends."""
        return self.picked(self.source == rank)

    def in_stage(self, stage: int) -> Transfers:
        """What moves in `stage`."""
        return self.picked(self.stage == stage)

    def sorted_by(self, *keys: np.ndarray) -> Transfers:
        """The same entries by `keys`, the first key first."""
        return self.picked(np.lexsort(keys[::-1]))

    def moved(self, num_ranks: int) -> np.ndarray:
        """int64 `[ranks, ranks]`: rows that travel to a rank (first index) from another."""
        moved = np.zeros((num_ranks, num_ranks), np.int64)
        np.add.at(moved, (self.target, self.source), self.end - self.start)
        return moved


def all_transfers(mask: AttnMask, dispatch: Dispatch, degree: int | str) -> tuple[Transfers, int]:
    """The transfers of `mask` over `dispatch`, and the number of stages they are cut into (0 where nothing travels)."""
    ends = np.arange(1, len(dispatch.owners) + 1) * dispatch.chunk_size
    chunk_pieces = tables.cut(mask.table, tables.ROWS, ends - dispatch.chunk_size, ends)
    target, start, end = unions(dispatch.owners[chunk_pieces.part], chunk_pieces.table[:, 2], chunk_pieces.table[:, 3], int(ends[-1]))
    target, source, start, end = _remote(dispatch, target, start, end)
    if not len(target):
        return _sorted(target, source, np.zeros_like(target), start, end), 0
    if degree in (0, 1):
        return _sorted(target, source, np.zeros_like(target), start, end), 1
    areas = range_areas(mask, dispatch, target, start, end)
    if degree == "auto":
        whole = _sorted(target, source, np.zeros_like(target), start, end)
        loads = np.zeros(dispatch.num_ranks, np.int64)
        np.add.at(loads, dispatch.owners[chunk_pieces.part], tables.areas(chunk_pieces.table))
        degree = choose_degree(areas, target, whole.moved(dispatch.num_ranks), loads, dispatch)
    entry, stage, start, end = stage_cuts(areas, target, start, end, int(degree), dispatch)
    return _sorted(target[entry], source[entry], stage, start, end), int(degree)


def unions(rank: np.ndarray, start: np.ndarray, end: np.ndarray, total: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per rank the union of its ranges: (rank, start, end) of disjoint ranges that do not touch, by rank, then rising."""
    if not len(rank):
        return rank, start, end
    stride = total + 1  # ranges of different ranks neither overlap nor touch on the line of rank x stride + row
    order = np.lexsort((start, rank))
    first, last = (rank * stride + start)[order], np.maximum.accumulate((rank * stride + end)[order])
    opens = np.concatenate(([True], first[1:] > last[:-1]))
    closes = np.concatenate((opens[1:], [True]))
    first, last = first[opens], last[closes]
    return first // stride, first % stride, last - first // stride * stride


def _remote(dispatch: Dispatch, target: np.ndarray, start: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, ...]:
    """Ranges cut where the hosting rank changes, without those that the target hosts: (target, source, start, end)."""
    owners, size = dispatch.owners, dispatch.chunk_size
    changes = np.concatenate(([0], np.flatnonzero(np.diff(owners)) + 1, [len(owners)]))
    hosts, run_starts, run_ends = owners[changes[:-1]], changes[:-1] * size, changes[1:] * size
    first = np.searchsorted(run_ends, start, side="right")
    count = np.searchsorted(run_starts, end, side="left") - first
    entry, run = np.repeat(np.arange(len(start)), count), tables.ramps(first, count)
    remote = hosts[run] != target[entry]
    entry, run = entry[remote], run[remote]
    return target[entry], hosts[run], np.maximum(start[entry], run_starts[run]), np.minimum(end[entry], run_ends[run])


def _sorted(target: np.ndarray, source: np.ndarray, stage: np.ndarray, start: np.ndarray, end: np.ndarray) -> Transfers:
    order = np.lexsort((start, source, stage, target))
    return Transfers(target[order], source[order], stage[order], start[order], end[order])
