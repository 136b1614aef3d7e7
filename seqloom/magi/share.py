"""What a typical row of documents makes of attention with the sequence split: balance, rows that travel, how much is computed meanwhile.

Role: the planner asks before there is any data or process. In: the lengths of the documents of one row, the number of ranks. Out: a
`Share`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from seqloom.magi.dispatch import CHUNKS_PER_RANK, plan_dispatch
from seqloom.magi.exchange import plan_exchange
from seqloom.magi.mask import AttnMask
from seqloom.magi.masks import infer_attn_mask_from_cu_seqlens


@dataclass(frozen=True)
class Share:
    """Figures of one row: `balance`, the largest area of a rank over the mean; `received`, the most rows of keys that come to a rank;
    `host`, the least part of a rank's area that it can compute before anything has come.
    """

    balance: float
    received: int
    host: float


def documents_mask(borders: Sequence[int]) -> AttnMask:
    """Causal attention inside each document, from cumulative lengths (0 first)."""
    q_ranges, k_ranges, types, *totals = infer_attn_mask_from_cu_seqlens(list(borders), list(borders), causal=True)
    return AttnMask(tuple(map(tuple, q_ranges)), tuple(map(tuple, k_ranges)), tuple(types), tuple(totals))


def even_chunk_size(rows: int, ranks: int) -> int:
    """Rows of a chunk with which `ranks` ranks have whole chunks and equal rows, without padding: a divisor of a rank's share that makes at
    least eight chunks, the largest one; where none is large enough for a kernel (16 rows), fewer chunks.
    """
    local = rows // ranks
    divisors = [size for size in range(1, local + 1) if local % size == 0]
    fitting = [size for size in divisors if size <= local // CHUNKS_PER_RANK and size >= 16]
    return max(fitting) if fitting else min((size for size in divisors if size >= 16), default=local)


@functools.lru_cache(maxsize=256)
def share(documents: tuple[int, ...], ranks: int) -> Share:
    """The figures of one row of `documents` over `ranks` ranks."""
    if ranks == 1:
        return Share(1.0, 0, 1.0)
    mask = documents_mask(list(accumulate(documents, initial=0)))
    dispatch = plan_dispatch(mask, ranks, even_chunk_size(sum(documents), ranks))
    exchange = plan_exchange(mask, dispatch)
    areas = [max(area, 1) for area in dispatch.areas]
    hosts = [sum(band.area for band in exchange.ranks[rank].host) / areas[rank] for rank in range(ranks)]
    return Share(max(areas) * ranks / sum(areas), max(exchange.received_rows), min(hosts))
