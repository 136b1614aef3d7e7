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
from typing import Any

import numpy as np

from seqloom.errors import UserError
from seqloom.report.decimate import kept
from seqloom.report.run_log import LOG, LogReader

PLAN, FINGERPRINT, DRYRUN, REHEARSAL = "plan.json", "fingerprint.json", "dryrun.json", "rehearsal.json"
RUNS = "runs"
POINTS = 1000  # of a curve of losses
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
    """A training run: medians over its steps but those that warm up, its highest memory, and losses by step, the extremes among them."""

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
    path = run_folder / LOG
    if not path.is_file() or path.stat().st_mtime < plan_file.stat().st_mtime:
        return None
    log = LogReader(run_folder).read()
    steps, work = log.steps, plan["mfu_causal"] * plan["step_time_s"]
    if not log.count or not isclose(steps["mfu_causal"][-1] * steps["step_time_s"][-1], work, rel_tol=1e-6):
        return None
    warm = ~log.first_after_start()
    warm = warm if warm.any() else ~warm
    middle = {key: float(np.median(steps[key][warm])) for key in ("step_time_s", "tokens_per_s_per_gpu", "mfu_causal")}
    at = kept(steps["loss"], POINTS)
    return Training(
        folder=run_folder,
        steps=log.count,
        step_s=middle["step_time_s"],
        tokens_per_s_per_gpu=middle["tokens_per_s_per_gpu"],
        mfu_causal=middle["mfu_causal"],
        peak_gib=float(steps["memory_gib"].max()),
        losses=tuple(zip(steps["step"][at].astype(int).tolist(), steps["loss"][at].tolist(), strict=True)),
    )


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
