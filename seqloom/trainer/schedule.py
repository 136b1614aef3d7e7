"""Learning rates as a pure function of the step, so that a resumed run needs nothing but its step."""

from __future__ import annotations

import math
from typing import Literal

ScheduleName = Literal["constant", "linear", "cosine", "wsd"]
DECAY_SHARE = 0.2  # of all steps, where the length of the decay is not given


def learning_rate(
    step: int,
    *,
    peak: float,
    schedule: ScheduleName,
    warmup_steps: int,
    total_steps: int,
    decay_steps: int | None = None,
    min_ratio: float = 0.0,
) -> float:
    """The rate of step `step`, counted from 1.

    It rises linearly, reaching `peak` at step `warmup_steps`; then it stays (`constant`), or falls from `peak` at the next step towards
    `min_ratio * peak` behind the last one, along a line or half a cosine (Loshchilov and Hutter, 2017), or it stays and falls along a line
    in the last `decay_steps` (`wsd`: warm-up, stable, decay; Hu et al. 2024, MiniCPM, section 4).
    """
    if step <= warmup_steps:
        return peak * (step / warmup_steps)
    falling = total_steps - warmup_steps
    if schedule == "wsd":
        asked = math.ceil(DECAY_SHARE * total_steps) if decay_steps is None else decay_steps
        falling = max(1, min(asked, falling))
    progress = min(1.0, max(0.0, (step - 1 - (total_steps - falling)) / max(1, falling)))
    if schedule == "constant":
        return peak
    left = (1 + math.cos(math.pi * progress)) / 2 if schedule == "cosine" else 1 - progress
    return peak * (min_ratio + (1 - min_ratio) * left)
