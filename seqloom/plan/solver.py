"""Find the plan: every mesh, every storage, one linear program each.

Role in the pipeline: `Regions` and a machine in, `Decisions` out. The variables, the objective and the constraints of one program are
described in `seqloom/plan/problem.py` (placements and modes) and `seqloom/plan/memory.py` (memory and storage), each beside the function
that states it. Around it this module enumerates

  meshes      factorizations of the ranks into at most three axes, each axis with a role (`request.candidate_meshes`)
  storages    ZeRO 3 to 0 over subsets of the axes, those left out that another one beats in everything (`storage.storages`)

and keeps the fastest plan that fits: a best-first branch and bound (`_explore`). For each mesh a relaxation that no storage can beat is
solved first (`budget.add_bound`); the most promising mesh is then looked into, which gives the LP relaxation of each of its storages, and
the most promising storage is settled: an integral relaxation is the answer, otherwise HiGHS branches. What is no better than the best plan
so far ends where it stands. Meshes of three axes come after the others.

Host memory is taken only where it saves a hundredth of the step: its copies must come in time for the planned memory to hold, and nothing
else here depends on timing. The same input always gives the same answer: candidates come in a fixed order, a later one must be better,
programs that are solved side by side do not depend on each other, and ties inside a program are broken by a tiny cost per strategy.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import pairwise
from threading import Lock

from seqloom.errors import UserError
from seqloom.plan.budget import add_bound, add_storage, has_room, may_need_less
from seqloom.plan.failure import why_nothing_fits
from seqloom.plan.linear import LinearProgram, OutOfTime, Solution
from seqloom.plan.memory import add_memory
from seqloom.plan.modes import Counts, in_order
from seqloom.plan.placement import Layout
from seqloom.plan.price import Machine
from seqloom.plan.problem import Problem, Tables, build_problem, chosen_layers, chosen_strategies
from seqloom.plan.regions import Regions
from seqloom.plan.request import Request, candidate_meshes, wanted_sum_axes
from seqloom.plan.space import Axis, Constants
from seqloom.plan.storage import Storage, storages

BETTER = 1e-9  # seconds by which a later candidate must win, beside the gap
ENDLESS = 1e18  # bytes of memory: no limit
Mesh = tuple[Axis, ...]
Leaf = tuple[Storage, Solution]  # with the solution of its relaxation
WhyNot = Callable[[Regions, Request], str]
FAR = {"sum": 0.25, "split": 0.1}  # share of a step by which a mesh must be slower for its refinements not to be looked at
COARSE = 2  # axes of a mesh
THREADS = 2  # the solver works outside Python's lock
OFFLOAD_GAIN = 0.01  # share of a step that host memory must save: copies that come late cost memory that was not planned


@dataclass(frozen=True)
class Decisions:
    """All choices as plain data, independent of sizes: they can be laid over a shrunken model of the same structure.

    `splits[region][cluster]` names the split class per axis, `constants[region][cluster]` the constants chosen; `modes[region][segment]`
    the modes in layer order with their numbers of layers; `slots` are the layouts at block borders and of the graph's inputs.
    """

    axes: Mesh
    dp: int
    storage: Storage
    splits: Mapping[str, tuple[tuple[str, ...], ...]]
    constants: Mapping[str, tuple[Constants, ...]]
    modes: Mapping[str, tuple[Counts, ...]]
    slots: Mapping[str, Layout]


@dataclass(frozen=True)
class Alternative:
    """A mesh that was tried: a bound on its seconds a micro-batch (None: nothing divides or fits), `exact` for the chosen one with its
    storage. `reason` says in a clause why it was not chosen.
    """

    axes: Mesh
    storage: Storage | None
    seconds: float | None
    exact: bool
    reason: str


@dataclass(frozen=True)
class SolverReport:
    """How the answer was found: `status`, relative `gap` to the proven bound, seconds, variables and programs solved, what else was
    tried, and the seconds a micro-batch that no plan of the chosen mesh could beat if memory had no limit.
    """

    status: str
    gap: float
    seconds: float
    variables: int
    programs: int
    alternatives: tuple[Alternative, ...] = ()
    unlimited_s: float | None = None


@dataclass
class Search:
    """The best plans so far, without and with host memory, and what was tried; `free` bounds every mesh by the seconds that it takes with
    no storage and no limit of memory (or with host memory, once that is known).
    """

    request: Request
    best: dict[bool, tuple[float, Decisions, Solution]] = field(default_factory=dict)
    variables: int = 0
    programs: int = 0
    unsolved: int = 0
    free: dict[Mesh, float] = field(default_factory=dict)
    tried: dict[bool, list[Alternative]] = field(default_factory=lambda: {False: [], True: []})
    tables: dict[Mesh, Tables] = field(default_factory=dict)
    lock: Lock = field(default_factory=Lock)

    def limit(self, offload: bool) -> float:
        """Seconds that the next candidate must beat: the best so far by the gap; a plan that takes host memory one without by
        `OFFLOAD_GAIN`, so much may the other be slower.
        """
        limits = [float("inf")]
        if offload in self.best:
            limits.append(self.best[offload][0] * (1 - self.request.gap) - BETTER)
        if offload and False in self.best:
            limits.append(self.best[False][0] * (1 - OFFLOAD_GAIN))
        if not offload and True in self.best:
            limits.append(self.best[True][0] / (1 - OFFLOAD_GAIN))
        return min(limits)


@dataclass(order=True)
class _Open:
    """A mesh, or one storage of it, where a better plan may be: none takes less than `seconds`. In the order of being looked into."""

    promise: tuple[float, int]
    order: int
    axes: Mesh = field(compare=False)
    seconds: float = field(compare=False)
    leaf: Leaf | None = field(default=None, compare=False)


def solve(regions: Regions, request: Request, why: WhyNot = why_nothing_fits) -> tuple[Decisions, SolverReport]:
    """The fastest decisions that fit. Raises `UserError` when none does, with what binds, in the words of `why`."""
    started = time.monotonic()
    search = Search(replace(request, sum_axes=wanted_sum_axes(regions, request)))
    coarse, fine = _levels(search.request)
    for meshes, passes in ((coarse, (False, True)), (fine, (True, False))):
        for offload in passes if request.may_offload else (False,):
            _explore(search, regions, meshes, offload)
    if not search.best and search.unsolved:
        raise UserError(
            f"no plan was found: {search.unsolved} of {search.programs} searches met the limit of {request.time_limit_s:g} s without one; "
            f"narrow the search with --force (such as --force sp{request.ranks}) or --zero"
        )
    if not search.best:
        raise UserError(why(regions, search.request))
    plain, offloaded = search.best.get(False), search.best.get(True)
    takes_host = plain is None or (offloaded is not None and offloaded[0] <= plain[0] * (1 - OFFLOAD_GAIN))
    seconds, decisions, solution = search.best[takes_host]
    status = solution.status if not search.unsolved else f"{solution.status}; {search.unsolved} searches out of time"
    tried = _alternatives(search.tried[takes_host], decisions, seconds)
    unlimited = _unlimited(search, _problem(search, regions, decisions.axes, takes_host))
    elapsed = time.monotonic() - started
    return decisions, SolverReport(status, solution.gap, elapsed, search.variables, search.programs, tried, unlimited)


def _levels(request: Request) -> tuple[list[Mesh], list[Mesh]]:
    """The meshes of one or two axes, then those of more, which take far longer and are mostly ruled out by what the others gave."""
    meshes = list(candidate_meshes(request))
    return [mesh for mesh in meshes if len(mesh) <= COARSE], [mesh for mesh in meshes if len(mesh) > COARSE]


def _explore(search: Search, regions: Regions, meshes: Sequence[Mesh], offload: bool) -> None:
    """Best first: of what is open (meshes, and storages of meshes looked into) always what promises most, until nothing can be better.

    Programs that do not wait for each other are solved `THREADS` at a time.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        bounds = list(pool.map(lambda axes: _bound(search, regions, axes, offload), meshes))
        tried = {bound.axes: bound for bound, _ in bounds}
        order = itertools.count()
        heap = [_Open(_promise(bound), next(order), bound.axes, bound.seconds, leaf) for bound, leaf in bounds if bound.seconds is not None]
        heapq.heapify(heap)
        while heap:
            first = heapq.heappop(heap)
            if first.seconds >= search.limit(offload):
                continue
            if first.leaf is not None:
                _settle(search, regions, first, offload)
                continue
            looked_into = [first, *_meshes_next(heap, search.limit(offload))]
            leaves = pool.map(lambda item: _leaves(search, regions, item.axes, offload), looked_into)
            for item, (found, bound) in zip(looked_into, leaves, strict=True):
                tried[item.axes] = bound
                for leaf in found:
                    seconds = leaf[1].objective
                    heapq.heappush(heap, _Open(_promise(replace(bound, seconds=seconds)), next(order), item.axes, seconds, leaf))
    search.tried[offload] += sorted(tried.values(), key=_promise)
    if offload:  # what host memory does not help to is no faster without
        search.free.update({axes: bound.seconds for axes, bound in tried.items() if bound.seconds is not None})


def _meshes_next(heap: list[_Open], limit: float) -> list[_Open]:
    """Meshes that come next, to be looked into beside the first."""
    found: list[_Open] = []
    while heap and len(found) < THREADS - 1 and heap[0].leaf is None and heap[0].seconds < limit:
        found.append(heapq.heappop(heap))
    return found


def _bound(search: Search, regions: Regions, axes: Mesh, offload: bool) -> tuple[Alternative, Leaf | None]:
    """A bound on one mesh: the one without memory where that rules it out, or one that no storage can beat; where there is but one storage
    that may fit, with it and its relaxation.
    """
    if (reason := _not_promising(axes, search.tried[offload])) is not None:
        return Alternative(axes, None, None, False, reason), None
    limit, problem = search.limit(offload), None
    if axes not in search.free and math.isfinite(limit):
        problem = _problem(search, regions, axes, offload)
        free = _solve_one(search, problem.program, relaxed=True) if problem.feasible else None
        if free is not None:
            search.free[axes] = free.objective
    if axes in search.free and search.free[axes] >= limit:
        return Alternative(axes, None, search.free[axes], False, ""), None
    problem = problem or _problem(search, regions, axes, offload)
    if not problem.feasible:
        return Alternative(axes, None, None, False, "its sizes do not divide the model"), None
    choices = _storages(search, problem)
    try:
        bound = _solve(search, add_bound(add_memory(problem, search.request.budget_bytes), choices), relaxed=True) if choices else None
    except OutOfTime:
        return Alternative(axes, None, None, False, "out of time"), None
    if bound is None:
        return Alternative(axes, None, None, False, "it does not fit in memory"), None
    return Alternative(axes, None, bound.objective, False, ""), (choices[0], bound) if len(choices) == 1 else None


def _not_promising(axes: Mesh, tried: Sequence[Alternative]) -> str | None:
    """Why a mesh is not looked at: with two of its axes as one it is slower than another mesh by more than `FAR`."""
    known = {other.axes: other.seconds for other in tried if other.seconds is not None}
    joined = [known[mesh] for mesh in _joined(axes) if mesh in known]
    if len(axes) <= COARSE or not joined:
        return None
    slower = min(joined) / min(known.values()) - 1
    return f"not searched: {slower:.0%} slower with two axes as one" if slower > FAR[axes[-2].role] else None


def _joined(axes: Mesh) -> Iterator[Mesh]:
    """The mesh with two neighbouring axes of one role as one axis."""
    for index, (outer, inner) in enumerate(pairwise(axes)):
        if outer.role == inner.role:
            yield (*axes[:index], Axis(outer.size * inner.size, outer.role), *axes[index + 2 :])


def _promise(tried: Alternative) -> tuple[float, int]:
    """Order of trying: the smallest bound first; of meshes within 0.2% the one of fewest axes, whose program is easier to read."""
    return (float("inf") if tried.seconds is None else round(math.log(tried.seconds) / 0.002), len(tried.axes))


def _problem(search: Search, regions: Regions, axes: Mesh, offload: bool) -> Problem:
    request = replace(search.request, offload=offload)
    return build_problem(regions, Machine(request.hardware, axes, request.dp), request, search.tables.setdefault(axes, Tables()))


def _storages(search: Search, problem: Problem) -> list[Storage]:
    """The storages of a mesh with which something is left for activations."""
    request = search.request
    choices = storages(problem.machine, request.itemsize, request.accumulation, request.zero)
    return [storage for storage in choices if has_room(problem, storage, request.budget_bytes)]


def _unlimited(search: Search, problem: Problem) -> float | None:
    """A bound on the seconds of a mesh if memory had no limit."""
    request = search.request
    choices = storages(problem.machine, request.itemsize, request.accumulation, request.zero)
    found = _solve_one(search, add_bound(add_memory(problem, ENDLESS), choices), relaxed=True)
    return None if found is None else found.objective


def _leaves(search: Search, regions: Regions, axes: Mesh, offload: bool) -> tuple[list[Leaf], Alternative]:
    """The storages of a mesh with which there may be a better plan, and a bound on the mesh that holds for all of them."""
    problem = _problem(search, regions, axes, offload)
    memory = add_memory(problem, search.request.budget_bytes)
    leaves: list[Leaf] = []
    too_large: list[Storage] = []
    out_of_time = False
    for storage in _storages(search, problem):
        if any(not may_need_less(problem, storage, other) for other in too_large):
            continue
        try:
            relaxed = _solve(search, add_storage(memory, storage), relaxed=True)
        except OutOfTime:
            out_of_time = True
            continue
        if relaxed is None:
            too_large.append(storage)
        else:
            leaves.append((storage, relaxed))
    if not leaves:
        return [], Alternative(axes, None, None, False, "out of time" if out_of_time else "it does not fit in memory")
    best = min(relaxed.objective for _, relaxed in leaves)
    limit = search.limit(offload)
    return [leaf for leaf in leaves if leaf[1].objective < limit], Alternative(axes, None, best, False, "")


def _settle(search: Search, regions: Regions, item: _Open, offload: bool) -> None:
    """The best plan with one storage; it becomes the best one where it is better."""
    assert item.leaf is not None
    storage, solution = item.leaf
    problem = _problem(search, regions, item.axes, offload)
    program = add_storage(add_memory(problem, search.request.budget_bytes), storage)
    if program.integral(solution):
        found: Solution | None = replace(solution, bound=solution.objective, gap=0.0)
    else:
        found = _solve_one(search, program, relaxed=False)
    if found is not None and found.objective < search.limit(offload):
        search.best[offload] = (found.objective, _decisions(problem, storage, found), found)


def _solve_one(search: Search, program: LinearProgram, *, relaxed: bool) -> Solution | None:
    try:
        return _solve(search, program, relaxed=relaxed)
    except OutOfTime:
        return None


def _solve(search: Search, program: LinearProgram, *, relaxed: bool) -> Solution | None:
    """The optimum, None where nothing fits; raises `OutOfTime` where there was no telling."""
    with search.lock:
        search.programs += 1
        search.variables = max(search.variables, len(program.costs))
    try:
        return program.solve(relaxed=relaxed, time_limit=search.request.time_limit_s, gap=search.request.gap)
    except OutOfTime:
        with search.lock:
            search.unsolved += 1
        raise


def _alternatives(candidates: Sequence[Alternative], chosen: Decisions, best: float) -> tuple[Alternative, ...]:
    """What was tried, each but the chosen mesh with the reason why not."""
    found = []
    for tried in candidates:
        if tried.axes == chosen.axes:
            tried = replace(tried, storage=chosen.storage, seconds=best, exact=True)
        elif tried.seconds is not None:
            slower = tried.seconds / best - 1
            tried = replace(tried, reason=f"at least {slower:.1%} slower" if slower > 5e-4 else "no faster")
        found.append(tried)
    return tuple(found)


def _decisions(problem: Problem, storage: Storage, solution: Solution) -> Decisions:
    values: Sequence[float] = solution.values
    strategies, layers = chosen_strategies(problem, values), chosen_layers(problem, values)
    parts = problem.regions.parts
    slots = {slot: next(layout for layout, (c,) in ends.items() if values[c] > 0.5) for slot, ends in problem.slots.items()}
    return Decisions(
        problem.machine.axes,
        problem.machine.dp,
        storage,
        {key: tuple(strategies[key, i].splits for i in range(len(region.parts))) for key, region in parts.items()},
        {key: tuple(strategies[key, i].constants for i in range(len(region.parts))) for key, region in parts.items()},
        {key: tuple(in_order(layers[key, i]) for i in range(len(region.segments))) for key, region in parts.items()},
        slots,
    )
