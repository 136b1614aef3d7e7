"""`python -m seqloom profile`: measure the present machine and write it as a hardware file.

Role in the pipeline: makes what `seqloom.cost.hardware` reads. Alone it measures one device; started by torchrun all ranks measure their
kernels at the same time, as a training run has them at work, and then the collectives, within machines and between them. Rank 0 writes the
file and prints what was found. What cannot be measured here (the links of a machine with more ranks) comes from a base description, or is
left out, and the file's sources say so.
"""

from __future__ import annotations

import dataclasses
import math
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from seqloom.cost import measure_kernels as kernels
from seqloom.cost import measure_links
from seqloom.cost.hardware import GIB, Arithmetic, AttentionRate, CollectiveKind, Hardware, Link, Rates, to_json
from seqloom.cost.measure_clock import Clock
from seqloom.cost.measure_links import KINDS, MESSAGES, Fit, Timing, collective_timings
from seqloom.errors import UserError
from seqloom.ops.kernels import KERNELS as PLAIN

DTYPES: Mapping[str, tuple[torch.dtype, ...]] = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.bfloat16, torch.float16, torch.float32),
}
"""dtypes measured in full; the first one's rates stand for those that are not. The peak of float64 is measured too."""
HOST_SHARE = 0.8  # of host memory: the rest is for the system, the data and the processes themselves
MARGIN: Mapping[str, float] = {"cpu": 0.1, "cuda": 0.065}
ROUNDS = 3
"""Everything is measured in so many rounds, of which the best counts: other work on the machine comes and goes."""
FULL_OVERLAP = 1.0  # over NCCL, whose collectives run beside kernels; the planner takes the longer of the two


@dataclass(frozen=True)
class Measured:
    """Raw figures of one device: FLOPS by dtype name and size, bytes per second, seconds."""

    matmul: Mapping[str, Mapping[int, float]]
    attention: Mapping[str, Mapping[str, tuple[float, float]]]
    float64: float
    bandwidth: float
    pointwise: float
    launch_s: float
    host: float
    memory_bytes: int


@dataclass(frozen=True)
class Level:
    """One measured level of links: the ranks joined by it, and the fitted model."""

    name: str
    ranks_per_group: int
    timings: Sequence[Timing]
    fit: Fit


def profile(device: torch.device, name: str, output: Path, base: Hardware | None, say: Callable[[str], None]) -> Hardware:
    """Measure, write `output` (rank 0) and print a table. Every rank of the job calls this; the job may be of one rank.

    Raises `UserError` where `output` cannot be written, before anything is measured.
    """
    check_writable(output)
    clock = Clock(device)
    left_out: dict[str, None] = {}  # lines, each once, in their order
    sizes, dtypes = kernels.SIZES[device.type], DTYPES[device.type]
    measured = best([measure_device(clock, sizes, dtypes, left_out.setdefault) for _ in range(ROUNDS)])
    levels = measure_levels(clock, MESSAGES[device.type])
    hardware = describe(device, name, measured, levels, base)
    if dist.get_rank() == 0:
        output.write_text(to_json(hardware), encoding="utf-8")
        for line in (*table(hardware, levels), *left_out):
            say(line)
        say(f"wrote {output}: use it with --hardware {output}")
    return hardware


def check_writable(output: Path) -> None:
    """Raise `UserError` unless `output` is a file name in a folder that can be written."""
    folder = output.parent
    if output.is_dir() or not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise UserError(
            f"the hardware file {output} cannot be written: give --output a file name in a folder that exists and can be written"
        )


def measure_device(clock: Clock, sizes: kernels.Sizes, dtypes: Sequence[torch.dtype], say: Callable[[str], object]) -> Measured:
    """Everything about one device. All ranks measure the same thing at the same time. `say` is told of kernels that are left out."""
    matmul, attention = {}, {}
    for dtype in dtypes:
        matmul[dtype_name(dtype)] = {inner: kernels.matmul_flops(clock, sizes.outer, inner, dtype) for inner in sizes.inner}
        attention[dtype_name(dtype)] = kernels.attention_flops(clock, sizes, dtype, kernels.KERNELS[clock.device.type], say)
    eager = not fuses(clock.device)
    return Measured(
        matmul=matmul,
        attention=attention,
        float64=kernels.matmul_flops(clock, sizes.outer, sizes.outer // 2, torch.float64),
        bandwidth=kernels.memory_bandwidth(clock, sizes),
        pointwise=kernels.chain_bandwidth(clock, sizes, dtypes[0]) if eager else kernels.fused_bandwidth(clock, sizes),
        launch_s=kernels.launch_seconds(clock),
        host=kernels.host_bandwidth(clock, sizes),
        memory_bytes=kernels.memory_bytes(clock.device, local_ranks()),
    )


def best(rounds: Sequence[Measured]) -> Measured:
    """The best figure of each kind over several rounds; a kernel counts where every round could run it."""
    first = rounds[0]

    def highest(part: str) -> float:
        return max(getattr(found, part) for found in rounds)

    return Measured(
        matmul={d: {size: max(r.matmul[d][size] for r in rounds) for size in sizes} for d, sizes in first.matmul.items()},
        attention={
            d: {
                kernel: (max(r.attention[d][kernel][0] for r in rounds), max(r.attention[d][kernel][1] for r in rounds))
                for kernel in found
                if all(kernel in r.attention[d] for r in rounds)
            }
            for d, found in first.attention.items()
        },
        float64=highest("float64"),
        bandwidth=highest("bandwidth"),
        pointwise=highest("pointwise"),
        launch_s=min(found.launch_s for found in rounds),
        host=highest("host"),
        memory_bytes=first.memory_bytes,
    )


def fuses(device: torch.device) -> bool:
    """Whether programs run with fused elementwise chains on this kind of device; on CPUs they run as they are written."""
    return device.type == "cuda"


def local_ranks() -> int:
    """Ranks on this machine, as torchrun says; 1 without it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def measure_levels(clock: Clock, sizes: Sequence[int]) -> list[Level]:
    """Collectives among the ranks of a machine, and among one rank of each machine, all machines at once; nothing for one rank."""
    world, local = dist.get_world_size(), local_ranks()
    levels = []
    for name, members, reach in (
        ("local", [range(first, first + local) for first in range(0, world, local)], local),
        ("network", [range(first, world, local) for first in range(local)], world),
    ):
        if len(members[0]) > 1:
            group = _group_of(members)
            timings = measure_links.best([collective_timings(clock, group, sizes) for _ in range(ROUNDS)])
            levels.append(Level(name, reach, timings, measure_links.fit(timings)))
    return levels


def _group_of(members: Iterable[range]) -> ProcessGroup:
    """This rank's group among groups of ranks; every rank makes all of them, as `torch.distributed` requires."""
    groups = [(ranks, dist.new_group(list(ranks))) for ranks in members]
    return next(group for ranks, group in groups if dist.get_rank() in ranks)


def describe(device: torch.device, name: str, measured: Measured, levels: Sequence[Level], base: Hardware | None) -> Hardware:
    """The figures as a hardware description. Of `base`: higher peaks (a data sheet's), the margin, and the links that reach further."""
    fastest = {dtype: max(rates.values()) for dtype, rates in measured.matmul.items()}
    peaks = {dtype: three_digits(max(rate, _base_peak(base, dtype))) for dtype, rate in (*fastest.items(), ("float64", measured.float64))}
    arithmetic = {dtype: _arithmetic(measured.matmul[dtype], measured.attention[dtype], peaks[dtype]) for dtype in measured.matmul}
    first = arithmetic[next(iter(arithmetic))]
    bandwidth = max(measured.bandwidth, measured.pointwise, base.memory_bandwidth if base else 0.0)
    links, shares = _links(levels, base)
    return Hardware(
        name=name,
        memory_bytes=measured.memory_bytes,
        allocator_margin=base.allocator_margin if base else MARGIN[device.type],
        peak_flops=peaks,
        memory_bandwidth=three_digits(bandwidth),
        host_link_bandwidth=three_digits(measured.host),
        launch_overhead_s=three_digits(measured.launch_s),
        links=links,
        rates=Rates(
            matmul=first.matmul,
            attention=first.attention,
            pointwise=share(measured.pointwise, three_digits(bandwidth)),
            collectives=shares,
            by_dtype={dtype: rates for dtype, rates in arithmetic.items() if rates != first},
            fused=fuses(device),
            overlap=FULL_OVERLAP if device.type == "cuda" else 0.0,
        ),
        sources=_sources(device, levels, base),
        host_memory_bytes=0 if device.type == "cpu" else int(HOST_SHARE * kernels.memory_bytes(torch.device("cpu"), local_ranks())),
    )


def _base_peak(base: Hardware | None, dtype: str) -> float:
    return base.peak_flops.get(dtype, 0.0) if base else 0.0


def _arithmetic(matmul: Mapping[int, float], attention: Mapping[str, tuple[float, float]], peak: float) -> Arithmetic:
    rates = {kernel: AttentionRate(share(forward, peak), share(backward, peak)) for kernel, (forward, backward) in attention.items()}
    return Arithmetic(matmul_points(matmul, peak), by_speed(rates))


def by_speed(rates: Mapping[str, AttentionRate]) -> dict[str, AttentionRate]:
    """Kernels by their speed, those that plain attention runs with before the others: plans are made for the first."""
    return dict(sorted(rates.items(), key=lambda item: (item[0] not in PLAIN, item[1].time)))


def matmul_points(rates: Mapping[int, float], peak: float) -> tuple[tuple[int, float], ...]:
    """Measured FLOPS by smallest dimension as table points: rising, and no faster than the dimension, as a hardware file requires.

    What breaks the first rule is noise or a smaller product that fits a cache: the mean of the neighbours that break it, as in isotonic
    regression, comes closest to what was measured.
    """
    pools: list[list[float]] = []
    for size in sorted(rates):
        pools.append([rates[size]])
        while len(pools) > 1 and sum(pools[-2]) / len(pools[-2]) > sum(pools[-1]) / len(pools[-1]):
            last = pools.pop()
            pools[-1].extend(last)
    level = [sum(pool) / len(pool) for pool in pools for _ in pool]
    points: list[tuple[int, float]] = []
    for size, rate in zip(sorted(rates), level, strict=True):
        fraction = share(rate, peak)
        if points:
            fraction = min(fraction, math.floor(points[-1][1] * size / points[-1][0] * 1e4) / 1e4)
        points.append((size, fraction))
    return tuple(points)


def _links(levels: Sequence[Level], base: Hardware | None) -> tuple[tuple[Link, ...], dict[CollectiveKind, float]]:
    """Measured links, then those of `base` that reach further; the shares are those of the innermost level."""
    measured = tuple(level.fit.link(level.name, level.ranks_per_group) for level in levels)
    measured = tuple(
        dataclasses.replace(x, latency_s=three_digits(x.latency_s), bandwidth_bytes_per_s=three_digits(x.bandwidth_bytes_per_s))
        for x in measured
    )
    reach = measured[-1].ranks_per_group if measured else 0
    further = tuple(link for link in base.links if link.ranks_per_group > reach) if base else ()
    if not measured and base is not None:
        return further, dict(base.rates.collectives)
    if not measured:
        return (Link("none", 1, 0.0, 1.0),), dict.fromkeys(KINDS, 1.0)
    return (*measured, *further), {kind: share(value, 1.0) for kind, value in levels[0].fit.shares().items()}


def _sources(device: torch.device, levels: Sequence[Level], base: Hardware | None) -> tuple[str, ...]:
    ranks, threads = dist.get_world_size(), torch.get_num_threads()
    what = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{processor()}, {threads} thread{'s' * (threads > 1)} a rank"
    found = [
        f"Measured by `python -m seqloom profile` on {what}, PyTorch {torch.__version__}, {ranks} rank{'s' * (ranks > 1)} at once: medians "
        "of repeated runs on random data.",
        "peak_flops are the best measured matrix products" + (f", or those of {base.name} where they are higher." if base else "."),
    ]
    found += [
        f"{level.name}: {len(level.timings)} timings over {level.timings[0].ranks} ranks; latency and bandwidth give half of them within "
        f"{level.fit.error:.0%}."
        for level in levels
    ]
    if base is not None:
        reach = levels[-1].ranks_per_group if levels else 0
        taken = ", ".join(link.name for link in base.links if link.ranks_per_group > reach) or "no links"
        found.append(f"Of {base.name}: the allocator margin; {taken}.")
    elif not levels:
        found.append("No links: measured by one process; start the profile with torchrun, or give --base, to plan for more than one rank.")
    return tuple(found)


def table(hardware: Hardware, levels: Sequence[Level]) -> list[str]:
    """What was measured, in lines of text."""
    lines = [f"{hardware.name}: {hardware.memory_bytes / GIB:.1f} GiB a device"]
    for dtype, peak in hardware.peak_flops.items():
        rates = hardware.rates.arithmetic(getattr(torch, dtype))
        lines.append(f"{dtype:<10} matmul {giga(peak)}FLOPS at best" + ("" if dtype == "float64" else "; by smallest dimension:"))
        if dtype == "float64":
            continue
        lines.append("           " + "  ".join(f"{size}: {giga(rate * peak)}" for size, rate in rates.matmul))
        lines += [
            f"           attention {kernel}: forward {giga(rate.forward * peak)}FLOPS, backward {giga(rate.backward * peak)}FLOPS"
            for kernel, rate in rates.attention.items()
        ]
    pointwise = hardware.memory_bandwidth * hardware.rates.pointwise
    how = "fused elementwise chains" if hardware.rates.fused else "elementwise operators one by one"
    lines.append(f"memory     {giga(hardware.memory_bandwidth)}B/s; {how} {giga(pointwise)}B/s")
    lines.append(f"launch     {hardware.launch_overhead_s * 1e6:.3g} us an operator; host link {giga(hardware.host_link_bandwidth)}B/s")
    for level in levels:
        lines.append(
            f"{level.name:<10} {level.fit.latency_s * 1e6:.3g} us a step, model within {level.fit.error:.0%} of half of the timings:"
        )
        lines.append("           " + "  ".join(f"{kind} {giga(value)}B/s" for kind, value in level.fit.bandwidth.items()))
    if not levels:
        lines.append(f"links      not measured (one rank): {', '.join(link.name for link in hardware.links)}")
    return lines


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.is_file()
        else []
    )
    return names[0] if names else platform.machine()


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def share(value: float, whole: float) -> float:
    """A fraction of at most 1, to four digits, above 0."""
    return max(1e-4, min(1.0, round(value / whole, 4)))


def three_digits(value: float) -> float:
    """`value` rounded to three significant digits."""
    return float(f"{value:.3g}")


def giga(value: float) -> str:
    """`1.6e11` -> `160 G`, with T above a thousand."""
    return f"{value / 1e12:.3g} T" if value >= 1e12 else f"{value / 1e9:.3g} G"
