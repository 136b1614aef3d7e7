"""The planner's question answered without a solver: every combination of strategies, border layouts and recompute flags is priced.

The rules are those that `seqloom/plan/problem.py` states in its docstring, written down anew from the public prices: what one combination
takes in seconds (the objective) and in bytes (the memory constraint).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod

from seqloom.cost.communication import collective_seconds
from seqloom.plan.placement import Layout, local_shape, reshard_path
from seqloom.plan.price import Machine, move_seconds, price, view_root
from seqloom.plan.regions import OUTER, Region, Regions
from seqloom.plan.space import strategies
from seqloom.plan.storage import Storage, group_cost

Key = tuple[str, int]


@dataclass(frozen=True)
class Combination:
    """One way to run everything: the index of each cluster's strategy, the layout of each border, the segments that are recomputed."""

    strategy: Mapping[Key, int]
    slot: Mapping[str, Layout]
    recompute: Mapping[Key, bool]


@dataclass
class BruteForce:
    """All combinations of a small graph on one machine under one ZeRO level, with their seconds and bytes."""

    regions: Regions
    machine: Machine
    storage: Storage
    allow_recompute: bool | None = None
    options: dict = field(default_factory=dict)
    prices: dict = field(default_factory=dict)
    slots: dict = field(default_factory=dict)
    flags: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._seconds: dict = {}
        self._readers = {key: _readers(self.regions, region) for key, region in self.regions.parts.items()}
        for key, region in self.regions.parts.items():
            for index, part in enumerate(region.parts):
                self.options[key, index] = strategies(region.graph, part, region.labels, self.machine.axes)
                self.prices[key, index] = [price(region.graph, part, s, self.machine) for s in self.options[key, index]]
            for index, segment in enumerate(region.segments):
                may = segment.recomputable and self.allow_recompute is not False
                self.flags[key, index] = ((True,) if self.allow_recompute else (False, True)) if may else (False,)
        self._collect_slots()

    def _collect_slots(self) -> None:
        """A border lies in any layout (whole or split) that a cluster at it can give or take."""
        for key, region in self.regions.parts.items():
            for index, part in enumerate(region.parts):
                for name in (*part.inputs, *part.outputs):
                    slot = self.slot_of(region, name)
                    if slot:
                        found = (s.layouts[name] for s in self.options[key, index])
                        self.slots.setdefault(slot, {}).update(dict.fromkeys(x for x in found if all(p.kind in "SR" for p in x)))
        for node in self.regions.graph.nodes:
            if node.is_block:
                for outer, inner in zip(node.inputs, self.regions.graph.blocks[node.block].inputs, strict=True):
                    if self.regions.graph.values[outer].kind == "input":
                        slot = self.regions.slot_of[node.block, inner]
                        self.slots.setdefault(f"input/{outer}", {}).update(self.slots.get(slot, {}))

    def slot_of(self, region: Region, name: str) -> str | None:
        if (region.key, name) in self.regions.slot_of:
            return self.regions.slot_of[region.key, name]
        return f"input/{name}" if region.graph.values[name].kind == "input" else None

    @property
    def count(self) -> int:
        """How many combinations there are."""
        return prod(len(o) for o in (*self.options.values(), *self.slots.values(), *self.flags.values()))

    def combinations(self) -> Iterator[Combination]:
        ranges = [range(len(o)) for o in self.options.values()]
        for chosen in itertools.product(*ranges):
            strategy = dict(zip(self.options, chosen, strict=True))
            if not self._shared_parameters_agree(strategy):
                continue
            for layouts in itertools.product(*self.slots.values()):
                slot = dict(zip(self.slots, layouts, strict=True))
                for flags in itertools.product(*self.flags.values()):
                    yield Combination(strategy, slot, dict(zip(self.flags, flags, strict=True)))

    def priced(self) -> list[tuple[float, float]]:
        """(seconds, bytes) of every combination that can be carried out."""
        found = []
        for combination in self.combinations():
            seconds = self.seconds(combination)
            if seconds is not None:
                found.append((seconds, self.peak_bytes(combination)))
        return found

    # --- seconds ---

    def seconds(self, at: Combination) -> float | None:
        """The objective; None where a layout cannot be reached."""
        total = 0.0
        for key, region in self.regions.parts.items():
            moving = self._reshard_seconds(region, at)
            if moving is None:
                return None
            spent = {"forward_s": 0.0, "backward_s": 0.0}
            again = 0.0
            for index in range(len(region.parts)):
                cost = self.prices[key, index][at.strategy[key, index]]
                spent["forward_s"] += cost.forward_s
                spent["backward_s"] += cost.backward_s
                again += cost.forward_s if at.recompute.get((key, region.segment_of(index)), False) else 0.0
            groups = [self._group(region, numel) for numel in self._numels(region, at)]
            exposed = sum(max(0.0, sum(getattr(g, phase) for g in groups) - compute) for phase, compute in spent.items())
            total += region.count * (sum(spent.values()) + again + moving + exposed)
            total += region.count * (sum(g.optimizer_s for g in groups) + self._split_axis_gradients(region, at))
        return total

    def _layout(self, region: Region, name: str, at: Combination) -> Layout:
        """Where a value lies when it is made or enters."""
        slot = self.slot_of(region, name)
        if slot:
            return at.slot[slot]
        index = next(i for i, part in enumerate(region.parts) if name in part.outputs)
        return self.options[region.key, index][at.strategy[region.key, index]].layouts[name]

    def _reshard_seconds(self, region: Region, at: Combination) -> float | None:
        wanted: dict[tuple[int | None, str, Layout, Layout], None] = {}
        for name, index, slot in self._readers[region.key]:
            dst = at.slot[slot] if slot else self.options[region.key, index][at.strategy[region.key, index]].layouts[name]
            made = next((i for i, part in enumerate(region.parts) if name in part.outputs), None)
            if made is None:
                src = self._layout(region, name, at)
            else:
                src = self.options[region.key, made][at.strategy[region.key, made]].layouts[name]
            segment = region.segment_of(index if index >= 0 else made) if index >= 0 or made is not None else None
            wanted[segment, name, src, dst] = None
        if region.key == OUTER:
            (loss,) = region.graph.outputs
            if any(p.kind not in "RP" for p in self._layout(region, loss, at)):
                return None
        total = 0.0
        for segment, *key in wanted:
            path = self._path(region, *key)
            if path is None:
                return None
            total += path[0] + (path[1] if at.recompute.get((region.key, segment), False) else 0.0)
        return total

    def _path(self, region: Region, name: str, src: Layout, dst: Layout) -> tuple[float, float] | None:
        """Seconds of the cheapest reshard, forward and backward together, and forward alone."""
        key = (region.key, name, src, dst)
        if key not in self._seconds:
            value = region.graph.values[name]
            cost = lambda shape, before, move: sum(move_seconds(value, before, move, self.machine)) + 1e-9  # noqa: E731
            path = reshard_path(value.shape, src, dst, self.machine.sizes, cost)
            forward, before = 0.0, src
            for move in () if path is None else path[1]:
                forward += move_seconds(value, before, move, self.machine)[0]
                before = move.layout
            self._seconds[key] = None if path is None else (path[0], forward)
        return self._seconds[key]

    def _parameters(self, region: Region, at: Combination) -> dict[str, Layout]:
        return {
            name: self.options[region.key, index][at.strategy[region.key, index]].layouts[name]
            for index, part in enumerate(region.parts)
            for name in part.inputs
            if region.graph.values[name].kind == "parameter"
        }

    def _shared_parameters_agree(self, strategy: Mapping[Key, int]) -> bool:
        for key, region in self.regions.parts.items():
            seen: dict[str, Layout] = {}
            for index, part in enumerate(region.parts):
                layouts = self.options[key, index][strategy[key, index]].layouts
                for name in part.inputs:
                    if region.graph.values[name].kind == "parameter" and seen.setdefault(name, layouts[name]) != layouts[name]:
                        return False
        return True

    def _numels(self, region: Region, at: Combination) -> list[int]:
        shapes = region.graph.values
        return [prod(local_shape(shapes[n].shape, layout, self.machine.sizes)) for n, layout in self._parameters(region, at).items()]

    def _group(self, region: Region, numel: int):
        key = (region.key == OUTER, numel)
        if key not in self._seconds:
            self._seconds[key] = group_cost(numel, self.machine, self.storage, region.key == OUTER)
        return self._seconds[key]

    def _split_axis_gradients(self, region: Region, at: Combination) -> float:
        seconds = 0.0
        for name, layout in self._parameters(region, at).items():
            nbytes = prod(local_shape(region.graph.values[name].shape, layout, self.machine.sizes)) * self.storage.itemsize
            for index, axis in enumerate(self.machine.axes):
                if axis.role == "split" and layout[index].kind == "B":
                    seconds += collective_seconds(self.machine.hardware, "all_reduce", nbytes, self.machine.span((index,)))
        return seconds

    # --- bytes ---

    def peak_bytes(self, at: Combination) -> float:
        """The larger of stored + resident + kept + the largest backward, and stored + resident + what the end of backward adds."""
        total, transient, ending = 0.0, 0.0, 0.0
        for key, region in self.regions.parts.items():
            groups = [self._group(region, numel) for numel in self._numels(region, at)]
            total += region.count * sum(g.stored_bytes + g.resident_bytes for g in groups)
            ending += region.count * sum(g.stored_bytes + g.resident_bytes + g.ending_bytes for g in groups)
            total += region.count * sum(self._kept(region, at).values())
            for index in range(len(region.parts)):
                working = self.prices[key, index][at.strategy[key, index]].working_bytes
                segment = region.segment_of(index)
                if at.recompute.get((key, segment), False):
                    span = range(region.segments[segment].start, region.segments[segment].stop)
                    working += sum(sum(self.prices[key, i][at.strategy[key, i]].saved.values()) for i in span)
                transient = max(transient, working + sum(g.in_flight_bytes for g in groups))
        return max(total + transient, ending)

    def _kept(self, region: Region, at: Combination) -> dict[tuple[str, Layout], int]:
        roots = {}
        for index, part in enumerate(region.parts):
            root = view_root(region.graph, part)
            if root is not None:
                layouts = self.options[region.key, index][at.strategy[region.key, index]].layouts
                roots.update({(name, layouts[name]): (root, layouts[root]) for name in part.outputs})
        needs: list[tuple[str, Layout]] = []
        for index in range(len(region.parts)):
            if not at.recompute.get((region.key, region.segment_of(index)), False):
                needs += self.prices[region.key, index][at.strategy[region.key, index]].saved
        for index, segment in enumerate(region.segments):
            if at.recompute[region.key, index]:
                needs += [(n, self._layout(region, n, at)) for n in segment.inputs if region.graph.values[n].requires_grad]
        kept = {}
        for key in needs:
            while key in roots:
                key = roots[key]
            value = region.graph.values[key[0]]
            kept[key] = prod(local_shape(value.shape, key[1], self.machine.sizes)) * value.dtype.itemsize
        return kept


def _readers(regions: Regions, region: Region) -> list[tuple[str, int, str | None]]:
    """(value, cluster that reads it, None) and (value, -1, border slot that it leaves into)."""
    found: list[tuple[str, int, str | None]] = [
        (name, index, None)
        for index, part in enumerate(region.parts)
        for name in part.inputs
        if region.graph.values[name].kind in ("activation", "input")
    ]
    if region.key != OUTER:
        return found + [(name, -1, regions.slot_of[region.key, name]) for name in region.graph.outputs]
    for node in regions.graph.nodes:
        if node.is_block:
            for outer, inner in zip(node.inputs, regions.graph.blocks[node.block].inputs, strict=True):
                if (OUTER, outer) not in regions.slot_of:
                    found.append((outer, -1, regions.slot_of[node.block, inner]))
    return found
