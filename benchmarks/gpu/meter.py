"""Sizes, times and shares: what `kernels.py` and its parts measure with.

A `Meter` times functions on one device and says what share of the device's own ceilings they reach: the best of a few large square matrix
products, and a large copy, bytes read and written. Both are measured in the same process (`ceilings`), before anything else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from workbench import Bench, out_of_memory, release

from seqloom.cost.measure_clock import Clock

BUDGET_S = 0.25  # of the repeats of one figure


@dataclass(frozen=True)
class Sizes:
    """Sizes of what is measured: those of one rank of a Llama.

    Attention is `[1, heads, l, head_dim]` for each `l` of `lengths`; products and elementwise work have `tokens` rows; the loss head has
    `vocab` classes, and is compared with others at `few_tokens`; `parameters` are those that the optimizer of the rank updates.
    """

    squares: tuple[int, ...] = (8192, 12288, 16384)
    copied: int = 4 * 2**30
    lengths: tuple[int, ...] = (8192, 32768, 131072)
    heads: int = 4
    kv_heads: int = 1
    head_dim: int = 128
    tokens: int = 16384
    hidden: int = 4096
    kv_hidden: int = 1024
    ffn: int = 14336
    vocab: int = 128256
    chunks: tuple[int, ...] = (512, 1024, 2048, 4096, 8192)
    few_tokens: int = 4096
    parameters: int = 1_003_782_656


TOY = Sizes((128, 256), 2**22, (64, 128), 4, 1, 16, 64, 64, 16, 176, 512, (16, 32), 32, 10_000)


class Meter:
    """Times functions on the device and turns seconds into shares of its ceilings."""

    def __init__(self, run: Bench, sizes: Sizes) -> None:
        self.run, self.sizes, self.device, self.dtype = run, sizes, run.device, run.dtype
        self.clock = Clock(run.device, BUDGET_S if run.device.type == "cuda" else 0.01)
        self.flops = self.bandwidth = math.nan

    def random(self, *shape: int, dtype: torch.dtype | None = None, grad: bool = False) -> Tensor:
        """Random numbers on the device."""
        return torch.randn(*shape, dtype=dtype or self.dtype, device=self.device).requires_grad_(grad)

    def arithmetic(self, flops: float, seconds: float) -> dict[str, float]:
        """Milliseconds, TFLOP/s and the share of the largest product's."""
        return {"ms": 1e3 * seconds, "tflops": flops / seconds / 1e12, "share": flops / seconds / self.flops}

    def traffic(self, nbytes: float, seconds: float) -> dict[str, float]:
        """Milliseconds, GB/s and the share of a large copy's."""
        return {"ms": 1e3 * seconds, "gb_per_s": nbytes / seconds / 1e9, "share": nbytes / seconds / self.bandwidth}

    @contextmanager
    def tried(self, rows: list[dict[str, Any]], **what: Any) -> Iterator[dict[str, Any]]:
        """A row of figures; where the kernel refuses or memory does not suffice, the row holds the reason in `error`."""
        row = dict(what)
        try:
            yield row
        except Exception as error:  # of whatever kind a package raises: the other kernels are measured all the same
            lines = str(error).strip().splitlines() or [type(error).__name__]
            row.update(out_of_memory(error) or {"error": lines[0]})
        rows.append(row)
        release(self.device)


def ceilings(meter: Meter) -> dict[str, Any]:
    """The best of large square products, and a large copy, both into memory that is there already."""
    squares = {}
    for size in meter.sizes.squares:
        left, right, out = meter.random(size, size), meter.random(size, size), meter.random(size, size)
        squares[size] = 2.0 * size**3 / meter.clock.seconds(lambda left=left, right=right, out=out: torch.mm(left, right, out=out))
        del left, right, out
        release(meter.device)
    meter.flops = max(squares.values())
    meter.bandwidth = copied_bytes(meter)
    release(meter.device)
    return {"flops": meter.flops, "squares": squares, "bytes_per_s": meter.bandwidth, "copied_bytes": meter.sizes.copied}


def copied_bytes(meter: Meter) -> float:
    """Bytes a second of a large copy, read and written."""
    source = torch.empty(meter.sizes.copied // 4, device=meter.device).normal_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / meter.clock.seconds(lambda: target.copy_(source))
