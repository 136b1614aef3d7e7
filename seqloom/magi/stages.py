"""Stages of an exchange: how many, and where the rows of each rank are cut, so that rows travel while others are computed with.

Role in the pipeline: `transfers` asks for more than one stage only here. While stage i + 1 travels, stage i is computed; stages are even
when each has the same share of the rank's predicted seconds, of moving its rows and of computing with them. Weights are whole numbers of
cells, a row counting as many cells as could be computed while it travels, so that all ranks cut alike.
"""

from __future__ import annotations

import numpy as np

from seqloom.magi import table as tables
from seqloom.magi.dispatch import Dispatch
from seqloom.magi.mask import AttnMask

MOST_STAGES = 4  # that "auto" takes: more save little, and small kernels and messages fall below the rates of the cost model


def choose_degree(areas: np.ndarray, target: np.ndarray, moved: np.ndarray, loads: np.ndarray, dispatch: Dispatch) -> int:
    """The number of stages, 1 to `MOST_STAGES`, with the least predicted step; of equals the smallest.

    `areas[n]`: cells that rank `target[n]` computes with range n; `moved` as `Exchange.moved`; `loads`: all cells of each rank.
    """
    cost = dispatch.cost
    remote_areas = np.zeros(dispatch.num_ranks, np.int64)
    np.add.at(remote_areas, target, areas)
    host, remote = cost.compute_seconds(loads - remote_areas), cost.compute_seconds(remote_areas)
    exchange, latency = cost.exchange_seconds(moved), cost.latency_seconds(moved)
    seconds = [_pipeline_seconds(host, remote, exchange, latency, cost.launch_s, degree) for degree in range(1, MOST_STAGES + 1)]
    return 1 + int(np.argmin(seconds))


def _pipeline_seconds(
    host: np.ndarray, remote: np.ndarray, exchange: np.ndarray, latency: np.ndarray, launch_s: float, degree: int
) -> float:
    """Seconds of the slowest rank: a stage is computed once it has arrived and the one before it is done; all arrays `[ranks]`."""
    arrival = (exchange - latency) / degree + latency
    done = host
    for stage in range(1, degree + 1):
        done = np.maximum(done, stage * arrival) + remote / degree + launch_s
    return float(done.max())


def range_areas(mask: AttnMask, dispatch: Dispatch, target: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Cells that rank `target[n]` has in the columns [start[n], end[n]); entries by target, then rising. int64 `[entries]`."""
    areas = np.zeros(len(target), np.int64)
    borders = np.searchsorted(target, np.arange(dispatch.num_ranks + 1))
    for rank, (first, last) in enumerate(zip(borders[:-1], borders[1:], strict=True)):
        rows = tables.cut(mask.table, tables.ROWS, *dispatch.runs(rank))
        pieces = tables.cut(rows.table, tables.COLUMNS, start[first:last], end[first:last])
        np.add.at(areas, first + pieces.part, tables.areas(pieces.table))
    return areas


def stage_cuts(
    areas: np.ndarray, target: np.ndarray, start: np.ndarray, end: np.ndarray, degree: int, dispatch: Dispatch
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Ranges of every rank (by target, then rising) cut into `degree` even stages: (entry cut, stage, start, end) of the pieces."""
    weights = areas + dispatch.cost.cells_per_row(dispatch.num_ranks) * (end - start)
    borders = np.searchsorted(target, np.arange(dispatch.num_ranks + 1))
    pieces = []
    for first, last in zip(borders[:-1], borders[1:], strict=True):
        if first < last:
            cuts = _cut_rows(weights[first:last], start[first:last], end[first:last], degree)
            entry, stage, begin, stop = _split(start[first:last], end[first:last], cuts)
            pieces.append((entry + first, stage, begin, stop))
    entry, stage, begin, stop = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
    return entry, stage, begin, stop


def _cut_rows(weights: np.ndarray, start: np.ndarray, end: np.ndarray, degree: int) -> np.ndarray:
    """The degree - 1 global rows that cut one rank's ranges into shares of equal weight; within a range weight is taken as even."""
    before = np.concatenate(([0], np.cumsum(weights)))
    wanted = before[-1] * np.arange(1, degree) // degree
    entry = np.clip(np.searchsorted(before, wanted, side="right") - 1, 0, len(weights) - 1)
    share = (wanted - before[entry]) / np.maximum(weights[entry], 1)
    return start[entry] + np.floor(share * (end - start)[entry]).astype(np.int64)


def _split(start: np.ndarray, end: np.ndarray, cuts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """One rank's ranges split at the rows `cuts`: (range, stage, start, end)."""
    stage_starts = np.concatenate(([0], cuts))
    stage_ends = np.concatenate((cuts, [max(end[-1], cuts[-1])])) if len(cuts) else end[-1:]
    first = np.searchsorted(stage_ends, start, side="right")
    count = np.searchsorted(stage_starts, end, side="left") - first
    entry, stage = np.repeat(np.arange(len(start)), count), tables.ramps(first, count)
    begin, stop = np.maximum(start[entry], stage_starts[stage]), np.minimum(end[entry], stage_ends[stage])
    kept = begin < stop
    return entry[kept], stage[kept], begin[kept], stop[kept]
