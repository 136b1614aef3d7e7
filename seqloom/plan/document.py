"""`plan.json`: the plan as a document, and the decisions read back from it.

Everything but `timings` and `solver.seconds` follows from the input alone and is byte-identical between runs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from seqloom.errors import UserError
from seqloom.plan.binding import binding
from seqloom.plan.evaluate import GIB, Evaluation
from seqloom.plan.labels import is_attention
from seqloom.plan.modes import Mode, kept_matmuls
from seqloom.plan.placement import B, Layout, P, Placement, R, S
from seqloom.plan.plan import Plan, PlannedRegion, Reshard
from seqloom.plan.price import DP, flops_of
from seqloom.plan.runner_up import RunnerUp, runners_up, split_letters
from seqloom.plan.solver import Alternative, Decisions, SolverReport
from seqloom.plan.space import Axis
from seqloom.plan.storage import Storage
from seqloom.plan.timeline import Timeline, timeline

VERSION = 2


def plan_document(plan: Plan, evaluation: Evaluation, solver: SolverReport, timings: Mapping[str, float]) -> dict[str, Any]:
    """The plan with its predictions, ready for JSON."""
    graph = plan.outer.region.graph
    batch, seq_len = graph.values[graph.inputs[0]].shape
    ranks = _ranks(plan)
    tokens = batch * seq_len * plan.storage.accumulation
    causal, full = _mfu(plan, evaluation, ranks)
    rivals, lanes = runners_up(plan), timeline(plan)
    return {
        "version": VERSION,
        "mesh": dict(plan.mesh),
        "dp": plan.machine.dp,
        "hardware": plan.machine.hardware.name,
        "attention": _attention(plan),
        "seq_len": seq_len,
        "micro_batch_size": batch,
        "grad_accumulation_steps": plan.storage.accumulation,
        "zero": plan.storage.zero,
        "storage": _storage(plan),
        "step_time_s": evaluation.step_s,
        "time_s": dict(evaluation.time),
        "tokens_per_s_per_gpu": tokens / evaluation.step_s / ranks,
        "mfu_causal": causal,
        "mfu_full": full,
        "peak_memory_gib": {"total": evaluation.peak_bytes / GIB, **{part: b / GIB for part, b in evaluation.memory.items()}},
        "host_memory_gib": evaluation.host_bytes / GIB,
        "flops_per_rank": dict(evaluation.rank_flops),
        "memory_limit_gib": plan.machine.hardware.usable_bytes / GIB,
        "comm_bytes": dict(evaluation.wire_bytes),
        "blocks": {key or "model": _region_rows(plan, planned, rivals) for key, planned in plan.regions.items()},
        "repeated": repeated_work(plan),
        "segments": {key: _segment_rows(planned) for key, planned in plan.regions.items() if key},
        "binding": binding(plan, evaluation, solver),
        "alternatives": [_alternative_row(tried, plan) for tried in solver.alternatives],
        "timeline": [event._asdict() for event in lanes.events],
        "memory_timeline": _memory_timeline(evaluation, lanes),
        "solver": {
            "status": solver.status,
            "gap": solver.gap,
            "seconds": solver.seconds,
            "variables": solver.variables,
            "programs": solver.programs,
        },
        "timings": dict(timings),
        "documents": list(plan.documents),
        "decisions": decisions_document(plan.decisions),
    }


def _memory_timeline(evaluation: Evaluation, lanes: Timeline) -> list[dict[str, Any]]:
    return [
        {"at": point.at, "time_s": lanes.moments[point.at], "gib": {part: count / GIB for part, count in point.parts.items()}}
        for point in evaluation.points
    ]


def _storage(plan: Plan) -> dict[str, Any]:
    named = {DP: "dp", **dict(enumerate(plan.axis_names))}
    sharded = [named[axis] for axis in plan.storage.sharded]
    copies = [named[axis] for axis in plan.machine.replicated(plan.storage.sharded) if plan.machine.size(axis) > 1]
    return {"zero": plan.storage.zero, "sharded": sharded, "replicated": copies}


def _alternative_row(tried: Alternative, plan: Plan) -> dict[str, Any]:
    mesh = " x ".join(f"{axis.size} {'tensor parallel' if axis.role == 'split' else 'data or sequence'}" for axis in tried.axes)
    return {
        "mesh": mesh or "one rank",
        "zero": tried.storage.zero if tried.storage else None,
        "step_time_s": None if tried.seconds is None else tried.seconds * plan.storage.accumulation,
        "exact": tried.exact,
        "reason": tried.reason,
    }


def _ranks(plan: Plan) -> int:
    count = 1
    for size in plan.mesh.values():
        count *= size
    return count


def _dtype(plan: Plan) -> torch.dtype:
    """What the model computes in."""
    return next(iter(plan.outer.region.graph.parameters().values())).dtype


def _attention(plan: Plan) -> dict[str, Any]:
    """The kernel that attention is priced with, the hardware's first, and the rates of all: what a run chooses its kernel by."""
    rates = plan.machine.hardware.rates.arithmetic(_dtype(plan)).attention
    return {"kernel": next(iter(rates)), "rates": {kernel: asdict(rate) for kernel, rate in rates.items()}}


def _mfu(plan: Plan, evaluation: Evaluation, ranks: int) -> tuple[float, float]:
    """Model FLOPs utilization counting causal attention as it is, and counting it full (the usual publication)."""
    attention = sum(
        planned.region.count * sum(flops_of(n) for c in planned.clusters for n in c.cluster.nodes if is_attention(n.op))
        for planned in plan.regions.values()
    )
    available = evaluation.step_s * ranks * plan.machine.hardware.peak(_dtype(plan))
    causal = 3 * evaluation.flops
    return causal / available, (causal + 3 * attention * plan.storage.accumulation) / available


def repeated_work(plan: Plan) -> dict[str, float]:
    """Axis -> share of the compute that every rank of the axis repeats, for axes where it is more than a tenth."""
    total = 0.0
    repeated = dict.fromkeys(plan.mesh, 0.0)
    for planned in plan.regions.values():
        for cluster in planned.clusters:
            seconds = planned.region.count * (cluster.price.forward_s + cluster.price.backward_s)
            total += seconds
            for axis, split in zip(plan.mesh, cluster.strategy.splits, strict=True):
                repeated[axis] += 0.0 if split else seconds
    return {axis: seconds / total for axis, seconds in repeated.items() if seconds > 0.1 * total}


def layout_text(layout: Layout) -> str:
    """`S(1) B`: one word an axis."""
    return " ".join(str(placement) for placement in layout)


def parse_layout(text: str) -> Layout:
    """The layout that `layout_text` wrote."""
    return tuple(_parse_placement(word) for word in text.split())


def _parse_placement(word: str) -> Placement:
    match = re.fullmatch(r"S\((\d+)\)", word)
    if match:
        return S(int(match[1]))
    if word not in ("R", "B", "P"):
        raise UserError(f"plan.json holds `{word}`, which is no placement: compile again")
    return {"R": R, "B": B, "P": P}[word]


def _region_rows(plan: Plan, planned: PlannedRegion, rivals: Mapping[tuple[str, int], RunnerUp]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    index = 0
    for segment in planned.segments:
        for cluster in segment.clusters:
            rows += [_reshard_row(reshard) for reshard in cluster.reshards]
            rows.append(
                {
                    "operator": cluster.cluster.name,
                    "ops": [node.op for node in cluster.cluster.nodes],
                    "strategy": split_letters(plan, planned.region, cluster.cluster, cluster.strategy),
                    "placements": {
                        name: layout_text(cluster.strategy.layouts[name]) for name in (*cluster.cluster.inputs, *cluster.cluster.outputs)
                    },
                    "forward_s": cluster.price.forward_s,
                    "backward_s": cluster.price.backward_s,
                    "constants": dict(cluster.strategy.constants),
                    "segment": segment.segment.name,
                    "runner_up": _runner_up_row(rivals.get((planned.region.key, index))),
                }
            )
            index += 1
        rows += [_reshard_row(reshard) for reshard in segment.leaving]
    return rows


def _runner_up_row(rival: RunnerUp | None) -> dict[str, Any] | None:
    if rival is None:
        return None
    return {
        "strategy": dict(rival.letters),
        "extra_s": rival.extra_s,
        "peak_memory_gib": rival.peak_bytes / GIB,
        "fits": rival.fits,
    }


def _reshard_row(reshard: Reshard) -> dict[str, Any]:
    return {
        "reshard": reshard.value,
        "from": layout_text(reshard.src),
        "to": layout_text(reshard.dst),
        "forward_s": reshard.forward_s,
        "backward_s": reshard.backward_s,
    }


def _segment_rows(planned: PlannedRegion) -> dict[str, dict[str, Any]]:
    rows = {}
    for segment in planned.segments:
        row: dict[str, Any] = dict.fromkeys(("keep", "selective", "recompute", "spill", "offload"), 0)
        for mode, layers in segment.modes:
            row[mode.kind] += layers
        row["tiles"] = max(mode.tiles for mode, _ in segment.modes)
        kept = kept_matmuls(planned.region, segment.index) if row["selective"] and segment.index is not None else ()
        row["kept"] = [planned.region.parts[index].outputs[0] for index in kept]
        rows[segment.segment.name] = row
    return rows


def decisions_document(decisions: Decisions) -> dict[str, Any]:
    """Decisions as plain JSON."""
    return {
        "axes": [{"size": axis.size, "role": axis.role} for axis in decisions.axes],
        "dp": decisions.dp,
        "storage": asdict(decisions.storage) | {"sharded": list(decisions.storage.sharded)},
        "splits": {key: [list(split) for split in parts] for key, parts in decisions.splits.items()},
        "constants": {key: [dict(constants) for constants in parts] for key, parts in decisions.constants.items()},
        "modes": {
            key: [[[mode.kind, mode.tiles, layers] for mode, layers in counts] for counts in segments]
            for key, segments in decisions.modes.items()
        },
        "slots": {slot: layout_text(layout) for slot, layout in decisions.slots.items()},
    }


def parse_decisions(document: Mapping[str, Any]) -> Decisions:
    """Decisions from the `decisions` of a `plan.json`. Raises `UserError` where they are not readable."""
    try:
        return Decisions(
            axes=tuple(Axis(axis["size"], axis["role"]) for axis in document["axes"]),
            dp=document["dp"],
            storage=Storage(**{**document["storage"], "sharded": tuple(document["storage"]["sharded"])}),
            splits={key: tuple(tuple(split) for split in parts) for key, parts in document["splits"].items()},
            constants={key: tuple(tuple(constants.items()) for constants in parts) for key, parts in document["constants"].items()},
            modes={
                key: tuple(tuple((Mode(kind, tiles), layers) for kind, tiles, layers in counts) for counts in segments)
                for key, segments in document["modes"].items()
            },
            slots={slot: parse_layout(text) for slot, text in document["slots"].items()},
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"plan.json has no readable decisions ({error}): compile again") from error
