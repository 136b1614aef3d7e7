"""Sentences that the documentation quotes are in the source, and those that a user meets first are quoted.

A sentence in the source is a string, its fields as `...`; a quoted one must be a part of some such string.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from docs_pages import ROOT

PAGES = ("troubleshooting.md", "operators.md")
ROW = re.compile(r"^\| `([^`]+)` \| ", re.MULTILINE)
MET_FIRST = (  # modules whose sentences a user meets first -> how many of each are quoted at least
    ("emit/pipeline.py", 1),
    ("emit/request.py", 1),
    ("plan/failure.py", 2),
    ("cost/hardware.py", 1),
    ("capture/architecture.py", 1),
    ("trainer/start.py", 4),
    ("trainer/config.py", 1),
    ("trainer/build.py", 1),
    ("data/metadata.py", 1),
    ("data/loader.py", 2),
    ("data/corpora.py", 2),
    ("checkpoint/read.py", 3),
    ("runtime/program.py", 1),
    ("ops/rules.py", 1),
)


def quoted(page: str) -> list[str]:
    """The sentences in the first column of a page's tables of sentences."""
    tables = re.findall(r"^\| sentence \|.*\n\|---\|---\|\n((?:\|.*\n)+)", (ROOT / "docs" / page).read_text(), re.MULTILINE)
    return [sentence for table in tables for sentence in ROW.findall(table)]


def sentences(path: Path) -> Iterator[str]:
    """Every string of a file, fields as `...`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


SOURCE = {path: [" ".join(text.split()) for text in sentences(path)] for path in sorted((ROOT / "seqloom").rglob("*.py"))}


def places(sentence: str) -> list[str]:
    """The files that say a sentence."""
    wanted = plain(sentence)
    return [path.relative_to(ROOT / "seqloom").as_posix() for path, texts in SOURCE.items() if any(wanted in plain(text) for text in texts)]


def plain(text: str) -> str:
    """Without the quotes around fields, and fields that touch as one."""
    return re.sub(r"(\.\.\.)+", "...", re.sub(r"[`']?\.\.\.[`']?", "...", text))


@pytest.mark.parametrize("page", PAGES)
def test_quoted_sentences_are_in_the_source(page: str):
    found = quoted(page)
    assert len(found) > 5
    assert not [sentence for sentence in found if not places(sentence)]


@pytest.mark.parametrize(("module", "least"), MET_FIRST)
def test_the_first_sentences_are_quoted(module: str, least: int):
    assert sum(module in places(sentence) for page in PAGES for sentence in quoted(page)) >= least


def test_every_row_of_the_page_is_a_quotation():
    text = (ROOT / "docs" / PAGES[0]).read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| sentence")]
    assert len(rows) == len(quoted(PAGES[0]))
