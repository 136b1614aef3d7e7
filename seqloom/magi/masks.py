"""The masks that training uses, built from cumulative sequence lengths; and the helpers that MagiAttention users know by name.

Role in the pipeline: data packing knows `cu_seqlens` (0, end of the first document, end of the second, ...); these functions turn it into
an `AttnMask`, or, under MagiAttention's names, into its triple (q_ranges, k_ranges, types as names of `bands.TYPE_NAMES`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from seqloom.errors import UserError
from seqloom.magi.bands import CAUSAL, FULL, TYPE_NAMES, Band, Range, Slice
from seqloom.magi.mask import AttnMask

Window = tuple[int, int]
UNBOUNDED = -1  # of a window: no bound on that side
Triple = tuple[list[Range], list[Range], list[str]]


def packed(cu_seqlens: Sequence[int], causal: bool = True) -> AttnMask:
    """Documents packed in one sequence, each attending only itself; `cu_seqlens` may be a list, an array or a tensor."""
    cu_seqlens = _checked("cu_seqlens", cu_seqlens)
    return _mask([(document, document, CAUSAL if causal else FULL) for document in pairwise(cu_seqlens)], cu_seqlens[-1])


def sliding_window(cu_seqlens: Sequence[int], left: int, right: int = 0, sinks: int = 0) -> AttnMask:
    """Row i of a document attends its rows i - left to i + right (-1: no bound), and its first `sinks` rows as far as `right` allows."""
    cu_seqlens = _checked("cu_seqlens", cu_seqlens)
    slices = [piece for document in pairwise(cu_seqlens) for piece in _window_slices(document, document, (left, right), sinks)]
    return _mask(slices, cu_seqlens[-1])


def global_window(cu_seqlens: Sequence[int], size: int, left: int, right: int = 0) -> AttnMask:
    """A sliding window in which the first `size` rows of every document are seen from everywhere in it (never from before them)."""
    return sliding_window(cu_seqlens, left, right, sinks=size)


def block_causal(cu_seqlens: Sequence[int], block: int) -> AttnMask:
    """Every document in blocks of `block` rows; a row attends its own block and all earlier ones. Raises `UserError` for block < 1."""
    cu_seqlens = _checked("cu_seqlens", cu_seqlens)
    if block < 1:
        raise UserError(f"block_causal: a block of {block} rows is impossible, give 1 or more")
    slices = []
    for start, end in pairwise(cu_seqlens):
        slices += [((row, min(row + block, end)), (start, min(row + block, end)), FULL) for row in range(start, end, block)]
    return _mask(slices, cu_seqlens[-1])


def prefix_lm(cu_seqlens: Sequence[int], prefixes: Sequence[int]) -> AttnMask:
    """Causal documents whose first `prefixes[n]` rows attend each other freely. Raises `UserError` for a prefix that does not fit."""
    cu_seqlens = _checked("cu_seqlens", cu_seqlens)
    if len(prefixes) != len(cu_seqlens) - 1:
        raise UserError(f"prefix_lm: {len(prefixes)} prefixes for {len(cu_seqlens) - 1} documents, give one for each")
    slices: list[Slice] = []
    for index, ((start, end), prefix) in enumerate(zip(pairwise(cu_seqlens), prefixes, strict=True)):
        if not 0 <= prefix <= end - start:
            raise UserError(f"prefix_lm: document {index} of {end - start} rows cannot have a prefix of {prefix}: give 0 to {end - start}")
        slices += [((start, start + prefix), (start, start + prefix), FULL), ((start + prefix, end), (start, end), CAUSAL)]
    return _mask(slices, cu_seqlens[-1])


def shared_question(cu_seqlens: Sequence[int]) -> AttnMask:
    """One question, the first document, and its answers, the others: every answer attends the question and, causally, itself."""
    cu_seqlens = _checked("cu_seqlens", cu_seqlens)
    question, *answers = pairwise(cu_seqlens)
    slices: list[Slice] = [(question, question, CAUSAL)]
    for answer in answers:
        slices += [(answer, question, FULL), (answer, answer, CAUSAL)]
    return _mask(slices, cu_seqlens[-1])


def infer_attn_mask_from_cu_seqlens(
    cu_seqlens_q: Sequence[int],
    cu_seqlens_k: Sequence[int],
    causal: bool = False,
    window_size: Window = (UNBOUNDED, UNBOUNDED),
    global_window_size: int = 0,
) -> tuple[list[Range], list[Range], list[str], int, int]:
    """(q_ranges, k_ranges, types, total_seqlen_q, total_seqlen_k) of documents with `cu_seqlens_q` query and `cu_seqlens_k` key rows.

    A window needs `causal=False` (its right side 0 makes it causal); the global window counts only beside a window. Raises `UserError` for
    both at once, and for cumulative lengths that do not start at 0, fall, or differ in number of documents.
    """
    cu_q, cu_k = _checked("cu_seqlens_q", cu_seqlens_q), _checked("cu_seqlens_k", cu_seqlens_k)
    if len(cu_q) != len(cu_k):
        raise UserError(f"cu_seqlens_q has {len(cu_q) - 1} documents and cu_seqlens_k {len(cu_k) - 1}: give both the same documents")
    windowed = tuple(window_size) != (UNBOUNDED, UNBOUNDED)
    if windowed and causal:
        raise UserError(f"causal=True and window_size={tuple(window_size)} exclude each other: a causal window is causal=False, (left, 0)")
    slices: list[Slice] = []
    for q_range, k_range in zip(pairwise(cu_q), pairwise(cu_k), strict=True):
        if windowed:
            slices += _window_slices(q_range, k_range, window_size, global_window_size)
        else:
            slices.append((q_range, k_range, CAUSAL if causal else FULL))
    return *_triple(slices), cu_q[-1], cu_k[-1]


def infer_attn_mask_from_sliding_window(q_range: Range, k_range: Range, window_size: Window) -> Triple:
    """(q_ranges, k_ranges, types), at most three slices, of a window (left, right) in one document; -1 is no bound.

    The last query row is aligned with the last key row: with off = keys - queries, row i sees columns i + off - left to i + off + right.
    """
    return _triple(_window_slices(tuple(q_range), tuple(k_range), window_size, 0))


def infer_varlen_mask_from_batch(batch_size: int, seq_len: int) -> tuple[list[int], list[int]]:
    """(cu_seqlens_q, cu_seqlens_k) of `batch_size` sequences of `seq_len` rows squashed into one: every one a document."""
    if batch_size < 1 or seq_len < 1:
        raise UserError(f"a batch of {batch_size} sequences of {seq_len} rows is empty: give 1 or more of both")
    cu_seqlens = list(range(0, batch_size * seq_len + 1, seq_len))
    return cu_seqlens, list(cu_seqlens)


def _window_slices(q_range: Range, k_range: Range, window: Sequence[int], sinks: int) -> list[Slice]:
    """The window of one document as a band, and the rectangle of its first `sinks` columns cut by the window's right bound."""
    left, right = window
    if left < UNBOUNDED or right < UNBOUNDED or sinks < 0:
        raise UserError(f"a window of ({left}, {right}) with {sinks} sinks is impossible: give rows to the left and right (-1: no bound)")
    (q_start, q_end), (k_start, k_end) = q_range, k_range
    lowest, highest = k_start - q_end, k_end - q_start  # no cell lies on these diagonals or beyond
    diagonal = k_end - q_end
    hi = highest if right == UNBOUNDED else diagonal + right
    lo = lowest if left == UNBOUNDED else diagonal - left
    split = k_start if left == UNBOUNDED else min(k_start + sinks, k_end)
    bands = (Band(q_start, q_end, k_start, split, lowest, hi), Band(q_start, q_end, split, k_end, lo, hi))
    return [piece for band in bands for piece in band.as_slices()]


def _mask(slices: Sequence[Slice], total_seqlen: int) -> AttnMask:
    return AttnMask(*_triple(slices), total_seqlen)


def _triple(slices: Sequence[Slice]) -> Triple:
    return [q for q, _, _ in slices], [k for _, k, _ in slices], [TYPE_NAMES[attn_type] for _, _, attn_type in slices]


def _checked(name: str, cu_seqlens: Any) -> list[int]:
    """The cumulative lengths as a list of ints, from a list, an array or a tensor."""
    values = cu_seqlens.tolist() if hasattr(cu_seqlens, "tolist") else list(cu_seqlens)
    if len(values) < 2 or values[0] != 0 or any(start > end for start, end in pairwise(values)):
        shown = ", ".join(str(value) for value in values[:8]) + (", ..." if len(values) > 8 else "")
        raise UserError(f"{name} is [{shown}]: it must start at 0, never fall, and end at the number of rows")
    return values
