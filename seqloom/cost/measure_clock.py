"""How a figure is timed: warmed up, on all ranks at once, the median of several runs.

Role in the pipeline: the measuring modules behind `python -m seqloom profile` time everything through a `Clock`. A training run has all
ranks of a machine at work together, sharing its memory bandwidth and its caches, so they measure together too, and a figure is the mean of
what the ranks found. What other programs take of the machine is not a property of it: the time that a process waits for a core which
another one has is left out.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

FEWEST, MOST = 3, 200
_SCHEDULE = Path("/proc/thread-self/schedstat")  # Linux: nanoseconds on a core, nanoseconds waiting for one, turns


@dataclass(frozen=True)
class Clock:
    """Times functions on a device. `budget_s` is how long the repeats of one function may take, beyond the fewest."""

    device: torch.device
    budget_s: float = 0.06

    def seconds(self, fn: Callable[[], object]) -> float:
        """Median seconds of `fn`, after two calls to warm up; the mean over the ranks, all of which must call this together."""
        fn()
        first = max(self._once(fn), 1e-7)
        repeats = round(self._over_ranks(min(max(self.budget_s / first, FEWEST), MOST)))
        return self._over_ranks(statistics.median(self._once(fn) for _ in range(repeats)))

    def _once(self, fn: Callable[[], object]) -> float:
        self._wait()
        waited, start = waited_seconds(), time.perf_counter()
        fn()
        self._wait()
        stop = time.perf_counter()
        return max(stop - start - (waited_seconds() - waited), 1e-9)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _over_ranks(self, value: float) -> float:
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(total)
        return float(total) / dist.get_world_size()


def waited_seconds() -> float:
    """Seconds that the calling thread has been ready to run while other work had the cores; 0 where the system does not tell."""
    return int(_SCHEDULE.read_text(encoding="ascii").split()[1]) / 1e9 if _SCHEDULE.exists() else 0.0
