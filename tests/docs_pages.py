"""The pages of the documentation as data: their fenced blocks, the commands in them, their links and headings.

The word after the fence says what becomes of a block (`tests/test_docs_commands.py`):

  bash          run as it is, with two CPU cores and no network, in a folder that the pages share
  bash gpu      needs GPUs: every command is parsed by its program's own parser
  bash hub      needs a network: likewise
  bash long     takes minutes: likewise
  text          shown, not run; `text output` must be what the command block in front of it prints, where `...` stands for anything
  text sheet F  a calculation, checked line by line, beside the JSON file F (`docs_sheet.py`)
  python        run, the blocks of a page one after the other in one namespace; `python fragment` need only be Python
  yaml, toml, jinja, json   read by their parser
  LANGUAGE NAME.EXT         written to that file in the shared folder first, so that commands can use it; not run by itself
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```[ ]*$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"")


@dataclass(frozen=True)
class Block:
    """A fenced block: which page, the how manyth of it, the words after the fence, the text, and its line in the page."""

    page: str
    index: int
    words: tuple[str, ...]
    text: str
    line: int

    @property
    def language(self) -> str:
        """The first word, "" where there is none."""
        return self.words[0] if self.words else ""

    @property
    def file(self) -> str | None:
        """The file that the block is the text of."""
        return next((word for word in self.words[1:] if "." in word and self.language != "text"), None)

    @property
    def name(self) -> str:
        """For names of tests and for messages."""
        return f"{self.page}:{self.line}"


def pages() -> list[Path]:
    """The README, then the tutorial, whose data set and model others use, then all other pages."""
    docs = sorted((ROOT / "docs").glob("*.md"), key=lambda path: (path.name != "tutorial.md", path.name))
    return [docs[0], ROOT / "README.md", *docs[1:]]


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = page.read_text()
    found = FENCE.finditer(text)
    return [Block(page.name, i, tuple(m[1].split()), m[2], text.count("\n", 0, m.start()) + 1) for i, m in enumerate(found)]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", page.read_text())


def links(page: Path) -> list[str]:
    """Where a page points to."""
    return [first or second for first, second in LINK.findall(prose(page))]


def anchors(page: Path) -> set[str]:
    """The names of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def statements(script: str) -> list[str]:
    """The commands of a script, one by one: the fewest lines that bash takes for whole, with the text of a here-document."""
    found, lines, end = [], [], None
    for line in script.splitlines():
        if not lines and (not line.strip() or line.lstrip().startswith("#")):
            continue
        lines.append(line)
        if end is not None:
            end = None if line == end else end
        elif here := re.search(r"<<-?\s*['\"]?(\w+)", line):
            end = here[1]
        text = "\n".join(lines)
        if end is None and not line.endswith("\\") and _is_whole(text):
            found.append(text)
            lines = []
    if lines:
        raise ValueError(f"bash does not understand {chr(10).join(lines)!r}")
    return found


def _is_whole(text: str) -> bool:
    return subprocess.run(["bash", "-n", "-c", text], capture_output=True).returncode == 0
