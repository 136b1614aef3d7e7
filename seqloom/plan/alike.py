"""All attention inside documents splits its rows alike: what ties the blocks of a model whose layers differ (some with a sliding window).

Role in the pipeline: a constraint of the placement problem (`seqloom/plan/problem.py`). The rows of a micro-batch lie on the ranks in one
way for the whole program, so the axes that split the batch of such attention, and those that split its sequence, are the same everywhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from seqloom.capture.documents import MAGI
from seqloom.plan.context import split_axes

if TYPE_CHECKING:
    from seqloom.plan.problem import Problem

Axes = tuple[tuple[int, ...], tuple[int, ...]]


def split_rows_alike(problem: Problem) -> None:
    """For each pair of axes of batch and sequence: every cluster of such attention has it, or none."""
    parts = [
        (region.key, index, part)
        for region in problem.regions.parts.values()
        for index, part in enumerate(region.parts)
        if part.nodes[0].op == MAGI
    ]
    found: list[dict[Axes, list[int]]] = []
    for key, index, part in parts:
        columns: dict[Axes, list[int]] = {}
        for column, choice in problem.of_part(key, index):
            columns.setdefault(split_axes(part, choice.strategy.splits), []).append(column)
        found.append(columns)
    for other in found[1:]:
        for axes in dict.fromkeys((*found[0], *other)):
            terms = [*((c, 1.0) for c in found[0].get(axes, [])), *((c, -1.0) for c in other.get(axes, []))]
            problem.program.constrain(terms, 0.0, 0.0)
