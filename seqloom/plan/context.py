"""What attention costs when the sequence is split inside it: the exchange of keys and values, and what is computed meanwhile.

Role in the pipeline: `price` asks for a cluster whose strategy splits the dimension that its operator splits itself (`DimClass.context`).
The figures are those of the magi attention planner (`seqloom.magi.share`) for the documents of a typical row and the cluster's window, with
rows laid out as all layers of the model take them.

One stage: keys and values travel while the rank computes with its own, then it computes with those that came; in the backward pass they
travel again, and at the end their gradients go back, summed in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from seqloom.cost.communication import AxisSpan, collective_seconds
from seqloom.cost.compute import bandwidth_seconds
from seqloom.cost.hardware import Hardware
from seqloom.magi.share import Share, share
from seqloom.plan.clusters import Cluster

FP32 = 4


@dataclass(frozen=True)
class Exchange:
    """Bytes that come to the busiest rank in the forward pass and go back as gradients, the axes that they travel on, and the `Share`."""

    axes: tuple[int, ...]
    rows_bytes: int
    gradient_bytes: int
    share: Share

    @property
    def backward_bytes(self) -> int:
        """Bytes on the wire of the backward pass: the rows again, and their gradients."""
        return self.rows_bytes + self.gradient_bytes

    def seconds(self, forward: float, backward: float, hardware: Hardware, span: AxisSpan) -> tuple[float, float]:
        """Seconds of forward and backward from those of the arithmetic alone."""
        forward, backward = forward * self.share.balance, backward * self.share.balance
        come, go = (self._travel(nbytes, hardware, span) for nbytes in (self.rows_bytes, self.gradient_bytes))
        own = self.share.host
        return max(own * forward, come) + (1 - own) * forward, max(own * backward, come) + (1 - own) * backward + go

    @staticmethod
    def _travel(nbytes: int, hardware: Hardware, span: AxisSpan) -> float:
        whole = nbytes * span.size // (span.size - 1)  # an all-to-all is told the whole buffer, of which each rank keeps its own part
        return collective_seconds(hardware, "all_to_all", whole, span) + bandwidth_seconds(hardware, 4.0 * nbytes)


def context_axes(cluster: Cluster, splits: Sequence[str]) -> tuple[int, ...]:
    """The mesh axes on which a strategy splits what the operator itself splits."""
    names = {option.name for option in cluster.classes if option.context}
    return tuple(axis for axis, split in enumerate(splits) if split in names)


def split_axes(cluster: Cluster, splits: Sequence[str]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The mesh axes on which a strategy splits the batch, and those on which it splits what the operator itself splits."""
    return tuple(axis for axis, split in enumerate(splits) if split == "b"), context_axes(cluster, splits)


def exchange_of(cluster: Cluster, splits: Sequence[str], ranks: Sequence[int], sizes: dict[str, int], itemsize: int) -> Exchange | None:
    """The exchange of a cluster whose (local) sizes by name are `sizes`; None where it splits nothing itself."""
    axes = context_axes(cluster, splits)
    if not axes:
        return None
    asked = dict(cluster.nodes[0].kwargs)
    found = share(tuple(asked["documents"]), prod(ranks[axis] for axis in axes), asked.get("window"), tuple(asked.get("windows", ())))
    elements = 2 * sizes["b"] * found.received * sizes["k"] * sizes["e"]
    return Exchange(axes, elements * itemsize, elements * FP32, found)
