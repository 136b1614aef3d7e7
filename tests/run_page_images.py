"""Makes the pictures of docs/report.md: `python tests/run_page_images.py RUN OTHER_RUN`, two folders of runs. Needs Chromium."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from browser import Browser, find_browser
from plan_page_images import WIDE, bottom, save

from seqloom.errors import UserError
from seqloom.report.compare_page import write_compare_page
from seqloom.report.run_page import write_run_page

POINT = """(svg => {
    const box = svg.getBoundingClientRect();
    svg.dispatchEvent(new PointerEvent('pointermove', {clientX: box.left + SHARE * box.width, clientY: box.top, pointerType: 'touch'}));
})(document.querySelector('figure.chart svg[role=img]'))"""
"""Points at a place of the first chart, from 0 at its left end to 1 at the right; as a touch does, so that it stays."""


def main(run: Path, other: Path) -> None:
    """Write the pictures. Raises `UserError` where there is no browser, or a folder holds no run."""
    program = find_browser()
    if program is None:
        raise UserError("the pictures need Chromium: `apt-get install chromium` brings it")
    with tempfile.TemporaryDirectory() as folder, Browser(program, Path(folder) / "profile") as browser:
        page = browser.open(write_run_page(run), WIDE, 900)
        page.evaluate("document.querySelector('.age').remove()")
        page.evaluate(POINT.replace("SHARE", "0.075"))
        save("report", page, 0, bottom(page, "#predicted"))
        page = browser.open(write_compare_page([run, other], Path(folder) / "compare.html"), WIDE, 900)
        page.evaluate(POINT.replace("SHARE", "0.5"))
        save("compare", page, 0, bottom(page, "#settings"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
