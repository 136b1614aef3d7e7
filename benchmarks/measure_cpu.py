"""Measure this machine as a `cpu` hardware description: one thread per process, collectives over gloo between two processes.

    python benchmarks/measure_cpu.py                              # prints the description as JSON
    python benchmarks/measure_cpu.py --write my_cpu.json          # also writes it, for --hardware my_cpu.json

Every figure is the best of several timings, so that other work on the machine disturbs it least. A process measures alone, and the
collectives measure two processes at once, as they run in training.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import socket
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from seqloom.cost.communication import wire_bytes
from seqloom.cost.compute import ATTENTION_BACKWARD_RATIO
from seqloom.cost.hardware import AttentionRate, CollectiveKind, Hardware, Link, Rates, to_json

MATMUL_SIZES = (16, 32, 64, 128, 256, 512, 1024)
OUTER = 1024
"""Size of the two larger dimensions of a measured matmul."""
SMALL, LARGE = 4096, 32 * 2**20
"""Message sizes in bytes from which latency and bandwidth are taken."""
RANKS = 2


def best_seconds(fn: Callable[[], object], repeats: int = 7) -> float:
    """The shortest of `repeats` timings of `fn`, after one call to warm up."""
    fn()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        fn()
        times.append(time.perf_counter() - start)
    return min(times)


def matmul_flops(size: int, dtype: torch.dtype) -> float:
    """Achieved FLOPS of `[1024, size] @ [size, 1024]`."""
    a, b = torch.randn(OUTER, size, dtype=dtype), torch.randn(size, OUTER, dtype=dtype)
    return 2 * OUTER * OUTER * size / best_seconds(lambda: a @ b)


def attention_flops() -> tuple[float, float]:
    """Achieved forward and backward FLOPS of causal fp32 attention, 4 heads of 64, 1024 tokens."""
    q, k, v = (torch.randn(1, 4, 1024, 64, requires_grad=True) for _ in range(3))
    flops = 4 * 4 * 1024**2 * 64 / 2
    forward = best_seconds(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    gradient = torch.randn_like(out)
    backward = best_seconds(lambda: torch.autograd.grad(out, (q, k, v), gradient, retain_graph=True))
    return flops / forward, ATTENTION_BACKWARD_RATIO * flops / backward


def memory_rates() -> tuple[float, float, float]:
    """Bytes per second of a large copy and of a large add (read plus written), and the seconds of the smallest operator."""
    source = torch.randn(16 * 2**20)
    target, other = torch.empty_like(source), torch.randn_like(source)
    copy = 2 * source.nbytes / best_seconds(lambda: target.copy_(source))
    add = 3 * source.nbytes / best_seconds(lambda: torch.add(source, other, out=target))
    tiny = torch.randn(8)
    launch = best_seconds(lambda: [torch.add(tiny, tiny) for _ in range(1000)]) / 1000
    return copy, add, launch


def _collective_worker(rank: int, port: int, queue: mp.SimpleQueue) -> None:
    warnings.simplefilter("ignore", FutureWarning)  # the names of the collectives that every supported PyTorch has
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(RANKS))
    dist.init_process_group("gloo")
    seconds = {}
    for nbytes in (SMALL, LARGE):
        whole = torch.randn(nbytes // 4)
        part, out = torch.randn(nbytes // 4 // RANKS), torch.empty_like(whole)
        shard = torch.empty_like(part)
        calls = {
            "all_gather": lambda whole=whole, part=part: dist.all_gather_into_tensor(whole, part),
            "reduce_scatter": lambda whole=whole, shard=shard: dist.reduce_scatter_tensor(shard, whole),
            "all_to_all": lambda whole=whole, out=out: dist.all_to_all_single(out, whole),
            "all_reduce": lambda whole=whole: dist.all_reduce(whole),
        }
        for kind, call in calls.items():
            seconds[kind, nbytes] = best_seconds(call, repeats=15 if nbytes == LARGE else 200)
    if rank == 0:
        queue.put(seconds)
    dist.destroy_process_group()


def collective_times() -> dict[tuple[str, int], float]:
    """(kind, message bytes) -> seconds, over two gloo processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    queue = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_collective_worker, args=(port, queue), nprocs=RANKS)
    return queue.get()


def fit_link(times: dict[tuple[str, int], float]) -> tuple[Link, dict[CollectiveKind, float]]:
    """Latency (geometric mean of the kinds) and bandwidth (of the fastest kind), and the share of it that each kind reaches."""
    latencies, rates = [], {}
    for kind in get_args(CollectiveKind):
        wire = wire_bytes(kind, LARGE, RANKS) - wire_bytes(kind, SMALL, RANKS)
        rates[kind] = wire / (times[kind, LARGE] - times[kind, SMALL])
        latencies.append(times[kind, SMALL] / (2 if kind == "all_reduce" else 1))
    latency, best = statistics.geometric_mean(latencies), max(rates.values())
    shares = {kind: round(rate / best, 3) for kind, rate in rates.items()}
    return Link(name="loopback", ranks_per_group=64, latency_s=three_digits(latency), bandwidth_bytes_per_s=three_digits(best)), shares


def three_digits(value: float) -> float:
    """`value` rounded to three significant digits."""
    return float(f"{value:.3g}")


def matmul_points(rates: dict[int, float], peak: float) -> tuple[tuple[int, float], ...]:
    """Measured rates as table points: rising, and no faster than the dimension, as a hardware file requires."""
    points: list[tuple[int, float]] = []
    for size, rate in sorted(rates.items()):
        fraction = min(1.0, rate / peak)
        if points:
            last_size, last = points[-1]
            fraction = min(max(fraction, last), last * size / last_size)
        points.append((size, math.floor(fraction * 1e3) / 1e3))
    return tuple(points)


def measure(memory_gib: float) -> Hardware:
    """The description of this machine; the peak of a dtype is its best measured matmul."""
    torch.set_num_threads(1)
    rates = {size: matmul_flops(size, torch.float32) for size in MATMUL_SIZES}
    peaks = {"float32": max(rates.values())}
    for dtype in (torch.bfloat16, torch.float64):
        peaks[str(dtype).removeprefix("torch.")] = matmul_flops(MATMUL_SIZES[-1], dtype)
    forward, backward = attention_flops()
    copy, add, launch = memory_rates()
    bandwidth = max(copy, add)
    link, collectives = fit_link(collective_times())
    return Hardware(
        name="cpu",
        memory_bytes=int(memory_gib * 2**30),
        allocator_margin=0.1,
        peak_flops={name: three_digits(peak) for name, peak in peaks.items()},
        memory_bandwidth=three_digits(bandwidth),
        host_link_bandwidth=three_digits(copy / 2),
        launch_overhead_s=three_digits(launch),
        links=(link,),
        rates=Rates(
            matmul=matmul_points(rates, peaks["float32"]),
            attention={"sdpa": AttentionRate(round(forward / peaks["float32"], 3), round(backward / peaks["float32"], 3))},
            pointwise=round(min(copy, add) / bandwidth, 3),
            collectives=collectives,
        ),
        sources=(
            f"Measured by benchmarks/measure_cpu.py: one thread per process, {RANKS} gloo processes, PyTorch {torch.__version__}, "
            f"{platform.machine()} with {os.cpu_count()} cores.",
        ),
    )


def main() -> None:
    """Measure, print and, on request, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memory_gib", type=float, default=10.0, help="memory that one process may use")
    parser.add_argument("--write", type=Path, default=None, help="JSON file to write")
    args = parser.parse_args()
    content = to_json(measure(args.memory_gib))
    print(content)
    if args.write is not None:
        args.write.write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
