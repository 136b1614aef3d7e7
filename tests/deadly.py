"""Kill or fail a process at its n-th step towards the disk, for tests of what is left behind.

Steps are what changes a disk: opening a file to write, each write of a tensor file and of a small file (half of its bytes done), flushes,
and names made, changed and removed. Audit hooks see most of them; the others are wrapped.
"""

import os
import sys
from pathlib import Path

from seqloom.checkpoint import folders
from seqloom.checkpoint.tensorfile import TensorFileWriter

_NAMES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir"}
_WRITES = os.O_WRONLY | os.O_RDWR


class Steps:
    """Counts the steps of this process under a folder and calls `at` with the number of each before it is taken."""

    def __init__(self, root, at):
        self._root, self._at = f"{root}/", at
        self.count = 0

    def watch(self):
        """From now on, until the process ends."""
        sys.addaudithook(self._event)
        fsync, durably, write = os.fsync, folders.write_durably, TensorFileWriter._write

        def flush(descriptor):
            self.step()
            return fsync(descriptor)

        def half_then_all(path, data):
            self.step(lambda: Path(path).write_bytes(data[: len(data) // 2]))
            return durably(path, data)

        def half_then_rest(writer, view):
            self.step(lambda: writer._file.write(view[: len(view) // 2]))
            return write(writer, view)

        os.fsync, folders.write_durably, TensorFileWriter._write = flush, half_then_all, half_then_rest
        return self

    def step(self, partly=None):
        """One step; `partly` does a part of it for who is killed in the middle."""
        self.count += 1
        self._at(self.count, partly)

    def _event(self, event, arguments):
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
