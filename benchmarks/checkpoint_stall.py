"""How long a training step waits for a checkpoint: saved in the background against saved before the step goes on.

    python benchmarks/checkpoint_stall.py            # a table
    python benchmarks/checkpoint_stall.py --write    # and kept in benchmarks/results/checkpoint_stall.json

One process saves 1 GB of parameters and moments (`checkpoint_digests.py` describes them) through the `Saver` of the trainer. `stall`:
seconds until `save` returns and the next step may change the tensors: in the background those of the copy, whose buffers the first save
makes and the others use again. `steps beside`: seconds of matrix products while the file is written by the thread, over those of the same
products with nothing beside them. Saves in the background and before the step alternate; figures are medians of `REPEATS`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from checkpoint_digests import nbytes, state
from jobs import keep, machine

from seqloom.checkpoint.background import Saver
from seqloom.checkpoint.write import Beside

REPEATS = 7
SIZE, PRODUCTS = 1024, 10


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="keep the figures in results/checkpoint_stall.json")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where to save: choose the disk to measure")
    args = parser.parse_args()
    where = machine()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="seqloom-stall-", dir=args.folder) as folder:
        found = measure(Path(folder))
    print(f"saved before the step goes on   {found['foreground_s']:.3f} s")
    print(f"saved in the background         {found['stall_s']:.3f} s of stall, {found['ratio']:.3f} of that")
    print(f"first save in the background    {found['first_stall_s']:.3f} s: it makes the buffers")
    print(f"steps beside                    {found['steps_beside_ratio']:.2f} x as long while it is written ({found['written_s']:.3f} s)")
    if args.write:
        content = {"machine": where, "torch": torch.__version__, "gigabytes": nbytes() / 1e9, "repeats": REPEATS, **found}
        keep("checkpoint_stall", content)


def measure(folder: Path) -> dict[str, Any]:
    """Seconds that `save` takes either way, and what a save in the background makes of the compute beside it."""
    tensors = state(None)
    savers = {
        background: Saver(folder / str(background), background=background, timeout=timedelta(minutes=5)) for background in (True, False)
    }
    stalls: dict[bool, list[float]] = {True: [], False: []}
    alone, beside, written = [], [], []
    for step in range(1, REPEATS + 2):  # the first of each is a warm-up
        for background, saver in savers.items():
            shutil.rmtree(folder / str(background), ignore_errors=True)
            os.sync()
            alone.append(compute())
            begin = time.perf_counter()
            saver.save(step, tensors, Beside({}))
            stalls[background].append(time.perf_counter() - begin)
            if background:
                while saver.writing:
                    beside.append(compute())
                written.append(time.perf_counter() - begin)
            saver.collect()
    for saver in savers.values():
        saver.close()
    median = {background: statistics.median(seconds[1:]) for background, seconds in stalls.items()}
    figures = {
        "foreground_s": median[False],
        "stall_s": median[True],
        "ratio": median[True] / median[False],
        "first_stall_s": stalls[True][0],
        "written_s": statistics.median(written[1:]),
        "steps_beside_ratio": statistics.median(beside) / statistics.median(alone),
    }
    return {name: float(f"{value:.4g}") for name, value in figures.items()}


def compute() -> float:
    """Seconds of a fixed amount of work."""
    left, right = torch.ones(SIZE, SIZE), torch.ones(SIZE, SIZE)
    begin = time.perf_counter()
    for _ in range(PRODUCTS):
        torch.mm(left, right)
    return (time.perf_counter() - begin) / PRODUCTS


if __name__ == "__main__":
    main()
