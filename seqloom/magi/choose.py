"""Which kernel runs: the fastest that is installed and takes the tensors, or the one asked for; said in the log, once for each kind.

In: device, dtype, head size, whether there is a soft cap, in how many pieces `seqloom.magi.slices` would cut the mask. Out: a `Kernel`.
Kernels are compared by the rates that plain attention is chosen by (`seqloom.ops.kernels`); one without rates keeps its place.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Mapping, Sequence

import torch

from seqloom.errors import UserError
from seqloom.magi.bands import Band
from seqloom.magi.flash import Flash2, Flash3
from seqloom.magi.flex import Flex
from seqloom.magi.kernels import Kernel, determinism, reference
from seqloom.magi.magi_kernel import Magi
from seqloom.magi.pieces import pieces
from seqloom.magi.slices import Slices
from seqloom.ops.kernels import ANY_SHAPE, Kind, kernel_for, known_rates

KERNELS: Mapping[str, Kernel] = {kernel.name: kernel for kernel in (Magi(), Flash3(), Flash2(), Slices(), Flex(), reference)}
"""By speed, where no rates say otherwise."""
MOST_PIECES = 64  # a launch of a fused kernel, and of those around it, for each piece: FlexAttention's one call is faster than more


@functools.cache
def choose_kernel(
    name: str | None,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    softcap: bool,
    deterministic: bool = False,
    many: bool = False,
) -> Kernel:
    """The kernel called `name`, or with None the best one; `many` if its bands are more than `MOST_PIECES` pieces.

    Raises `UserError` for an unknown name, for what the kernel cannot run, and where sums cannot be made to have one order.
    """
    if name is not None and name not in KERNELS:
        raise UserError(f"there is no attention kernel '{name}': use one of {', '.join(KERNELS)}")
    with determinism(deterministic):  # PyTorch has fewer fused kernels then
        refusals = {other: kernel.refusal(device, dtype, head_dim, softcap) for other, kernel in KERNELS.items() if name in (None, other)}
        if name is not None and refusals[name] is not None:
            raise UserError(f"kernel '{name}' {refusals[name]}: use kernel 'reference', or none to let it be chosen")
        fitting = [other for other, why in refusals.items() if why is None]
        fitting = by_speed(fitting, times_of(fitting, device, dtype, head_dim))
    if many and fitting[0] == "sdpa" and not {*fitting} <= {"sdpa", "reference"}:
        fitting.remove("sdpa")
    chosen = KERNELS[fitting[0]]
    if chosen is reference and deterministic and device.type == "cuda" and "CUBLAS_WORKSPACE_CONFIG" not in os.environ:
        raise UserError("kernel 'reference' is not deterministic on GPUs as they are set: start with CUBLAS_WORKSPACE_CONFIG=:4096:8")
    slow = device.type == "cuda" and chosen is reference and name is None
    log = logging.getLogger(__name__)
    (log.warning if slow else log.info)(
        "magi attention on %s, %s, head size %d%s%s: kernel '%s'%s",
        device.type,
        dtype,
        head_dim,
        " with a soft cap" if softcap else "",
        ", deterministic" if deterministic else "",
        chosen.name,
        ", which is slow: no fused kernel takes these tensors" if slow else "",
    )
    return chosen


def times_of(names: Sequence[str], device: torch.device, dtype: torch.dtype, head_dim: int) -> dict[str, float]:
    """Kernel -> its time by the rates that are known of `device`; 'sdpa' has that of the one that it would run."""
    rates = known_rates(device, dtype)
    if not rates:
        return {}
    kind = Kind(device, dtype, head_dim, False, torch.are_deterministic_algorithms_enabled())
    named = {name: kernel_for(kind, ANY_SHAPE) if name == "sdpa" else name for name in names}
    return {name: rates[kernel].time for name, kernel in named.items() if kernel in rates}


def by_speed(names: Sequence[str], times: Mapping[str, float]) -> list[str]:
    """`names` with those that have times put in order among the places that they hold; the others stay where they are."""
    faster = iter(sorted((name for name in names if name in times), key=times.__getitem__))
    return [next(faster) if name in times else name for name in names]


def in_many_pieces(bands: Sequence[Band]) -> bool:
    """Whether kernel 'sdpa' would run more than `MOST_PIECES` pieces for these bands."""
    return sum(len(pieces(band)) for band in bands) > MOST_PIECES
