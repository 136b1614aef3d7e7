"""The table of predicted beside measured."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqloom.runtime.comparison import Row, table


def cells(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def test_a_row_has_one_unit_and_its_ratio():
    shown = table([Row("peak", "memory", 3 * 2**30, (2 * 2**30, 1.5 * 2**30))], ["rank 0", "rank 1"])
    assert cells(shown)[1] == ["peak", "GiB", "3.00", "2.00", "1.50", "1.500"]


def test_what_is_not_known_is_a_dash():
    shown = table([Row("peak", "memory", None, (2**20,)), Row("kept", "memory", 2**20, (None,))], ["measured"])
    assert cells(shown)[1:] == [["peak", "MiB", "-", "1.00", "-"], ["kept", "MiB", "1.00", "-", "-"]]


def test_rows_of_nothing_are_left_out():
    assert len(cells(table([Row("a", "bytes", 0, (0,)), Row("b", "bytes", None, (0.0,)), Row("c", "bytes", 0, (5e6,))], ["x"]))) == 2


@pytest.mark.parametrize(
    ("unit", "figure", "expected"),
    [
        ("memory", 1023, ["1023.00", "B"]),
        ("memory", 2**30, ["1.00", "GiB"]),
        ("bytes", 2.5e9, ["2.50", "GB"]),
        ("operations", 4.2e12, ["4.20", "TFLOP"]),
        ("operations", 0.5, ["0.50", "FLOP"]),
        ("seconds", 0.0123, ["12.30", "ms"]),
        ("seconds", 4.0, ["4.00", "s"]),
    ],
)
def test_units_follow_the_size(unit, figure, expected):
    assert cells(table([Row("q", unit, None, (figure,))], ["x"]))[1][1:4] == [expected[1], "-", expected[0]]


@given(st.lists(st.tuples(st.text("abc ", min_size=1, max_size=12), st.floats(1e-7, 1e18)), min_size=1, max_size=6))
def test_columns_are_aligned(figures):
    lines = table([Row(name, "bytes", figure, (figure,)) for name, figure in figures], ["rank 0"]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert all(line.endswith("1.000") for line in lines[1:])
