"""Llama3-8B at 131,072 tokens on eight GPUs, rehearsed on one: what a rank computes in a step, beside what the plan predicts.

    python benchmarks/gpu/rehearse_8b_128k.py                # the plan for the device's description, ranks 7 and 0
    python benchmarks/gpu/rehearse_8b_128k.py --write        # and kept in benchmarks/results/gpu/rehearse_8b_128k.json
    python benchmarks/gpu/rehearse_8b_128k.py --attention_kernel flash3 --ranks 7
    python benchmarks/gpu/rehearse_8b_128k.py --device cpu   # a mini Llama on two ranks, a smoke run

One sequence a step, one micro-batch. The collectives of the other ranks are simulated at their sizes in memory and take no time on a wire,
so times are those of compute, and are compared with what the plan predicts for compute. Where the device runs out of memory the plan is
made once more for a tenth less, and the result says so. Three verdicts: compute of a sequence in at most 4.9 s, prediction of the time
within 15%, of the peak memory within 10%; each for the worse rank.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from workbench import (
    OUT_OF_MEMORY,
    Bench,
    add_flags,
    be_child,
    bench,
    brief,
    compile_plan,
    facts,
    hardware_for,
    run_child,
    table,
    toy_model,
)

COMPUTE_S, TIME_WITHIN, MEMORY_WITHIN = 4.9, 0.15, 0.10
SEQ_LEN, PLAN_RANKS = 131072, 8
TOY_SEQ_LEN, TOY_RANKS = 256, 2
STEPS = 5
LESS = 0.9  # of the memory, for the second try
COMPILE_S = 150.0
PARTS = ("forward", "backward", "optimizer")


def main() -> None:
    """Compile, rehearse each rank in a process of its own, compare; with `--task` be such a process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    parser.add_argument("--ranks", type=int, nargs="+", help="ranks to rehearse; the last and the first when not given")
    parser.add_argument("--steps", type=int, default=STEPS, help="timed steps")
    parser.add_argument("--hardware", help="a description in configs/hardware, or a file; that of the device when not given")
    parser.add_argument("--attention_kernel", help="attention kernel to plan for; the first of the description when not given")
    parser.add_argument("--memory_gib", type=float, help="memory to plan for")
    parser.add_argument("--task", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task is not None:
        be_child(args.task, rehearse_one if "rank" in json.loads(args.task.read_text(encoding="utf-8")) else compile_one)
        return
    run = bench("rehearse_8b_128k", args)
    with tempfile.TemporaryDirectory(prefix="seqloom-rehearse-") as name:
        found = rehearsed(run, Path(name), args)
    found["verdicts"] = verdicts(found)
    run.keep(found)
    print(report(found, run))


def rehearsed(run: Bench, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The plan and what each rank measured; a second plan for less memory where the first does not run."""
    ranks = args.ranks or ([TOY_RANKS - 1, 0] if run.toy else [PLAN_RANKS - 1, 0])
    asked = request(run, folder, args)
    found: dict[str, Any] = {"asked": {key: value for key, value in asked.items() if key != "folder"}, "tries": []}
    for attempt in range(2):
        began = time.monotonic()
        plan = run_child(__file__, asked, min(run.left_s, COMPILE_S))
        print(f"{facts(run.device)['device']}: compiled in {time.monotonic() - began:.0f} s", flush=True)
        found["plan"], found["ranks"] = plan, {}
        if "error" in plan:
            break
        for rank in ranks:
            task = {"folder": asked["folder"], "name": asked["name"], "rank": rank, "device": run.device.type, "steps": args.steps}
            found["ranks"][str(rank)] = run_child(__file__, task, run.left_s)
            run.keep(found)
        short = [rank for rank, one in found["ranks"].items() if one.get("error", "").startswith(OUT_OF_MEMORY)]
        if not short or attempt:
            break
        found["tries"].append({"memory_gib": asked.get("memory_gib"), "plan": plan, "ranks": found["ranks"]})
        asked = {**asked, "name": "less", "memory_gib": LESS * (asked.get("memory_gib") or plan["memory_gib"])}
        print(f"rank {short[0]} ran out of memory: planning for {asked['memory_gib']:.4g} GiB", flush=True)
    return found


def request(run: Bench, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """What is compiled."""
    seq_len, ranks = (TOY_SEQ_LEN, TOY_RANKS) if run.toy else (SEQ_LEN, PLAN_RANKS)
    asked: dict[str, Any] = {
        "folder": str(folder / "programs"),
        "name": "full",
        "model_id": toy_model(folder, seq_len) if run.toy else "llama3_8b",
        "seq_len": seq_len,
        "plan_ngpus": ranks,
        "runtime_ngpus": ranks,
        "precision": run.precision,
        "hardware": hardware_for(run, folder, args.hardware),
        "attention_kernel": args.attention_kernel,
        "memory_gib": args.memory_gib,
    }
    return {key: value for key, value in asked.items() if value is not None}


def compile_one(task: dict[str, Any]) -> dict[str, Any]:
    """Compile: what a result keeps of the plan, and the memory of the description."""
    from seqloom.cost.hardware import load_hardware

    asked = {key: value for key, value in task.items() if key not in ("folder", "answer")}
    plan = compile_plan(Path(task["folder"]), **asked)
    return {**brief(plan), "memory_gib": asked.get("memory_gib") or load_hardware(asked["hardware"]).memory_bytes / 2**30}


def rehearse_one(task: dict[str, Any]) -> dict[str, Any]:
    """Rehearse a rank, as `python -m seqloom rehearse` does: the content of its `rehearsal.json`."""
    from seqloom.runtime import rehearse

    folder = Path(task["folder"]) / task["name"]
    rehearse.run(folder, task["rank"], task["device"], task["steps"])
    return json.loads((folder / rehearse.RESULT).read_text(encoding="utf-8"))


def verdicts(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Target, figure and whether it is met, for the worse rank; None where nothing was measured."""
    done = [one for one in found.get("ranks", {}).values() if "error" not in one]
    step = max((one["step_s"] for one in done), default=None)
    apart = max((abs(one["predicted"]["step_s"] / one["step_s"] - 1) for one in done), default=None)
    peak = max((abs(one["predicted"]["peak_gib"] / one["peak_gib"] - 1) for one in done), default=None)
    named = {
        "compute_s": (COMPUTE_S, step),
        "time_apart": (TIME_WITHIN, apart),
        "peak_apart": (MEMORY_WITHIN, peak),
    }
    return {
        name: {"target": target, "found": figure, "met": None if figure is None else figure <= target}
        for name, (target, figure) in named.items()
    }


def report(found: Mapping[str, Any], run: Bench) -> str:
    """Predicted beside measured by rank, and the verdicts."""
    if "error" in found["plan"]:
        return f"no plan: {found['plan']['error']}"
    plan = found["plan"]
    axes = " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items()) or "one rank"
    lines = [f"{axes}, ZeRO {plan['zero']}, {plan['seq_len']:,} tokens, planned for {plan['hardware']}"]
    rows: list[Sequence[Any]] = []
    for rank, one in found["ranks"].items():
        if "error" in one:
            lines.append(f"rank {rank}: {one['error']}")
            continue
        expected = one["predicted"]
        rows.append((rank, "step", "s", expected["step_s"], one["step_s"], expected["step_s"] / one["step_s"]))
        for part in PARTS:
            predicted, measured = expected["time_s"][part], one["time_s"][part]
            rows.append((rank, f"  {part}", "s", predicted, measured, predicted / measured))
        rows.append((rank, "peak memory", "GiB", expected["peak_gib"], one["peak_gib"], expected["peak_gib"] / one["peak_gib"]))
        rows.append((rank, "  taken by the allocator", "GiB", None, one["reserved_gib"], None))
    if rows:
        lines.append(table(("rank", "", "", "predicted", "measured", "ratio"), rows))
    told = {"compute_s": "compute of a sequence {} s", "time_apart": "time predicted within {:.0%}", "peak_apart": "peak within {:.0%}"}
    for name, verdict in found["verdicts"].items():
        figure = "not measured" if verdict["found"] is None else f"{verdict['found']:.4g}"
        word = {True: "met", False: "NOT met", None: "open"}[verdict["met"]]
        lines.append(f"{word:<8} {told[name].format(verdict['target'])}: {figure}")
    return "\n".join([*lines, "toy size: the verdicts mean nothing"] if run.toy else lines)


if __name__ == "__main__":
    main()
