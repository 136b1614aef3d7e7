"""Assignments of chunks to ranks that are worth judging: the area-only rule, neighbours kept together, and both improved by swaps.

Role in the pipeline: `dispatch` judges what `area_only` and `candidates` propose. Three starts cover the masks in use:

- `area_only`: as even in area as chunks allow, blind to rows. MagiAttention's rule.
- `contiguous`: rank r takes the r-th part of the sequence. Least rows for windows and short documents.
- `folded`: the r-th part and the r-th from the end, half a part each. Even for one causal document, with fewer rows than area_only.

`search.improve` then swaps chunks. In uneven mode a rank holds at most one chunk of padding, which is dropped later.
"""

from __future__ import annotations

import heapq

import numpy as np

from seqloom.magi.chunks import Chunks
from seqloom.magi.objective import TOLERANCE, AttentionCost
from seqloom.magi.search import improve


def area_only(chunks: Chunks) -> np.ndarray:
    """The rank of every chunk by MagiAttention's rule: chunks by falling area, each to the least loaded rank that has room."""
    room, extra = [chunks.kept // chunks.num_ranks] * chunks.num_ranks, chunks.kept % chunks.num_ranks  # extra: ranks that take one more
    loads = [(0, rank) for rank in range(chunks.num_ranks)]  # a heap of the ranks that may have room
    owners = np.empty(chunks.count, np.int64)
    areas = chunks.areas.tolist()
    for chunk in np.argsort(-chunks.areas[: chunks.kept], kind="stable").tolist():
        load, rank = heapq.heappop(loads)
        while room[rank] == 0 and extra == 0:
            load, rank = heapq.heappop(loads)
        owners[chunk] = rank
        extra -= room[rank] == 0
        room[rank] -= 1
        if room[rank] >= 0:
            heapq.heappush(loads, (load + areas[chunk], rank))
    owners[chunks.kept :] = [rank for rank in range(chunks.num_ranks) if room[rank] == 0][: chunks.count - chunks.kept]
    return owners


def contiguous(chunks: Chunks) -> np.ndarray:
    """The rank of every chunk when each rank takes one part of the sequence."""
    quota = _quota(chunks)
    return _with_padding(chunks, np.repeat(np.arange(chunks.num_ranks), quota), quota)


def folded(chunks: Chunks) -> np.ndarray:
    """The rank of every chunk when parts go to ranks 0, 1, ... up to the middle of the sequence and ..., 1, 0 after it."""
    quota = _quota(chunks)
    ranks, first = np.arange(chunks.num_ranks), quota // 2
    owners = np.concatenate((np.repeat(ranks, first), np.repeat(ranks[::-1], (quota - first)[::-1])))
    return _with_padding(chunks, owners, quota)


def candidates(chunks: Chunks, plain: np.ndarray, cost: AttentionCost) -> list[np.ndarray]:
    """Assignments to judge beside the area-only one, `plain`; none where there is nothing to choose."""
    if chunks.num_ranks == 1 or chunks.count == chunks.num_ranks:
        return []

    def step_seconds(owners: np.ndarray) -> float:
        return cost.step_seconds(chunks.loads(owners), chunks.rows_moved(owners))

    starts = [contiguous(chunks), folded(chunks)]
    units, limit = cost.cells_per_row(chunks.num_ranks), int(chunks.loads(plain).max())
    perfect_s = float(cost.compute_seconds(chunks.areas.sum() / chunks.num_ranks))
    first = starts[1] if step_seconds(starts[1]) <= perfect_s * (1 + TOLERANCE) else starts[0]  # as fast as can be: only rows to save
    found = [*starts, improve(chunks, first, units, limit)]
    even = min((plain, starts[1]), key=step_seconds)
    if step_seconds(found[-1]) > step_seconds(even):  # too uneven to begin with
        found.append(improve(chunks, even, units, limit))
    return found


def _quota(chunks: Chunks) -> np.ndarray:
    """Chunks per rank that are kept: equal, or the first ranks one more."""
    each, extra = divmod(chunks.kept, chunks.num_ranks)
    return each + (np.arange(chunks.num_ranks) < extra)


def _with_padding(chunks: Chunks, owners: np.ndarray, quota: np.ndarray) -> np.ndarray:
    """The owners of kept chunks, and of one padding chunk for each rank that has fewer than the others."""
    return np.concatenate((owners, np.flatnonzero(quota < quota.max())[: chunks.count - chunks.kept]))
