"""What the trainer's loop costs beside the steps themselves: tokens a second of `train_on` over those of the bare emitted step.

    python benchmarks/trainer_loop.py            # two CPU processes; prints the ratio
    python benchmarks/trainer_loop.py --write    # and kept in benchmarks/results/trainer_loop.json

A run of the trainer (data, logging, no evaluation, no checkpoints) trains a small Llama on the Python standard library's sources. After
every `BLOCK` steps of the loop it is stopped for as many bare steps: the same `TrainStep` on the same micro-batches once more, already
prepared, so that the work is the same and other work on the machine meets both alike. The ratio is the median over pairs of neighbouring
blocks, of the half of them in which the process waited least for a core that other work had. The step after each change is not timed: the
next data are read beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from jobs import keep, machine, text_and_model, torchrun
from reference_loops import Lap, Stopwatch

RANKS, SEQ_LEN, BLOCK = 2, 1024, 5


def main() -> None:
    """Make data and model, run, compare; with `--folder` be one of the processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=48, help="pairs of blocks")
    parser.add_argument("--hidden_size", type=int, default=256, help="width of the model")
    parser.add_argument("--write", action="store_true", help="keep the result in benchmarks/results/trainer_loop.json")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.folder is not None:
        train(args.folder, args.pairs)
        return
    before = machine()
    with tempfile.TemporaryDirectory(prefix="seqloom-loop-") as name:
        folder = Path(name)
        prepare(folder, args.hidden_size)
        torchrun(RANKS, __file__, "--folder", folder, "--pairs", str(args.pairs))
        blocks = json.loads((folder / "blocks.json").read_text(encoding="utf-8"))
    found = compare(blocks)
    print(f"trainer's loop  {found['loop_tokens_per_s']:,.0f} tokens/s    bare step  {found['bare_tokens_per_s']:,.0f} tokens/s")
    low, high = found["quartiles"]
    print(f"ratio           {found['ratio']:.3f}  (quartiles {low:.3f} and {high:.3f} of {found['pairs']} pairs)")
    print(f"work            {found['work_ratio']:.3f}  the same ratio in processor seconds of the process, which other work hardly changes")
    print(f"waited          {found['waited_share']:.1%} of the time for a core that other work had")
    if args.write:
        keep("trainer_loop", {"machine": before, "ranks": RANKS, "seq_len": SEQ_LEN, "hidden_size": args.hidden_size, **found})


def prepare(folder: Path, hidden_size: int) -> None:
    """Data and model as a user makes them."""
    text_and_model(folder, SEQ_LEN, num_layers=4, hidden_size=hidden_size, num_attention_heads=8, num_key_value_heads=4)


def train(folder: Path, pairs: int) -> None:
    """One process of the run; the first writes its blocks."""
    from seqloom.trainer import loop
    from seqloom.trainer.config import TrainConfig, parse

    flags = {
        "model_id": folder / "model",
        "dataset_path": folder / "data",
        "output_folder": folder / "programs",
        "checkpoint_dir": folder / "checkpoints",
        "log_dir": folder / "runs",
        "plan_ngpus": RANKS,
        "runtime_ngpus": RANKS,
        "hardware": "cpu",
        "precision": "fp32",
        "grad_accumulation_steps": 1,
        "eval_every": 0,
        "max_train_steps": (BLOCK + 1) * (pairs + 1) + 1,
    }
    config = parse(TrainConfig, "train.py", [word for name, value in flags.items() for word in (f"--{name}", str(value))])
    plain, found = loop.build, []

    def build(*args: Any) -> Any:
        run = plain(*args)
        found.append(Interleaved(run))
        return dataclasses.replace(run, train_step=found[0])

    with mock.patch.object(loop, "build", build):
        loop.train(config)
    if os.environ["RANK"] == "0":
        (folder / "blocks.json").write_text(json.dumps(found[0].blocks), encoding="utf-8")


class Interleaved:
    """Stands in for the run's step; every so often it does bare steps first. `blocks`: (seconds, waited, worked) of loop and bare step."""

    def __init__(self, run: Any) -> None:
        self._step, self._calls, self._watch = run.train_step, 0, Stopwatch()
        self._seen: deque[Sequence[Any]] = deque(maxlen=BLOCK)
        self.blocks: list[tuple[Lap, Lap]] = []

    def __call__(self, micro_batches: Sequence[Any]) -> Any:
        """One step of the loop."""
        place = self._calls % (BLOCK + 1)
        if place == 0 and self._calls:
            in_loop = self._watch.lap()
            self._step(self._seen[0])
            self._watch.lap()
            for seen in self._seen:
                self._step(seen).loss.item()
            self.blocks.append((in_loop, self._watch.lap()))
        elif place == 1:
            self._watch.lap()
        self._calls += 1
        self._seen.append(micro_batches)
        return self._step(micro_batches)


def compare(blocks: Sequence[Sequence[Sequence[float]]]) -> dict[str, Any]:
    """Medians over the less disturbed half of the pairs."""

    def waited_share(pair: Sequence[Sequence[float]]) -> float:
        return sum(lap[1] for lap in pair) / sum(lap[0] for lap in pair)

    counted = sorted(blocks, key=waited_share)[: (len(blocks) + 1) // 2]
    ratios = sorted(bare[0] / loop[0] for loop, bare in counted)
    loop, bare = (statistics.median(pair[side][0] for pair in counted) for side in (0, 1))
    quarter = len(ratios) // 4
    return {
        "ratio": statistics.median(ratios),
        "work_ratio": statistics.median(bare[2] / loop[2] for loop, bare in blocks),
        "quartiles": [ratios[quarter], ratios[-1 - quarter]],
        "loop_tokens_per_s": BLOCK * SEQ_LEN / loop,
        "bare_tokens_per_s": BLOCK * SEQ_LEN / bare,
        "waited_share": statistics.median(map(waited_share, counted)),
        "pairs": len(counted),
        "blocks": blocks,
    }


if __name__ == "__main__":
    main()
