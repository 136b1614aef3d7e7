"""Which rank is slow: all ranks of a step end together, so a rank that holds up the others must be asked by itself.

Role in the pipeline: after a step that took unusually long, and once in many steps, every rank times the same small matrix products on its
own device, and all compare. A rank whose device is slow (throttled, shared, broken) is named with how slow it is, one that waited for its
data with how long. Both cost milliseconds.
"""

from __future__ import annotations

import statistics
import time

import torch

from seqloom.checkpoint import group
from seqloom.trainer.spikes import Note

EVERY = 200  # steps between two looks at all ranks
FIRST = 5  # the step after which is looked first
RATIO = 1.5  # of the median of all ranks' times: a rank that needs more is slow
SIDE = {"cuda": 4096, "cpu": 256}  # of the matrices
PRODUCTS, TRIES = 4, 3


class Stragglers:
    """`notes = stragglers(step, slow, waited)` after a step, on all ranks alike; `slow`: whether the step took unusually long."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self, step: int, slow: bool, waited: float, seconds: float) -> list[Note]:
        """What holds up a step of `seconds`, of which this rank waited `waited` for data. Collective where `slow` is alike everywhere."""
        if not slow and step % EVERY and step != FIRST:
            return []
        everyone = group.gather_json([self._probe(), waited])
        named = slow_ranks([own for own, _ in everyone])
        if named:  # once more: another process may have come between
            named = [rank for rank in slow_ranks(group.gather_json(self._probe())) if rank in named]
        usual = statistics.median_low([own for own, _ in everyone])
        notes = [Note("straggler", f"rank {rank} computes {everyone[rank][0] / usual:.1f}x slower than the others") for rank in named]
        longest = max(range(len(everyone)), key=lambda rank: everyone[rank][1])
        if slow and everyone[longest][1] > seconds / 2:
            notes.append(Note("straggler", f"rank {longest} waited {everyone[longest][1]:.2f} s for data"))
        return notes

    def _probe(self) -> float:
        """Seconds of a few matrix products on this rank's device, the best of some tries."""
        side = SIDE[self._device.type]
        matrix = torch.ones(side, side, device=self._device, dtype=torch.bfloat16 if self._device.type == "cuda" else torch.float32)
        best = float("inf")
        for _ in range(TRIES):
            self._wait()
            began = time.perf_counter()
            for _ in range(PRODUCTS):
                torch.mm(matrix, matrix)
            self._wait()
            best = min(best, time.perf_counter() - began)
        return best

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def slow_ranks(seconds: list[float]) -> list[int]:
    """The ranks that took more than `RATIO` times the median (of two ranks: the time of the faster one)."""
    usual = statistics.median_low(seconds)
    return [rank for rank, own in enumerate(seconds) if own > RATIO * usual]
