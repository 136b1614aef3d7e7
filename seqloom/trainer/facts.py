"""What is known of a run before its first step, in one place: for the table, for every step's line, and for `run.json`.

In: the built run. Out: counts, FLOPs and limits; `run.json` in the log folder, from which the page of the run is written.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from seqloom.cost.hardware import GIB, load_hardware
from seqloom.report.plan_page import PAGE
from seqloom.trainer.build import DTYPES, Run
from seqloom.trainer.settings_file import resolved

RUN_FILE = "run.json"
PREDICTED = (
    "step_time_s",
    "tokens_per_s_per_gpu",
    "mfu_causal",
    "mfu_full",
    "peak_memory_gib",
    "memory_limit_gib",
    "hardware",
    "mesh",
    "seq_len",
)


@dataclass(frozen=True)
class Facts:
    """Parameters of the model; tokens (positions) of a step; FLOPs a token, forward and backward, with causal attention counted as it is;
    the peak FLOP/s of a device that the MFU is a share of; memory of a device in GiB, which percentages of memory refer to.
    """

    parameters: int
    tokens_per_step: int
    flops_per_token: float
    peak_flops: float
    device_memory_gib: float


def facts(run: Run) -> Facts:
    """The facts of a run."""
    plan, compiled = run.plan, run.config.compile
    hardware = load_hardware(compiled.hardware)
    if compiled.memory_gib is not None:
        hardware = hardware.with_memory_gib(compiled.memory_gib)
    peak = hardware.peak(DTYPES[compiled.precision])
    tokens = run.rows_per_step * run.dataset.seq_len
    memory = hardware.memory_bytes
    if run.device.type == "cuda":
        memory = torch.cuda.get_device_properties(run.device).total_memory
    return Facts(
        parameters=sum(param.numel() for param in run.model.parameters()),
        tokens_per_step=tokens,
        flops_per_token=plan["mfu_causal"] * plan["step_time_s"] * peak * dist.get_world_size() / tokens,
        peak_flops=peak,
        device_memory_gib=memory / GIB,
    )


def write_run_file(run: Run, known: Facts, plan_line: str) -> Path:
    """Write `run.json`; returns its path."""
    page = run.program_folder / PAGE
    settings = run.config.compile
    content: dict[str, Any] = {
        "name": settings.name,
        "model_id": settings.model_id,
        "parameters": known.parameters,
        "tokens_per_step": known.tokens_per_step,
        "total_steps": run.total_steps,
        "flops_per_token": known.flops_per_token,
        "ranks": run.mesh.size(),
        "device": _device_name(run.device),
        "plan_line": plan_line,
        "precision": settings.precision,
        "plan": {name: run.plan[name] for name in PREDICTED},
        "plan_page": os.path.relpath(page, run.config.log_folder) if page.is_file() else None,
        "config": resolved(run.config),
    }
    path = run.config.log_folder / RUN_FILE
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
