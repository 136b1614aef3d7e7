"""Planning without emitting: the best plan for a request, as the document that `plan.json` holds, for `explain` and `sweep`.

The same capture serves every machine. Searches are shorter than those of a compile: plans within `GAP` count as equal, meshes have at most
two axes, and beside them only the one of three that splits attention by key/value heads, query heads and positions where there are more
ranks than heads. A request that no plan answers is told in a clause, without looking for the nearest one that fits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import gcd, prod
from typing import Any

from seqloom.capture.cache import Cache
from seqloom.capture.warm import ModelConfig, cached_capture
from seqloom.cost.hardware import GIB, Hardware
from seqloom.emit.choose import even_rows, solved
from seqloom.emit.pipeline import DEFAULT_CHUNK, DTYPES, asked_graph, planner_request
from seqloom.emit.request import CompileRequest
from seqloom.errors import UserError
from seqloom.plan.document import plan_document
from seqloom.plan.labels import is_attention
from seqloom.plan.price import Machine
from seqloom.plan.problem import build_problem
from seqloom.plan.regions import Regions, build_regions
from seqloom.plan.request import Request, candidate_meshes
from seqloom.plan.storage import STATE_BYTES

GAP = 2e-3  # share of a step below which two plans count as equal
TIME_LIMIT_S = 20.0  # of one program
MOST_AXES = 2  # of a mesh: all of three axes would take most of the time of a search


def capture_regions(cache: Cache, config: ModelConfig, request: CompileRequest) -> Regions:
    """The model of a request, ready to be planned for any machine. Raises `UserError` as `capture` does."""
    captured = cached_capture(
        cache,
        config,
        batch_size=request.micro_batch_size,
        seq_len=request.seq_len,
        dtype=DTYPES[request.precision],
        loss=request.loss,
        loss_chunk=request.loss_chunk or DEFAULT_CHUNK,
    )
    return build_regions(asked_graph(request, captured.graph), request.attention)


def best_plan(regions: Regions, request: CompileRequest, hardware: Hardware) -> dict[str, Any]:
    """The best plan as a document. Raises `UserError` where there is none, in one clause."""
    if request.runtime_ngpus > hardware.links[-1].ranks_per_group:
        raise UserError(f"{hardware.name} joins at most {hardware.links[-1].ranks_per_group} ranks")
    found, refusals = [], []
    searches = list(_searches(regions, planner_request(request, hardware)))
    for asked in searches:
        try:
            found.append(solved(regions, asked, _why_not))
        except UserError as error:
            refusals.append(error)
    if not found:
        raise refusals[0]
    best = even_rows(min(found, key=lambda one: one.evaluation.step_s), request, searches[0])
    return plan_document(best.plan, best.evaluation, best.solver, {})


def _searches(regions: Regions, request: Request) -> Iterator[Request]:
    """The search over meshes of few axes, and where it may miss the best mesh one over that mesh alone."""
    asked = replace(request, gap=GAP, time_limit_s=TIME_LIMIT_S, most_axes=MOST_AXES)
    yield asked
    mesh = None if request.force else hybrid_mesh(regions, request.ranks)
    if mesh is not None:
        yield replace(asked, force=mesh)


def hybrid_mesh(regions: Regions, ranks: int) -> str | None:
    """`--force` for attention split by key/value heads, by the query heads of each and by positions (`sp8,sp4,cp2` for 64 ranks, 32 query
    heads and 8 key/value heads); None where fewer axes will do. Positions come last: causal attention is least even over them.
    """
    for part in regions.parts.values():
        for node in (node for cluster in part.parts for node in cluster.nodes if is_attention(node.op)):
            queries, keys = (part.graph.values[name].shape[1] for name in node.inputs[:2])
            by_key = gcd(ranks, keys)
            by_query = gcd(ranks // by_key, queries // keys)
            sizes = (by_key, by_query, ranks // by_key // by_query)
            return "sp{},sp{},cp{}".format(*sizes) if min(sizes) > 1 else None
    return None


def _why_not(regions: Regions, request: Request) -> str:
    """A clause for a request that no plan answers."""
    meshes = [axes for axes in candidate_meshes(request) if request.force or len(axes) < 2]
    machines = [Machine(request.hardware, axes, request.dp) for axes in meshes]
    if not any(build_problem(regions, machine, request).feasible for machine in machines):
        return f"its sizes do not divide over {request.ranks} ranks"
    parameters = sum(region.count * prod(value.shape) for region in regions.parts.values() for value in region.graph.of_kind("parameter"))
    spread = 1 if request.zero == 0 else request.ranks * request.dp
    states, budget = STATE_BYTES * parameters / spread / GIB, request.budget_bytes / GIB
    if states > budget:
        return f"weights and optimizer state alone take {states:.1f} of {budget:.1f} GiB"
    return f"activations do not fit: {states:.1f} of {budget:.1f} GiB are taken by weights and optimizer state"


def plan_words(plan: Mapping[str, Any]) -> tuple[str, str, str]:
    """Mesh, storage and modes of a plan's document in short: `sp 8`, `ZeRO 3`, `recompute 17%`. Storage names its axes where it leaves
    copies on others; modes end with the compute that all ranks of an axis repeat, and a word where the time limit cut a search short.
    """
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items()) or "one rank"
    stored = plan["storage"]
    over = " over " + "+".join(stored["sharded"]) if stored["sharded"] and stored["replicated"] else ""
    again = [f"{share:.0%} repeated on {axis}" for axis, share in plan["repeated"].items()]
    again += ["perhaps not the best: a search was cut short"] if "out of time" in plan["solver"]["status"] else []
    return mesh, f"ZeRO {stored['zero']}{over}", ", ".join([_modes(plan), *again])


def _modes(plan: Mapping[str, Any]) -> str:
    """What becomes of activations: each mode but `keep` with its share of all segments of all layers."""
    counts: dict[str, int] = {}
    for rows in plan["segments"].values():
        for row in rows.values():
            for mode, count in row.items():
                if mode not in ("tiles", "kept"):
                    counts[mode] = counts.get(mode, 0) + count
    total = sum(counts.values())
    return ", ".join(f"{mode} {count / total:.0%}" for mode, count in counts.items() if count and mode != "keep") or "keep all"
