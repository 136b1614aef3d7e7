"""Folders of runs as training leaves them: three hundred steps with evaluations, checkpoints, a spike, a straggler, a skipped step, and a
restart that goes back; all figures are made of the step alone."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

STEPS, STOPPED, RESUMED = 300, 190, 160
SPIKE, STRAGGLER, SKIPPED = 97, 130, 210
BEGAN = 1_795_000_000.0
SECONDS = 0.5


def step_record(step: int, shift: float = 0.0, **changes: Any) -> dict[str, Any]:
    """A step as the trainer logs it; `shift` is added to its loss."""
    wiggle = math.sin(step * 12.9898) * 0.2
    loss = 8 * step**-0.1 + wiggle + shift
    seconds = SECONDS + 0.05 * math.sin(step * 78.233)
    record = {
        "step": step,
        "loss": loss,
        "grad_norm": 1.5 + abs(wiggle),
        "lr": 1e-3 * (1 - step / (STEPS + 1)),
        "tokens": 4096,
        "tokens_seen": 4096 * step,
        "epoch": step / STEPS,
        "step_time_s": seconds,
        "tokens_per_s": 4096 / seconds,
        "tokens_per_s_per_gpu": 2048 / seconds,
        "mfu_causal": 0.4 * SECONDS / seconds,
        "memory_gib": min(60.0, 40.0 + step),
        "data_wait_s": 0.004,
        "eta_s": seconds * (STEPS - step),
        "time": BEGAN + step * SECONDS * 1.1,
    }
    return record | changes


def sample_lines(shift: float = 0.0) -> list[dict[str, Any]]:
    """The records of the run: stopped after STOPPED steps, resumed from RESUMED, finished."""
    return [
        {"step": 0, "event": "start", "text": "the first step", "time": BEGAN},
        *_lines(range(1, STOPPED + 1), shift),
        {"step": STOPPED, "event": "stop", "text": "stopped by SIGTERM", "time": BEGAN + 500},
        {"step": RESUMED, "event": "start", "text": f"resumed from step-{RESUMED}", "time": BEGAN + 1000},
        *_lines(range(RESUMED + 1, STEPS + 1), shift),
        {"step": STEPS, "event": "finish", "text": f"finished step {STEPS}", "time": BEGAN + 2000},
    ]


def _lines(steps: Iterable[int], shift: float) -> Iterator[dict[str, Any]]:
    for step in steps:
        record = step_record(step, shift)
        if step == SKIPPED:
            record = {"step": step, "skipped": f"step {step} has loss nan: skipped"}
        elif step == SPIKE:
            record |= {"loss": 12.0, "notes": [{"kind": "spike", "text": "loss 12.0, 2.1 times its mean"}]}
        elif step == STRAGGLER:
            record["notes"] = [{"kind": "straggler", "text": "rank 1 was slow: 3.1 times the median"}]
        yield record
        if step % 40 == 0:
            loss = record["loss"] + 0.1
            yield {
                "step": step,
                "evaluation": {"step": step, "loss": loss, "perplexity": math.exp(loss), "tokens": 9, "rows": 1, "seconds": 1.0},
            }
            yield {"step": step, "event": "checkpoint", "text": f"saved step-{step}"}


def run_json(name: str) -> dict[str, Any]:
    """A whole `run.json`."""
    plan = {
        "step_time_s": 0.48,
        "tokens_per_s_per_gpu": 4266.0,
        "mfu_causal": 0.417,
        "mfu_full": 0.6,
        "peak_memory_gib": {"total": 58.0, "states": 20.0},
        "memory_limit_gib": 74.0,
        "hardware": "h100-80gb",
        "mesh": {"sp": 2},
        "seq_len": 2048,
    }
    config = {"compile": {"model_id": "llama3_1b", "name": name, "zero": None}, "optimizer": {"lr": 1e-3, "betas": [0.9, 0.95]}}
    return {
        "name": name,
        "model_id": "llama3_1b",
        "parameters": 1_235_814_400,
        "tokens_per_step": 4096,
        "total_steps": STEPS,
        "flops_per_token": 1e9,
        "ranks": 2,
        "device": "cuda",
        "plan_line": "sp 2, ZeRO 3, activations kept",
        "precision": "bf16",
        "plan": plan,
        "plan_page": "plan.html",
        "config": config,
    }


def write_log(folder: Path, lines: Iterable[dict[str, Any] | str]) -> Path:
    """The folder with a log of these records; text stands in it as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    (folder / "log.jsonl").write_text(text, encoding="utf-8")
    return folder


def sample_run(folder: Path, shift: float = 0.0, **changes: Any) -> Path:
    """A whole run; `changes` are of `run.json`."""
    write_log(folder, sample_lines(shift))
    (folder / "run.json").write_text(json.dumps(run_json(folder.name) | changes), encoding="utf-8")
    return folder
