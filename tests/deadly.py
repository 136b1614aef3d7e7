"""Kill or fail a process at its n-th step towards the disk, for tests of what is left behind.

Steps are what changes a disk: opening a file to write, each write of a tensor file and of a small file (half of its bytes done), flushes,
and names made, changed and removed. Audit hooks see most of them; the others are wrapped.
"""

import contextlib
import os
import sys
from pathlib import Path

import pytest

from seqloom.checkpoint import folders
from seqloom.checkpoint.tensorfile import TensorFileWriter

_NAMES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir"}
_WRITES = os.O_WRONLY | os.O_RDWR
_ALL = []  # audit hooks stay for ever: one for each


class Steps:
    """Counts the steps of this process under a folder and calls `at` with the number of each before it is taken.

    `at(count, partly)`: `partly`, where there is one, does a part of the step, for who ends in the middle of it. With `small` a small file
    half written is a step too, which nobody can fail at, only die.
    """

    def __init__(self, root, at, small=True):
        self._root, self._at, self._small = f"{root}/", at, small
        self.count, self.watching = 0, False

    @contextlib.contextmanager
    def watched(self):
        """Count within this."""
        if self not in _ALL:
            _ALL.append(self)
            sys.addaudithook(self._event)
        with pytest.MonkeyPatch.context() as patch:
            for owner, name, part in (
                (os, "fsync", None),
                (folders, "write_durably", lambda path, data: Path(path).write_bytes(data[: len(data) // 2])),
                (TensorFileWriter, "_write", lambda writer, view: writer._file.write(view[: len(view) // 2])),
            ):
                if self._small or name != "write_durably":
                    patch.setattr(owner, name, self._stepping(getattr(owner, name), part))
            self.watching = True
            try:
                yield self
            finally:
                self.watching = False

    def watch(self):
        """Count from now on, until the process ends."""
        self._forever = self.watched()
        self._forever.__enter__()

    def _stepping(self, function, part):
        def call(*arguments):
            self.step(None if part is None else lambda: part(*arguments))
            return function(*arguments)

        return call

    def step(self, partly=None):
        """One step."""
        self.count += 1
        self._at(self.count, partly)

    def _event(self, event, arguments):
        if not self.watching:
            return
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, str | os.PathLike) and str(path).startswith(self._root) and flags & _WRITES:
                self.step()
        elif event in _NAMES and (str(arguments[0]).startswith(self._root) or arguments[-1] != -1):  # inside an open folder
            self.step()


def kill_at(number, kill):
    """What to call at each step: `kill()` at the `number`-th, after a part of it is done."""

    def at(count, partly):
        if count == number:
            if partly is not None:
                partly()
            kill()

    return at
