"""The folder in which the commands of the documentation run, in order, as somebody would who reads the pages one after the other.

A command that stands on several pages, word for word, runs once. Blocks that name a file are written to it when their turn comes. A page
finds what the tutorial and its own earlier blocks left behind, whichever test is asked for.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from pathlib import Path

from docs_pages import ROOT, Block, blocks, pages, statements
from docs_warm_python import WarmPython

COPIED = ("train.py", "bookcorpus.py", "create_mini_model.py", "ckpt_merger.py", "chunk_linear_cross_entropy.py", "README.md", "Makefile")
LINKED = ("seqloom", "custom_ops", "configs", "examples", "benchmarks", "tests", "docs")
STANDS_ALONE = "tutorial.md"  # whose data set and model the other pages use
SECONDS = 600
ASSIGNS = re.compile(r"\w+=\S*|export \w+=|cd ")
NOT_RUN = {  # beginnings of commands -> why no test runs them
    "make env": "makes the environment that the tests run in",
    "source .venv/bin/activate": "is active already",
    "make demo": "takes minutes; its script is examples/demo.sh, whose output the README shows",
    "make test": "is what runs this test",
    "less ": "waits for a key",
    "tensorboard ": "serves until it is stopped",
}


def not_run(statement: str) -> bool:
    """Whether a command is of those that no test runs."""
    return statement.startswith(tuple(NOT_RUN))


class Workshop:
    """The folder, the shell, and the output of every block that has run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "work"
        self.folder.mkdir(parents=True)
        for name in COPIED:  # so that Python looks for modules here, not where a link leads
            shutil.copy(ROOT / name, self.folder)
        for name in LINKED:
            (self.folder / name).symlink_to(ROOT / name)
        self._python = WarmPython(folder / "warm")
        self._outputs: dict[str, str] = {}
        self._done: dict[Block, str] = {}
        self._failed: dict[Block, str] = {}

    def close(self) -> None:
        """End the server of Python processes."""
        self._python.close()

    def reach(self, block: Block) -> str:
        """Do a block and all that it builds on; the output of its commands. Raises `AssertionError` where a command fails."""
        page = next(page for page in pages() if page.name == block.page)
        before = [] if page.name == STANDS_ALONE else blocks(ROOT / "docs" / STANDS_ALONE)
        for each in (*before, *blocks(page)):
            assert each not in self._failed, f"built on what failed: {self._failed[each]}"
            if each not in self._done:
                self._done[each] = self._do(each)
            if each == block:
                break
        return self._done[block]

    def _do(self, block: Block) -> str:
        if block.file is not None:
            (self.folder / block.file).write_text(block.text)
            return ""
        if block.words != ("bash",):
            return ""
        commands = [statement for statement in statements(block.text) if not not_run(statement)]
        if any(ASSIGNS.match(statement) for statement in commands):  # what follows needs the same shell
            commands = ["\n".join(commands)]
        return "".join(self._run(statement, block) for statement in commands)

    def _run(self, statement: str, block: Block) -> str:
        command = re.sub(r"\s+#.*", "", statement)
        if command not in self._outputs:
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
            environment["PET_MASTER_PORT"] = str(_free_port())  # torchrun's, which would be the same for every job of this machine
            environment["PATH"] = f"{self._python.bin}:{environment['PATH']}"
            shell = ["bash", "-e", "-o", "pipefail", "-c", statement]
            streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
            done = subprocess.run(shell, cwd=self.folder, env=environment, text=True, timeout=SECONDS, errors="replace", **streams)
            if done.returncode:
                self._failed[block] = f"{block.name}: exit code {done.returncode} of\n{statement}\n{done.stdout[-3000:]}"
                raise AssertionError(self._failed[block])
            self._outputs[command] = done.stdout
        return self._outputs[command]


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def first_missing(shown: str, printed: str) -> str | None:
    """The first line of `shown` that `printed` lacks, in order; None where all are there. `...` stands for anything, spaces for spaces."""
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    position = 0
    for line in filter(None, (" ".join(line.split()) for line in shown.splitlines())):
        pattern = re.compile(".*".join(map(re.escape, line.split("..."))))
        if line == "...":
            continue
        found = next((i for i in range(position, len(lines)) if pattern.fullmatch(lines[i])), None)
        if found is None:
            return line
        position = found + 1
    return None
