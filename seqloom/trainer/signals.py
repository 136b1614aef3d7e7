"""SIGTERM and SIGUSR1 ask a run to save and leave; a second one ends it at once.

Role in the pipeline: `StopSignals` surrounds a run. Ranks that talk to each other must not be torn out of it, so a signal is only noted;
the loop looks at `asked` after each step, agrees with the other ranks, saves, and raises `Stopped`. What one rank does alone and for long,
compiling, is `interruptible`. Schedulers send SIGTERM before they take a machine away, SLURM also SIGUSR1 where `--signal` asks for it.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType, TracebackType

from seqloom.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_SIGNALLED = 128  # a shell's exit code of a process that signal n ended is 128 + n


class StopSignals:
    """A context manager that takes the two signals; `asked` is the number of the one that came, 0 before."""

    def __init__(self) -> None:
        self.asked = 0
        self._at_once = False

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._take) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Within this a signal, also one that came before, raises `Stopped` where the main thread is."""
        self._at_once = True
        try:
            if self.asked:
                raise self.stopped()
            yield
        finally:
            self._at_once = False

    def stopped(self) -> Stopped:
        """What ends a run that has not made a step."""
        return Stopped(f"stopped by {name(self.asked)} before the first step: nothing was lost")

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            os._exit(_SIGNALLED + number)
        self.asked = number
        if self._at_once:
            raise self.stopped()


def name(number: int) -> str:
    """`SIGTERM` for 15."""
    return signal.Signals(number).name
