"""What dispatch and exchange of attention masks cost on the host, and what they save beside the area-only rule.

    python benchmarks/magi_dispatch.py            # a table
    python benchmarks/magi_dispatch.py --write    # and kept in benchmarks/results/magi_dispatch.json

Host time is that of one rank for one mask: `plan_dispatch`, `plan_exchange` and the rank's own plan, from a mask made before; the least of
`REPEATS`, of the wall clock and of CPU time, which is steadier on a shared machine. Rows are the part of those that an all-gather of keys
and values would move; balance is the largest rank's cells over the mean; the predicted step is of one layer, forward and backward, on H100s
with the shapes of Llama3-8B.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from seqloom.magi.dispatch import plan_dispatch
from seqloom.magi.exchange import plan_exchange
from seqloom.magi.mask import AttnMask
from seqloom.magi.masks import packed, prefix_lm, sliding_window

RESULT = Path(__file__).resolve().parent / "results" / "magi_dispatch.json"
REPEATS = 15
DOCUMENTS_16K = (4096, 1024, 4096, 512, 2560, 1024, 3072)


@dataclass(frozen=True)
class Case:
    """One mask over `ranks` ranks; `limit_ms` of host time where there is one."""

    mask: Callable[[], AttnMask]
    ranks: int
    chunk_size: int | None = None
    limit_ms: float | None = None


def documents(total: int, count: int) -> list[int]:
    """Cumulative lengths of `count` documents with log-normal lengths, as text has them; the same ones every time."""
    lengths = np.random.default_rng(0).lognormal(7.5, 1.0, count)
    lengths = np.maximum((lengths / lengths.sum() * total).astype(int), 1)
    lengths[-1] += total - lengths.sum()
    return [0, *np.cumsum(lengths).tolist()]


CASES = {
    "causal 16K": Case(lambda: packed([0, 16384]), 8, 256),
    "packed 16K": Case(lambda: packed([0, *np.cumsum(DOCUMENTS_16K).tolist()]), 8, 256),
    "window of 512, 4K": Case(lambda: sliding_window([0, 4096], 512), 8, 64),
    "prefix 16K": Case(lambda: prefix_lm([0, 16384], [4096]), 8, 256),
    "causal 128K": Case(lambda: packed([0, 2**17]), 8, limit_ms=10.0),
    "packed 128K, 40 documents": Case(lambda: packed(documents(2**17, 40)), 8, limit_ms=10.0),
    "window of 4K, 128K": Case(lambda: sliding_window([0, 2**17], 4096), 8, limit_ms=10.0),
    "causal 1M": Case(lambda: packed([0, 2**20]), 64, limit_ms=100.0),
    "packed 1M, 300 documents": Case(lambda: packed(documents(2**20, 300)), 64, limit_ms=100.0),
    "packed 1M, 300 documents, window of 1K": Case(lambda: sliding_window(documents(2**20, 300), 1024), 64),
}


def host_seconds(mask: AttnMask, case: Case) -> tuple[float, float]:
    """The least seconds of planning: wall clock and CPU."""
    walls, cpus = [], []
    for _ in range(REPEATS):
        wall, cpu = time.perf_counter(), time.process_time()
        exchange = plan_exchange(mask, plan_dispatch(mask, case.ranks, case.chunk_size))
        exchange.ranks[case.ranks // 2]  # made when read
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return min(walls), min(cpus)


def measure(case: Case) -> dict[str, Any]:
    """Host time, and both algorithms' balance, rows and predicted seconds."""
    mask = case.mask()
    wall, cpu = host_seconds(mask, case)
    found: dict[str, Any] = {"ranks": case.ranks, "host_ms": 1e3 * wall, "host_cpu_ms": 1e3 * cpu, "load_before": os.getloadavg()[0]}
    if case.limit_ms is not None:
        found["limit_ms"] = case.limit_ms
    for algorithm in ("auto", "area"):
        dispatch = plan_dispatch(mask, case.ranks, case.chunk_size, algorithm)
        exchange = plan_exchange(mask, dispatch)
        found["chunk_size"] = dispatch.chunk_size
        found[algorithm] = {
            "balance": dispatch.balance,
            "rows_of_all_gather": exchange.share_of_all_gather,
            "predicted_ms": 1e3 * dispatch.predicted_s,
        }
    return found


def main() -> None:
    """Measure every case, print a line for each, and keep them with `--write`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"keep the figures in {RESULT.name}")
    write = parser.parse_args().write
    columns = f"{'mask':40}{'ranks':>6}{'host ms':>9}{'CPU ms':>8}{'limit':>7}"
    print(f"{columns}   {'balance, rows, predicted ms':>30}   {'the same by area only':>30}")
    results = {}
    for name, case in CASES.items():
        found = results[name] = measure(case)
        shown = [
            f"{found[key]['balance']:8.4f}{found[key]['rows_of_all_gather']:9.4f}{found[key]['predicted_ms']:13.3f}"
            for key in ("auto", "area")
        ]
        limit = f"{case.limit_ms:7.0f}" if case.limit_ms else " " * 7
        print(f"{name:40}{case.ranks:6}{found['host_ms']:9.2f}{found['host_cpu_ms']:8.2f}{limit}   {shown[0]}   {shown[1]}")
    if write:
        machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
        rounded = json.loads(json.dumps(results), parse_float=lambda text: float(f"{float(text):.5g}"))
        RESULT.write_text(json.dumps({"machine": machine, "numpy": np.__version__, "cases": rounded}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
