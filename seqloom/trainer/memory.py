"""The GPU's memory when it matters: a snapshot of some steps, and at out-of-memory one sentence on which part the plan had wrong.

Role in the pipeline: around every step. In: the plan's predicted parts in GiB and what PyTorch's allocator and the driver say. Out: a file
for pytorch.org/memory_viz, and a `UserError` in place of an out-of-memory error.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from seqloom.cost.hardware import GIB
from seqloom.errors import UserError

FOLDER = "memory"
EVENTS = 200_000  # of the allocator that a snapshot remembers
NOTED = 0.25  # GiB: a part that is off by less explains nothing


@dataclass(frozen=True)
class Held:
    """What a device's memory holds, in GiB: the training state, gradients, everything else allocated; what the allocator holds without use;
    what belongs to others (other processes, CUDA and NCCL themselves); and all there is.
    """

    states: float
    gradients: float
    others: float
    unused: float
    outside: float
    total: float


def held(tensors: Mapping[str, Tensor], gradients: list[Tensor], device: torch.device) -> Held:
    """What the GPU holds at this moment; `tensors` are those of the training state."""
    states, grads = (_gib(list(found)) for found in (tensors.values(), gradients))
    allocated, reserved = torch.cuda.memory_allocated(device) / GIB, torch.cuda.memory_reserved(device) / GIB
    free, total = (count / GIB for count in torch.cuda.mem_get_info(device))
    return Held(states, grads, allocated - states - grads, reserved - allocated, total - free - reserved, total)


def verdict(now: Held, plan: Mapping[str, Any]) -> str:
    """Which part of the predicted memory was wrong by most, and what to change: the end of a sentence."""
    predicted, limit = plan["peak_memory_gib"], plan["memory_limit_gib"]
    margin = now.total - limit
    expected_others = sum(predicted.get(part, 0.0) for part in ("gathered", "activations", "working"))
    excess = {
        "outside": now.outside + now.unused - margin if now.outside > now.unused else 0.0,
        "unused": now.outside + now.unused - margin if now.unused >= now.outside else 0.0,
        "states": now.states - predicted.get("states", 0.0),
        "gradients": now.gradients - predicted.get("gradients", 0.0),
        "others": now.others - expected_others,
    }
    part = max(excess, key=lambda name: excess[name])
    over = excess[part]
    again = f"compile again with --memory_gib {max(limit - max(over, 1.0), 1.0):.0f}"
    if over < NOTED:
        return f"every part was as predicted and {predicted['total']:.1f} GiB do not leave enough to the driver: {again}"
    if part == "outside":
        return f"{now.outside:.1f} GiB belong to other processes or to CUDA and NCCL, {margin:.1f} were left for them: end them, or {again}"
    if part == "unused":
        return f"{now.unused:.1f} GiB are held in pieces too small to use: set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True, or {again}"
    told = {"states": "weights and optimizer", "gradients": "gradients", "others": "activations and workspace"}[part]
    amounts = {"states": (now.states, predicted.get("states", 0.0)), "gradients": (now.gradients, predicted.get("gradients", 0.0))}
    is_, was = amounts.get(part, (now.others, expected_others))
    return f"{told} hold {is_:.1f} GiB where {was:.1f} were predicted: {again}, and tell us of it"


class MemoryRecorder:
    """`before(step)` and `after(step)` around every step: records the allocations of the steps of `steps`, none where that is empty.

    Raises `UserError` where steps are to be recorded on a device that is no GPU.
    """

    def __init__(self, steps: range, folder: Path, rank: int, device: torch.device) -> None:
        if steps and device.type != "cuda":
            raise UserError("--memory_snapshot records the memory of a GPU, and this run is on CPUs: leave it out")
        self._steps, self._folder, self._rank = steps, folder / FOLDER, rank

    def before(self, step: int) -> None:
        """Begin to record where `step` is the first one."""
        if self._steps and step == self._steps[0]:
            torch.cuda.memory._record_memory_history(max_entries=EVENTS)

    def after(self, step: int) -> str | None:
        """Write what was recorded behind the last step; returns what is to be said then."""
        if not self._steps or step != self._steps[-1]:
            return None
        path = self.write(f"steps-{self._steps[0]}-{step}")
        torch.cuda.memory._record_memory_history(enabled=None)
        return f"memory of steps {self._steps[0]} to {step} in {path}: open it in pytorch.org/memory_viz"

    def write(self, name: str) -> Path:
        """Write what the allocator holds, with what was recorded, for this rank."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{name}-rank{self._rank}.pickle"
        torch.cuda.memory._dump_snapshot(os.fspath(path))
        return path


def _gib(tensors: list[Tensor]) -> float:
    local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors)
    storages = {piece.untyped_storage().data_ptr(): piece.untyped_storage().nbytes() for piece in local}
    return sum(storages.values()) / GIB
