"""`docs/emitted-example.md` shows the program that the compiler really writes for Llama3-8B on eight GPUs.

After a change to the emitter or the planner, `UPDATE_EXAMPLE=1 python -m pytest tests/test_emitted_example.py` writes it into the page;
read it before you commit it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from seqloom.emit.pipeline import compile_program
from seqloom.emit.request import CompileRequest

PAGE = Path(__file__).parents[1] / "docs" / "emitted-example.md"
BLOCK = re.compile(r"(?<=<!-- program -->\n```python\n).*?(?=```\n<!-- end -->)", re.DOTALL)


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> str:
    asked = CompileRequest(
        "llama3_8b", 131072, 8, 8, name="llama3_8b", grad_accumulation_steps=4, output_folder=tmp_path_factory.mktemp("programs")
    )
    return (compile_program(asked).folder / "program.py").read_text()


def test_the_page_shows_the_program(program):
    text = PAGE.read_text()
    if os.environ.get("UPDATE_EXAMPLE"):
        text = BLOCK.sub(lambda _: program, text)
        PAGE.write_text(text)
    found = BLOCK.search(text)
    assert found is not None and found[0] == program


def test_the_program_is_short(program):
    assert program.count("\n") < 400
