"""Loss curves of seqloom over 1 to 8 ranks, split in every way, beside the Trainer of transformers and FSDP2 by hand.

    python benchmarks/loss_alignment.py            # 200 steps of each, fp32 on CPU: a table, and how far the curves are apart at most
    python benchmarks/loss_alignment.py --write    # and kept as benchmarks/results/loss_alignment.json and .png

A small Llama learns the Python standard library's sources, packed by documents: the same weights, rows, order, optimizer and learning rates
in every run. seqloom's runs are those of train.py with attention split by the sequence (`magi`) and by heads; the other two are data
parallel over two processes and take the rows in the order of seqloom's loader. Exits with 1 where a curve is further than `LIMIT` from that
of one rank.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jobs import RESULTS, keep, machine, text_and_model, torchrun

SEQ_LEN, ROWS, SEED = 512, 2, 0
SIZES = {"num_layers": 2, "hidden_size": 64, "intermediate_size": 172, "num_attention_heads": 8, "num_key_value_heads": 8}
LR, WARMUP = 1e-3, 20
LIMIT = 1e-4  # nats


@dataclass(frozen=True)
class Way:
    """How a run is split: train.py's flags, or the loop that stands for seqloom."""

    ranks: int
    attention: str = "auto"
    force: str | None = None
    loop: str | None = None


WAYS = {
    "seqloom, 1 rank": Way(1),
    **{f"magi over {ranks} ranks": Way(ranks, "magi", f"cp{ranks}") for ranks in (2, 4, 8)},
    **{f"heads over {ranks} ranks": Way(ranks, "heads", f"sp{ranks}") for ranks in (2, 4, 8)},
    "transformers Trainer, 2 ranks": Way(2, loop="trainer"),
    "FSDP2 by hand, 2 ranks": Way(2, loop="fsdp2"),
}
ONE = next(iter(WAYS))


def main() -> None:
    """Run every way and compare; with `--loop` be one process of a loop that stands for seqloom."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="steps of every run")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="beside one rank run only what has one of these words")
    parser.add_argument("--write", action="store_true", help=f"keep the result in {RESULTS}")
    parser.add_argument("--loop", choices=("trainer", "fsdp2"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.loop is not None:
        run_loop(args.loop, args.folder, args.steps)
        return
    before = machine()
    ways = {name: way for name, way in WAYS.items() if name == ONE or not args.only or any(word in name for word in args.only)}
    with tempfile.TemporaryDirectory(prefix="seqloom-align-") as name:
        text_and_model(Path(name), SEQ_LEN, **SIZES)
        curves = {way: timed_curve(way, Path(name), args.steps) for way in ways}
    apart = {name: max(abs(a - b) for a, b in zip(curve, curves[ONE], strict=True)) for name, curve in curves.items()}
    largest = max(apart.values())
    print(f"largest difference from one rank, of all steps and runs: {largest:.1e} nats; {largest / LIMIT:.3f} of what is allowed")
    if args.write:
        content = {"machine": before, "steps": args.steps, "seq_len": SEQ_LEN, "rows": ROWS, "sizes": SIZES, "lr": LR}
        keep("loss_alignment", {**content, "largest": largest, "apart": apart, "curves": curves})
        plot(curves, RESULTS / "loss_alignment.png")
    sys.exit(0 if largest <= LIMIT else 1)


def timed_curve(name: str, folder: Path, steps: int) -> list[float]:
    """The losses of a run, told with how long it took."""
    way, begin = WAYS[name], time.perf_counter()
    run = folder / name.replace(" ", "_").replace(",", "")
    if way.loop is None:
        torchrun(way.ranks, "train.py", *flags(way, folder, run, steps))
        lines = (run / "runs" / "default" / "log.jsonl").read_text(encoding="utf-8").splitlines()
        curve = [record["loss"] for record in map(json.loads, lines) if "loss" in record]
    else:
        torchrun(way.ranks, __file__, "--loop", way.loop, "--folder", folder, "--steps", str(steps))
        curve = json.loads((folder / "losses.json").read_text(encoding="utf-8"))
    print(f"{name:<30} loss {curve[0]:.6f} -> {curve[-1]:.6f}   {time.perf_counter() - begin:.0f} s", flush=True)
    return curve


def flags(way: Way, folder: Path, run: Path, steps: int) -> list[str]:
    """The flags of train.py."""
    chosen = {
        "model_id": folder / "model",
        "dataset_path": folder / "data",
        "plan_ngpus": way.ranks,
        "runtime_ngpus": way.ranks,
        "attention": way.attention,
        "micro_batch_size": ROWS,
        "grad_accumulation_steps": 1,
        "hardware": "cpu",
        "precision": "fp32",
        "seed": SEED,
        "lr": LR,
        "warmup_steps": WARMUP,
        "lr_schedule": "linear",
        "max_train_steps": steps,
        "eval_every": 0,
        "output_folder": run / "programs",
        "checkpoint_dir": run / "checkpoints",
        "log_dir": run / "runs",
        **({"force": way.force} if way.force else {}),
    }
    return [word for name, value in chosen.items() for word in (f"--{name}", str(value))]


def run_loop(loop: str, folder: Path, steps: int) -> None:
    """One process of the Trainer or of FSDP2 by hand, on the rows that seqloom's loader gives; the first writes the losses."""
    import os

    import torch.distributed as dist
    from reference_loops import Recipe, fsdp2_steps, joined, train_trainer

    from seqloom.data.loader import Loader, open_dataset

    dist.init_process_group("gloo")
    loader = Loader(open_dataset(folder / "data"), SEED, ROWS, dp_rank=0, dp_size=1, micro_batch_size=ROWS, accumulation=1)
    rows = [{name: x for name, x in loader.next_step()[0].items() if name != "cu_seqlens"} for _ in range(steps)]
    recipe = Recipe(folder / "model", steps, LR, "linear", WARMUP)
    timed = list(fsdp2_steps(recipe, rows.__getitem__)) if loop == "fsdp2" else train_trainer(recipe, joined(rows))
    if dist.get_rank() == 0:
        (folder / "losses.json").write_text(json.dumps([step.loss for step in timed]), encoding="utf-8")
    dist.barrier()
    os._exit(0)  # whatever the Trainer still holds


def plot(curves: Mapping[str, list[float]], path: Path) -> None:
    """All curves in one picture, and how far each is from that of one rank."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, figsize=(9, 7), sharex=True, height_ratios=(2, 1), dpi=120)
    for name, curve in curves.items():
        one, steps = name == ONE, range(1, len(curve) + 1)
        (drawn,) = above.plot(steps, curve, label=name, linewidth=4 if one else 1, alpha=0.4 if one else 1)
        if not one:
            far = [max(abs(a - b), 1e-8) for a, b in zip(curve, curves[ONE], strict=True)]
            below.semilogy(steps, far, label=name, linewidth=1, color=drawn.get_color())
    above.set(ylabel="loss, nats a token", title="One Llama, split in every way: the Python standard library, packed by documents, fp32")
    below.set(xlabel="step", ylabel="distance from one rank")
    below.axhline(LIMIT, color="gray", linestyle=":")
    above.legend(fontsize="small")
    figure.savefig(path, bbox_inches="tight")


if __name__ == "__main__":
    main()
