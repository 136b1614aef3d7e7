"""Every attention kernel that runs here, forward and backward, on six masks.

    python benchmarks/magi_kernels.py                                  # 8K to 128K rows on the first GPU, bfloat16
    python benchmarks/magi_kernels.py --write                          # and kept in benchmarks/results/magi_kernels.json
    python benchmarks/magi_kernels.py --device cpu --lengths 512 1024  # a smoke run, fp32

One rank, no exchange: the mask's own bands over the rows. Milliseconds are the least of `REPEATS` runs after a warm-up. TFLOP/s count the
cells of the mask only: 4 x cells x heads x head size forward, 2.5 times that backward. `ratio` is to the best kernel of the line.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seqloom.errors import UserError
from seqloom.magi import masks
from seqloom.magi.choose import KERNELS, choose_kernel
from seqloom.magi.kernels import Final, Kernel
from seqloom.magi.mask import AttnMask

RESULT = Path(__file__).resolve().parent / "results" / "magi_kernels.json"
LENGTHS = (8192, 16384, 32768, 65536, 131072)
HEADS, KV_HEADS, DIM = 32, 8, 128
REPEATS = 5
MOST_EXPLICIT = 8192  # rows: 'reference' writes out scores, and takes minutes for more


def documents(rows: int) -> list[int]:
    """Cumulative lengths of documents: halves, quarters and eighths of a quarter of the rows, four times."""
    quarter = rows // 4
    lengths = [quarter // 2, quarter // 4, quarter // 8, quarter - quarter // 2 - quarter // 4 - quarter // 8] * 4
    lengths[-1] += rows - sum(lengths)
    return [0, *torch.tensor(lengths).cumsum(0).tolist()]


MASKS: dict[str, Callable[[int], AttnMask]] = {
    "full": lambda rows: masks.packed([0, rows], causal=False),
    "causal": lambda rows: masks.packed([0, rows]),
    "packed causal": lambda rows: masks.packed(documents(rows)),
    "window": lambda rows: masks.sliding_window([0, rows], rows // 16),
    "window and global": lambda rows: masks.global_window([0, rows], 128, rows // 16, 0),
    "block causal": lambda rows: masks.block_causal([0, rows], rows // 16),
}


def main() -> None:
    """Measure every length, mask and kernel; print a line for each length and mask."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="rows")
    parser.add_argument("--write", action="store_true", help=f"keep the figures in {RESULT.name}")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU is here: run with --device cpu and short --lengths, or on a machine that has one")
    device = torch.device(args.device, 0 if args.device == "cuda" else None)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    names = available(device, dtype)
    cases = [case for rows in args.lengths for case in measured(rows, names, device, dtype)]
    if args.write:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
        shape = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": DIM, "dtype": str(dtype)}
        RESULT.write_text(
            json.dumps({"device": name, "torch": torch.__version__, **shape, "cases": cases}, indent=2) + "\n", encoding="utf-8"
        )


def available(device: torch.device, dtype: torch.dtype) -> list[str]:
    """The kernels that take the tensors; why others do not is printed."""
    names = []
    for name in KERNELS:
        try:
            choose_kernel(name, device, dtype, DIM, False)
            names.append(name)
        except UserError as error:
            print(error)
    return names


def measured(rows: int, names: Sequence[str], device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Figures of every mask of `rows` rows."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(rows, HEADS, DIM), (rows, KV_HEADS, DIM), (rows, KV_HEADS, DIM), (rows, HEADS, DIM)]
    tensors = [torch.randn(shape, dtype=dtype, device=device, generator=generator) for shape in shapes]
    cases = []
    for mask_name, make in MASKS.items():
        mask = make(rows)
        print(f"{rows:7} {mask_name}")
        found = {name: timed(KERNELS[name], tensors, mask) for name in names if name != "reference" or rows <= MOST_EXPLICIT}
        best = [min((ms[phase] for ms in found.values() if ms is not None), default=0.0) for phase in range(2)]
        for name, ms in found.items():
            if ms is None:
                print(f"{'':8}{name:10} out of memory")
            else:
                cases.append({"rows": rows, "mask": mask_name, "cells": mask.area, "kernel": name, **figures(ms, best, mask.area)})
                shown = (
                    f"{phase} {x['ms']:10.3f} ms {x['tflops']:8.2f} TFLOP/s {x['ratio']:6.2f}x"
                    for phase, x in figures(ms, best, mask.area).items()
                )
                print(f"{'':8}{name:10} {'   '.join(shown)}")
    return cases


def figures(ms: Sequence[float], best: Sequence[float], cells: int) -> dict[str, dict[str, float]]:
    """Milliseconds, TFLOP/s and ratio to the best, forward and backward."""
    flops = (4 * cells * HEADS * DIM, 10 * cells * HEADS * DIM)
    return {
        phase: {"ms": round(took, 4), "tflops": round(count / took / 1e9, 3), "ratio": round(took / least_ms, 3)}
        for phase, took, least_ms, count in zip(("forward", "backward"), ms, best, flops, strict=True)
    }


def timed(kernel: Kernel, tensors: Sequence[Tensor], mask: AttnMask) -> tuple[float, float] | None:
    """Milliseconds forward and backward; None where memory does not suffice."""
    query, key, value, grad = tensors
    scale = DIM**-0.5
    try:
        output, lse = kernel.forward(query, key, value, mask.bands, scale, 0.0)
        kept = output.to(query.dtype)
        delta = (grad.to(lse.dtype) * kept.to(lse.dtype)).sum(-1)
        forward = least(lambda: kernel.forward(query, key, value, mask.bands, scale, 0.0), query.device)
        backward = least(lambda: kernel.backward(Final(grad, query, key, value, kept, lse, delta), mask.bands, scale, 0.0), query.device)
    except torch.OutOfMemoryError:
        return None
    return forward, backward


def least(run: Callable[[], Any], device: torch.device) -> float:
    """The least milliseconds of `REPEATS` runs, after one that is not counted."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    run()
    seconds = []
    for _ in range(REPEATS):
        wait()
        start = time.perf_counter()
        run()
        wait()
        seconds.append(time.perf_counter() - start)
    return 1e3 * min(seconds)


if __name__ == "__main__":
    main()
