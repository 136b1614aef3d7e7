"""Group-cast and group-reduce: rows to the ranks that need them, and their gradients back.

Role: the communication of `seqloom.magi.attention`. In: local rows and a stage of an exchange plan. A group-cast sends each listed stretch
of local rows to one rank; a group-reduce is its transpose: what comes back for a row is added to it. Each is one `all_to_all_single` with
split sizes, over any process group. Order of what is received: sources by rank, each one's rows ascending.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

Range = tuple[int, int]


@dataclass(frozen=True)
class Route:
    """What one rank sends and receives: `sent` lists local rows by destination, `send_splits` and `receive_splits` count them by rank."""

    sent: Tensor
    send_splits: tuple[int, ...]
    receive_splits: tuple[int, ...]

    @property
    def received(self) -> int:
        """Rows received."""
        return sum(self.receive_splits)


def route(send: Sequence[Sequence[Range]], receive_splits: Sequence[int], device: torch.device) -> Route:
    """The route of stretches `[start, end)` of local rows for each destination."""
    lengths = tuple(sum(end - start for start, end in ranges) for ranges in send)
    rows = [np.arange(start, end) for ranges in send for start, end in ranges]
    index = torch.from_numpy(np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64))
    return Route(index.to(device), lengths, tuple(receive_splits))


class Flight:
    """Rows on their way: `wait()` gives what was received."""

    def __init__(self, received: Tensor, sent: Tensor, work: dist.Work | None) -> None:
        self._received, self._sent, self._work = received, sent, work

    def wait(self) -> Tensor:
        """What was received, once it is there (on a GPU: in the order of the current stream)."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        self._sent = self._received  # what was sent may go
        return self._received


def group_cast(rows: Tensor, way: Route, group: ProcessGroup) -> Flight:
    """Start to send rows `[local rows, ...]` along a route; `wait()` returns `[way.received, ...]`."""
    sent = rows.index_select(0, way.sent)
    received = rows.new_empty((way.received, *rows.shape[1:]))
    return _exchange(received, sent, way.receive_splits, way.send_splits, group)


def group_reduce(received: Tensor, way: Route, group: ProcessGroup) -> Flight:
    """Start to send `[way.received, ...]` back where it came from; `wait()` returns one row for each of `way.sent`."""
    back = received.new_empty((len(way.sent), *received.shape[1:]))
    return _exchange(back, received.contiguous(), way.send_splits, way.receive_splits, group)


def add_rows_(target: Tensor, rows: Tensor, way: Route) -> None:
    """Add what a group-reduce brought to its rows. One destination at a time: a row is at most once in each, so the sum has one order."""
    start = 0
    for count in way.send_splits:
        index = way.sent[start : start + count]
        target.index_add_(0, index, rows[start : start + count].to(target.dtype))
        start += count


def _exchange(into: Tensor, sent: Tensor, receive: tuple[int, ...], send: tuple[int, ...], group: ProcessGroup) -> Flight:
    work = dist.all_to_all_single(into, sent, list(receive), list(send), group=group, async_op=True)
    return Flight(into, sent, work)
