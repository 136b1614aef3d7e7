"""The budget: a program with what activations need is completed for one storage of parameters, gradients and optimizer state.

Role in the pipeline: `seqloom/plan/memory.py` states what activations need, for every storage alike; here each storage adds its bytes, the
seconds of its collectives beyond what compute hides, and the three rows that memory bounds. `add_bound` takes of several storages the least
of everything: a bound for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

from seqloom.plan.linear import LinearProgram, Term
from seqloom.plan.memory import Memory, compute_terms
from seqloom.plan.problem import Problem, parameter_terms
from seqloom.plan.regions import OUTER, Region
from seqloom.plan.storage import GroupCost, Storage, group_cost

MEMORY_TOLERANCE = 1e-5
"""Share of the budget that is left free: the solver keeps a constraint to about 1e-6, and a plan must never exceed the budget at all."""


def add_storage(memory: Memory, storage: Storage, leanest: bool = False) -> LinearProgram:
    """A copy of the program completed for one storage: its time, and the three rows of the budget.

    With `leanest` the objective is the least budget (in units of the one given) instead of time.
    """
    return _complete(memory, (storage,), (storage,), leanest)


def add_bound(memory: Memory, choices: Sequence[Storage]) -> LinearProgram:
    """A copy of the program whose optimum no storage of `choices` can beat: the memory of the first, which is the leanest in a model of
    many layers (with few, the least of every figure over all that may need less), and of every traffic the least that any of them has.
    """
    first, *others = choices
    return _complete(memory, (first, *(other for other in others if may_need_less(memory.problem, other, first))), choices, False)


def has_room(problem: Problem, storage: Storage, budget_bytes: float) -> bool:
    """Whether parameters, gradients and optimizer state alone leave room in the budget, each parameter in as small pieces as any strategy
    makes of it.
    """
    needed = 0.0
    for region in problem.regions.parts.values():
        element = group_cost(1.0, problem.machine, storage, region.key == OUTER)
        least = sum(min(numel for _, numel in columns) for columns in parameter_terms(problem, region).values())
        needed += region.count * least * (element.standing_bytes + element.ending_bytes)
    return needed <= budget_bytes


def may_need_less(problem: Problem, other: Storage, first: Storage) -> bool:
    """Whether some row of the budget may be smaller under the other storage."""
    for region in problem.regions.parts.values():
        figures = [_row_bytes(group_cost(1.0, problem.machine, storage, region.key == OUTER), region) for storage in (other, first)]
        if any(its < mine * (1 - 1e-9) for its, mine in zip(*figures, strict=True)):
            return True
    return False


def _row_bytes(cost: GroupCost, region: Region) -> tuple[float, ...]:
    """What an element of a region adds to each row of the budget, where the region's own transient is the largest and where it is not."""
    reduced = 0.0 if region.key == OUTER else cost.ending_bytes
    standing, piled = region.count * cost.standing_bytes, region.count * (cost.standing_bytes + reduced)
    ending = region.count * (cost.standing_bytes + cost.ending_bytes)
    return standing, standing + cost.in_flight_bytes, piled, piled + cost.in_flight_bytes - reduced, ending


def _complete(memory: Memory, bytes_of: Sequence[Storage], traffic_of: Sequence[Storage], leanest: bool) -> LinearProgram:
    problem, program = memory.problem, memory.program.copy()
    total, piled, ending = (
        [*memory.kept, (memory.staying, 1.0), (memory.transient, 1.0)],
        [*memory.first, (memory.staying, 1.0), (memory.late, 1.0)],
        [],
    )
    for region in problem.regions.parts.values():
        root = region.key == OUTER
        slope, latency = _affine(problem, traffic_of, root)
        element = [group_cost(1.0, problem.machine, storage, root) for storage in bytes_of]
        standing = min(cost.standing_bytes for cost in element) / memory.unit
        ended = min(cost.standing_bytes + cost.ending_bytes for cost in element) / memory.unit
        in_flight = min(cost.in_flight_bytes for cost in element) / memory.unit
        added = min(cost.in_flight_bytes - (0.0 if root else cost.ending_bytes) for cost in element) / memory.unit
        traffic: dict[str, list[Term]] = {"forward_s": [], "backward_s": []}
        flight: list[Term] = []
        moving: list[Term] = []
        for columns in parameter_terms(problem, region).values():
            for column, numel in columns:
                program.costs[column] += region.count * numel * slope["optimizer_s"]
                total.append((column, region.count * numel * standing))
                ending.append((column, region.count * numel * ended))
                piled.append((column, region.count * numel * (standing if root else ended)))
                flight.append((column, -numel * in_flight))
                moving.append((column, -numel * added))
                for phase, terms in traffic.items():
                    terms.append((column, numel * slope[phase]))
        program.constrain([(memory.flight[region.key], 1.0), *flight], 0.0)
        program.constrain([(memory.moving[region.key], 1.0), *moving], 0.0)
        for phase, terms in traffic.items():
            _hidden(program, problem, region, phase, terms, latency[phase])
    budget = [(program.variable(), -1.0)] if leanest else []
    if leanest:
        program.costs = [0.0] * len(program.costs)
        program.costs[budget[0][0]] = 1.0
    for rows in (total, piled, ending):
        program.constrain([*rows, *budget], high=0.0 if leanest else 1.0 - MEMORY_TOLERANCE)
    return program


def _affine(problem: Problem, choices: Sequence[Storage], root: bool) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds an element and seconds of latency of a group's traffic, the least over the choices."""
    some = 2.0**30
    slope, latency = {}, {}
    for phase in ("forward_s", "backward_s", "optimizer_s"):
        none = [getattr(group_cost(0.0, problem.machine, choice, root), phase) for choice in choices]
        much = [getattr(group_cost(some, problem.machine, choice, root), phase) for choice in choices]
        latency[phase] = min(none)
        slope[phase] = min((m - n) / some for m, n in zip(much, none, strict=True))
    return slope, latency


def _hidden(program: LinearProgram, problem: Problem, region: Region, phase: str, traffic: list[Term], latency: float) -> None:
    """Exposed seconds of a group's collectives: of each call `latency` and the `traffic`, less what overlaps with its compute."""
    if not traffic or not any(entry for _, entry in traffic):
        return
    overlap = problem.machine.hardware.rates.overlap
    exposed = program.variable(region.count)
    compute = [(column, overlap * seconds) for column, seconds in compute_terms(problem, region, phase)]
    program.constrain([(exposed, 1.0), *((c, -entry) for c, entry in traffic), *compute], latency)
    if overlap < 1:
        program.constrain([(exposed, 1.0), *((c, -(1 - overlap) * entry) for c, entry in traffic)], (1 - overlap) * latency)
