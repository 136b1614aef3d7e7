"""Memory in the linear program: what is alive where a step needs most. `seqloom/plan/budget.py` adds what storage needs.

The rule, in bytes on one rank (`budget` at most):

  where the backward of the last layers runs   standing + kept + staying + transient
  where that of the first layer runs           standing + reduced gradients of the others + what a layer keeps + staying + late
  at the end of backward                       standing + what its end adds (`seqloom/plan/storage.py`)

In between it is less: layers keep no less than those before them, so the sum of what is kept and what has piled up is convex in time.

`kept` counts every storage that some layer keeps for backward once a layer; one that all layers are given (the `common` inputs of a
region, in the layout in which they come) once, whatever the layers do. An input of a segment that replays counts in all layers that
do not send it to the host, those that keep included: then every storage is kept from some layer on, and the layers of several segments
need no adding up. `transient` is the largest over all clusters of: parameters in flight, the cluster's gradients and temporaries, and
what its segment must bring back first. Nothing is counted as brought back where the last layers of the segment keep: when the backward
reaches a layer that brings back, they have freed as much (two of them where host memory is used, because one call is fetched while
another is used). `late` is the same for the clusters of blocks, with all that is brought back.

The last call that uses host memory keeps its activations on the device until the backward has used them, and before that the next one's
are there: `staying`. It adds to all that happens elsewhere; where host memory is used itself, both calls are in what is brought back.

Variables:
  kept[v, L]       share of the layers that keep value v in layout L for themselves       `_kept_rows`
  once[v, L]       all layers are given value v in layout L, and autograd saves it        `_kept_once`
  saved[g, v, L]   autograd saves v in L inside segment g                                 `_saved_variables`
  sent[g, v, L]    share of the layers whose v in L goes to host memory                   `_host_traffic`
  used[g, m]       some layer of segment g runs mode m                                    `_transient_rows`
  back[g]          enough last layers of segment g keep                                   `_transient_rows`
  flight[r]        parameters in flight while the backward of region r runs               `add_storage`
  moving[r]        the same without the reduced gradients that pile up                    `add_storage`
  staying          the largest call that uses host memory                                 `_transient_rows`
  transient, late  as above                                                               `_transient_rows`
  hidden           seconds of a region's traffic beyond the compute beside it             `_host_traffic`, `add_storage`

Bytes are in shares of the budget, so that the solver's tolerances mean the same for a toy and for 405 billion parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from seqloom.cost.compute import host_seconds
from seqloom.cost.hardware import Hardware
from seqloom.plan.linear import LinearProgram, Term
from seqloom.plan.modes import HOST, KEEP, Mode, kept_matmuls
from seqloom.plan.placement import Layout, local_numel
from seqloom.plan.price import kept_value
from seqloom.plan.problem import Problem
from seqloom.plan.regions import OUTER, Region

Key = tuple[str, Layout]  # a storage: a value in a layout
Savers = dict[Key, dict[int, list[int]]]  # storage -> cluster -> variables of the choices that save it


@dataclass
class Memory:
    """A copy of the program of `problem` with the rows of activations, and the columns that `add_storage` completes: `kept` terms of the
    budget and `first` ones of one layer, what stays of a call that uses host memory, the transients, parameters in flight by region.
    """

    problem: Problem
    program: LinearProgram
    unit: float
    staying: int
    transient: int
    late: int
    flight: dict[str, int] = field(default_factory=dict)
    moving: dict[str, int] = field(default_factory=dict)
    used: dict[tuple[str, int | None], dict[Mode, int]] = field(default_factory=dict)
    kept: list[Term] = field(default_factory=list)
    first: list[Term] = field(default_factory=list)


def add_memory(problem: Problem, budget_bytes: float) -> Memory:
    """What activations need, for every storage alike."""
    program = problem.program.copy()
    memory = Memory(problem, program, max(budget_bytes, 1.0), program.variable(), program.variable(), program.variable())
    host: list[Term] = []
    for region in problem.regions.parts.values():
        memory.flight[region.key], memory.moving[region.key] = program.variable(), program.variable()
        memory.used |= {(region.key, segment): _used_modes(problem, program, region, segment) for segment in _segments(region)}
        roots = view_roots(problem, region)
        savers = {segment: _savers(problem, region, segment, roots) for segment in _segments(region)}
        _kept_rows(memory, region, roots, savers)
        host += _host_traffic(memory, region, savers)
        for segment in _segments(region):
            _transient_rows(memory, region, segment, _brought_back(memory, region, segment, savers[segment]))
    if host:
        program.constrain(host, high=1.0)
    return memory


def _segments(region: Region) -> tuple[int | None, ...]:
    return tuple(range(len(region.segments))) or (None,)


def _parts(region: Region, segment: int | None) -> range:
    return range(len(region.parts)) if segment is None else range(region.segments[segment].start, region.segments[segment].stop)


def _modes(problem: Problem, region: Region, segment: int | None) -> Mapping[Mode, int]:
    return problem.layers[region.key, segment] if segment is not None else {}


def _used_modes(problem: Problem, program: LinearProgram, region: Region, segment: int | None) -> dict[Mode, int]:
    """1 for every mode that some layer runs; none where there is nothing to choose."""
    layers = _modes(problem, region, segment)
    used = {mode: program.variable(binary=True) for mode in layers} if set(layers) - {KEEP} else {}
    for mode, column in used.items():
        program.constrain([(column, 1.0), (layers[mode], -1.0 / region.count)], 0.0)
    return used


def _savers(problem: Problem, region: Region, segment: int | None, roots: Roots) -> Savers:
    found: Savers = {}
    for index in _parts(region, segment):
        for column, choice in problem.of_part(region.key, index):
            # Several values of a choice may share one storage: count it once.
            for key in dict.fromkeys(root_of(roots, name, layout) for name, layout in choice.price.saved):
                found.setdefault(key, {}).setdefault(index, []).append(column)
    return found


def _nbytes(memory: Memory, region: Region, key: Key) -> float:
    value = kept_value(region.graph, key[0])
    return local_numel(value.shape, key[1], memory.problem.machine.sizes) * value.dtype.itemsize / memory.unit


# --- kept for backward -----------------------------------------------------------------------------------------------------------


def _kept_rows(memory: Memory, region: Region, roots: Roots, savers: Mapping[int | None, Savers]) -> None:
    """kept[v, L] >= the share of layers in which each segment keeps v in L, by keeping, by `selective`, or as an input of its replay."""
    problem, program = memory.problem, memory.program
    kept: dict[Key, int] = {}
    given = _kept_once(memory, region, savers)
    for segment in _segments(region):
        others = _selective(problem, region, segment)
        for key, column in _inputs(memory, region, segment, roots).items():
            others.setdefault(key, []).append((column, -1.0))
        for key in dict.fromkeys((*savers[segment], *others)):
            if key not in kept:
                kept[key] = program.variable(upper=1.0)
            for columns in savers[segment].get(key, {0: []}).values():
                own = [(share, -1.0) for c in columns if (share := _kept_share(problem, c)) is not None]
                program.constrain([(kept[key], 1.0), *own, *others.get(key, []), *((c, 1.0) for c in given.get(key, ()))], 0.0)
        _stay_held(memory, region, segment, roots, kept)
    memory.first += [(column, _nbytes(memory, region, key)) for key, column in kept.items()]
    memory.kept += [(column, region.count * _nbytes(memory, region, key)) for key, column in kept.items()]


def _kept_once(memory: Memory, region: Region, savers: Mapping[int | None, Savers]) -> dict[Key, list[int]]:
    """once[v, L] >= 1 where some cluster saves a `common` input in the layout L in which it comes.

    Returns the variables that say that it comes in L, by storage.
    """
    given: dict[Key, list[int]] = {}
    for key in dict.fromkeys(key for found in savers.values() for key in found if key[0] in region.common):
        given[key] = memory.problem.sources[region.key, key[0]].get(key[1], [])
        once = memory.program.variable(upper=1.0)
        for columns in (columns for found in savers.values() for columns in found.get(key, {}).values()):
            memory.program.constrain([(once, 1.0), *((c, -1.0) for c in (*columns, *given[key]))], -1.0)
        memory.first.append((once, _nbytes(memory, region, key)))
        memory.kept.append((once, _nbytes(memory, region, key)))
    return given


def _kept_share(problem: Problem, choice: int) -> int | None:
    """The variable for the share of layers that keep what a choice saves; None where its segment never keeps."""
    shares = problem.shares[choice]
    return shares.get(KEEP) if shares else choice


def _selective(problem: Problem, region: Region, segment: int | None) -> dict[Key, list[Term]]:
    """Matrix products kept by `selective`, with their shares (negative: they stand on the small side of a row)."""
    found: dict[Key, list[Term]] = {}
    modes = [mode for mode in _modes(problem, region, segment) if mode.kind == "selective"]
    for mode in modes:
        for index in kept_matmuls(region, segment):
            name = region.parts[index].outputs[0]
            for column, choice in problem.of_part(region.key, index):
                found.setdefault((name, choice.strategy.layouts[name]), []).append((problem.shares[column][mode], -1.0))
    return found


def _inputs(memory: Memory, region: Region, segment: int | None, roots: Roots) -> dict[Key, int]:
    """Inputs of a segment that replays, with a variable for the share of the layers that hold them for it."""
    problem, program = memory.problem, memory.program
    found: dict[Key, int] = {}
    share = problem.share(region, segment, "recompute", "selective")
    if not share:
        return found
    for name in region.segments[segment].inputs:
        if region.graph.values[name].requires_grad:
            for layout, columns in problem.sources[region.key, name].items():
                key = root_of(roots, name, layout)
                if key not in found:
                    found[key] = program.variable(upper=1.0)
                program.constrain([(found[key], 1.0), *((n, -s) for n, s in share), *((c, -1.0) for c in columns)], -1.0)
    return found


def _stay_held(memory: Memory, region: Region, segment: int | None, roots: Roots, kept: Mapping[Key, int]) -> None:
    """kept[v, L] >= the share of all layers that replay or keep, for the inputs of a segment that replays in some."""
    problem, program = memory.problem, memory.program
    replaying = [column for mode, column in memory.used[region.key, segment].items() if mode.kind in ("recompute", "selective")]
    share = problem.share(region, segment, "recompute", "selective", "keep")
    for name in region.segments[segment].inputs if replaying else ():
        if region.graph.values[name].requires_grad:
            for layout, columns in problem.sources[region.key, name].items():
                held = [(kept[root_of(roots, name, layout)], 1.0), *((n, -s) for n, s in share), *((c, -1.0) for c in columns)]
                for column in replaying:
                    program.constrain([*held, (column, -1.0)], -2.0)


# --- host memory -----------------------------------------------------------------------------------------------------------------


def _host_traffic(memory: Memory, region: Region, savers: Mapping[int | None, Savers]) -> list[Term]:
    """Seconds of copies to the host beyond the forward, and back beyond the backward, of all calls of the region together.

    Returns the terms of what lies in host memory, in shares of what a device may use there. A copy takes the device's memory bandwidth
    while it runs, which kernels then lack: that is paid even where the copy itself is hidden.
    """
    problem, program = memory.problem, memory.program
    copies: list[Term] = []
    lying: list[Term] = []
    for segment in _segments(region):
        for key, column in _spilled(memory, region, segment).items():
            nbytes = _nbytes(memory, region, key) * memory.unit
            program.costs[column] += region.count * copy_seconds(problem.machine.hardware, nbytes)
            copies.append((column, -host_seconds(problem.machine.hardware, nbytes)))
            lying.append((column, region.count * nbytes / problem.machine.hardware.host_memory_bytes))
        modes = [mode for mode in _modes(problem, region, segment) if mode.kind == "offload"]
        for mode in modes:
            for key, clusters in savers[segment].items():
                nbytes = _nbytes(memory, region, key) * memory.unit
                sent = program.variable(region.count * copy_seconds(problem.machine.hardware, nbytes), upper=1.0)
                for columns in clusters.values():
                    program.constrain([(sent, 1.0), *((problem.shares[c][mode], -1.0) for c in columns)], 0.0)
                copies.append((sent, -host_seconds(problem.machine.hardware, nbytes)))
                lying.append((sent, region.count * nbytes / problem.machine.hardware.host_memory_bytes))
    if copies:
        for phase in ("forward_s", "backward_s"):
            hidden = program.variable(region.count)
            program.constrain([(hidden, 1.0), *copies, *compute_terms(problem, region, phase)], 0.0)
    return lying


def _spilled(memory: Memory, region: Region, segment: int | None) -> dict[Key, int]:
    """Inputs of a segment with a variable for the share of the layers that send them to the host to be replayed from there."""
    problem, program = memory.problem, memory.program
    share = problem.share(region, segment, "spill")
    found: dict[Key, int] = {}
    for name in region.segments[segment].inputs if share else ():
        if region.graph.values[name].requires_grad:
            for layout, columns in problem.sources[region.key, name].items():
                found[name, layout] = program.variable(upper=1.0)
                program.constrain([(found[name, layout], 1.0), *((n, -s) for n, s in share), *((c, -1.0) for c in columns)], -1.0)
    return found


def copy_seconds(hardware: Hardware, nbytes: float) -> float:
    """Seconds of memory bandwidth that a copy to the host and back takes from the kernels beside it."""
    return 2 * nbytes / hardware.memory_bandwidth


def compute_terms(problem: Problem, region: Region, phase: str) -> Iterator[Term]:
    """Seconds of compute of one call of a region in forward or backward (with its replays), behind which traffic may hide."""
    for column, choice in problem.choices.items():
        if choice.region == region.key:
            yield column, getattr(choice.price, phase)
            if phase == "backward_s":
                yield from (
                    (z, problem.program.costs[z] / region.count) for z in problem.shares[column].values() if problem.program.costs[z]
                )


# --- transients ------------------------------------------------------------------------------------------------------------------


def _brought_back(memory: Memory, region: Region, segment: int | None, savers: Savers) -> dict[Mode, list[Term]]:
    """Mode -> terms of the bytes that it brings back for one layer of the segment."""
    problem, program = memory.problem, memory.program
    modes = [mode for mode in _modes(problem, region, segment) if mode.kind != "keep"]
    if not modes:
        return {}
    inputs = set(region.segments[segment].inputs)
    products = {region.parts[index].outputs[0] for index in kept_matmuls(region, segment)}
    back: dict[Mode, list[Term]] = {mode: [] for mode in modes}
    for key, clusters in savers.items():
        name, nbytes = key[0], _nbytes(memory, region, key)
        saved = program.variable(upper=1.0)
        made = saved
        for columns in clusters.values():
            program.constrain([(saved, 1.0), *((c, -1.0) for c in columns)], 0.0)
        if name in region.common or (name in inputs and region.graph.values[name].requires_grad):  # there already if it came in this layout
            made = program.variable(upper=1.0)
            source = problem.sources[region.key, name].get(key[1], [])
            for columns in clusters.values():
                program.constrain([(made, 1.0), *((c, -1.0) for c in columns), *((c, 1.0) for c in source)], 0.0)
        for mode in modes:
            if mode.kind == "offload":
                back[mode].append((saved, 2 * nbytes))
            elif mode.kind == "spill":
                back[mode].append((made if name in region.common else saved, nbytes / mode.tiles))
            elif mode.kind == "recompute" or name not in products:
                back[mode].append((made, nbytes / mode.tiles))
    for mode in modes:
        if whole_inputs(mode):
            back[mode] += [(column, whole_inputs(mode) * nbytes) for column, nbytes in _input_bytes(memory, region, segment)]
    return back


def _input_bytes(memory: Memory, region: Region, segment: int | None) -> Iterator[Term]:
    """Bytes of the inputs of a segment that a replay starts from, by the choices that bring them."""
    for name in region.segments[segment].inputs:
        if region.graph.values[name].requires_grad:
            for layout, columns in memory.problem.sources[region.key, name].items():
                yield from ((column, _nbytes(memory, region, (name, layout))) for column in columns)


def whole_inputs(mode: Mode) -> int:
    """How many times a mode holds its segment's inputs, whole, while it brings back: the next call's, which are being fetched; in tiles
    also this call's, and beside a tile the gradients of results and of inputs, in pieces and joined.
    """
    fetched = (1 if mode.tiles == 1 else 2) if mode.kind == "spill" else 0
    return fetched + (3 if mode.tiles > 1 else 0)


def _transient_rows(memory: Memory, region: Region, segment: int | None, back: Mapping[Mode, list[Term]]) -> None:
    """transient, late >= in flight + working + brought back, for every mode that is used; transient but where that is made up for.

    What is brought back from the host holds what stays there.
    """
    problem, program, block = memory.problem, memory.program, region.key != OUTER
    layers, used = _modes(problem, region, segment), memory.used[region.key, segment]
    working, most = program.variable(), 0.0
    for index in _parts(region, segment):
        mine = [(column, choice.price.working_bytes / memory.unit) for column, choice in problem.of_part(region.key, index)]
        program.constrain([(working, 1.0), *((column, -nbytes) for column, nbytes in mine)], 0.0)
        most = max([most, *(nbytes for _, nbytes in mine)])
    whole, late = [(memory.transient, 1.0), (memory.flight[region.key], -1.0)], [(memory.late, 1.0), (memory.moving[region.key], -1.0)]
    if not used:
        for start in (whole, late) if block else (whole,):
            program.constrain([*start, (working, -1.0)], 0.0)
        return
    enough = _enough_kept(program, layers, used)
    for mode, column in used.items():
        returned = back.get(mode, [])
        limit = most / mode.tiles + sum(entry for _, entry in returned)
        terms = [(working, -1.0 / mode.tiles), *((c, -entry) for c, entry in returned), (column, -limit)]
        made_up = [] if mode == KEEP or enough is None else [(enough, limit)]
        held = []
        if mode.kind in HOST:
            held = [(memory.staying, 1.0)]
            moved = [(c, entry / 2) for c, entry in returned] if mode.kind == "offload" else [*_input_bytes(memory, region, segment)]
            most_moved = sum(entry for _, entry in moved)
            program.constrain([*held, *((c, -entry) for c, entry in moved), (column, -most_moved)], -most_moved)
        program.constrain([*whole, *held, *terms, *made_up], -limit)
        program.constrain([*late, *held, *terms], -limit)


def _enough_kept(program: LinearProgram, layers: Mapping[Mode, int], used: Mapping[Mode, int]) -> int | None:
    """back[g]: the last layer keeps, the last two where another one is offloaded."""
    if KEEP not in used:
        return None
    enough = program.variable(binary=True)
    program.constrain([(layers[KEEP], 1.0), (enough, -1.0)], 0.0)
    for mode, column in used.items():
        if mode.kind in HOST:
            program.constrain([(layers[KEEP], 1.0), (enough, -2.0), (column, -2.0)], -2.0)
    return enough


Roots = Mapping[Key, Key]


def view_roots(problem: Problem, region: Region) -> Roots:
    """(output, layout) of clusters made of views -> (the value they look into, its layout): one storage."""
    found: dict[Key, Key] = {}
    for index, part in enumerate(region.parts):
        root = part.looks_into
        if root is not None:
            for _, choice in problem.of_part(region.key, index):
                layouts = choice.strategy.layouts
                found.update({(name, layouts[name]): (root, layouts[root]) for name in part.outputs})
    return found


def root_of(roots: Roots, name: str, layout: Layout) -> Key:
    """The value and layout whose storage a value in a layout shares."""
    key = (name, layout)
    while key in roots:
        key = roots[key]
    return key
