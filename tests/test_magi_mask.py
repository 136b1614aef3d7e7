"""Masks: their cells against definitions written out, and the sentences that refuse wrong ones."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from magi_samples import any_mask, cumulative, ranges, slice_cells

from seqloom.errors import UserError
from seqloom.magi import masks
from seqloom.magi.bands import TYPE_NAMES
from seqloom.magi.mask import AttnMask


def same_document(cu_seqlens) -> np.ndarray:
    documents = np.repeat(np.arange(len(cu_seqlens) - 1), np.diff(cu_seqlens))
    return documents[:, None] == documents


def distance(total: int) -> np.ndarray:
    """column - row of every cell."""
    return np.arange(total) - np.arange(total)[:, None]


def position(cu_seqlens) -> np.ndarray:
    """The row of every row within its document."""
    return np.concatenate([np.arange(length) for length in np.diff(cu_seqlens)])


@given(any_mask)
def test_dense_is_the_union_of_the_slices_and_area_counts_it(mask):
    cells = np.zeros((mask.total_seqlen_q, mask.total_seqlen_k), int)
    for q_range, k_range, attn_type in zip(mask.q_ranges, mask.k_ranges, mask.attn_types, strict=True):
        cells += slice_cells(q_range, k_range, TYPE_NAMES[attn_type], cells.shape)
    assert cells.max() == 1
    assert (mask.dense() == cells).all()
    assert mask.area == cells.sum()


@given(st.lists(st.tuples(ranges(12), ranges(12), st.sampled_from(TYPE_NAMES)), min_size=2, max_size=4))
@settings(max_examples=300)
def test_masks_are_refused_exactly_when_slices_share_a_cell(slices):
    cells = np.array([slice_cells(*piece, (12, 12)) for piece in slices])
    if not cells.any():
        return
    count = cells.sum(axis=0)
    if count.max() <= 1:
        AttnMask(*zip(*slices, strict=True), 12)
        return
    with pytest.raises(UserError, match=r"slices \d and \d of the mask both cover row \d+, column \d+ ") as caught:
        AttnMask(*zip(*slices, strict=True), 12)
    words = str(caught.value).replace(",", "").split()
    one, other, row, column = (int(words[index]) for index in (1, 3, 10, 12))
    assert one < other and cells[one, row, column] and cells[other, row, column]
    assert f"({(cells[one] & cells[other]).sum()} cells in all)" in str(caught.value)


@pytest.mark.parametrize(
    "q_ranges, k_ranges, types, total, sentence",
    [
        ([(0, 4)], [(0, 9)], ["full"], 8, r"k_ranges\[0\] = \[0, 9\) leaves the 8 rows"),
        ([(0, 4), (-1, 2)], [(0, 4), (0, 2)], ["full"] * 2, 8, r"q_ranges\[1\] = \[-1, 2\) leaves the 8 rows"),
        ([(4, 2)], [(0, 4)], [1], 8, r"q_ranges\[0\] = \[4, 2\) is out of order"),
        ([(0, 4)], [(0, 4)], ["diagonal"], 8, r"attn_types\[0\] is 'diagonal'.*full \(0\), causal \(1\)"),
        ([(0, 4)], [(0, 4)], [4], 8, r"attn_types\[0\] is 4"),
        ([(0, 4)], [(0, 4)], [True], 8, r"attn_types\[0\] is True"),
        ([(0, 4)], [(0, 4), (4, 8)], ["full"], 8, "1 q ranges, 2 k ranges and 1 types"),
        ([(0, 4)], [(0, 3)], ["bi_causal"], 8, "covers nothing: none of its 1 slices"),
        ([], [], [], 8, "covers nothing: none of its 0 slices"),
        ([(0, 4, 5)], [(0, 4)], ["full"], 8, r"q_ranges\[0\] is \(0, 4, 5\): give a \[start, end\) pair"),
        ([(0, 4.5)], [(0, 4)], ["full"], 8, r"q_ranges\[0\] is \(0, 4.5\)"),
        ([(0, 4)], [(0, 4)], ["full"], 0, "total_seqlen is 0"),
        ([(0, 4)], [(0, 4)], ["full"], (8, 8, 8), "give the number of rows"),
    ],
)
def test_wrong_masks_end_in_one_sentence(q_ranges, k_ranges, types, total, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        AttnMask(q_ranges, k_ranges, types, total)
    assert "\n" not in str(caught.value)


def test_equal_masks_are_equal_and_hash_alike_whatever_they_are_made_of():
    one = AttnMask([[0, 4], [4, 8]], [(0, 4), (4, 8)], ["causal", "FULL"], 8)
    other = AttnMask(((0, 4), (4, 8)), np.array([[0, 4], [4, 8]]), (1, np.int64(0)), (8, 8))
    assert one == other and hash(one) == hash(other)
    assert one != AttnMask([(0, 4)], [(0, 4)], [1], 8)
    assert {one: "first"}[other] == "first"


def test_queries_and_keys_may_differ_in_number():
    mask = AttnMask([(0, 3)], [(0, 5)], ["causal"], (3, 5))
    assert (mask.total_seqlen_q, mask.total_seqlen_k) == (3, 5)
    assert mask.dense().tolist() == [[True, True, True, False, False], [True, True, True, True, False], [True] * 5]


@given(cumulative(), st.booleans())
def test_packed_documents_attend_only_themselves(cu_seqlens, causal):
    total = cu_seqlens[-1]
    expected = same_document(cu_seqlens) & (distance(total) <= 0 if causal else True)
    assert (masks.packed(np.array(cu_seqlens), causal).dense() == expected).all()


@given(cumulative(), st.integers(-1, 20), st.integers(-1, 20), st.integers(0, 6))
@settings(max_examples=300)
def test_sliding_windows_with_and_without_sinks(cu_seqlens, left, right, sinks):
    apart = distance(cu_seqlens[-1])
    not_future = apart <= right if right >= 0 else True
    window = (apart >= -left) if left >= 0 else True
    expected = same_document(cu_seqlens) & not_future & (window | (position(cu_seqlens) < sinks))
    assert (masks.sliding_window(cu_seqlens, left, right, sinks).dense() == expected).all()
    assert masks.global_window(cu_seqlens, sinks, left, right) == masks.sliding_window(cu_seqlens, left, right, sinks)


@given(cumulative(), st.integers(1, 9))
def test_block_causal(cu_seqlens, block):
    blocks = position(cu_seqlens) // block
    expected = same_document(cu_seqlens) & (blocks <= blocks[:, None])
    assert (masks.block_causal(cu_seqlens, block).dense() == expected).all()


@given(cumulative(), st.data())
def test_prefixes_attend_themselves_freely(cu_seqlens, data):
    prefixes = [data.draw(st.integers(0, int(length))) for length in np.diff(cu_seqlens)]
    in_prefix = position(cu_seqlens) < np.repeat(prefixes, np.diff(cu_seqlens))
    expected = same_document(cu_seqlens) & ((distance(cu_seqlens[-1]) <= 0) | (in_prefix & in_prefix[:, None]))
    assert (masks.prefix_lm(cu_seqlens, prefixes).dense() == expected).all()


@given(cumulative())
def test_answers_share_a_question(cu_seqlens):
    total, question = cu_seqlens[-1], cu_seqlens[1]
    expected = (same_document(cu_seqlens) | (np.arange(total) < question)) & (distance(total) <= 0)
    assert (masks.shared_question(cu_seqlens).dense() == expected).all()


@given(cumulative(), st.data())
@settings(max_examples=200)
def test_documents_with_other_numbers_of_keys(cu_seqlens, data):
    keys = [data.draw(st.integers(1, 12)) for _ in cu_seqlens[1:]]
    cu_k = [0, *np.cumsum(keys).tolist()]
    window = data.draw(st.tuples(st.integers(-1, 12), st.integers(-1, 12)))
    q_ranges, k_ranges, types, total_q, total_k = masks.infer_attn_mask_from_cu_seqlens(cu_seqlens, cu_k, window_size=window)
    cells = sum(
        (slice_cells(*piece, (total_q, total_k)) for piece in zip(q_ranges, k_ranges, types, strict=True)),
        np.zeros((total_q, total_k), int),
    )
    expected = np.zeros((total_q, total_k), bool)
    for (q_start, q_end), (k_start, k_end) in zip(
        zip(cu_seqlens, cu_seqlens[1:], strict=False), zip(cu_k, cu_k[1:], strict=False), strict=True
    ):
        for row in range(q_start, q_end):
            centre = row - q_end + k_end
            for column in range(k_start, k_end):
                seen = (window[0] < 0 or column >= centre - window[0]) and (window[1] < 0 or column <= centre + window[1])
                expected[row, column] = seen
    assert (cells == expected).all()


def test_names_that_magi_attention_users_know():
    assert masks.infer_attn_mask_from_cu_seqlens([0, 4, 9], [0, 4, 9], causal=True) == (
        [(0, 4), (4, 9)], [(0, 4), (4, 9)], ["causal", "causal"], 9, 9
    )  # fmt: skip
    assert masks.infer_attn_mask_from_cu_seqlens([0, 4], [0, 6]) == ([(0, 4)], [(0, 6)], ["full"], 4, 6)
    assert masks.infer_attn_mask_from_sliding_window((5, 15), (5, 15), (2, 3)) == (
        [(5, 7), (7, 11), (11, 15)], [(5, 10), (5, 14), (9, 15)], ["causal", "bi_causal", "inv_causal"]
    )  # fmt: skip
    assert masks.infer_varlen_mask_from_batch(3, 4) == ([0, 4, 8, 12], [0, 4, 8, 12])


@given(ranges(14), ranges(14), st.integers(-1, 14), st.integers(-1, 14))
def test_a_window_is_at_most_three_slices(q_range, k_range, left, right):
    q_ranges, k_ranges, types = masks.infer_attn_mask_from_sliding_window(q_range, k_range, (left, right))
    assert len(q_ranges) == len(k_ranges) == len(types) <= 3


def test_a_window_without_a_left_bound_needs_no_sinks():
    assert masks.sliding_window([0, 9], -1, 0, sinks=3) == masks.packed([0, 9])


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: masks.packed([1, 4]), r"cu_seqlens is \[1, 4\]: it must start at 0"),
        (lambda: masks.packed([0, 5, 4]), "never fall"),
        (lambda: masks.packed([0]), r"cu_seqlens is \[0\]"),
        (lambda: masks.block_causal([0, 4], 0), "a block of 0 rows"),
        (lambda: masks.prefix_lm([0, 4], [5]), "document 0 of 4 rows cannot have a prefix of 5"),
        (lambda: masks.prefix_lm([0, 4, 8], [1]), "1 prefixes for 2 documents"),
        (lambda: masks.sliding_window([0, 4], -2), r"a window of \(-2, 0\)"),
        (lambda: masks.infer_attn_mask_from_cu_seqlens([0, 4], [0, 4, 8]), "1 documents and cu_seqlens_k 2"),
        (lambda: masks.infer_attn_mask_from_cu_seqlens([0, 4], [0, 4], True, (2, 0)), "exclude each other"),
        (lambda: masks.infer_varlen_mask_from_batch(0, 4), "a batch of 0 sequences"),
    ],
)
def test_wrong_arguments_end_in_one_sentence(call, sentence):
    with pytest.raises(UserError, match=sentence):
        call()
