"""The plan as data: every choice laid over one graph, ready to be priced, printed and emitted.

`realize` turns the solver's `Decisions` into a `Plan` for a graph: the layouts of every value, the reshards in front of every cluster,
names for the mesh axes. It works for any graph of the same structure, so a plan can be laid over a shrunken model and proved there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from seqloom.capture.documents import MAGI
from seqloom.plan.clusters import Cluster
from seqloom.plan.modes import KEEP, Counts, scaled
from seqloom.plan.placement import Layout, Move, reshard_path
from seqloom.plan.price import Machine, Price, move_seconds, price
from seqloom.plan.regions import OUTER, Region, Regions
from seqloom.plan.segments import Segment
from seqloom.plan.solver import Decisions
from seqloom.plan.space import Strategy, strategies, with_constants
from seqloom.plan.storage import Storage


@dataclass(frozen=True)
class Reshard:
    """A value brought from one layout to another, with seconds of forward and backward."""

    value: str
    src: Layout
    dst: Layout
    moves: tuple[Move, ...]
    forward_s: float
    backward_s: float


@dataclass(frozen=True)
class PlannedCluster:
    """A cluster, its strategy and price, and the reshards that bring its inputs into place."""

    cluster: Cluster
    strategy: Strategy
    price: Price
    reshards: tuple[Reshard, ...]


@dataclass(frozen=True)
class PlannedSegment:
    """A segment of a block (or the whole outer graph): its clusters in order, the reshards of values that leave the block, and the modes
    of its layers in layer order. `index` is None for the outer graph.
    """

    segment: Segment
    index: int | None
    clusters: tuple[PlannedCluster, ...]
    leaving: tuple[Reshard, ...]
    modes: Counts


@dataclass(frozen=True)
class PlannedRegion:
    """One region. `layouts[value]` is where a value lies when it is made, or enters the region."""

    region: Region
    segments: tuple[PlannedSegment, ...]
    layouts: Mapping[str, Layout]

    @property
    def clusters(self) -> list[PlannedCluster]:
        """All clusters in execution order."""
        return [cluster for segment in self.segments for cluster in segment.clusters]

    def parameter_layouts(self) -> dict[str, Layout]:
        """Layout of every parameter by value name."""
        return {
            name: planned.strategy.layouts[name]
            for planned in self.clusters
            for name in planned.cluster.inputs
            if self.region.graph.values[name].kind == "parameter"
        }


@dataclass(frozen=True)
class Plan:
    """A plan. `mesh` maps axis names to sizes, outer to inner; `entering[value]` are reshards of outer values that enter blocks."""

    mesh: Mapping[str, int]
    machine: Machine
    storage: Storage
    regions: Mapping[str, PlannedRegion]
    entering: Mapping[str, tuple[Reshard, ...]]
    decisions: Decisions

    @property
    def documents(self) -> tuple[int, ...]:
        """Lengths of the documents of a typical row, within which attention stays; () where it is plain."""
        nodes = (node for planned in self.regions.values() for part in planned.clusters for node in part.cluster.nodes)
        return next((dict(node.kwargs)["documents"] for node in nodes if node.op == MAGI), ())

    @property
    def outer(self) -> PlannedRegion:
        """The graph around the blocks."""
        return self.regions[OUTER]

    @property
    def axis_names(self) -> tuple[str, ...]:
        """Names of the plan axes, outer to inner."""
        return tuple(self.mesh)


class PlanMismatch(Exception):
    """Decisions laid over a graph of another structure or over sizes that do not divide."""


def realize(regions: Regions, decisions: Decisions, machine: Machine) -> Plan:
    """Lay decisions over a graph. Raises `PlanMismatch` where a decision is not a strategy of the cluster it is meant for."""
    planned = {key: _region(regions, region, decisions, machine) for key, region in regions.parts.items()}
    entering = _entering(regions, planned[OUTER], decisions, machine)
    return Plan(_axis_names(planned, machine), machine, decisions.storage, planned, entering, decisions)


def _entering(regions: Regions, outer: PlannedRegion, decisions: Decisions, machine: Machine) -> dict[str, tuple[Reshard, ...]]:
    """Reshards of outer values that enter blocks: one for each layout in which some block takes the value."""
    entering: dict[str, tuple[Reshard, ...]] = {}
    graph, slot_of = regions.graph, regions.slot_of
    for node in graph.nodes:
        if not node.is_block:
            continue
        for name, inner in zip(node.inputs, graph.blocks[node.block].inputs, strict=True):
            if (OUTER, name) not in slot_of:
                src, dst = outer.layouts[name], decisions.slots[slot_of[node.block, inner]]
                found = entering.setdefault(name, ())
                if src != dst and all(reshard.dst != dst for reshard in found):
                    entering[name] = (*found, reshard_between(outer.region, name, src, dst, machine))
    return entering


def _region(regions: Regions, region: Region, decisions: Decisions, machine: Machine) -> PlannedRegion:
    chosen = [_strategy(region, i, part, decisions, machine) for i, part in enumerate(region.parts)]
    layouts: dict[str, Layout] = {}
    for name, value in region.graph.values.items():
        slot = regions.slot_of.get((region.key, name)) or (f"input/{name}" if value.kind == "input" else None)
        if slot in decisions.slots:
            layouts[name] = decisions.slots[slot]
    borders = dict(layouts)
    for part, strategy in zip(region.parts, chosen, strict=True):
        layouts.update({name: strategy.layouts[name] for name in part.outputs})
    whole = Segment("forward", 0, len(region.parts), tuple(region.graph.inputs), tuple(region.graph.outputs), False)
    spans = region.segments or (whole,)
    modes = decisions.modes[region.key] or (((KEEP, region.count),),)
    built = [
        _segment(region, i if region.segments else None, span, chosen, layouts, borders, scaled(counts, region.count), machine)
        for i, (span, counts) in enumerate(zip(spans, modes, strict=True))
    ]
    return PlannedRegion(region, tuple(built), layouts)


def _strategy(region: Region, index: int, part: Cluster, decisions: Decisions, machine: Machine) -> Strategy:
    wanted = decisions.splits[region.key][index] if index < len(decisions.splits[region.key]) else None
    for strategy in strategies(region.graph, part, region.labels, machine.axes):
        if strategy.splits == wanted:
            return replace(strategy, constants=decisions.constants[region.key][index])
    raise PlanMismatch(f"{region.key or 'model'}: {part.name} has no strategy {wanted} on a mesh of {machine.sizes}")


def _segment(
    region: Region,
    index: int | None,
    segment: Segment,
    chosen: Sequence[Strategy],
    layouts: Mapping[str, Layout],
    borders: Mapping[str, Layout],
    modes: Counts,
    machine: Machine,
) -> PlannedSegment:
    present: set[tuple[str, Layout]] = set()
    clusters = []
    for position in range(segment.start, segment.stop):
        part, strategy = with_constants(region.parts[position], chosen[position].constants), chosen[position]
        reshards = []
        for name in part.inputs:
            wanted = strategy.layouts[name]
            if region.graph.values[name].kind in ("activation", "input") and layouts[name] != wanted and (name, wanted) not in present:
                reshards.append(reshard_between(region, name, layouts[name], wanted, machine))
                present.add((name, wanted))
        clusters.append(PlannedCluster(part, strategy, price(region.graph, part, strategy, machine), tuple(reshards)))
    leaving = [
        reshard_between(region, name, layouts[name], borders[name], machine)
        for name in segment.outputs
        if name in region.graph.outputs and name in borders and layouts[name] != borders[name] and (name, borders[name]) not in present
    ]
    return PlannedSegment(segment, index, tuple(clusters), tuple(leaving), modes)


def reshard_between(region: Region, name: str, src: Layout, dst: Layout, machine: Machine) -> Reshard:
    """The cheapest reshard of a value. Raises `PlanMismatch` where there is none."""
    value = region.graph.values[name]

    def cost(shape: tuple[int, ...], before: Layout, move: Move) -> float:
        return sum(move_seconds(value, before, move, machine)) + 1e-9

    found = reshard_path(value.shape, src, dst, machine.sizes, cost)
    if found is None:
        raise PlanMismatch(f"{name} can not go from {src} to {dst}")
    forward = backward = 0.0
    before = src
    for move in found[1]:
        seconds = move_seconds(value, before, move, machine)
        forward, backward, before = forward + seconds[0], backward + seconds[1], move.layout
    return Reshard(name, src, dst, found[1], forward, backward)


def _axis_names(planned: Mapping[str, PlannedRegion], machine: Machine) -> dict[str, int]:
    """Name each axis for what it splits: `tp` weights, `dp_shard` the batch, `sp` the sequence."""
    names: dict[str, int] = {}
    for index, axis in enumerate(machine.axes):
        base = "tp" if axis.role == "split" else ("dp_shard" if _splits_batch(planned, index) else "sp")
        name = base if base not in names else f"{base}{sum(n.startswith(base) for n in names) + 1}"
        names[name] = axis.size
    return names


def _splits_batch(planned: Mapping[str, PlannedRegion], axis: int) -> bool:
    for part in planned.values():
        for cluster in part.clusters:
            for name, layout in cluster.strategy.layouts.items():
                kind = part.region.graph.values[name].kind
                if kind == "activation" and layout[axis].kind == "S" and part.region.labels[name][layout[axis].dim] == "b":
                    return True
    return False
