"""Which kernel runs: the fastest that is installed and takes the tensors, or the one asked for; said in the log, once for each kind.

In: device, dtype, head size, whether there is a soft cap. Out: a `Kernel`.
"""

from __future__ import annotations

import functools
import logging

import torch

from seqloom.errors import UserError
from seqloom.magi.kernels import Kernel, reference
from seqloom.magi.slices import Slices

KERNELS = ("reference", "sdpa")


@functools.cache
def choose_kernel(name: str | None, device: torch.device, dtype: torch.dtype, head_dim: int, softcap: bool) -> Kernel:
    """The kernel called `name`, or with None the best one. Raises `UserError` for an unknown name and for what it cannot run."""
    if name is not None and name not in KERNELS:
        raise UserError(f"there is no attention kernel '{name}': use one of {', '.join(KERNELS)}")
    fused = Slices.available(device, dtype, head_dim)
    if name == "sdpa" and (softcap or not fused):
        why = "has no soft cap" if softcap else f"does not take {dtype} with head size {head_dim} on {device.type}"
        raise UserError(f"PyTorch's fused attention {why}: use kernel 'reference', or none to let it be chosen")
    chosen: Kernel = Slices() if fused and not softcap and name != "reference" else reference
    slow = device.type == "cuda" and chosen is reference and name is None
    log = logging.getLogger(__name__)
    (log.warning if slow else log.info)(
        "magi attention on %s, %s, head size %d%s: kernel '%s'%s",
        device.type,
        dtype,
        head_dim,
        " with a soft cap" if softcap else "",
        chosen.name,
        ", which is slow: no fused kernel takes these tensors" if slow else "",
    )
    return chosen
