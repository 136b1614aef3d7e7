"""Llama-3.2-1B on one GPU at 8K, 32K and 128K tokens: seqloom beside transformers and torchtitan, tokens a second and peak memory.

    python benchmarks/gpu/head_to_head.py                      # every length and contender; about 7 minutes
    python benchmarks/gpu/head_to_head.py --write              # and kept in benchmarks/results/gpu/head_to_head.json
    python benchmarks/gpu/head_to_head.py --lengths 8192       # one length
    python benchmarks/gpu/head_to_head.py --loss --write       # loss curves in bf16 instead, in head_to_head_loss.json
    python benchmarks/gpu/head_to_head.py --device cpu         # a mini Llama, a smoke run

Each contender trains one sequence of random tokens a step, in a process of its own: steps of warm-up, then the median of a few. seqloom
runs the program compiled for one rank, activations kept on the GPU (`--offload` lets its plan use host memory); its plan uses the memory
there is, and that of `seqloom_lean`, which runs where time is left, no more than transformers took. `huggingface` is the model of
transformers in bf16 throughout, weights, gradients and moments, with PyTorch's attention, gradient checkpointing and its own loss;
`huggingface_fp32` has fp32 weights under autocast, as precise as seqloom's masters, and runs where time is left; torchtitan runs where it
is installed. A contender that runs out of memory is told as that.

`--loss` trains 50 steps from the same weights on the same text. The reference computes in bf16 from fp32 masters; a second reference
differs from it in its attention alone, and how far these two are apart is the noise of bf16; a third is autocast. Differences are
relative.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from contenders import CONTENDERS, chain_of_tokens, config_fields, config_folder, random_tokens, write_weights
from workbench import (
    GIB,
    Bench,
    add_flags,
    be_child,
    bench,
    facts,
    hardware_for,
    peak_gib,
    release,
    run_child,
    synchronize,
    table,
    toy_model,
)

MODEL = "llama3_1b"
LENGTHS, TOY_LENGTHS = (8192, 32768, 131072), (128,)
WARMUP, STEPS = 2, 4
TIMED_S = 45.0  # of the timed steps of one contender
LEAN = "seqloom_lean"
OPTIONAL = (LEAN, "huggingface_fp32")  # where so many seconds are left:
OPTIONAL_S = 60.0
LEAN_SHARE = 0.95  # of the peak of transformers, which the lean plan may use
LEAST_RATIO = {"huggingface": 1.5, "torchtitan": 1.0}  # tokens a second of seqloom to those of others
LR, LOSS_LR = 1e-5, 3e-4
LOSS_STEPS, LOSS_LENGTH = 50, 4096
TOY_LOSS_STEPS, TOY_LOSS_LENGTH = 6, 64
REFERENCE, SECOND = "reference", "second reference"
CURVES: Mapping[str, Mapping[str, str]] = {
    REFERENCE: {"contender": "huggingface_masters", "attention": "sdpa"},
    "seqloom": {"contender": "seqloom"},
    SECOND: {"contender": "huggingface_masters", "attention": "eager"},
    "autocast": {"contender": "huggingface_fp32", "attention": "sdpa"},
}


def main() -> None:
    """Run every contender at every length, or the loss curves; with `--task` be the process of one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens of a sequence")
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=[*LEAST_RATIO, *OPTIONAL], help="beside seqloom")
    parser.add_argument("--steps", type=int, help="timed steps at most; steps of a curve with --loss")
    parser.add_argument("--loss", action="store_true", help="compare loss curves instead of speed")
    parser.add_argument("--offload", action="store_true", help="let seqloom's plan keep activations in host memory")
    parser.add_argument("--hardware", help="a description in configs/hardware, or a file; that of the device when not given")
    parser.add_argument("--attention_kernel", help="attention kernel to plan for; the first of the description when not given")
    parser.add_argument("--task", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task is not None:
        be_child(args.task, lambda task: curve(task) if "curve" in task else speed(task))
        return
    run = bench("head_to_head_loss" if args.loss else "head_to_head", args)
    print(f"{facts(run.device)['device']}, {MODEL if not run.toy else 'a mini Llama'}", flush=True)
    with tempfile.TemporaryDirectory(prefix="seqloom-head-") as name:
        (compare_losses if args.loss else compare_speed)(run, Path(name), args)


def task_of(run: Bench, folder: Path, args: argparse.Namespace, length: int) -> dict[str, Any]:
    """What every contender is told: the model, the length, and how seqloom is compiled."""
    model = toy_model(folder, max(TOY_LENGTHS)) if run.toy else config_folder(MODEL, folder / "model")
    asked = {"model_id": model, "seq_len": length, "precision": run.precision, "hardware": hardware_for(run, folder, args.hardware)}
    asked |= {"offload": "auto" if args.offload else "none"}
    asked |= {"attention_kernel": args.attention_kernel} if args.attention_kernel else {}
    return {"folder": str(folder), "length": length, "device": run.device.type, "compile": asked, "lr": LR, "config": config_fields(model)}


# --- speed ---------------------------------------------------------------------------------------------------------------------------


def compare_speed(run: Bench, folder: Path, args: argparse.Namespace) -> None:
    """Every contender at every length, those that are optional last; the result is kept after each."""
    lengths = args.lengths or (TOY_LENGTHS if run.toy else LENGTHS)
    found: dict[str, Any] = {"model": MODEL if not run.toy else "toy", "precision": run.precision, "lengths": {str(n): {} for n in lengths}}
    names = ["seqloom", *(name for name in args.contenders if name != "seqloom")]
    if "torchtitan" in names and importlib.util.find_spec("torchtitan") is None:
        print("torchtitan is not installed: skipped")
        names.remove("torchtitan")
    cases = [(length, name) for late in (False, True) for length in lengths for name in names if (name in OPTIONAL) == late]
    for length, name in cases:
        task = task_of(run, folder, args, length)
        task |= {"contender": name, "steps": args.steps or (2 if run.toy else STEPS), "warmup": 1 if run.toy else WARMUP}
        if name in OPTIONAL and not run.toy and run.left_s < OPTIONAL_S:
            one: dict[str, Any] = {"error": "no time left"}
        elif name == LEAN and "peak_gib" not in found["lengths"][str(length)].get("huggingface", {}):
            one = {"error": "transformers did not run: there is no peak to stay below"}
        else:
            if name == LEAN:
                task["compile"] |= {"memory_gib": lean_memory(task["compile"], found["lengths"][str(length)]["huggingface"]["peak_gib"])}
            one = run_child(__file__, task, run.left_s)
        found["lengths"][str(length)][name] = one
        print(f"  {length:>7,} {name}: {told(one)}", flush=True)
        found["verdicts"] = verdicts(found["lengths"])
        run.keep(found)
    print(speed_table(found["lengths"]))
    for verdict in found["verdicts"]:
        print(f"{'met' if verdict['met'] else 'NOT met':<8} {verdict['what']}: {verdict['found']:.3g}")
    if run.toy:
        print("toy size: the verdicts mean nothing")


def lean_memory(asked: Mapping[str, Any], peak_gib: float) -> float:
    """GiB to plan for so that a plan stays below a peak."""
    from seqloom.cost.hardware import load_hardware

    return LEAN_SHARE * peak_gib / (1 - load_hardware(asked["hardware"]).allocator_margin)


def speed(task: Mapping[str, Any]) -> dict[str, Any]:
    """Train and time one contender."""
    device = torch.device(task["device"])
    step, more = CONTENDERS[task["contender"]](task)
    vocab_size, length, seconds = task["config"]["vocab_size"], task["length"], []
    loss = float("nan")
    for index in range(task["warmup"] + task["steps"]):
        if index == task["warmup"]:
            release(device)  # the peak is that of steps, not of what was compiled and tuned before
        rows = random_tokens(vocab_size, length, index)
        synchronize(device)
        start = time.perf_counter()
        loss = float(step(rows))
        synchronize(device)
        seconds.append(time.perf_counter() - start)
        if sum(seconds[task["warmup"] :]) > TIMED_S:
            break
    timed = seconds[task["warmup"] :]
    median = statistics.median(timed)
    reserved = torch.cuda.max_memory_reserved(device) / GIB if device.type == "cuda" else None
    figures = {"tokens_per_s": length / median, "step_s": median, "steps_s": timed, "first_s": seconds[0]}
    return {**figures, "peak_gib": peak_gib(device), "reserved_gib": reserved, "loss": loss, **more}


def told(one: Mapping[str, Any]) -> str:
    """A line of one contender's figures."""
    return one["error"] if "error" in one else f"{one['tokens_per_s']:,.0f} tokens/s, peak {one['peak_gib']:.3g} GiB"


def verdicts(lengths: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Speed and memory of seqloom to those of the others, for what both could run."""
    found = []
    pairs = [("seqloom", name, least) for name, least in LEAST_RATIO.items()] + [(LEAN, "huggingface", LEAST_RATIO["huggingface"])]
    for length, ones in lengths.items():
        for own_name, name, least in pairs:
            own, other = ones.get(own_name, {"error": ""}), ones.get(name, {"error": ""})
            if "error" in own or "error" in other:
                continue
            speed_ratio, memory_ratio = own["tokens_per_s"] / other["tokens_per_s"], own["peak_gib"] / other["peak_gib"]
            at = f"{name} at {int(length):,} tokens"
            found.append(
                {"what": f"{own_name}: at least {least} x the tokens/s of {at}", "found": speed_ratio, "met": speed_ratio >= least}
            )
            found.append({"what": f"{own_name}: less memory than {at}", "found": memory_ratio, "met": memory_ratio < 1})
    return found


def speed_table(lengths: Mapping[str, Mapping[str, Any]]) -> str:
    """Every contender at every length; `x` is seqloom's figure to this one's."""
    rows: list[Sequence[Any]] = []
    for length, ones in lengths.items():
        own = ones.get("seqloom", {})
        for name, one in ones.items():
            if "error" in one:
                rows.append((int(length), name, None, None, None, None, None, one["error"]))
                continue
            faster = own["tokens_per_s"] / one["tokens_per_s"] if "tokens_per_s" in own else None
            smaller = own["peak_gib"] / one["peak_gib"] if "peak_gib" in own else None
            rows.append((int(length), name, one["tokens_per_s"], faster, one["step_s"], one["peak_gib"], smaller, ""))
    return table(("tokens", "contender", "tokens/s", "x", "step s", "peak GiB", "x", "note"), rows)


# --- loss ----------------------------------------------------------------------------------------------------------------------------


def compare_losses(run: Bench, folder: Path, args: argparse.Namespace) -> None:
    """Curves from the same weights on the same text, and how far they are apart."""
    length = (args.lengths or [TOY_LOSS_LENGTH if run.toy else LOSS_LENGTH])[0]
    steps = args.steps or (TOY_LOSS_STEPS if run.toy else LOSS_STEPS)
    task = {**task_of(run, folder, args, length), "lr": LOSS_LR, "steps": steps, "weights": str(folder / "weights")}
    task["compile"] = {**task["compile"], "precision": "bf16"}
    found: dict[str, Any] = {"model": MODEL if not run.toy else "toy", "length": length, "steps": steps, "lr": LOSS_LR, "curves": {}}
    for name, how in CURVES.items():
        found["curves"][name] = run_child(__file__, {**task, **how, "curve": name}, run.left_s)
        print(f"  {name}: {found['curves'][name].get('error') or 'done'}", flush=True)
        found["apart"] = differences(found["curves"])
        run.keep(found)
    curves = found["curves"]
    rows = [
        (name, one.get("losses", [None])[0], one.get("losses", [None])[-1], *found["apart"].get(name, {}).values())
        for name, one in curves.items()
    ]
    print(table(("curve", "first loss", "last loss", "largest", "mean"), [[*row, *[None] * (5 - len(row))] for row in rows]))
    own, noise = (found["apart"].get(name) for name in ("seqloom", SECOND))
    if own and noise and noise["mean"]:
        print(f"seqloom is {own['mean'] / noise['mean']:.3g} x as far from the reference as the second reference is, in the mean")


def curve(task: Mapping[str, Any]) -> dict[str, Any]:
    """The losses of one contender from the common weights, which the first of them writes."""
    if not Path(task["weights"]).is_dir():
        write_weights(task["compile"]["model_id"], Path(task["weights"]))
    step, _ = CONTENDERS[task["contender"]](task)
    vocab_size = task["config"]["vocab_size"]
    return {"losses": [float(step(chain_of_tokens(vocab_size, task["length"], index))) for index in range(task["steps"])]}


def differences(curves: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """The largest and the mean relative difference of every curve to the reference."""
    base = curves.get(REFERENCE, {}).get("losses")
    found = {}
    for name, one in curves.items():
        if base and name != REFERENCE and "losses" in one:
            apart = [abs(loss - true) / abs(true) for loss, true in zip(one["losses"], base, strict=True)]
            found[name] = {"largest": max(apart), "mean": statistics.fmean(apart)}
    return found


if __name__ == "__main__":
    main()
