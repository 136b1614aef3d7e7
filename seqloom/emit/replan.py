"""Planning without emitting: the best plan for a request, as the document that `plan.json` holds, for `explain` and `sweep`.

The same capture serves every machine. Searches are shorter than those of a compile: meshes have at most two axes, plans within `GAP`
count as equal, and a request that no plan answers is told in a clause, without looking for the nearest one that fits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any

from seqloom.capture.cache import Cache
from seqloom.capture.warm import ModelConfig, cached_capture
from seqloom.cost.hardware import GIB, Hardware
from seqloom.emit.pipeline import DEFAULT_CHUNK, DTYPES, planner_request
from seqloom.emit.request import CompileRequest
from seqloom.errors import UserError
from seqloom.plan.document import plan_document
from seqloom.plan.evaluate import evaluate
from seqloom.plan.plan import realize
from seqloom.plan.price import Machine
from seqloom.plan.problem import build_problem
from seqloom.plan.regions import Regions, build_regions
from seqloom.plan.request import Request, candidate_meshes
from seqloom.plan.solver import solve
from seqloom.plan.storage import STATE_BYTES

GAP = 2e-3  # share of a step below which two plans count as equal
TIME_LIMIT_S = 8.0  # of one program
MOST_AXES = 2  # of a mesh: three cost most of the time of a search and are seldom better


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
    return build_regions(captured.graph)


def best_plan(regions: Regions, request: CompileRequest, hardware: Hardware) -> dict[str, Any]:
    """The best plan as a document. Raises `UserError` where there is none, in one clause."""
    asked = replace(planner_request(request, hardware), gap=GAP, time_limit_s=TIME_LIMIT_S, most_axes=MOST_AXES)
    if request.runtime_ngpus > hardware.links[-1].ranks_per_group:
        raise UserError(f"{hardware.name} joins at most {hardware.links[-1].ranks_per_group} ranks")
    decisions, solver = solve(regions, asked, _why_not)
    plan = realize(regions, decisions, Machine(hardware, decisions.axes, request.dp))
    return plan_document(plan, evaluate(plan), solver, {})


def _why_not(regions: Regions, request: Request) -> str:
    """A clause for a request that no plan answers."""
    machines = [Machine(request.hardware, axes, request.dp) for axes in candidate_meshes(request) if len(axes) < 2]
    if not any(build_problem(regions, machine, request).feasible for machine in machines):
        return f"its sizes do not divide over {request.ranks} ranks"
    parameters = sum(region.count * prod(value.shape) for region in regions.parts.values() for value in region.graph.of_kind("parameter"))
    spread = 1 if request.zero == 0 else request.ranks * request.dp
    states, budget = STATE_BYTES * parameters / spread / GIB, request.budget_bytes / GIB
    if states > budget:
        return f"weights and optimizer state alone take {states:.1f} of {budget:.1f} GiB"
    return f"activations do not fit: {states:.1f} of {budget:.1f} GiB are taken by weights and optimizer state"


def plan_words(plan: Mapping[str, Any]) -> tuple[str, str, str]:
    """Mesh, storage and modes of a plan's document in short: `sp 8`, `ZeRO 3 over sp`, `recompute 25/128`."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items()) or "one rank"
    over = "+".join(plan["storage"]["sharded"])
    storage = f"ZeRO {plan['storage']['zero']}" + (f" over {over}" if over else "")
    return mesh, storage, _modes(plan)


def _modes(plan: Mapping[str, Any]) -> str:
    """What becomes of activations: each mode but `keep` with its share of all segments of all layers."""
    counts: dict[str, int] = {}
    for rows in plan["segments"].values():
        for row in rows.values():
            for mode, count in row.items():
                if mode not in ("tiles", "kept"):
                    counts[mode] = counts.get(mode, 0) + count
    total = sum(counts.values())
    return ", ".join(f"{mode} {count}/{total}" for mode, count in counts.items() if count and mode != "keep") or "keep all"
