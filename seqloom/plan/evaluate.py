"""What a plan will take: the time and the memory of one step, part by part.

Role in the pipeline: after `realize`. The solver's program is a model of these figures; here they are added up exactly for the plan that
was chosen, and these are the figures that are printed, checked by dry run and written to `plan.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from seqloom.cost.communication import collective_seconds
from seqloom.graph import Graph
from seqloom.plan.placement import Layout, local_shape
from seqloom.plan.plan import Plan, PlannedCluster, PlannedRegion, PlannedSegment, Reshard
from seqloom.plan.price import flops_of, kept_value, move_wire_bytes, view_root
from seqloom.plan.regions import OUTER
from seqloom.plan.storage import GroupCost, group_cost, group_wire_bytes

GIB = 2.0**30


@dataclass(frozen=True)
class Evaluation:
    """Predicted figures of one step of one scale unit; memory in bytes on one rank, time in seconds."""

    step_s: float
    time: Mapping[str, float]
    memory: Mapping[str, float]
    wire_bytes: Mapping[str, int]
    flops: float

    @property
    def peak_bytes(self) -> float:
        """Predicted peak of one rank."""
        return sum(self.memory.values())


def evaluate(plan: Plan) -> Evaluation:
    """Time, memory and traffic of one step (all its micro-batches)."""
    accumulation = plan.storage.accumulation
    time = dict.fromkeys(("forward", "backward", "recompute", "reshard", "parameters_exposed", "optimizer"), 0.0)
    for key, planned in plan.regions.items():
        for part, seconds in _region_time(plan, key, planned).items():
            time[part] += accumulation * planned.region.count * seconds
    for reshards in plan.entering.values():
        time["reshard"] += accumulation * sum(r.forward_s + r.backward_s for r in reshards)
    memory = _memory(plan)
    return Evaluation(sum(time.values()), time, memory, _wire_bytes(plan), _flops(plan) * accumulation)


def _region_time(plan: Plan, key: str, planned: PlannedRegion) -> dict[str, float]:
    time = dict.fromkeys(("forward", "backward", "recompute", "reshard", "parameters_exposed", "optimizer"), 0.0)
    for segment in planned.segments:
        reshards = [*segment.leaving, *(r for cluster in segment.clusters for r in cluster.reshards)]
        forward = sum(c.price.forward_s for c in segment.clusters)
        time["forward"] += forward
        time["backward"] += sum(c.price.backward_s for c in segment.clusters)
        time["reshard"] += sum(r.forward_s + r.backward_s for r in reshards)
        time["recompute"] += (forward + sum(r.forward_s for r in reshards)) if segment.recompute else 0.0
    group = _group(plan, key, planned)
    compute = time["forward"], time["backward"] + time["recompute"]
    time["parameters_exposed"] = max(0.0, group.forward_s - compute[0]) + max(0.0, group.backward_s - compute[1])
    time["reshard"] += _split_axis_gradients(plan, planned)
    time["optimizer"] = group.optimizer_s
    return time


def _group(plan: Plan, key: str, planned: PlannedRegion) -> GroupCost:
    numel = sum(prod(_local(plan, planned, name, layout)) for name, layout in planned.parameter_layouts().items())
    return group_cost(numel, plan.machine, plan.storage, key == OUTER)


def _local(plan: Plan, planned: PlannedRegion, name: str, layout: Layout) -> tuple[int, ...]:
    return local_shape(planned.region.graph.values[name].shape, layout, plan.machine.sizes)


def _split_axis_gradients(plan: Plan, planned: PlannedRegion) -> float:
    seconds = 0.0
    for name, layout in planned.parameter_layouts().items():
        nbytes = prod(_local(plan, planned, name, layout)) * plan.storage.itemsize
        for index, axis in enumerate(plan.machine.axes):
            if axis.role == "split" and layout[index].kind == "B":
                seconds += collective_seconds(plan.machine.hardware, "all_reduce", nbytes, plan.machine.span((index,)))
    return seconds


def _memory(plan: Plan) -> dict[str, float]:
    """Bytes on one rank at the peak, by part: stored state, what stays gathered, what is kept for backward, the largest backward.

    The peak is where the backward of some segment begins with everything kept, or at the end, when all gradients are there instead.
    """
    memory = {"states": 0.0, "gathered": 0.0, "activations": 0.0, "working": 0.0}
    working = ending = 0.0
    for key, planned in plan.regions.items():
        group = _group(plan, key, planned)
        memory["states"] += planned.region.count * group.stored_bytes
        memory["gathered"] += planned.region.count * group.resident_bytes
        ending += planned.region.count * group.ending_bytes
        memory["activations"] += planned.region.count * sum(_kept(plan, planned).values())
        for segment in planned.segments:
            brought_back = sum(sum(c.price.saved.values()) for c in segment.clusters) if segment.recompute else 0
            largest = max((c.price.working_bytes for c in segment.clusters), default=0)
            working = max(working, group.in_flight_bytes + brought_back + largest)
    if ending > memory["activations"] + working:
        return {**memory, "activations": 0.0, "working": ending}
    return {**memory, "working": working}


def _kept(plan: Plan, planned: PlannedRegion) -> dict[tuple[str, Layout], float]:
    """Bytes kept for backward by one call of a region, each storage once."""
    graph = planned.region.graph
    roots: dict[tuple[str, Layout], tuple[str, Layout]] = {}
    for cluster in planned.clusters:
        root = view_root(graph, cluster.cluster)
        if root is not None:
            layouts = cluster.strategy.layouts
            roots.update({(name, layouts[name]): (root, layouts[root]) for name in cluster.cluster.outputs})
    kept: dict[tuple[str, Layout], float] = {}
    for segment in planned.segments:
        for key in _needs(planned, segment):
            while key in roots:
                key = roots[key]
            value = kept_value(graph, key[0])
            kept[key] = float(prod(local_shape(value.shape, key[1], plan.machine.sizes)) * value.dtype.itemsize)
    return kept


def _needs(planned: PlannedRegion, segment: PlannedSegment) -> list[tuple[str, Layout]]:
    if segment.recompute:
        values = planned.region.graph.values
        return [(name, planned.layouts[name]) for name in segment.segment.inputs if values[name].requires_grad]
    return [key for cluster in segment.clusters for key in cluster.price.saved]


def _wire_bytes(plan: Plan) -> dict[str, int]:
    """Bytes that one rank sends in a step, by collective."""
    total: dict[str, int] = {}

    def add(found: Mapping[str, int], times: int) -> None:
        for kind, count in found.items():
            total[kind] = total.get(kind, 0) + times * count

    for key, planned in plan.regions.items():
        numel = sum(prod(_local(plan, planned, name, layout)) for name, layout in planned.parameter_layouts().items())
        add(group_wire_bytes(numel, plan.machine, plan.storage, key == OUTER), planned.region.count)
        for reshard in _reshards(planned):
            add(reshard_wire_bytes(plan, planned.region.graph, reshard), planned.region.count * plan.storage.accumulation)
    for reshards in plan.entering.values():
        for reshard in reshards:
            add(reshard_wire_bytes(plan, plan.outer.region.graph, reshard), plan.storage.accumulation)
    return {kind: count for kind, count in sorted(total.items()) if count}


def _reshards(planned: PlannedRegion) -> list[Reshard]:
    return [r for s in planned.segments for r in (*s.leaving, *(r for c in s.clusters for r in c.reshards))]


def reshard_wire_bytes(plan: Plan, graph: Graph, reshard: Reshard) -> dict[str, int]:
    """Bytes that one rank sends for one reshard, forward and backward, by collective."""
    total: dict[str, int] = {}
    before = reshard.src
    for move in reshard.moves:
        for kind, count in move_wire_bytes(graph.values[reshard.value], before, move, plan.machine).items():
            total[kind] = total.get(kind, 0) + count
        before = move.layout
    return total


def _flops(plan: Plan) -> float:
    """Forward FLOPs of the whole model for one micro-batch of one scale unit, as the operators count them (causal attention halved)."""
    return sum(planned.region.count * _cluster_flops(cluster) for planned in plan.regions.values() for cluster in planned.clusters)


def _cluster_flops(cluster: PlannedCluster) -> float:
    return sum(flops_of(node) for node in cluster.cluster.nodes)
