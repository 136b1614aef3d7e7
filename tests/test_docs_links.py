"""Links of the documentation lead somewhere: to a page, to a heading of it, to a file or folder of the repository."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from docs_pages import ROOT, anchors, links, pages, prose

FILE = re.compile(r"`((?:seqloom|tests|examples|benchmarks|configs|docs|custom_ops)/[\w./-]+)(?:::?\w+)?`")


@pytest.mark.parametrize("page", [pytest.param(page, id=page.name) for page in pages()])
def test_links_lead_somewhere(page: Path):
    lost = []
    for link in links(page):
        target, _, anchor = link.partition("#")
        if target.startswith(("https://", "http://")):
            continue
        path = (page.parent / target).resolve() if target else page
        if not path.exists() or ROOT not in (path, *path.parents) or (anchor and anchor not in anchors(path)):
            lost.append(link)
    assert not lost


@pytest.mark.parametrize("page", [pytest.param(page, id=page.name) for page in pages()])
def test_files_that_are_named_are_there(page: Path):
    assert not [name for name in FILE.findall(prose(page)) if not (ROOT / name).exists()]


def test_every_page_is_reached_from_the_readme():
    named = {link.partition("#")[0] for link in links(ROOT / "README.md")}
    assert not {f"docs/{page.name}" for page in pages() if page.name != "README.md"} - named
