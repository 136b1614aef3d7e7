"""What would help most: the same model and step, planned anew for a better machine or a shorter sequence.

In: the folder of a compiled program. Out: for each change the predicted step and what it gains, the most helpful first, written into
`plan.json` as `advice`. Every change keeps the tokens of a step, so that steps compare. `explain` calls this, not the compile, because it
plans several times.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from seqloom.capture.architecture import config_of
from seqloom.capture.cache import Cache
from seqloom.capture.warm import ModelConfig, config_fields
from seqloom.cost.hardware import Hardware
from seqloom.emit import fingerprint as prints
from seqloom.emit.pipeline import CACHE, PLAN, planned_hardware
from seqloom.emit.replan import GAP, best_plan, capture_regions, plan_words
from seqloom.emit.request import CompileRequest
from seqloom.errors import UserError

MORE_MEMORY = 1.5


@dataclass(frozen=True)
class Change:
    """A change in words, and what to plan for with it."""

    name: str
    request: CompileRequest
    hardware: Hardware


def advise(folder: Path, log: Callable[[str], None]) -> list[dict[str, Any]]:
    """Plan every change of the program in `folder`, write the advice into its `plan.json`, and return it; `log` hears of each.

    Raises `UserError` where the folder holds no compiled program.
    """
    path, known = folder / PLAN, prints.read(folder)
    if known is None or not path.is_file():
        raise UserError(f"there is no compiled program in {folder}: compile one with that --name first")
    plan = json.loads(path.read_text(encoding="utf-8"))
    request, config = _request(folder, known), _config(known)
    cache = Cache(folder.parent / CACHE)
    rows = []
    for change in changes(request, planned_hardware(request)):
        log(f"planning with {change.name}")
        rows.append(_outcome(change, request, plan, cache, config))
    rows.sort(key=lambda row: -float("inf") if row["gain"] is None else row["gain"], reverse=True)
    _rewrite(path, {**plan, "advice": rows})
    return rows


def changes(request: CompileRequest, hardware: Hardware) -> Iterator[Change]:
    """The changes that are tried, in a fixed order."""
    twice = replace(request, plan_ngpus=2 * request.plan_ngpus, runtime_ngpus=2 * request.runtime_ngpus)
    yield Change("twice the GPUs", twice, hardware)
    roomy = replace(hardware, memory_bytes=int(MORE_MEMORY * hardware.memory_bytes))
    yield Change(f"{MORE_MEMORY:g} times the memory", request, roomy)
    links = tuple(replace(link, bandwidth_bytes_per_s=2 * link.bandwidth_bytes_per_s) for link in hardware.links)
    if request.runtime_ngpus > 1:
        yield Change("twice the link bandwidth", request, replace(hardware, links=links))
    kernels = hardware.rates.attention
    fastest = min(kernels, key=lambda kernel: kernels[kernel].time)
    if fastest != next(iter(kernels)):
        yield Change(f"--attention_kernel {fastest}", request, hardware.with_attention_kernel(fastest))
    if request.seq_len % 2 == 0:
        batches = 2 * request.grad_accumulation_steps
        yield Change("half the sequence length", replace(request, seq_len=request.seq_len // 2, grad_accumulation_steps=batches), hardware)


def _outcome(change: Change, request: CompileRequest, plan: Mapping[str, Any], cache: Cache, config: ModelConfig) -> dict[str, Any]:
    try:
        if change.request.force and change.request.plan_ngpus != request.plan_ngpus:
            raise UserError(f"--force {request.force} fixes the mesh")
        found = best_plan(capture_regions(cache, config, change.request), change.request, change.hardware)
    except UserError as error:
        why = str(error).partition(";")[0]
        return {"change": change.name, "step_time_s": None, "tokens_per_s_per_gpu": None, "gain": None, "sentence": f"No plan: {why}."}
    gain = 1 - found["step_time_s"] / plan["step_time_s"]
    words = ", ".join(plan_words(found))
    return {
        "change": change.name,
        "step_time_s": found["step_time_s"],
        "tokens_per_s_per_gpu": found["tokens_per_s_per_gpu"],
        "gain": 0.0 if abs(gain) < GAP else gain,
        "sentence": f"{found['tokens_per_s_per_gpu']:,.0f} tokens/s/GPU with {words}; {found['peak_memory_gib']['total']:.1f} GiB.",
    }


def _request(folder: Path, known: Mapping[str, Any]) -> CompileRequest:
    try:
        return CompileRequest(model_id="", name=folder.name, output_folder=folder.parent, **known["request"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / prints.FILE} was written by another version ({error}): compile the program again") from error


def _config(known: Mapping[str, Any]) -> ModelConfig:
    """The model's config as the fingerprint holds it: the folder it came from may be gone."""
    config = config_of(known["config"])
    return ModelConfig("", config_fields(config), config)


def _rewrite(path: Path, document: Mapping[str, Any]) -> None:
    """Replace a file as a whole and leave its time as it was: a run is of this plan when its log is younger."""
    times = path.stat()
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    os.utime(part, ns=(times.st_atime_ns, times.st_mtime_ns))
    os.replace(part, path)
