"""`python -m seqloom dryrun`: the emitted program of a rank at full size on fake tensors, with no GPU and no memory.

Forward, backward and optimizer of two steps run under `FakeTensorMode` in a fake process group: every shape, dtype and collective of the
program is exercised, and the bytes that would be alive are counted as they come and go. The peak is set beside the plan's prediction.
"""

from __future__ import annotations

import gc
import itertools
import json
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary

from seqloom.emit import fingerprint as prints
from seqloom.emit.pipeline import DTYPES, PLAN
from seqloom.errors import UserError
from seqloom.runtime.materialize import storage
from seqloom.runtime.mesh import build_mesh
from seqloom.runtime.optimizer import build_optimizer
from seqloom.runtime.program import Program, load_program
from seqloom.runtime.step import accumulate_gradients

GIB = 2.0**30
STEPS = 2


@dataclass(frozen=True)
class DryRun:
    """What one rank would do: bytes alive at the peak and between steps, FLOPs of one step (forward, backward, recompute)."""

    rank: int
    peak_bytes: int
    standing_bytes: int
    flops: int


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of fake storages while they are alive; FSDP2 empties and refills its storages, so resizes count too."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._keys = WeakIdKeyDictionary()
        self._sizes: dict[int, int] = {}
        self._next = itertools.count()

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Run the operator and count the storages of its results."""
        results = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
            if isinstance(local, FakeTensor):
                self.count(local.untyped_storage())
        return results

    def count(self, storage_: torch.UntypedStorage) -> None:
        """Count a storage at its present size from now on, until nothing refers to it."""
        key = self._keys.get(storage_)
        if key is None:
            key = self._keys[storage_] = next(self._next)
            weakref.finalize(storage_, self._gone, key)
        self.alive += storage_.nbytes() - self._sizes.get(key, 0)
        self._sizes[key] = storage_.nbytes()
        self.peak = max(self.peak, self.alive)

    def _gone(self, key: int) -> None:
        self.alive -= self._sizes.pop(key)

    @contextmanager
    def resizes(self) -> Iterator[None]:
        """Inside, a storage that is resized is counted at its new size."""
        plain = torch.UntypedStorage.resize_

        def resize(storage_: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            result = plain(storage_, size)
            if self._keys.get(storage_) is not None:
                self.count(storage_)
            return result

        torch.UntypedStorage.resize_ = resize
        try:
            yield
        finally:
            torch.UntypedStorage.resize_ = plain


def run(folder: Path, rank: int | None = None) -> int:
    """Dry-run one rank of the program in `folder`, or every rank of a scale unit; print them beside the plan; return the exit code."""
    plan = read_plan(folder)
    ranks = range(prod(plan["mesh"].values())) if rank is None else (rank,)
    predicted = plan["peak_memory_gib"]["total"]
    titles = ("rank", "peak GiB", "predicted", "ratio", "between steps", "TFLOP a step")
    print("".join(f"{title:>15}" for title in titles))
    for index in ranks:
        result = dry_run(folder, index)
        peak, standing = result.peak_bytes / GIB, result.standing_bytes / GIB
        row = (str(index), f"{peak:.2f}", f"{predicted:.2f}", f"{predicted / peak:.2f}", f"{standing:.2f}", f"{result.flops / 1e12:.1f}")
        print("".join(f"{cell:>15}" for cell in row))
    return 0


def read_plan(folder: Path) -> dict:
    """The `plan.json` of a compiled program. Raises `UserError` where there is none."""
    if not (folder / PLAN).is_file():
        raise UserError(f"there is no compiled program in {folder}: compile it first, or give its --name")
    return json.loads((folder / PLAN).read_text(encoding="utf-8"))


def dry_run(folder: Path, rank: int) -> DryRun:
    """Two steps of one rank on fake tensors. Raises `UserError` for a rank that the job does not have."""
    plan, request = read_plan(folder), prints.read(folder)["request"]
    world = prod(plan["mesh"].values()) * plan["dp"]
    if not 0 <= rank < world:
        raise UserError(f"rank {rank} does not exist: the program in {folder} runs on ranks 0 to {world - 1}")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        return _steps(load_program(folder), plan["dp"], rank, DTYPES[request["precision"]], plan["grad_accumulation_steps"])
    finally:
        dist.destroy_process_group()


def _steps(program: Program, dp: int, rank: int, dtype: torch.dtype, accumulation: int) -> DryRun:
    mesh = build_mesh(program.MESH, dp, "cpu")
    device = torch.device("cpu")
    model = storage(program, mesh, torch.float32, dtype)
    live = LiveBytes()
    with FakeTensorMode(allow_non_fake_inputs=True), live, live.resizes():
        model.to_empty(device=device)
        optimizer = build_optimizer(model, lr=1e-4)
        batches = [{n: torch.zeros(s, dtype=torch.int64) for n, s in program.SHAPES.items()} for _ in range(accumulation)]
        for _ in range(STEPS):
            with FlopCounterMode(display=False) as flops:
                accumulate_gradients(model, program, mesh, batches, device)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        gc.collect()  # autograd graphs hold circles; a real step's memory is long reused by then
    return DryRun(rank, live.peak, live.alive, flops.get_total_flops())
