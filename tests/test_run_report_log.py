"""The log of a run as columns: every kind of line, damaged ones, runs that go back, logs that grow; and curves of fewer points."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from run_page_samples import BEGAN, RESUMED, SKIPPED, SPIKE, STEPS, STRAGGLER, sample_lines, step_record, write_log

from seqloom.report.decimate import kept, running_mean, stretches
from seqloom.report.run_log import FIELDS, LoggedRun, LogReader

numbers = st.one_of(st.floats(-1e6, 1e6), st.sampled_from([math.nan, math.inf, -math.inf, 0.0, 1e300]))


def read(folder, lines) -> LoggedRun:
    return LogReader(write_log(folder, lines)).read()


@settings(deadline=None)
@given(st.lists(numbers, max_size=300), st.integers(4, 60))
def test_fewer_points_keep_the_least_and_greatest_of_every_stretch(values, most):
    values = np.array(values, dtype=float)
    places = kept(values, most)
    finite = np.flatnonzero(np.isfinite(values))
    assert len(places) <= most and set(places) <= set(finite) and all(one < two for one, two in pairwise(places))
    if len(finite) <= most:
        assert list(places) == list(finite)
        return
    assert places[0] == finite[0] and places[-1] == finite[-1]
    bounds = stretches(len(finite), (most - 2) // 2)
    assert bounds[0] == 0 and bounds[-1] == len(finite)
    for start, end in pairwise(bounds):
        part = finite[start:end]
        drawn = values[np.intersect1d(places, part)]
        assert drawn.min() == values[part].min() and drawn.max() == values[part].max()


@settings(deadline=None)
@given(st.lists(st.one_of(st.floats(-1e3, 1e3), st.just(math.nan)), max_size=60), st.integers(1, 20))
def test_running_mean_is_the_mean_of_what_is_known(values, width):
    places = np.arange(0, len(values), 2)
    found = running_mean(np.array(values, dtype=float), width, places)
    assert len(found) == len(places)
    for place, mean in zip(places, found, strict=True):
        known = [value for value in values[max(0, place + 1 - width) : place + 1] if not math.isnan(value)]
        assert math.isnan(mean) if not known else mean == pytest.approx(sum(known) / len(known), abs=1e-8)


def test_the_whole_sample(tmp_path):
    log = read(tmp_path, sample_lines())
    assert log.steps["step"].tolist() == [step for step in range(1, STEPS + 1) if step != SKIPPED]
    assert (log.state, log.text, log.damaged, log.last_step) == ("finish", f"finished step {STEPS}", 0, STEPS)
    assert [evaluation.step for evaluation in log.evaluations] == list(range(40, STEPS + 1, 40))
    kinds = {event.kind: event.step for event in log.events}
    assert kinds["restart"] == RESUMED and kinds["spike"] == SPIKE and kinds["straggler"] == STRAGGLER and kinds["skipped"] == SKIPPED
    assert log.last_time == BEGAN + 2000
    first = log.steps["step"][log.first_after_start()].tolist()
    assert first == [1, RESUMED + 1]


def test_the_later_record_of_a_step_counts_and_what_was_lost_is_dropped(tmp_path):
    lines = [step_record(step) for step in range(1, 11)]
    lines += [{"step": 8, "evaluation": {"loss": 1.0}}, step_record(5, loss=50.0), step_record(6, loss=60.0)]
    log = read(tmp_path, lines)
    assert log.steps["step"].tolist() == [1, 2, 3, 4, 5, 6] and log.steps["loss"][-2:].tolist() == [50.0, 60.0]
    assert log.evaluations == () and [event.kind for event in log.events] == ["evaluation"]


def test_a_restart_goes_back_before_its_first_step(tmp_path):
    log = read(tmp_path, [*map(step_record, range(1, 11)), {"step": 4, "event": "start", "text": "resumed"}])
    assert log.last_step == 4 and log.state == "run" and log.events[-1].kind == "restart"


DAMAGED = (
    '{"step": 5, "lo\n',
    "[1, 2]\n",
    "7\n",
    '"x"\n',
    "null\n",
    '{"loss": 1.0}\n',
    '{"step": "x", "loss": 1}\n',
    "\x00\xff\n",
    "[" * 100_000 + "\n",
)


@pytest.mark.parametrize("damage", DAMAGED, ids=range(len(DAMAGED)))
def test_damaged_lines_are_counted_and_left_out(damage, tmp_path):
    log = read(tmp_path, [step_record(1), damage, "\n", step_record(2)])
    assert log.steps["step"].tolist() == [1, 2] and log.damaged == 1


def test_a_line_without_its_end_is_left_for_later(tmp_path):
    whole = json.dumps(step_record(3)) + "\n"
    folder = write_log(tmp_path, [step_record(1), step_record(2), whole[:40]])
    reader = LogReader(folder)
    assert reader.read().last_step == 2
    with (folder / "log.jsonl").open("a") as file:
        file.write(whole[40:])
    log = reader.read()
    assert log.steps["step"].tolist() == [1, 2, 3] and log.damaged == 0


@pytest.mark.parametrize("value", [None, "x", [1], math.nan, math.inf, 10**400], ids=lambda value: str(value)[:9])
@pytest.mark.parametrize("name", [name for name in FIELDS if name != "step"])
def test_a_field_without_a_number_is_nan(name, value, tmp_path):
    log = read(tmp_path, [step_record(1, **{name: value}), step_record(2)])
    assert math.isnan(log.steps[name][0]) and math.isfinite(log.steps[name][1])
    assert math.isfinite(log.seconds()[-1])


def test_a_field_may_be_absent_everywhere(tmp_path):
    lines = [{name: value for name, value in step_record(step).items() if name != "time"} for step in (1, 2, 3)]
    log = read(tmp_path, lines)
    assert np.isnan(log.steps["time"]).all() and log.last_time is None
    assert log.seconds()[-1] == pytest.approx(sum(line["step_time_s"] for line in lines))


def test_time_running_has_evaluations_but_no_pause_of_a_restart(tmp_path):
    steps = [step_record(step, step_time_s=1.0, time=100.0 + 3 * step) for step in (1, 2, 3)]
    later = [step_record(step, step_time_s=1.0, time=9000.0 + 2 * step) for step in (4, 5)]
    log = read(tmp_path, [*steps, {"step": 3, "event": "start"}, *later])
    assert log.seconds().tolist() == [1.0, 4.0, 7.0, 8.0, 10.0]


def test_a_clock_that_is_set_back_does_not_take_time_away(tmp_path):
    log = read(tmp_path, [step_record(step, step_time_s=1.0, time=500.0 - step) for step in (1, 2, 3)])
    assert log.seconds().tolist() == [1.0, 2.0, 3.0]


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_reading_in_pieces_finds_what_reading_at_once_finds(tmp_path_factory, data):
    lines = sample_lines()[150:260] + ['{"step": 5, "lo\n', "\n"]
    text = "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines).encode()
    folder = tmp_path_factory.mktemp("log")
    path, reader = folder / "log.jsonl", LogReader(folder)
    for cut in sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4))):
        path.write_bytes(text[:cut])
        reader.read()
    path.write_bytes(text)
    found, whole = reader.read(), LogReader(folder).read()
    assert all(np.array_equal(found.steps[name], whole.steps[name], equal_nan=True) for name in FIELDS)
    assert (found.events, found.evaluations, found.state, found.damaged) == (whole.events, whole.evaluations, whole.state, whole.damaged)


def test_a_log_that_began_anew_is_read_anew(tmp_path):
    reader = LogReader(write_log(tmp_path, map(step_record, range(1, 9))))
    assert reader.read().last_step == 8
    write_log(tmp_path, [step_record(1)])
    assert reader.read().last_step == 1
    (tmp_path / "log.jsonl").unlink()
    assert reader.read().count == 0


def test_a_stop_is_told_until_the_run_goes_on(tmp_path):
    lines = [step_record(1), {"step": 1, "event": "stop", "text": "stopped by SIGTERM"}]
    log = read(tmp_path, lines)
    assert (log.state, log.text) == ("stop", "stopped by SIGTERM")
    assert read(tmp_path, [*lines, {"step": 1, "event": "start"}]).state == "run"
    assert read(tmp_path, [*lines, step_record(2)]).state == "run"


def test_an_evaluation_that_is_not_finite(tmp_path):
    log = read(tmp_path, [step_record(1), {"step": 1, "evaluation": {"step": 1, "loss": None, "perplexity": None}}])
    assert log.evaluations[0].loss is None and "not finite" in log.events[-1].text
