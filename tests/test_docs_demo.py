"""What the README shows of the demo are the commands of examples/demo.sh, in order, with words left out where it has `...`."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from docs_pages import ROOT


@pytest.fixture
def printed(tmp_path) -> list[list[str]]:
    """The commands that the script prints when all programs in it do nothing."""
    (tmp_path / "examples").mkdir()
    shutil.copy(ROOT / "examples" / "demo.sh", tmp_path / "examples")
    for name in ("python", "torchrun"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", tmp_path / "examples" / "demo.sh"], env=environment, capture_output=True, text=True, check=True)
    return [line[2:].split() for line in done.stdout.splitlines() if line.startswith("$ ")]


def in_order(shown: list[str], whole: list[str]) -> bool:
    rest = iter(whole)
    return all(word in rest for word in shown)


def test_the_readme_shows_the_demos_commands(printed):
    section = re.search(r"## One minute: the demo\n.*?```text\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    shown = [" ".join(shlex.split(line[2:])).removesuffix(" ...").split() for line in section.splitlines() if line.startswith("$ ")]
    assert len(shown) == len(printed)
    for some, whole in zip(shown, printed, strict=True):
        assert in_order(some, whole), f"{' '.join(some)}\nis not a part of\n{' '.join(whole)}"


def test_the_script_that_the_readme_names_is_there():
    assert "bash examples/demo.sh" in Path(ROOT / "Makefile").read_text()
