"""What is alive on one rank at every point of a step: after each layer's forward, while each layer's backward runs, at the end.

Role in the pipeline: after `realize`. The solver bounds these figures (`seqloom/plan/memory.py`); here they are added up layer by layer for
the plan that was chosen, by part:

  states       masters and Adam's moments
  gathered     parameters as compute sees them: kept gathered, or in flight around the layer at work
  gradients    reduced ones that have piled up, unreduced ones on their way
  activations  what earlier layers keep for backward
  working      the largest cluster's gradients and temporaries, and what its segment brings back
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

from seqloom.plan.memory import whole_inputs
from seqloom.plan.modes import HOST, Mode, kept_matmuls, mode_of_layer
from seqloom.plan.placement import Layout, local_numel, local_shape
from seqloom.plan.plan import Plan, PlannedRegion, PlannedSegment
from seqloom.plan.price import kept_value
from seqloom.plan.regions import OUTER
from seqloom.plan.storage import GroupCost, group_cost

PARTS = ("states", "gathered", "gradients", "activations", "working")
Key = tuple[str, Layout]  # a storage: a value in a layout


@dataclass(frozen=True)
class Point:
    """One point of a step: bytes by part."""

    at: str
    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        """Bytes alive."""
        return sum(self.parts.values())


def liveness(plan: Plan) -> tuple[Point, ...]:
    """Points of the last micro-batch of a step, in order of time."""
    walk = _Walk(plan)
    return (*walk.forward(), *walk.backward(), walk.end())


def group_of(plan: Plan, planned: PlannedRegion) -> GroupCost:
    """Storage cost of one call of a region."""
    return group_cost(float(parameter_numel(plan, planned)), plan.machine, plan.storage, planned.region.key == OUTER)


def parameter_numel(plan: Plan, planned: PlannedRegion) -> int:
    """Elements of a region's parameters on one rank, before storage is sharded."""
    values, sizes = planned.region.graph.values, plan.machine.sizes
    return sum(prod(local_shape(values[name].shape, layout, sizes)) for name, layout in planned.parameter_layouts().items())


class _Walk:
    """The calls of a plan in order, and what each adds."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.groups = {key: group_of(plan, planned) for key, planned in plan.regions.items()}
        counts: dict[str, int] = {}
        self.calls: list[tuple[str, int]] = []
        for node in plan.outer.region.graph.nodes:
            if node.is_block:
                self.calls.append((node.block, counts.setdefault(node.block, 0)))
                counts[node.block] += 1
        self.before, self.behind = _outer_kept(plan)
        self.before += sum(_kept_once(plan, planned) for planned in plan.regions.values())
        self._kept: dict[tuple[str, tuple[Mode, ...]], float] = {}

    @cached_property
    def standing(self) -> dict[str, float]:
        parts = dict.fromkeys(PARTS, 0.0)
        for key, group in self.groups.items():
            count = self.plan.regions[key].region.count
            parts["states"] += count * group.states_bytes
            parts["gathered"] += count * group.resident_bytes
            parts["gradients"] += count * group.gradient_bytes
        return parts

    def kept(self, call: tuple[str, int]) -> float:
        """Bytes that one call keeps for backward."""
        planned = self.plan.regions[call[0]]
        modes = tuple(mode_of_layer(segment.modes, call[1]) for segment in planned.segments)
        key = (call[0], modes)
        if key not in self._kept:
            self._kept[key] = sum(_nbytes(self.plan, planned, k) for k in _kept(planned, modes))
        return self._kept[key]

    @cached_property
    def moved(self) -> list[tuple[int, float]]:
        """The calls of segments that use host memory, in order: of which block call, and the bytes that they move."""
        found = []
        for index, (key, layer) in enumerate(self.calls):
            planned = self.plan.regions[key]
            for segment in planned.segments:
                keys = moved_keys(planned, segment, mode_of_layer(segment.modes, layer))
                if keys:
                    found.append((index, sum(_nbytes(self.plan, planned, key) for key in keys)))
        return found

    def staying(self, index: int) -> float:
        """The largest call that may be on the device, although it uses host memory, while another segment of a block call is at work."""
        own = [nbytes for call, nbytes in self.moved if call == index]
        before = [nbytes for call, nbytes in self.moved if call < index]
        return max([*own, *before[-1:]], default=0.0)

    def forward(self) -> Iterator[Point]:
        alive = self.before
        for index, call in enumerate(self.calls):
            planned = self.plan.regions[call[0]]
            alive += self.kept(call)
            working = max(_working(segment, mode_of_layer(segment.modes, call[1])) for segment in planned.segments)
            staying = self.staying(index)
            yield self.point(f"forward of {_name(call)}", self.groups[call[0]].flight_gathered_bytes, 0.0, alive + staying, working)
        outer = self.groups[OUTER]
        working = max((c.price.working_bytes for c in self.plan.outer.clusters), default=0)
        gathered, gradient = outer.flight_gathered_bytes, outer.flight_gradient_bytes
        staying = self.moved[-1][1] if self.moved else 0.0
        yield self.point("head and loss", gathered, gradient, alive + self.behind + staying, working)

    def backward(self) -> Iterator[Point]:
        alive, piled = self.before + sum(self.kept(call) for call in self.calls), 0.0
        persists = self.plan.storage.accumulation > 1
        for index, call in reversed([*enumerate(self.calls)]):
            planned, group = self.plan.regions[call[0]], self.groups[call[0]]
            working = 0.0
            for segment in planned.segments:
                mode = mode_of_layer(segment.modes, call[1])
                beside = 0.0 if mode.kind in HOST else self.staying(index)
                working = max(working, beside + _transient(self.plan, planned, segment, mode))
            yield self.point(f"backward of {_name(call)}", group.flight_gathered_bytes, piled + group.flight_gradient_bytes, alive, working)
            alive -= self.kept(call)
            piled += 0.0 if persists else group.ending_bytes

    def end(self) -> Point:
        ending = sum(self.plan.regions[key].region.count * group.ending_bytes for key, group in self.groups.items())
        return self.point("end of backward", 0.0, ending, 0.0, 0.0)

    def point(self, at: str, gathered: float, gradients: float, activations: float, working: float) -> Point:
        parts = dict(self.standing)
        parts["gathered"] += gathered
        parts["gradients"] += gradients
        parts["activations"] += activations
        parts["working"] += working
        return Point(at, parts)


def _name(call: tuple[str, int]) -> str:
    return f"{call[0]} {call[1]}"


def _nbytes(plan: Plan, planned: PlannedRegion, key: Key) -> float:
    value = kept_value(planned.region.graph, key[0])
    return float(local_numel(value.shape, key[1], plan.machine.sizes) * value.dtype.itemsize)


def _common(planned: PlannedRegion) -> set[Key]:
    """Storages that are there anyhow, because all calls get the same tensor: those of `common` inputs in the layout in which they come."""
    return {(name, planned.layouts[name]) for name in planned.region.common}


def _kept_once(plan: Plan, planned: PlannedRegion) -> float:
    """Bytes of what autograd saves of the tensors that all calls get."""
    saved = {key for segment in planned.segments for key in saved_keys(planned, segment)}
    return sum(_nbytes(plan, planned, key) for key in saved & _common(planned))


def _roots(planned: PlannedRegion) -> dict[Key, Key]:
    roots: dict[Key, Key] = {}
    for cluster in planned.clusters:
        root = cluster.cluster.looks_into
        if root is not None:
            layouts = cluster.strategy.layouts
            roots.update({(name, layouts[name]): (root, layouts[root]) for name in cluster.cluster.outputs})
    return roots


def _root(roots: Mapping[Key, Key], key: Key) -> Key:
    while key in roots:
        key = roots[key]
    return key


def _kept(planned: PlannedRegion, modes: tuple[Mode, ...]) -> set[Key]:
    """Storages that one call keeps on the device for itself, each once, under a mode for each segment."""
    roots = _roots(planned)
    found: set[Key] = set()
    for segment, mode in zip(planned.segments, modes, strict=True):
        if mode.kind == "keep":
            found |= {_root(roots, key) for cluster in segment.clusters for key in cluster.price.saved}
        elif mode.kind not in HOST:
            found |= _held(planned, segment)
        if mode.kind == "selective":
            found |= {(name, planned.layouts[name]) for name in _products(planned, segment)}
    return found - _common(planned)


def _products(planned: PlannedRegion, segment: PlannedSegment) -> set[str]:
    if segment.index is None:
        return set()
    return {planned.region.parts[index].outputs[0] for index in kept_matmuls(planned.region, segment.index)}


def saved_keys(planned: PlannedRegion, segment: PlannedSegment) -> set[Key]:
    """Storages that autograd saves inside a segment."""
    roots = _roots(planned)
    return {_root(roots, key) for cluster in segment.clusters for key in cluster.price.saved}


def offloaded_bytes(plan: Plan, planned: PlannedRegion) -> float:
    """Bytes that all calls of a region send to host memory."""
    total = 0.0
    for segment in planned.segments:
        for mode, count in segment.modes:
            total += count * sum(_nbytes(plan, planned, key) for key in moved_keys(planned, segment, mode))
    return total


def moved_keys(planned: PlannedRegion, segment: PlannedSegment, mode: Mode) -> set[Key]:
    """Storages that one call of a segment sends to host memory."""
    return saved_keys(planned, segment) if mode.kind == "offload" else _held(planned, segment) if mode.kind == "spill" else set()


def _held(planned: PlannedRegion, segment: PlannedSegment) -> set[Key]:
    """Inputs of a segment that a replay starts from."""
    roots, values = _roots(planned), planned.region.graph.values
    return {_root(roots, (n, planned.layouts[n])) for n in segment.segment.inputs if values[n].requires_grad}


def _working(segment: PlannedSegment, mode: Mode) -> float:
    """Bytes that the largest cluster of a segment works with; forward and backward run the same tiles."""
    return max((cluster.price.working_bytes for cluster in segment.clusters), default=0) / mode.tiles


def _transient(plan: Plan, planned: PlannedRegion, segment: PlannedSegment, mode: Mode) -> float:
    """The largest working set of a segment's backward with what it brings back first."""
    working = _working(segment, mode)
    if mode.kind == "keep":
        return working
    keys = saved_keys(planned, segment)
    if mode.kind == "offload":
        return working + 2 * sum(_nbytes(plan, planned, key) for key in keys)
    held = _held(planned, segment)
    working += whole_inputs(mode) * sum(_nbytes(plan, planned, key) for key in held)
    if mode.kind == "spill":
        return working + sum(_nbytes(plan, planned, key) for key in keys - _common(planned)) / mode.tiles
    products = _products(planned, segment) if mode.kind == "selective" else set()
    again = [key for key in keys - held - _common(planned) if key[0] not in products]
    return working + sum(_nbytes(plan, planned, key) for key in again) / mode.tiles


def _outer_kept(plan: Plan) -> tuple[float, float]:
    """Bytes kept by the outer graph: by clusters that run before the blocks, and by those that need a block's result."""
    outer = plan.outer
    graph = outer.region.graph
    late: set[str] = set()
    for node in graph.nodes:
        if node.is_block or any(name in late for name in node.inputs):
            late.update(node.outputs)
    roots = _roots(outer)
    before: set[Key] = set()
    behind: set[Key] = set()
    for cluster in outer.clusters:
        target = behind if any(name in late for name in cluster.cluster.outputs) else before
        target.update(_root(roots, key) for key in cluster.price.saved)
    size = lambda keys: sum(_nbytes(plan, outer, key) for key in keys)  # noqa: E731
    return size(before), size(behind - before)
