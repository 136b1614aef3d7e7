"""Random masks for the tests of `seqloom.magi`, and cells counted one by one."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from seqloom.magi.bands import TYPE_NAMES, Band
from seqloom.magi.mask import AttnMask
from seqloom.magi.masks import block_causal, packed, prefix_lm, shared_question, sliding_window


def slice_cells(q_range, k_range, attn_type, shape) -> np.ndarray:
    """Cells of one slice, from the definition of its type."""
    (q_start, q_end), (k_start, k_end) = q_range, k_range
    cells = np.zeros(shape, bool)
    offset = (k_end - k_start) - (q_end - q_start)
    for row in range(q_start, q_end):
        for column in range(k_start, k_end):
            i, j = row - q_start, column - k_start
            under, over = j <= i + offset, j >= i
            cells[row, column] = {"full": True, "causal": under, "inv_causal": over, "bi_causal": under and over}[attn_type]
    return cells


def band_cells(band: Band | None, shape) -> np.ndarray:
    """Cells of one band, from its definition."""
    cells = np.zeros(shape, bool)
    for row in range(band.q_start, band.q_end) if band else ():
        for column in range(band.k_start, band.k_end):
            cells[row, column] = band.lo <= column - row <= band.hi
    return cells


@st.composite
def ranges(draw, total: int):
    """A [start, end) range within [0, total), perhaps empty."""
    start = draw(st.integers(0, total))
    return start, draw(st.integers(start, total))


@st.composite
def slice_masks(draw, most: int = 40) -> AttnMask:
    """A mask of up to six random slices that share no cell; there may be uncovered rows."""
    total = draw(st.integers(1, most))
    taken, slices = np.zeros((total, total), bool), []
    for _ in range(draw(st.integers(1, 6))):
        candidate = (draw(ranges(total)), draw(ranges(total)), draw(st.sampled_from(TYPE_NAMES)))
        cells = slice_cells(*candidate, taken.shape)
        if not (cells & taken).any():
            taken |= cells
            slices.append(candidate)
    if not taken.any():
        slices = [((0, total), (0, total), "causal")]
    return AttnMask(*zip(*slices, strict=True), total)


@st.composite
def cumulative(draw, most_documents: int = 5, most: int = 16) -> list[int]:
    """Cumulative lengths of random documents, some perhaps empty, with at least one row in all."""
    lengths = draw(st.lists(st.integers(0, most), min_size=1, max_size=most_documents).filter(any))
    return [0, *np.cumsum(lengths).tolist()]


@st.composite
def document_masks(draw) -> AttnMask:
    """A packing, window, block, prefix or shared-question mask of random documents."""
    cu_seqlens = draw(cumulative())
    kind = draw(st.sampled_from(("packed", "window", "block", "prefix", "shared")))
    if kind == "packed":
        return packed(cu_seqlens, draw(st.booleans()))
    if kind == "window":
        return sliding_window(cu_seqlens, draw(st.integers(-1, 12)), draw(st.integers(-1, 12)), draw(st.integers(0, 4)))
    if kind == "block":
        return block_causal(cu_seqlens, draw(st.integers(1, 8)))
    if kind == "prefix":
        return prefix_lm(cu_seqlens, [draw(st.integers(0, int(length))) for length in np.diff(cu_seqlens)])
    return shared_question(cu_seqlens)


any_mask = st.one_of(slice_masks(), document_masks())
