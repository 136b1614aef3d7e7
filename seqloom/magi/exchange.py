"""The exchange plan: which key/value rows travel between ranks, in which stages, and what each rank computes with them.

Role in the pipeline: from a mask and a `Dispatch` (of this mask or of another one with as many rows) `plan_exchange` makes an `Exchange`
of plain numbers; the runtime sends rows by it (group-cast), sums gradients back by it (group-reduce), and gives its bands to the kernels.

need(r) is the union of the key ranges of the bands in r's query rows; what r receives is exactly need(r) less what it hosts. All of it
lies in one list of transfers (to, from, stage, global rows), from which every rank reads its own part: nothing is agreed on at run time.
The plan of a rank is made when it is asked for: a rank of a large group pays for the list and for itself only.

The rows that r receives in a stage lie in its buffer by source rank and, within a source, in rising global order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from seqloom.errors import UserError
from seqloom.magi import table as tables
from seqloom.magi.bands import Band, Range
from seqloom.magi.dispatch import Dispatch
from seqloom.magi.mask import AttnMask
from seqloom.magi.merge import merged
from seqloom.magi.transfers import Transfers, all_transfers

Runs = tuple[np.ndarray, np.ndarray, np.ndarray]  # starts, ends and places of ranges of rows: row starts[n] lies at place places[n]


@dataclass(frozen=True)
class Stage:
    """One group-cast of a rank and what it computes with the rows that come.

    `send[p]`: local [start, end) row ranges that go to rank p, in the order sent. `receive_splits[p]`: rows that come from rank p.
    `bands`: local query rows x columns of the receive buffer.
    """

    send: tuple[tuple[Range, ...], ...]
    receive_splits: tuple[int, ...]
    bands: tuple[Band, ...]

    @property
    def send_splits(self) -> tuple[int, ...]:
        """Rows that go to each rank."""
        return tuple(sum(end - start for start, end in ranges) for ranges in self.send)


@dataclass(frozen=True)
class RankPlan:
    """What one rank does: `rows` local tokens (padding included), `host` bands (local rows x local columns), then the stages in order."""

    rows: int
    host: tuple[Band, ...]
    stages: tuple[Stage, ...]


@dataclass(frozen=True, eq=False)
class Exchange:
    """The exchange of one mask over one dispatch; `ranks[r]` is the plan of rank r, made on first use.

    `degree` is the number of stages: the same on all ranks, 0 where no row travels at all.
    """

    mask: AttnMask
    dispatch: Dispatch
    degree: int
    transfers: Transfers

    @cached_property
    def received_rows(self) -> tuple[int, ...]:
        """Rows that each rank receives: exactly those that it needs and does not host."""
        return tuple(self.moved.sum(axis=1).tolist())

    @cached_property
    def sent_rows(self) -> tuple[int, ...]:
        """Rows that each rank sends, counted once for each destination."""
        return tuple(self.moved.sum(axis=0).tolist())

    @cached_property
    def moved(self) -> np.ndarray:
        """int64 `[ranks, ranks]`: rows that travel to a rank (first index) from another."""
        return self.transfers.moved(self.dispatch.num_ranks)

    @cached_property
    def ranks(self) -> Sequence[RankPlan]:
        """The plans of all ranks; each is made when it is first read."""
        return _LazyPlans(self)

    @property
    def share_of_all_gather(self) -> float:
        """Rows received over all ranks, as a part of those that an all-gather of keys and values would bring them."""
        hosted = sum(self.dispatch.rows(rank) for rank in range(self.dispatch.num_ranks))
        return sum(self.received_rows) / max(1, hosted * (self.dispatch.num_ranks - 1))


class _LazyPlans(Sequence[RankPlan]):
    """The plans of an exchange by rank."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._plans: dict[int, RankPlan] = {}

    def __len__(self) -> int:
        return self._exchange.dispatch.num_ranks

    def __getitem__(self, rank: int) -> RankPlan:
        rank = range(len(self))[rank]
        if rank not in self._plans:
            self._plans[rank] = _rank_plan(self._exchange, rank)
        return self._plans[rank]

    def __iter__(self) -> Iterator[RankPlan]:
        return (self[rank] for rank in range(len(self)))


def plan_exchange(mask: AttnMask, dispatch: Dispatch, degree: int | str = 1) -> Exchange:
    """The exchange of `mask` over `dispatch` in `degree` stages ("auto": the number that the cost model of the dispatch predicts fastest).

    Degree 0 is planned as 1: there the runtime computes host and remote bands in one call. Raises `UserError` for a mask with other rows
    than the dispatch and for a degree below 0.
    """
    if (mask.total_seqlen_q, mask.total_seqlen_k) != (dispatch.total_seqlen, dispatch.total_seqlen):
        raise UserError(
            f"the mask has {mask.total_seqlen_q} query and {mask.total_seqlen_k} key rows and the dispatch {dispatch.total_seqlen}: "
            "plan the exchange with a mask of the rows that were dispatched"
        )
    if degree != "auto" and (not isinstance(degree, int) or degree < 0):
        raise UserError(f'overlap degree {degree!r} is impossible: give a number of stages from 0 on, or "auto"')
    transfers, stages = all_transfers(mask, dispatch, degree)
    return Exchange(mask, dispatch, stages, transfers)


def _rank_plan(exchange: Exchange, rank: int) -> RankPlan:
    """Cut the mask to the rank's rows, then these bands to the columns it hosts and to the columns of every stage's buffer."""
    dispatch = exchange.dispatch
    bands, runs = local_rows(exchange, rank)
    received, sent = exchange.transfers.to(rank), exchange.transfers.of(rank)
    stages = tuple(_stage(dispatch, bands, received.in_stage(stage), sent.in_stage(stage), runs) for stage in range(exchange.degree))
    return RankPlan(dispatch.rows(rank), over_columns(bands, *runs), stages)


def local_rows(exchange: Exchange, rank: int) -> tuple[np.ndarray, Runs]:
    """The mask's bands in the rows of `rank`, as a table of local rows x global columns; and the runs of these rows."""
    starts, ends = exchange.dispatch.runs(rank)
    local = np.cumsum(ends - starts) - (ends - starts)
    pieces = tables.cut(exchange.mask.table, tables.ROWS, starts, ends)
    bands = tables.shift(pieces.table, (local - starts)[pieces.part], np.zeros(len(pieces.part), np.int64))
    return bands, (starts, ends, local)


def _stage(dispatch: Dispatch, bands: np.ndarray, received: Transfers, sent: Transfers, runs: Runs) -> Stage:
    """One stage of a rank with `bands` and `runs` of `local_rows`."""
    first = in_runs(sent.start, runs)
    send = by_destination(sent.target, first, first + sent.end - sent.start, dispatch.num_ranks)
    lengths = received.end - received.start
    splits = np.zeros(dispatch.num_ranks, np.int64)
    np.add.at(splits, received.source, lengths)
    order = np.argsort(received.start)
    columns = over_columns(bands, received.start[order], received.end[order], (np.cumsum(lengths) - lengths)[order])
    return Stage(send, tuple(splits.tolist()), columns)


def in_runs(rows: np.ndarray, runs: Runs) -> np.ndarray:
    """The place of global `rows` within runs (starts, ends, places) that hold them."""
    starts, ends, places = runs
    run = np.searchsorted(ends, rows, side="right")
    return rows - starts[run] + places[run]


def by_destination(target: np.ndarray, start: np.ndarray, end: np.ndarray, destinations: int) -> tuple[tuple[Range, ...], ...]:
    """Ranges [start[n], end[n]) per destination `target[n]`, in the order given; those that follow on each other are one."""
    ranges: list[list[Range]] = [[] for _ in range(destinations)]
    for to, first, last in zip(target.tolist(), start.tolist(), end.tolist(), strict=True):
        if ranges[to] and ranges[to][-1][1] == first:
            ranges[to][-1] = (ranges[to][-1][0], last)
        else:
            ranges[to].append((first, last))
    return tuple(map(tuple, ranges))


def over_columns(bands: np.ndarray, starts: np.ndarray, ends: np.ndarray, places: np.ndarray) -> tuple[Band, ...]:
    """`bands` cut to the columns [starts[n], ends[n]), rising, with the columns moved to begin at places[n]."""
    if not len(starts):
        return ()
    opens = np.concatenate(([True], (starts[1:] != ends[:-1]) | (np.diff(places - starts) != 0)))  # else neighbours in both orders
    starts, ends, places = starts[opens], ends[np.append(opens[1:], True)], places[opens]
    pieces = tables.cut(bands, tables.COLUMNS, starts, ends)
    moved = tables.shift(pieces.table, np.zeros(len(pieces.part), np.int64), (places - starts)[pieces.part])
    return tables.to_bands(merged(moved))
