"""The longest sequence that one device trains, beside what the planner predicts: Llama-3.2-1B whole, Llama3-8B as one rank of eight.

    python benchmarks/gpu/longest.py                        # both models; at most 8 minutes
    python benchmarks/gpu/longest.py --write                # and kept in benchmarks/results/gpu/longest.json
    python benchmarks/gpu/longest.py --models llama3_1b     # one of them
    python benchmarks/gpu/longest.py --predict --hardware h100-80gb   # what the plans say, on any machine
    python benchmarks/gpu/longest.py --device cpu           # a mini Llama and a few MiB, a smoke run

The prediction is the longest sequence for which the compiler finds a plan: powers of two first, then eighths between the last that fits
and the next. The measurement goes outward from there, an eighth at a time, each try in a process of its own: longer ones, planned for all
of the device's memory and not only what a plan may use, until one fails; shorter ones until one runs. Eight billion parameters are 128 GB
of states and do not fit one device: 8B is rank 7 of 8 with simulated collectives. Activations stay on the device (`--offload` for host
memory).

A step at such lengths takes minutes, nearly all of it in attention. A try whose step would take too long runs attention within pieces of
4,096 tokens: the same tensors are made and kept, only the operations between distant tokens are left out. `attention` says which it was.
Optimizer states exist before the step, so that one step holds all that training holds.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from workbench import (
    GIB,
    OUT_OF_MEMORY,
    Bench,
    add_flags,
    be_child,
    bench,
    brief,
    compile_plan,
    facts,
    hardware_for,
    peak_gib,
    release,
    run_child,
    synchronize,
    table,
    toy_model,
)

RANKS = {"llama3_1b": 1, "llama3_8b": 8}
POWERS = tuple(2**k for k in range(15, 23))  # 32K to 4M tokens
TOY_POWERS = (256, 512, 1024)
PARTS, TOY_PARTS = 8, 2  # of the way from a power to the next
TOY_GIB = 0.0066
MOST_TRIES, TOY_TRIES = 4, 1  # in one direction
COMPILE_S = 75.0  # on an idle machine; a search that takes longer counts as one that finds nothing
AT_ONCE = 4  # powers; longer ones are looked at only where these fit
TRUE_STEP_S = 30.0  # a predicted step that is longer runs attention in pieces
PIECE, TOY_PIECE = 4096, 16
CORES_A_COMPILE = 3
START_S = 40.0  # of a process before its step, about


def main() -> None:
    """Predict and measure every model; with `--task` compile some lengths, or try one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    parser.add_argument("--models", nargs="+", choices=list(RANKS), default=list(RANKS), help="which models")
    parser.add_argument("--predict", action="store_true", help="only what the plans say")
    parser.add_argument("--offload", action="store_true", help="let plans keep activations in host memory")
    parser.add_argument("--hardware", help="a description in configs/hardware, or a file; that of the device when not given")
    parser.add_argument("--task", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task is not None:
        be_child(args.task, lambda task: compile_many(task) if "lengths" in task else attempt(task))
        return
    run = bench("longest", args)
    print(facts(run.device)["device"], flush=True)
    found: dict[str, Any] = {"offload": args.offload, "models": {}}
    models = ["toy"] if run.toy and not args.predict else args.models
    for index, model in enumerate(models):
        share = run.left_s / (len(models) - index)
        with tempfile.TemporaryDirectory(prefix="seqloom-longest-") as name:
            found["models"][model] = longest(run, Path(name), model, args, time.monotonic() + share)
        run.keep(found)
    print(report(found["models"]))


def longest(run: Bench, folder: Path, model: str, args: argparse.Namespace, ends: float) -> dict[str, Any]:
    """Prediction and measurement of one model."""
    hardware = hardware_for(run, folder, args.hardware)
    asked = {
        "model_id": toy_model(folder, max(TOY_POWERS)) if model == "toy" else model,
        "plan_ngpus": RANKS.get(model, 1),
        "runtime_ngpus": RANKS.get(model, 1),
        "precision": "bf16" if args.predict else run.precision,
        "hardware": hardware,
        "offload": "auto" if args.offload else "none",
        **({"memory_gib": TOY_GIB} if model == "toy" else {}),
    }
    search = Search(run, folder, asked, model == "toy", ends)
    predicted = search.predict()
    found = {"ranks": asked["plan_ngpus"], "predicted": predicted, "plans": search.plans, "tries": search.tries}
    if predicted is not None and not args.predict:
        found |= search.measure(predicted)
    return found


class Search:
    """The search for one model. `plans` and `tries` say what was found by length, in words as in JSON."""

    def __init__(self, run: Bench, folder: Path, asked: Mapping[str, Any], toy: bool, ends: float) -> None:
        self.run, self.folder, self.asked, self.toy, self.ends = run, folder, dict(asked), toy, ends
        self.plans: dict[str, Any] = {}
        self.tries: dict[str, Any] = {}

    @property
    def left_s(self) -> float:
        """Seconds that this model has left."""
        return self.ends - time.monotonic()

    def predict(self) -> int | None:
        """The longest sequence that has a plan; None where the shortest has none."""
        powers = TOY_POWERS if self.toy else POWERS
        for first in range(0, len(powers), AT_ONCE):
            self.compile(powers[first : first + AT_ONCE])
            if not self.fits(powers[min(first + AT_ONCE, len(powers)) - 1]):
                break
        fits = [length for length in powers if self.fits(length)]
        if not fits:
            return None
        last = max(fits)
        if last < max(powers):
            self.compile([length for length in grid(last, self.parts) if length > last])
        return max(length for length in map(int, self.plans) if self.fits(length))

    @property
    def parts(self) -> int:
        """Steps from a power of two to the next."""
        return TOY_PARTS if self.toy else PARTS

    def fits(self, length: int) -> bool:
        """Whether a plan was found."""
        return "error" not in self.plans.get(str(length), {"error": ""})

    def compile(self, lengths: Sequence[int], whole: bool = False) -> None:
        """Compile for these lengths, several at once; `whole` plans for all memory of the device."""
        workers = max(1, (os.cpu_count() or 1) // CORES_A_COMPILE)
        asked = {**self.asked, "memory_gib": whole_memory(self.asked)} if whole else self.asked
        groups = [list(lengths)] if self.toy else [[length] for length in lengths]  # a search that takes too long takes no other along
        tasks = [{"folder": str(self.folder), "asked": asked, "lengths": group} for group in groups]
        limit = min(self.left_s, COMPILE_S)
        with ThreadPoolExecutor(workers) as pool:
            for task, found in zip(tasks, pool.map(lambda task: run_child(__file__, task, limit), tasks), strict=True):
                self.plans.update(found if "error" not in found else {str(length): found for length in task["lengths"]})

    def measure(self, predicted: int) -> dict[str, Any]:
        """Tries outward from the prediction: the longest that ran, and the shortest that did not (None where none was found)."""
        runs = self.attempt(predicted)
        steps = outward(predicted, self.parts, longer=runs)
        for length in steps[: TOY_TRIES if self.toy else MOST_TRIES]:
            if self.left_s < START_S and not self.toy:
                break
            if length > predicted:
                self.compile([length], whole=True)
            if self.attempt(length) != runs:
                break
        ran = [int(length) for length, one in self.tries.items() if "error" not in one]
        failed = [int(length) for length, one in self.tries.items() if one.get("error", "").startswith(OUT_OF_MEMORY)]
        best = max(ran, default=None)
        return {
            "longest": best,
            "shortest_that_failed": min((length for length in failed if length > (best or 0)), default=None),
            "ratio": None if best is None else predicted / best,
        }

    def attempt(self, length: int) -> bool:
        """Whether a step of this length runs; its figures go to `tries`."""
        plan = self.plans.get(str(length), {"error": "not compiled"})
        if "error" in plan:
            self.tries[str(length)] = {"error": f"no plan: {plan['error']}"}
            return False
        true = plan["step_time_s"] < TRUE_STEP_S
        limit = self.asked.get("memory_gib", math.inf) * GIB
        task = {"folder": str(self.folder), "name": str(length), "device": self.run.device.type, "precision": self.asked["precision"]}
        task |= {"piece": None if true else TOY_PIECE if self.toy else PIECE, "limit": limit if limit < math.inf else None}
        one = run_child(__file__, task, self.left_s)
        self.tries[str(length)] = {**one, "attention": "whole" if true else "in pieces", "predicted_gib": plan["peak_memory_gib"]["total"]}
        print(f"  {length:>9,} tokens: {one.get('error') or '{:.4g} GiB'.format(one['peak_gib'])}", flush=True)
        return "error" not in one


def grid(power: int, parts: int) -> list[int]:
    """The lengths from a power of two up to the next, without that one."""
    return [power + power * part // parts for part in range(parts)]


def outward(start: int, parts: int, longer: bool) -> list[int]:
    """Lengths of the grid beyond `start`, nearest first."""
    power = 2 ** int(math.log2(start))
    lengths = sorted({length for scale in (power // 4, power // 2, power, 2 * power) for length in grid(scale, parts)})
    return [length for length in lengths if length > start] if longer else [length for length in reversed(lengths) if length < start]


def whole_memory(asked: Mapping[str, Any]) -> float:
    """GiB to plan for so that a plan may use all of what the description has."""
    from seqloom.cost.hardware import load_hardware

    hardware = load_hardware(asked["hardware"])
    return asked.get("memory_gib", hardware.memory_bytes / GIB) / (1 - hardware.allocator_margin)


# --- in a process of its own ---------------------------------------------------------------------------------------------------------


def compile_many(task: Mapping[str, Any]) -> dict[str, Any]:
    """Compile for several lengths: by length a plan in brief, or the error that refuses it."""
    from seqloom.errors import UserError

    found: dict[str, Any] = {}
    for length in task["lengths"]:
        try:
            found[str(length)] = brief(compile_plan(Path(task["folder"]), str(length), seq_len=length, **task["asked"]))
        except UserError as error:
            found[str(length)] = {"error": str(error)}
    return found


def attempt(task: Mapping[str, Any]) -> dict[str, Any]:
    """One step of the last rank of the program: the most that it takes of the device, and its seconds."""
    from seqloom.capture.architecture import config_of
    from seqloom.emit import fingerprint as prints
    from seqloom.emit.pipeline import DTYPES
    from seqloom.runtime.initialize import fill_buffers
    from seqloom.runtime.live_bytes import LiveBytes
    from seqloom.runtime.materialize import storage
    from seqloom.runtime.mesh import build_mesh
    from seqloom.runtime.optimizer import build_optimizer, model_and_optimizer_tensors
    from seqloom.runtime.parity import random_batches
    from seqloom.runtime.phases import run_step
    from seqloom.runtime.program import load_program
    from seqloom.runtime.rehearse import fill_at_random
    from seqloom.runtime.simulated import simulated_job

    folder, device = Path(task["folder"]) / task["name"], torch.device(task["device"])
    program, config = load_program(folder), config_of(prints.read(folder)["config"])
    if task["piece"] is not None and hasattr(program, "attention"):
        program.attention = within_pieces(program.attention, task["piece"])
    ranks = math.prod(program.MESH.values())
    with simulated_job(ranks - 1, ranks):
        mesh = build_mesh(program.MESH, 1, device.type)
        model = storage(program, mesh, torch.float32, DTYPES[task["precision"]])
        model.to_empty(device=device)
        fill_at_random(model, device)
        fill_buffers(model, config)
        optimizer = build_optimizer(model, lr=1e-4)
        states = list(model_and_optimizer_tensors(model, optimizer, initialize=True).values())
        batches = random_batches(config, *program.SHAPES["input_ids"], 1, 0)
        live = LiveBytes()
        release(device)
        start = time.perf_counter()
        if device.type == "cuda":
            run_step(model, program, mesh, optimizer, batches, device, lambda _: None)
            synchronize(device)
            peak = peak_gib(device)
        else:
            with live, live.resizes():
                live.hold([*states, *model.buffers()], "states")
                run_step(model, program, mesh, optimizer, batches, device, live.enter)
            peak = live.peak / GIB
        seconds = time.perf_counter() - start
    over = task["limit"] is not None and peak * GIB > task["limit"]
    return {"peak_gib": peak, "step_s": seconds, **({"error": OUT_OF_MEMORY} if over else {})}


def within_pieces(attention: Callable[..., Tensor], piece: int) -> Callable[..., Tensor]:
    """Attention in which a token sees those of its own piece only: views of the same tensors `[b, h, l, e]`, pieces as a batch."""

    def pieces(x: Tensor) -> Tensor:  # [b, h, l, e] -> [b * l / piece, h, piece, e]
        return x.unflatten(2, (-1, piece)).transpose(1, 2).flatten(0, 1)

    def local(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        length = query.shape[2]
        if length != key.shape[2] or length % piece or options.get("query_start"):
            return attention(query, key, value, *args, **options)
        output = attention(pieces(query), pieces(key), pieces(value), *args, **options)
        return output.unflatten(0, (query.shape[0], -1)).transpose(1, 2).flatten(2, 3)

    return local


def report(models: Mapping[str, Mapping[str, Any]]) -> str:
    """Predicted beside measured, a line for each model."""
    rows = []
    for name, found in models.items():
        tried = found["tries"].get(str(found.get("longest")), {})
        figures = (found["predicted"], found.get("longest"), found.get("shortest_that_failed"), found.get("ratio"))
        rows.append((name, found["ranks"], *figures, tried.get("peak_gib"), tried.get("attention") or ""))
    return table(("model", "ranks", "predicted", "longest that ran", "shortest that failed", "ratio", "peak GiB", "attention"), rows)


if __name__ == "__main__":
    main()
