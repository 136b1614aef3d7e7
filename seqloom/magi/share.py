"""What a typical row of documents makes of attention with the sequence split: balance, rows that travel, how much is computed meanwhile.

Role: the planner asks before there is any data or process. In: the lengths of the documents of one row, the number of ranks, the sliding
windows of the model. Out: a `Share`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from seqloom.magi.bands import Band
from seqloom.magi.dispatch import CHUNKS_PER_RANK, plan_dispatch
from seqloom.magi.exchange import plan_exchange
from seqloom.magi.mask import AttnMask
from seqloom.magi.masks import infer_attn_mask_from_cu_seqlens
from seqloom.magi.pieces import pieces
from seqloom.magi.windows import Windows, cut_to_window, widest


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
def share(documents: tuple[int, ...], ranks: int, window: int | None = None, windows: Windows = ()) -> Share:
    """The figures of one row of `documents` over `ranks` ranks for layers with `window`.

    `windows` are those of all layers where they differ: rows are laid out for the widest of them.
    """
    if ranks == 1:
        return Share(1.0, 0, 1.0)
    mask = documents_mask(list(accumulate(documents, initial=0)))
    laid_out = cut_to_window(mask, widest(windows or (window,)))
    dispatch = plan_dispatch(laid_out, ranks, even_chunk_size(sum(documents), ranks))
    exchange = plan_exchange(cut_to_window(mask, window), dispatch)
    hosts = [_area(plan.host) for plan in exchange.ranks]
    areas = [max(host + sum(_area(s.bands) for s in plan.stages), 1) for host, plan in zip(hosts, exchange.ranks, strict=True)]
    balance = max(areas) * ranks / sum(areas)
    return Share(balance, max(exchange.received_rows), min(host / area for host, area in zip(hosts, areas, strict=True)))


def _area(bands: Sequence[Band]) -> int:
    return sum(band.area for band in bands)


@functools.lru_cache(maxsize=1024)
def visible_pairs(length: int, window: int | None = None) -> int:
    """Pairs of a query and a key that a causal document counts for; a diagonal at an edge of its mask counts half.

    Under a window these are the rectangles and triangles that fused kernels run, so that counting those gives the same number.
    """
    if window is None or window >= length:
        return length * length // 2
    forms = pieces(Band(0, length, 0, length, 1 - window, 0))
    areas = ((piece.q_end - piece.q_start) * (piece.k_end - piece.k_start) // (1 + (piece.form != "full")) for piece in forms)
    return sum(areas)
