"""`python -m seqloom rehearse`: one rank of a program on one real device, at full size, with simulated collectives.

Weights and tokens are random (never zeros, with which processors run faster than in training). After two steps of warm-up every step is
timed by part; the medians and the peak memory are set beside the plan's and written to `rehearsal.json`. A simulated collective takes no
time on a wire (`seqloom.runtime.simulated`), so the figures are compared with what the plan predicts for compute alone.
"""

from __future__ import annotations

import gc
import json
import math
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from seqloom.capture.architecture import config_of
from seqloom.emit import fingerprint as prints
from seqloom.emit.pipeline import DTYPES
from seqloom.errors import UserError
from seqloom.runtime.comparison import Row, table
from seqloom.runtime.compiled import Choice, compile_as_asked
from seqloom.runtime.context import typical_batch
from seqloom.runtime.dryrun import GIB, check_rank, optimizer_state, read_plan
from seqloom.runtime.initialize import fill_buffers
from seqloom.runtime.kernels import planned_kernels
from seqloom.runtime.live_bytes import LiveBytes
from seqloom.runtime.materialize import storage
from seqloom.runtime.mesh import build_mesh
from seqloom.runtime.optimizer import build_optimizer
from seqloom.runtime.parity import random_batches
from seqloom.runtime.phases import Phase, run_step
from seqloom.runtime.program import load_program
from seqloom.runtime.simulated import simulated_job

if TYPE_CHECKING:
    from transformers import PretrainedConfig

RESULT = "rehearsal.json"
SEED = 0
SPREAD = 0.02  # standard deviation of random weights
Enter = Callable[[Phase], None]


@dataclass(frozen=True)
class Rehearsal:
    """Medians over the timed steps of one rank, in seconds: the step and its parts; bytes on the device at most, and what the allocator
    took for them (None on the CPU); the loss of the last step; whether the blocks were compiled; how often
    the host waited for the GPU inside of a step (None on the CPU).
    """

    rank: int
    device: str
    device_name: str
    steps: int
    step_s: float
    time_s: Mapping[str, float]
    peak_bytes: int
    reserved_bytes: int | None
    loss: float
    compiled: bool = False
    host_waits: int | None = None


class Clock:
    """Seconds of each phase of a step: by events on the device's stream on a GPU, by the wall clock on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[Phase, Any]] = []

    def enter(self, phase: Phase) -> None:
        """A phase begins now."""
        if self._on_gpu:
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        else:
            mark = time.perf_counter()
        self._marks.append((phase, mark))

    def seconds(self) -> dict[str, float]:
        """Seconds by phase between the first and the last mark; waits for the device."""
        if self._on_gpu:
            torch.cuda.synchronize()
        spent: dict[str, float] = {}
        for (phase, begin), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            spent[phase] = spent.get(phase, 0.0) + (begin.elapsed_time(end) / 1e3 if self._on_gpu else end - begin)
        return spent


def run(folder: Path, rank: int | None = None, device_type: str | None = None, steps: int = 5, compile_blocks: Choice = "auto") -> int:
    """Rehearse one rank of the program in `folder` (the last of a scale unit when not given: under a causal mask that is split along the
    sequence it has the most to do), print and write the comparison. Raises `UserError` where rank, device or memory do not allow it."""
    plan = read_plan(folder)
    chosen = prod(plan["mesh"].values()) - 1 if rank is None else rank
    result = rehearse(folder, chosen, choose_device(device_type), steps, compile_blocks)
    (folder / RESULT).write_text(json.dumps(document(plan, result), indent=1) + "\n", encoding="utf-8")
    print(
        f"rank {result.rank} on {result.device_name} ({result.device}), planned for {plan['hardware']}; median of {result.steps} steps"
        f"{', blocks compiled' if result.compiled else ''}"
    )
    print(table(rows(plan, result), ["measured"]))
    print("predicted without communication: simulated collectives take no time on a wire")
    if result.host_waits:
        print(f"the host waits for the GPU {result.host_waits} times in a step, during which it prepares no work")
    return 0


def choose_device(device_type: str | None) -> torch.device:
    """The device asked for; without a wish the GPU where there is one. Raises `UserError` for a GPU that is not there."""
    if device_type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no GPU that PyTorch can use: give --device cpu, or rehearse on one that has")
    if device_type == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def rehearse(folder: Path, rank: int, device: torch.device, steps: int, compile_blocks: Choice = "auto") -> Rehearsal:
    """Run warm-up and `steps` timed steps of one rank, its blocks compiled as `compile_as_asked` says. See `run` for the errors."""
    plan, mark = read_plan(folder), prints.read(folder)
    world = check_rank(folder, plan, rank)
    if steps < 1:
        raise UserError(f"--steps {steps}: give 1 or more steps to time")
    check_fits(plan, free_bytes(device), free_bytes(torch.device("cpu")), device)
    config = config_of(mark["config"])
    try:
        with simulated_job(rank, world), _threads_of_a_rank(world), planned_kernels(plan, device, print):
            return _rehearse(folder, plan, config, DTYPES[mark["request"]["precision"]], rank, device, steps, compile_blocks)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"rank {rank} ran out of memory on {_name(device)} ({str(error).splitlines()[0]}): compile with a lower --memory_gib"
        ) from error


def _rehearse(
    folder: Path,
    plan: Mapping[str, Any],
    config: PretrainedConfig,
    dtype: torch.dtype,
    rank: int,
    device: torch.device,
    steps: int,
    compile_blocks: Choice,
) -> Rehearsal:
    program = load_program(folder)
    mesh = build_mesh(program.MESH, plan["dp"], device.type)
    model = storage(program, mesh, torch.float32, dtype)
    model.to_empty(device=device)
    fill_at_random(model, device)
    fill_buffers(model, config)
    optimizer = build_optimizer(model, lr=1e-4)
    rows, length = program.SHAPES["input_ids"]
    typical = typical_batch(plan.get("documents", ()), rows)
    batches = [batch | typical for batch in random_batches(config, rows, length, plan["grad_accumulation_steps"], SEED)]

    def step(enter: Enter) -> float:
        return float(run_step(model, program, mesh, optimizer, batches, device, enter)[0])

    on_gpu, counted, waits = device.type == "cuda", 0, None
    if not on_gpu:  # counted operator by operator, so in blocks as they are written
        step(_nobody_listens)
        counted = _counted_step(model, optimizer, step)
    compiled = compile_as_asked(compile_blocks, model, program, device)
    if on_gpu or compiled:
        step(_nobody_listens)
    if on_gpu:
        waits = host_waits(lambda: run_step(model, program, mesh, optimizer, batches, device, _nobody_listens))
        torch.cuda.reset_peak_memory_stats(device)
    spent, loss = _timed_steps(step, device, steps)
    if not math.isfinite(loss):
        raise UserError(
            f"the loss of rank {rank} on random weights is {loss}: the program in {folder} cannot be timed truly; compile again"
        )
    return Rehearsal(
        rank=rank,
        device=device.type,
        device_name=_name(device),
        steps=steps,
        step_s=median(sum(one.values()) for one in spent),
        time_s={part: median(one[part] for one in spent) for part in ("forward", "backward", "optimizer")},
        peak_bytes=torch.cuda.max_memory_allocated(device) if on_gpu else counted,
        reserved_bytes=torch.cuda.max_memory_reserved(device) if on_gpu else None,
        loss=loss,
        compiled=compiled,
        host_waits=waits,
    )


def host_waits(run: Callable[[], Any]) -> int:
    """How often the host waits for the GPU while `run` runs, as PyTorch finds it; explicit `synchronize()` is not counted."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def _nobody_listens(phase: Phase) -> None:
    """The listener of a step that warms up."""


def _timed_steps(step: Callable[[Enter], float], device: torch.device, steps: int) -> tuple[list[dict[str, float]], float]:
    """Seconds by phase of each step, and the loss of the last."""
    gc.collect()
    spent, loss = [], 0.0
    for _ in range(steps):
        clock = Clock(device)
        clock.enter("between")
        loss = step(clock.enter)
        spent.append(clock.seconds())
    return spent, loss


def _counted_step(model: nn.Module, optimizer: Optimizer, step: Callable[[Enter], float]) -> int:
    """Bytes of tensors at the peak of one step on the CPU, whose allocator keeps no count of its own."""
    live = LiveBytes()
    with live, live.resizes():
        live.hold([*model.parameters(), *model.buffers(), *optimizer_state(optimizer)], "states")
        step(live.enter)
    return live.peak


@torch.no_grad()
def fill_at_random(model: nn.Module, device: torch.device) -> None:
    """Fill every parameter's local piece: matrices around 0, as models begin; vectors (scales of norms, biases) around 1."""
    generator = torch.Generator(device).manual_seed(SEED)
    for param in model.parameters():
        local = param.to_local() if isinstance(param, DTensor) else param
        local.normal_(mean=0.0 if param.dim() > 1 else 1.0, std=SPREAD, generator=generator)


@contextmanager
def _threads_of_a_rank(world: int) -> Iterator[None]:
    """As many threads as a rank has when all of them share this machine's cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def free_bytes(device: torch.device) -> int:
    """Memory that a new tensor on `device` may use: of the GPU, or of the host where the device is the CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_fits(plan: Mapping[str, Any], free: int, free_on_host: int, device: torch.device) -> None:
    """Raise `UserError` where the plan's peak does not fit the device's free bytes, or what it offloads those of the host."""
    peak, offloaded = plan["peak_memory_gib"]["total"], plan.get("host_memory_gib") or 0.0
    needed = peak + (offloaded if device.type == "cpu" else 0.0)
    if needed * GIB > free:
        raise UserError(
            f"a rank of this plan needs {needed:.4g} GiB and {_name(device)} has {free / GIB:.4g} GiB free: rehearse on a device with more "
            f"memory, or compile with --memory_gib {free / GIB:.3g}"
        )
    if offloaded * GIB > free_on_host:
        raise UserError(
            f"a rank of this plan keeps {offloaded:.4g} GiB in host memory and this machine has {free_on_host / GIB:.4g} GiB free: "
            f"rehearse on a machine with more memory, or compile for a shorter sequence"
        )


def _name(device: torch.device) -> str:
    """What the device is called: the GPU's name, or the processor's where Linux tells it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).is_file() else []


def predicted_seconds(plan: Mapping[str, Any]) -> dict[str, float]:
    """What the plan predicts for compute alone, by the parts that are timed: recomputation happens in the backward."""
    spent = plan["time_s"]
    backward = spent["backward"] + spent.get("recompute", 0.0)
    return {"forward": spent["forward"], "backward": backward, "optimizer": spent["optimizer"]}


def document(plan: Mapping[str, Any], result: Rehearsal) -> dict[str, Any]:
    """`rehearsal.json`."""
    expected = predicted_seconds(plan)
    return {
        "rank": result.rank,
        "device": result.device,
        "device_name": result.device_name,
        "steps": result.steps,
        "step_s": result.step_s,
        "time_s": dict(result.time_s),
        "peak_gib": result.peak_bytes / GIB,
        "reserved_gib": None if result.reserved_bytes is None else result.reserved_bytes / GIB,
        "loss": result.loss,
        "blocks_compiled": result.compiled,
        "host_waits": result.host_waits,
        "predicted": {"step_s": sum(expected.values()), "time_s": expected, "peak_gib": plan["peak_memory_gib"]["total"]},
    }


def rows(plan: Mapping[str, Any], result: Rehearsal) -> Sequence[Row]:
    """The table's rows: the step, its parts, the memory."""
    expected = predicted_seconds(plan)
    found = [Row("step", "seconds", sum(expected.values()), (result.step_s,))]
    found += [Row(f"  {part}", "seconds", expected[part], (seconds,)) for part, seconds in result.time_s.items()]
    found.append(Row("peak memory", "memory", plan["peak_memory_gib"]["total"] * GIB, (result.peak_bytes,)))
    if result.reserved_bytes is not None:
        found.append(Row("  taken by the allocator", "memory", None, (result.reserved_bytes,)))
    return found
