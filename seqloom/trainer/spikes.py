"""Steps that stand out: a loss or a gradient norm far above those just before, a step that took far longer.

Role in the pipeline: the loop shows every finite step to `Unusual` and puts what it says behind the step's line, into the log and on the
report. Medians are compared, not means, so that one spike does not hide the next (Leys et al. 2013, on the median absolute deviation).
"""

from __future__ import annotations

import statistics
from collections import deque

WINDOW = 64  # steps that a step is compared with
LEAST = 16  # before there are so many, nothing stands out
DEVIATIONS = 6.0  # median absolute deviations, scaled to standard deviations of a normal distribution
TO_STANDARD = 1.4826
RISE = {"loss": 1.05, "gradient norm": 3.0, "step time": 2.0}  # and at least so many times the median


class Unusual:
    """`notes = unusual(loss, grad_norm, seconds)` of each step, one sentence part for what stands out."""

    def __init__(self) -> None:
        self._before = {name: deque[float](maxlen=WINDOW) for name in RISE}

    def __call__(self, loss: float, grad_norm: float, seconds: float) -> list[str]:
        """What stands out in a step with this loss, gradient norm and time in seconds."""
        values = {"loss": loss, "gradient norm": grad_norm, "step time": seconds}
        notes = [note for name, value in values.items() if (note := self._note(name, value))]
        for name, value in values.items():
            self._before[name].append(value)
        return notes

    def slow(self, seconds: float) -> bool:
        """Whether a step of so many seconds would stand out."""
        return self._note("step time", seconds) is not None

    def _note(self, name: str, value: float) -> str | None:
        before = self._before[name]
        if len(before) < LEAST:
            return None
        median = statistics.median(before)
        spread = TO_STANDARD * statistics.median(abs(other - median) for other in before)
        if value <= max(median * RISE[name], median + DEVIATIONS * spread):
            return None
        if name == "step time":
            return f"slow step: {value:.3g} s against {median:.3g} s before"
        return f"{name} {value:.4g} against {median:.4g} before"
