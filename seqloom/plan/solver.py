"""Find the plan: every mesh, every storage, one linear program each.

Role in the pipeline: `Regions` and a machine in, `Decisions` out. The variables, the objective and the constraints of one program are
described in `seqloom/plan/problem.py` (placements and modes) and `seqloom/plan/memory.py` (memory and storage), each beside the function
that states it. Around it this module enumerates

  meshes      factorizations of the ranks into at most three axes, each axis with a role (`request.candidate_meshes`)
  storages    ZeRO 3 to 0 over subsets of the axes, those left out that another one beats in everything (`storage.storages`)

and keeps the fastest plan that fits. For each mesh a relaxation that no storage can beat is solved first (`memory.add_bound`); meshes are
then tried from the most promising one on, and most end there. Then for each storage the LP relaxation; when it is no better than the best
plan so far the candidate is done, when it is integral it is the answer, otherwise HiGHS branches. Host memory is taken only where it saves
a hundredth of the step: its copies must come in time for the planned memory to hold, and nothing else here depends on timing. The same
input always gives the same answer: candidates come in a fixed order, a later one must be better, and ties inside a program are broken by
a tiny cost per strategy.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from seqloom.errors import UserError
from seqloom.plan.budget import add_bound, add_storage
from seqloom.plan.failure import why_nothing_fits
from seqloom.plan.linear import LinearProgram, OutOfTime, Solution
from seqloom.plan.memory import Memory, add_memory
from seqloom.plan.modes import Counts, in_order
from seqloom.plan.placement import Layout
from seqloom.plan.price import Machine
from seqloom.plan.problem import Problem, build_problem, chosen_layers, chosen_strategies
from seqloom.plan.regions import Regions
from seqloom.plan.request import Request, candidate_meshes, wanted_sum_axes
from seqloom.plan.space import Axis, Constants
from seqloom.plan.storage import Storage, storages

BETTER = 1e-9  # seconds by which a later candidate must win, beside the gap
ENDLESS = 1e18  # bytes of memory: no limit
WhyNot = Callable[[Regions, Request], str]
FAR = 0.1  # share of a step by which a mesh must be slower for its refinements not to be looked at
OFFLOAD_GAIN = 0.01  # share of a step that host memory must save: copies that come late cost memory that was not planned


@dataclass(frozen=True)
class Decisions:
    """All choices as plain data, independent of sizes: they can be laid over a shrunken model of the same structure.

    `splits[region][cluster]` names the split class per axis, `constants[region][cluster]` the constants chosen; `modes[region][segment]`
    the modes in layer order with their numbers of layers; `slots` are the layouts at block borders and of the graph's inputs.
    """

    axes: tuple[Axis, ...]
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

    axes: tuple[Axis, ...]
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
    no storage and no limit of memory, `unlimited` the chosen one with its storage.
    """

    request: Request
    best: dict[bool, tuple[float, Decisions, Solution]] = field(default_factory=dict)
    variables: int = 0
    programs: int = 0
    unsolved: int = 0
    unlimited: float | None = None
    free: dict[tuple[Axis, ...], float] = field(default_factory=dict)
    tried: dict[bool, list[Alternative]] = field(default_factory=lambda: {False: [], True: []})

    def limit(self, offload: bool) -> float:
        """Seconds that the next candidate must beat: the best so far by the gap, a plan without host memory by `OFFLOAD_GAIN`."""
        limits = [float("inf")]
        if offload in self.best:
            limits.append(self.best[offload][0] * (1 - self.request.gap) - BETTER)
        if offload and False in self.best:
            limits.append(self.best[False][0] * (1 - OFFLOAD_GAIN))
        return min(limits)


def solve(regions: Regions, request: Request, why: WhyNot = why_nothing_fits) -> tuple[Decisions, SolverReport]:
    """The fastest decisions that fit. Raises `UserError` when none does, with what binds, in the words of `why`."""
    started = time.monotonic()
    search = Search(replace(request, sum_axes=wanted_sum_axes(regions, request)))
    for offload in (False, True) if request.may_offload else (False,):
        for bound in _bounds(search, regions, offload):
            if bound.seconds is not None and bound.seconds < search.limit(offload):
                _try_mesh(search, regions, bound, offload)
            search.tried[offload].append(bound)
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
    elapsed = time.monotonic() - started
    return decisions, SolverReport(status, solution.gap, elapsed, search.variables, search.programs, tried, search.unlimited)


def _bounds(search: Search, regions: Regions, offload: bool) -> list[Alternative]:
    """A bound on every mesh, the most promising one first. With host memory only meshes that memory holds back are looked at."""
    found: list[Alternative] = []
    for axes in candidate_meshes(search.request):
        if (reason := _not_promising(axes, found)) is not None:
            found.append(Alternative(axes, None, None, False, reason))
            continue
        if axes in search.free and search.free[axes] >= search.limit(offload):
            found.append(Alternative(axes, None, search.free[axes], False, ""))
            continue
        problem = _problem(search, regions, axes, offload)
        free = _solve_one(search, problem.program, relaxed=True) if problem.feasible and axes not in search.free else None
        if free is not None:
            search.free[axes] = free.objective
        if axes not in search.free:
            found.append(Alternative(axes, None, None, False, "out of time" if problem.feasible else "its sizes do not divide the model"))
        else:
            bound = _solve_one(search, add_bound(*_memory(search, problem)), relaxed=True)
            seconds, reason = (None, "it does not fit in memory") if bound is None else (bound.objective, "")
            found.append(Alternative(axes, None, seconds, False, reason))
    return sorted(found, key=_promise)


def _not_promising(axes: tuple[Axis, ...], found: Sequence[Alternative]) -> str | None:
    """Why a mesh with two `split` axes is not looked at: with the two as one axis it is slower than another mesh by more than `FAR`."""
    if len(axes) < 3 or axes[-2].role != "split":
        return None
    joined = (*axes[:-2], Axis(axes[-2].size * axes[-1].size, "split"))
    known = {tried.axes: tried.seconds for tried in found if tried.seconds is not None}
    slower = known[joined] / min(known.values()) - 1 if joined in known else 0.0
    return f"not searched: {slower:.0%} slower with one split axis" if slower > FAR else None


def _promise(tried: Alternative) -> tuple[float, int]:
    """Order of trying: the smallest bound first; of meshes within 0.2% the one of fewest axes, whose program is easier to read."""
    return (float("inf") if tried.seconds is None else round(math.log(tried.seconds) / 0.002), len(tried.axes))


def _problem(search: Search, regions: Regions, axes: tuple[Axis, ...], offload: bool) -> Problem:
    request = replace(search.request, offload=offload)
    return build_problem(regions, Machine(request.hardware, axes, request.dp), request)


def _memory(search: Search, problem: Problem) -> tuple[Memory, list[Storage]]:
    request = search.request
    choices = storages(problem.machine, request.itemsize, request.accumulation, request.zero)
    return add_memory(problem, request.budget_bytes), choices


def _unlimited(search: Search, problem: Problem, choices: Sequence[Storage]) -> float | None:
    """A bound on the seconds of a mesh if memory had no limit."""
    found = _solve_one(search, add_bound(add_memory(problem, ENDLESS), choices), relaxed=True)
    return None if found is None else found.objective


def _try_mesh(search: Search, regions: Regions, bound: Alternative, offload: bool) -> None:
    """Every storage of one mesh; what is better than the best plan so far takes its place."""
    problem = _problem(search, regions, bound.axes, offload)
    memory, choices = _memory(search, problem)
    for storage in choices:
        if bound.seconds is None or bound.seconds >= search.limit(offload):
            return
        solution = _try_storage(search, add_storage(memory, storage), search.limit(offload))
        if solution is not None and solution.objective < search.limit(offload):
            search.best[offload] = (solution.objective, _decisions(problem, storage, solution), solution)
            search.unlimited = _unlimited(search, problem, choices)


def _try_storage(search: Search, program: LinearProgram, limit: float) -> Solution | None:
    """The best plan with one storage; None where nothing fits or nothing can beat the limit."""
    relaxed = _solve_one(search, program, relaxed=True)
    if relaxed is None or relaxed.objective >= limit:
        return None
    if program.integral(relaxed):
        return replace(relaxed, bound=relaxed.objective, gap=0.0)
    return _solve_one(search, program, relaxed=False)


def _solve_one(search: Search, program: LinearProgram, *, relaxed: bool) -> Solution | None:
    search.programs += 1
    search.variables = max(search.variables, len(program.costs))
    try:
        return program.solve(relaxed=relaxed, time_limit=search.request.time_limit_s, gap=search.request.gap)
    except OutOfTime:
        search.unsolved += 1
        return None


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
