"""Notice that a run stands still, and say which rank is where, before anybody's patience or money is gone.

Role in the pipeline: the loop calls `beat` as it moves on. A thread of each rank writes every few seconds to the job's store where its
rank is: the step, and the place in the code of the main thread. Where a rank has not moved for `timeout` seconds, the first to notice reads
what all ranks wrote, says it in one sentence, and the job ends. So a collective that one rank never joined is named with the rank that is
missing and what that one does instead; neither NCCL's nor gloo's own time limit, which come later, can say that.
"""

from __future__ import annotations

import json
import linecache
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import torch.distributed as dist

from seqloom.trainer.failure import EXIT_FAILURE, GRACE_SECONDS, claim_word

_KEY = "seqloom/at/"
_LOGGER = "c10d_logger.py"  # whose wrapper is around every collective


class Watch:
    """A context manager around the steps of a run. `timeout` in seconds; `end` is called with the sentence where the run stands still."""

    def __init__(self, timeout: float, end: Callable[[str], None] | None = None) -> None:
        self.timeout, self._end = timeout, end or _end_job
        self._step, self._moved, self._doing = 0, time.monotonic(), ""
        self._stop = threading.Event()
        self._main = threading.main_thread().ident
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def beat(self, step: int, doing: str) -> None:
        """The main thread begins something: of which step, and what (`reading data`, `the step`, `saving`)."""
        self._step, self._doing, self._moved = step, doing, time.monotonic()

    def _watch(self) -> None:
        while not self._stop.wait(min(5.0, self.timeout / 10)):
            still = time.monotonic() - self._moved
            place = where(sys._current_frames().get(self._main))
            try:
                _tell({"step": self._step, "doing": self._doing, "where": place, "time": time.time()})
                told = _all_told() if still > self.timeout else {}
            except RuntimeError:  # the store went with the process that held it: the job is ending already
                return
            if told:
                self._end(stand_still(self.timeout, told))
                return


def where(frame: FrameType | None) -> str:
    """Where a thread is, as `collective at file:line (source)`.

    The line is the innermost one of the emitted program or of seqloom above its runtime, which says more than a wrapper's; the collective
    is the call into torch.distributed that it waits in, if it does.
    """
    collective, innermost = "", frame
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if "torch" in path.parts and "distributed" in path.parts and path.name != _LOGGER:
            collective = frame.f_code.co_name.strip("_")
        elif _tells(path):
            break
        frame = frame.f_back
    frame = frame or innermost
    if frame is None:
        return "nowhere"
    path = frame.f_code.co_filename
    place = f"{Path(path).name}:{frame.f_lineno} ({linecache.getline(path, frame.f_lineno).strip()})"
    return f"{collective} at {place}" if collective else place


def _tells(path: Path) -> bool:
    """Whether a file's lines say what a run is doing: the user's and seqloom's do, those of libraries and of our wrappers do not."""
    if "seqloom" in path.parts:
        return "runtime" not in path.parts
    return "site-packages" not in path.parts and not str(path).startswith(sys.base_prefix)


def stand_still(timeout: float, told: dict[int, dict | None]) -> str:
    """The sentence about a run that stands still: what each rank said last, ranks at one place together."""
    places: dict[str, list[int]] = {}
    for rank, last in sorted(told.items()):
        places.setdefault(_place(last), []).append(rank)
    groups = sorted(places.items(), key=lambda item: -len(item[1]))
    listed = "; ".join(f"rank{'s' * (len(ranks) > 1)} {_ranks(ranks)} {place}" for place, ranks in groups)
    return (
        f"nothing has moved for {timeout:.0f} s: {listed}. The job ends; mend what holds the rank that is elsewhere and continue with "
        "--resume_path last, or allow more time with --timeout"
    )


def _place(last: dict | None) -> str:
    if last is None:
        return "never said where it was"
    silent = time.time() - last["time"]
    gone = f", unheard of for {silent:.0f} s" if silent > 30 else ""
    return f"in step {last['step']}, {last['doing']}: {last['where']}{gone}"


def _ranks(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks)) if len(ranks) <= 8 else f"{ranks[0]}, {ranks[1]}, ... {ranks[-1]} ({len(ranks)} ranks)"


def _tell(what: dict) -> None:
    dist.distributed_c10d._get_default_store().set(f"{_KEY}{dist.get_rank()}", json.dumps(what))


def _all_told() -> dict[int, dict | None]:
    store = dist.distributed_c10d._get_default_store()
    keys = {rank: f"{_KEY}{rank}" for rank in range(dist.get_world_size())}
    return {rank: json.loads(store.get(key)) if store.check([key]) else None for rank, key in keys.items()}


def _end_job(sentence: str) -> None:
    """The first rank to notice speaks; the others give it a moment."""
    if claim_word():
        print(f"error: {sentence}", file=sys.stderr, flush=True)
    else:
        time.sleep(GRACE_SECONDS)
    os._exit(EXIT_FAILURE)
