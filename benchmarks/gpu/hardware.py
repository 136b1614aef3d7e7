"""The rates of the device, as the planner reads them: measured, beside those of its description, and taken over on request.

    python benchmarks/gpu/hardware.py --write                 # results/gpu/hardware.json, and measured.json for --hardware; 3 minutes
    python benchmarks/gpu/hardware.py --apply benchmarks/results/gpu/hardware.json      # into configs/hardware: needs no GPU
    python benchmarks/gpu/hardware.py --device cpu            # a smoke run

Measures as `python -m seqloom profile` does, on one device: matrix products by their smallest dimension, attention kernels, elementwise
chains, launches, the link to the host. Links between devices stay as they are described. `--apply` writes the shares of the peaks into the
device's description and, as H100 and H200 have the same arithmetic units, into that of the other: its own data sheet's peaks and bandwidth
times these shares. Kernels that were not there keep their described rates, and plans are made for the fastest that was.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from workbench import ROOT, Bench, add_flags, bench, nearest, table

from seqloom.cost import measure_kernels, profile
from seqloom.cost.hardware import Hardware, load_hardware, parse_hardware, to_json
from seqloom.cost.measure_clock import Clock
from seqloom.runtime.mesh import init_distributed

CONFIGS = ROOT / "configs" / "hardware"
SAME_UNITS = ({"h100-80gb", "h200-141gb"},)
"""Descriptions of devices with the same arithmetic units: what one reaches of its peaks, the other does."""
MEASURED = "measured.json"
TOY = measure_kernels.Sizes(outer=64, inner=(16, 64), heads=2, positions=64, head_dim=16, tokens=32, hidden=32, ffn=64, large=2**16)
REPLACED = ("matmul:", "attention:", "attention and matmul", "pointwise:", "Measured rates")


def main() -> None:
    """Measure and compare, or take a result over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    parser.add_argument("--apply", type=Path, metavar="RESULT", help="take this result over into configs/hardware, and measure nothing")
    args = parser.parse_args()
    if args.apply is not None:
        for path in apply(json.loads(args.apply.read_text(encoding="utf-8")), CONFIGS):
            print(
                f"wrote {path}: see what it changes with `git diff`, then run `pytest tests/test_cost_hardware.py tests/test_plan_sense.py`"
            )
        return
    run = bench("hardware", args)
    name = nearest(torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else "", 0.0, run.device.type)
    init_distributed(run.device.type)
    described, measured = load_hardware(name), measure(run, name)
    torch.distributed.destroy_process_group()
    rows = list(compared(described, measured))
    print(table(("figure", "described", "measured", "ratio"), rows))
    figures = [dict(zip(("figure", "described", "measured", "ratio"), row, strict=True)) for row in rows]
    run.keep({"name": name, "figures": figures, "hardware": json.loads(to_json(measured))})
    if run.place is not None:
        run.place.with_name(MEASURED).write_text(to_json(measured), encoding="utf-8")
        print(f"wrote {run.place} and {MEASURED} beside it, for --hardware")


def measure(run: Bench, name: str) -> Hardware:
    """The device as `profile` describes it, with the links of its description; at toy size once and quickly."""
    clock, kind = Clock(run.device, 0.0) if run.toy else Clock(run.device), run.device.type
    sizes, rounds = (TOY, 1) if run.toy else (measure_kernels.SIZES[kind], profile.ROUNDS)
    left_out: dict[str, None] = {}
    found = profile.best([profile.measure_device(clock, sizes, profile.DTYPES[kind], left_out.setdefault) for _ in range(rounds)])
    print("\n".join(left_out), flush=True)
    return profile.describe(run.device, name, found, [], load_hardware(name))


def compared(described: Hardware, measured: Hardware) -> Iterator[tuple[str, float | None, float, float | None]]:
    """Figure, described, measured, and measured / described: what a device reaches, in TFLOPS and GB/s."""

    def row(figure: str, before: float | None, after: float) -> tuple[str, float | None, float, float | None]:
        return figure, before, after, after / before if before else None

    for dtype, peak in measured.peak_flops.items():
        if dtype == "float64":
            continue
        kind = getattr(torch, dtype)
        rates, before = measured.rates.arithmetic(kind), described.rates.arithmetic(kind)
        points, before_peak = dict(before.matmul), described.peak_flops.get(dtype, 0.0)
        for size, share in rates.matmul:
            known = points[size] * before_peak / 1e12 if size in points else None
            yield row(f"{dtype} matmul {size}, TFLOPS", known, share * peak / 1e12)
        for kernel, rate in rates.attention.items():
            for way in ("forward", "backward"):
                known = getattr(before.attention[kernel], way) * before_peak / 1e12 if kernel in before.attention else None
                yield row(f"{dtype} {kernel} {way}, TFLOPS", known, getattr(rate, way) * peak / 1e12)
    for figure, of in (
        ("elementwise, GB/s", lambda x: x.memory_bandwidth * x.rates.pointwise / 1e9),
        ("host link, GB/s", lambda x: x.host_link_bandwidth / 1e9),
        ("launch, us", lambda x: 1e6 * x.launch_overhead_s),
    ):
        yield row(figure, of(described), of(measured))


# --- taking a result over ----------------------------------------------------------------------------------------------------------


def apply(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write a result's rates into the description of its device and into those of the same units; returns the files.

    Raises `SystemExit` with a sentence for a result of toy size.
    """
    if result["toy"]:
        raise SystemExit("error: this result is of toy size and says nothing of a device: run hardware.py --write on a GPU")
    name, machine = result["name"], result["machine"]
    group = next((names for names in SAME_UNITS if name in names), {name})
    said = f"Measured rates: matmul, attention, elementwise chains on {machine['device']}, PyTorch {machine['torch']}, {machine['date']}"
    written = []
    for other in sorted(group, key=lambda other: other != name):
        path = folder / f"{other}.json"
        words = said if other == name else f"{said}, which has the same arithmetic units; shares of this device's own peaks and bandwidth"
        text = compact(merged(json.loads(path.read_text(encoding="utf-8")), result["hardware"], words, other == name))
        parse_hardware(text, str(path))  # a description that the planner would refuse is not written
        path.write_text(text, encoding="utf-8")
        written.append(path)
    return written


def merged(described: Mapping[str, Any], measured: Mapping[str, Any], said: str, same_device: bool) -> dict[str, Any]:
    """A description with measured rates. Kernels that were not measured come after those that were, as they were described."""
    rates, found = dict(described["rates"]), measured["rates"]
    missing = {kernel: rate for kernel, rate in rates["attention"].items() if kernel not in found["attention"]}
    rates |= {"matmul": found["matmul"], "attention": found["attention"] | missing, "pointwise": found["pointwise"]}
    if found["by_dtype"]:
        rates["by_dtype"] = found["by_dtype"]
    own = {"host_link_bandwidth": measured["host_link_bandwidth"]} if same_device else {}
    kept = [line for line in described["sources"] if not line.startswith(REPLACED)]
    unmeasured = f"; not measured, as described before: {', '.join(missing)}" if missing else ""
    return {
        **described,
        **own,
        "launch_overhead_s": measured["launch_overhead_s"],
        "rates": rates,
        "sources": [*kept, f"{said}{unmeasured}."],
    }


def compact(description: Mapping[str, Any]) -> str:
    """JSON with points and rates on a line each."""
    text = json.dumps(description, indent=2)
    text = re.sub(r"\[\s+([\d.e+-]+),\s+([\d.e+-]+)\s+\]", r"[\1, \2]", text)
    return re.sub(r'\{\s+("forward": [\d.e+-]+),\s+("backward": [\d.e+-]+)\s+\}', r"{\1, \2}", text) + "\n"


if __name__ == "__main__":
    main()
