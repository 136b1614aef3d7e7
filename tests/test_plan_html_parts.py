"""The pieces of plan.html: markup, numbers, the block's rows, lanes of the timeline, the reading of runs, colours."""

from __future__ import annotations

import json
import os
from html import unescape
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan_page_samples import full_plan, plan_as_compiled, step_record, write_run

from seqloom.report.bars import Bar, Part, bar_list, stacked_bar
from seqloom.report.block_picture import NARROW, WIDE, draw
from seqloom.report.block_rows import collective, read_picture
from seqloom.report.comparisons import Comparison, read_comparisons
from seqloom.report.documents import Documents, read_training
from seqloom.report.markup import Markup, join, tag
from seqloom.report.style import DARK, LIGHT, SERIES, series, stylesheet
from seqloom.report.svg import share, ticks
from seqloom.report.text import (
    clip,
    flops,
    gib,
    join_words,
    mesh_text,
    nbytes,
    number,
    percent,
    plural,
    seconds,
    storage_text,
    strategy_text,
)
from seqloom.report.timeline import lane_sentences, merge, overlap


class Reader(HTMLParser):
    """Text and attributes as a browser would read them."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags, self.data = [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag_, attrs):
        self.tags.append((tag_, dict(attrs)))

    def handle_data(self, data):
        self.data += data


TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\r\x00"), max_size=40)


@given(text=TEXTS, attribute=TEXTS)
def test_any_text_comes_back_from_markup(text, attribute):
    reader = Reader(tag("p", text, data_tip=attribute))
    assert reader.tags == [("p", {"data-tip": attribute})] and reader.data == text


@given(st.lists(TEXTS, max_size=5))
def test_children_are_flattened_in_order(texts):
    nested = tag("p", [texts[:2], (text for text in texts[2:])], None)
    assert unescape(nested[3:-4]) == "".join(unescape(tag("i", text)[3:-4]) for text in texts)


def test_markup_is_not_escaped_twice():
    assert tag("p", tag("b", "1 < 2")) == "<p><b>1 &lt; 2</b></p>"
    assert join(["a & b", Markup("<i></i>"), None]) == "a &amp; b<i></i>"


def test_attributes():
    assert tag("rect", x=1.0, y=0.126, width=3, class_="a", hidden=True, open=False, role=None, stroke_width="1") == (
        '<rect x="1" y="0.13" width="3" class="a" hidden stroke-width="1"></rect>'
    )
    assert tag("meta", name_="viewport") == '<meta name="viewport">'


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, "0"), (1, "1.00"), (21.07, "21.1"), (3109.82, "3,110"), (0.0123456, "0.0123"), (99.96, "100"), (2e-6, "2e-06"), (-5.5, "-5.50")],
)
def test_numbers_have_three_digits(value, expected):
    assert number(value) == expected


@given(st.floats(1e-3, 1e12))
def test_numbers_are_within_half_a_percent_and_without_exponent(value):
    text = number(value)
    assert "e" not in text and float(text.replace(",", "")) == pytest.approx(value, rel=5.1e-3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (seconds(21.07), "21.1 s"),
        (seconds(0.0042), "4.20 ms"),
        (seconds(9.1e-5), "91.0 \u00b5s"),
        (seconds(0), "0 s"),
        (seconds(3e-9), "0.00300 \u00b5s"),
        (nbytes(105e9), "105 GB"),
        (nbytes(0), "0 B"),
        (nbytes(1.5e12), "1.50 TB"),
        (flops(4.12e14), "412 TFLOP"),
        (gib(57.91), "57.9 GiB"),
        (percent(0.4657), "46.6%"),
        (plural(1, "rank"), "1 rank"),
        (plural(2, "micro-batch", "micro-batches"), "2 micro-batches"),
        (clip("abcdef", 6), "abcdef"),
        (clip("abcdefg", 6), "abcde\u2026"),
        (join_words([]), ""),
        (join_words(["a"]), "a"),
        (join_words(["a", "b", "c"]), "a, b and c"),
        (mesh_text({"dp": 1, "sp": 4, "tp": 2}), "sp 4 \u00d7 tp 2"),
        (mesh_text({"dp": 1}), "one rank"),
        (mesh_text("8 tensor parallel"), "8 tensor parallel"),
        (storage_text(3, ["dp", "sp"]), "ZeRO 3 over dp and sp"),
        (storage_text(0), "ZeRO 0"),
        (storage_text(None), ""),
        (storage_text(3, ["gpu"], ["node"]), "ZeRO 3 over gpu, a copy on each rank of node"),
        (strategy_text({"sp": "l", "tp": "whole"}), "l@sp whole on tp"),
        (strategy_text({}), "one rank"),
    ],
)
def test_words(text, expected):
    assert text == expected


@given(st.floats(1e-9, 1e9))
def test_ticks_are_round_even_and_within(end):
    values = ticks(end)
    assert values[0] == 0 and 2 <= len(values) <= 12
    assert values[-1] <= end * 1.001
    steps = [later - earlier for earlier, later in zip(values, values[1:], strict=False)]
    assert steps == pytest.approx([values[1]] * len(steps))
    assert f"{values[1]:.0e}"[0] in "125"


def test_ticks_of_nothing():
    assert ticks(0) == [0.0] and share(0.25) == "25.000%"


# Bars


def test_stacked_parts_fill_their_share():
    bar = Reader(stacked_bar("Memory", [Part("a", 3.0, "3 GiB", "one"), Part("b", 1.0, "1 GiB", "two")], (8.0, "8 GiB")))
    rects = [attributes for name, attributes in bar.tags if name == "rect"]
    assert [(r["x"], r["width"], r["class"]) for r in rects[1:]] == [("0.000%", "37.500%", "one"), ("37.500%", "12.500%", "two")]
    label = next(attributes["aria-label"] for name, attributes in bar.tags if name == "svg")
    assert label == "Memory: a 3 GiB, b 1 GiB; limit 8 GiB"


def test_stacked_parts_beyond_the_limit_stay_in_the_figure():
    bar = Reader(stacked_bar("Memory", [Part("a", 12.0, "12 GiB", "one")], (8.0, "8 GiB")))
    rect = [attributes for name, attributes in bar.tags if name == "rect"][1]
    assert rect["width"] == "100.000%"
    assert next(attributes["x1"] for name, attributes in bar.tags if name == "line") == "66.667%"


def test_stacked_nothing_divides_by_nothing():
    assert "0.000%" in stacked_bar("Time", [Part("a", 0.0, "0 s", "one")])


def test_lines_without_a_length_have_no_bar():
    reader = Reader(bar_list([Bar("a", "1", None, "why"), Bar("b", "2", 2.0)]))
    assert [attributes["width"] for name, attributes in reader.tags if name == "rect"] == ["100.000%"]
    assert reader.data == "a1whyb2"


# The block


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ("S(1)", "R", "all-gather"),
        ("S(1)", "B", "all-gather"),
        ("S(2)", "S(1)", "all-to-all"),
        ("P", "S(1)", "reduce-scatter"),
        ("P", "R", "all-reduce"),
        ("P", "B", "all-reduce"),
        ("R", "S(0)", "slice"),
        ("B", "S(0)", "slice"),
        ("R", "B", "sum of gradients"),
        ("B", "R", "B to R"),
        ("S(1) P", "S(1) R", "all-reduce"),
        ("S(1) S(1)", "R R", "all-gather"),
        ("S(1) P", "R S(1)", "all-gather + reduce-scatter"),
        ("R", "R", "nothing"),
    ],
)
def test_collectives_between_layouts(source, target, expected):
    assert collective(source, target) == expected


def operator(name, inputs, segment="s", split="l"):
    placements = dict.fromkeys([*inputs, name], "S(1)")
    return {
        "operator": name,
        "strategy": {"sp": split},
        "placements": placements,
        "forward_s": 1e-3,
        "backward_s": 2e-3,
        "segment": segment,
    }


def reshard(value, target="S(2)"):
    return {"reshard": value, "from": "S(1)", "to": target, "forward_s": 1e-4, "backward_s": 1e-4}


def test_edges_join_makers_and_users():
    rows = [operator("a", ["x", "w"]), operator("b", ["a"]), operator("c", ["a", "b", "x"])]
    assert read_picture(rows, {}).edges == ((0, 1), (0, 2), (1, 2))


def test_edges_go_through_a_reshard_only_to_those_who_use_its_layout():
    user = operator("b", ["a"])
    user["placements"]["a"] = "S(2)"
    rows = [operator("a", ["x"]), reshard("a"), user, operator("c", ["a"])]
    assert read_picture(rows, {}).edges == ((0, 1), (1, 2), (0, 3))


def test_reshards_of_inputs_come_from_nowhere():
    assert read_picture([reshard("x"), operator("a", ["y"])], {}).edges == ()


def test_segments_hold_the_reshards_in_front_of_them_and_the_last_those_behind():
    rows = [operator("a", [], "one"), reshard("a"), operator("b", [], "two"), reshard("b"), reshard("a")]
    segments = read_picture(rows, {"one": {"keep": 2}, "two": {"recompute": 2, "tiles": 4}}).segments
    assert [(segment.name, segment.first, segment.last) for segment in segments] == [("one", 0, 0), ("two", 1, 4)]
    assert segments[0].sentence == "all 2 kept" and segments[1].sentence == "all 2 recomputed in 4 tiles"


def test_layers_come_in_the_order_in_which_they_run():
    counts = {"keep": 3, "selective": 1, "recompute": 2, "offload": 1, "tiles": 1, "kept": ["gate_proj"]}
    segment = read_picture([operator("a", [])], {"s": counts}).segments[0]
    assert segment.layers == (("offload", 1), ("recompute", 2), ("selective", 1), ("keep", 3))
    assert segment.sentence == "1 offloaded to the host, 2 recomputed, 1 recomputed in part, 3 kept; gate proj saved"


def test_a_picture_knows_its_layers_and_seconds():
    picture = read_picture([operator("a", []), reshard("a")], {"s": {"keep": 5, "recompute": 1}})
    assert picture.layers == 6 and picture.seconds == pytest.approx(3.2e-3)
    assert read_picture([operator("a", [])], {}).layers == 1


def test_constants_and_placements_are_told_when_a_row_is_pointed_at():
    row = operator("losses", ["norm"]) | {"constants": {"chunk_size": 4096}}
    tip = read_picture([row], {}).rows[0].tip
    assert tip == "losses, split l@sp; forward 1.00 ms, backward 2.00 ms; chunk_size 4096; norm S(1), losses S(1)"


@pytest.mark.parametrize("shape", [WIDE, NARROW])
@pytest.mark.parametrize("block", ["model", "LlamaDecoderLayer"])
def test_drawings_stay_in_their_frame_and_bars_are_to_scale(shape, block):
    plan = full_plan()
    picture = read_picture(plan["blocks"][block], plan["segments"].get(block, {}))
    longest = max(row.forward_s + row.backward_s for row in picture.rows)
    reader = Reader(draw(block, picture, shape, longest))
    width, height = (float(size) for size in reader.tags[0][1]["viewbox"].split()[2:])
    for name, attributes in reader.tags:
        if name == "rect":
            assert float(attributes["x"]) >= 0 and float(attributes["x"]) + float(attributes["width"]) <= width + 0.01, attributes
            assert float(attributes["y"]) >= 0 and float(attributes["y"]) + float(attributes["height"]) <= height + 0.01, attributes
        if name in ("text", "circle"):
            assert 0 <= float(attributes.get("x", attributes.get("cx"))) <= width
            assert 0 <= float(attributes.get("y", attributes.get("cy"))) <= height
    bars = [float(a["width"]) for name, a in reader.tags if name == "rect" and float(a["x"]) >= shape.bar_x and a["class"] == "backward"]
    expected = [row.backward_s / longest * (shape.bar_end - shape.bar_x) for row in picture.rows if not row.is_reshard]
    assert [bar for bar in bars if bar > 0.4] == pytest.approx([bar for bar in expected if bar > 0.4], abs=0.011)


# Lanes

INTERVALS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 8)).map(lambda pair: (pair[0], pair[0] + pair[1])), max_size=12)


def cells(intervals):
    return {cell for start, end in intervals for cell in range(start, end)}


@given(INTERVALS)
def test_merged_intervals_cover_the_same_without_overlap(intervals):
    union = merge(intervals)
    assert cells(union) == cells(intervals)
    assert all(earlier[1] < later[0] for earlier, later in zip(union, union[1:], strict=False))


@given(INTERVALS, INTERVALS)
def test_overlap_is_what_both_cover(first, second):
    assert overlap(merge(first), merge(second)) == len(cells(first) & cells(second))


def event(lane, start, end):
    return {"lane": lane, "label": lane, "start_s": start, "end_s": end}


def test_lanes_say_what_is_exposed():
    events = [event("compute", 0, 4), event("compute", 6, 10), event("communication", 3, 6), event("host", 1, 3)]
    assert lane_sentences(events, 10) == {
        "compute": "compute 80.0% busy",
        "communication": "communication 30.0% busy, 2.00 s exposed",
        "host": "host 20.0% busy, all behind compute",
    }


def test_without_compute_everything_is_exposed():
    assert lane_sentences([event("host", 0, 1)], 2) == {"host": "host 50.0% busy, 1.00 s exposed"}


# Measurements


def training(tmp_path, lines, age=60.0):
    plan_file, log = tmp_path / "plan.json", tmp_path / "log.jsonl"
    plan_file.write_text("{}")
    log.write_text("".join(line + "\n" for line in lines))
    moment = plan_file.stat().st_mtime + age
    os.utime(log, (moment, moment))
    return read_training(tmp_path, plan_as_compiled(), plan_file)


def records(*slowdowns, plan=None):
    plan = plan or plan_as_compiled()
    return [json.dumps(step_record(plan, step, slowdown)) for step, slowdown in enumerate(slowdowns, start=1)]


def test_a_run_is_read_without_its_first_step(tmp_path):
    found = training(tmp_path, records(5.0, 1.0, 2.0, 1.5))
    step_s = plan_as_compiled()["step_time_s"]
    assert found.steps == 4 and found.step_s == pytest.approx(1.5 * step_s) and found.peak_gib == 66.2
    assert found.mfu_causal == pytest.approx(plan_as_compiled()["mfu_causal"] / 1.5)
    assert [step for step, _ in found.losses] == [1, 2, 3, 4]


def test_one_step_is_better_than_none(tmp_path):
    assert training(tmp_path, records(2.0)).step_s == pytest.approx(2 * plan_as_compiled()["step_time_s"])


def test_a_step_run_twice_counts_once_and_broken_lines_do_not(tmp_path):
    first, second, third = records(1.0, 3.0, 1.2)
    again = json.dumps(step_record(plan_as_compiled(), 2, 1.0))
    found = training(tmp_path, [first, second, "", '{"step": 3, "los', again, third])
    assert found.steps == 3 and found.step_s == pytest.approx(1.1 * plan_as_compiled()["step_time_s"])


def test_a_run_before_the_plan_is_not_of_it(tmp_path):
    assert training(tmp_path, records(1.0, 1.0), age=-60.0) is None


def test_a_run_of_another_model_or_machine_is_not_of_it(tmp_path):
    other = plan_as_compiled() | {"mfu_causal": 0.2}
    assert training(tmp_path, records(1.0, 1.0, plan=other)) is None


@pytest.mark.parametrize("lines", [[], [""], ["{"]])
def test_a_log_without_steps_is_no_run(lines, tmp_path):
    assert training(tmp_path, lines) is None


def test_no_log_is_no_run(tmp_path):
    (tmp_path / "plan.json").write_text("{}")
    assert read_training(tmp_path, plan_as_compiled(), tmp_path / "plan.json") is None


def documents(tmp_path, plan=None, dryrun=None, rehearsal=None):
    return Documents("p", plan or plan_as_compiled(), None, dryrun, rehearsal, None)


def test_ratio_is_predicted_over_measured():
    assert Comparison("peak", 11.0, 10.0, gib).ratio == pytest.approx(1.1)
    assert Comparison("peak", None, 10.0, gib).ratio is None
    assert Comparison("peak", 1.0, 0.0, gib).ratio is None


def test_a_dry_run_without_predictions_takes_the_plans(tmp_path):
    ranks = [{"rank": 3, "peak_gib": 60.0, "comm_bytes": {"all_gather": 105 * 10**9}, "flops": 5e15}]
    [group] = read_comparisons(documents(tmp_path, full_plan(), dryrun={"ranks": ranks}))
    assert group.title == "Dry run, rank 3"
    figures = {row.name: row.predicted for row in group.rows}
    assert figures == {
        "peak memory": full_plan()["peak_memory_gib"]["total"],
        "arithmetic": pytest.approx(5.42e15),
        "all gather": pytest.approx(105068916736, rel=1e-4),
    }


def test_a_dry_run_shows_the_fullest_rank_and_parts_that_are_not_nothing(tmp_path):
    ranks = [{"rank": r, "peak_gib": p, "parts_gib": {"states": 1.0, "gathered": 0.0}, "host_gib": None} for r, p in ((0, 5.0), (7, 6.0))]
    predicted = {"peak_gib": 6.6, "parts_gib": {"states": 1.1, "gathered": None}, "host_gib": None, "flops": None}
    [group] = read_comparisons(documents(tmp_path, dryrun={"ranks": ranks, "predicted": predicted}))
    assert group.title.startswith("Dry run, rank 7 of 2 ranks")
    assert [(row.name, row.ratio) for row in group.rows] == [("peak memory", pytest.approx(1.1)), ("states", pytest.approx(1.1))]


def test_a_rehearsal_without_a_gpu_has_no_peak(tmp_path):
    result = {"rank": 0, "device": "cpu", "step_s": 2.0, "time_s": {"forward": 0.5}, "peak_gib": None}
    expected = {"step_s": 1.0, "time_s": {"forward": 0.4}}
    [group] = read_comparisons(documents(tmp_path, rehearsal=result | {"predicted": expected}))
    assert group.title == "Rehearsal of rank 0 on cpu"
    assert [(row.name, row.ratio) for row in group.rows] == [("step", pytest.approx(0.5)), ("forward", pytest.approx(0.8))]


def test_memory_of_a_cpu_run_is_not_compared(tmp_path):
    plan = plan_as_compiled() | {"hardware": "cpu"}
    (tmp_path / "plan.json").write_text("{}")
    write_run(tmp_path / "run", plan, tmp_path)
    run = read_training(tmp_path / "run", plan, tmp_path / "plan.json")
    [group] = read_comparisons(Documents("p", plan, None, None, None, run))
    assert group.rows[-1].name == "memory of the process" and group.rows[-1].ratio is None


# Colours


def luminance(colour: str) -> float:
    """Relative luminance of `#rrggbb` (WCAG 2.2)."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, two: str) -> float:
    light, dark = sorted((luminance(one), luminance(two)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_contrast_is_the_known_one():
    assert contrast("#000000", "#ffffff") == pytest.approx(21) and contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize("ground", ["paper", "raised"])
def test_text_and_marks_can_be_told_from_their_ground(colours, ground):
    for name, colour in colours.items():
        if name in ("ink", "muted", "limit"):
            assert contrast(colour, colours[ground]) >= 4.5, name
        elif name not in ("paper", "raised", "rule"):
            assert contrast(colour, colours[ground]) >= 3.0, name


def test_light_and_dark_have_the_same_names():
    assert list(LIGHT) == list(DARK) and set(SERIES) <= set(LIGHT)
    assert stylesheet().count("{") == stylesheet().count("}")


@given(st.lists(st.sampled_from("abcdef"), unique=True, max_size=6))
def test_parts_without_a_colour_get_one_that_no_other_has(names):
    colours = series(names, {"a": "one", "b": "three"})
    assert list(colours) == names and len(set(colours.values())) == len(names)
