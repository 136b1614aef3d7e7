"""The frame of every page of the report: one file, nothing to fetch, light and dark, and a policy that holds it to that."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from seqloom.errors import UserError
from seqloom.report.markup import Child, Markup, tag
from seqloom.report.style import stylesheet

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
_SCRIPT = """
addEventListener("pointerover", event => {
  const piece = event.target.closest("[data-tip]"), figure = piece && piece.closest("figure");
  const readout = figure && figure.querySelector(".readout");
  if (readout) readout.textContent = piece.dataset.tip;
});
"""
"""What is pointed at or touched is told below its figure; the same figures stand in the tables."""


def html_page(title: str, *body: Child, style: str = "", script: str = "") -> str:
    """A whole page; `style` and `script` are added to those that every page has."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name_="color-scheme", content="light dark"),
        tag("link", rel="icon", href="data:,"),
        tag("title", title),
        tag("style", Markup(stylesheet() + style)),
    )
    return f"<!doctype html>\n{tag('html', head, tag('body', *body, tag('script', Markup(_SCRIPT + script))), lang='en')}\n"


def write_whole(path: Path, page: str) -> Path:
    """Put the page at `path` in one move, so that who opens it meanwhile sees the old one or the new one.

    Raises `UserError` where it cannot be written.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        beside.write_bytes(page.encode("utf-8", "replace"))
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written ({error.strerror}): check that its folder exists and has room") from error
    return path
