"""Steps that stand out: a loss or a gradient norm far above those just before, a step that took far longer.

Role in the pipeline: the loop shows every finite step to `Unusual` and puts what it says behind the step's line, into the log and on the
report. Medians are compared, not means, so that one spike does not hide the next (Leys et al. 2013, on the median absolute deviation).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Literal

import numpy as np

WINDOW = 64  # steps that a step is compared with
LEAST = 16  # before there are so many, nothing stands out
DEVIATIONS = 6.0  # median absolute deviations, scaled to standard deviations of a normal distribution
TO_STANDARD = 1.4826
RISE = {"loss": 1.05, "gradient norm": 3.0, "step time": 2.0}  # and at least so many times the median


@dataclass(frozen=True)
class Note:
    """What stands out in a step: a value that spiked, or what held up the ranks."""

    kind: Literal["spike", "straggler"]
    text: str


class Unusual:
    """`notes = unusual(loss, grad_norm, seconds)` of each step, one for each thing that stands out."""

    def __init__(self) -> None:
        self._before = {name: deque[float](maxlen=WINDOW) for name in RISE}

    def __call__(self, loss: float, grad_norm: float, seconds: float) -> list[Note]:
        """What stands out in a step with this loss, gradient norm and time in seconds."""
        values = {"loss": loss, "gradient norm": grad_norm, "step time": seconds}
        notes = [note for name, value in values.items() if (note := self._note(name, value))]
        for name, value in values.items():
            self._before[name].append(value)
        return notes

    def slow(self, seconds: float) -> bool:
        """Whether a step of so many seconds would stand out."""
        return self._note("step time", seconds) is not None

    def _note(self, name: str, value: float) -> Note | None:
        if len(self._before[name]) < LEAST:
            return None
        before = np.array(self._before[name])
        median = float(np.median(before))
        spread = TO_STANDARD * float(np.median(np.abs(before - median)))
        if value <= max(median * RISE[name], median + DEVIATIONS * spread):
            return None
        if name == "step time":
            return Note("straggler", f"the step took {value:.3g} s against {median:.3g} s before")
        return Note("spike", f"{name} {value:.4g} against {median:.4g} before")
