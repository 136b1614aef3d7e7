"""The planner's question answered without a solver: every combination of strategies, border layouts and layers per mode is priced.

The rules are those that `seqloom/plan/problem.py` and `seqloom/plan/memory.py` state in their docstrings, written down anew: what a
combination takes in seconds of a micro-batch (the objective) and in bytes at its peak (the memory constraint). Only prices of single
choices, reshard paths, the cost of a storage group and what a segment replays come from the planner.

Given the layouts at the borders, regions only meet in a sum of seconds, a sum of bytes and a maximum of bytes. So each region is tried
out by itself, what another of its own combinations beats in everything is dropped, and what remains is combined. The numbers of layers
per mode of all segments are tried at once, as vectors.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np

from seqloom.cost.communication import collective_seconds
from seqloom.plan.modes import KEEP, OFFLOAD, Mode, kept_matmuls, reached, replayed, segment_modes, tile_class
from seqloom.plan.placement import Layout, local_shape, reshard_path
from seqloom.plan.price import Machine, Price, kept_value, move_seconds, price
from seqloom.plan.regions import OUTER, Region, Regions
from seqloom.plan.request import Request
from seqloom.plan.solver import Decisions
from seqloom.plan.space import Strategy, strategies, variants
from seqloom.plan.storage import Storage, group_cost

Key = tuple[str, Layout]  # a storage: a value in a layout
Chosen = Sequence[tuple[Strategy, Price]]  # what each cluster of a region runs
Slots = Mapping[str, Layout]


@dataclass(frozen=True)
class Counts:
    """Every way to give the layers of a region's segments their modes, a row each: `layers[segment][mode]` are vectors over the rows."""

    rows: int
    layers: tuple[Mapping[Mode, np.ndarray], ...]


@dataclass(frozen=True)
class Raw:
    """Combinations of one region (a row each) before any storage: seconds and bytes of one call, and elements of its parameters."""

    spent: np.ndarray
    forward: np.ndarray
    backward: np.ndarray
    kept: np.ndarray
    first: np.ndarray
    working: np.ndarray
    working_host: np.ndarray
    late: np.ndarray
    late_host: np.ndarray
    staying: np.ndarray
    sent: np.ndarray
    numel: np.ndarray


class BruteForce:
    """Everything that a small graph can do on one machine."""

    def __init__(self, regions: Regions, machine: Machine, request: Request) -> None:
        self.regions, self.machine, self.request = regions, machine, request
        self.options = {key: [self._options(region, part) for part in region.parts] for key, region in regions.parts.items()}
        self.modes = {
            key: [segment_modes(region, g, request.recompute, request.may_offload) for g in range(len(region.segments))]
            for key, region in regions.parts.items()
        }
        self.slots = self._slots()
        self.borders = {key: self._slots_of(region) for key, region in regions.parts.items()}
        self._paths: dict = {}
        self._raw: dict = {}
        self._stored: dict = {}

    def _options(self, region: Region, part) -> list[tuple[Strategy, Price]]:
        found = strategies(region.graph, part, region.labels, self.machine.axes)
        if self.request.open_constants:
            found = [variant for strategy in found for variant in variants(part, strategy)]
        return [(s, price(region.graph, part, s, self.machine)) for s in found]

    @property
    def feasible(self) -> bool:
        """Whether every cluster has a strategy on this mesh."""
        return all(options for parts in self.options.values() for options in parts)

    @property
    def count(self) -> int:
        """Combinations of strategies that are priced: each region under each layout of its own borders."""
        return sum(
            prod(len(o) for o in self.options[key]) * prod(len(self.slots[s]) for s in self.borders[key]) for key in self.regions.parts
        )

    @property
    def whole(self) -> int:
        """Combinations in the whole space."""
        found = prod(len(o) for parts in self.options.values() for o in parts) * prod(len(s) for s in self.slots.values())
        return found * prod(self.counts[key].rows for key in self.regions.parts)

    # --- borders ---

    def slot_of(self, region: Region, name: str) -> str | None:
        """The slot of a border value or of an input of the graph."""
        if (region.key, name) in self.regions.slot_of:
            return self.regions.slot_of[region.key, name]
        return f"input/{name}" if region.graph.values[name].kind == "input" else None

    def _slots(self) -> dict[str, list[Layout]]:
        """A border lies in any layout (whole or split) that a cluster at it can give or take."""
        wanted: dict[str, dict[Layout, None]] = {}
        for key, region in self.regions.parts.items():
            for part, options in zip(region.parts, self.options[key], strict=True):
                for name in (*part.inputs, *part.outputs):
                    if slot := self.slot_of(region, name):
                        wanted.setdefault(slot, {}).update(dict.fromkeys(s.layouts[name] for s, _ in options))
        for outer, slot in self.entering:
            if self.regions.graph.values[outer].kind == "input":
                wanted.setdefault(f"input/{outer}", {}).update(wanted.get(slot, {}))
        return {slot: [x for x in found if all(p.kind in "SR" for p in x)] for slot, found in wanted.items()}

    @cached_property
    def entering(self) -> list[tuple[str, str]]:
        """(outer value that no block made, slot of a block that it enters)."""
        graph, found = self.regions.graph, {}
        for node in graph.nodes:
            if node.is_block:
                for outer, inner in zip(node.inputs, graph.blocks[node.block].inputs, strict=True):
                    if (OUTER, outer) not in self.regions.slot_of:
                        found[outer, self.regions.slot_of[node.block, inner]] = None
        return list(found)

    def _slots_of(self, region: Region) -> list[str]:
        names = {name for part in region.parts for name in (*part.inputs, *part.outputs)} | set(region.graph.outputs)
        found = {self.slot_of(region, name): None for name in sorted(names)}
        if region.key == OUTER:
            found |= {slot: None for outer, inner in self.entering for slot in (self.slot_of(region, outer), inner)}
        return [slot for slot in found if slot]

    # --- layers per mode ---

    @cached_property
    def counts(self) -> dict[str, Counts]:
        """By region, every way to give its layers their modes."""
        return {key: self._counts(region) for key, region in self.regions.parts.items()}

    def _counts(self, region: Region) -> Counts:
        tables = self._tables(region)
        index = np.indices([len(table) for table in tables]).reshape(len(tables), -1) if tables else np.zeros((0, 1), dtype=int)
        layers = [
            {m: table[at][:, i] for i, m in enumerate(modes)}
            for table, at, modes in zip(tables, index, self.modes[region.key], strict=True)
        ]
        return Counts(index.shape[1], tuple(layers))

    def rows(self, region: Region) -> int:
        """How many ways there are to give a region's layers their modes."""
        return prod(len(table) for table in self._tables(region))

    def _tables(self, region: Region) -> list[np.ndarray]:
        """By segment, every way to give its layers their modes: whole recomputation and its tilings exclude each other, and so do those of
        what is replayed from the host.
        """
        tables = []
        for modes in self.modes[region.key]:
            rows = [c for c in itertools.product(range(region.count + 1), repeat=len(modes)) if sum(c) == region.count]
            same = [[i for i, mode in enumerate(modes) if mode.kind == kind] for kind in ("recompute", "spill")]
            tables.append(np.array([row for row in rows if all(sum(row[i] > 0 for i in tilings) <= 1 for tilings in same)]))
        return tables

    # --- one region, before storage ---

    def raw(self, region: Region, slots: Slots) -> Raw:
        """All combinations of a region between these borders."""
        key = (region.key, tuple(slots[s] for s in self.borders[region.key]))
        if key not in self._raw:
            found = [self.at(region, chosen, slots, self.counts[region.key]) for chosen in self._arrangements(region)]
            columns = zip(*[row for row in found if row is not None], strict=True)
            empty = [np.zeros(0)] * 12
            self._raw[key] = Raw(*([np.concatenate(column) for column in columns] or empty))
        return self._raw[key]

    def _arrangements(self, region: Region) -> Iterator[Chosen]:
        """A strategy for every cluster; a parameter that several use lies in one layout."""
        shared = [[n for n in part.inputs if region.graph.values[n].kind == "parameter"] for part in region.parts]
        for chosen in itertools.product(*self.options[region.key]):
            seen: dict[str, Layout] = {}
            pairs = [(name, s.layouts[name]) for (s, _), names in zip(chosen, shared, strict=True) for name in names]
            if all(seen.setdefault(name, layout) == layout for name, layout in pairs):
                yield chosen

    def at(self, region: Region, chosen: Chosen, slots: Slots, counts: Counts) -> list[np.ndarray] | None:
        """`Raw` columns of one arrangement under all `counts`; None where it cannot be carried out."""
        moving = self._moving(region, chosen, slots, counts)
        if moving is None:
            return None
        seconds, valid = moving
        n, hardware = region.count, self.machine.hardware
        forward = np.full(counts.rows, sum(p.forward_s for _, p in chosen))
        backward = np.full(counts.rows, sum(p.backward_s for _, p in chosen))
        for index, option in enumerate(chosen):
            g = region.segment_of(index)
            for mode, layers in counts.layers[g].items() if g is not None else ():
                backward = backward + layers / n * self._extra(region, index, g, option, mode)
        numel = sum(prod(shape) for _, shape in self._placed(region, chosen))
        layouts = _layouts(region, chosen, {name: slots[s] for name in region.graph.values if (s := self.slot_of(region, name)) in slots})
        sent = self._sent(region, chosen, layouts, counts)
        copied = sent / hardware.host_link_bandwidth
        exposed = np.maximum(0.0, copied - forward) + np.maximum(0.0, copied - backward) + 2 * sent / hardware.memory_bandwidth
        spent = forward + backward + seconds + self._split_axis_gradients(region, chosen) + exposed
        columns = [
            spent,
            forward,
            backward,
            *self._kept(region, chosen, layouts, counts),
            *self._working(region, chosen, layouts, counts),
            sent,
        ]
        return [column[valid] for column in columns] + [np.full(int(valid.sum()), float(numel))]

    def _extra(self, region: Region, index: int, g: int, option: tuple[Strategy, Price], mode: Mode) -> float:
        """Seconds that a mode adds to one call of a cluster: its forward again; in tiles also what smaller pieces lose."""
        strategy, whole = option
        if mode.kind in ("keep", "offload"):
            return 0.0
        runs = index in replayed(region, g) and not (mode.kind == "selective" and index in kept_matmuls(region, g))
        runs |= mode.kind == "spill"  # nothing tells it to stop at the last tensor that is saved
        if mode.tiles == 1:
            return whole.forward_s if runs else 0.0
        part = region.parts[index]
        tiled = price(region.graph, part, strategy, self.machine, mode.tiles, tile_class(region, part))
        lost = tiled.forward_s + tiled.backward_s - whole.forward_s - whole.backward_s
        return max(0.0, lost) + (tiled.forward_s if runs else 0.0)

    def _moving(self, region: Region, chosen: Chosen, slots: Slots, counts: Counts) -> tuple[np.ndarray, np.ndarray] | None:
        """Seconds of the reshards of a call, each once a segment and again where a replay wants it, and which rows are allowed."""
        made = {name: index for index, part in enumerate(region.parts) for name in part.outputs}
        wanted: dict[tuple[int | None, str, Layout, Layout], bool] = {}
        for name, g, dst, again in self._readers(region, chosen, slots, made):
            src = chosen[made[name]][0].layouts[name] if name in made else slots[self.slot_of(region, name)]
            wanted[g, name, src, dst] = wanted.get((g, name, src, dst), False) or again
        if region.key == OUTER:
            (loss,) = region.graph.outputs
            if any(p.kind not in "RP" for p in chosen[made[loss]][0].layouts[loss]):
                return None
        seconds, valid = np.zeros(counts.rows), np.ones(counts.rows, dtype=bool)
        for (g, name, src, dst), again in wanted.items():
            path = self._path(region, name, src, dst)
            if path is None:
                return None
            seconds += path[0]
            if src != dst and g is not None:
                for mode, layers in counts.layers[g].items():
                    if mode.tiles > 1 or (mode.kind == "selective" and made.get(name) in kept_matmuls(region, g)):
                        valid &= layers == 0
                    if mode.kind == "spill" or (again and mode.kind in ("recompute", "selective")):
                        seconds += layers / region.count * path[1]
        return seconds, valid

    def _readers(self, region: Region, chosen: Chosen, slots: Slots, made: Mapping[str, int]):
        """(value, segment that wants it, layout, whether its replay wants it again) of every use."""
        for index, part in enumerate(region.parts):
            g = region.segment_of(index)
            for name in part.inputs:
                if region.graph.values[name].kind in ("activation", "input"):
                    yield name, g, chosen[index][0].layouts[name], g is not None and index in reached(region, g)
        if region.key == OUTER:
            for outer, slot in self.entering:
                yield outer, None, slots[slot], False
        else:
            for name in region.graph.outputs:
                yield name, region.segment_of(made[name]) if name in made else None, slots[self.slot_of(region, name)], False

    def _path(self, region: Region, name: str, src: Layout, dst: Layout) -> tuple[float, float] | None:
        """Seconds of the cheapest reshard, forward and backward together, and forward alone."""
        key = (region.key, name, src, dst)
        if key not in self._paths:
            value = region.graph.values[name]
            cost = lambda shape, before, move: sum(move_seconds(value, before, move, self.machine)) + 1e-9  # noqa: E731
            found = reshard_path(value.shape, src, dst, self.machine.sizes, cost)
            befores = [src, *(move.layout for move in found[1])] if found else []
            pairs = [
                move_seconds(value, before, move, self.machine) for before, move in zip(befores, found[1] if found else (), strict=False)
            ]
            self._paths[key] = (sum(map(sum, pairs)), sum(f for f, _ in pairs)) if found else None
        return self._paths[key]

    def _placed(self, region: Region, chosen: Chosen) -> list[tuple[Layout, tuple[int, ...]]]:
        """Layout and local shape of every parameter."""
        values, found = region.graph.values, {}
        for part, (strategy, _) in zip(region.parts, chosen, strict=True):
            found |= {name: strategy.layouts[name] for name in part.inputs if values[name].kind == "parameter"}
        return [(layout, local_shape(values[name].shape, layout, self.machine.sizes)) for name, layout in found.items()]

    def _split_axis_gradients(self, region: Region, chosen: Chosen) -> float:
        """All-reduces over `split` axes on which a parameter lives whole while its use is split."""
        seconds = 0.0
        for layout, shape in self._placed(region, chosen):
            for index, axis in enumerate(self.machine.axes):
                if axis.role == "split" and layout[index].kind == "B":
                    nbytes = prod(shape) * self.request.itemsize
                    seconds += collective_seconds(self.machine.hardware, "all_reduce", nbytes, self.machine.span((index,)))
        return seconds

    # --- bytes ---

    def _nbytes(self, region: Region, key: Key) -> int:
        value = kept_value(region.graph, key[0])
        return prod(local_shape(value.shape, key[1], self.machine.sizes)) * value.dtype.itemsize

    def _saved(self, region: Region, chosen: Chosen, g: int | None) -> set[Key]:
        """Storages that autograd saves inside a segment."""
        roots = _roots(region, chosen)
        return {_root(roots, key) for i, (_, cost) in enumerate(chosen) if region.segment_of(i) == g for key in cost.saved}

    def _sent(self, region: Region, chosen: Chosen, layouts: Mapping[str, Layout], counts: Counts) -> np.ndarray:
        """Bytes that an average call sends to host memory: what autograd saves, or what a replay starts from."""
        total = np.zeros(counts.rows)
        for g, layers in enumerate(counts.layers):
            for mode, n in layers.items():
                if mode.kind in ("offload", "spill"):
                    keys = self._saved(region, chosen, g) if mode == OFFLOAD else self._starts(region, layouts, g)
                    total += n / region.count * sum(self._nbytes(region, key) for key in keys)
        return total

    def _starts(self, region: Region, layouts: Mapping[str, Layout], g: int) -> set[Key]:
        """What a replay of a segment starts from."""
        return {(n, layouts[n]) for n in region.segments[g].inputs if region.graph.values[n].requires_grad}

    def _kept(self, region: Region, chosen: Chosen, layouts: Mapping[str, Layout], counts: Counts) -> tuple[np.ndarray, np.ndarray]:
        """Bytes that all calls keep, each storage in the layers in which some segment keeps it; and their share of one layer. What is the
        same tensor in all calls counts once.

        An input of a segment that replays in some layers counts in those that keep too.
        """
        if not region.segments:
            whole = np.full(counts.rows, float(sum(self._nbytes(region, key) for key in self._saved(region, chosen, None))))
            return whole, whole
        roots, most = _roots(region, chosen), {}
        for g in range(len(region.segments)):
            none = np.zeros(counts.rows)
            kind = {k: sum((n for mode, n in counts.layers[g].items() if mode.kind == k), none) for k in ("keep", "recompute", "selective")}
            replaying = kind["recompute"] + kind["selective"]
            held = dict.fromkeys(self._saved(region, chosen, g), kind["keep"])
            for key in ((name, layouts[name]) for name in _products(region, g)):
                held[key] = held.get(key, none) + kind["selective"]
            for key in {_root(roots, key) for key in self._starts(region, layouts, g)}:
                held[key] = np.where(replaying > 0, replaying + kind["keep"], held.get(key, none))
            for key in held.keys() - self._common(region, layouts):
                most[key] = np.maximum(most.get(key, 0), held[key])
        total = sum((layers * float(self._nbytes(region, key)) for key, layers in most.items()), np.zeros(counts.rows))
        saved = set().union(*(self._saved(region, chosen, g) for g in range(len(region.segments))))
        once = sum(self._nbytes(region, key) for key in saved & self._common(region, layouts))
        return once + total, once + total / region.count

    def _common(self, region: Region, layouts: Mapping[str, Layout]) -> set[Key]:
        """Inputs that are the same tensor in all calls, whatever is done with the layers: those without gradient, as they come."""
        calls = [node for node in self.regions.graph.nodes if node.is_block and node.block == region.key]
        same = [name for i, name in enumerate(region.graph.inputs) if len({call.inputs[i] for call in calls}) == 1]
        return {(name, layouts[name]) for name in same if not region.graph.values[name].requires_grad}

    def _working(self, region: Region, chosen: Chosen, layouts: Mapping[str, Layout], counts: Counts) -> list[np.ndarray]:
        """The largest cluster's gradients and temporaries with what its segment brings back: unless the last layers made room for it, and
        in any case; each where no host memory is used and where it is. Last, the largest call that moves to the host.
        """
        device, host, late, late_host, staying = (np.zeros(counts.rows) for _ in range(5))
        for g in range(len(region.segments)) if region.segments else (None,):
            own = max((cost.working_bytes for i, (_, cost) in enumerate(chosen) if region.segment_of(i) == g), default=0)
            layers_of = counts.layers[g] if g is not None else {KEEP: np.full(counts.rows, region.count)}
            keeping = layers_of.get(KEEP, np.zeros(counts.rows))
            offloading = sum((n for mode, n in layers_of.items() if mode.kind in ("offload", "spill")), np.zeros(counts.rows)) > 0
            made_up = keeping >= np.where(offloading, 2, 1)
            for mode, layers in layers_of.items():
                back = self._back(region, chosen, layouts, g, mode)
                whole = np.where(layers > 0, own / mode.tiles + np.where(made_up, 0.0, back), 0.0)
                last = np.where(layers > 0, own / mode.tiles + back, 0.0)
                if mode.kind in ("offload", "spill"):
                    host, late_host = np.maximum(host, whole), np.maximum(late_host, last)
                    staying = np.maximum(staying, np.where(layers > 0, self._moves(region, chosen, layouts, g, mode), 0.0))
                else:
                    device, late = np.maximum(device, whole), np.maximum(late, last)
        return [device, host, late, late_host, staying]

    def _moves(self, region: Region, chosen: Chosen, layouts: Mapping[str, Layout], g: int | None, mode: Mode) -> float:
        """Bytes that one call sends to host memory."""
        keys = self._saved(region, chosen, g) if mode.kind == "offload" else self._starts(region, layouts, g)
        return float(sum(self._nbytes(region, key) for key in keys))

    def _back(self, region: Region, chosen: Chosen, layouts: Mapping[str, Layout], g: int | None, mode: Mode) -> float:
        """Bytes that a mode brings back for one layer: what autograd saves, twice where one call is fetched while another is used; of a
        replay not its inputs, which are there already, nor the products that it kept. A replay from the host has the next call's inputs
        beside its own. Tiles have whole tensors beside them, each as large as the inputs: the gradients of results and inputs, in pieces
        and joined, and the inputs where they came from the host.
        """
        if mode == KEEP:
            return 0.0
        saved, there, common = self._saved(region, chosen, g), self._starts(region, layouts, g), self._common(region, layouts)
        if mode == OFFLOAD:
            return 2.0 * sum(self._nbytes(region, key) for key in saved)
        spilled, tiled = mode.kind == "spill", mode.tiles > 1
        whole = (1 if spilled else 0) + (3 if tiled else 0) + (1 if spilled and tiled else 0)
        kept = _products(region, g) if mode.kind == "selective" else set()
        again = saved - common if spilled else {key for key in saved - there - common if key[0] not in kept}
        return sum(self._nbytes(region, key) for key in again) / mode.tiles + whole * sum(self._nbytes(region, key) for key in there)

    # --- all regions together, under one storage ---

    def frontier(self, storage: Storage) -> np.ndarray:
        """(seconds, bytes at the peak) of the combinations that no other one beats in both, the fastest first."""
        found = [np.zeros((0, 2))]
        for layouts in itertools.product(*self.slots.values()):
            slots = dict(zip(self.slots, layouts, strict=True))
            rows = None
            for region in self.regions.parts.values():
                items = self._items(region, slots, storage)
                rows = items if rows is None else _undominated(_together(rows, items))
            rows = rows[rows[:, HOST] <= max(self.machine.hardware.host_memory_bytes, 0)]
            found.append(_undominated(np.stack([rows[:, SECONDS], _peak(rows)], axis=1)))
        merged = _undominated(np.concatenate(found))
        return merged[np.argsort(merged[:, 0])]

    def _items(self, region: Region, slots: Slots, storage: Storage) -> np.ndarray:
        """The combinations of a region worth keeping, a row each; columns as named at the end of this module."""
        key = (region.key, storage, tuple(slots[s] for s in self.borders[region.key]))
        if key not in self._stored:
            self._stored[key] = _undominated(self.stored(region, self.raw(region, slots), storage))
        return self._stored[key]

    def stored(self, region: Region, raw: Raw, storage: Storage) -> np.ndarray:
        """What combinations take when storage is added: all calls of a region in one micro-batch."""
        n, overlap, groups = region.count, self.machine.hardware.rates.overlap, {}
        for numel in set(raw.numel):
            groups[numel] = group_cost(numel, self.machine, storage, region.key == OUTER)
        figure = lambda name: np.array([getattr(groups[numel], name) for numel in raw.numel])  # noqa: E731
        seconds = raw.spent + figure("optimizer_s")
        for traffic, compute in ((figure("forward_s"), raw.forward), (figure("backward_s"), raw.backward)):
            seconds = seconds + np.where(raw.numel > 0, traffic - overlap * np.minimum(traffic, compute), 0.0)
        root = region.key == OUTER
        standing, ending, flight = (figure(name) for name in ("standing_bytes", "ending_bytes", "in_flight_bytes"))
        reduced = 0.0 if root else ending
        late = [np.zeros(len(flight)) if root else size + flight - reduced for size in (raw.late, raw.late_host)]
        working = [size + flight for size in (raw.working, raw.working_host)]
        first, kept = raw.first + n * (standing + reduced), raw.kept + n * standing
        return np.stack([n * seconds, kept, first, n * (standing + ending), n * raw.sent, *working, *late, raw.staying], axis=1)

    # --- one plan ---

    def of_decisions(self, decisions: Decisions) -> tuple[float, float]:
        """(seconds, bytes at the peak) of what the planner chose."""
        rows = None
        for key, region in self.regions.parts.items():
            chosen = [
                next(option for option in options if (option[0].splits, option[0].constants) == (splits, constants))
                for options, splits, constants in zip(self.options[key], decisions.splits[key], decisions.constants[key], strict=True)
            ]
            layers = [{m: np.array([dict(counts).get(m, 0)]) for m in self.modes[key][g]} for g, counts in enumerate(decisions.modes[key])]
            columns = self.at(region, chosen, decisions.slots, Counts(1, tuple(layers)))
            assert columns is not None and len(columns[0]) == 1, "the plan breaks a rule"
            items = self.stored(region, Raw(*columns), decisions.storage)
            rows = items if rows is None else _together(rows, items)
        return float(rows[0, SECONDS]), float(_peak(rows)[0])


SECONDS, KEPT, FIRST, ENDING, HOST, TRANSIENT, TRANSIENT_HOST, LATE, LATE_HOST, STAYING = range(10)


def _together(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Every row of one with every row of the other: sums, but of the transients the larger."""
    both = one[:, None, :] + other[None, :, :]
    for column in (TRANSIENT, TRANSIENT_HOST, LATE, LATE_HOST, STAYING):
        both[:, :, column] = np.maximum(one[:, None, column], other[None, :, column])
    return both.reshape(-1, one.shape[1])


def _peak(rows: np.ndarray) -> np.ndarray:
    """The largest of: the start of the blocks' backward, its end with the gradients piled up, the end of backward."""
    elsewhere = rows[:, STAYING]
    start = rows[:, KEPT] + np.maximum(rows[:, TRANSIENT] + elsewhere, rows[:, TRANSIENT_HOST])
    last = rows[:, FIRST] + np.maximum(rows[:, LATE] + elsewhere, rows[:, LATE_HOST])
    return np.maximum(np.maximum(start, last), rows[:, ENDING])


def _undominated(rows: np.ndarray) -> np.ndarray:
    """Rows that no other row equals or beats in every column (of equal ones the first)."""
    rows, kept = rows[np.lexsort(rows.T[::-1])], []
    while len(rows):  # sorted: only earlier rows can beat a later one
        kept.append(rows[0])
        rows = rows[1:][~np.all(rows[1:] >= rows[0], axis=1)]
    return np.stack(kept) if kept else rows


def _products(region: Region, g: int) -> set[str]:
    return {region.parts[index].outputs[0] for index in kept_matmuls(region, g)}


def _layouts(region: Region, chosen: Chosen, borders: Mapping[str, Layout]) -> dict[str, Layout]:
    """Where every value lies when it is made or enters."""
    made = {name: strategy.layouts[name] for part, (strategy, _) in zip(region.parts, chosen, strict=True) for name in part.outputs}
    return {**borders, **made}


def _roots(region: Region, chosen: Chosen) -> dict[Key, Key]:
    """Views and what they look into."""
    found: dict[Key, Key] = {}
    for part, (strategy, _) in zip(region.parts, chosen, strict=True):
        root = part.looks_into
        if root is not None:
            found.update({(name, strategy.layouts[name]): (root, strategy.layouts[root]) for name in part.outputs})
    return found


def _root(roots: Mapping[Key, Key], key: Key) -> Key:
    while key in roots:
        key = roots[key]
    return key
