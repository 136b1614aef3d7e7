"""Every fenced block of the README and of docs/ is what it says: commands run, Python runs, files are read by their parsers.

Which words after a fence mean what stands in `docs_pages.py`; where commands run, in `docs_workshop.py`.
"""

from __future__ import annotations

import ast
import json
import os
import tomllib
from pathlib import Path

import pytest
import yaml
from docs_pages import Block, blocks, pages, statements
from docs_parsers import check
from docs_sheet import check_sheet
from docs_workshop import NOT_RUN, Workshop, first_missing, not_run

ALL = [block for page in pages() for block in blocks(page)]
KINDS = {
    *((language,) for language in ("bash", "text", "python", "yaml", "toml", "json", "jinja")),
    ("bash", "gpu"),
    ("bash", "hub"),
    ("bash", "long"),
    ("text", "output"),
    ("text", "sheet"),
    ("python", "fragment"),
}
OTHER_TESTS = {  # Python that another test runs, with what it needs
    "checkpoints.md": "test_checkpoint_format.py::test_the_documentation_suffices_to_read_one",
}


def chosen(*words: str) -> list:
    return [pytest.param(block, id=block.name) for block in ALL if block.words == words]


def named(language: str) -> list:
    return [pytest.param(block, id=block.name) for block in ALL if block.language == language]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    made = Workshop(tmp_path_factory.mktemp("docs"))
    yield made
    made.close()


def test_every_block_is_of_a_known_kind():
    words = {block.name: block.words[:2] if block.file is None else block.words[:1] for block in ALL}
    assert not {name: kind for name, kind in words.items() if kind not in KINDS}


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("block", chosen("bash"))
def test_commands_run(workshop: Workshop, block: Block):
    assert workshop.reach(block) is not None


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("block", chosen("text", "output"))
def test_output_is_what_the_commands_print(workshop: Workshop, block: Block):
    before = [each for each in ALL if each.page == block.page and each.index < block.index and each.language in ("bash", "python")][-1]
    printed = workshop.reach(before)
    missing = first_missing(block.text, printed)
    assert missing is None, f"{block.name}: not printed: {missing}\n{printed[-3000:]}"


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("page", sorted({block.page for block in ALL if block.words[:2] == ("text", "sheet")}))
def test_sheets_are_right(page: str, workshop: Workshop):
    names: dict[str, float] = {}
    for block in ALL:
        if block.page == page and block.words[:2] == ("text", "sheet"):
            workshop.reach(block)
            check_sheet(block.text, workshop.folder / block.words[2], names)


@pytest.mark.parametrize("block", [*chosen("bash", "gpu"), *chosen("bash", "hub"), *chosen("bash", "long")])
def test_commands_that_are_not_run_are_parsed(block: Block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for each in ALL:
        if each.page == block.page and each.file is not None:
            Path(each.file).write_text(each.text)
    for statement in statements(block.text):
        if not not_run(statement):
            check(statement)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("page", [pytest.param(page, id=page.name) for page in pages() if page.name not in OTHER_TESTS])
def test_python_runs(page: Path, workshop: Workshop, monkeypatch):
    """The blocks of a page, one after the other, in one namespace."""
    mine = [block for block in blocks(page) if block.words == ("python",)]
    if not mine:
        return
    workshop.reach(mine[-1])
    monkeypatch.chdir(workshop.folder)
    monkeypatch.syspath_prepend(str(workshop.folder))
    names = {"__name__": "page"}
    for block in mine:
        exec(compile("\n" * block.line + block.text, f"{os.fspath(page)}", "exec"), names)
    assert len(names) > 1, "something was defined"


@pytest.mark.parametrize("block", named("python"))
def test_python_is_python(block: Block):
    assert ast.parse(block.text).body


@pytest.mark.parametrize("block", [*named("yaml"), *named("toml"), *named("json")])
def test_files_are_read(block: Block):
    read = {"yaml": yaml.safe_load, "toml": tomllib.loads, "json": json.loads}[block.language]
    assert read(block.text)


@pytest.mark.parametrize("block", [pytest.param(block, id=block.name) for block in ALL if block.words == ("text",)])
def test_commands_shown_with_their_output_are_parsed(block: Block):
    for statement in statements("\n".join(line[2:] for line in block.text.splitlines() if line.startswith("$ "))):
        if not not_run(statement):
            check(statement.removesuffix("..."))


def test_every_exemption_is_used():
    lines = [statement for block in ALL if block.language == "bash" for statement in statements(block.text)]
    assert not [start for start in NOT_RUN if not any(line.startswith(start) for line in lines)]


def test_lines_are_compared_in_order_and_dots_stand_for_anything():
    printed = "one  1\ntwo 2\nthree 3\n"
    assert first_missing("one 1\n...\nthree ...", printed) is None
    assert first_missing("three 3\none 1", printed) == "one 1"
    assert first_missing("two", printed) == "two"
