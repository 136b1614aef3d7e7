"""Keeps `report.html` of a run up to date while it trains, without slowing it.

Role in the pipeline: rank 0 calls `touch` after every step. Now and then a thread writes the page from the files of the log folder; then it
waits three hundred times as long as writing took, so that the page never costs more than a three-hundredth of the time.
"""

from __future__ import annotations

import contextlib
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from seqloom.errors import UserError
from seqloom.report.run_log import LogReader
from seqloom.report.run_page import write_run_page

EVERY = 20.0  # seconds between two writings at the least
SHARE = 300.0  # and so many times what a writing took


class LivePage:
    """The page of the run whose log lies in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._reader = folder, LogReader(folder)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="report")
        self._due = time.monotonic()
        self._writing: Future[float] | None = None

    def touch(self) -> None:
        """There is news: write the page if it is time."""
        if self._writing is not None and self._writing.done():
            self._due = time.monotonic() + max(EVERY, SHARE * self._writing.result())
            self._writing = None
        if self._writing is None and time.monotonic() >= self._due:
            self._writing = self._pool.submit(self._write)

    def close(self) -> Path:
        """Write the page a last time; returns its path."""
        self._pool.shutdown(wait=True)
        return write_run_page(self._folder, self._reader)

    def _write(self) -> float:
        began = time.monotonic()
        with contextlib.suppress(OSError, UserError):  # a full disk ends the run where it loses something, not for a page
            write_run_page(self._folder, self._reader)
        return time.monotonic() - began
