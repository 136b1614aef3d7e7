"""One attention layer with the sequence split over CPU processes: all-gather, all-to-all over heads, and magi attention.

    python benchmarks/magi_modes.py            # a table: 2 and 4 processes, three masks
    python benchmarks/magi_modes.py --write    # and kept in benchmarks/results/magi_modes.json

`gather`: keys and values of all ranks come to each; a rank has a piece from the front and one from the back, which balances causal masks.
`heads`: the ranks exchange, so that each has all rows of some heads, and exchange back. `magi 0`, `magi 1`: the rows that are needed, in
one blocking exchange, or while the rank's own keys are computed. All run the same kernel over the same cells. Milliseconds: forward and
backward, the slowest rank, the least of `REPEATS` runs. MB: received by the rank that receives most, forward and backward. Each `ratio` is
to `gather`. `apart`: the largest difference of the output from that of `gather`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from jobs import keep, machine
from torch import Tensor

from seqloom.magi import masks
from seqloom.magi.attention import Runtime, attend
from seqloom.magi.exchange import plan_exchange
from seqloom.magi.key import DistAttnRuntimeKey, make_key, runtime_of
from seqloom.magi.mask import AttnMask
from seqloom.magi.slices import Slices
from seqloom.runtime.collectives import all_gather, all_to_all

ROOT = Path(__file__).resolve().parents[1]
ROWS, HEADS, KV_HEADS, DIM = 4096, 8, 4, 64
RANKS, REPEATS, ELEMENT = (2, 4), 5, 4
DOCUMENTS = (1024, 256, 1024, 128, 640, 256, 768)
MASKS: dict[str, AttnMask] = {
    "causal": masks.packed([0, ROWS]),
    "packed causal": masks.packed([0, *np.cumsum(DOCUMENTS).tolist()]),
    "window of 512": masks.sliding_window([0, ROWS], 511),
}
Layer = Callable[[Tensor, Tensor, Tensor], Tensor]


def main() -> None:
    """Measure both numbers of processes and print a table; with `--figures` be one of the processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="keep the figures in results/magi_modes.json")
    parser.add_argument("--figures", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.figures is not None:
        measure(args.figures)
        return
    where = machine()
    cases = [case for ranks in RANKS for case in started(ranks)]
    print(f"{'ranks':>5} {'mask':15}{'mode':10}{'ms':>9}{'ratio':>7}{'MB':>8}{'ratio':>7}{'apart':>10}")
    for case in cases:
        times = f"{case['ms']:9.1f}{case['ms_ratio']:7.2f}{case['megabytes']:8.2f}{case['megabytes_ratio']:7.2f}"
        print(f"{case['ranks']:5} {case['mask']:15}{case['mode']:10}{times}{case['apart']:10.1e}")
    if args.write:
        shape = {"rows": ROWS, "heads": HEADS, "kv_heads": KV_HEADS, "head_dim": DIM, "dtype": "float32", "threads_a_process": 1}
        content = {"machine": where, "torch": torch.__version__, **shape, "repeats": REPEATS, "cases": cases}
        keep("magi_modes", content)


def started(ranks: int) -> list[dict[str, Any]]:
    """The figures of a run on so many processes."""
    with tempfile.TemporaryDirectory(prefix="seqloom-modes-") as folder:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"]
        subprocess.run([*launch, __file__, "--figures", folder], check=True, cwd=ROOT, env=environment)
        return json.loads(Path(folder, "figures.json").read_text(encoding="utf-8"))


def measure(folder: Path) -> None:
    """Every mask and mode on this process; rank 0 leaves the figures in `folder`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(ROWS, heads, DIM, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    cases: list[dict[str, Any]] = []
    for name, mask in MASKS.items():
        found = []
        for mode, (layer, rows, received) in modes(mask, rank, ranks).items():
            milliseconds, output = timed(layer, [x.index_select(0, rows) for x in whole])
            mine = torch.zeros(ROWS, HEADS, DIM).index_copy_(0, rows, output)
            dist.all_reduce(mine)
            found.append({"ranks": ranks, "mask": name, "mode": mode, "ms": milliseconds, "megabytes": received / 1e6, "output": mine})
        for case in found:
            case["ms_ratio"], case["megabytes_ratio"] = (case[unit] / found[0][unit] for unit in ("ms", "megabytes"))
            case["apart"] = float((case["output"] - found[0]["output"]).abs().max())
        cases += [{key: rounded(x) for key, x in case.items() if key != "output"} for case in found]
    if rank == 0:
        (folder / "figures.json").write_text(json.dumps(cases), encoding="utf-8")
    dist.destroy_process_group()


def rounded(x: Any) -> Any:
    """A figure with five digits."""
    return float(f"{x:.5g}") if isinstance(x, float) else x


def timed(layer: Layer, local: list[Tensor]) -> tuple[float, Tensor]:
    """Milliseconds forward and backward on the slowest rank, and the output."""
    *inputs, grad = local
    seconds = []
    for _ in range(REPEATS + 1):  # the first plans, allocates and connects
        leaves = [x.detach().requires_grad_() for x in inputs]
        dist.barrier()
        start = time.perf_counter()
        output = layer(*leaves)
        output.backward(grad)
        slowest = torch.tensor(time.perf_counter() - start)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        seconds.append(float(slowest))
    return 1e3 * min(seconds[1:]), output.detach()


# --- modes: what each computes, which rows a rank has, and the bytes that the busiest rank receives ------------------------------


def modes(mask: AttnMask, rank: int, ranks: int) -> dict[str, tuple[Layer, Tensor, float]]:
    """The layer of every mode, the global rows of this rank, and bytes received by the rank that receives most."""
    pair = 2 * KV_HEADS * DIM * ELEMENT  # a row of keys and values
    foreign = (ranks - 1) * ROWS // ranks  # rows that a rank does not have
    through = foreign // ranks * DIM * ELEMENT * (2 * HEADS + 2 * KV_HEADS)  # query, key, value and output change hands
    found = {
        "gather": (*gather(mask, rank, ranks), 2.0 * foreign * pair),  # the gradients come as the rows did
        "heads": (*heads(mask, rank, ranks), 2.0 * through),
    }
    for degree in (0, 1):
        key = make_key(mask, HEADS, KV_HEADS, DIM, dist.group.WORLD, degree=degree, chunk_size=64)
        exchange = plan_exchange(mask, key.dispatch)
        busiest = max(2 * came + gone for came, gone in zip(exchange.received_rows, exchange.sent_rows, strict=True))
        found[f"magi {degree}"] = (*magi(key), float(busiest * pair))  # rows come twice, and the gradients of those sent
    return found


def gather(mask: AttnMask, rank: int, ranks: int) -> tuple[Layer, Tensor]:
    """All keys and values on every rank."""
    size = ROWS // (2 * ranks)
    pieces = [[range(n * size, (n + 1) * size) for n in (r, 2 * ranks - 1 - r)] for r in range(ranks)]
    order = torch.tensor([row for own in pieces for piece in own for row in piece])
    bands = []
    for place, piece in enumerate(pieces[rank]):
        cut = [band.cut(q_start=piece.start, q_end=piece.stop) for band in mask.bands]
        bands += [band.shifted(place * size - piece.start, 0) for band in cut if band is not None]
    runtime = Runtime(2 * size, tuple(bands), (), Slices(), None)
    sorted_rows = order.argsort()

    def layer(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys = all_gather(torch.stack((key, value), 1), 0, dist.group.WORLD, partial_grad=True).index_select(0, sorted_rows)
        return attend(query, *keys.unbind(1), None, runtime, DIM**-0.5)[0]

    return layer, order[rank * 2 * size : (rank + 1) * 2 * size]


def heads(mask: AttnMask, rank: int, ranks: int) -> tuple[Layer, Tensor]:
    """All rows of some heads on every rank."""
    runtime = Runtime(ROWS, mask.bands, (), Slices(), None)

    def layer(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        whole = (all_to_all(x, 1, 0, dist.group.WORLD) for x in (query, key, value))
        return all_to_all(attend(*whole, None, runtime, DIM**-0.5)[0], 0, 1, dist.group.WORLD)

    return layer, torch.arange(ROWS // ranks) + rank * (ROWS // ranks)


def magi(key: DistAttnRuntimeKey) -> tuple[Layer, Tensor]:
    """The rows that are needed on every rank."""
    runtime = runtime_of(key, torch.device("cpu"), torch.float32, DIM, False)

    def layer(query: Tensor, keys: Tensor, value: Tensor) -> Tensor:
        return attend(query, keys, value, None, runtime, DIM**-0.5)[0]

    return layer, torch.from_numpy(np.ascontiguousarray(key.dispatch.position_ids(key.rank)))


if __name__ == "__main__":
    main()
