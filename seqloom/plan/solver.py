"""Find the plan: every mesh, every ZeRO level, one linear program each.

Role in the pipeline: `Regions` and a machine in, `Decisions` out. The variables, the objective and the constraints of one program are
described in `seqloom/plan/problem.py`, each beside the function that states it. Around it this module enumerates

  meshes        factorizations of the ranks into at most two axes, each axis with a role (`candidate_meshes`)
  ZeRO levels   3, 1, 0 (`seqloom.plan.storage`)

and keeps the fastest that fits. The LP relaxation is solved first: when it is no better than the best plan so far the candidate is done,
when it is integral it is the answer, otherwise HiGHS branches. The same input always gives the same answer: candidates come in a fixed
order, a later one must be better, and ties inside a program are broken by a tiny cost per strategy.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from seqloom.cost.hardware import Hardware
from seqloom.errors import UserError
from seqloom.plan.labels import ATTENTION
from seqloom.plan.linear import OutOfTime, Solution
from seqloom.plan.placement import Layout
from seqloom.plan.price import Machine
from seqloom.plan.problem import Problem, build_problem
from seqloom.plan.regions import Regions
from seqloom.plan.space import Axis, parse_force
from seqloom.plan.storage import ZERO_LEVELS, Storage

MAX_AXES = 2
GIB = 2.0**30


@dataclass(frozen=True)
class Request:
    """What is asked of the planner. `force` is the text of `--force`, `zero` one level only, `recompute` none / all / None to choose."""

    ranks: int
    dp: int
    accumulation: int
    hardware: Hardware
    itemsize: int
    force: str | None = None
    zero: int | None = None
    recompute: bool | None = None
    time_limit_s: float = 20.0

    @property
    def budget_bytes(self) -> float:
        """Memory that a plan may use on one device."""
        return self.hardware.usable_bytes


@dataclass(frozen=True)
class Decisions:
    """All choices as plain data, independent of sizes: they can be laid over a shrunken model of the same structure.

    `splits[region][cluster]` names the split class per axis; `recompute[region][segment]`; `slots` are the layouts at block borders and
    of the graph's inputs.
    """

    axes: tuple[Axis, ...]
    dp: int
    storage: Storage
    splits: Mapping[str, tuple[tuple[str, ...], ...]]
    recompute: Mapping[str, tuple[bool, ...]]
    slots: Mapping[str, Layout]


@dataclass(frozen=True)
class SolverReport:
    """How the answer was found: `status`, relative `gap` to the proven bound, seconds, variables and programs solved."""

    status: str
    gap: float
    seconds: float
    variables: int
    programs: int


def solve(regions: Regions, request: Request) -> tuple[Decisions, SolverReport]:
    """The fastest decisions that fit. Raises `UserError` when none does, with what binds."""
    started = time.monotonic()
    best: tuple[float, Decisions, Solution] | None = None
    variables = programs = unsolved = 0
    for axes in candidate_meshes(request):
        for zero in ZERO_LEVELS if request.zero is None else (request.zero,):
            problem = _problem(regions, request, axes, zero, request.budget_bytes)
            if not problem.feasible:
                continue
            programs += 1
            variables = max(variables, len(problem.program.costs))
            try:
                solution = _solve_one(problem, best[0] if best else float("inf"), request.time_limit_s)
            except OutOfTime:
                unsolved += 1
                continue
            if solution is not None and (best is None or solution.objective < best[0] - 1e-9):
                best = (solution.objective, _decisions(problem, solution), solution)
    if best is None and unsolved:
        raise UserError(
            f"no plan was found: {unsolved} of {programs} searches met the limit of {request.time_limit_s:g} s without one; narrow the "
            f"search with --force (such as --force sp{request.ranks}) or --zero"
        )
    if best is None:
        raise UserError(_why_nothing_fits(regions, request))
    status = best[2].status if not unsolved else f"{best[2].status}; {unsolved} searches out of time"
    report = SolverReport(status, best[2].gap, time.monotonic() - started, variables, programs)
    return best[1], report


def candidate_meshes(request: Request) -> Iterator[tuple[Axis, ...]]:
    """Meshes to try. `sum` axes come before `split` ones: storage sharding goes around tensor parallelism (FSDP2's order)."""
    if request.force:
        parts = parse_force(request.force)
        if prod(size for _, size in parts) != request.ranks:
            raise UserError(
                f"--force {request.force} makes {prod(n for _, n in parts)} ranks and plan_ngpus is {request.ranks}: make them equal"
            )
        ordered = sorted(parts, key=lambda part: part[0].startswith("tp"))
        yield tuple(Axis(size, "split" if kind.startswith("tp") else "sum", kind) for kind, size in ordered if size > 1)
        return
    for sizes in _factorizations(request.ranks):
        for splits in range(len(sizes) + 1):
            roles = ["sum"] * (len(sizes) - splits) + ["split"] * splits
            yield tuple(Axis(size, role) for size, role in zip(sizes, roles, strict=True))


def _factorizations(ranks: int) -> Iterator[tuple[int, ...]]:
    if ranks == 1:
        yield ()
        return
    yield (ranks,)
    if MAX_AXES >= 2:
        yield from ((ranks // inner, inner) for inner in range(2, ranks // 2 + 1) if ranks % inner == 0)


def _problem(regions: Regions, request: Request, axes: Sequence[Axis], zero: int, budget: float) -> Problem:
    machine = Machine(request.hardware, tuple(axes), request.dp)
    storage = Storage(zero, request.itemsize, request.accumulation)
    return build_problem(regions, machine, storage, budget, request.recompute)


def _solve_one(problem: Problem, incumbent: float, time_limit: float) -> Solution | None:
    relaxed = problem.program.solve(relaxed=True, time_limit=time_limit)
    if relaxed is None or relaxed.objective >= incumbent:
        return None
    if problem.program.integral(relaxed):
        return replace(relaxed, bound=relaxed.objective, gap=0.0)
    return problem.program.solve(relaxed=False, time_limit=time_limit)


def _decisions(problem: Problem, solution: Solution) -> Decisions:
    chosen = {column for column in problem.choices if solution.values[column] > 0.5}
    splits: dict[str, list[tuple[str, ...]]] = {key: [()] * len(r.parts) for key, r in problem.regions.parts.items()}
    for column in sorted(chosen):
        choice = problem.choices[column]
        splits[choice.region][choice.part] = choice.strategy.splits
    recompute = {key: [False] * len(r.segments) for key, r in problem.regions.parts.items()}
    for (key, segment), column in problem.recompute.items():
        recompute[key][segment] = bool(solution.values[column] > 0.5)
    slots = {slot: next(layout for layout, (c,) in ends.items() if solution.values[c] > 0.5) for slot, ends in problem.slots.items()}
    return Decisions(
        problem.machine.axes,
        problem.machine.dp,
        problem.storage,
        {key: tuple(parts) for key, parts in splits.items()},
        {key: tuple(parts) for key, parts in recompute.items()},
        slots,
    )


def _why_nothing_fits(regions: Regions, request: Request) -> str:
    """The sentence for a request without a plan: what is missing, by how much, and the nearest change that fits."""
    least = _least_memory(regions, request)
    if least is None:
        return _why_nothing_divides(regions, request)
    more = _ranks_that_fit(regions, request)
    cure = f"use --plan_ngpus {more}" if more else "use devices with more memory or a shorter --seq_len"
    budget = request.budget_bytes
    return (
        f"no plan fits: the leanest one needs {least / GIB:.1f} GiB a device and {request.hardware.name} leaves {budget / GIB:.1f} "
        f"GiB after its margin, {(least - budget) / GIB:.1f} GiB short; {cure}, or raise --memory_gib if the device has more"
    )


def _why_nothing_divides(regions: Regions, request: Request) -> str:
    """The sentence for a mesh whose sizes do not cut the model into equal pieces."""
    graph = regions.graph
    batch, seq_len = graph.values[graph.inputs[0]].shape
    sizes = f"sequence length {seq_len}, batch {batch}"
    for part in regions.parts.values():
        for node in (node for cluster in part.parts for node in cluster.nodes if node.op == ATTENTION):
            query, key = (part.graph.values[name].shape[1] for name in node.inputs[:2])
            sizes = f"sequence length {seq_len}, batch {batch}, {query} query heads, {key} key/value heads"
    asked = f" with --force {request.force}" if request.force else ""
    return (
        f"no way to split this model over {request.ranks} ranks{asked}: what is split must divide by the size of its mesh axis, and "
        f"there are {sizes}; change --seq_len, --micro_batch_size or --plan_ngpus so that they divide"
    )


def _least_memory(regions: Regions, request: Request) -> float | None:
    """Smallest peak of any plan, found by bisection on the budget to within 1%; None when nothing can be split at all."""
    problems = [(axes, zero) for axes in candidate_meshes(request) for zero in ((3,) if request.zero is None else (request.zero,))]

    def fits(budget: float) -> bool:
        for axes, zero in problems:
            problem = _problem(regions, request, axes, zero, budget)
            if problem.feasible and problem.program.solve(relaxed=True, time_limit=request.time_limit_s) is not None:
                return True
        return False

    low, high = request.budget_bytes, 1024 * max(request.budget_bytes, GIB)
    if not fits(high):
        return None
    while high / low > 1.01:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def _ranks_that_fit(regions: Regions, request: Request) -> int | None:
    """The next power-of-two multiple of ranks (up to 64 times) for which a plan fits."""
    if request.force:
        return None
    reach = request.hardware.links[-1].ranks_per_group
    for factor in (2, 4, 8, 16, 32, 64):
        ranks = request.ranks * factor
        if ranks * request.dp > reach:
            return None
        bigger = replace(request, ranks=ranks)
        for axes in candidate_meshes(bigger):
            problem = _problem(regions, bigger, axes, 3, request.budget_bytes)
            if problem.feasible and problem.program.solve(relaxed=True, time_limit=request.time_limit_s) is not None:
                return ranks
    return None
