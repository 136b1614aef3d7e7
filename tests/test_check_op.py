"""check-op tells true annotations from lies, for outputs and for gradients, and says what it needs."""

import pytest
import torch

from seqloom.errors import UserError
from seqloom.ops.check import check_op, format_report

torch.set_num_threads(1)


def lies(report):
    return {split.name: " ".join(split.problems) for split in report.splits if split.problems}


@pytest.mark.parametrize(
    ("target", "options", "names"),
    [
        ("sample_ops:scaled", {}, ["*0", "*1"]),
        ("sample_ops:repeated", {}, ["b", "l"]),
        ("sample_ops:repeated", {"sizes": {"b": 2}, "args": {"copies": 4}}, ["b", "l"]),
        ("sample_ops:with_table", {}, ["b", "d"]),
        ("sample_ops:grouped", {}, ["b", "k", "g"]),
        ("sample_ops:grouped", {"sizes": {"k": 2}}, ["b", "k"]),
        ("sample_ops:looked_up", {}, ["a", "b"]),
        ("sample_ops:looked_up", {"dtypes": {"indices": "int32"}}, ["a", "b"]),
        ("sample_ops:logarithm", {}, ["a"]),
        ("custom_ops.swiglu:swiglu", {}, ["*0", "*1", "f"]),
        ("chunk_linear_cross_entropy:chunk_linear_cross_entropy", {"args": {"padding_idx": 1, "chunk_size": 5}}, ["b", "l"]),
        ("seqloom.ops.attention:attention", {"sizes": {"l": 6, "m": 6}, "args": {"scale": 0.3}}, ["b", "k", "l", "g"]),
        ("seqloom.ops.attention:attention", {"args": {"scale": 0.3, "causal": False}}, ["b", "k", "l", "g"]),
        ("seqloom.ops.attention:attention", {}, ["b", "k", "l", "g"]),  # a stand-in for the scale, more keys than queries
        ("seqloom.ops.attention:attention", {"args": {"scale": 0.3, "query_start": 3}}, ["b", "k", "l", "g"]),
        ("sample_ops:square", {}, ["b"]),  # frozen sizes alike
        ("sample_ops:shifted", {}, ["b", "l"]),
        ("sample_ops:shifted", {"args": {"rows": 3, "first": 2}, "sizes": {"m": 9, "l": 6}}, ["b", "l"]),
        ("sample_ops:three_in_one", {}, ["a", "b", "c"]),
        ("chunk_linear_cross_entropy:chunk_linear_cross_entropy", {}, ["b", "l"]),
        ("seqloom.ops.attention:attention", {"sizes": {"l": 6, "m": 6}, "args": {"scale": 0.3, "window": 2}}, ["b", "k", "l", "g"]),
    ],
)
def test_true_annotations(target, options, names):
    report = check_op(target, **options)
    assert report.ok, format_report(report)
    assert [split.name for split in report.splits] == names
    assert format_report(report).endswith(f"the annotation is true: {len(names)} dimensions may be split")


def test_lie_about_the_output():
    report = check_op("sample_ops:softmax_lie")
    assert list(lies(report)) == ["d"] and "output 0 differs by" in lies(report)["d"] and "the gradient of x" in lies(report)["d"]
    text = format_report(report)
    assert "n           ok" in text and "d           WRONG  x[1], output 0[1]" in text
    assert text.endswith("the annotation lies about d: freeze it with '^', or mark it '+' where the operator sums over it")


def test_lie_about_a_sum():
    """A split contraction adds its bias once per piece."""
    report = check_op("sample_ops:biased_lie")
    assert list(lies(report)) == ["k"]
    assert "output 0" in lies(report)["k"] and "the gradient of bias" in lies(report)["k"] and "of x" not in lies(report)["k"]


def test_lie_about_a_gradient_only():
    report = check_op("sample_ops:gradient_lie")
    assert list(lies(report)) == ["a"]
    assert lies(report)["a"].startswith("the gradient of x differs by")


def test_lie_about_a_group_that_shows_only_with_one_head():
    assert check_op("sample_ops:grouped_lie", sizes={"k": 4}).ok
    assert list(lies(check_op("sample_ops:grouped_lie"))) == ["g"]


def test_failing_on_a_piece_is_a_lie():
    report = check_op("sample_ops:heads_by_guess", sizes={"h": 4, "d": 6})
    assert list(lies(report)) == ["h"] and "the operator fails on a piece: its output has shape (4, 3)" in lies(report)["h"]


def test_lie_about_shapes_and_dtypes():
    report = check_op("sample_ops:shape_lie")
    assert not report.ok and report.problems == ("the outputs have shapes [(4, 6)], but the annotation says [(6, 4)]",)
    report = check_op("sample_ops:dtype_lie")
    assert not report.ok and not lies(report)
    assert report.problems == ("output 0 has dtype torch.float64, but dtype= says torch.float32",)
    assert "WRONG" in format_report(report)


@pytest.mark.parametrize(
    ("target", "options", "words"),
    [
        ("sample_ops:plain", {}, "not a registered operator"),
        ("sample_ops:failing", {}, "needs a value for 'mode': pass --args mode=..."),
        ("sample_ops:failing", {"args": {"mode": "x"}, "sizes": {"a": 8}}, "fails on whole inputs of sizes a=8"),
        ("sample_ops:failing", {"args": {"mode": "x"}}, "fails on whole inputs of sizes a=4: mode x is not there"),
        ("sample_ops:scaled", {"sizes": {"q": 3}}, "has no dimension 'q': it has \\*0, \\*1, d"),
        ("sample_ops:scaled", {"sizes": {"d": 0}}, "d=0 is not possible"),
        ("sample_ops:repeated", {"sizes": {"b": 3}}, "b=3 cannot be cut in 2: give an even one with --sizes b=..."),
        ("sample_ops:scaled", {"args": {"powers": 3}}, "no parameter 'powers': it takes x, scale, power, options"),
        ("sample_ops:scaled", {"dtypes": {"x": "int65"}}, "x=int65 is not one of PyTorch's"),
        ("seqloom.ops.attention:attention", {"sizes": {"l": 8, "m": 6}}, "8 causal queries from position 0 on go beyond the 6 keys"),
    ],
)
def test_mistakes(target, options, words):
    with pytest.raises(UserError, match=words):
        check_op(target, **options)


def test_lie_about_a_start():
    """The first piece is right; the second reads what belongs to the first."""
    report = check_op("sample_ops:shifted_lie")
    assert list(lies(report)) == ["l"] and "output 0 differs by" in lies(report)["l"] and "the gradient of table" in lies(report)["l"]


def test_lie_about_a_choice():
    report = check_op("sample_ops:choices_lie")
    assert not report.ok and not lies(report)
    (problem,) = report.problems
    assert problem.startswith("with rows=2, which choices= allows, the gradient of x differs by")
    assert "WRONG" in format_report(report) and "the annotation is true" not in format_report(report)
    (problem,) = check_op("sample_ops:choices_fail").problems
    assert problem == "with rows=3, which choices= allows, the operator fails: 3 rows do not divide 4"


def test_lie_that_shows_only_behind_two_others():
    assert list(lies(check_op("sample_ops:three_lie"))) == ["c"]


def test_same_inputs_every_time():
    assert check_op("sample_ops:softmax_lie") == check_op("sample_ops:softmax_lie")
    assert check_op("sample_ops:softmax_lie", seed=1) != check_op("sample_ops:softmax_lie")
