"""What ranks tell each other after every step, in one small message between their CPUs.

Each rank says how long it waited for data, how much memory it has held, whether it was asked to stop, whether it still writes a checkpoint,
and how long the step took it; all learn the worst. So they stop after the same step, meet the end of a background save at the same step,
and agree on whether a step was slow.
"""

from __future__ import annotations

import resource
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

GIB = 2**30
KIB_IN_GIB = 2**20
_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Word:
    """What one rank says, or the largest of what all say: seconds, GiB, the number of a signal (0 for none), 1 while writing,
    seconds of the step.
    """

    data_wait_s: float
    memory_gib: float
    stop_signal: int
    writing: int
    step_s: float = 0.0


def agree(word: Word) -> Word:
    """The largest of each that the ranks say. Collective; it travels between CPUs and stops no GPU."""
    values = torch.tensor(astuple(word), dtype=torch.float64)
    dist.all_reduce(values, dist.ReduceOp.MAX)
    wait, memory, stop, writing, step = values.tolist()
    return Word(wait, memory, int(stop), int(writing), step)


def peak_memory_gib(device: torch.device) -> float:
    """Most memory this rank has held so far, in GiB: allocated on its GPU, or resident on a CPU."""
    return torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else peak_resident_gib()


def peak_resident_gib() -> float:
    """Most memory of this process that was resident, in GiB: where Linux tells it, without its parent's (`getrusage` counts that)."""
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / KIB_IN_GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / KIB_IN_GIB
