"""What digests cost: 1 GB saved and loaded with them and without, on this machine's disk.

    python benchmarks/checkpoint_digests.py            # a table
    python benchmarks/checkpoint_digests.py --write    # and kept in benchmarks/results/checkpoint_digests.json

One process with one thread saves parameters and two moments of a small model and loads them into other tensors. Without digests: the same
code with a hash that looks at nothing, and `verify=False`. Cases: `save` flushes to the disk, as it always does; `load, disk` reads files
that are not in the page cache (they are dropped from it first), as a resumed job does; `load, memory` reads them from the page cache, where
there is nothing to hide the hashing behind. With and without alternate, so that a change of the machine's load meets both alike; seconds
are the least of `REPEATS`, and `ratio` is with over without. A load with digests also tells the system that it reads in order. What it is
meant to be: under 1.05 for save and load, where the disk and not the copying takes the time.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jobs import keep, machine

from seqloom.checkpoint import digest
from seqloom.checkpoint.read import load_checkpoint
from seqloom.checkpoint.write import save_checkpoint

LAYERS, ROWS, COLUMNS, STATES = 20, 4096, 1024, 3
REPEATS = 20


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="keep the figures in results/checkpoint_digests.json")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where to save: choose the disk to measure")
    args = parser.parse_args()
    where = machine()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="seqloom-digests-", dir=args.folder) as folder:
        cases = measure(Path(folder))
    print(f"{'':14}{'with s':>9}{'without s':>11}{'ratio':>8}{'GB/s with':>11}")
    for name, case in cases.items():
        print(f"{name:14}{case['with_s']:9.3f}{case['without_s']:11.3f}{case['ratio']:8.3f}{case['gb_per_s_with']:11.2f}")
    if args.write:
        content = {"machine": where, "torch": torch.__version__, "hash": digest.HASH, "gigabytes": nbytes() / 1e9, "repeats": REPEATS}
        keep("checkpoint_digests", {**content, "cases": cases})


def nbytes() -> int:
    """Bytes of all tensors."""
    return LAYERS * STATES * ROWS * COLUMNS * 4


def state(fill: float | None) -> dict[str, torch.Tensor]:
    """Parameters and two moments: random, or full of one value."""
    names = [f"{kind}.{layer}" for layer in range(LAYERS) for kind in ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq")]
    return {name: torch.randn(ROWS, COLUMNS) if fill is None else torch.full((ROWS, COLUMNS), fill) for name in names}


def measure(folder: Path) -> dict[str, dict[str, float]]:
    """Seconds of each case with and without digests."""
    tensors, targets = state(None), state(0.0)
    kept = save_checkpoint(folder / "kept", 1, tensors, {})
    cases: dict[str, Callable[[bool], float]] = {
        "save": lambda verify: save_seconds(folder / "run", tensors, verify),
        "load, disk": lambda verify: load_seconds(kept, targets, verify, cold=True),
        "load, memory": lambda verify: load_seconds(kept, targets, verify, cold=False),
    }
    found = {}
    for name, case in cases.items():
        seconds: dict[bool, list[float]] = {True: [], False: []}
        for number in range(2 * REPEATS):
            verify = number % 4 in (0, 3)
            seconds[verify].append(case(verify))
        found[name] = figures(seconds)
    return found


def figures(seconds: Mapping[bool, list[float]]) -> dict[str, Any]:
    """The least of each, and their ratio."""
    best = {verify: min(runs) for verify, runs in seconds.items()}
    rounded = {
        "with_s": best[True],
        "without_s": best[False],
        "ratio": best[True] / best[False],
        "gb_per_s_with": nbytes() / 1e9 / best[True],
    }
    medians = {"median_ratio": statistics.median(seconds[True]) / statistics.median(seconds[False])}
    return {key: float(f"{value:.4g}") for key, value in (rounded | medians).items()}


def save_seconds(run: Path, tensors: Mapping[str, torch.Tensor], verify: bool) -> float:
    """One save to the disk, which is empty of it before."""
    shutil.rmtree(run, ignore_errors=True)
    os.sync()
    begin = time.perf_counter()
    with hashing(verify):
        save_checkpoint(run, 1, tensors, {})
    return time.perf_counter() - begin


def load_seconds(folder: Path, tensors: Mapping[str, torch.Tensor], verify: bool, cold: bool) -> float:
    """One load; `cold` drops the files from the page cache before."""
    for path in folder.glob("*.safetensors") if cold else ():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    begin = time.perf_counter()
    load_checkpoint(folder, tensors, verify=verify)
    return time.perf_counter() - begin


class NoHash:
    """In place of a block's hash: takes bytes and looks at none."""

    def update(self, data: memoryview) -> None:
        """Take bytes."""

    def hexdigest(self) -> str:
        """A digest that is none."""
        return "0" * 32


@contextmanager
def hashing(on: bool) -> Iterator[None]:
    """Within it, saves hash or do not."""
    before = digest.new_block_hash
    digest.new_block_hash = before if on else NoHash
    try:
        yield
    finally:
        digest.new_block_hash = before


if __name__ == "__main__":
    main()
