"""Where parameters, gradients and optimizer state live between uses: ZeRO 0, 1 and 3, in bytes and seconds.

Follows ZeRO (Rajbhandari et al. 2020, section 5) as FSDP2 does it: fp32 masters, Adam's two moments and the reduced gradients are stored
together; the gathered parameters and the gradients before reduction have the compute dtype.

| ZeRO | stored per rank | gathered | reduced |
|---|---|---|---|
| 0 | everything whole | never | all-reduce once a step |
| 1 | 1/n of everything | once a step, kept until its end | reduce-scatter once a step |
| 3 | 1/n of everything | per block, in forward and again in backward | reduce-scatter per micro-batch |

n is the size of `dp` times the `sum` axes. A parameter that a `split` axis splits counts with its local piece.
"""

from __future__ import annotations

from dataclasses import dataclass

from seqloom.cost.communication import CollectiveKind, collective_seconds, wire_bytes
from seqloom.cost.compute import bandwidth_seconds
from seqloom.plan.price import Machine

STATE_BYTES = 12  # fp32 master 4, Adam's moments 8
FP32 = 4
OPTIMIZER_TRAFFIC = 28  # bytes an element: AdamW reads master, gradient and moments, writes master and moments
ZERO_LEVELS = (3, 1, 0)


@dataclass(frozen=True)
class Storage:
    """One choice for the whole model: the ZeRO level, the bytes of an element in compute, and micro-batches a step."""

    zero: int
    itemsize: int
    accumulation: int


@dataclass(frozen=True)
class GroupCost:
    """One FSDP group (a block, or the rest of the model) per micro-batch: bytes on one rank, seconds that may hide behind compute."""

    stored_bytes: float  # masters and moments, and reduced gradients where they outlive a micro-batch
    resident_bytes: float  # gathered parameters and unreduced gradients that stay for the whole step
    in_flight_bytes: float  # what comes and goes while the group's backward runs
    ending_bytes: float  # what the end of backward adds, when every activation is gone: gradients, the root's reduction
    forward_s: float
    backward_s: float
    optimizer_s: float


def group_cost(numel: float, machine: Machine, storage: Storage, root: bool) -> GroupCost:
    """Cost of storing `numel` elements (one rank's piece after tensor parallelism) under a ZeRO level. Linear in `numel`."""
    span = machine.sum_span()
    ranks = span.size if storage.zero else 1
    gradients = FP32 * numel / ranks
    persists = storage.accumulation > 1
    stored = STATE_BYTES * numel / ranks + (gradients if persists else 0.0)
    gathered, reduced = storage.itemsize * numel, FP32 * numel
    stays = storage.zero != 3 or root
    delayed = FP32 * numel if storage.zero != 3 and storage.accumulation > 1 else 0.0
    resident = (gathered if stays else 0.0) + delayed
    # The root's gradients wait for the end; a block's are reduced while the next block is gathered and differentiated.
    in_flight = gathered if root else (0.0 if stays else 2 * gathered) + gathered + reduced + gradients
    ending = (0.0 if persists else gradients) + (gathered + reduced if root else 0.0)
    forward, backward = _seconds(gathered, reduced, machine, storage, root)
    optimizer = bandwidth_seconds(machine.hardware, OPTIMIZER_TRAFFIC * numel / ranks) / storage.accumulation
    return GroupCost(stored, resident, in_flight, ending, forward, backward, optimizer)


def _seconds(gathered: float, reduced: float, machine: Machine, storage: Storage, root: bool) -> tuple[float, float]:
    span, hardware = machine.sum_span(), machine.hardware
    gather = collective_seconds(hardware, "all_gather", gathered, span)
    scatter = collective_seconds(hardware, "reduce_scatter", reduced, span)
    if storage.zero == 3:
        return gather, scatter + (0.0 if root else gather)
    if storage.zero == 1:
        return gather / storage.accumulation, scatter / storage.accumulation
    return 0.0, collective_seconds(hardware, "all_reduce", reduced, span) / storage.accumulation


def group_wire_bytes(numel: int, machine: Machine, storage: Storage, root: bool) -> dict[CollectiveKind, int]:
    """Bytes that one rank sends a step for one group, by kind of collective."""
    ranks, steps = machine.sum_span().size, storage.accumulation
    gathered = wire_bytes("all_gather", storage.itemsize * numel, ranks)
    reduced = wire_bytes("reduce_scatter", FP32 * numel, ranks)
    if storage.zero == 3:
        return {"all_gather": steps * gathered * (1 if root else 2), "reduce_scatter": steps * reduced}
    if storage.zero == 1:
        return {"all_gather": gathered, "reduce_scatter": reduced}
    return {"all_reduce": wire_bytes("all_reduce", FP32 * numel, ranks)}
