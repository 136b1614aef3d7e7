"""plan.html in a real browser: it renders at every width in light and dark, silently, alone, and without scrolling sideways."""

from __future__ import annotations

from pathlib import Path

import pytest
from browser import CUT_OFF, Browser, assert_silent_and_alone, find_browser, rgb
from plan_page_samples import compiled_program, full_plan, full_program, write

from seqloom.report.plan_page import write_plan_page
from seqloom.report.style import DARK, LIGHT

pytestmark = pytest.mark.skipif(find_browser() is None, reason="no Chromium or Chrome on the PATH: `apt-get install chromium` brings one")

WIDTHS = (320, 360, 768, 1280)
LONG = "an_operator_with_a_name_that_goes_on_and_on_and_does_not_end_before_the_page_does_" * 2


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(find_browser(), tmp_path_factory.mktemp("profile")) as browser:
        yield browser


def long_program(folder: Path) -> Path:
    """Names, reasons and axes that are much too long, and memory beyond the limit."""
    plan = full_plan()
    plan["memory_limit_gib"] = 48.0
    plan["hardware"] = LONG
    plan["mesh"] = {LONG: 8, "sp": 4, "tp": 2}
    for row in plan["blocks"]["LlamaDecoderLayer"]:
        row["operator" if "operator" in row else "reshard"] = LONG
    for other in plan["alternatives"]:
        other["reason"] = LONG
        other["mesh"] = {LONG: 2}
    plan["blocks"][LONG] = plan["blocks"].pop("LlamaDecoderLayer")
    plan["segments"][LONG] = {LONG: {"keep": 300, "recompute": 100}}
    plan["binding"]["sentence"] = LONG
    plan["advice"][0]["change"] = LONG
    write(compiled_program(folder), "plan.json", plan)
    return folder


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("programs")
    folders = {
        "full": full_program(root / "full"),
        "compiled": compiled_program(root / "compiled" / "programs" / "p"),
        "long": long_program(root / "long" / "programs" / "p"),
    }
    return {name: write_plan_page(folder) for name, folder in folders.items()}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["full", "compiled", "long"])
def test_renders_silently_and_fits(browser, pages, name, width, scheme):
    page = browser.open(pages[name], width, 800, scheme)
    assert_silent_and_alone(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == rgb((DARK if scheme == "dark" else LIGHT)["paper"])
    assert page.evaluate("getComputedStyle(document.querySelector('h1')).color") == rgb((DARK if scheme == "dark" else LIGHT)["ink"])
    if name != "long":  # there, words are cut off on purpose
        assert page.evaluate(CUT_OFF) == []


@pytest.mark.parametrize("width", WIDTHS)
def test_one_drawing_of_each_block_is_shown(browser, pages, width):
    page = browser.open(pages["full"], width)
    drawings = "[...document.querySelectorAll('#blocks svg')]"
    shown = page.evaluate(f"{drawings}.filter(e => e.getBoundingClientRect().height > 0).map(e => e.classList[0])")
    assert shown == ["wide" if width >= 860 else "narrow"] * 2


@pytest.mark.parametrize("width", WIDTHS)
def test_text_of_drawings_is_large_enough_to_read(browser, pages, width):
    page = browser.open(pages["full"], width)
    heights = "[...document.querySelectorAll('svg text')].map(e => e.getBoundingClientRect().height)"
    smallest = page.evaluate(f"Math.min(...{heights}.filter(height => height > 0))")
    assert smallest >= 10


@pytest.mark.parametrize("selector", ["#blocks g.row", "#memory rect.ghost", "#time g rect.forward"])
def test_what_is_pointed_at_is_told(browser, pages, selector):
    page = browser.open(pages["full"])
    page.point_at(selector)
    tip = page.evaluate(f"document.querySelector({selector!r}).dataset.tip")
    readouts = page.evaluate("[...document.querySelectorAll('.readout')].map(e => e.textContent)")
    assert tip in readouts and len(set(readouts)) == 2
    assert_silent_and_alone(page)


def test_the_table_of_operators_opens_and_scrolls_in_itself(browser, pages):
    page = browser.open(pages["full"], 360)
    page.evaluate("document.querySelector('details').open = true")
    assert page.evaluate("document.querySelector('details table').getBoundingClientRect().height") > 150
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.evaluate("(e => e.scrollWidth > e.clientWidth)(document.querySelector('.scroll'))")


def test_screenshots_are_of_a_page_and_differ_by_scheme(browser, pages):
    light, dark = (browser.open(pages["compiled"], 360, 800, scheme).screenshot() for scheme in ("light", "dark"))
    assert light.startswith(b"\x89PNG") and dark.startswith(b"\x89PNG") and light != dark
    assert min(len(light), len(dark)) > 20_000


def test_pages_that_misbehave_are_found_out(browser, tmp_path):
    """The checks above can fail: a page that warns, throws, fetches and is too wide."""
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<!doctype html><title>bad</title><body><div style='width:900px'>wide</div><img src='missing.png'>"
        "<svg width=50 height=20><text y=10>much too long for it</text></svg>"
        "<script>console.warn('careful'); setTimeout(() => {}, 0); throw new Error('oh')</script>"
    )
    page = browser.open(bad, 360)
    found = "\n".join(page.messages)
    assert "careful" in found and "oh" in found
    assert [Path(url).name for url in page.requests] == ["bad.html", "missing.png"]
    assert page.evaluate("document.documentElement.scrollWidth") > 360
    assert page.evaluate(CUT_OFF.replace("main ", "")) == ["much too long for it"]


def test_the_policy_forbids_the_network(browser, pages, tmp_path):
    """Were a text ever taken for markup, the browser would still fetch nothing."""
    text = pages["compiled"].read_text(encoding="utf-8").replace("<main>", "<main><img src='http://127.0.0.1:9/x.png'>")
    changed = tmp_path / "changed.html"
    changed.write_text(text, encoding="utf-8")
    page = browser.open(changed)
    assert any("Content Security Policy" in message for message in page.messages)
    assert page.evaluate("document.querySelector('img').naturalWidth") == 0


def test_the_page_reads_without_scripts(browser, pages, tmp_path):
    text = pages["full"].read_text(encoding="utf-8")
    silent = tmp_path / "silent.html"
    silent.write_text(text[: text.index("<script>")] + "</body></html>", encoding="utf-8")
    page = browser.open(silent, 360)
    assert_silent_and_alone(page)
    assert page.evaluate("document.querySelectorAll('section').length") == 8
