"""The placement problem of one mesh and one ZeRO level as a mixed-integer linear program.

Variables (all but `x`, `slot`, `param` and `rec` may be continuous: they follow from those):
  x[c, k, s]       cluster c runs strategy s; k = 1 when its segment is recomputed        `_cluster_variables`
  slot[t, L]       the values of border slot t (or a graph input) lie in layout L         `_slot_variables`
  param[p, L]      a parameter that several clusters use lies in layout L                 `_parameter_variables`
  rec[g]           segment g of a block is recomputed                                     `_cluster_variables`
  e[v, c, L, M]    consumer c gets value v, made in layout L, in layout M                 `_edges`
  r[v, g, L, M]    value v is resharded from L to M for the consumers in segment g        `_edge`
  again[v, g, ..]  the same once more, because g is recomputed                            `_edge`
  m[v, L]          value v in layout L is kept for backward                               `_memory`
  hidden[g]        seconds of a group's ZeRO traffic that compute does not hide           `_storage`
  transient        the largest working set of any backward                                `_memory`

Objective: seconds of one micro-batch: clusters (forward, backward, forward again where recomputed) times the number of calls, reshards,
gradient reductions on `split` axes, exposed ZeRO traffic, the optimizer's share.

Constraints: one strategy a cluster; edges agree with both ends; a parameter has one layout; kept values cover what every chosen strategy
needs; where backward begins stored + resident + kept + transient <= memory (a transient holds what is in flight and what recomputing
brings back), and where it ends stored + resident + what its end adds <= memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

from seqloom.cost.communication import collective_seconds
from seqloom.plan.linear import LinearProgram, Term
from seqloom.plan.placement import Layout, Move, local_shape, reshard_path
from seqloom.plan.price import Machine, Price, kept_value, move_seconds, price, view_root
from seqloom.plan.regions import OUTER, Region, Regions
from seqloom.plan.space import Strategy, strategies
from seqloom.plan.storage import Storage, group_cost

MEMORY_TOLERANCE = 1e-5
"""Share of the budget that is left free: the solver keeps a constraint to about 1e-6, and a plan must never exceed the budget at all."""

Ends = dict[Layout, list[int]]  # layout -> variables, one of which is 1 when the layout is used
Consumer = tuple[int | None, Ends]  # the segment that it stands in, and its layouts


@dataclass(frozen=True)
class Choice:
    """One variable `x`: cluster `part` of `region` runs `strategy`; `kept` is False in the variant that is recomputed."""

    region: str
    part: int
    strategy: Strategy
    price: Price
    kept: bool


@dataclass
class Problem:
    """The program under construction and the meaning of its variables."""

    regions: Regions
    machine: Machine
    storage: Storage
    budget_bytes: float
    program: LinearProgram = field(default_factory=LinearProgram)
    choices: dict[int, Choice] = field(default_factory=dict)
    recompute: dict[tuple[str, int], int] = field(default_factory=dict)
    slots: dict[str, Ends] = field(default_factory=dict)
    sources: dict[tuple[str, str], Ends] = field(default_factory=dict)
    kept: dict[tuple[str, str, Layout], int] = field(default_factory=dict)
    feasible: bool = True

    def of_part(self, region: str, part: int) -> list[tuple[int, Choice]]:
        """The variables of one cluster."""
        return self._by_part.get((region, part), [])

    def path(self, region: Region, name: str, src: Layout, dst: Layout) -> tuple[float, tuple[Move, ...]] | None:
        """Cheapest reshard of a value in this mesh: seconds and moves."""
        value = region.graph.values[name]
        key = (value.shape, value.dtype, value.requires_grad, src, dst)
        if key not in self._paths:
            cost = lambda shape, before, move: sum(move_seconds(value, before, move, self.machine)) + 1e-9  # noqa: E731
            self._paths[key] = reshard_path(value.shape, src, dst, self.machine.sizes, cost)
        return self._paths[key]

    def __post_init__(self) -> None:
        self._by_part: dict[tuple[str, int], list[tuple[int, Choice]]] = {}
        self._paths: dict[tuple, tuple[float, tuple[Move, ...]] | None] = {}


def build_problem(regions: Regions, machine: Machine, storage: Storage, budget_bytes: float, allow_recompute: bool | None) -> Problem:
    """The program for one mesh and ZeRO level. `allow_recompute`: None lets the solver choose, False forbids it, True demands it."""
    problem = Problem(regions, machine, storage, budget_bytes)
    for region in regions.parts.values():
        _cluster_variables(problem, region, allow_recompute)
    if problem.feasible:
        _slot_variables(problem)
        _parameter_variables(problem)
        for region in regions.parts.values():
            _edges(problem, region)
        _storage(problem)
        _memory(problem)
    return problem


def _cluster_variables(problem: Problem, region: Region, allow_recompute: bool | None) -> None:
    program = problem.program
    for index, part in enumerate(region.parts):
        found = strategies(region.graph, part, region.labels, problem.machine.axes)
        problem.feasible &= bool(found)
        segment = region.segment_of(index)
        may = segment is not None and region.segments[segment].recomputable and allow_recompute is not False
        terms: dict[bool, list[Term]] = {True: [], False: []}
        for order, strategy in enumerate(found):
            cost = price(region.graph, part, strategy, problem.machine)
            for kept in (True, False) if may else (True,):
                seconds = cost.forward_s * (1 if kept else 2) + cost.backward_s
                column = program.variable(region.count * (seconds + 1e-9 * order), binary=True)
                problem.choices[column] = choice = Choice(region.key, index, strategy, cost, kept)
                problem._by_part.setdefault((region.key, index), []).append((column, choice))
                terms[kept].append((column, 1.0))
        if not may:
            program.constrain(terms[True], 1.0, 1.0)
            continue
        rec = _recompute_variable(problem, region.key, segment, allow_recompute)
        program.constrain([*terms[True], (rec, 1.0)], 1.0, 1.0)
        program.constrain([*terms[False], (rec, -1.0)], 0.0, 0.0)


def _recompute_variable(problem: Problem, region: str, segment: int, demanded: bool | None) -> int:
    if (region, segment) not in problem.recompute:
        column = problem.program.variable(binary=True)
        problem.recompute[region, segment] = column
        if demanded:
            problem.program.constrain([(column, 1.0)], 1.0, 1.0)
    return problem.recompute[region, segment]


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
        problem.slots[slot] = {layout: [problem.program.variable(1e-9 * i, binary=True)] for i, layout in enumerate(usable)}
        problem.program.constrain([(column, 1.0) for ends in problem.slots[slot].values() for column in ends], 1.0, 1.0)


def _slot(problem: Problem, region: Region, name: str) -> str | None:
    """The slot of a value of a region: a block's border, or an input of the whole graph."""
    if (region.key, name) in problem.regions.slot_of:
        return problem.regions.slot_of[region.key, name]
    return f"input/{name}" if region.graph.values[name].kind == "input" else None


def _parameter_variables(problem: Problem) -> None:
    """A parameter used by several clusters (tied weights) has one layout for all of them."""
    for region in problem.regions.parts.values():
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
        for name in part.inputs:
            if region.graph.values[name].kind in ("activation", "input"):
                consumers.setdefault(name, []).append((region.segment_of(index), _ends(problem, region, index, name)))
    if region.key == OUTER:
        for slot, names in _call_inputs(problem).items():
            for name in names:
                consumers.setdefault(name, []).append((None, problem.slots[slot]))
    for name in region.graph.outputs:
        if region.key != OUTER:
            segment = region.segment_of(made_by[name]) if name in made_by else None
            consumers.setdefault(name, []).append((segment, problem.slots[problem.regions.slot_of[region.key, name]]))
        else:  # the loss: whole or a partial sum, with one gradient everywhere
            for layout, columns in _ends(problem, region, made_by[name], name).items():
                if not all(p.kind in "RP" for p in layout):
                    problem.program.constrain([(c, 1.0) for c in columns], high=0.0)
    for name, ends in consumers.items():
        slot = _slot(problem, region, name)
        source = _ends(problem, region, made_by[name], name) if name in made_by else problem.slots[slot]
        problem.sources[region.key, name] = source
        _edge(problem, region, name, source, ends)


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


def _edge(problem: Problem, region: Region, name: str, source: Ends, consumers: list[Consumer]) -> None:
    """Tie a value's layout where it is made to its layout at each consumer; pay each distinct reshard once a segment."""
    program = problem.program
    reshards: dict[tuple[int | None, Layout, Layout], int] = {}
    for segment, target in consumers:
        leaving: dict[Layout, list[Term]] = {layout: [(c, -1.0) for c in columns] for layout, columns in source.items()}
        entering: dict[Layout, list[Term]] = {layout: [(c, -1.0) for c in columns] for layout, columns in target.items()}
        for src in source:
            for dst in target:
                path = problem.path(region, name, src, dst)
                if path is None:
                    continue
                edge = program.variable(upper=1.0)
                leaving[src].append((edge, 1.0))
                entering[dst].append((edge, 1.0))
                if path[1]:
                    if (segment, src, dst) not in reshards:
                        reshards[segment, src, dst] = _reshard_variable(problem, region, name, segment, src, path)
                    program.constrain([(reshards[segment, src, dst], 1.0), (edge, -1.0)], 0.0)
        for terms in (*leaving.values(), *entering.values()):
            program.constrain(terms, 0.0, 0.0)


def _reshard_variable(
    problem: Problem, region: Region, name: str, segment: int | None, src: Layout, path: tuple[float, tuple[Move, ...]]
) -> int:
    """One reshard in one segment; where the segment may be recomputed its forward is paid again."""
    program = problem.program
    column = program.variable(region.count * path[0], upper=1.0)
    rec = problem.recompute.get((region.key, segment)) if segment is not None else None
    if rec is not None:
        forward, before = 0.0, src
        for move in path[1]:
            forward += move_seconds(region.graph.values[name], before, move, problem.machine)[0]
            before = move.layout
        again = program.variable(region.count * forward, upper=1.0)
        program.constrain([(again, 1.0), (column, -1.0), (rec, -1.0)], -1.0)
    return column


def _local_numel(problem: Problem, choice: Choice, region: Region, name: str) -> int:
    return prod(local_shape(region.graph.values[name].shape, choice.strategy.layouts[name], problem.machine.sizes))


def parameter_terms(problem: Problem, region: Region) -> dict[str, list[tuple[int, int]]]:
    """For each parameter of a region: (variable, elements on one rank), taken at its first user."""
    found: dict[str, list[tuple[int, int]]] = {}
    for index, part in enumerate(region.parts):
        for name in part.inputs:
            if region.graph.values[name].kind == "parameter" and name not in found:
                found[name] = [(c, _local_numel(problem, choice, region, name)) for c, choice in problem.of_part(region.key, index)]
    return found


def _storage(problem: Problem) -> None:
    """Exposed ZeRO traffic of each group: what its collectives take beyond the compute that runs beside them."""
    program, machine = problem.program, problem.machine
    for region in problem.regions.parts.values():
        root = region.key == OUTER
        traffic: dict[str, list[Term]] = {"forward_s": [], "backward_s": []}
        for terms in parameter_terms(problem, region).values():
            for column, numel in terms:
                cost = group_cost(numel, machine, problem.storage, root)
                program.costs[column] += region.count * cost.optimizer_s
                traffic["forward_s"].append((column, cost.forward_s))
                traffic["backward_s"].append((column, cost.backward_s))
        for phase, terms in traffic.items():
            exposed = program.variable(region.count)
            compute = [(c, getattr(choice.price, phase)) for c, choice in problem.choices.items() if choice.region == region.key]
            program.constrain([(exposed, 1.0), *((c, -s) for c, s in terms), *compute], 0.0)
        _split_axis_gradients(problem, region)


def _split_axis_gradients(problem: Problem, region: Region) -> None:
    """A parameter that lives whole on a `split` axis while its use is split: its gradient is all-reduced there, every micro-batch."""
    for terms in parameter_terms(problem, region).items():
        name, columns = terms
        for column, numel in columns:
            layout = problem.choices[column].strategy.layouts[name]
            for index, axis in enumerate(problem.machine.axes):
                if axis.role == "split" and layout[index].kind == "B":
                    nbytes = numel * problem.storage.itemsize
                    seconds = collective_seconds(problem.machine.hardware, "all_reduce", nbytes, problem.machine.span((index,)))
                    problem.program.costs[column] += region.count * seconds


def _memory(problem: Problem) -> None:
    """Everything in shares of the budget, so that the solver's tolerances mean the same for a toy and for 405 billion parameters."""
    program, unit = problem.program, max(problem.budget_bytes, 1.0)
    total: list[Term] = []
    ending: list[Term] = []
    transient = program.variable()
    for region in problem.regions.parts.values():
        root = region.key == OUTER
        in_flight: list[Term] = []
        for terms in parameter_terms(problem, region).values():
            for column, numel in terms:
                cost = group_cost(numel, problem.machine, problem.storage, root)
                total.append((column, region.count * (cost.stored_bytes + cost.resident_bytes) / unit))
                in_flight.append((column, -cost.in_flight_bytes / unit))
                ending.append((column, region.count * (cost.stored_bytes + cost.resident_bytes + cost.ending_bytes) / unit))
        _kept_variables(problem, region)
        for index in range(len(region.parts)):
            working = [(c, -choice.price.working_bytes / unit) for c, choice in problem.of_part(region.key, index)]
            brought_back = [(c, -nbytes / unit) for c, nbytes in _recomputed(problem, region, index)]
            program.constrain([(transient, 1.0), *working, *in_flight, *brought_back], 0.0)
    for (key, name, layout), column in problem.kept.items():
        region = problem.regions.parts[key]
        value = kept_value(region.graph, name)
        nbytes = prod(local_shape(value.shape, layout, problem.machine.sizes)) * value.dtype.itemsize
        total.append((column, region.count * nbytes / unit))
    program.constrain([*total, (transient, 1.0)], high=1.0 - MEMORY_TOLERANCE)
    program.constrain(ending, high=1.0 - MEMORY_TOLERANCE)


def _recomputed(problem: Problem, region: Region, part: int) -> list[tuple[int, int]]:
    """Bytes that recomputing a cluster's segment brings back while its backward runs."""
    segment = region.segment_of(part)
    if segment is None:
        return []
    span = region.segments[segment]
    found = [pair for index in range(span.start, span.stop) for pair in problem.of_part(region.key, index)]
    return [(c, sum(choice.price.saved.values())) for c, choice in found if not choice.kept]


def _kept_variables(problem: Problem, region: Region) -> None:
    """m[v, L] >= each cluster's need of v in L; a recomputed segment keeps its inputs instead."""
    roots = view_roots(problem, region)
    for index in range(len(region.parts)):
        needs: dict[tuple[str, Layout], dict[int, None]] = {}  # several values of a choice may share one storage: count it once
        for column, choice in problem.of_part(region.key, index):
            if choice.kept:
                for name, layout in choice.price.saved:
                    needs.setdefault(root_of(roots, name, layout), {})[column] = None
        for key, columns in needs.items():
            problem.program.constrain([(_kept(problem, region.key, key), 1.0), *((c, -1.0) for c in columns)], 0.0)
    for (key, segment), rec in problem.recompute.items():
        if key == region.key:
            for name in region.segments[segment].inputs:
                if region.graph.values[name].requires_grad:
                    for layout, columns in problem.sources[key, name].items():
                        column = _kept(problem, key, root_of(roots, name, layout))
                        problem.program.constrain([(column, 1.0), (rec, -1.0), *((c, -1.0) for c in columns)], -1.0)


def _kept(problem: Problem, region: str, key: tuple[str, Layout]) -> int:
    if (region, *key) not in problem.kept:
        problem.kept[region, *key] = problem.program.variable(upper=1.0)
    return problem.kept[region, *key]


Roots = Mapping[tuple[str, Layout], tuple[str, Layout]]


def view_roots(problem: Problem, region: Region) -> Roots:
    """(output, layout) of clusters made of views -> (the value they look into, its layout): one storage."""
    found: dict[tuple[str, Layout], tuple[str, Layout]] = {}
    for index, part in enumerate(region.parts):
        root = view_root(region.graph, part)
        if root is not None:
            for _, choice in problem.of_part(region.key, index):
                layouts = choice.strategy.layouts
                found.update({(name, layouts[name]): (root, layouts[root]) for name in part.outputs})
    return found


def root_of(roots: Roots, name: str, layout: Layout) -> tuple[str, Layout]:
    """The value and layout whose storage a value in a layout shares."""
    key = (name, layout)
    while key in roots:
        key = roots[key]
    return key
