"""What a step used, as the worst of all ranks."""

from __future__ import annotations

import resource

import torch
import torch.distributed as dist

GIB = 2**30
_MAXRSS_BYTES = 1024


def peak_memory_gib(device: torch.device) -> float:
    """Most memory this rank has held so far, in GiB: allocated on its GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_BYTES / GIB


def slowest_and_fullest(data_wait_s: float, memory_gib: float) -> tuple[float, float]:
    """The longest wait and the highest memory of all ranks. Collective; it travels between CPUs and stops no GPU."""
    values = torch.tensor([data_wait_s, memory_gib], dtype=torch.float64)
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return values[0].item(), values[1].item()
