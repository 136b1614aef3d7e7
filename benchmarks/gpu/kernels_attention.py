"""The part `attention` of `kernels.py`: PyTorch's kernels, the one that seqloom's programs call, and those of magi attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from meter import Meter
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from seqloom.cost.measure_kernels import forward_backward_seconds

BACKWARD = 2.5  # operations of attention's backward to those of its forward
MOST_EXPLICIT = 8192  # positions: kernels that write scores out take minutes and more memory than there is for more
SDPA = {
    "cpu": {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH},
    "cuda": {
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "flash2": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "math": SDPBackend.MATH,
    },
}
"""Kernels of `scaled_dot_product_attention`, by the names of hardware files."""


def attention(meter: Meter) -> list[dict[str, Any]]:
    """Causal attention with grouped heads: PyTorch's kernels, the one that seqloom's programs call, and those of magi attention."""
    rows: list[dict[str, Any]] = []
    for length in meter.sizes.lengths:
        for name, make in (*sdpa_kernels(meter), ("seqloom", seqloom_attention), *magi_kernels(meter, length)):
            if meter.run.left_s < 30 and not meter.run.toy:
                rows.append({"kernel": name, "length": length, "error": "no time left"})
                continue
            with meter.tried(rows, kernel=name, length=length) as row:
                if name in ("torch math", "magi reference") and length > MOST_EXPLICIT:
                    row["error"] = f"writes scores out: not run above {MOST_EXPLICIT:,} positions"
                    continue
                attention_row(meter, length, make, row)
    return rows


def attention_row(meter: Meter, length: int, make: Callable[[Sequence[Tensor]], Any], row: dict[str, Any]) -> None:
    """Times forward and backward into `row`. `make(inputs)` gives the two functions, or one that autograd differentiates."""
    sizes = meter.sizes
    heads = (sizes.heads, sizes.kv_heads, sizes.kv_heads)
    inputs = [meter.random(1, count, length, sizes.head_dim, grad=True) for count in heads]
    fn = make(inputs)
    if isinstance(fn, tuple):
        seconds = tuple(meter.clock.seconds(part) for part in fn)
    else:
        seconds = forward_backward_seconds(meter.clock, fn, inputs)
    flops = 2.0 * sizes.heads * length**2 * sizes.head_dim  # two products over half the square
    row["forward"] = meter.arithmetic(flops, seconds[0])
    row["backward"] = meter.arithmetic(BACKWARD * flops, seconds[1])
    row["both"] = meter.arithmetic((1 + BACKWARD) * flops, sum(seconds))


def sdpa_kernels(meter: Meter) -> Iterator[tuple[str, Callable[[Sequence[Tensor]], Any]]]:
    """PyTorch's `scaled_dot_product_attention` held to each of its kernels; those that know no groups take repeated key/value heads."""
    for name, backend in SDPA[meter.device.type].items():
        yield f"torch {name}", lambda inputs, backend=backend: held_to(backend, inputs, grouped=True)
        if backend != SDPBackend.MATH:
            yield f"torch {name}, heads repeated", lambda inputs, backend=backend: held_to(backend, inputs, grouped=False)


def held_to(backend: SDPBackend, inputs: Sequence[Tensor], grouped: bool) -> Callable[[], Tensor]:
    """PyTorch's attention with one kernel; to repeat heads is part of it."""
    query, key, value = inputs
    groups = query.shape[1] // key.shape[1]

    def run() -> Tensor:
        keys, values = (x if grouped else x.repeat_interleave(groups, 1) for x in (key, value))
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, keys, values, is_causal=True, enable_gqa=grouped)

    return run


def seqloom_attention(inputs: Sequence[Tensor]) -> Callable[[], Tensor]:
    """What emitted programs call."""
    from seqloom.ops.attention import attention as fn

    return lambda: fn(*inputs, scale=inputs[0].shape[-1] ** -0.5)


def magi_kernels(meter: Meter, length: int) -> Iterator[tuple[str, Callable[[Sequence[Tensor]], Any]]]:
    """The kernels of magi attention, causal over the whole sequence."""
    from seqloom.magi import masks
    from seqloom.magi.choose import KERNELS, choose_kernel
    from seqloom.magi.kernels import Final

    bands, scale = masks.packed([0, length]).bands, meter.sizes.head_dim**-0.5

    def make(name: str, inputs: Sequence[Tensor]) -> tuple[Callable[[], Any], Callable[[], Any]]:
        kernel = choose_kernel(name, meter.device, meter.dtype, meter.sizes.head_dim, False)
        query, key, value = (x.detach()[0].transpose(0, 1).contiguous() for x in inputs)  # [l, heads, head_dim]
        grad = torch.randn_like(query)
        output, lse = kernel.forward(query, key, value, bands, scale, 0.0)
        kept = output.to(query.dtype)
        given = Final(grad, query, key, value, kept, lse, (grad.to(lse.dtype) * kept.to(lse.dtype)).sum(-1))
        return (
            lambda: kernel.forward(query, key, value, bands, scale, 0.0),
            lambda: kernel.backward(given, bands, scale, 0.0),
        )

    for name in KERNELS:
        yield f"magi {name}", lambda inputs, name=name: make(name, inputs)
