"""What a compiled program's folder holds, and what was measured of it, read as plain data.

In: `.seqloom/<name>/`, and the log of a training run of that name. Out: `Documents`. Only what the present `plan.json` must have is
required; everything else may be absent.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import isclose
from pathlib import Path
from statistics import median
from typing import Any

from seqloom.errors import UserError

PLAN, FINGERPRINT, DRYRUN, REHEARSAL, LOG = "plan.json", "fingerprint.json", "dryrun.json", "rehearsal.json", "log.jsonl"
RUNS = "runs"
REQUIRED = (
    "mesh",
    "hardware",
    "seq_len",
    "step_time_s",
    "time_s",
    "tokens_per_s_per_gpu",
    "mfu_causal",
    "mfu_full",
    "peak_memory_gib",
    "memory_limit_gib",
    "comm_bytes",
    "blocks",
)


@dataclass(frozen=True)
class Training:
    """A training run: medians over its steps but the first, which warms up, its highest memory, and the loss by step."""

    folder: Path
    steps: int
    step_s: float
    tokens_per_s_per_gpu: float
    mfu_causal: float
    peak_gib: float
    losses: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Documents:
    """A program's files; None for those that are not there. `program` is the fingerprint: what it was compiled from."""

    name: str
    plan: Mapping[str, Any]
    program: Mapping[str, Any] | None
    dryrun: Mapping[str, Any] | None
    rehearsal: Mapping[str, Any] | None
    training: Training | None


def read_documents(folder: Path, run_folder: Path | None = None) -> Documents:
    """Everything known of the program in `folder`; the run is looked for beside it (`../../runs/<name>`) where none is given.

    Raises `UserError` where there is no plan, or a file cannot be read.
    """
    folder = folder.resolve()
    plan = _read(folder / PLAN)
    if plan is None:
        raise UserError(f"there is no {PLAN} in {folder}: compile a program with that --name first")
    missing = [key for key in REQUIRED if key not in plan]
    if missing:
        raise UserError(f"{folder / PLAN} has no `{missing[0]}`: compile the program again")
    run_folder = run_folder or folder.parent.parent / RUNS / folder.name
    return Documents(
        name=folder.name,
        plan=plan,
        program=_read(folder / FINGERPRINT),
        dryrun=_read(folder / DRYRUN),
        rehearsal=_read(folder / REHEARSAL),
        training=read_training(run_folder, plan, folder / PLAN),
    )


def read_training(run_folder: Path, plan: Mapping[str, Any], plan_file: Path) -> Training | None:
    """The run in `run_folder`; None where there is none, or where its log is not of this plan.

    A run of this plan is logged after the plan was written, and the product of its MFU and step time, which is the work of a step over the
    peak of the machine, is the plan's.
    """
    log = run_folder / LOG
    if not log.is_file() or log.stat().st_mtime < plan_file.stat().st_mtime:
        return None
    records = {record["step"]: record for record in map(_record, log.read_text(encoding="utf-8").splitlines()) if record}
    steps = [records[step] for step in sorted(records)]
    work = plan["mfu_causal"] * plan["step_time_s"]
    if not steps or not isclose(steps[-1]["mfu_causal"] * steps[-1]["step_time_s"], work, rel_tol=1e-6):
        return None
    warm = steps[1:] or steps
    middle = {key: median(record[key] for record in warm) for key in ("step_time_s", "tokens_per_s_per_gpu", "mfu_causal")}
    return Training(
        folder=run_folder,
        steps=len(steps),
        step_s=middle["step_time_s"],
        tokens_per_s_per_gpu=middle["tokens_per_s_per_gpu"],
        mfu_causal=middle["mfu_causal"],
        peak_gib=max(record["memory_gib"] for record in steps),
        losses=tuple((record["step"], record["loss"]) for record in steps),
    )


def _record(line: str) -> dict[str, Any] | None:
    """The record of a step; None for a skipped step, an empty line, or one that was cut off when a run was killed."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if "loss" in record else None


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): remove it, then run the command that writes it again") from error
    if not isinstance(document, dict):
        raise UserError(f"{path} is not a JSON object: remove it, then run the command that writes it again")
    return document
