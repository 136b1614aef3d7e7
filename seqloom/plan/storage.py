"""Where parameters, gradients and optimizer state live between uses: ZeRO 0 to 3 over any subset of the axes, in bytes and seconds.

Follows ZeRO (Rajbhandari et al. 2020, section 5) as FSDP2 does it: fp32 masters, Adam's two moments and the reduced gradients are stored
together; the gathered parameters and the gradients before reduction have the compute dtype. Storage is sharded over a subset of `dp` and
the `sum` axes; the ranks of the others hold copies (hybrid sharding, Zhao et al. 2023, section 3.2.2), whose gradients are summed by an
all-reduce of the shards at the last micro-batch.

| ZeRO | stored per rank | gathered | reduced |
|---|---|---|---|
| 0 | everything whole | never | all-reduce once a step |
| 1 | 1/n of everything | once a step, kept until its end | reduce-scatter once a step |
| 2 | 1/n of everything | once a step, kept until its end | reduce-scatter per micro-batch |
| 3 | 1/n of everything | per block, in forward and again in backward | reduce-scatter per micro-batch |

n is the size of the axes in `sharded`. A parameter that a `split` axis splits counts with its local piece.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from seqloom.cost.communication import CollectiveKind, collective_seconds, wire_bytes
from seqloom.cost.compute import bandwidth_seconds
from seqloom.plan.price import Machine

STATE_BYTES = 12  # fp32 master 4, Adam's moments 8
FP32 = 4
OPTIMIZER_TRAFFIC = 40  # bytes an element: AdamW reads master, gradient and moments, writes master and moments; norm and clipping
ENDLESS = 1e15  # bytes beside which the launch of a kernel takes no time: the optimizer updates all parameters in a few
ZERO_LEVELS = (3, 2, 1, 0)
LEAST_BYTES = 1e-6  # of a collective that a group without elements still starts


@dataclass(frozen=True)
class Storage:
    """One choice for the whole model: the ZeRO level, the bytes of an element in compute, micro-batches a step, and the axes that shard
    (indices of plan axes, `DP` for the scale units; empty with ZeRO 0).
    """

    zero: int
    itemsize: int
    accumulation: int
    sharded: tuple[int, ...]


@dataclass(frozen=True)
class GroupCost:
    """One FSDP group (a block, or the rest of the model) per micro-batch: bytes on one rank, seconds that may hide behind compute."""

    states_bytes: float  # masters and moments
    gradient_bytes: float  # gradients that stay for the whole step: reduced ones where micro-batches add up, unreduced ones
    resident_bytes: float  # gathered parameters that stay for the whole step
    flight_gathered_bytes: float  # gathered parameters that come and go while the group's backward runs
    flight_gradient_bytes: float  # gradients that do
    ending_bytes: float  # what the end of backward adds, when every activation is gone: gradients, the root's reduction
    forward_s: float
    backward_s: float
    optimizer_s: float

    @property
    def standing_bytes(self) -> float:
        """What is there during the whole step."""
        return self.states_bytes + self.gradient_bytes + self.resident_bytes

    @property
    def in_flight_bytes(self) -> float:
        """What comes and goes while the group's backward runs."""
        return self.flight_gathered_bytes + self.flight_gradient_bytes


def storages(machine: Machine, itemsize: int, accumulation: int, zero: int | None) -> list[Storage]:
    """Every storage worth trying, the leanest first: those that no other one beats or equals in every byte and second.

    `zero` asks for one level. What a group costs is linear in its size, so one size stands for all.
    """
    levels = ZERO_LEVELS if zero is None else (zero,)
    found = [Storage(level, itemsize, accumulation, axes) for level in levels for axes in _subsets(machine, level)]
    costs = {storage: _figures(machine, storage) for storage in found}
    best = [s for i, s in enumerate(found) if not any(_beats(costs[o], costs[s], j < i) for j, o in enumerate(found) if o != s)]
    return sorted(best, key=lambda s: costs[s][:2])  # every block stands, only one of them is in flight


def _subsets(machine: Machine, level: int) -> Iterator[tuple[int, ...]]:
    axes = [axis for axis in machine.storage_axes if machine.size(axis) > 1]
    if level == 0 or not axes:
        yield tuple(axes) if level else ()
        return
    for count in range(len(axes), 0, -1):
        yield from itertools.combinations(axes, count)


def _figures(machine: Machine, storage: Storage) -> tuple[float, ...]:
    return tuple(figure for root in (False, True) for figure in _totals(group_cost(1e8, machine, storage, root)))


def _totals(cost: GroupCost) -> tuple[float, ...]:
    return cost.standing_bytes, cost.in_flight_bytes, cost.ending_bytes, cost.forward_s, cost.backward_s, cost.optimizer_s


def _beats(one: tuple[float, ...], other: tuple[float, ...], comes_first: bool) -> bool:
    return all(a <= b for a, b in zip(one, other, strict=True)) and (one != other or comes_first)


def group_cost(numel: float, machine: Machine, storage: Storage, root: bool) -> GroupCost:
    """Cost of storing `numel` elements (one rank's piece after tensor parallelism) under a storage.

    Bytes are linear in `numel`, seconds too but for the latency of the collectives, which a group without elements has as well.
    """
    ranks = machine.span(storage.sharded).size
    gradients = FP32 * numel / ranks
    persists = storage.accumulation > 1
    gathered, reduced = storage.itemsize * numel, FP32 * numel
    stays = storage.zero != 3 or root
    delayed = FP32 * numel if storage.zero < 2 and persists else 0.0
    # The root's gradients wait for the end; a block's are reduced while the next block is gathered and differentiated. Where unreduced ones
    # add up over micro-batches (`delayed`), each makes room for its reduced shard.
    flight_gathered = 0.0 if stays else 2 * gathered
    flight_gradient = 0.0 if root else gathered + reduced + gradients
    ending = (0.0 if persists else gradients) + (gathered + reduced if root else 0.0)
    forward, backward = _seconds(gathered, reduced, machine, storage, root)
    optimizer = bandwidth_seconds(machine.hardware, ENDLESS) * OPTIMIZER_TRAFFIC * numel / ranks / ENDLESS / storage.accumulation
    return GroupCost(
        states_bytes=STATE_BYTES * numel / ranks,
        gradient_bytes=delayed if delayed else (gradients if persists else 0.0),
        resident_bytes=gathered if stays else 0.0,
        flight_gathered_bytes=flight_gathered,
        flight_gradient_bytes=flight_gradient,
        ending_bytes=ending,
        forward_s=forward,
        backward_s=backward,
        optimizer_s=optimizer,
    )


def _seconds(gathered: float, reduced: float, machine: Machine, storage: Storage, root: bool) -> tuple[float, float]:
    """Forward and backward seconds of a group's collectives per micro-batch."""
    shards, copies = storage.sharded, machine.replicated(storage.sharded)
    across = _collective(machine, "all_reduce", reduced / machine.span(shards).size, copies) / storage.accumulation
    if storage.zero == 0:
        return 0.0, across
    gather, scatter = _collective(machine, "all_gather", gathered, shards), _collective(machine, "reduce_scatter", reduced, shards)
    if storage.zero == 3:
        return gather, scatter + across + (0.0 if root else gather)
    return gather / storage.accumulation, (scatter if storage.zero == 2 else scatter / storage.accumulation) + across


def _collective(machine: Machine, kind: CollectiveKind, nbytes: float, axes: tuple[int, ...]) -> float:
    """Seconds of one collective with the copies in and out of its flat buffer (a gather casts its own piece first)."""
    span = machine.span(axes)
    if span.size == 1:
        return 0.0
    copied = 2 * nbytes * (1 + 1 / span.size) if kind == "all_gather" else 1.5 * nbytes
    seconds = collective_seconds(machine.hardware, kind, max(nbytes, LEAST_BYTES), span)
    return seconds + bandwidth_seconds(machine.hardware, ENDLESS) * copied / ENDLESS


def group_wire_bytes(numel: int, machine: Machine, storage: Storage, root: bool) -> dict[CollectiveKind, int]:
    """Bytes that one rank sends a step for one group, by kind of collective."""
    ranks, steps = machine.span(storage.sharded).size, storage.accumulation
    copies = machine.span(machine.replicated(storage.sharded)).size
    found: dict[CollectiveKind, int] = {}
    if ranks > 1:
        gathers = {3: steps * (1 if root else 2), 2: 1, 1: 1}[storage.zero]
        found["all_gather"] = gathers * wire_bytes("all_gather", storage.itemsize * numel, ranks)
        found["reduce_scatter"] = (1 if storage.zero == 1 else steps) * wire_bytes("reduce_scatter", FP32 * numel, ranks)
    if copies > 1:
        found["all_reduce"] = wire_bytes("all_reduce", FP32 * numel // ranks, copies)
    return found
