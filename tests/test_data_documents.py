"""Packing by documents against a slow reference that walks token by token: rows, labels, borders, and how a micro-batch lays them out."""

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, Features, List, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from seqloom.data import documents
from seqloom.data.documents import (
    CU_SEQLENS,
    Borders,
    find_borders,
    first_bad_row,
    read_borders,
    restarting_positions,
    scan_borders,
    squared_lengths,
    squash,
    typical_row,
)
from seqloom.data.packing import IGNORED, pack_documents, pack_stream

PAD = 99
texts = st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=20), max_size=12)
lengths = st.integers(1, 13)


def reference(texts, seq_len):
    """Rows, labels and borders of documents of tokens, each position by itself."""
    stream = [(token, number) for number, text in enumerate(texts) for token in text]
    stream += [(PAD, -1)] * (-len(stream) % seq_len)
    rows, labels, borders = [], [], []
    for first in range(0, len(stream), seq_len):
        row = stream[first : first + seq_len]
        rows.append([token for token, _ in row])
        labels.append([])
        borders.append([])
        for place in range(first, first + seq_len):
            mine = stream[place][1]
            following = stream[place + 1] if place + 1 < len(stream) else (PAD, -1)
            labels[-1].append(following[0] if following[1] == mine != -1 else IGNORED)
            if place == first or stream[place - 1][1] != mine:
                borders[-1].append(place - first)
        borders[-1].append(seq_len)
    return rows, labels, borders


def pieces_of(texts, cuts=()):
    """The stream of documents as pieces `(tokens, ends)` cut at any places; without cuts it is one piece."""
    stream = np.array([token for text in texts for token in text], np.int32)
    ends = np.cumsum([len(text) for text in texts], dtype=np.int64)
    bounds = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    for start, stop in zip(bounds, bounds[1:], strict=False):
        yield stream[start:stop], ends[(ends > start) & (ends <= stop)] - start


def as_lists(borders):
    return [borders.values[a:b].tolist() for a, b in zip(borders.offsets, borders.offsets[1:], strict=False)]


def as_borders(rows):
    return Borders(np.array(sum(rows, []), np.int32), np.cumsum([0, *map(len, rows)]))


def packed(pieces, seq_len):
    """All blocks put together as lists: rows, labels, borders."""
    blocks = list(pack_documents(pieces, seq_len, PAD))
    assert all(len(ids) == len(labels) == len(borders.offsets) - 1 for ids, labels, borders in blocks)
    assert all(ids.dtype == labels.dtype == borders.values.dtype == np.int32 for ids, labels, borders in blocks)
    rows, labels = ([row for block in blocks for row in block[i].tolist()] for i in range(2))
    return rows, labels, [row for block in blocks for row in as_lists(block[2])]


@settings(deadline=None)
@given(texts=texts, seq_len=lengths)
def test_rows_labels_and_borders_are_the_reference(texts, seq_len):
    assert packed(pieces_of(texts), seq_len) == reference(texts, seq_len)


@settings(deadline=None)
@given(texts=texts, cuts=st.lists(st.integers(0, 200), max_size=12), seq_len=lengths)
def test_how_the_stream_is_cut_makes_no_difference(texts, cuts, seq_len):
    assert packed(pieces_of(texts, cuts), seq_len) == reference(texts, seq_len)


@settings(deadline=None)
@given(texts=texts, cuts=st.lists(st.integers(0, 200), max_size=6), seq_len=lengths)
def test_the_tokens_are_those_of_a_stream(texts, cuts, seq_len):
    """The same inputs, and the same labels but for those that a document does not have."""
    rows, labels, borders = packed(pieces_of(texts, cuts), seq_len)
    blocks = list(pack_stream((tokens for tokens, _ in pieces_of(texts)), seq_len, PAD))
    whole = [[row for block in blocks for row in block[i].tolist()] for i in range(2)]
    assert rows == whole[0]
    flat = [(ours, theirs) for mine, other in zip(labels, whole[1], strict=True) for ours, theirs in zip(mine, other, strict=True)]
    assert all(ours in (theirs, IGNORED) for ours, theirs in flat)
    assert sum(ours != IGNORED for ours, _ in flat) == sum(len(text) - 1 for text in texts)
    assert all(row[0] == 0 and row[-1] == seq_len and row == sorted(set(row)) for row in borders)


def test_a_document_over_many_rows_keeps_the_labels_across_them():
    rows, labels, borders = packed(pieces_of([[1, 2, 3, 4, 5, 6, 7], [8, 9]]), 3)
    assert rows == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert labels == [[2, 3, 4], [5, 6, 7], [IGNORED, 9, IGNORED]]
    assert borders == [[0, 3], [0, 3], [0, 1, 3]]


def test_a_document_that_ends_with_its_row_does_not_label_the_next():
    rows, labels, borders = packed(pieces_of([[1, 2, 3], [4, 5]]), 3)
    assert rows == [[1, 2, 3], [4, 5, PAD]]
    assert labels == [[2, 3, IGNORED], [5, IGNORED, IGNORED]]
    assert borders == [[0, 3], [0, 2, 3]]


def test_labels_do_not_write_into_the_tokens():
    """The blocks of a stream share memory with each other and with what is still to come."""
    ends = np.array([2, 4, 6, 8], np.int64)
    [(ids, labels, _), _] = pack_documents([(np.arange(9, dtype=np.int32), ends)], 4, PAD)
    assert ids.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert labels.tolist() == [[1, IGNORED, 3, IGNORED], [5, IGNORED, 7, IGNORED]]


def test_rows_come_out_while_documents_go_in():
    taken = 0

    def pieces():
        nonlocal taken
        for _ in range(1000):
            taken += 10
            yield np.arange(10, dtype=np.int32), np.array([3, 10])

    for ids, _, borders in pack_documents(pieces(), 16, PAD):
        assert len(ids) and as_lists(borders)[0] == [0, 3, 10, 13, 16]
        break
    assert taken <= 20


def test_nothing_gives_nothing():
    assert list(pack_documents([], 4, PAD)) == []
    assert list(pack_documents([(np.empty(0, np.int32), np.empty(0, np.int64))], 4, PAD)) == []


@st.composite
def rows_of_borders(draw, min_rows=1):
    """`(borders of each row as lists, their length)`."""
    seq_len = draw(st.integers(1, 20))
    inner = st.lists(st.integers(1, seq_len - 1), unique=True).map(sorted) if seq_len > 1 else st.just([])
    rows = draw(st.lists(inner, min_size=min_rows, max_size=8))
    return [[0, *row, seq_len] for row in rows], seq_len


@settings(deadline=None)
@given(rows_of_borders(), st.randoms())
def test_borders_are_found_from_ends_in_any_order(case, random):
    rows, seq_len = case
    ends = [index * seq_len + border for index, row in enumerate(rows) for border in row if (index, border) != (0, 0)]
    random.shuffle(ends)
    assert as_lists(find_borders(np.array(ends, np.int64), len(rows), seq_len)) == rows


@settings(deadline=None)
@given(rows_of_borders())
def test_squashed_borders_and_positions(case):
    rows, seq_len = case
    cu_seqlens = squash(as_borders(rows), seq_len)
    expected = sorted({index * seq_len + border for index, row in enumerate(rows) for border in row})
    assert cu_seqlens.dtype == np.int64 and cu_seqlens.tolist() == expected
    positions = restarting_positions(cu_seqlens)
    assert positions.dtype == np.int64
    assert positions.tolist() == [place for a, b in zip(expected, expected[1:], strict=False) for place in range(b - a)]


def test_squashed_borders_of_long_rows_do_not_overflow():
    rows, seq_len = 5, 2**30
    cu_seqlens = squash(as_borders([[0, 7, seq_len]] * rows), seq_len)
    assert cu_seqlens[-1] == rows * seq_len and cu_seqlens[-2] == (rows - 1) * seq_len + 7


@settings(deadline=None)
@given(rows_of_borders())
def test_squared_lengths_are_the_sums(case):
    rows, _ = case
    assert squared_lengths(as_borders(rows)).tolist() == [sum((b - a) ** 2 for a, b in zip(row, row[1:], strict=False)) for row in rows]


def test_squared_lengths_of_long_rows_do_not_overflow():
    assert squared_lengths(as_borders([[0, 2**30], [0, 2**29, 2**30]])).tolist() == [2**60, 2**59]


def table_of(rows, seq_len=4):
    """A data set with the column of borders behind another one, as packing writes it."""
    features = Features({"input_ids": List(Value("int32"), length=seq_len), CU_SEQLENS: List(Value("int32"))})
    return Dataset.from_dict({"input_ids": [[0] * seq_len] * len(rows), CU_SEQLENS: rows}, features=features)


@settings(deadline=None, max_examples=40)
@given(rows_of_borders(), st.integers(1, 3))
def test_borders_are_read_back_batch_by_batch(case, scan_rows):
    rows, seq_len = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "SCAN_ROWS", scan_rows)
        found = [row for borders in scan_borders(table_of(rows, seq_len)) for row in as_lists(borders)]
    assert found == rows


def test_borders_are_read_from_several_chunks_and_slices():
    rows = [[0, 1, 4], [0, 4], [0, 2, 3, 4], [0, 3, 4]]
    column = pa.chunked_array([pa.array([[9], *rows[:2]], pa.list_(pa.int32())).slice(1), pa.array(rows[2:], pa.list_(pa.int32()))])
    assert as_lists(read_borders(column)) == rows
    assert as_lists(read_borders(column.slice(1, 2))) == rows[1:3]


@settings(deadline=None, max_examples=40)
@given(rows_of_borders())
def test_typical_row_is_the_median_of_work(case):
    rows, seq_len = case
    found = typical_row(table_of(rows, seq_len))
    work = [sum((b - a) ** 2 for a, b in zip(row, row[1:], strict=False)) for row in rows]
    median = sorted(work)[(len(work) - 1) // 2]
    first = rows[work.index(median)]
    assert found == tuple(b - a for a, b in zip(first, first[1:], strict=False))
    assert all(type(length) is int for length in found)


@settings(deadline=None)
@given(rows_of_borders())
def test_good_borders_are_good(case):
    rows, seq_len = case
    assert first_bad_row(as_borders(rows), seq_len) is None


BAD = [[], [0], [4], [0, 3], [1, 4], [0, 4, 4], [0, 0, 4], [0, 3, 2, 4], [0, 5, 4], [-1, 4], [0, 4, 8], [4, 0]]


@pytest.mark.parametrize("bad", BAD, ids=str)
@pytest.mark.parametrize("before", [0, 1, 3])
@pytest.mark.parametrize("after", [0, 2])
def test_the_first_bad_row_is_found(bad, before, after):
    rows = [[0, 2, 4]] * before + [bad] + [[0, 4]] * after
    assert first_bad_row(as_borders(rows), 4) == before


@settings(deadline=None)
@given(rows=st.lists(st.one_of(st.sampled_from(BAD), st.just([0, 4]), st.just([0, 1, 4])), min_size=1, max_size=8))
def test_the_first_of_several_bad_rows_is_found(rows):
    expected = next((index for index, row in enumerate(rows) if row in BAD), None)
    assert first_bad_row(as_borders(rows), 4) == expected


@pytest.mark.parametrize("bad", [None, [None], [0, None, 4], [None, 4], [0, None]], ids=str)
def test_nulls_are_bad(bad):
    column = pa.chunked_array([pa.array([[0, 4], bad, [0, 4]], pa.list_(pa.int32()))])
    assert first_bad_row(read_borders(column), 4) == 1
