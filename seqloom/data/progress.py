"""How far long work has come: a bar on a terminal, a line now and then elsewhere, so that a log stays readable."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def progress(what: str, total: int, done: int = 0, out: TextIO | None = None) -> Iterator[Callable[[int], None]]:
    """Inside, call what is given with the number of documents just finished; `done` of the `total` were finished before."""
    out = out or sys.stderr
    if out.isatty():
        from tqdm import tqdm

        with tqdm(desc=what, total=total, initial=done, unit=" documents", unit_scale=True, file=out) as bar:
            yield bar.update
    else:
        yield _lines(what, total, done, out)


def _lines(what: str, total: int, done: int, out: TextIO) -> Callable[[int], None]:
    begin = said = time.monotonic()
    finished = done

    def advance(count: int) -> None:
        nonlocal finished, said
        finished += count
        now = time.monotonic()
        if now - said >= SECONDS_BETWEEN_LINES and finished < total:
            said = now
            left = (now - begin) / (finished - done) * (total - finished)
            print(f"{what}: {finished:,} of {total:,} documents, about {left:,.0f} s left", file=out, flush=True)

    return advance
