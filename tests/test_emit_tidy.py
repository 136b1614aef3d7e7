"""Finishing touches on emitted methods change names only: the code computes the same."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqloom.emit.tidy import fit, tidy


def method(arguments: list[str], lines: list[str]):
    """The function that these lines are."""
    body = "\n".join(f"    {line}" for line in lines)
    scope: dict = {"double": lambda x, scale=2: x * scale}
    exec(f"def method({', '.join(arguments)}):\n{body}", scope)
    return scope["method"]


def test_counters_are_dropped_when_the_older_value_is_not_needed():
    arguments, lines = tidy(["hidden"], ["hidden_1 = hidden + 1", "hidden_2 = hidden_1 * 3"], ["hidden_2"])
    assert arguments == ["hidden"]
    assert lines == ["hidden = hidden + 1", "return hidden * 3"]


def test_a_value_that_is_still_needed_keeps_its_name():
    _, lines = tidy(["hidden"], ["hidden_1 = hidden + 1", "out = hidden_1 + hidden"], ["out"])
    assert lines == ["hidden_1 = hidden + 1", "return hidden_1 + hidden"]


def test_arguments_lose_their_counter_too():
    arguments, lines = tidy(["hidden_1", "cos"], ["norm = hidden_1 * cos", "hidden_2 = hidden_1 + norm"], ["hidden_2"])
    assert arguments == ["hidden", "cos"]
    assert lines == ["norm = hidden * cos", "return hidden + norm"]


def test_a_function_that_the_method_calls_is_not_shadowed():
    _, lines = tidy(["x"], ["double_1 = double(x)", "y = double(double_1)"], ["y"])
    assert lines == ["double_1 = double(x)", "return double(double_1)"]


def test_keywords_and_attributes_are_left_alone():
    _, lines = tidy(["scale_1"], ["y = double(scale_1, scale=scale_1)"], ["y"])
    assert lines == ["return double(scale, scale=scale)"]
    _, lines = tidy(["x_1"], ["y_1 = self.x_1.weight + x_1"], ["y_1"])
    assert lines == ["return self.x_1.weight + x"]


def test_several_results_are_returned_by_name():
    _, lines = tidy(["x"], ["a_1 = x + 1", "b_1, c_1 = a_1, x"], ["b_1", "c_1", "a_1"])
    assert lines == ["a = x + 1", "b, c = a, x", "return b, c, a"]


def test_comments_stay_with_their_line_and_move_up_when_too_long():
    _, lines = tidy(["x"], ["x_1 = x + 1  # [b, l] 0.1 ms"], ["x_1"])
    assert lines == ["return x + 1  # [b, l] 0.1 ms"]
    assert fit(lines, 4, 40) == ["    return x + 1  # [b, l] 0.1 ms"]
    assert fit(lines, 4, 20) == ["    # [b, l] 0.1 ms", "    return x + 1"]


NAMES = ["h", "h_1", "h_2", "h_3", "g", "g_1", "g_2"]


@st.composite
def programs(draw):
    """Single-assignment programs over few names, as the emitter makes them."""
    arguments = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3, unique=True))
    known, lines = list(arguments), []
    for name in draw(st.permutations([n for n in NAMES if n not in arguments])):
        left, right = draw(st.sampled_from(known)), draw(st.sampled_from(known))
        lines.append(f"{name} = {left} * 3 + {right} - {len(lines)}")
        known.append(name)
    returned = draw(st.lists(st.sampled_from(known), min_size=1, max_size=3, unique=True))
    return arguments, lines, returned


@given(programs(), st.lists(st.integers(-50, 50), min_size=3, max_size=3))
def test_tidied_code_computes_the_same(program, numbers):
    arguments, lines, returned = program
    before = method(arguments, [*lines, f"return {', '.join(returned)}"])
    new_arguments, new_lines = tidy(arguments, lines, returned)
    after = method(new_arguments, new_lines)
    given_ = numbers[: len(arguments)]
    assert before(*given_) == after(*given_)


@pytest.mark.parametrize("width", [10, 60, 200])
def test_fit_loses_nothing(width):
    lines = ["x = 1  # one", "for y in z:", "    w = y  # two"]
    joined = " ".join(fit(lines, 8, width))
    assert all(word in joined for line in lines for word in line.split())


def test_a_long_name_costs_no_more_than_a_short_one():
    """Once, the time to read a line that assigns nothing doubled with every letter of its first name."""
    name = "x" * 500
    assert tidy([name], [f"{name}_1 = f({name})"], [f"{name}_1"]) == ([name], [f"return f({name})"])
