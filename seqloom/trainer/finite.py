"""A step whose loss or gradient is not finite: who began it, and what the run does.

Role in the pipeline: the loop asks after each step, on all ranks, for all see the same loss and norm. The step itself has left the weights
and the optimizer as they were (`seqloom.runtime.step`), so the run may go on with the next rows or stop; it never saves such a step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from seqloom.checkpoint import group
from seqloom.runtime.step import StepResult


@dataclass(frozen=True)
class Suspect:
    """The first tensor of a rank that is not finite."""

    tensor: str
    rank: int

    def __str__(self) -> str:
        return f"{self.tensor} on rank {self.rank}"


def first_suspect(result: StepResult, parameters: Sequence[str]) -> Suspect | None:
    """The first tensor that is not finite, in the order in which a step makes them, and the first rank that has it. Collective.

    `parameters` are the model's names in its order. Backward goes through the model from its end, so the first bad gradient is that of
    the last parameter that has one. None where every rank's own values are finite and only their sum is not.
    """
    bad = [name for name, norm in zip(result.counted, result.own_norms.tolist(), strict=True) if not math.isfinite(norm)]
    mine = max(map(parameters.index, bad), default=-1)
    if not math.isfinite(result.own_loss.item()):
        mine = len(parameters)  # the loss comes before every gradient
    everyone = group.gather_json(mine)
    first = max(everyone)
    if first < 0:
        return None
    return Suspect("the loss" if first == len(parameters) else f"the gradient of {parameters[first]}", everyone.index(first))


class Skips:
    """Counts the steps in a row that were skipped, against the most that are allowed."""

    def __init__(self, most: int) -> None:
        self.most, self.in_a_row = most, 0

    def step(self, finite: bool) -> bool:
        """Note a step; returns whether the run may go on."""
        self.in_a_row = 0 if finite else self.in_a_row + 1
        return self.in_a_row <= self.most
