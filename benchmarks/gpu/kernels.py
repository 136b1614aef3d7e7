"""Every kind of kernel that a training step runs, as shares of what the device can do.

    python benchmarks/gpu/kernels.py                        # Llama3-8B, one rank of 8 at 128K tokens, bf16; about 4 minutes
    python benchmarks/gpu/kernels.py --write                # and kept in benchmarks/results/gpu/kernels.json
    python benchmarks/gpu/kernels.py --parts attention      # one part
    python benchmarks/gpu/kernels.py --device cpu --toy     # a smoke run

The ceilings are measured first, in the same process: the best of a few large square matrix products, and a large copy on the device, bytes
read and written. A product and attention have a share of the first, by the operations that they must do (causal attention: half the
square; its backward 2.5 times the forward); elementwise work and optimizers have a share of the second, by the bytes that they must move.
Times are medians on random data. A kernel that is not installed, or refuses, is told with its reason.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

from kernels_attention import attention
from kernels_elementwise import elementwise, optimizer
from kernels_products import loss_head, matmul
from meter import TOY, Meter, Sizes, ceilings
from workbench import add_flags, bench, facts, table


def main() -> None:
    """Measure the ceilings, then every part; the result is kept after each of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    args = parser.parse_args()
    run = bench("kernels", args)
    meter = Meter(run, TOY if run.toy else Sizes())
    found: dict[str, Any] = {"dtype": str(run.dtype), "sizes": vars(meter.sizes), "ceilings": ceilings(meter)}
    print(f"{facts(run.device)['device']}, {run.dtype}: {meter.flops / 1e12:,.4g} TFLOP/s, {meter.bandwidth / 1e9:,.4g} GB/s", flush=True)
    for part in args.parts:
        if run.left_s < 0:
            found[part] = [{"error": "no time left"}]
            continue
        header, measure, columns = PARTS[part]
        found[part] = measure(meter)
        print(f"\n{header}\n{table(columns, [[shown(row, column) for column in columns] for row in found[part]])}", flush=True)
        run.keep(found)


def shown(row: Mapping[str, Any], column: str) -> Any:
    """A cell: the entry of that name, or its entry `share` as a percentage."""
    if column == "note":
        return row.get("error") or row.get("note") or ""
    outer, _, inner = column.partition(" ")
    value = row.get(outer)
    if isinstance(value, Mapping):
        value = value.get(inner)
    return f"{value:.1%}" if inner == "share" and value is not None else value


PARTS: Mapping[str, tuple[str, Callable[[Meter], list[dict[str, Any]]], tuple[str, ...]]] = {
    "attention": (
        "attention, causal: shares of the largest product",
        attention,
        ("kernel", "length", "forward ms", "forward tflops", "forward share", "backward ms", "backward tflops", "backward share", "note"),
    ),
    "matmul": (
        "linear layers: shares of the largest product",
        matmul,
        ("layer", "shape", "forward ms", "forward tflops", "forward share", "backward ms", "backward tflops", "backward share", "note"),
    ),
    "loss_head": (
        "head and loss, forward and backward: shares of the largest product, by three products of the head",
        loss_head,
        ("head", "tokens", "both ms", "both tflops", "both share", "workspace_gib", "note"),
    ),
    "elementwise": (
        "elementwise work: shares of a large copy, by the fewest bytes",
        elementwise,
        ("operator", "how", *(f"{way} {figure}" for way in ("forward", "backward") for figure in ("ms", "gb_per_s", "share")), "note"),
    ),
    "optimizer": (
        "optimizer: shares of a large copy, by the fewest bytes",
        optimizer,
        ("optimizer", "parameters", "step ms", "step gb_per_s", "step share", "peak_gib", "note"),
    ),
}


if __name__ == "__main__":
    main()
