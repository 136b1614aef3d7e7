"""Fewer bands for the same cells: neighbours that were cut apart and are one band again in local coordinates are joined.

Role in the pipeline: every band costs a kernel launch, or a mask test, in each stage. A receive buffer puts rows side by side that are
far apart in the sequence: rectangles become one. And what a rank hosts of a causal document, whichever chunks of it in rising order, is one
causal band in local rows and columns.
"""

from __future__ import annotations

import numpy as np

from seqloom.magi import table as tables

QS, QE, KS, KE, LO, HI = range(6)
ORDERS = ((KS, QE, QS), (QS, KE, KS))  # for `np.lexsort`, last first: neighbours along columns, neighbours along rows


def merged(table: np.ndarray) -> np.ndarray:
    """`table` (tight bands that share no cell) with neighbours joined where both together are a band; sorted by rows, then by columns.

    Two bands are one when the smallest band around both has just as many cells as they have.
    """
    unchanged, turn = 0, 0
    while len(table) > 1 and unchanged < len(ORDERS):
        joined = _joined(table[np.lexsort([table[:, column] for column in ORDERS[turn % len(ORDERS)]])])
        unchanged = 0 if len(joined) < len(table) else unchanged + 1
        turn += unchanged  # the same order again while it joins pairs of pairs
        table = joined
    return table[np.lexsort((table[:, KS], table[:, QS]))]


def _joined(table: np.ndarray) -> np.ndarray:
    """One pass over neighbours in the order of `table`; of three that could be joined the first two are."""
    one, other = table[:-1], table[1:]
    hull = np.where(np.isin(np.arange(6), (QS, KS, LO)), np.minimum(one, other), np.maximum(one, other))
    areas = tables.areas(table)
    fits = tables.areas(hull) == areas[:-1] + areas[1:]
    for index in np.flatnonzero(fits):
        fits[index] &= not (index and fits[index - 1])
    table = table.copy()
    table[:-1][fits] = hull[fits]
    return table[np.append(True, ~fits)]
