"""The sentence for a request without a plan: what binds, by how much, and the nearest changes that fit."""

from __future__ import annotations

from dataclasses import replace

from seqloom.cost.hardware import GIB
from seqloom.plan.budget import add_storage
from seqloom.plan.labels import is_attention
from seqloom.plan.linear import OutOfTime
from seqloom.plan.memory import add_memory
from seqloom.plan.price import Machine
from seqloom.plan.problem import build_problem
from seqloom.plan.regions import Regions
from seqloom.plan.request import Request, candidate_meshes
from seqloom.plan.space import Axis
from seqloom.plan.storage import STATE_BYTES, storages


def why_nothing_fits(regions: Regions, request: Request) -> str:
    """One sentence for a request that no plan answers."""
    least = _least_memory(regions, request)
    if least is None:
        return _why_nothing_divides(regions, request)
    budget = request.budget_bytes
    margin = 1 - request.hardware.allocator_margin
    cures = [f"devices of {least / margin / GIB:.0f} GiB (--memory_gib, if yours have more)"]
    more = _ranks_that_fit(regions, request)
    if more:
        cures.insert(0, f"--plan_ngpus {more}")
    what = _what_binds(regions, request)
    return (
        f"no plan fits: the leanest one needs {least / GIB:.1f} GiB a device and {request.hardware.name} leaves {budget / GIB:.1f} "
        f"GiB after its margin, {(least - budget) / GIB:.1f} GiB short; {what}; what would fit: {' or '.join(cures)}"
        f"{_shorter(request, regions)}"
    )


def _what_binds(regions: Regions, request: Request) -> str:
    """Whether the weights or the activations are too large."""
    numel = _parameters(regions)
    spread = 1 if request.zero == 0 else request.ranks * request.dp
    states = STATE_BYTES * numel / spread
    if states > request.budget_bytes:
        return f"weights and optimizer state alone take {states / GIB:.1f} GiB"
    return f"weights and optimizer state take {states / GIB:.1f} GiB of it, activations, gradients and gathered weights the rest"


def _shorter(request: Request, regions: Regions) -> str:
    spread = 1 if request.zero == 0 else request.ranks * request.dp
    if STATE_BYTES * _parameters(regions) / spread > request.budget_bytes:
        return "; no shorter --seq_len helps"
    return ", or a shorter --seq_len"


def _parameters(regions: Regions) -> float:
    total = 0
    for region in regions.parts.values():
        for value in region.graph.of_kind("parameter"):
            count = 1
            for size in value.shape:
                count *= size
            total += region.count * count
    return total


def _why_nothing_divides(regions: Regions, request: Request) -> str:
    """The sentence for a mesh whose sizes do not cut the model into equal pieces."""
    graph = regions.graph
    batch, seq_len = graph.values[graph.inputs[0]].shape
    sizes = f"sequence length {seq_len}, batch {batch}"
    for part in regions.parts.values():
        for node in (node for cluster in part.parts for node in cluster.nodes if is_attention(node.op)):
            query, key = (part.graph.values[name].shape[1] for name in node.inputs[:2])
            sizes = f"sequence length {seq_len}, batch {batch}, {query} query heads, {key} key/value heads"
    asked = f" with --force {request.force}" if request.force else ""
    return (
        f"no way to split this model over {request.ranks} ranks{asked}: what is split must divide by the size of its mesh axis, and "
        f"there are {sizes}; change --seq_len, --micro_batch_size or --plan_ngpus so that they divide"
    )


def _least_memory(regions: Regions, request: Request) -> float | None:
    """Smallest peak of any plan in bytes, proven to 1%; None when nothing can be split at all."""
    found = [need for need in (_leanest(regions, request, axes) for axes in candidate_meshes(request)) if need is not None]
    return min(found, default=None)


def _leanest(regions: Regions, request: Request, axes: tuple[Axis, ...]) -> float | None:
    """Smallest peak on one mesh with its leanest storage."""
    machine = Machine(request.hardware, axes, request.dp)
    problem = build_problem(regions, machine, request)
    if not problem.feasible:
        return None
    storage = storages(machine, request.itemsize, request.accumulation, request.zero)[0]
    program = add_storage(add_memory(problem, request.budget_bytes), storage, leanest=True)
    try:
        solution = program.solve(relaxed=False, time_limit=request.time_limit_s, gap=0.01)
    except OutOfTime:
        return None
    return None if solution is None else solution.objective * max(request.budget_bytes, 1.0)


def _ranks_that_fit(regions: Regions, request: Request) -> int | None:
    """The next power-of-two multiple of ranks (up to 64 times) for which a plan fits."""
    if request.force:
        return None
    reach = request.hardware.links[-1].ranks_per_group
    for factor in (2, 4, 8, 16, 32, 64):
        bigger = replace(request, ranks=request.ranks * factor)
        if bigger.ranks * request.dp > reach:
            return None
        needs = (_leanest(regions, bigger, axes) for axes in candidate_meshes(bigger) if len(axes) <= 2)
        if any(need is not None and need < request.budget_bytes for need in needs):
            return bigger.ranks
    return None
