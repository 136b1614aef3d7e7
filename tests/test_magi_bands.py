"""Bands against cells counted one by one: area, cutting, moving, meeting, typed slices, and the same for whole tables."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from magi_samples import band_cells, ranges, slice_cells

from seqloom.magi import table as tables
from seqloom.magi.bands import TYPE_NAMES, Band, band_of
from seqloom.magi.merge import merged

SIZE = 14
SHAPE = (SIZE, SIZE)
types = st.integers(0, 3)


@st.composite
def loose_bands(draw) -> Band:
    """Any band, tight or not, perhaps without a cell."""
    q_range, k_range = draw(ranges(SIZE)), draw(ranges(SIZE))
    return Band(*q_range, *k_range, draw(st.integers(-SIZE - 2, SIZE + 2)), draw(st.integers(-SIZE - 2, SIZE + 2)))


def as_table(bands: list[Band]) -> np.ndarray:
    return np.array([(b.q_start, b.q_end, b.k_start, b.k_end, b.lo, b.hi) for b in bands], np.int64).reshape(-1, 6)


@given(ranges(SIZE), ranges(SIZE), types)
def test_a_slice_is_the_band_of_its_type(q_range, k_range, attn_type):
    assert (band_cells(band_of(q_range, k_range, attn_type), SHAPE) == slice_cells(q_range, k_range, TYPE_NAMES[attn_type], SHAPE)).all()


@pytest.mark.parametrize("queries, keys", [(5, 5), (5, 9), (9, 5), (1, 7), (7, 1)])
def test_areas_of_the_types_are_those_of_the_specification(queries, keys):
    triangle = (2 * keys - queries + 1) * queries // 2 if keys >= queries else keys * (keys + 1) // 2
    expected = (queries * keys, triangle, triangle, max(0, keys - queries + 1) * queries)
    found = [band_of((3, 3 + queries), (2, 2 + keys), attn_type) for attn_type in range(4)]
    assert tuple(band.area if band else 0 for band in found) == expected


@given(loose_bands())
def test_area_counts_the_cells(band):
    assert band.area == band_cells(band, SHAPE).sum()


def test_area_is_exact_beyond_the_precision_of_floats():
    side = 3 * 10**9
    assert band_of((0, side), (0, side), 1).area == side * (side + 1) // 2


@given(loose_bands())
def test_tight_keeps_the_cells_in_their_bounding_rectangle(band):
    tight, cells = band.tight(), band_cells(band, SHAPE)
    assert (tight is None) == (not cells.any())
    if tight:
        rows, columns = np.flatnonzero(cells.any(axis=1)), np.flatnonzero(cells.any(axis=0))
        diagonals = np.subtract(*np.nonzero(cells)[::-1])
        assert (band_cells(tight, SHAPE) == cells).all()
        assert tight == Band(rows[0], rows[-1] + 1, columns[0], columns[-1] + 1, diagonals.min(), diagonals.max())


@given(loose_bands(), loose_bands())
def test_equal_cells_are_equal_bands(one, other):
    same = (band_cells(one, SHAPE) == band_cells(other, SHAPE)).all()
    assert same == (one.tight() == other.tight())


@given(loose_bands(), ranges(SIZE), ranges(SIZE))
def test_cut_keeps_the_cells_in_the_ranges(band, rows, columns):
    window = np.zeros(SHAPE, bool)
    window[slice(*rows), slice(*columns)] = True
    cells = band_cells(band, SHAPE) & window
    found = band.cut(*rows, *columns)
    assert (band_cells(found, SHAPE) == cells).all()
    assert (found is None) == (not cells.any())


@given(loose_bands(), st.integers(0, SIZE))
def test_cutting_at_a_row_and_at_a_column_leaves_every_cell_in_one_part(band, at):
    parts = (band.cut(q_end=at), band.cut(q_start=at), band.cut(k_end=at), band.cut(k_start=at))
    areas = [part.area if part else 0 for part in parts]
    assert areas[0] + areas[1] == areas[2] + areas[3] == band.area


@given(loose_bands(), loose_bands())
def test_meet_is_what_both_cover(one, other):
    assert (band_cells(one.meet(other), SHAPE) == band_cells(one, SHAPE) & band_cells(other, SHAPE)).all()


@given(loose_bands(), st.integers(0, 5), st.integers(0, 5))
def test_shifted_moves_the_cells(band, rows, columns):
    large = (SIZE + 5, SIZE + 5)
    moved = np.zeros(large, bool)
    moved[rows : rows + SIZE, columns : columns + SIZE] = band_cells(band, SHAPE)
    assert (band_cells(band.shifted(rows, columns), large) == moved).all()


@given(loose_bands())
@settings(max_examples=300)
def test_at_most_three_slices_cover_a_band_once(band):
    slices = band.as_slices()
    count = np.zeros(SHAPE, int)
    for q_range, k_range, attn_type in slices:
        assert 0 <= k_range[0] <= k_range[1] <= SIZE
        cells = slice_cells(q_range, k_range, TYPE_NAMES[attn_type], SHAPE)
        assert cells.any(axis=1)[slice(*q_range)].all()
        count += cells
    assert len(slices) <= 3
    assert (count == band_cells(band, SHAPE)).all()


@given(ranges(SIZE), ranges(SIZE), types)
def test_a_slice_gives_one_slice_back_unless_its_corner_is_cut_off(q_range, k_range, attn_type):
    band = band_of(q_range, k_range, attn_type)
    if band is not None and (band.q_start, band.q_end, band.k_start, band.k_end) == (*q_range, *k_range):
        assert len(band.as_slices()) == 1


@given(loose_bands())
def test_is_full_says_whether_the_rectangle_is_whole(band):
    whole = np.zeros(SHAPE, bool)
    whole[band.q_start : band.q_end, band.k_start : band.k_end] = True
    if whole.any():
        assert band.is_full == (band_cells(band, SHAPE) == whole).all()


@given(st.lists(loose_bands(), max_size=6))
def test_tables_do_as_bands_do(bands):
    found, kept = tables.tight(as_table(bands))
    expected = [(index, band.tight()) for index, band in enumerate(bands) if band.tight()]
    assert tables.to_bands(found) == tuple(band for _, band in expected)
    assert kept.tolist() == [index for index, _ in expected]
    assert tables.areas(found).tolist() == [band.area for _, band in expected]


@given(
    st.lists(loose_bands(), max_size=5),
    st.lists(st.integers(0, SIZE), min_size=2, unique=True),
    st.sampled_from((tables.ROWS, tables.COLUMNS)),
)
def test_a_table_cut_to_ranges_is_every_band_cut_to_every_range(bands, borders, axis):
    borders = np.sort(borders)
    starts, ends = borders[:-1:2], borders[1::2]
    starts = starts[: len(ends)]
    table, _ = tables.tight(as_table(bands))
    pieces = tables.cut(table, axis, starts, ends)
    expected = []
    for index, band in enumerate(tables.to_bands(table)):
        for part, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
            piece = band.cut(q_start=start, q_end=end) if axis == tables.ROWS else band.cut(k_start=start, k_end=end)
            if piece:
                expected.append((index, part, piece))
    assert list(zip(pieces.band.tolist(), pieces.part.tolist(), tables.to_bands(pieces.table), strict=True)) == expected


@given(loose_bands(), st.lists(st.integers(0, SIZE), unique=True), st.lists(st.integers(0, SIZE), unique=True))
def test_merging_the_pieces_of_a_band_keeps_its_cells(band, rows, columns):
    table, _ = tables.tight(as_table([band]))
    for axis, inner in ((tables.ROWS, rows), (tables.COLUMNS, columns)):
        borders = np.array([0, *sorted(set(inner) - {0, SIZE}), SIZE])
        table = tables.cut(table, axis, borders[:-1], borders[1:]).table
    found = tables.to_bands(merged(table))
    assert len(found) <= len(table)
    assert (sum((band_cells(piece, SHAPE).astype(int) for piece in found), np.zeros(SHAPE, int)) == band_cells(band, SHAPE)).all()
    assert all(piece == piece.tight() for piece in found)


def test_merging_makes_one_of_a_rectangle_cut_into_a_grid():
    borders = np.array([0, 3, 4, 9, 14])
    table = as_table([band_of((0, 14), (0, 14), 0)])
    for axis in (tables.ROWS, tables.COLUMNS):
        table = tables.cut(table, axis, borders[:-1], borders[1:]).table
    assert len(table) == 16
    assert tables.to_bands(merged(table)) == (band_of((0, 14), (0, 14), 0),)


def test_ramps_count_up_from_every_start():
    assert tables.ramps(np.array([5, 0, 7]), np.array([2, 0, 3])).tolist() == [5, 6, 7, 8, 9]
    assert tables.ramps(np.array([], np.int64), np.array([], np.int64)).tolist() == []
