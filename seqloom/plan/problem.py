"""The placement problem of one mesh as a mixed-integer linear program; storage and memory complete it (`seqloom/plan/memory.py`).

Variables (`x`, `slot`, `layers`, `used`, `back` are whole numbers; the others follow from those). N is a region's number of calls:
  x[c, s]          cluster c runs strategy s                                              `_cluster_variables`
  layers[g, m]     number of layers in which segment g runs mode m                        `_mode_variables`
  z[c, s, m]       share of the layers in which c runs s while its segment runs m         `_cluster_variables`
  slot[t, L]       the values of border slot t (or a graph input) lie in layout L         `_slot_variables`
  e[v, c, L, M]    consumer c gets value v, made in layout L, in layout M                 `_edge`
  r[v, g, L, M]    value v is resharded from L to M for several consumers in segment g    `_edge`
  again[v, g, ..]  share of the layers in which it is resharded once more                 `_edge`
  hidden           seconds of ZeRO and host traffic that compute does not hide            `memory.add_storage`, `memory.add_memory`
  saved, kept, once, used, back, transient                                                `memory.add_memory`

Objective: seconds of one micro-batch: clusters (forward, backward, forward again where replayed, the price of tiles) times the number of
calls, reshards, gradient reductions on `split` axes, exposed ZeRO and host traffic, the optimizer's share.

Constraints: one strategy a cluster, one mode a layer (`_cluster_variables`, `_mode_variables`); edges agree with both ends (`_edge`); a
parameter has one layout (`_parameter_constraints`); nothing is resharded inside tiles, nor a matrix product that `selective` keeps
(`_edge`); all attention inside documents splits its rows alike (`alike.split_rows_alike`); memory (`memory.add_memory`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from seqloom.cost.communication import collective_seconds
from seqloom.graph import Value
from seqloom.plan.alike import split_rows_alike
from seqloom.plan.linear import LinearProgram, Term
from seqloom.plan.modes import Mode, kept_matmuls, reached, replays, segment_modes, tile_class
from seqloom.plan.placement import Layout, Move, Route, cached_moves, cheapest_paths, local_numel, path_dims
from seqloom.plan.price import Machine, Price, move_seconds, price
from seqloom.plan.regions import OUTER, Region, Regions
from seqloom.plan.request import Request
from seqloom.plan.space import Strategy, strategies, variants

Ends = dict[Layout, list[int]]  # layout -> variables, one of which is 1 when the layout is used
TIE = 1e-9  # seconds: of two equal choices the earlier one


@dataclass(frozen=True)
class Choice:
    """One variable `x`: cluster `part` of `region` runs `strategy`."""

    region: str
    part: int
    strategy: Strategy
    price: Price


@dataclass(frozen=True)
class Path:
    """A cheapest reshard: seconds forward and backward together, its moves, seconds of forward alone."""

    seconds: float
    moves: tuple[Move, ...]
    forward: float


@dataclass(frozen=True)
class Consumer:
    """Where a value is wanted: the segment, the layouts with their variables, and whether the segment's replay wants it again."""

    segment: int | None
    ends: Ends
    again: bool


@dataclass(frozen=True)
class Tables:
    """What was worked out about one mesh: prices by cluster, strategy and tiles; reshards by value. Programs of the same mesh share it."""

    prices: dict[tuple, Price] = field(default_factory=dict)
    paths: dict[tuple, Path | None] = field(default_factory=dict)
    routes: dict[tuple, dict[Layout, Route]] = field(default_factory=dict)
    moves: dict[tuple, list[tuple[float, Move]]] = field(default_factory=dict)


@dataclass
class Problem:
    """The program under construction and the meaning of its variables. `shares[x][mode]` is z; `layers[region, segment][mode]`."""

    regions: Regions
    machine: Machine
    itemsize: int
    recompute: bool | None
    offload: bool
    open_constants: bool
    tables: Tables = field(default_factory=Tables)
    program: LinearProgram = field(default_factory=LinearProgram)
    choices: dict[int, Choice] = field(default_factory=dict)
    shares: dict[int, dict[Mode, int]] = field(default_factory=dict)
    layers: dict[tuple[str, int], dict[Mode, int]] = field(default_factory=dict)
    slots: dict[str, Ends] = field(default_factory=dict)
    sources: dict[tuple[str, str], Ends] = field(default_factory=dict)
    feasible: bool = True

    def of_part(self, region: str, part: int) -> list[tuple[int, Choice]]:
        """The variables of one cluster."""
        return self._by_part.get((region, part), [])

    def price_of(self, region: Region, part: int, order: int, strategy: Strategy) -> Price:
        """The price of a cluster under the strategy that is number `order` of its list."""
        key = (region.key, part, order)
        if key not in self.tables.prices:
            self.tables.prices[key] = price(region.graph, region.parts[part], strategy, self.machine)
        return self.tables.prices[key]

    def share(self, region: Region, segment: int | None, *kinds: str) -> list[Term]:
        """Terms that add up to the share of a segment's layers in modes of these kinds."""
        if segment is None:
            return []
        return [(n, 1.0 / region.count) for mode, n in self.layers[region.key, segment].items() if mode.kind in kinds]

    def path(self, region: Region, name: str, src: Layout, dst: Layout) -> Path | None:
        """Cheapest reshard of a value in this mesh."""
        value = region.graph.values[name]
        key = (value.shape, value.dtype, value.requires_grad, src, dst)
        if key not in self.tables.paths:
            dims = path_dims(src, dst)
            start = (*key[:4], dims)
            if start not in self.tables.routes:  # one search serves all targets
                self.tables.routes[start] = cheapest_paths(src, dims, lambda layout, dims: self._priced(region, name, layout, dims))
            found = self.tables.routes[start].get(dst)
            self.tables.paths[key] = None if found is None else Path(*found, self._forward(value, src, found[1]))
        return self.tables.paths[key]

    def _priced(self, region: Region, name: str, layout: Layout, dims: tuple[int, ...]) -> list[tuple[float, Move]]:
        """Moves of a value out of a layout with their seconds."""
        value = region.graph.values[name]
        key = (value.shape, value.dtype, value.requires_grad, layout, dims)
        if key not in self.tables.moves:
            moves = cached_moves(value.shape, self.machine.sizes, layout, dims)
            self.tables.moves[key] = [(sum(move_seconds(value, layout, move, self.machine)) + TIE, move) for move in moves]
        return self.tables.moves[key]

    def _forward(self, value: Value, src: Layout, moves: tuple[Move, ...]) -> float:
        seconds, before = 0.0, src
        for move in moves:
            seconds += move_seconds(value, before, move, self.machine)[0]
            before = move.layout
        return seconds

    @cached_property
    def _by_part(self) -> dict[tuple[str, int], list[tuple[int, Choice]]]:
        return {}


def build_problem(regions: Regions, machine: Machine, request: Request, tables: Tables | None = None) -> Problem:
    """The program of one mesh, for what is asked, without storage and memory. `tables` of the same mesh save most of the work."""
    asked = (request.itemsize, request.recompute, request.may_offload, request.open_constants)
    problem = Problem(regions, machine, *asked, Tables() if tables is None else tables)
    for region in regions.parts.values():
        _mode_variables(problem, region)
        _cluster_variables(problem, region)
    if problem.feasible:
        split_rows_alike(problem)
        _slot_variables(problem)
        for region in regions.parts.values():
            _parameter_constraints(problem, region)
            _edges(problem, region)
            _split_axis_gradients(problem, region)
    return problem


def _mode_variables(problem: Problem, region: Region) -> None:
    """Every layer of a segment runs one mode; what replays is whole or in tiles of one number, never a mixture."""
    program = problem.program
    for segment in range(len(region.segments)):
        modes = segment_modes(region, segment, problem.recompute, problem.offload)
        columns = {mode: program.variable(TIE * i, integer=True, upper=region.count) for i, mode in enumerate(modes)}
        problem.layers[region.key, segment] = columns
        program.constrain([(column, 1.0) for column in columns.values()], region.count, region.count)
        for kind in ("recompute", "spill"):
            same = [mode for mode in modes if mode.kind == kind]
            if len(same) > 1:
                chosen = [program.variable(binary=True) for _ in same]
                program.constrain([(column, 1.0) for column in chosen], 1.0, 1.0)
                for mode, column in zip(same, chosen, strict=True):
                    program.constrain([(columns[mode], 1.0), (column, -region.count)], high=0.0)


def _cluster_variables(problem: Problem, region: Region) -> None:
    """One strategy a cluster; its shares over the modes add up to the layers of each mode."""
    program = problem.program
    for index, part in enumerate(region.parts):
        found = strategies(region.graph, part, region.labels, problem.machine.axes)
        problem.feasible &= bool(found)
        if problem.open_constants:
            found = [variant for strategy in found for variant in variants(part, strategy)]
        segment = region.segment_of(index)
        modes = problem.layers[region.key, segment] if segment is not None else {}
        for order, strategy in enumerate(found):
            cost = problem.price_of(region, index, order, strategy)
            column = program.variable(region.count * (cost.forward_s + cost.backward_s + TIE * order), binary=True)
            problem.choices[column] = choice = Choice(region.key, index, strategy, cost)
            problem._by_part.setdefault((region.key, index), []).append((column, choice))
            shares = {mode: program.variable(region.count * _extra(problem, region, index, choice, mode), upper=1.0) for mode in modes}
            problem.shares[column] = shares
            if shares:
                program.constrain([*((z, 1.0) for z in shares.values()), (column, -1.0)], 0.0, 0.0)
        mine = problem.of_part(region.key, index)
        program.constrain([(column, 1.0) for column, _ in mine], 1.0, 1.0)
        for mode, layers in modes.items():
            program.constrain([*((problem.shares[c][mode], 1.0) for c, _ in mine), (layers, -1.0 / region.count)], 0.0, 0.0)


def _extra(problem: Problem, region: Region, index: int, choice: Choice, mode: Mode) -> float:
    """Seconds that a mode adds to a cluster in one layer."""
    return extra_seconds(problem.machine, region, index, choice.strategy, choice.price, mode)


def extra_seconds(machine: Machine, region: Region, index: int, strategy: Strategy, cost: Price, mode: Mode) -> float:
    """Seconds that a mode adds to one call of a cluster: its replay, and the loss of rate in tiles."""
    again = replays(region, index, mode)
    if mode.tiles == 1:
        return cost.forward_s if again else 0.0
    part = region.parts[index]
    tiled = price(region.graph, part, strategy, machine, mode.tiles, tile_class(region, part))
    slower = max(0.0, tiled.forward_s + tiled.backward_s - cost.forward_s - cost.backward_s)
    return slower + (tiled.forward_s if again else 0.0)


def _ends(problem: Problem, region: Region, part: int, name: str) -> Ends:
    """Variables of a cluster by the layout that they give to a value."""
    ends: Ends = {}
    for column, choice in problem.of_part(region.key, part):
        ends.setdefault(choice.strategy.layouts[name], []).append(column)
    return ends


def _slot_variables(problem: Problem) -> None:
    """Border slots and graph inputs take any layout that one of their users wants; a border value is never a partial sum."""
    wanted: dict[str, dict[Layout, None]] = {}
    for region in problem.regions.parts.values():
        for index, part in enumerate(region.parts):
            for name in (*part.inputs, *part.outputs):
                slot = _slot(problem, region, name)
                if slot:
                    wanted.setdefault(slot, {}).update(dict.fromkeys(_ends(problem, region, index, name)))
    for slot, names in _call_inputs(problem).items():
        for name in names:
            if problem.regions.graph.values[name].kind == "input":
                wanted.setdefault(f"input/{name}", {}).update(wanted.get(slot, {}))
    for slot, layouts in wanted.items():
        usable = [layout for layout in layouts if all(p.kind in "SR" for p in layout)]
        problem.slots[slot] = {layout: [problem.program.variable(TIE * i, binary=True)] for i, layout in enumerate(usable)}
        problem.program.constrain([(column, 1.0) for ends in problem.slots[slot].values() for column in ends], 1.0, 1.0)


def _slot(problem: Problem, region: Region, name: str) -> str | None:
    """The slot of a value of a region: a block's border, or an input of the whole graph."""
    if (region.key, name) in problem.regions.slot_of:
        return problem.regions.slot_of[region.key, name]
    return f"input/{name}" if region.graph.values[name].kind == "input" else None


def _parameter_constraints(problem: Problem, region: Region) -> None:
    """A parameter used by several clusters (tied weights) has one layout for all of them."""
    users: dict[str, list[int]] = {}
    for index, part in enumerate(region.parts):
        for name in part.inputs:
            if region.graph.values[name].kind == "parameter":
                users.setdefault(name, []).append(index)
    for name, parts in users.items():
        ends = [_ends(problem, region, part, name) for part in parts]
        for other in ends[1:]:
            for layout in dict.fromkeys((*ends[0], *other)):
                mine, its = ends[0].get(layout, []), other.get(layout, [])
                problem.program.constrain([*((c, 1.0) for c in mine), *((c, -1.0) for c in its)], 0.0, 0.0)


def _edges(problem: Problem, region: Region) -> None:
    made_by = {name: index for index, part in enumerate(region.parts) for name in part.outputs}
    consumers: dict[str, list[Consumer]] = {}
    for index, part in enumerate(region.parts):
        segment = region.segment_of(index)
        again = segment is not None and index in reached(region, segment)
        for name in part.inputs:
            if region.graph.values[name].kind in ("activation", "input"):
                consumers.setdefault(name, []).append(Consumer(segment, _ends(problem, region, index, name), again))
    if region.key == OUTER:
        for slot, names in _call_inputs(problem).items():
            for name in names:
                consumers.setdefault(name, []).append(Consumer(None, problem.slots[slot], False))
    for name in region.graph.outputs:
        if region.key != OUTER:
            segment = region.segment_of(made_by[name]) if name in made_by else None
            slot = problem.slots[problem.regions.slot_of[region.key, name]]
            consumers.setdefault(name, []).append(Consumer(segment, slot, False))
        else:  # the loss: whole or a partial sum, with one gradient everywhere
            for layout, columns in _ends(problem, region, made_by[name], name).items():
                if not all(p.kind in "RP" for p in layout):
                    problem.program.constrain([(c, 1.0) for c in columns], high=0.0)
    for name, wanted in consumers.items():
        slot = _slot(problem, region, name)
        source = _ends(problem, region, made_by[name], name) if name in made_by else problem.slots[slot]
        problem.sources[region.key, name] = source
        _edge(problem, region, name, made_by.get(name), source, wanted)


def _call_inputs(problem: Problem) -> dict[str, dict[str, None]]:
    """Slot -> outer values that enter it and were not made by a block."""
    found: dict[str, dict[str, None]] = {}
    graph = problem.regions.graph
    for node in graph.nodes:
        if node.is_block:
            for outer, inner in zip(node.inputs, graph.blocks[node.block].inputs, strict=True):
                if (OUTER, outer) not in problem.regions.slot_of:
                    found.setdefault(problem.regions.slot_of[node.block, inner], {})[outer] = None
    return found


def _edge(problem: Problem, region: Region, name: str, maker: int | None, source: Ends, consumers: list[Consumer]) -> None:
    """Tie a value's layout where it is made to its layout at each consumer; pay each distinct reshard once a segment."""
    program = problem.program
    together = {segment for segment, number in Counter(consumer.segment for consumer in consumers).items() if number > 1}
    reshards: dict[tuple[int | None, Layout, Layout], int] = {}
    again: dict[tuple[int | None, Layout, Layout], int] = {}
    for consumer in consumers:
        leaving: dict[Layout, list[Term]] = {layout: [(c, -1.0) for c in columns] for layout, columns in source.items()}
        entering: dict[Layout, list[Term]] = {layout: [(c, -1.0) for c in columns] for layout, columns in consumer.ends.items()}
        share = problem.share(region, consumer.segment, "spill", *(("recompute", "selective") if consumer.again else ()))
        for src in source:
            for dst in consumer.ends:
                path = problem.path(region, name, src, dst)
                if path is None:
                    continue
                edge = program.variable(upper=1.0)
                leaving[src].append((edge, 1.0))
                entering[dst].append((edge, 1.0))
                if not path.moves:
                    continue
                key = (consumer.segment, src, dst)
                if consumer.segment not in together:  # the edge is the reshard
                    program.costs[edge] = region.count * path.seconds
                    _keep_whole(problem, region, consumer.segment, maker, edge)
                else:
                    if key not in reshards:
                        reshards[key] = program.variable(region.count * path.seconds, upper=1.0)
                        _keep_whole(problem, region, consumer.segment, maker, reshards[key])
                    program.constrain([(reshards[key], 1.0), (edge, -1.0)], 0.0)
                if share and path.forward:
                    if key not in again:
                        again[key] = program.variable(region.count * path.forward, upper=1.0)
                    program.constrain([(again[key], 1.0), (edge, -1.0), *((n, -s) for n, s in share)], -1.0)
        for terms in (*leaving.values(), *entering.values()):
            program.constrain(terms, 0.0, 0.0)


def _keep_whole(problem: Problem, region: Region, segment: int | None, maker: int | None, reshard: int) -> None:
    """No reshard where a segment runs in tiles, nor of a matrix product that it keeps."""
    if segment is None:
        return
    for mode, layers in problem.layers[region.key, segment].items():
        if mode.tiles > 1 or (mode.kind == "selective" and maker in kept_matmuls(region, segment)):
            problem.program.constrain([(reshard, 1.0), (layers, 1.0 / region.count)], high=1.0)


def parameter_terms(problem: Problem, region: Region) -> dict[str, list[tuple[int, int]]]:
    """For each parameter of a region: (variable, elements on one rank), taken at its first user."""
    found: dict[str, list[tuple[int, int]]] = {}
    sizes = problem.machine.sizes
    for index, part in enumerate(region.parts):
        for name in part.inputs:
            if region.graph.values[name].kind == "parameter" and name not in found:
                shape = region.graph.values[name].shape
                found[name] = [
                    (c, local_numel(shape, choice.strategy.layouts[name], sizes)) for c, choice in problem.of_part(region.key, index)
                ]
    return found


def _split_axis_gradients(problem: Problem, region: Region) -> None:
    """A parameter that lives whole on a `split` axis while its use is split: its gradient is all-reduced there, every micro-batch."""
    machine = problem.machine
    for name, columns in parameter_terms(problem, region).items():
        for column, numel in columns:
            for seconds in split_axis_gradients(machine, problem.choices[column].strategy.layouts[name], numel * problem.itemsize):
                problem.program.costs[column] += region.count * seconds


def split_axis_gradients(machine: Machine, layout: Layout, nbytes: float) -> Iterator[float]:
    """Seconds of the all-reduces of one parameter's gradient over the `split` axes on which it lives whole and is used in pieces."""
    for index, axis in enumerate(machine.axes):
        if axis.role == "split" and layout[index].kind == "B":
            yield collective_seconds(machine.hardware, "all_reduce", nbytes, machine.span((index,)))


def chosen_strategies(problem: Problem, values: Sequence[float]) -> dict[tuple[str, int], Strategy]:
    """(region, cluster) -> strategy of a solution."""
    return {(c.region, c.part): c.strategy for column, c in problem.choices.items() if values[column] > 0.5}


def chosen_layers(problem: Problem, values: Sequence[float]) -> dict[tuple[str, int], list[tuple[Mode, int]]]:
    """(region, segment) -> modes with their numbers of layers of a solution."""
    return {key: [(m, round(float(values[n]))) for m, n in columns.items()] for key, columns in problem.layers.items()}
