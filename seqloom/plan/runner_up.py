"""What the second best strategy of an operator would have cost: its runner-up.

Role in the pipeline: after `realize`, for `plan.json`. One cluster changes its strategy and everything else stays: the strategies of the
others, the modes of its segment, the layouts at block borders, the storage. What then differs in `evaluate` is added up here, not the
whole: the cluster's own seconds with its replays, the reshards of its inputs and outputs, and what its compute no longer hides.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from seqloom.cost.compute import exposed_seconds, host_seconds
from seqloom.plan.clusters import Cluster
from seqloom.plan.evaluate import region_time
from seqloom.plan.liveness import liveness, offloaded_bytes, parameter_numel
from seqloom.plan.memory import copy_seconds
from seqloom.plan.modes import kept_matmuls, reached
from seqloom.plan.placement import Layout, local_numel
from seqloom.plan.plan import Plan, PlanMismatch, PlannedCluster, PlannedRegion, Reshard, reshard_between
from seqloom.plan.price import Price, price
from seqloom.plan.problem import extra_seconds, split_axis_gradients
from seqloom.plan.regions import OUTER, Region
from seqloom.plan.space import Strategy, strategies
from seqloom.plan.storage import group_cost

BORDER = -1  # the place of a consumer that is no cluster: the values that enter blocks


@dataclass(frozen=True)
class RunnerUp:
    """The cheapest other split of a cluster: letters by axis, seconds that it would add to a step, the peak in bytes it would lead to
    and whether that fits.
    """

    letters: Mapping[str, str]
    extra_s: float
    peak_bytes: float
    fits: bool


def runners_up(plan: Plan) -> dict[tuple[str, int], RunnerUp]:
    """(region, index of the cluster) -> its runner-up; clusters that could run in no other way are left out."""
    found = {}
    for key, planned in plan.regions.items():
        board = _Board(plan, planned)
        for index in range(len(planned.clusters)):
            rivals = sorted(board.rivals(index), key=lambda rival: rival[0])
            if rivals:
                found[key, index] = board.runner_up(index, *rivals[0])
    return found


def split_letters(plan: Plan, region: Region, cluster: Cluster, strategy: Strategy) -> dict[str, str]:
    """Axis -> the letter of the dimension that a strategy splits there, "whole" where the cluster runs whole."""
    return {name: _letter(region, cluster, split) for name, split in zip(plan.mesh, strategy.splits, strict=True)}


def _letter(region: Region, cluster: Cluster, split: str) -> str:
    for option in cluster.classes:
        if option.name == split:
            letters = [region.labels[name][dim] for name, dim in option.dims.items()]
            return next((letter for letter in letters if letter in ("b", "l")), letters[-1])
    return "whole"


class _Want(NamedTuple):
    """A consumer of a value: the segment in which it is resharded (or `BORDER`), the layout, the cluster (or `BORDER`)."""

    place: int
    layout: Layout
    cluster: int


class _Sums(NamedTuple):
    """What a region's time follows from: seconds of all its calls, elements of its parameters, bytes sent to the host."""

    forward: float
    backward: float
    reshard: float
    numel: int
    sent: float


class _Board:
    """One region of a plan, ready for one cluster after the other to be changed in it."""

    def __init__(self, plan: Plan, planned: PlannedRegion) -> None:
        self.plan, self.planned, self.region = plan, planned, planned.region
        self.values, self.machine, self.count = planned.region.graph.values, plan.machine, planned.region.count
        self.place_of = [place for place, segment in enumerate(planned.segments) for _ in segment.clusters]
        self.made_by = {name: i for i, cluster in enumerate(planned.clusters) for name in cluster.cluster.outputs}
        self._reshards: dict[tuple[str, Layout, Layout], Reshard | None] = {}

    # --- who wants what ------------------------------------------------------------------------------------------------------

    @cached_property
    def wants(self) -> dict[str, list[_Want]]:
        """Consumers of every activation and input, as they are planned."""
        found: dict[str, list[_Want]] = {}
        for index, cluster in enumerate(self.planned.clusters):
            for name in self._moving(cluster.cluster):
                found.setdefault(name, []).append(_Want(self.place_of[index], cluster.strategy.layouts[name], index))
        for name, layout in self._borders():
            place = BORDER if self.region.key == OUTER else self.place_of[self.made_by[name]]
            found.setdefault(name, []).append(_Want(place, layout, BORDER))
        return found

    def _moving(self, cluster: Cluster) -> list[str]:
        return [name for name in cluster.inputs if self.values[name].kind in ("activation", "input")]

    def _borders(self) -> Iterator[tuple[str, Layout]]:
        """Values made here that a border wants in a layout: outer values that enter blocks, results of a block."""
        outer, regions = self.plan.outer, self.plan.regions
        calls = [node for node in outer.region.graph.nodes if node.is_block]
        if self.region.key == OUTER:
            for node in calls:
                inputs = outer.region.graph.blocks[node.block].inputs
                pairs = zip(node.inputs, inputs, strict=True)
                yield from ((name, regions[node.block].layouts[inner]) for name, inner in pairs if name in self.made_by)
        else:
            call = next(node for node in calls if node.block == self.region.key)
            pairs = zip(call.outputs, self.region.graph.outputs, strict=True)
            yield from ((inner, outer.layouts[name]) for name, inner in pairs if inner in self.made_by)

    # --- seconds -------------------------------------------------------------------------------------------------------------

    def rivals(self, index: int) -> Iterator[tuple[float, int, Strategy, Price]]:
        """(seconds added to a step, order, strategy, price) of every other split that works where everything else stays."""
        planned = self.planned.clusters[index]
        cluster, chosen = planned.cluster, planned.strategy
        mine = split_letters(self.plan, self.region, cluster, chosen)
        for order, found in enumerate(strategies(self.region.graph, cluster, self.region.labels, self.machine.axes)):
            other = replace(found, constants=chosen.constants)
            if split_letters(self.plan, self.region, cluster, other) != mine and self._allowed(index, other):
                cost = price(self.region.graph, cluster, other, self.machine)
                changed = self._changed_sums(index, other, cost)
                if changed is not None:
                    yield self.plan.storage.accumulation * (self._seconds(changed) - self._seconds(self.sums)), order, other, cost

    def _allowed(self, index: int, other: Strategy) -> bool:
        """Whether parameters that others use keep their layout, and the loss stays whole or a partial sum."""
        shared = (
            (name, planned.strategy.layouts[name])
            for position, planned in enumerate(self.planned.clusters)
            for name in planned.cluster.inputs
            if position != index and name in other.layouts and self.values[name].kind == "parameter"
        )
        if any(other.layouts[name] != layout for name, layout in shared):
            return False
        ends = self.region.graph.outputs if self.region.key == OUTER else ()
        return all(p.kind in "RP" for name in ends if self.made_by.get(name) == index for p in other.layouts[name])

    @cached_property
    def sums(self) -> _Sums:
        time = region_time(self.plan, self.planned)
        sent = offloaded_bytes(self.plan, self.planned)
        return _Sums(time["forward"], time["backward"] + time["recompute"], time["reshard"], parameter_numel(self.plan, self.planned), sent)

    def _seconds(self, sums: _Sums) -> float:
        """Seconds of one micro-batch, as `region_time` adds them up."""
        hardware = self.machine.hardware
        group = group_cost(float(sums.numel), self.machine, self.plan.storage, self.region.key == OUTER)
        total = sums.forward + sums.backward + sums.reshard + self.count * group.optimizer_s + copy_seconds(hardware, sums.sent)
        for traffic, beside in ((group.forward_s, sums.forward), (group.backward_s, sums.backward)):
            total += exposed_seconds(hardware, self.count * traffic, beside) if sums.numel else 0.0
            total += max(0.0, host_seconds(hardware, sums.sent) - beside)
        return total

    def _changed_sums(self, index: int, other: Strategy, cost: Price) -> _Sums | None:
        """The sums with another strategy for one cluster; None where a reshard that it needs is impossible."""
        planned = self.planned.clusters[index]
        own, was = self._own(index, other, cost), self._own(index, planned.strategy, planned.price)
        after, before = self._moves(index, other), self._moves(index, planned.strategy)
        if after is None or before is None:
            return None
        numel, gradients = self._parameters(planned.cluster, other, planned.strategy)
        change = self._changed(index, other, cost) if self.sums.sent else None
        return _Sums(
            self.sums.forward + own[0] - was[0],
            self.sums.backward + own[1] - was[1] + after[1] - before[1],
            self.sums.reshard + after[0] - before[0] + gradients,
            self.sums.numel + numel,
            self.sums.sent if change is None else offloaded_bytes(self.plan, change),
        )

    def _own(self, index: int, strategy: Strategy, cost: Price) -> tuple[float, float]:
        """Seconds of a cluster in forward, and in backward with what the modes of its segment add."""
        segment = self.planned.segments[self.place_of[index]]
        extra = 0.0
        for mode, layers in segment.modes if segment.index is not None else ():
            extra += layers * extra_seconds(self.machine, self.region, index, strategy, cost, mode)
        return self.count * cost.forward_s, self.count * cost.backward_s + extra

    def _parameters(self, cluster: Cluster, other: Strategy, chosen: Strategy) -> tuple[int, float]:
        """Elements that the parameters grow by on one rank, and seconds that their gradients take more on `split` axes."""
        sizes, grown, seconds = self.machine.sizes, 0, 0.0
        for name in cluster.inputs:
            if self.values[name].kind == "parameter":
                for sign, strategy in ((1, other), (-1, chosen)):
                    numel = local_numel(self.values[name].shape, strategy.layouts[name], sizes)
                    reduced = split_axis_gradients(self.machine, strategy.layouts[name], numel * self.plan.storage.itemsize)
                    grown, seconds = grown + sign * numel, seconds + sign * sum(reduced)
        return grown, self.count * seconds

    # --- reshards ------------------------------------------------------------------------------------------------------------

    def _moves(self, index: int, strategy: Strategy) -> tuple[float, float] | None:
        """Seconds of the reshards of a cluster's inputs and outputs in all layers, and of those that replays repeat."""
        cluster = self.planned.clusters[index].cluster
        seconds = again = 0.0
        for name in self._moving(cluster):
            wants = [want._replace(layout=strategy.layouts[name]) if want.cluster == index else want for want in self.wants[name]]
            found = self._spread(name, self.planned.layouts[name], wants)
            if found is None:
                return None
            seconds, again = seconds + found[0], again + found[1]
        for name in cluster.outputs:
            found = self._spread(name, strategy.layouts[name], self.wants.get(name, []))
            if found is None:
                return None
            seconds, again = seconds + found[0], again + found[1]
        return seconds, again

    def _spread(self, name: str, src: Layout, wants: list[_Want]) -> tuple[float, float] | None:
        """Seconds in which a value gets from its layout to all that are wanted: once a segment each, and again in replays."""
        again_in: dict[tuple[int, Layout], int] = {}
        for want in wants:
            if want.layout != src:
                key = (want.place, want.layout)
                again_in[key] = max(again_in.get(key, 0), self._replays(want))
        seconds = again = 0.0
        for (place, layout), layers in again_in.items():
            reshard = None if self._must_stay(place, name) else self._reshard(name, src, layout)
            if reshard is None:
                return None
            seconds += self.count * (reshard.forward_s + reshard.backward_s)
            again += layers * reshard.forward_s
        return seconds, again

    def _replays(self, want: _Want) -> int:
        """In how many layers a replay wants the value again: `spill` runs the whole segment, the others as far as something is saved."""
        segment = self.planned.segments[want.place] if want.place != BORDER else None
        if segment is None or segment.index is None:
            return 0
        needed = want.cluster in reached(self.region, segment.index)
        kinds = ("spill", "recompute", "selective") if needed else ("spill",)
        return sum(layers for mode, layers in segment.modes if mode.kind in kinds)

    def _must_stay(self, place: int, name: str) -> bool:
        """Whether nothing may be resharded here: inside tiles, and a matrix product that `selective` keeps."""
        segment = self.planned.segments[place] if place != BORDER else None
        if segment is None or segment.index is None:
            return False
        products = kept_matmuls(self.region, segment.index)
        return any(m.tiles > 1 or (m.kind == "selective" and self.made_by.get(name) in products) for m, _ in segment.modes)

    def _reshard(self, name: str, src: Layout, dst: Layout) -> Reshard | None:
        key = (name, src, dst)
        if key not in self._reshards:
            try:
                self._reshards[key] = reshard_between(self.region, name, src, dst, self.machine)
            except PlanMismatch:
                self._reshards[key] = None
        return self._reshards[key]

    # --- bytes ---------------------------------------------------------------------------------------------------------------

    def runner_up(self, index: int, extra_s: float, _order: int, strategy: Strategy, cost: Price) -> RunnerUp:
        """A rival with the memory that it would need."""
        regions = {**self.plan.regions, self.region.key: self._changed(index, strategy, cost)}
        peak = max(point.total for point in liveness(replace(self.plan, regions=regions)))
        letters = split_letters(self.plan, self.region, self.planned.clusters[index].cluster, strategy)
        return RunnerUp(letters, extra_s, peak, peak <= self.machine.hardware.usable_bytes)

    def _changed(self, index: int, strategy: Strategy, cost: Price) -> PlannedRegion:
        """The region with another strategy for one cluster, as far as memory goes: its reshards are those of the plan."""
        place = self.place_of[index]
        segment = self.planned.segments[place]
        position = index - self.place_of.index(place)
        clusters = list(segment.clusters)
        clusters[position] = PlannedCluster(clusters[position].cluster, strategy, cost, ())
        segments = list(self.planned.segments)
        segments[place] = replace(segment, clusters=tuple(clusters))
        outputs = {name: strategy.layouts[name] for name in clusters[position].cluster.outputs}
        return replace(self.planned, segments=tuple(segments), layouts={**self.planned.layouts, **outputs})
