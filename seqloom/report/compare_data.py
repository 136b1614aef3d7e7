"""What is compared between runs: their figures, the settings in which they differ, and how far their losses lie apart.

In: `RunDocuments` of several runs. Out: plain data.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from seqloom.report.run_documents import RunDocuments, settings, table, text, value

_BESIDE = ("model_id", "ranks", "device", "plan_line", "precision", "tokens_per_step", "total_steps")
"""Fields of run.json that count as settings where the resolved configuration does not say them."""


@dataclass(frozen=True)
class LossDifference:
    """How far the losses of two runs lie apart at the steps both made: how many, the step of the largest difference and it, and the mean.

    `largest` has a sign: the loss of the second run less that of the first. `last` is the difference at the newest common step.
    """

    steps: int
    step: int
    largest: float
    mean: float
    last: float


def loss_difference(first: RunDocuments, second: RunDocuments) -> LossDifference | None:
    """The difference of the losses by step, in nats per token; None where no step has a finite loss in both."""
    steps, one, two = np.intersect1d(first.log.steps["step"], second.log.steps["step"], assume_unique=True, return_indices=True)
    apart = second.log.steps["loss"][two] - first.log.steps["loss"][one]
    known = np.isfinite(apart)
    steps, apart = steps[known], apart[known]
    if not len(steps):
        return None
    at = int(np.abs(apart).argmax())
    return LossDifference(len(steps), int(steps[at]), float(apart[at]), float(np.abs(apart).mean()), float(apart[-1]))


def differing_settings(runs: Sequence[RunDocuments]) -> dict[str, list[str | None]]:
    """Settings that are not the same in all runs, by dotted name, with the value of each run; None where a run has no such setting."""
    trees = [settings(table(run.info, "config")) for run in runs]
    told = {name.rpartition(".")[2] for tree in trees for name in tree}
    trees = [tree | _beside(run.info, told) for tree, run in zip(trees, runs, strict=True)]
    names = dict.fromkeys(name for tree in trees for name in tree)
    found = {name: [tree.get(name) for tree in trees] for name in names}
    return {name: values for name, values in found.items() if len(set(values)) > 1}


def _beside(info: Mapping[str, object], told: Collection[str]) -> dict[str, str]:
    """What else of `run.json` decides a run, but for what settings tell."""
    numbers = {name: value(info, name) for name in _BESIDE if name not in told}
    found = {name: text(info, name) if number is None else f"{number:,.10g}" for name, number in numbers.items()}
    return {name: words for name, words in found.items() if words is not None}
