"""`python -m seqloom dryrun`: the emitted program of a rank at full size on fake tensors, with no GPU and no memory.

Forward, backward and optimizer of two steps, the first of one micro-batch, run under `FakeTensorMode` in a fake process group: every shape,
dtype and collective of the program is exercised. Bytes are counted as they come and go (`live_bytes`), operations and bytes sent as they
happen (`counting`). The figures are set beside the plan's and written to `dryrun.json`.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from seqloom.emit import fingerprint as prints
from seqloom.emit.pipeline import DTYPES, PLAN
from seqloom.errors import UserError
from seqloom.runtime.comparison import Row, table
from seqloom.runtime.context import Layout, typical_batch
from seqloom.runtime.counting import WorkCounter
from seqloom.runtime.live_bytes import PARTS, LiveBytes
from seqloom.runtime.materialize import storage
from seqloom.runtime.mesh import build_mesh
from seqloom.runtime.optimizer import build_optimizer
from seqloom.runtime.phases import Phase, run_step
from seqloom.runtime.program import Program, load_program
from seqloom.runtime.simulated import fake_job

GIB = 2.0**30
TOLERANCE = 0.1  # of the dry run's peak: a prediction further off is an error
ALL_RANKS = 4  # so many ranks are all run; of more, the first and the last
RESULT = "dryrun.json"


@dataclass(frozen=True)
class DryRun:
    """What one rank would do in a step: bytes on the device at the peak (and by part), between steps, and at most on the host; operations
    of forward, backward and recompute; bytes that it sends by kind of collective."""

    rank: int
    peak_bytes: int
    parts: Mapping[str, int]
    standing_bytes: int
    host_bytes: int
    flops: Mapping[str, int]
    sent: Mapping[str, int]


def run(folder: Path, rank: int | None = None) -> int:
    """Dry-run one rank of the program in `folder`, or the ranks of a scale unit; print and write the comparison with the plan.

    All ranks run one program. They differ by their place alone (uneven shards, the part of a causal mask that they see), and the first and
    the last are the extremes: of more than four ranks these two are run. Returns 1 where the peak is not what the plan predicts.
    """
    plan = read_plan(folder)
    ranks = prod(plan["mesh"].values())
    chosen = [rank] if rank is not None else list(range(ranks)) if ranks <= ALL_RANKS else [0, ranks - 1]
    results = [dry_run(folder, index) for index in chosen]
    (folder / RESULT).write_text(json.dumps(document(plan, results), indent=1) + "\n", encoding="utf-8")
    count = plan["grad_accumulation_steps"]
    micro_batches = "1 micro-batch each" if count == 1 else f"the first of 1 micro-batch, the second of {count}"
    print(f"2 steps on fake tensors, {micro_batches}, of {_named(chosen, ranks)}")
    print(table(rows(plan, results), [f"rank {result.rank}" for result in results]))
    problem = verdict(plan, results)
    if problem:
        print(problem)
    return 1 if problem else 0


def _named(chosen: Sequence[int], ranks: int) -> str:
    names = " and ".join(map(str, chosen)) if len(chosen) < 3 else f"{chosen[0]} to {chosen[-1]}"
    beyond = "; the ranks between them differ by their place alone" if len(chosen) == 2 and ranks > ALL_RANKS else ""
    return f"rank{'s' * (len(chosen) > 1)} {names} of a scale unit of {ranks}{beyond}"


def read_plan(folder: Path) -> dict[str, Any]:
    """The `plan.json` of a compiled program. Raises `UserError` where there is none."""
    if not (folder / PLAN).is_file():
        raise UserError(f"there is no compiled program in {folder}: compile it first, or give its --name")
    return json.loads((folder / PLAN).read_text(encoding="utf-8"))


def check_rank(folder: Path, plan: Mapping[str, Any], rank: int) -> int:
    """The number of ranks of the job of a plan. Raises `UserError` for a rank that it does not have."""
    world = prod(plan["mesh"].values()) * plan["dp"]
    if not 0 <= rank < world:
        raise UserError(f"rank {rank} does not exist: the program in {folder} runs on ranks 0 to {world - 1}")
    return world


def dry_run(folder: Path, rank: int) -> DryRun:
    """Two steps of one rank on fake tensors. Raises `UserError` for a rank that the job does not have."""
    plan, request = read_plan(folder), prints.read(folder)["request"]
    world = check_rank(folder, plan, rank)
    with fake_job(rank, world):
        documents, accumulation = plan.get("documents", ()), plan["grad_accumulation_steps"]
        return _steps(load_program(folder), plan["dp"], rank, DTYPES[request["precision"]], accumulation, documents)


def _steps(program: Program, dp: int, rank: int, dtype: torch.dtype, accumulation: int, documents: Sequence[int]) -> DryRun:
    mesh, device = build_mesh(program.MESH, dp, "cpu"), torch.device("cpu")
    model = storage(program, mesh, torch.float32, dtype)
    work, live = WorkCounter(), LiveBytes()

    def enter(phase: Phase) -> None:
        if phase == "optimizer":
            live.hold([param.grad for param in model.parameters() if param.grad is not None], "gradients")
        live.enter(phase)
        work.enter(phase)

    inputs = {name: torch.zeros(shape, dtype=torch.int64) for name, shape in program.SHAPES.items()}
    batch = Layout(program, mesh).prepare(inputs | typical_batch(documents, program.SHAPES["input_ids"][0]))  # reads real borders
    # `live` is the inner one: it must meet a DTensor's operator before `work` takes it apart.
    with FakeTensorMode(allow_non_fake_inputs=True), work, work.recomputation(), live, live.resizes():
        model.to_empty(device=device)
        optimizer = build_optimizer(model, lr=1e-4)
        for micro_batches in (1, accumulation):  # the first makes the optimizer's states, the second is what is told
            work.clear()
            run_step(model, program, mesh, optimizer, [batch] * micro_batches, device, enter)
            live.hold([*model.parameters(), *model.buffers(), *optimizer_state(optimizer)], "states")
            gc.collect()  # autograd graphs hold circles; a real step's memory is long reused by then
    return DryRun(rank, live.peak, live.parts(), live.alive, live.host_peak, work.flops, work.sent)


def optimizer_state(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Every tensor that an optimizer keeps."""
    return [leaf for leaf in tree_leaves(list(optimizer.state.values())) if isinstance(leaf, torch.Tensor)]


def document(plan: Mapping[str, Any], results: Sequence[DryRun]) -> dict[str, Any]:
    """`dryrun.json`: the ranks that were run, and the plan's figures under the same keys (null where it has none)."""
    memory = plan["peak_memory_gib"]
    flops = plan.get("flops_per_rank")
    predicted = {
        "peak_gib": memory["total"],
        "parts_gib": {part: memory.get(part) for part in PARTS},
        "standing_gib": memory.get("states"),
        "host_gib": plan.get("host_memory_gib"),
        "flops": None if flops is None else sum(flops.values()),
        "flops_by_pass": flops,
        "comm_bytes": plan["comm_bytes"],
    }
    return {"ranks": [_rank_document(result) for result in results], "predicted": predicted}


def _rank_document(result: DryRun) -> dict[str, Any]:
    return {
        "rank": result.rank,
        "peak_gib": result.peak_bytes / GIB,
        "parts_gib": {part: size / GIB for part, size in result.parts.items()},
        "standing_gib": result.standing_bytes / GIB,
        "host_gib": result.host_bytes / GIB,
        "flops": sum(result.flops.values()),
        "flops_by_pass": dict(result.flops),
        "comm_bytes": dict(sorted(result.sent.items())),
    }


def rows(plan: Mapping[str, Any], results: Sequence[DryRun]) -> list[Row]:
    """One row a quantity, one column a rank."""
    memory = {part: size * GIB for part, size in plan["peak_memory_gib"].items()}
    flops, sent = plan.get("flops_per_rank"), plan["comm_bytes"]
    host = plan.get("host_memory_gib")
    found = [Row("peak memory", "memory", memory["total"], tuple(r.peak_bytes for r in results))]
    found += [Row(f"  {part}", "memory", memory.get(part), tuple(r.parts[part] for r in results)) for part in PARTS]
    found.append(Row("between steps", "memory", None, tuple(r.standing_bytes for r in results)))
    found.append(Row("on the host", "memory", None if host is None else host * GIB, tuple(r.host_bytes for r in results)))
    total = None if flops is None else sum(flops.values())
    found.append(Row("operations", "operations", total, tuple(sum(r.flops.values()) for r in results)))
    for part in results[0].flops:
        found.append(Row(f"  {part}", "operations", (flops or {}).get(part), tuple(r.flops[part] for r in results)))
    for kind in sorted({*sent, *(kind for r in results for kind in r.sent)}):
        found.append(Row(f"sent by {kind}", "bytes", sent.get(kind, 0), tuple(r.sent.get(kind, 0) for r in results)))
    return found


def verdict(plan: Mapping[str, Any], results: Sequence[DryRun]) -> str | None:
    """The sentence that says what is wrong with the plan's memory, None where nothing is."""
    predicted, limit = plan["peak_memory_gib"]["total"], plan["memory_limit_gib"]
    worst = max(results, key=lambda result: result.peak_bytes)
    peak = worst.peak_bytes / GIB
    if peak > limit:
        return (
            f"rank {worst.rank} peaks at {peak:.4g} GiB, above the {limit:.4g} GiB that a plan may use here: compile again with "
            f"--memory_gib lowered by {peak - limit:.2g}"
        )
    if abs(predicted - peak) > TOLERANCE * peak:
        return (
            f"rank {worst.rank} peaks at {peak:.4g} GiB where the plan predicts {predicted:.4g} GiB, more than a tenth apart: trust the "
            f"dry run, and set --memory_gib so that it fits"
        )
    return None
