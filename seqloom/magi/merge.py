"""Fewer bands for the same cells: neighbours that were cut apart and lie side by side again in local coordinates are joined.

Role in the pipeline: every band costs a kernel launch, or a mask test, in each stage; a receive buffer puts rows side by side that are
far apart in the sequence, and a document that is seen whole comes as one rectangle where it lies in one piece.
"""

from __future__ import annotations

import numpy as np

QS, QE, KS, KE, LO, HI = range(6)


def merged(table: np.ndarray) -> np.ndarray:
    """`table` (tight bands that share no cell) with full rectangles of equal rows joined along columns, then of equal columns along rows.

    Sorted by rows, then by columns.
    """
    table = table[np.lexsort((table[:, KS], table[:, QS]))]
    if len(table) < 2:
        return table
    full = (table[:, LO] == table[:, KS] - table[:, QE] + 1) & (table[:, HI] == table[:, KE] - 1 - table[:, QS])
    rectangles = _joined(_joined(table[full], (QS, QE), KS, KE), (KS, KE), QS, QE)
    rectangles[:, LO] = rectangles[:, KS] - rectangles[:, QE] + 1
    rectangles[:, HI] = rectangles[:, KE] - 1 - rectangles[:, QS]
    table = np.concatenate((table[~full], rectangles))
    return table[np.lexsort((table[:, KS], table[:, QS]))]


def _joined(table: np.ndarray, equal: tuple[int, int], start: int, end: int) -> np.ndarray:
    """Rectangles with equal fields `equal`, one ending at `end` where the next begins at `start`, made one."""
    table = table[np.lexsort((table[:, start], table[:, equal[1]], table[:, equal[0]]))]
    if len(table) < 2:
        return table
    apart = (table[1:, equal] != table[:-1, equal]).any(axis=1) | (table[1:, start] != table[:-1, end])
    first = np.concatenate(([0], np.flatnonzero(apart) + 1))
    last = np.concatenate((first[1:] - 1, [len(table) - 1]))
    joined = table[first].copy()
    joined[:, end] = table[last, end]
    return joined
