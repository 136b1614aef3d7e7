"""docs/coming-from.md names flags that exist here, and every flag of nnScaler that is refused."""

from __future__ import annotations

import dataclasses
import re

from docs_flags import TABLES
from docs_pages import ROOT

from seqloom.trainer.other_names import INSTEAD

TEXT = (ROOT / "docs" / "coming-from.md").read_text()
OURS = {field.name for cls in TABLES.values() for field in dataclasses.fields(cls)} | {f"no_{name}" for name in ("async_checkpoint",)}


def test_flags_that_are_ours_exist():
    ours = [flag for line in TEXT.splitlines() if line.startswith("| ") for flag in re.findall(r"--(\w+)", line.split(" | ")[1])]
    assert len(ours) > 40
    assert not [flag for flag in ours if flag not in OURS]


def test_every_flag_that_is_refused_is_there():
    assert not [flag for flag in INSTEAD if f"`--{flag}`" not in TEXT]


def test_functions_that_the_planner_page_names_are_there():
    page = (ROOT / "docs" / "planner.md").read_text()
    source = "\n".join(path.read_text() for path in (ROOT / "seqloom" / "plan").glob("*.py"))
    named = re.findall(r"`(_?[a-z]+(?:_[a-z]+)+)`", page.partition("## One example")[0])
    assert len(named) >= 8
    assert not [name for name in named if f"def {name}(" not in source]
