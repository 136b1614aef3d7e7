"""The comparison of predicted and measured step times: which steps count, which pairs have an order, what is said of them."""

import importlib.util
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parents[1] / "benchmarks" / "truth_time.py"


@pytest.fixture(scope="module")
def truth():
    spec = importlib.util.spec_from_file_location("truth_time", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prediction(seconds: float) -> dict:
    return {"step_s": seconds, "parts_s": {"forward": 0.25, "backward": 0.5, "recompute": 0.0, "optimizer": 0.25, "reshard": 3.0}}


def steps(*seconds: float) -> list[tuple[float, ...]]:
    """Steps that nothing disturbed."""
    return [(value, 0.0, 0.8) for value in seconds]


def test_the_steps_that_waited_least_count(truth):
    timed = [*steps(1.0, 1.2, 1.1, 1.3, 0.9), (9.0, 2.0, 0.8), (8.0, 1.0, 0.8)]
    found = truth.compare_plan(prediction(1.21), timed)
    assert found["measured_s"] == 1.1 and found["ratio"] == pytest.approx(1.1)
    assert found["spread_s"] == pytest.approx(0.1) and found["waited_s"] == 0
    assert found["compute_ratio"] == pytest.approx(1.0 / 0.8), "reshards are not computed"
    assert sorted(found["steps_s"]) == [0.9, 1.0, 1.1, 1.2, 1.3]


def test_only_pairs_that_differ_by_more_than_their_spread_have_an_order(truth):
    predicted = {"a": prediction(3.0), "b": prediction(2.0), "c": prediction(1.0)}
    result = truth.compare(predicted, {"a": steps(1.0, 1.1, 1.2), "b": steps(1.05, 1.1, 1.2), "c": steps(2.0, 2.1, 2.2)})
    assert result["pairs"] == 2
    assert result["wrong_pairs"] == [["a", "c"], ["b", "c"]]
    right = truth.compare({"a": prediction(1.0), "c": prediction(2.0)}, {"a": steps(1.0, 1.1, 1.2), "c": steps(2.0, 2.1, 2.2)})
    assert (right["pairs"], right["wrong_pairs"]) == (1, [])


def test_the_table_says_what_is_off(truth):
    predicted = {"good": prediction(1.1), "bad": prediction(1.0)}
    text = "\n".join(truth.table(truth.compare(predicted, {"good": steps(1.0, 1.0, 1.0), "bad": steps(2.0, 2.0, 2.0)})))
    assert "ratios beyond 30%: bad" in text and "order: 0 of 1 pairs" in text and "wrong: good / bad" in text
    fine = "\n".join(truth.table(truth.compare({"good": prediction(1.1)}, {"good": steps(1.0)})))
    assert "ratios beyond 30%: none" in fine and "wrong" not in fine


def test_at_least_six_plans_of_every_kind(truth):
    plans = truth.PLANS.values()
    assert len(plans) >= 6
    assert {plan["force"] for plan in plans} == {"sp2", "dp2", "tp_plain2", "tp_sp2"}
    assert {plan["recompute"] for plan in plans} == {"none", "all"}
    assert {plan.get("zero") for plan in plans} >= {0, 1, 3}
    assert {plan.get("precision", "fp32") for plan in plans} == {"fp32", "bf16"}
