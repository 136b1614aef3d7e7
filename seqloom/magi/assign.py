"""Assignments of chunks to ranks: the area-only rule, three starts that keep neighbours together, and a search by swaps."""

from __future__ import annotations

import numpy as np

from seqloom.magi.chunks import Chunks
from seqloom.magi.objective import AttentionCost


def area_only(chunks: Chunks) -> np.ndarray:
    """The rank of every chunk by MagiAttention's rule: chunks by falling area, each to the least loaded rank that has room."""
    room = np.full(chunks.num_ranks, chunks.count // chunks.num_ranks)
    loads = np.zeros(chunks.num_ranks, np.int64)
    owners = np.empty(chunks.count, np.int64)
    for chunk in np.argsort(-chunks.areas, kind="stable"):
        rank = int(np.where(room > 0, loads, np.iinfo(np.int64).max).argmin())
        owners[chunk] = rank
        loads[rank] += chunks.areas[chunk]
        room[rank] -= 1
    return owners


def candidates(chunks: Chunks, plain: np.ndarray, cost: AttentionCost) -> list[np.ndarray]:
    """Assignments worth judging beside the area-only one, `plain`."""
    per_rank = chunks.count // chunks.num_ranks
    contiguous = np.arange(chunks.count) // per_rank
    return [contiguous]
