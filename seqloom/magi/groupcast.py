"""Group-cast and group-reduce: rows to the ranks that need them, and their gradients back.

Role: the communication of `seqloom.magi.attention`. In: local rows and a stage of an exchange plan. A group-cast sends each listed stretch
of local rows to one rank; a group-reduce is its transpose: what comes back for a row is added to it. Each is one `all_to_all_single` with
split sizes, over any process group; over nodes (`seqloom.magi.nodes`) it is two, one among the nodes and one within each. Order of what is
received: sources by rank (over nodes: by place, then node), each one's rows ascending.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from seqloom.ops.transfer import to_device

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


@dataclass(frozen=True)
class Hops:
    """A route over nodes: `across` sends some of the `rows` local rows to other nodes, `within` sends these and what came across on."""

    rows: int
    across: Route
    within: Route


@dataclass(frozen=True)
class NodeGroups:
    """The groups of the two hops: the ranks with this one's place in all nodes, and the ranks of its node."""

    across: ProcessGroup
    within: ProcessGroup


Way = Route | Hops
Group = ProcessGroup | NodeGroups


def route(send: Sequence[Sequence[Range]], receive_splits: Sequence[int], device: torch.device) -> Route:
    """The route of stretches `[start, end)` of local rows for each destination."""
    lengths = tuple(sum(end - start for start, end in ranges) for ranges in send)
    rows = [np.arange(start, end) for ranges in send for start, end in ranges]
    index = torch.from_numpy(np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64))
    return Route(to_device(index, device), lengths, tuple(receive_splits))


class Flight:
    """Rows on their way: `wait()` gives what was received. `then`, where given, takes what came and starts a second hop."""

    def __init__(self, received: Tensor, sent: Tensor, work: dist.Work | None, then: Callable[[Tensor], Flight] | None = None) -> None:
        self._received, self._sent, self._work, self._then = received, sent, work, then

    def onward(self) -> None:
        """Wait for the first hop and start the second, where there is one."""
        if self._then is not None:
            then, self._then = self._then, None
            other = then(self.wait())
            self._received, self._sent, self._work = other._received, other._sent, other._work

    def wait(self) -> Tensor:
        """What was received, once it is there (on a GPU: in the order of the current stream)."""
        self.onward()
        if self._work is not None:
            self._work.wait()
            self._work = None
        self._sent = self._received  # what was sent may go
        return self._received


def group_cast(rows: Tensor, way: Way, group: Group) -> Flight:
    """Start to send rows `[local rows, ...]` along a route; `wait()` returns `[rows received, ...]`."""
    if isinstance(way, Hops):
        return _cast(rows, way.across, group.across, lambda came: _cast(torch.cat((rows, came)), way.within, group.within))
    return _cast(rows, way, group)


def group_reduce(received: Tensor, way: Way, group: Group) -> Flight:
    """Start to send `[rows received, ...]` back where it came from; `wait()` returns what `add_rows_` adds to the local rows."""
    if isinstance(way, Hops):
        return _reduce(received, way.within, group.within, lambda back: _summed(back, way, group))
    return _reduce(received, way, group)


def add_rows_(target: Tensor, rows: Tensor, way: Way) -> None:
    """Add what a group-reduce brought to its rows. One destination at a time: a row is at most once in each, so the sum has one order."""
    if isinstance(way, Hops):
        target += rows[: way.rows]
        add_rows_(target, rows[way.rows :], way.across)
        return
    start = 0
    for count in way.send_splits:
        index = way.sent[start : start + count]
        target.index_add_(0, index, rows[start : start + count].to(target.dtype))
        start += count


def _cast(rows: Tensor, way: Route, group: ProcessGroup, then: Callable[[Tensor], Flight] | None = None) -> Flight:
    sent, received = rows.index_select(0, way.sent), rows.new_empty((way.received, *rows.shape[1:]))
    return Flight(received, sent, _start(received, sent, way.receive_splits, way.send_splits, group), then)


def _reduce(received: Tensor, way: Route, group: ProcessGroup, then: Callable[[Tensor], Flight] | None = None) -> Flight:
    sent, back = received.contiguous(), received.new_empty((len(way.sent), *received.shape[1:]))
    return Flight(back, sent, _start(back, sent, way.send_splits, way.receive_splits, group), then)


def _summed(back: Tensor, way: Hops, group: NodeGroups) -> Flight:
    """What came back within the node, summed for each row; the sums for rows of other nodes go on to them."""
    held = back.new_zeros((way.rows + way.across.received, *back.shape[1:]))
    add_rows_(held, back, way.within)
    brought = torch.cat((held[: way.rows], back.new_empty((len(way.across.sent), *back.shape[1:]))))
    sent = held[way.rows :]
    work = _start(brought[way.rows :], sent, way.across.send_splits, way.across.receive_splits, group.across)
    return Flight(brought, sent, work)


def _start(into: Tensor, sent: Tensor, receive: tuple[int, ...], send: tuple[int, ...], group: ProcessGroup) -> dist.Work:
    return dist.all_to_all_single(into, sent, list(receive), list(send), group=group, async_op=True)
