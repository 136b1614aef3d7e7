"""Makes the pictures of docs/plan-page.md from a compiled program: `python tests/plan_page_images.py .seqloom/NAME`.

Three pieces of its plan.html: the top with the block, memory and time in the dark, and a phone's view. Needs Chromium.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from browser import Browser, Page, find_browser

from seqloom.errors import UserError
from seqloom.report.plan_page import write_plan_page

IMAGES = Path(__file__).parents[1] / "docs" / "images"
WIDE, PHONE, PHONE_HEIGHT = 1040, 360, 1700


def main(folder: Path) -> None:
    """Write the pictures. Raises `UserError` where there is no browser or no plan."""
    program = find_browser()
    if program is None:
        raise UserError("the pictures need Chromium: `apt-get install chromium` brings it")
    path = write_plan_page(folder)
    with tempfile.TemporaryDirectory() as profile, Browser(program, Path(profile)) as browser:
        light = browser.open(path, WIDE, 900, "light")
        save("plan-block", light, 0, bottom(light, "#blocks figure"))
        dark = browser.open(path, WIDE, 900, "dark")
        save("plan-memory-dark", dark, top(dark, "#memory"), bottom(dark, "#communication"))
        save("plan-phone", browser.open(path, PHONE, 800, "light"), 0, PHONE_HEIGHT)


def top(page: Page, selector: str) -> float:
    return page.evaluate(f"document.querySelector({selector!r}).getBoundingClientRect().top + scrollY")


def bottom(page: Page, selector: str) -> float:
    return page.evaluate(f"document.querySelector({selector!r}).getBoundingClientRect().bottom + scrollY")


def save(name: str, page: Page, start: float, end: float) -> None:
    width = page.evaluate("innerWidth")
    path = IMAGES / f"{name}.png"
    path.write_bytes(page.screenshot({"x": 0, "y": start, "width": width, "height": end - start + 16}))
    print(f"{path.name}: {path.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
