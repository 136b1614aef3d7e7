"""What a plan will take: the time and the memory of one step, part by part.

Role in the pipeline: after `realize`. The solver's program is a model of these figures; here they are added up exactly for the plan that
was chosen, and these are the figures that are printed, checked by dry run and written to `plan.json`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

from seqloom.cost.communication import wire_bytes
from seqloom.cost.compute import exposed_seconds, host_seconds
from seqloom.graph import Graph
from seqloom.plan.liveness import Point, group_of, liveness, offloaded_bytes, parameter_numel
from seqloom.plan.memory import copy_seconds
from seqloom.plan.modes import reached, replays
from seqloom.plan.placement import local_shape
from seqloom.plan.plan import Plan, PlannedCluster, PlannedRegion, PlannedSegment, Reshard
from seqloom.plan.price import backward_flops, exchange, flops_of, move_wire_bytes, rank_flops
from seqloom.plan.problem import extra_seconds, split_axis_gradients
from seqloom.plan.regions import OUTER
from seqloom.plan.storage import group_wire_bytes

GIB = 2.0**30
TIMES = ("forward", "backward", "recompute", "reshard", "parameters_exposed", "host_exposed", "optimizer")


@dataclass(frozen=True)
class Evaluation:
    """Predicted figures of one step of one scale unit; memory in bytes on one rank, time in seconds.

    `memory` are the parts at the peak, `points` all points of a step; `flops` the model's forward FLOPs, `rank_flops` what the busiest rank
    executes, by phase; `host_bytes` what lies in host memory at most.
    """

    step_s: float
    time: Mapping[str, float]
    memory: Mapping[str, float]
    points: tuple[Point, ...]
    wire_bytes: Mapping[str, int]
    flops: float
    rank_flops: Mapping[str, float]
    host_bytes: float

    @property
    def peak_bytes(self) -> float:
        """Predicted peak of one rank."""
        return sum(self.memory.values())


def evaluate(plan: Plan) -> Evaluation:
    """Time, memory and traffic of one step (all its micro-batches)."""
    accumulation = plan.storage.accumulation
    time = dict.fromkeys(TIMES, 0.0)
    for planned in plan.regions.values():
        for part, seconds in region_time(plan, planned).items():
            time[part] += accumulation * seconds
    for reshards in plan.entering.values():
        time["reshard"] += accumulation * sum(r.forward_s + r.backward_s for r in reshards)
    points = liveness(plan)
    peak = max(points, key=lambda point: point.total)
    host = sum(offloaded_bytes(plan, planned) for planned in plan.regions.values())
    flops = _flops(plan) * accumulation
    return Evaluation(sum(time.values()), time, dict(peak.parts), points, _wire_bytes(plan), flops, _rank_flops(plan), host)


def region_time(plan: Plan, planned: PlannedRegion) -> dict[str, float]:
    """Seconds of all calls of a region in one micro-batch, by part."""
    count, hardware = planned.region.count, plan.machine.hardware
    time = dict.fromkeys(TIMES, 0.0)
    for segment in planned.segments:
        reshards = [*segment.leaving, *(r for cluster in segment.clusters for r in cluster.reshards)]
        time["forward"] += count * sum(c.price.forward_s for c in segment.clusters)
        time["backward"] += count * sum(c.price.backward_s for c in segment.clusters)
        time["reshard"] += count * sum(r.forward_s + r.backward_s for r in reshards)
        time["recompute"] += replay_seconds(plan, planned, segment)
    group, sent = group_of(plan, planned), offloaded_bytes(plan, planned)
    compute = time["forward"], time["backward"] + time["recompute"]
    for traffic, beside in zip((group.forward_s, group.backward_s), compute, strict=True):
        time["parameters_exposed"] += exposed_seconds(hardware, count * traffic, beside) if parameter_numel(plan, planned) else 0.0
        time["host_exposed"] += max(0.0, host_seconds(hardware, sent) - beside)
    time["host_exposed"] += copy_seconds(hardware, sent)
    for name, layout in planned.parameter_layouts().items():
        nbytes = prod(local_shape(planned.region.graph.values[name].shape, layout, plan.machine.sizes)) * plan.storage.itemsize
        time["reshard"] += count * sum(split_axis_gradients(plan.machine, layout, nbytes))
    time["optimizer"] = count * group.optimizer_s
    return time


def replay_seconds(plan: Plan, planned: PlannedRegion, segment: PlannedSegment) -> float:
    """Seconds that the modes of a segment add, over all its layers."""
    if segment.index is None:
        return 0.0
    seconds, start = 0.0, segment.segment.start
    for mode, layers in segment.modes:
        for offset, c in enumerate(segment.clusters):
            seconds += layers * extra_seconds(plan.machine, planned.region, start + offset, c.strategy, c.price, mode)
    return seconds + sum(times * reshard.forward_s for reshard, times in _again(segment, planned))


def _rank_flops(plan: Plan) -> dict[str, float]:
    """FLOPs that the busiest rank executes in a step: forward, backward, and what is computed again."""
    total = dict.fromkeys(("forward", "backward", "recompute"), 0.0)
    for planned in plan.regions.values():
        for segment in planned.segments:
            for offset, c in enumerate(segment.clusters):
                forward = rank_flops(c.cluster, c.strategy, plan.machine.sizes) * plan.storage.accumulation
                total["forward"] += planned.region.count * forward
                total["backward"] += planned.region.count * backward_flops(c.cluster, forward)
                total["recompute"] += forward * _replays(planned, segment, offset)
    return total


def _replays(planned: PlannedRegion, segment: PlannedSegment, offset: int) -> int:
    """In how many layers a cluster is computed again."""
    return sum(layers for mode, layers in segment.modes if replays(planned.region, segment.segment.start + offset, mode))


def _wire_bytes(plan: Plan) -> dict[str, int]:
    """Bytes that one rank sends in a step, by collective."""
    total: dict[str, int] = {}

    def add(found: Mapping[str, int], times: int) -> None:
        for kind, count in found.items():
            total[kind] = total.get(kind, 0) + times * count

    for key, planned in plan.regions.items():
        add(group_wire_bytes(parameter_numel(plan, planned), plan.machine, plan.storage, key == OUTER), planned.region.count)
        for found in _exchanges(plan, planned):
            add(found, planned.region.count * plan.storage.accumulation)
        for reshard in _reshards(planned):
            add(reshard_wire_bytes(plan, planned.region.graph, reshard), planned.region.count * plan.storage.accumulation)
        for reshard, times in (pair for segment in planned.segments for pair in _again(segment, planned)):
            add(reshard_wire_bytes(plan, planned.region.graph, reshard, forward_only=True), times * plan.storage.accumulation)
        add(_split_axis_bytes(plan, planned), planned.region.count * plan.storage.accumulation)
    for reshards in plan.entering.values():
        for reshard in reshards:
            add(reshard_wire_bytes(plan, plan.outer.region.graph, reshard), plan.storage.accumulation)
    return {kind: count for kind, count in sorted(total.items()) if count}


def _exchanges(plan: Plan, planned: PlannedRegion) -> Iterator[dict[str, int]]:
    """Bytes on the wire inside operators that split their sequence themselves, forward and backward."""
    for c in planned.clusters:
        travel = exchange(planned.region.graph, c.cluster, c.strategy, plan.machine)
        if travel is not None:
            yield {"all_to_all": travel.rows_bytes + travel.backward_bytes}


def _reshards(planned: PlannedRegion) -> list[Reshard]:
    return [r for s in planned.segments for r in (*s.leaving, *(r for c in s.clusters for r in c.reshards))]


def _again(segment: PlannedSegment, planned: PlannedRegion) -> Iterator[tuple[Reshard, int]]:
    """Reshards that the replays of a segment repeat, with the number of layers that do."""
    if segment.index is None:
        return
    counts = {kind: sum(layers for mode, layers in segment.modes if mode.kind == kind) for kind in ("recompute", "selective", "spill")}
    again = reached(planned.region, segment.index)
    for offset, cluster in enumerate(segment.clusters):
        times = sum(counts.values()) if segment.segment.start + offset in again else counts["spill"]
        yield from ((reshard, times) for reshard in cluster.reshards if times)
    yield from ((reshard, counts["spill"]) for reshard in segment.leaving if counts["spill"])


def _split_axis_bytes(plan: Plan, planned: PlannedRegion) -> dict[str, int]:
    """Bytes of the all-reduces of gradients over `split` axes on which their parameters live whole."""
    total = 0
    for name, layout in planned.parameter_layouts().items():
        nbytes = prod(local_shape(planned.region.graph.values[name].shape, layout, plan.machine.sizes)) * plan.storage.itemsize
        for index, axis in enumerate(plan.machine.axes):
            if axis.role == "split" and layout[index].kind == "B":
                total += wire_bytes("all_reduce", nbytes, axis.size)
    return {"all_reduce": total}


def reshard_wire_bytes(plan: Plan, graph: Graph, reshard: Reshard, forward_only: bool = False) -> dict[str, int]:
    """Bytes that one rank sends for one reshard, forward and backward, by collective."""
    total: dict[str, int] = {}
    before = reshard.src
    for move in reshard.moves:
        for kind, count in move_wire_bytes(graph.values[reshard.value], before, move, plan.machine, forward_only).items():
            total[kind] = total.get(kind, 0) + count
        before = move.layout
    return total


def _flops(plan: Plan) -> float:
    """Forward FLOPs of the whole model for one micro-batch of one scale unit, as the operators count them (causal attention halved)."""
    return sum(planned.region.count * _cluster_flops(cluster) for planned in plan.regions.values() for cluster in planned.clusters)


def _cluster_flops(cluster: PlannedCluster) -> float:
    return sum(flops_of(node) for node in cluster.cluster.nodes)
