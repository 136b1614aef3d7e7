"""`python -m seqloom verify`: prove a compiled plan on a small model of the same structure.

The plan's own decisions are laid over a shrunken model (`seqloom.runtime.shrink`), the program is emitted in fp64 and run on CPU processes,
one for each rank of the plan; loss and every gradient must equal those of the original model.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import timedelta
from itertools import accumulate, pairwise
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from safetensors.torch import load_file, save_file

import seqloom.runtime.offload
from seqloom.capture import capture
from seqloom.capture.architecture import config_of
from seqloom.capture.documents import attend_inside_documents
from seqloom.cost.hardware import load_hardware
from seqloom.emit import fingerprint as prints
from seqloom.emit.pipeline import PLAN, PROGRAM
from seqloom.emit.program import program_source
from seqloom.errors import UserError
from seqloom.plan.document import parse_decisions
from seqloom.plan.plan import PlanMismatch, realize
from seqloom.plan.price import Machine
from seqloom.plan.regions import build_regions
from seqloom.plan.solver import Decisions
from seqloom.runtime.parity import Difference, compare, original_gradients, program_gradients, random_batches
from seqloom.runtime.shrink import narrow, shrink

if TYPE_CHECKING:
    from transformers import PretrainedConfig

TOLERANCE = 1e-9
SHORT = 16  # tokens a rank: a tile of the sequence holds at least one
TIMEOUT = timedelta(minutes=5)
PRELOADED = ["seqloom.runtime.parity", "torch.distributed.fsdp", "torch.distributed._functional_collectives", "safetensors.torch"]
"""What processes import, once for all of them: they share its memory, and 64 fit where 20 would."""


def run(folder: Path, ranks_per_axis: int | None = None) -> int:
    """Verify the program in `folder`, print the result, return the exit code (0 when it passes)."""
    difference = verify(folder, ranks_per_axis=ranks_per_axis)
    passed = difference.loss < TOLERANCE and difference.gradient < TOLERANCE
    print(f"{'loss':<24}{difference.loss:.1e} relative to the original model")
    print(f"{'largest gradient':<24}{difference.gradient:.1e} {difference.parameter}")
    print("parity: passed" if passed else f"parity: FAILED, the plan in {folder} must not be trained with")
    return 0 if passed else 1


def verify(folder: Path, *, dp: int | None = None, ranks_per_axis: int | None = None) -> Difference:
    """How far the plan in `folder` is from the original model, on a shrunken model. `dp` scale units (default 1, or the plan's up to 2).

    With `ranks_per_axis` the decisions are laid over a mesh of the same axes with so many ranks each. Raises `UserError` where there is no
    plan, or it does not fit the shrunken model.
    """
    mark = prints.read(folder)
    if mark is None or not (folder / PLAN).is_file():
        raise UserError(f"there is no compiled program in {folder}: compile it first, or give its --name")
    document = json.loads((folder / PLAN).read_text(encoding="utf-8"))
    decisions = parse_decisions(document["decisions"])
    request, config = mark["request"], config_of(mark["config"])
    if ranks_per_axis is not None:
        config, decisions = narrow(config, decisions, ranks_per_axis)
    return verify_decisions(
        config,
        decisions,
        batch=request["micro_batch_size"],
        accumulation=min(2, decisions.storage.accumulation),
        units=min(decisions.dp, 2) if dp is None else dp,
        loss=request["loss"],
        documents=plan_documents(document),
    )


def plan_documents(document: Mapping[str, Any]) -> tuple[int, ...]:
    """Lengths of the documents of a typical row of a plan; () where attention is plain."""
    return tuple(document.get("documents", ()))


def verify_decisions(
    config: PretrainedConfig, decisions: Decisions, *, batch: int, accumulation: int, units: int, loss: str, documents: Sequence[int] = ()
) -> Difference:
    """Lay decisions over a shrunken model, run it on processes and compare. See `verify`."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    plan_ranks = prod(axis.size for axis in decisions.axes)
    small = shrink(config, plan_ranks)
    length = SHORT * max(plan_ranks, 4)
    documents = scaled_documents(documents, length)
    batches = [random_batches(small, batch, length, accumulation, seed, documents=bool(documents)) for seed in range(units)]
    with tempfile.TemporaryDirectory(prefix="seqloom-verify-") as place:
        folder, weights, result = Path(place) / "program", Path(place) / "weights", Path(place) / "result.safetensors"
        folder.mkdir()
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(small, dtype=torch.float64).save_pretrained(weights)
        write_program(small, decisions, folder, batch=batch, seq_len=length, loss=loss, documents=documents)
        job = (units * plan_ranks, str(Path(place) / "store"), folder, small, weights, batches, result)
        _run_processes(units * plan_ranks, job)
        found = load_file(result)
        true_loss, true_gradients = original_gradients(small, weights, batches)
    return compare(found.pop("loss").item(), found, true_loss, true_gradients)


def write_program(
    config: PretrainedConfig, decisions: Decisions, folder: Path, *, batch: int, seq_len: int, loss: str, documents: Sequence[int] = ()
) -> None:
    """Emit the fp64 program of decisions for a config. Raises `UserError` where they do not fit it."""
    captured = capture(config, batch_size=batch, seq_len=seq_len, dtype=torch.float64, loss=loss, loss_chunk=16)
    machine = Machine(load_hardware("cpu"), decisions.axes, decisions.dp)
    graph = attend_inside_documents(captured.graph, documents) if documents else captured.graph
    try:
        plan = realize(build_regions(graph), decisions, machine)
    except PlanMismatch as error:
        raise UserError(f"the plan can not be laid over the small model that verify runs: {error}") from error
    text = program_source(plan, captured.model_class, captured.tied, "Written for verification.")
    (folder / PROGRAM).write_text(text, encoding="utf-8")


def scaled_documents(documents: Sequence[int], length: int) -> tuple[int, ...]:
    """The documents of a row of another length, in the same proportions, none empty."""
    if not documents:
        return ()
    kept = list(documents)[: max(1, length // 2)]
    ends = [max(index + 1, round(end * (length - len(kept)) / sum(kept)) + index + 1) for index, end in enumerate(accumulate(kept))]
    ends[-1] = length
    return tuple(end - start for start, end in pairwise([0, *ends]))


def _run_processes(count: int, job: tuple[Any, ...]) -> None:
    """Run `_rank` on so many processes. Raises `UserError` where the system ends one, which it does when memory is short."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # it would tell of every process that it ends after one failed
    try:
        torch.multiprocessing.start_processes(_rank, job, nprocs=count, start_method="forkserver")
    except torch.multiprocessing.ProcessExitedException as error:
        raise UserError(
            f"process {error.error_index} of {count} was ended from outside ({error.signal_name or f'exit code {error.exit_code}'}), as a "
            "machine does that runs out of memory: verify the plan on fewer with --ranks_per_axis 2"
        ) from error


def _rank(rank: int, world: int, store: str, folder: Path, config: PretrainedConfig, weights: Path, batches: list, result: Path) -> None:
    """One process of the job: run the program and let rank 0 leave the result."""
    torch.set_num_threads(1)
    seqloom.runtime.offload.MINIMUM = 1  # here everything that is offloaded is small
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)  # gathering a gradient takes two steps here: it says so each time
    sys.path.insert(0, str(Path.cwd()))
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world, timeout=TIMEOUT)
    loss, gradients = program_gradients(folder, config, weights, batches)
    if rank == 0:
        save_file({"loss": torch.tensor(loss, dtype=torch.float64), **{n: g.contiguous() for n, g in gradients.items()}}, result)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # the threads of a process group that is being destroyed may end a process by a signal
