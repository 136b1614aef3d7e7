"""seqloom beside the Trainer of transformers with FSDP and an FSDP2 loop by hand: tokens a second and peak memory on two CPU processes.

    python benchmarks/side_by_side.py                      # 1K, 4K and 16K tokens, fp32
    python benchmarks/side_by_side.py --lengths 1024       # one of them
    python benchmarks/side_by_side.py --write              # and kept in benchmarks/results/side_by_side.json

One small Llama, one batch: two rows of random tokens a step. The two loops give a row to each process; seqloom's planner splits what it
wants, by a profile of this machine that two processes take first. The steps of the three take turns in one job, one thread a process, so
that other work on the machine meets all of them alike; the half of the turns counts in which the processes waited least for a core that
other work had, and the median of these is told, with the seconds waited and those that processors worked for the first process. A ratio is
the median over turns. Memory is the peak resident set of a process, and how much of it came after its imports, from a job of each system
by itself; of its ranks the largest.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jobs import RESULTS, keep, machine, torchrun

RANKS, ROWS, WARMUP = 2, 2, 1
SYSTEMS = ("seqloom", "fsdp2", "trainer")
TURNS = {1024: 24, 4096: 12, 16384: 6}
MEMORY_STEPS = 2
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
    """Profile, compile, run and compare; with `--systems` be one process of a job."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=list(TURNS), help="tokens of a row")
    parser.add_argument("--turns", type=int, help=f"timed steps of each system; {TURNS} by length when not given")
    parser.add_argument("--hardware", help="a name in configs/hardware or a file, in place of a profile of this machine")
    parser.add_argument("--write", action="store_true", help=f"keep the result in {RESULTS / 'side_by_side.json'}")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.systems is not None:
        run(args.systems, args.folder, args.lengths[0], args.turns)
        return
    found = {"machine": machine(), "model": MODEL, "ranks": RANKS, "rows": ROWS, "lengths": {}}
    with tempfile.TemporaryDirectory(prefix="seqloom-side-") as name:
        folder = Path(name)
        prepare(folder, args.lengths)
        hardware = args.hardware or str(folder / "machine.json")
        if args.hardware is None:
            torchrun(RANKS, "-m", "seqloom", "profile", "--device", "cpu", "--name", "measured", "--output", hardware)
        for length in args.lengths:
            found["lengths"][length] = compare(folder, length, hardware, args.turns or TURNS.get(length, 4))
            if args.write:
                keep("side_by_side", found)


def compare(folder: Path, length: int, hardware: str, turns: int) -> dict[str, dict[str, Any]]:
    """The figures of every system at a length, told line by line."""
    plan = compiled(folder, length, hardware)
    memory = {system: job(folder, length, [system], MEMORY_STEPS)["memory"] for system in SYSTEMS}
    found = figures(job(folder, length, SYSTEMS, turns + WARMUP)["steps"], length)
    found["seqloom"].update(plan)
    print(f"{length:,} tokens, {ROWS} rows; seqloom: {plan['plan']}")
    for system, own in found.items():
        own.update(memory[system])
        print(line(system, own, memory["fsdp2"]["peak_mib"]), flush=True)
    return found


def job(folder: Path, length: int, systems: Sequence[str], steps: int) -> dict[str, Any]:
    """A job of fresh processes: its steps by system, and its memory."""
    torchrun(RANKS, __file__, "--systems", *systems, "--folder", folder, "--lengths", str(length), "--turns", str(steps))
    return json.loads((folder / "job.json").read_text(encoding="utf-8"))


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


def run(systems: Sequence[str], folder: Path, length: int, turns: int) -> None:
    """One process of a job; the first writes the steps and the memory of all."""
    import torch
    import torch.distributed as dist
    from reference_loops import Recipe, fsdp2_steps, joined, random_rows, train_trainer

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    recipe = Recipe(folder / "model", turns)
    rows = [random_rows(MODEL["vocab_size"], ROWS, length, seed) for seed in range(turns)]
    before = peak_mib()
    makers = {"seqloom": seqloom_steps, "fsdp2": fsdp2_steps}
    loops = {name: make(recipe, rows.__getitem__) for name, make in makers.items() if name in systems}
    steps: dict[str, list[Any]] = {name: [] for name in systems}

    def turn() -> None:
        for name, loop in loops.items():
            steps[name].append(next(loop))

    if "trainer" in systems:
        steps["trainer"] = train_trainer(recipe, joined(rows), between=turn)
    else:
        for _ in range(turns):
            turn()
    memory = torch.tensor([peak_mib(), peak_mib() - before], dtype=torch.float64)
    dist.all_reduce(memory, op=dist.ReduceOp.MAX)
    waited = torch.tensor([[step.waited for step in timed] for timed in steps.values()], dtype=torch.float64)
    dist.all_reduce(waited)
    if dist.get_rank() == 0:
        told = {
            name: [{**asdict(step), "waited": wait} for step, wait in zip(timed, waits, strict=True)]
            for (name, timed), waits in zip(steps.items(), (waited / RANKS).tolist(), strict=True)
        }
        content = {"steps": told, "memory": {"peak_mib": memory[0].item(), "grown_mib": memory[1].item()}}
        (folder / "job.json").write_text(json.dumps(content), encoding="utf-8")
    dist.barrier()
    os._exit(0)  # whatever the Trainer still holds


def seqloom_steps(recipe: Any, rows_of_step: Callable[[int], dict[str, Any]]) -> Iterator[Any]:
    """The emitted program's steps on the rows of all ranks, one each time it is asked."""
    import torch
    from reference_loops import Stopwatch, Timed

    from seqloom.capture.architecture import resolve_config
    from seqloom.runtime.materialize import materialize
    from seqloom.runtime.mesh import build_mesh
    from seqloom.runtime.optimizer import build_optimizer
    from seqloom.runtime.program import load_program
    from seqloom.runtime.step import TrainStep

    program = load_program(recipe.folder.parent / f"p{rows_of_step(0)['labels'].shape[1]}")
    mesh, config, device = build_mesh(program.MESH, 1, "cpu"), resolve_config(str(recipe.folder)), torch.device("cpu")
    model = materialize(program, mesh, config, weights=recipe.folder, seed=0, device=device, compute_dtype=torch.float32)
    step = TrainStep(model, program, mesh, build_optimizer(model, recipe.lr, recipe.betas), device, recipe.max_grad_norm)
    for index in range(recipe.steps):
        watch = Stopwatch()
        yield Timed(step([rows_of_step(index)]).loss.item(), *watch.lap())


def peak_mib() -> float:
    """The largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def figures(steps: Mapping[str, Sequence[Mapping[str, float]]], length: int) -> dict[str, dict[str, Any]]:
    """By system the medians over the less disturbed half of the turns, and the ratio to the loop by hand; warm-ups are left out."""

    def disturbed(turn: Mapping[str, Mapping[str, float]]) -> float:
        return sum(step["waited"] for step in turn.values()) / sum(step["seconds"] for step in turn.values())

    turns = [dict(zip(steps, turn, strict=True)) for turn in zip(*steps.values(), strict=True)][WARMUP:]
    counted = sorted(turns, key=disturbed)[: (len(turns) + 1) // 2]

    def median(system: str, figure: str) -> float:
        return statistics.median(turn[system][figure] for turn in counted)

    return {
        system: {
            "tokens_per_s": ROWS * length / median(system, "seconds"),
            "ratio": statistics.median(turn["fsdp2"]["seconds"] / turn[system]["seconds"] for turn in counted),
            "step_s": median(system, "seconds"),
            "waited_s": median(system, "waited"),
            "worked_s": median(system, "worked"),
            "loss": steps[system][-1]["loss"],
            "steps_s": [turn[system]["seconds"] for turn in counted],
        }
        for system in steps
    }


def line(name: str, own: Mapping[str, Any], peak_by_hand: float) -> str:
    """A system's figures beside those of the loop by hand."""
    times = f"step {own['step_s']:.3f} s (waited {own['waited_s']:.3f}, worked {own['worked_s']:.3f})"
    space = f"peak {own['peak_mib']:,.0f} MiB  {own['peak_mib'] / peak_by_hand:.2f} x  grown {own['grown_mib']:,.0f} MiB"
    return f"  {name:<8} {own['tokens_per_s']:>8,.0f} tokens/s  {own['ratio']:.2f} x fsdp2  {times}  {space}  loss {own['loss']:.6f}"


if __name__ == "__main__":
    main()
