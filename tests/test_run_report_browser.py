"""report.html and the comparison in a real browser: silent, alone, at every width, light and dark; pointing, keys, choosing the axis."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from browser import CUT_OFF, Browser, Page, assert_silent_and_alone, find_browser, rgb
from run_page_samples import RESUMED, SPIKE, STEPS, sample_lines, sample_run, step_record, write_log

from seqloom.report.compare_page import write_compare_page
from seqloom.report.run_page import write_run_page
from seqloom.report.style import DARK, LIGHT

pytestmark = pytest.mark.skipif(find_browser() is None, reason="no Chromium or Chrome on the PATH: `apt-get install chromium` brings one")

WIDTHS = (320, 768, 1280)
LONG = "a_name_that_goes_on_and_on_and_does_not_end_before_the_page_does_" * 2
CHART = "figure.chart svg[role=img]"
OVERLAPS = """[...document.querySelectorAll('main svg')].flatMap(svg => {
    const boxes = [...svg.querySelectorAll(':scope > text')].map(text => [text.textContent, text.getBoundingClientRect()]);
    return boxes.flatMap(([one, a], i) => boxes.slice(i + 1).filter(([, b]) => a.width > 0 && b.width > 0 &&
      a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 2 && b.top < a.bottom - 2).map(([two]) => one + ' / ' + two));
})"""
"""Texts of a drawing that lie over one another."""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(find_browser(), tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    whole, other = sample_run(root / "whole"), sample_run(root / "other", shift=0.3, config={"optimizer": {"lr": 2e-3}})
    huge = [
        step_record(step, tokens_seen=10**9 * step, memory_gib=1e4, tokens_per_s_per_gpu=3e6 / step, grad_norm=10.0**-step)
        for step in (1, 2, 9)
    ]
    names = dict.fromkeys(("model_id", "plan_line", "precision", "plan_page"), LONG)
    long = sample_run(root / "long", **names, name=LONG, config={LONG: {LONG: LONG}})
    write_log(long, [*huge, {"step": 9, "event": LONG, "text": LONG}, {"step": 9, "event": "stop", "text": LONG}])
    empty = write_log(root / "empty", [])
    return {
        "whole": write_run_page(whole),
        "long": write_run_page(long),
        "empty": write_run_page(empty),
        "one": write_run_page(write_log(root / "one", sample_lines()[:2])),
        "compared": write_compare_page([whole, other], root / "compared.html"),
        "mixed": write_compare_page([whole, long, empty, *[other] * 6], root / "mixed.html"),
    }


@pytest.mark.parametrize(("width", "scheme"), [*((width, "light") for width in WIDTHS), (320, "dark"), (1280, "dark")])
@pytest.mark.parametrize("name", ["whole", "long", "empty", "one", "compared", "mixed"])
def test_renders_silently_and_fits(browser, pages, name, width, scheme):
    page = browser.open(pages[name], width, 800, scheme)
    assert_silent_and_alone(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    colours = DARK if scheme == "dark" else LIGHT
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == rgb(colours["paper"])
    if page.evaluate("document.querySelector('.line.one') !== null"):
        assert page.evaluate("getComputedStyle(document.querySelector('.line.one')).stroke") == rgb(colours["one"])
    assert page.evaluate(OVERLAPS) == []
    if name in ("whole", "one", "compared"):
        assert page.evaluate(CUT_OFF) == []
    page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("width", WIDTHS)
def test_charts_are_shown_with_their_curves_and_legible_words(browser, pages, width):
    page = browser.open(pages["whole"], width)
    boxes = page.evaluate(f"[...document.querySelectorAll('{CHART}')].map(e => e.getBoundingClientRect()).map(b => [b.width, b.height])")
    assert len(boxes) == 7 and all(wide >= 180 and high >= 150 for wide, high in boxes)
    lines = page.evaluate("[...document.querySelectorAll('path.line')].map(e => e.getBoundingClientRect()).map(b => [b.width, b.height])")
    assert len(lines) == 8 and all(wide > 180 for wide, _ in lines)
    heights = "[...document.querySelectorAll('svg text')].map(e => e.getBoundingClientRect().height)"
    assert page.evaluate(f"Math.min(...{heights}.filter(height => height > 0))") >= 10
    tops = page.evaluate("[...document.querySelectorAll('.pair .plot')].map(e => Math.round(e.getBoundingClientRect().top))")
    assert len(set(tops)) == (3 if width >= 760 else 6)


def readouts(page: Page) -> list[str]:
    return page.evaluate("[...document.querySelectorAll('.readout')].filter(e => e.offsetParent).map(e => e.textContent)")


def point(page: Page, selector: str, share: float) -> None:
    """Move the mouse to a place of a drawing, from 0 at its left end to 1 at the right."""
    found = f"[...document.querySelectorAll({json.dumps(selector)})].find(e => e.getBoundingClientRect().width > 0)"
    page.evaluate(f"{found}.scrollIntoView({{block: 'center'}})")
    x, y = page.evaluate(f"(b => [b.left + b.width * {share}, b.top + b.height / 2])({found}.getBoundingClientRect())")
    page.browser.call("Input.dispatchMouseEvent", page.session, type="mouseMoved", x=x, y=y)


def test_every_chart_tells_the_step_that_is_pointed_at_in_one(browser, pages):
    page = browser.open(pages["whole"])
    assert readouts(page)[0].startswith(f"step {STEPS}: loss ") and "evaluation" in readouts(page)[0]
    point(page, CHART, (SPIKE - 1) / (STEPS - 1))
    told = readouts(page)
    assert told[0].startswith(f"step {SPIKE}: loss 12, running mean ") and "spike: loss 12.0" in told[0] and "at step 80" in told[0]
    assert all(line.startswith(f"step {SPIKE}: ") for line in told[:7])
    norm = float(f"{step_record(SPIKE)['grad_norm']:.4g}")
    assert told[1] == f"step {SPIKE}: gradient norm {norm:g}; spike: loss 12.0, 2.1 times its mean"
    shown = "[...document.querySelectorAll('.cursor')].map(e => getComputedStyle(e).visibility)"
    assert page.evaluate(shown) == ["visible"] * 7
    dots = page.evaluate("[...document.querySelectorAll('circle.dot')].filter(e => e.style.visibility === 'visible').length")
    assert dots == 8  # of the evaluation, which is of another step, there is none
    point(page, "h1", 0.5)
    assert page.evaluate(shown) == ["hidden"] * 7 and readouts(page)[0].startswith(f"step {STEPS}: ")
    assert_silent_and_alone(page)


def test_a_dot_lies_on_its_curve(browser, pages):
    page = browser.open(pages["whole"])
    point(page, CHART, (SPIKE - 1) / (STEPS - 1))
    dot, line = (
        page.evaluate(f"(b => [b.top + b.height / 2, b.top])(document.querySelector('{name}').getBoundingClientRect())")
        for name in ("circle.dot", "path.line.thin")
    )
    assert abs(dot[0] - line[1]) < 2  # the spike is the highest point of the curve


def test_arrow_keys_go_from_step_to_step(browser, pages):
    page = browser.open(pages["whole"])
    page.evaluate("document.querySelector('figure.chart').focus()")
    for key, expected in (("ArrowLeft", STEPS), ("ArrowLeft", STEPS - 1), ("ArrowLeft", STEPS - 2), ("ArrowRight", STEPS - 1)):
        page.browser.call("Input.dispatchKeyEvent", page.session, type="keyDown", key=key)
        assert readouts(page)[0].startswith(f"step {expected}: ")


def test_a_touch_tells_too(browser, pages):
    page = browser.open(pages["whole"], 360)
    x, y = page.evaluate(f"(b => [b.left + b.width / 2, b.top + 60])(document.querySelector('{CHART}').getBoundingClientRect())")
    page.evaluate("scrollTo(0, 0)")
    y = page.evaluate(
        f"(e => (e.scrollIntoView({{block: 'center'}}), e.getBoundingClientRect().top + 60))(document.querySelector('{CHART}'))"
    )
    for kind, points in (("touchStart", [{"x": x, "y": y}]), ("touchEnd", [])):
        page.browser.call("Input.dispatchTouchEvent", page.session, type=kind, touchPoints=points)
    assert readouts(page)[0].startswith("step 15")


def test_marks_of_events_tell_what_happened(browser, pages):
    page = browser.open(pages["whole"])
    page.point_at("#events [data-tip] .hit")
    assert f"step {RESUMED}: restart: resumed from step-{RESUMED}" in readouts(page)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_axis_can_be_chosen(browser, pages, width):
    page = browser.open(pages["compared"], width)
    expected = {"steps": "step 300: ", "tokens": "1,228,800 tokens: ", "time": " minutes: "}
    for axis, words in expected.items():
        page.evaluate(f"document.getElementById('by-{axis}').click()")
        shown = page.evaluate("[...document.querySelectorAll('.axis')].filter(e => e.offsetHeight).map(e => e.className)")
        assert shown == [f"axis {axis}"]
        told = readouts(page)
        assert len(told) == 5 and all(words in line for line in told)
        assert "whole 4." in told[0] and "other 5." in told[0] and "other evaluation " in told[0]
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        point(page, CHART, 0.5)
        assert readouts(page) != told
        assert page.evaluate(OVERLAPS) == [] and page.evaluate(CUT_OFF) == []
    assert_silent_and_alone(page)


def test_without_scripts_the_page_still_has_its_curves(browser, pages, tmp_path):
    still = tmp_path / "still.html"
    still.write_text(pages["compared"].read_text().replace("script-src 'unsafe-inline'", "script-src 'none'"))
    page = browser.open(still)
    assert (
        page.evaluate("[...document.querySelectorAll('.axis.steps path.line')].filter(e => e.getBoundingClientRect().width > 100).length")
        == 12
    )


def test_a_running_page_says_how_old_it_is_and_loads_itself_again(browser, pages, tmp_path):
    running = write_run_page(write_log(tmp_path / "r", map(step_record, range(1, 4))))
    tasks = "window.tasks = []; window.setInterval = (task, wait) => tasks.push([task, wait]);"
    waits = "tasks.map(([task, wait]) => wait)"
    done, page = (browser.open(path, before=tasks) for path in (pages["whole"], running))
    assert done.evaluate(waits) == [5000] and page.evaluate(waits) == [5000, 30000]
    assert page.evaluate("document.querySelector('.age').textContent").endswith(" ago)")
    page.evaluate("(document.querySelector('details').open = true, tasks[1][0]())")
    assert page.evaluate("1") == 1 and page.requests == [page.url]  # somebody reads a table
    page.evaluate("(document.querySelector('details').open = false, tasks[1][0]())")
    deadline = time.monotonic() + 20
    while len(page.requests) < 2 and time.monotonic() < deadline:
        browser.call("Target.getTargets")  # what the page did meanwhile is noted
        time.sleep(0.02)
    assert page.requests == [page.url] * 2
