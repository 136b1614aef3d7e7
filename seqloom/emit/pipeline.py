"""The compile pipeline: a request becomes a folder with `plan.json`, `program.py` and `fingerprint.json`.

capture -> regions -> solve -> realize -> evaluate -> emit. No GPU, no weights, no process group. Files are written to a staging folder and
renamed together, so that a program is whole or absent.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from seqloom.capture import Captured
from seqloom.capture.architecture import resolve_config
from seqloom.capture.cache import Cache
from seqloom.capture.documents import attend_inside_documents
from seqloom.capture.warm import cached_capture, read_config, registered_operators
from seqloom.cost.hardware import Hardware, load_hardware
from seqloom.emit import fingerprint as prints
from seqloom.emit.choose import find_plan
from seqloom.emit.program import program_source
from seqloom.emit.request import CompileRequest
from seqloom.errors import UserError
from seqloom.graph import Graph
from seqloom.plan.document import plan_document
from seqloom.plan.evaluate import GIB, Evaluation
from seqloom.plan.plan import Plan
from seqloom.plan.regions import build_regions
from seqloom.plan.request import Request

DEFAULT_CHUNK = 1024  # tokens of a chunk of the loss until the planner chooses
PROGRAM, PLAN = "program.py", "plan.json"
CACHE = ".cache"  # folder beside the programs: what the next compile need not work out again
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Compiled:
    """A compiled program: its folder and the content of its `plan.json`."""

    folder: Path
    plan: Mapping[str, Any]


def compile_program(request: CompileRequest) -> Compiled:
    """Compile and write the program. Raises `UserError` for everything a user can mend; nothing is written then."""
    _check_folder(request)
    cache = Cache(Path(request.output_folder) / CACHE)
    config = read_config(request.model_id, cache)
    hardware = planned_hardware(request)
    marks = [time.monotonic()]
    captured = cached_capture(
        cache,
        config,
        batch_size=request.micro_batch_size,
        seq_len=request.seq_len,
        dtype=DTYPES[request.precision],
        loss=request.loss,
        loss_chunk=request.loss_chunk or DEFAULT_CHUNK,
    )
    marks.append(time.monotonic())
    regions = build_regions(asked_graph(request, captured.graph), request.attention)
    found = find_plan(regions, request, planner_request(request, hardware))
    plan, evaluation = found.plan, found.evaluation
    marks.append(time.monotonic())
    source = program_source(plan, captured.model_class, captured.tied, summary(request, captured, plan, evaluation))
    marks.append(time.monotonic())
    timings = dict(zip(("capture", "plan", "emit"), (b - a for a, b in zip(marks, marks[1:], strict=False)), strict=True))
    document = plan_document(plan, evaluation, found.solver, timings)
    mark = prints.fingerprint(request, config, registered_operators(found.regions.graph))
    _write(request.folder, {PROGRAM: source, PLAN: _json(document), prints.FILE: _json(mark)})
    return Compiled(request.folder, document)


def asked_graph(request: CompileRequest, graph: Graph) -> Graph:
    """The captured graph with the attention that is asked for. Raises `UserError` where the model's own cannot be replaced."""
    return attend_inside_documents(graph, request.documents or (request.seq_len,)) if request.inside_documents else graph


def ensure_program(request: CompileRequest, log: Callable[[str], None] = print) -> Path:
    """The folder of an up-to-date program, compiled now when there is none.

    Raises `UserError` for a stale one: the field that differs and the command that compiles it anew.
    """
    known = prints.read(request.folder)
    if known is None or not (request.folder / PROGRAM).is_file():
        log(f"no program in {request.folder}: compiling")
        compile_program(request)
        return request.folder
    now = json.loads(_json(prints.fingerprint(request, resolve_config(request.model_id), list(known.get("operators", {})))))
    changed = prints.difference(known, now)
    if changed:
        raise UserError(
            f"the program in {request.folder} is stale: {changed}; compile it again with the same flags and --run_mode compile, "
            f"or give the new program another --name"
        )
    return request.folder


def summary(request: CompileRequest, captured: Captured, plan: Plan, evaluation: Evaluation) -> str:
    """One paragraph on what was compiled and what is predicted."""
    ranks = request.plan_ngpus
    tokens = request.seq_len * request.micro_batch_size * request.grad_accumulation_steps
    return (
        f"{captured.model_class}, {captured.num_parameters / 1e9:.3g} billion parameters, "
        f"{request.micro_batch_size} x {request.seq_len} tokens "
        f"a micro-batch, {request.grad_accumulation_steps} micro-batches a step, computed in {request.precision}, planned for {ranks} x "
        f"{plan.machine.hardware.name}. Predicted: {evaluation.step_s:.3g} s a step, "
        f"{tokens / evaluation.step_s / ranks:,.0f} tokens/s a device, "
        f"{evaluation.peak_bytes / GIB:.1f} GiB of {plan.machine.hardware.usable_bytes / GIB:.1f} GiB."
    )


def planned_hardware(request: CompileRequest) -> Hardware:
    """The machine that a request plans for. Raises `UserError` where it is not described."""
    hardware = load_hardware(request.hardware)
    if request.attention_kernel is not None:
        hardware = hardware.with_attention_kernel(request.attention_kernel)
    return hardware if request.memory_gib is None else hardware.with_memory_gib(request.memory_gib)


def planner_request(request: CompileRequest, hardware: Hardware) -> Request:
    """What a request asks of the planner."""
    return Request(
        ranks=request.plan_ngpus,
        dp=request.dp,
        accumulation=request.grad_accumulation_steps,
        hardware=hardware,
        itemsize=DTYPES[request.precision].itemsize,
        force=request.force,
        zero=request.zero,
        recompute={"auto": None, "none": False, "all": True}[request.recompute],
        offload=request.offload == "auto",
        open_constants=request.loss_chunk is None,
    )


def _check_folder(request: CompileRequest) -> None:
    """The place for the program can be written to; found out before the work begins."""
    parent = Path(request.output_folder)
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent):
            pass
    except OSError as error:
        raise UserError(f"the program can not be written to {parent} ({error.strerror}): give a writable folder") from error


def _write(folder: Path, files: Mapping[str, str]) -> None:
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    for name, content in files.items():
        (staging / name).write_text(content, encoding="utf-8")
    os.chmod(staging, 0o755)
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(staging, folder)


def _json(document: Mapping[str, Any]) -> str:
    return json.dumps(document, indent=1, sort_keys=False, default=str) + "\n"
