"""seqloom beside the Trainer of transformers with FSDP and an FSDP2 loop by hand: tokens a second and peak memory on two CPU processes.

    python benchmarks/side_by_side.py                      # 1K, 4K and 16K tokens, fp32
    python benchmarks/side_by_side.py --lengths 1024       # one of them
    python benchmarks/side_by_side.py --write              # and kept in benchmarks/results/side_by_side.json

One small Llama, one batch: two rows of random tokens a step. The two loops give a row to each process; seqloom's planner splits what it
wants, by a profile of this machine that two processes take first. Every figure comes from processes of their own (`--rounds` jobs for each
system and length, taking turns, one thread each). A step's time is from the end of the step before it to its own, the first `WARMUP` left
out; the half of the steps counts in which the process waited least for a core that other work had, and the median of these is told, with
the seconds that they waited, and that processors worked for the process, which other work on the machine hardly changes. Memory is the
peak resident set of a process, and how much of it came after its imports; of ranks and jobs the largest.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jobs import RESULTS, keep, machine, torchrun

RANKS, ROWS, WARMUP = 2, 2, 1
SYSTEMS = ("seqloom", "fsdp2", "trainer")
STEPS = {1024: 12, 4096: 6, 16384: 3}  # of one job
MODEL = {
    "vocab_size": 4096,
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}


def main() -> None:
    """Profile, compile, run and compare; with `--system` be one process of a job."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=list(STEPS), help="tokens of a row")
    parser.add_argument("--rounds", type=int, default=2, help="jobs for each system and length")
    parser.add_argument("--steps", type=int, help=f"steps of a job; {STEPS} by length when not given")
    parser.add_argument("--hardware", help="a name in configs/hardware or a file, in place of a profile of this machine")
    parser.add_argument("--write", action="store_true", help=f"keep the result in {RESULTS / 'side_by_side.json'}")
    parser.add_argument("--system", choices=SYSTEMS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.system is not None:
        run(args.system, args.folder, args.lengths[0], args.steps)
        return
    found = {"machine": machine(), "model": MODEL, "ranks": RANKS, "rows": ROWS, "lengths": {}}
    with tempfile.TemporaryDirectory(prefix="seqloom-side-") as name:
        folder = Path(name)
        prepare(folder, args.lengths)
        hardware = args.hardware or str(folder / "machine.json")
        if args.hardware is None:
            torchrun(RANKS, "-m", "seqloom", "profile", "--device", "cpu", "--name", "measured", "--output", hardware)
        for length in args.lengths:
            found["lengths"][length] = compare(folder, length, hardware, args.steps or STEPS.get(length, 4), args.rounds)
            if args.write:
                keep("side_by_side", found)


def compare(folder: Path, length: int, hardware: str, steps: int, rounds: int) -> dict[str, dict[str, Any]]:
    """The figures of every system at a length, told line by line."""
    plan = compiled(folder, length, hardware)
    jobs: dict[str, list[dict[str, Any]]] = {system: [] for system in SYSTEMS}
    for turn in range(rounds * len(SYSTEMS)):
        system = SYSTEMS[turn % len(SYSTEMS)]
        torchrun(RANKS, __file__, "--system", system, "--folder", folder, "--lengths", str(length), "--steps", str(steps))
        jobs[system].append(json.loads((folder / "job.json").read_text(encoding="utf-8")))
    found = {system: figures(jobs[system], length) for system in SYSTEMS}
    found["seqloom"].update(plan)
    print(f"{length:,} tokens, {ROWS} rows; seqloom: {plan['plan']}")
    for system, own in found.items():
        print(line(system, own, found["fsdp2"]), flush=True)
    return found


def prepare(folder: Path, lengths: list[int]) -> None:
    """Write the model, weights and all."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**MODEL, max_position_embeddings=max(lengths))).save_pretrained(folder / "model")


def compiled(folder: Path, length: int, hardware: str) -> dict[str, Any]:
    """Compile the best plan for a length; says what it is and the step time it predicts."""
    from seqloom.emit.pipeline import compile_program
    from seqloom.emit.request import CompileRequest

    sizes = {"micro_batch_size": ROWS, "grad_accumulation_steps": 1, "plan_ngpus": RANKS, "runtime_ngpus": RANKS, "precision": "fp32"}
    request = CompileRequest(
        model_id=str(folder / "model"), seq_len=length, hardware=hardware, output_folder=folder, name=f"p{length}", **sizes
    )
    plan = compile_program(request).plan
    axes = " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items())
    return {"plan": f"{axes}, ZeRO {plan['zero']}", "predicted_s": plan["step_time_s"]}


def run(system: str, folder: Path, length: int, steps: int) -> None:
    """One process of a job; the first writes the steps and the memory of all."""
    import torch
    import torch.distributed as dist
    from reference_loops import Recipe, joined, random_rows, train_fsdp2, train_trainer

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    recipe = Recipe(folder / "model", steps)
    rows = [random_rows(MODEL["vocab_size"], ROWS, length, seed) for seed in range(steps)]
    before = peak_mib()
    if system == "seqloom":
        timed = train_seqloom(recipe, folder / f"p{length}", rows)
    elif system == "fsdp2":
        timed = train_fsdp2(recipe, rows.__getitem__)
    else:
        timed = train_trainer(recipe, joined(rows))
    memory = torch.tensor([peak_mib(), peak_mib() - before], dtype=torch.float64)
    dist.all_reduce(memory, op=dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        content = {"steps": [asdict(step) for step in timed[WARMUP:]], "peak_mib": memory[0].item(), "grown_mib": memory[1].item()}
        (folder / "job.json").write_text(json.dumps(content), encoding="utf-8")
    dist.barrier()
    os._exit(0)  # whatever the Trainer still holds


def train_seqloom(recipe: Any, program_folder: Path, rows: list[dict[str, Any]]) -> list[Any]:
    """The emitted program's steps."""
    import torch
    from reference_loops import Stopwatch, Timed

    from seqloom.capture.architecture import resolve_config
    from seqloom.runtime.materialize import materialize
    from seqloom.runtime.mesh import build_mesh
    from seqloom.runtime.optimizer import build_optimizer
    from seqloom.runtime.program import load_program
    from seqloom.runtime.step import TrainStep

    program, device = load_program(program_folder), torch.device("cpu")
    mesh, config = build_mesh(program.MESH, 1, "cpu"), resolve_config(str(recipe.folder))
    model = materialize(program, mesh, config, weights=recipe.folder, seed=0, device=device, compute_dtype=torch.float32)
    step = TrainStep(model, program, mesh, build_optimizer(model, recipe.lr, recipe.betas), device, recipe.max_grad_norm)
    watch = Stopwatch()
    return [Timed(step([batch]).loss.item(), *watch.lap()) for batch in rows]


def peak_mib() -> float:
    """The largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def figures(jobs: list[dict[str, Any]], length: int) -> dict[str, Any]:
    """Of all jobs of a system: the median of the least disturbed half of the steps, and the largest memory."""
    steps = sorted((step for job in jobs for step in job["steps"]), key=lambda step: step["waited"] / step["seconds"])
    counted = steps[: (len(steps) + 1) // 2]
    seconds = statistics.median(step["seconds"] for step in counted)
    return {
        "step_s": seconds,
        "tokens_per_s": ROWS * length / seconds,
        "waited_s": statistics.median(step["waited"] for step in counted),
        "worked_s": statistics.median(step["worked"] for step in counted),
        "peak_mib": max(job["peak_mib"] for job in jobs),
        "grown_mib": max(job["grown_mib"] for job in jobs),
        "loss": jobs[0]["steps"][-1]["loss"],
        "steps_s": [step["seconds"] for step in counted],
    }


def line(name: str, own: Mapping[str, Any], hand: Mapping[str, Any]) -> str:
    """A system's figures beside those of the loop by hand."""
    ratio, memory = own["tokens_per_s"] / hand["tokens_per_s"], own["peak_mib"] / hand["peak_mib"]
    times = f"step {own['step_s']:.3f} s (waited {own['waited_s']:.3f}, worked {own['worked_s']:.3f})"
    space = f"peak {own['peak_mib']:,.0f} MiB  {memory:.2f} x  grown {own['grown_mib']:,.0f} MiB"
    return f"  {name:<8} {own['tokens_per_s']:>8,.0f} tokens/s  {ratio:.2f} x fsdp2  {times}  {space}  loss {own['loss']:.6f}"


if __name__ == "__main__":
    main()
