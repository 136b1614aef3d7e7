"""Seconds of one kernel on one device, at achieved rates.

Role in the pipeline: the planner prices every operator of a strategy with these functions, given the local (already split) sizes.
A kernel takes the longest of its arithmetic at the achieved rate of its shape class, its memory traffic at the achieved bandwidth
(the roofline of Williams, Waterman and Patterson, 2009), and the launch overhead.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from seqloom.cost.hardware import Hardware
from seqloom.errors import UserError


def matmul_seconds(hardware: Hardware, m: int, n: int, k: int, dtype: torch.dtype) -> float:
    """Seconds of `[m, k] @ [k, n]`: 2 m n k FLOPs, both operands read and the result written once. 0 where a size is 0.

    A linear layer's forward is (tokens, out features, in features); its backward is two more with the sizes in other places.
    Raises `UserError` where the hardware has no peak for `dtype`.
    """
    if min(m, n, k) <= 0:
        return 0.0
    rate = hardware.peak(dtype) * matmul_fraction(hardware, min(m, n, k), dtype)
    traffic = (m * k + k * n + m * n) * dtype.itemsize
    return max(2.0 * m * n * k / rate, bandwidth_seconds(hardware, traffic))


def matmul_fraction(hardware: Hardware, smallest: int, dtype: torch.dtype) -> float:
    """Achieved fraction of `dtype`'s peak of a matmul whose smallest dimension is `smallest`: linear between the table's points,
    constant outside them.
    """
    points = hardware.rates.arithmetic(dtype).matmul
    if smallest <= points[0][0]:
        return points[0][1]
    for (low, low_rate), (high, high_rate) in zip(points, points[1:], strict=False):
        if smallest <= high:
            return low_rate + (high_rate - low_rate) * (smallest - low) / (high - low)
    return points[-1][1]


def attention_seconds(hardware: Hardware, flops: float, dtype: torch.dtype, backward: bool = False, kernel: str | None = None) -> float:
    """Seconds of a fused attention kernel that does `flops` FLOPs: those left by the mask, half of the full count where causal.

    The forward is `4 * batch * heads * seq^2 * head_dim` (halved where causal); for the backward pass `ATTENTION_BACKWARD_RATIO`
    times that, the convention of the published rates. `kernel` is one of the hardware's; None takes its first. Raises `UserError`
    for an unknown kernel or dtype.
    """
    if flops <= 0:
        return 0.0
    kernels = hardware.rates.arithmetic(dtype).attention
    if kernel is not None and kernel not in kernels:
        raise UserError(f"hardware `{hardware.name}` has no rates for attention kernel `{kernel}`: it has {', '.join(kernels)}")
    rates = kernels[kernel if kernel is not None else next(iter(kernels))]
    rate = hardware.peak(dtype) * (rates.backward if backward else rates.forward)
    return max(flops / rate, hardware.launch_overhead_s)


def bandwidth_seconds(hardware: Hardware, nbytes: float) -> float:
    """Seconds of a kernel that only moves `nbytes` (read plus written): pointwise work, norms, copies. 0 for no bytes."""
    if nbytes <= 0:
        return 0.0
    return max(nbytes / (hardware.memory_bandwidth * hardware.rates.pointwise), hardware.launch_overhead_s)


def pointwise_seconds(hardware: Hardware, border_bytes: float, operator_bytes: Sequence[float]) -> float:
    """Seconds of a chain of elementwise operators.

    Fused, as `torch.compile` leaves it, one kernel reads and writes `border_bytes`: what enters and leaves the chain. Where the
    hardware's programs run as they are written (`rates.fused` false), every operator reads and writes its own `operator_bytes`.
    """
    if hardware.rates.fused:
        return bandwidth_seconds(hardware, border_bytes)
    return sum(bandwidth_seconds(hardware, nbytes) for nbytes in operator_bytes)


def exposed_seconds(hardware: Hardware, communication: float, compute: float) -> float:
    """Seconds by which `communication` beside `compute` lengthens a step: what overlaps hides behind the shorter of the two."""
    return communication - hardware.rates.overlap * min(communication, compute)


def host_seconds(hardware: Hardware, nbytes: float) -> float:
    """Seconds to move `nbytes` between device and host memory, one direction."""
    return nbytes / hardware.host_link_bandwidth if nbytes > 0 else 0.0
