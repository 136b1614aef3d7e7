"""Seconds and bytes of one collective over a mesh axis, by latency and bandwidth of the links that the axis crosses.

Role in the pipeline: the planner prices reshards, gradient reductions and parameter gathers with `collective_seconds`, and reports
`wire_bytes` as the communication of a plan.

The model is alpha-beta, with the costs of Thakur, Rabenseifner and Gropp (2005) and Chan, Heimlich, Purkayastha and van de Geijn
(2007): for n ranks and `nbytes` = M,

| kind             | nbytes is                                     | sent by each rank | steps       |
|---|---|---|---|
| `all_gather`     | the gathered tensor: n times a rank's input   | (n-1)/n M         | ceil(log2 n)   |
| `reduce_scatter` | a rank's input: n times its output            | (n-1)/n M         | ceil(log2 n)   |
| `all_reduce`     | the tensor, the same size on every rank       | 2 (n-1)/n M       | 2 ceil(log2 n) |
| `all_to_all`     | a rank's input, the same size as its output   | (n-1)/n M         | ceil(log2 n)   |

Over several link levels the transfers of all levels run at once and the slowest decides. When m ranks of the axis sit in one node,
all m use their own network ports: gathers and reductions bring (n-m)/n M into the node through m ports, while an all-to-all sends
(n-m)/n M of every rank through its own. An axis with one rank per node (m = 1) has the network for all its bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from seqloom.cost.hardware import CollectiveKind, Hardware, Link
from seqloom.errors import UserError


@dataclass(frozen=True)
class AxisSpan:
    """The ranks of one mesh axis, or of neighbouring axes flattened: `size` ranks, `stride` apart.

    In a mesh {dp: 2, sp: 4, tp: 2} over consecutive ranks `tp` is (2, 1), `sp` (4, 2), `dp` (2, 8), and sp with tp (8, 1).
    """

    size: int
    stride: int = 1

    def __post_init__(self) -> None:
        if self.size < 1 or self.stride < 1:
            raise ValueError(f"an axis spans at least one rank with a stride of at least one, not {self}")


def wire_bytes(kind: CollectiveKind, nbytes: int, size: int) -> int:
    """Bytes that each of `size` ranks sends in one collective; `nbytes` as in the table above. 0 for one rank."""
    _check_kind(kind)
    return (2 if kind == "all_reduce" else 1) * (nbytes * (size - 1) // size)


def collective_seconds(hardware: Hardware, kind: CollectiveKind, nbytes: float, axis: AxisSpan) -> float:
    """Seconds of one collective over `axis`; `nbytes` as in the table above. 0 for one rank or no bytes.

    Raises `UserError` where the axis is larger than the outermost link of the hardware.
    """
    _check_kind(kind)
    if axis.size == 1 or nbytes <= 0:
        return 0.0
    latency, transfer, inner = 0.0, 0.0, 1
    achieved = hardware.rates.collectives[kind]
    for link, ranks in ranks_per_level(hardware, axis):
        if ranks == inner:
            continue
        latency += link.latency_s * (-(-ranks // inner) - 1).bit_length()
        crossing = (ranks - inner) if kind == "all_to_all" else (axis.size - inner) / inner
        transfer = max(transfer, nbytes * crossing / axis.size / (link.bandwidth_bytes_per_s * achieved))
        inner = ranks
    return (2 if kind == "all_reduce" else 1) * (latency + transfer)


def ranks_per_level(hardware: Hardware, axis: AxisSpan) -> list[tuple[Link, int]]:
    """For every link level, inner to outer, how many ranks of `axis` lie in one group of that level, spread evenly over the groups.

    Groups are taken to start where a group of the level starts, as they do when every node runs the same number of whole groups.
    """
    outermost = hardware.links[-1]
    if axis.size * axis.stride > outermost.ranks_per_group:
        raise UserError(
            f"hardware `{hardware.name}` joins at most {outermost.ranks_per_group} ranks (link `{outermost.name}`), and the plan needs "
            f"{axis.size * axis.stride}: use fewer ranks or add an outer link to the hardware file"
        )
    levels = []
    for link in hardware.links:
        room = max(1, link.ranks_per_group // axis.stride)
        groups = -(-axis.size // room)
        levels.append((link, axis.size // groups))
    return levels


def _check_kind(kind: str) -> None:
    if kind not in get_args(CollectiveKind):
        raise ValueError(f"unknown collective {kind!r}: one of {', '.join(get_args(CollectiveKind))}")
