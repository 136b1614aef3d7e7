"""report.html and the comparison as documents: well-formed, whole, self-contained, escaped; figures; what happens when files or fields are
absent or damaged; size and time for long runs."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from html_check import Element, Page
from run_page_samples import BEGAN, SPIKE, STEPS, run_json, sample_lines, sample_run, step_record, write_log

from seqloom.errors import UserError
from seqloom.report import run_log
from seqloom.report.axes import Scale, scale_of, short
from seqloom.report.compare_data import differing_settings, loss_difference
from seqloom.report.compare_page import write_compare_page
from seqloom.report.run_documents import read_run, settings
from seqloom.report.run_log import LogReader
from seqloom.report.run_page import write_run_page
from seqloom.report.text import count_text, duration

HOSTILE = "</script><script>alert(1)</script>\"'&<b>\ud800\u2028"


def page_of(folder: Path) -> Page:
    return Page(write_run_page(folder).read_text(encoding="utf-8"))


def charts(page: Page) -> list[dict]:
    """What the charts of a page hold as data; constants that JSON has not are refused."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    return [json.loads(element.text, parse_constant=refuse) for element in page.all("script") if element.attributes.get("type")]


def words(page: Page) -> str:
    """What is read of a page."""
    text = page.all("body")[0].text
    for script in page.all("script"):
        text = text.replace(script.text, "")
    return text


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def whole(root) -> Page:
    return page_of(sample_run(root / "whole"))


@pytest.fixture(scope="module")
def compared(root) -> Page:
    folders = [sample_run(root / "one"), sample_run(root / "two", shift=0.25, ranks=4, config={"optimizer": {"lr": 2e-3}})]
    return Page(write_compare_page(folders, root / "compare.html").read_text(encoding="utf-8"))


def test_the_page_is_whole(whole):
    text = words(whole)
    for expected in (
        "Run whole", "llama3_1b, 1.24 billion parameters, 4,096 tokens a step, bf16",
        "sp 2, ZeRO 3, activations kept; 2 ranks on h100-80gb",
        "finished", f"step {STEPS} of {STEPS}", "best evaluation", "60.0 GiB", "81.1% of 74.0 GiB", "predicted 4,266",
    ):  # fmt: skip
        assert expected in text, expected
    titles = [element.text for element in whole.elements if element.name in ("h2", "h3")]
    assert [re.split("(nats|tokens|seconds|GiB|share)", title)[0].strip() for title in titles] == [
        "Loss", "Gradient norm", "Learning rate", "Throughput", "Step time",
        "Peak memory", "Waiting for data", "Events", "Predicted and measured",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["whole", "compared"])
def test_documents_are_well_formed_and_fetch_nothing(name, request):
    page = request.getfixturevalue(name)
    assert page.declarations == ["doctype html"]
    for element in page.elements:
        assert element.name not in ("img", "iframe", "object", "embed", "video", "audio", "use", "image", "form")
        assert not {"src", "srcset", "xlink:href", "action", "style"} & set(element.attributes)
        assert not any(attribute.startswith("on") for attribute in element.attributes)
    for code in [*page.all("style"), *page.all("script")]:
        assert not re.search(r"url\(|@import|https?:|fetch|XMLHttpRequest|import\(", code.text)
    policy = next(meta for meta in page.all("meta") if meta.attributes.get("http-equiv"))
    assert policy.attributes["content"].startswith("default-src 'none'")
    ids = [element.attributes["id"] for element in page.elements if "id" in element.attributes]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("name", ["whole", "compared"])
def test_drawings_say_what_they_show_and_headings_descend(name, request):
    page = request.getfixturevalue(name)
    for svg in page.all("svg"):
        if "svg" not in svg.ancestors and svg.attributes.get("aria-hidden") != "true":
            assert svg.attributes["role"] == "img" and len(svg.attributes["aria-label"]) > 20
    assert sum(element.name == "desc" for element in page.elements) >= len(charts(page))
    levels = [int(element.name[1]) for element in page.elements if re.fullmatch("h[1-6]", element.name)]
    assert levels[0] == 1 and all(later - earlier <= 1 for earlier, later in zip(levels, levels[1:], strict=False))
    assert all(header.attributes.get("scope") in ("col", "rowgroup") for header in page.all("th"))


def test_charts_hold_the_figures_and_no_spike_disappears(whole):
    found = {curve["name"]: curve for chart in charts(whole) for curve in chart["curves"]}
    assert max(found["loss"]["y"]) == 12.0 and found["loss"]["x"][found["loss"]["y"].index(12.0)] == SPIKE
    assert found["evaluation"]["x"] == list(range(40, STEPS + 1, 40))
    assert found["waiting"]["factor"] == 100.0 and found["waiting"]["y"][0] == pytest.approx(0.4 / step_record(1)["step_time_s"], rel=1e-3)
    assert found["MFU"]["x"] is None and "factor" not in found["MFU"]
    marks = {mark["text"].partition(":")[0] for chart in charts(whole) for mark in chart["marks"]}
    assert marks == {"restart", "spike", "straggler", "skipped"}


def test_events_and_predictions_stand_in_tables(whole):
    text = words(whole)
    for expected in ("resumed from step-160", "stopped by SIGTERM", "rank 1 was slow", "saved step-280", "2026-11-18", "perplexity"):
        assert expected in text, expected
    rows = {tuple(cell.text for cell in row) for row in table_rows(whole)}
    assert ("peak memory", "58.0 GiB", "60.0 GiB", "0.967", "") in rows
    assert ("optimizer.betas", "[0.9, 0.95]") in rows and ("compile.zero", "null") in rows


def test_memory_of_a_cpu_run_is_not_compared(tmp_path):
    page = page_of(sample_run(tmp_path / "r", device="cpu"))
    assert ["memory of the process", "\u2013", "60.0 GiB", "\u2013", ""] in [[cell.text for cell in row] for row in table_rows(page)]
    assert "predicted 58.0 GiB" not in words(page) and "limit 74.0 GiB" in words(page)


def table_rows(page: Page) -> list[list[Element]]:
    rows: list[list[Element]] = []
    for element in page.elements:
        if element.name == "tr":
            rows.append([])
        elif element.name == "td":
            rows[-1].append(element)
    return rows


def test_same_files_give_the_same_bytes_and_the_reader_changes_nothing(root, whole):
    folder = root / "whole"
    once = write_run_page(folder).read_bytes()
    reader = LogReader(folder)
    reader.read()
    assert write_run_page(folder, reader).read_bytes() == once == write_run_page(folder).read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == ["log.jsonl", "report.html", "run.json"]


@pytest.mark.parametrize("field", [*run_json("x"), *(f"plan.{name}" for name in run_json("x")["plan"]), "plan.peak_memory_gib.total"])
@pytest.mark.parametrize("instead", ["absent", None, "text", [1], {"a": 1}, -1, 10**400], ids=lambda value: str(value)[:9])
def test_any_field_may_be_absent_or_of_another_kind(field, instead, tmp_path):
    document = run_json("run")
    *outer, name = field.split(".")
    place = document
    for key in outer:
        place = place[key]
    place.pop(name)
    if instead != "absent":
        place[name] = instead
    write_log(tmp_path, sample_lines()[185:195])
    (tmp_path / "run.json").write_text(json.dumps(document))
    page = page_of(tmp_path)
    assert "Gradient norm" in words(page) and charts(page)


@pytest.mark.parametrize("field", [name for name in step_record(1) if name not in ("step", "loss")])
def test_a_field_that_no_step_has_leaves_its_chart_out(field, tmp_path):
    page = page_of(write_log(tmp_path, [{key: value for key, value in step_record(step).items() if key != field} for step in (1, 2, 3)]))
    gone = {"grad_norm": "Gradient norm", "lr": "Learning rate", "memory_gib": "Peak memory", "data_wait_s": "Waiting for data"}.get(field)
    assert gone is None or gone not in words(page)
    charts(page)


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, 1e-300, 1e300, -5.0])
def test_extreme_numbers_make_a_page(value, tmp_path):
    figures = {key: value for key in step_record(1) if key not in ("step", "time")}
    for count in (1, 2, 30):
        page = page_of(write_log(tmp_path, [*(step_record(step) for step in range(1, count)), step_record(count, **figures)]))
        assert "nan" not in re.sub("<[^>]*>", "", words(page)).split()
        charts(page)


def test_before_the_first_step(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(run_json("early")))
    assert "No step was made yet" in words(page_of(tmp_path)) and "starting" in words(page_of(tmp_path))
    write_log(tmp_path, [{"step": 0, "event": "start", "text": "begin", "time": BEGAN}])
    assert "No step was made yet" in words(page_of(tmp_path))
    (tmp_path / "run.json").unlink()
    assert tmp_path.name in words(page_of(write_log(tmp_path, [])))


def test_states(tmp_path):
    steps = [step_record(step) for step in (1, 2, 3)]
    (write_log(tmp_path, steps) / "run.json").write_text(json.dumps(run_json("r")))
    assert "running" in words(page_of(tmp_path)) and "time left" in words(page_of(tmp_path))
    write_log(tmp_path, [*steps, {"step": 3, "event": "stop", "text": "stopped by SIGTERM after step 3"}])
    assert "stopped by SIGTERM after step 3" in words(page_of(tmp_path))
    (tmp_path / "run.json").write_text(json.dumps(run_json("r") | {"total_steps": 3}))
    write_log(tmp_path, steps)
    assert "finished" in words(page_of(tmp_path))


def test_what_is_no_run_ends_in_a_sentence(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="holds no run"):
            write_run_page(folder)
    with pytest.raises(UserError, match="at least two runs"):
        write_compare_page([tmp_path], tmp_path / "c.html")
    (tmp_path / "run.json").write_text('{"name": ')
    with pytest.raises(UserError, match=r"run\.json is damaged"):
        write_run_page(tmp_path)
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(UserError, match="not a JSON object"):
        write_run_page(tmp_path)
    with pytest.raises(UserError, match="cannot be written"):
        write_compare_page([sample_run(tmp_path / "a"), tmp_path / "a"], tmp_path / "no" / "such" / "c.html")


def test_names_cannot_break_out(tmp_path):
    lines = [
        *sample_lines()[:60],
        {"step": 3, "event": HOSTILE, "text": HOSTILE},
        step_record(61, notes=[HOSTILE, {"kind": HOSTILE, "text": HOSTILE}, {}]),
    ]
    changes = {
        "name": HOSTILE,
        "model_id": HOSTILE,
        "plan_line": HOSTILE,
        "plan_page": "javascript:alert(1)",
        "config": {HOSTILE: {HOSTILE: HOSTILE}},
    }
    folder = write_log(tmp_path / "r", lines)
    (folder / "run.json").write_text(json.dumps(run_json("r") | changes))
    page = page_of(folder)
    other = Page(write_compare_page([folder, sample_run(tmp_path / "b")], tmp_path / "c.html").read_text(encoding="utf-8"))
    for found in (page, other):
        assert all("alert(1)" not in script.text for script in found.all("script") if "type" not in script.attributes)
        assert not found.all("b") or all("badge" in element.classes for element in found.all("b"))
        assert charts(found)
    assert [element.attributes["href"] for element in page.all("a")] == ["javascript%3Aalert%281%29"]


@pytest.mark.parametrize("given", ["plan.html", "../programs/a b/plan.html", "absolute"])
def test_the_plans_page_is_linked_as_seen_from_the_run(given, tmp_path):
    path = str(tmp_path / "programs" / "a b" / "plan.html") if given == "absolute" else given
    page = page_of(sample_run(tmp_path / "r", plan_page=path))
    expected = "plan.html" if given == "plan.html" else "../programs/a%20b/plan.html"
    assert [element.attributes["href"] for element in page.all("a")] == [expected]


def test_a_long_run_is_read_once_and_takes_little_room(tmp_path, monkeypatch):
    line = json.dumps(step_record(7)).replace('"step": 7,', '"step": %d,', 1)
    folder = write_log(tmp_path, (line % step + "\n" for step in range(1, 100_001)))
    (folder / "run.json").write_text(json.dumps(run_json("long") | {"total_steps": 100_000}))
    reader, parsed = LogReader(folder), []
    records = run_log._records
    monkeypatch.setattr(run_log, "_records", lambda lines: parsed.append(len(lines)) or records(lines))
    write_run_page(folder, reader)
    assert sum(parsed) == 100_000
    page = write_run_page(folder, reader)
    assert sum(parsed) == 100_000, "no line is parsed again"
    assert page.stat().st_size < 1_000_000


def test_pages_with_thousands_of_events_stay_small(tmp_path):
    lines = [
        step_record(
            step, notes=[{"kind": "spike", "text": f"loss {step}, twice its mean"}, {"kind": "straggler", "text": "rank 1 was slow"}]
        )
        for step in range(1, 3001)
    ]
    lines += [{"step": step, "event": "checkpoint", "text": f"saved step-{step}"} for step in range(1, 3001)]
    page = write_run_page(write_log(tmp_path, lines))
    assert page.stat().st_size < 700_000
    assert "The newest 60 of 9,000" in words(Page(page.read_text()))


def test_nothing_heavy_is_imported():
    heavy = "{'torch', 'transformers', 'matplotlib', 'scipy'}"
    code = f"import sys, seqloom.report.run_page, seqloom.report.compare_page; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "set()"


def test_the_comparison_says_how_far_losses_lie_apart_and_what_differs(compared, root):
    one, two = (read_run(root / name) for name in ("one", "two"))
    found = loss_difference(one, two)
    assert (found.steps, found.largest) == (STEPS - 1, pytest.approx(0.25)) and found.mean == pytest.approx(
        0.25 * (STEPS - 2) / (STEPS - 1)
    )
    assert differing_settings([one, two]) == {
        "compile.model_id": ["llama3_1b", None],
        "compile.name": ["one", None],
        "compile.zero": ["null", None],
        "optimizer.lr": ["0.001", "0.002"],
        "optimizer.betas": ["[0.9, 0.95]", None],
        "ranks": ["2", "4"],
    }
    rows = {tuple(cell.text for cell in row) for row in table_rows(compared)}
    assert ("ranks", "2", "4") in rows and any(row[:3] == ("two", "299", "+0.25") for row in rows)


def test_runs_without_common_steps_or_steps_are_compared(tmp_path):
    early = write_log(tmp_path / "early", map(step_record, range(1, 5)))
    late = write_log(tmp_path / "late", map(step_record, range(5, 9)))
    empty = write_log(tmp_path / "empty", [])
    assert loss_difference(read_run(early), read_run(late)) is None
    for folders in ([early, late, empty], [empty, empty]):
        charts(Page(write_compare_page(folders, tmp_path / "c.html").read_text(encoding="utf-8")))


def test_many_runs_stay_small(tmp_path):
    folders = [write_log(tmp_path / str(number), [step_record(step, number / 10) for step in range(1, 1501)]) for number in range(8)]
    page = write_compare_page(folders, tmp_path / "c.html")
    assert page.stat().st_size < 1_500_000
    found = charts(Page(page.read_text()))
    assert {chart["axis"] for chart in found} == {"steps", "tokens", "minutes"}


def test_settings_are_flat():
    assert settings({"a": {"b": 1, "c": {"d": [1, 2]}}, "e": None, "f": {}}) == {"a.b": "1", "a.c.d": "[1, 2]", "e": "null", "f": "{}"}


@pytest.mark.parametrize(
    ("scale", "count", "expected"),
    [
        (Scale(0.0, 10.0), 5, [0, 2, 4, 6, 8, 10]),
        (Scale(4.7, 9.3), 4, [6, 8]),
        (Scale(-0.5, 0.5), 2, [-0.5, 0, 0.5]),
        (Scale(0.5, 2e4, log=True), 5, [1, 10, 100, 1000, 10_000]),
        (Scale(1e-9, 1.0, log=True), 4, [1e-9, 1e-7, 1e-5, 1e-3, 1e-1]),
    ],
)
def test_marks_of_scales(scale, count, expected):
    assert scale.marks(count) == pytest.approx(expected)
    assert all(0 <= float(scale.place(mark)) <= 1 for mark in scale.marks(count))


def test_scales_are_logarithmic_only_where_it_is_worth_it():
    assert scale_of([np.array([1.0, 500.0])], log=True).log
    assert not scale_of([np.array([1.0, 50.0])], log=True).log and not scale_of([np.array([0.0, 500.0])], log=True).log
    assert scale_of([np.array([math.nan])]) == Scale(-0.06, 1.06)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.0005, "0.0005"), (2e-5, "2e-05"), (1500.0, "1,500"), (20_000.0, "20k"), (2.5e6, "2.5M"), (1e9, "1B"), (3e13, "30T")],
)
def test_round_values_are_short(value, text):
    assert short(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(7.2, "7 s"), (59.6, "1 min"), (3599.0, "60 min"), (3600.0, "1 h 00 min"), (11_100.0, "3 h 05 min"), (200_000.0, "2 d 7 h")],
)
def test_durations(value, text):
    assert duration(value) == text.replace("60 min", "1 h 00 min")


def test_counts():
    assert [count_text(value) for value in (4096, 4_999_424, 8_030_261_248)] == ["4,096", "5.00 million", "8.03 billion"]
