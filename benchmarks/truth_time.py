"""Predicted against measured step time: plans of a small Llama on two processes of this machine.

    python benchmarks/truth_time.py              # profile, compile, run, compare
    python benchmarks/truth_time.py --write      # and keep the result in benchmarks/results/truth_time.json

The machine is profiled on the spot by two processes; every plan is compiled with that file and run as a training run runs it, two gloo
processes that torchrun starts, one thread each. The steps of the plans take turns, so that other work on the machine meets all of them
alike; of each plan those steps count in which its processes waited least for a core that other work had, and how long that was is told. A
plan's time is the median of those; pairs of plans whose medians differ by less than the spread of their steps have no order to predict.
The last column compares the parts that one rank computes with its processor time, which other work hardly changes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "truth_time.json"
RANKS, SEQ_LEN, BATCH = 2, 1024, 2
STEPS, COUNTED, WARMUP = 8, 5, 2
COMPUTED = ("forward", "backward", "recompute", "optimizer")
MODEL = {
    "vocab_size": 4096,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
    "architectures": ["LlamaForCausalLM"],
}
PLANS: Mapping[str, Mapping[str, Any]] = {
    "sp2 ZeRO 3": {"force": "sp2", "zero": 3, "recompute": "none"},
    "sp2 ZeRO 3, recompute": {"force": "sp2", "zero": 3, "recompute": "all"},
    "sp2 ZeRO 1": {"force": "sp2", "zero": 1, "recompute": "none"},
    "dp2 ZeRO 3": {"force": "dp2", "zero": 3, "recompute": "none"},
    "dp2 ZeRO 0": {"force": "dp2", "zero": 0, "recompute": "none"},
    "tp2": {"force": "tp_plain2", "recompute": "none"},
    "tp2 with sp": {"force": "tp_sp2", "recompute": "none"},
    "tp2 with sp, recompute": {"force": "tp_sp2", "recompute": "all"},
    "sp2 ZeRO 3, bf16": {"force": "sp2", "zero": 3, "recompute": "none", "precision": "bf16"},
}


def main() -> None:
    """Profile, compile, run and compare; with `--folder` be one of the two processes that run the plans."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"keep the result in {RESULT}")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.folder is not None:
        run_plans(args.folder)
        return
    with tempfile.TemporaryDirectory(prefix="seqloom-truth-") as name:
        folder = Path(name)
        torchrun("-m", "seqloom", "profile", "--device", "cpu", "--name", "measured", "--output", str(folder / "machine.json"))
        predicted = compile_plans(folder)
        torchrun(__file__, "--folder", str(folder))
        steps = json.loads((folder / "steps.json").read_text(encoding="utf-8"))
        hardware = json.loads((folder / "machine.json").read_text(encoding="utf-8"))
    result = compare(predicted, steps)
    print("\n".join(table(result)))
    if args.write:
        machine = {"cores": os.cpu_count(), "load": os.getloadavg()[0], "hardware": hardware}
        content = {"model": MODEL, "seq_len": SEQ_LEN, "batch": BATCH, "ranks": RANKS, **result, "machine": machine}
        RESULT.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def torchrun(*words: str) -> None:
    """Run a program on all ranks; its errors are ours."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={RANKS}", "--standalone", *words]
    subprocess.run(command, check=True, cwd=ROOT, env=environment)


def compile_plans(folder: Path) -> dict[str, dict[str, Any]]:
    """Write the model's config, compile every plan with the measured hardware, and return their predictions."""
    from transformers import LlamaConfig

    from seqloom.emit.pipeline import compile_program
    from seqloom.emit.request import CompileRequest

    LlamaConfig(**MODEL, max_position_embeddings=SEQ_LEN).save_pretrained(folder / "model")
    found = {}
    for index, (name, options) in enumerate(PLANS.items()):
        request = CompileRequest(
            model_id=str(folder / "model"),
            seq_len=SEQ_LEN,
            micro_batch_size=BATCH,
            plan_ngpus=RANKS,
            runtime_ngpus=RANKS,
            hardware=str(folder / "machine.json"),
            output_folder=folder,
            name=f"plan{index}",
            **{"precision": "fp32", **options},
        )
        plan = compile_program(request).plan
        found[name] = {"step_s": plan["step_time_s"], "parts_s": plan["time_s"]}
    return found


def run_plans(folder: Path) -> None:
    """One rank: the steps of all plans in turns; rank 0 writes their seconds to `steps.json`."""
    import torch.distributed as dist

    from seqloom.runtime.mesh import init_distributed
    from seqloom.trainer.start import prepare_process

    prepare_process("cpu", deterministic=False)
    device = init_distributed("cpu")
    try:
        steps = {name: training_step(folder, f"plan{index}", options, device) for index, (name, options) in enumerate(PLANS.items())}
        seconds: dict[str, list[tuple[float, ...]]] = {name: [] for name in steps}
        for turn in range(WARMUP + STEPS):
            for name, step in steps.items():
                timed = time_step(step)
                if turn >= WARMUP:
                    seconds[name].append(timed)
        if dist.get_rank() == 0:
            (folder / "steps.json").write_text(json.dumps(seconds), encoding="utf-8")
    finally:
        dist.destroy_process_group()


def time_step(step: Callable[[], object]) -> tuple[float, ...]:
    """Seconds of a step; seconds that a rank waited in it for a core that other work had, and that it computed, means of the ranks."""
    import torch
    import torch.distributed as dist

    from seqloom.cost.measure_clock import waited_seconds

    dist.barrier()
    waited, computed, start = waited_seconds(), time.thread_time(), time.perf_counter()
    step()
    dist.barrier()
    seconds = time.perf_counter() - start
    own = torch.tensor([waited_seconds() - waited, time.thread_time() - computed], dtype=torch.float64)
    dist.all_reduce(own)
    return seconds, *(own / RANKS).tolist()


def training_step(folder: Path, name: str, options: Mapping[str, Any], device: Any) -> Callable[[], object]:
    """A training step of a compiled plan on random tokens, as a function without arguments."""
    import torch

    from seqloom.capture.architecture import resolve_config
    from seqloom.runtime.materialize import materialize
    from seqloom.runtime.mesh import build_mesh
    from seqloom.runtime.optimizer import build_optimizer
    from seqloom.runtime.program import load_program
    from seqloom.runtime.step import TrainStep

    program, config = load_program(folder / name), resolve_config(str(folder / "model"))
    mesh = build_mesh(program.MESH, 1, "cpu")
    dtype = torch.bfloat16 if options.get("precision") == "bf16" else torch.float32
    model = materialize(program, mesh, config, weights=None, seed=0, device=device, compute_dtype=dtype)
    step = TrainStep(model, program, mesh, build_optimizer(model, 1e-4), device, max_grad_norm=1.0)
    generator = torch.Generator().manual_seed(0)

    def run() -> None:
        tokens = torch.randint(0, config.vocab_size, (BATCH, SEQ_LEN + 1), generator=generator)
        float(step([{"input_ids": tokens[:, :-1], "labels": tokens[:, 1:]}]).loss)

    return run


def compare(predicted: Mapping[str, Mapping[str, Any]], steps: Mapping[str, Sequence[Sequence[float]]]) -> dict[str, Any]:
    """Per plan predicted and measured seconds and their ratio; how many pairs of plans come in the predicted order."""
    plans = {name: compare_plan(predicted[name], timed) for name, timed in steps.items()}
    ordered = [pair for pair in itertools.combinations(plans, 2) if tells_apart(plans[pair[0]], plans[pair[1]])]
    wrong = [list(pair) for pair in ordered if not same_order(plans[pair[0]], plans[pair[1]])]
    return {"plans": plans, "pairs": len(ordered), "wrong_pairs": wrong}


def compare_plan(predicted: Mapping[str, Any], timed: Sequence[Sequence[float]]) -> dict[str, Any]:
    """One plan: medians over the steps that count, of (seconds, seconds waited, seconds computed)."""
    counted = sorted(timed, key=lambda step: step[1])[:COUNTED]
    measured, waited, computed = (statistics.median(part) for part in zip(*counted, strict=True))
    return {
        "predicted_s": predicted["step_s"],
        "measured_s": measured,
        "spread_s": statistics.median(abs(step[0] - measured) for step in counted),
        "waited_s": waited,
        "computed_s": computed,
        "ratio": predicted["step_s"] / measured,
        "compute_ratio": sum(predicted["parts_s"][part] for part in COMPUTED) / computed,
        "parts_s": predicted["parts_s"],
        "steps_s": [step[0] for step in counted],
    }


def tells_apart(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    """Whether two measured times differ by more than the spread of their steps."""
    return abs(one["measured_s"] - other["measured_s"]) > one["spread_s"] + other["spread_s"]


def same_order(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    """Whether two plans come in the order that was predicted."""
    return (one["measured_s"] < other["measured_s"]) == (one["predicted_s"] < other["predicted_s"])


def table(result: Mapping[str, Any]) -> list[str]:
    """The comparison in lines of text, fastest first."""
    lines = [f"{'plan':<26} {'predicted':>9} {'measured':>9} {'spread':>7} {'waited':>7} {'ratio':>6} {'compute':>8}"]
    for name, plan in sorted(result["plans"].items(), key=lambda item: item[1]["measured_s"]):
        figures = f"{plan['predicted_s']:>7.3f} s {plan['measured_s']:>7.3f} s {plan['spread_s']:>5.3f} s {plan['waited_s']:>5.3f} s"
        lines.append(f"{name:<26} {figures} {plan['ratio']:>6.2f} {plan['compute_ratio']:>8.2f}")
    far = [name for name, plan in result["plans"].items() if not 1 / 1.3 <= plan["ratio"] <= 1.3]
    lines.append(f"ratios beyond 30%: {', '.join(far) or 'none'}")
    wrong = ", ".join(" / ".join(pair) for pair in result["wrong_pairs"])
    lines.append(f"order: {result['pairs'] - len(result['wrong_pairs'])} of {result['pairs']} pairs that differ by more than their spread")
    return lines + ([f"wrong: {wrong}"] if wrong else [])


if __name__ == "__main__":
    main()
