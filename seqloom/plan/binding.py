"""Which constraint binds a plan: memory, arithmetic or communication, in one sentence.

Role in the pipeline: after `evaluate`, for `plan.json`. Memory binds where the plan fills most of it and the step would be shorter by more
than `NOTABLE` if there were no limit (`SolverReport.unlimited_s`, a bound for the same mesh); otherwise what takes the larger part of the
step.
"""

from __future__ import annotations

from seqloom.plan.evaluate import GIB, Evaluation
from seqloom.plan.labels import is_attention
from seqloom.plan.plan import Plan
from seqloom.plan.solver import SolverReport

NOTABLE = 0.005  # share of a step
FULL = 0.75  # share of the memory below which it is not what binds: the bound may lie below what any plan reaches
COMPUTE = ("forward", "backward", "recompute", "optimizer")


def binding(plan: Plan, evaluation: Evaluation, solver: SolverReport) -> dict[str, str]:
    """`constraint` (memory, compute or communication) and `sentence`."""
    step_s, time = evaluation.step_s, evaluation.time
    if solver.unlimited_s is not None and evaluation.peak_bytes > FULL * plan.machine.hardware.usable_bytes:
        unlimited = solver.unlimited_s * plan.storage.accumulation
        if unlimited < (1 - NOTABLE) * step_s:
            return {"constraint": "memory", "sentence": _memory(plan, evaluation, unlimited)}
    compute = sum(time[part] for part in COMPUTE)
    if compute >= step_s - compute:
        return {"constraint": "compute", "sentence": _compute(plan, evaluation, compute)}
    exposed = time["parameters_exposed"]
    words = f"{(step_s - compute) / step_s:.1%} of the step: reshards {_seconds(time['reshard'])}"
    words += f", parameters and gradients beyond what compute hides {_seconds(exposed)}" if exposed else ""
    words += f", copies to the host {_seconds(time['host_exposed'])}" if time["host_exposed"] else ""
    return {"constraint": "communication", "sentence": f"Communication binds: it takes {words}."}


def _memory(plan: Plan, evaluation: Evaluation, unlimited: float) -> str:
    costs = [("recomputation", evaluation.time["recompute"]), ("waiting for the host", evaluation.time["host_exposed"])]
    spent = " and ".join(f"{_seconds(seconds)} of {name}" for name, seconds in costs if seconds)
    saved = evaluation.step_s - unlimited
    return (
        f"Memory binds: without its limit a step on this mesh could take {_seconds(unlimited)} at best, "
        f"{saved / evaluation.step_s:.1%} less; "
        f"{f'the price is {spent}; ' if spent else ''}{_room(plan, evaluation)}."
    )


def _compute(plan: Plan, evaluation: Evaluation, compute: float) -> str:
    attention = sum(
        planned.region.count * (cluster.price.forward_s + cluster.price.backward_s) * plan.storage.accumulation
        for planned in plan.regions.values()
        for cluster in planned.clusters
        if is_attention(cluster.cluster.nodes[0].op)
    )
    alone = f", attention alone {attention / evaluation.step_s:.1%}" if attention else ""
    return f"Arithmetic binds: compute takes {compute / evaluation.step_s:.1%} of the step{alone}; {_room(plan, evaluation)}."


def _room(plan: Plan, evaluation: Evaluation) -> str:
    limit = plan.machine.hardware.usable_bytes
    return f"{(limit - evaluation.peak_bytes) / GIB:.1f} of {limit / GIB:.1f} GiB stay free"


def _seconds(value: float) -> str:
    return f"{value:.4g} s" if value >= 1 else f"{value * 1e3:.3g} ms"
