"""Learning rates as a pure function of the step, so that a resumed run needs nothing but its step."""

from __future__ import annotations

import math
from typing import Literal

ScheduleName = Literal["constant", "linear", "cosine"]


def learning_rate(step: int, *, peak: float, schedule: ScheduleName, warmup_steps: int, total_steps: int) -> float:
    """The rate of step `step`, counted from 1.

    It rises linearly, reaching `peak` at step `warmup_steps`; then it stays (`constant`), or falls from `peak` at the next step towards
    zero behind the last one, along a line or half a cosine (Loshchilov and Hutter, 2017).
    """
    if step <= warmup_steps:
        return peak * (step / warmup_steps)
    progress = min(1.0, (step - 1 - warmup_steps) / max(1, total_steps - warmup_steps))
    if schedule == "linear":
        return peak * (1 - progress)
    if schedule == "cosine":
        return peak * ((1 + math.cos(math.pi * progress)) / 2)
    return peak
