"""Which plan a request gets: the solver's, or where that splits attention by positions, a better one that deals the rows out evenly.

Role in the pipeline: after capture, for `compile` (`pipeline`) and for what plans again (`replan`). Causal attention split by positions is
uneven: of two ranks the later one has three quarters of the work. Magi attention deals rows out so that all have the same, also where a row
is one text: then it is one document. Its search has meshes of at most two axes, heads and rows, which takes seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from seqloom.capture.documents import PLAIN, attend_inside_documents
from seqloom.emit.request import CompileRequest
from seqloom.errors import UserError
from seqloom.plan.evaluate import Evaluation, evaluate
from seqloom.plan.failure import why_nothing_fits
from seqloom.plan.plan import Plan, realize
from seqloom.plan.price import Machine
from seqloom.plan.regions import Regions, build_regions
from seqloom.plan.request import Request
from seqloom.plan.solver import Alternative, SolverReport, WhyNot, solve

ROWS_GAP, ROWS_AXES = 2e-3, 2  # of the search that deals rows out: gap between plans that count as equal, axes of a mesh


@dataclass(frozen=True)
class Found:
    """A plan with the regions that it was found for, what it takes, and how it was found."""

    regions: Regions
    plan: Plan
    evaluation: Evaluation
    solver: SolverReport


def find_plan(regions: Regions, request: CompileRequest, asked: Request) -> Found:
    """The best plan for a request. Raises `UserError` where none fits."""
    return even_rows(solved(regions, asked), request, asked)


def solved(regions: Regions, asked: Request, why: WhyNot = why_nothing_fits) -> Found:
    """The solver's plan. Raises `UserError` in the words of `why` where none fits."""
    decisions, solver = solve(regions, asked, why)
    plan = realize(regions, decisions, Machine(asked.hardware, decisions.axes, asked.dp))
    return Found(regions, plan, evaluate(plan), solver)


def even_rows(found: Found, request: CompileRequest, asked: Request) -> Found:
    """A faster plan that deals the rows out evenly, where the one found splits attention by positions and the choice is the planner's;
    otherwise the one found.
    """
    if request.attention != "auto" or request.documents or request.force or not splits_positions(found.plan):
        return found
    try:
        regions = build_regions(attend_inside_documents(found.regions.graph, (request.seq_len,)))
        other = solved(regions, replace(asked, gap=max(asked.gap, ROWS_GAP), most_axes=min(asked.most_axes, ROWS_AXES)))
    except UserError:
        return found
    if other.evaluation.step_s >= found.evaluation.step_s:
        return found
    slower = found.evaluation.step_s / other.evaluation.step_s - 1
    seconds = found.evaluation.step_s / asked.accumulation
    reason = f"{slower:.1%} slower: it splits attention by positions, of which the later have more work"
    passed = Alternative(found.plan.machine.axes, found.plan.storage, seconds, True, reason)
    return replace(other, solver=replace(other.solver, alternatives=(*other.solver.alternatives, passed)))


def splits_positions(plan: Plan) -> bool:
    """Whether plain attention is split by the positions of its queries."""
    clusters = (cluster for planned in plan.regions.values() for cluster in planned.clusters)
    return any("l" in cluster.strategy.splits for cluster in clusters if cluster.cluster.nodes[0].op == PLAIN)
