"""Local search by swaps: two ranks exchange a chunk each where that lowers the cost, a round at a time, for a fixed number of rounds.

Role in the pipeline: `assign.candidates` improves its starts with it. Every rank r costs the time of the rows it receives, and `OVERLOAD`
times that by which max(its compute, its communication) exceeds a limit: below the limit only rows count, as the slowest rank sets the
step. Time is counted in cells (`AttentionCost.cells_per_row`), so all numbers are whole.

A swap of chunks x and y changes only their two ranks. What rank(x) receives when y takes the place of x is, with
free(x) = the atoms that no other chunk of rank(x) needs,

    rows(needs(y) and free(x)) - rows(needs(x) and free(x))  more than before, less what y has more rows than x.

Needs are a few runs of atoms, so running sums over free(x) give it for every y. The pairs looked at in a round have x on one of the
`WATCHED` costliest ranks; of each x the best y is kept, and the best of these swaps are made, each rank taking part once.
"""

from __future__ import annotations

import numpy as np

from seqloom.magi.chunks import Chunks
from seqloom.magi.table import ramps

ROUNDS = 12
WATCHED = 8  # ranks
OVERLOAD = 8


def improve(chunks: Chunks, owners: np.ndarray, cells_per_row: int, limit: int) -> np.ndarray:
    """`owners` after at most `ROUNDS` rounds of swaps. `limit`: cells, or their time in rows, up to which a rank is not overloaded."""
    state, skipped = _State(chunks, owners, cells_per_row, limit), 0
    for _ in range(ROUNDS):
        watched = state.costliest()[skipped : skipped + WATCHED]
        if not len(watched):
            break
        swaps = _best_swaps(state, np.sort(state.slots[watched], axis=None))
        state.swap(swaps)
        skipped = 0 if swaps else skipped + WATCHED
    return state.owners


class _State:
    """An assignment with what every swap is judged by.

    `free_before[c, a]`: rows of free(c) in the atoms before a, `[chunks, atoms + 1]`; `own_rows[c]`: rows(needs(c) and free(c)).
    `compute`, `exchange` and `overload` are int64 `[ranks]`, in cells.
    """

    def __init__(self, chunks: Chunks, owners: np.ndarray, cells_per_row: int, limit: int) -> None:
        self.chunks, self.owners, self.cells_per_row, self.limit = chunks, owners.copy(), cells_per_row, limit
        self.slots = chunks.slots(owners)
        self.free_before = np.zeros((chunks.count, len(chunks.borders)), np.int64)
        self.own_rows = np.zeros(chunks.count, np.int64)
        self.compute, self.exchange, self.overload = np.zeros((3, chunks.num_ranks), np.int64)
        self._refresh(np.arange(chunks.num_ranks))

    def _refresh(self, ranks: np.ndarray) -> None:
        """Everything about `ranks` anew from their chunks."""
        chunks, members = self.chunks, self.slots[ranks]
        needs = chunks.needs[members]  # [ranks, chunks per rank, atoms]
        wanted = needs.sum(axis=1, dtype=np.int32)
        free = np.where(wanted[:, None] == needs, chunks.sizes, 0)
        np.cumsum(free, axis=2, out=free)
        self.free_before[members, 1:] = free
        self.own_rows[members] = self.needed_of_free(members.ravel(), members.ravel(), paired=True).reshape(members.shape)
        received = np.where(wanted > 0, chunks.sizes, 0).sum(axis=1) - chunks.hosted[members].sum(axis=1)
        self.exchange[ranks] = self.cells_per_row * received
        self.compute[ranks] = chunks.areas[members].sum(axis=1)
        self.overload[ranks] = np.maximum(np.maximum(self.compute[ranks], self.exchange[ranks]) - self.limit, 0)

    def swap(self, swaps: list[tuple[int, int]]) -> None:
        """Make `swaps`, pairs of chunks on pairs of ranks that share none."""
        ranks = [rank for pair in swaps for rank in self.owners[list(pair)]]
        for one, other in swaps:
            self.owners[one], self.owners[other] = self.owners[other], self.owners[one]
        if swaps:
            self.slots = self.chunks.slots(self.owners)
            self._refresh(np.array(ranks))

    def costliest(self) -> np.ndarray:
        """All ranks, the most overloaded first, then those that receive most."""
        return np.lexsort((-self.exchange, -self.overload))

    def needed_of_free(self, free: np.ndarray, needing: np.ndarray, paired: bool = False) -> np.ndarray:
        """rows(needs(y) and free(x)), `[free, needing]`, for all x of `free` and y of `needing`; `paired`: of x with the y of its place."""
        first_span, first, end = self.chunks.spans
        begins = first_span[needing]
        count = np.append(first_span, len(first))[needing + 1] - begins
        span = ramps(begins, count)
        places = np.cumsum(count) - count
        if paired:
            row = np.repeat(free, count)
            return np.add.reduceat(self.free_before[row, end[span]] - self.free_before[row, first[span]], places)
        before = self.free_before[free]
        return np.add.reduceat(before[:, end[span]] - before[:, first[span]], places, axis=1)

    def more_rows(self, out: np.ndarray, into: np.ndarray) -> np.ndarray:
        """How many more rows rank(x) receives when y takes the place of x, `[out, into]`, for all x of `out` and y of `into`."""
        added = self.needed_of_free(out, into) - self.own_rows[out][:, None]
        return added - (self.chunks.hosted[into] - self.chunks.hosted[out][:, None])

    def changes(self, ranks: np.ndarray, out: np.ndarray, into: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """By how much the cost of `ranks` changes when each gives chunk `out`, takes chunk `into` and receives `rows` more rows."""
        added = self.cells_per_row * rows
        time = self.compute[ranks] + (self.chunks.areas[into] - self.chunks.areas[out])
        np.maximum(time, self.exchange[ranks] + added, out=time)
        overload = np.maximum(time - self.limit, 0, out=time)
        return added + OVERLOAD * (overload - self.overload[ranks])


def _best_swaps(state: _State, ones: np.ndarray) -> list[tuple[int, int]]:
    """Swaps (chunk of `ones`, other chunk) that lower the cost, of disjoint pairs of ranks, the best first."""
    chunks, owners = state.chunks, state.owners
    others = np.arange(chunks.count)
    taken, given = state.more_rows(ones, others), state.more_rows(others, ones).T  # for rank(one) and for rank(other), `[ones, others]`
    mine, theirs = owners[ones][:, None], owners[None, :]
    score = state.changes(mine, ones[:, None], others[None, :], taken) + state.changes(theirs, others[None, :], ones[:, None], given)
    score[_forbidden(chunks, owners, ones)] = 0
    best = score.argmin(axis=1)
    gains = score[np.arange(len(ones)), best]
    busy: set[int] = set()
    swaps = []
    for index in np.argsort(gains, kind="stable"):
        one, other = int(ones[index]), int(best[index])
        pair = {int(owners[one]), int(owners[other])}
        if gains[index] >= 0:
            break
        if not pair & busy:
            busy |= pair
            swaps.append((one, other))
    return swaps


def _forbidden(chunks: Chunks, owners: np.ndarray, ones: np.ndarray) -> np.ndarray:
    """bool `[ones, chunks]`: swaps within a rank, and swaps that give a rank a second chunk of dropped padding."""
    forbidden = owners[ones][:, None] == owners[None, :]
    if chunks.kept < chunks.count:
        dropped = np.arange(chunks.count) >= chunks.kept
        padded = np.isin(owners, owners[chunks.kept :])  # chunks on a rank that has one
        forbidden |= padded[ones][:, None] & dropped[None, :] | dropped[ones][:, None] & padded[None, :]
    return forbidden
