"""A compiled program as the report finds it: Llama3-8B at 131,072 tokens on 8 ranks, as compiled (tests/data/plan_page), and the same with
all that a plan may say beside and with a dry run, a rehearsal and a training run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data" / "plan_page"
LAYERS, BATCHES = 32, 4
OFFLOADED, RECOMPUTED = 4, 16
STATES, LIMIT = 14.957, 73.968


def compiled_program(folder: Path) -> Path:
    """The program's folder right after a compile."""
    shutil.copytree(DATA, folder)
    return folder


def full_program(root: Path, name: str = "llama3_8b_128k") -> Path:
    """The folder of a program with every optional field and file; the training run lies in `root/runs`."""
    folder = compiled_program(root / ".seqloom" / name)
    plan = full_plan()
    write(folder, "plan.json", plan)
    write(folder, "dryrun.json", dry_run(plan))
    write(folder, "rehearsal.json", rehearsal(plan))
    write_run(root / "runs" / name, plan, folder)
    return folder


def write(folder: Path, name: str, document: Mapping[str, Any]) -> None:
    (folder / name).write_text(json.dumps(document), encoding="utf-8")


def plan_as_compiled() -> dict[str, Any]:
    return json.loads((DATA / "plan.json").read_text(encoding="utf-8"))


def full_plan() -> dict[str, Any]:
    plan = plan_as_compiled()
    plan["segments"]["LlamaDecoderLayer"] = segments()
    _add_runners_up(plan["blocks"]["LlamaDecoderLayer"])
    peak = plan["peak_memory_gib"]
    peak.update(gradients=1.62, activations=40.92, working=6.24)
    peak["total"] = sum(value for part, value in peak.items() if part != "total")
    return plan | {
        "flops_per_rank": {"forward": 1.6e15, "backward": 3.6e15, "recompute": 2.2e14},
        "storage": {"zero": 3, "sharded": ["sp"], "replicated": []},
        "host_memory_gib": 12.5,
        "alternatives": alternatives(),
        "binding": {
            "constraint": "compute",
            "sentence": "Arithmetic binds: compute is busy 98% of the step, attention alone 69% of it; 8.3 GiB of memory stay free.",
        },
        "advice": advice(),
        "timeline": timeline(plan["blocks"]),
        "memory_timeline": memory_timeline(),
    }


def segments() -> dict[str, dict[str, Any]]:
    kept = {"keep": LAYERS, "recompute": 0, "selective": 0, "offload": 0, "tiles": 1, "kept": []}
    mlp = kept | {"keep": 8, "recompute": RECOMPUTED, "selective": 8, "tiles": 8, "kept": ["gate_proj", "up_proj"]}
    return {
        "attention_input": kept | {"keep": LAYERS - OFFLOADED, "offload": OFFLOADED},
        "attention": kept,
        "attention_output": kept,
        "mlp": mlp,
    }


def _add_runners_up(rows: list[dict[str, Any]]) -> None:
    operators = [row for row in rows if "operator" in row]
    for index, row in enumerate(operators):
        other = {"sp": "h" if row["strategy"]["sp"] == "l" else "l"}
        row["runner_up"] = {"strategy": other, "extra_s": 0.004 * (index + 1) ** 2} if index % 3 == 0 else None
        row["constants"] = {}


def alternatives() -> list[dict[str, Any]]:
    def other(mesh, zero, sharded, step, peak, reason):
        return {"mesh": mesh, "zero": zero, "sharded": sharded, "step_time_s": step, "peak_memory_gib": peak, "reason": reason}

    return [
        other({"sp": 4, "tp": 2}, 3, ["sp"], 22.4, 66.1, "tensor parallelism adds 1.1 s of collectives a step"),
        other({"tp": 8}, 0, [], 28.7, 71.2, "every layer gathers its activations four times over"),
        other({"sp": 8}, 1, ["sp"], None, 81.4, "the gathered parameters need 7.4 GiB more than there is"),
        other({"dp_shard": 8}, 3, ["dp_shard"], None, None, "one sequence cannot be split over 8 ranks of data parallelism"),
    ]


def advice() -> list[dict[str, Any]]:
    return [
        {"change": "a quarter more memory", "step_time_s": 20.6, "gain": 0.024, "sentence": "The MLP of all layers would be kept."},
        {"change": "twice the GPUs", "step_time_s": 11.1, "gain": 0.47, "sentence": "With 16 ranks the all-to-alls cross the network."},
    ]


def timeline(blocks: Mapping[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Layers one after the other with their all-to-alls between, parameters gathered beside them, then the optimizer."""
    events, now = [], 0.0
    rows = blocks["LlamaDecoderLayer"]
    exchanged = sum(row["forward_s"] for row in rows if "reshard" in row)
    for direction, key in (("forward", "forward_s"), ("backward", "backward_s")):
        computed = sum(row[key] for row in rows if "operator" in row)
        for index in range(LAYERS):
            layer = index if direction == "forward" else LAYERS - 1 - index
            events.append(_event("communication", f"all-gather parameters of layer {layer}", now, 0.0013))
            events.append(_event("compute", f"{direction} layer {layer}", now, computed))
            if layer < OFFLOADED:
                events.append(_event("host", f"{'offload' if key == 'forward_s' else 'fetch'} layer {layer}", now, 0.028))
            now += computed
            events.append(_event("communication", f"all-to-all of layer {layer}", now, exchanged))
            now += exchanged
    events.append(_event("compute", "optimizer", now, 0.0095))
    return events


def _event(lane: str, label: str, start: float, length: float) -> dict[str, Any]:
    return {"lane": lane, "label": label, "start_s": start, "end_s": start + length}


def memory_timeline() -> list[dict[str, Any]]:
    """Activations rise through forward and fall through backward."""
    points, forward, backward = [], 0.0404, 0.113
    for layer in range(LAYERS):
        kept = 40.92 * (layer + 1) / LAYERS
        points.append(_point(f"forward layer {layer}", layer * forward, kept, 2.9, 0.0))
    for done in range(LAYERS):
        kept = 40.92 * (LAYERS - done) / LAYERS
        points.append(_point(f"backward layer {LAYERS - 1 - done}", LAYERS * forward + done * backward, kept, 6.24, 1.62))
    points.append(_point("optimizer", LAYERS * (forward + backward), 0.0, 0.4, 0.0))
    return points


def _point(at: str, time_s: float, activations: float, working: float, gradients: float) -> dict[str, Any]:
    gib = {"states": STATES, "gathered": 1.957, "gradients": gradients, "activations": activations, "working": working}
    return {"at": at, "time_s": time_s, "gib": gib}


def dry_run(plan: Mapping[str, Any]) -> dict[str, Any]:
    peak = plan["peak_memory_gib"]
    parts = {part: value for part, value in peak.items() if part != "total"}
    flops = sum(plan["flops_per_rank"].values())
    predicted = {"peak_gib": peak["total"], "parts_gib": parts, "host_gib": 12.5, "flops": flops, "comm_bytes": plan["comm_bytes"]}

    def rank(index: int) -> dict[str, Any]:
        return {
            "rank": index,
            "peak_gib": 64.1 + index / 10,
            "parts_gib": {part: 0.96 * value for part, value in parts.items()},
            "standing_gib": STATES,
            "host_gib": 12.5,
            "flops": flops,
            "comm_bytes": plan["comm_bytes"],
        }

    return {"ranks": [rank(0), rank(1)], "predicted": predicted}


def rehearsal(plan: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "rank": 0,
        "device": "cuda",
        "device_name": "NVIDIA H100 80GB HBM3",
        "steps": 5,
        "step_s": 1.13 * plan["step_time_s"],
        "time_s": {"forward": 6.1, "backward": 17.6, "optimizer": 0.011},
        "peak_gib": 67.9,
        "predicted": {"step_s": plan["step_time_s"], "peak_gib": plan["peak_memory_gib"]["total"]},
    }


def write_run(run_folder: Path, plan: Mapping[str, Any], folder: Path, steps: int = 200) -> None:
    """A training run's log, later than the plan; its last line was cut off."""
    run_folder.mkdir(parents=True)
    lines = [json.dumps(step_record(plan, step, 1.7 if step == 1 else 1.08 + 0.01 * (step % 3))) for step in range(1, steps + 1)]
    log = run_folder / "log.jsonl"
    log.write_text("\n".join([*lines, '{"step": 201, "lo']), encoding="utf-8")
    later = (folder / "plan.json").stat().st_mtime + 60
    os.utime(log, (later, later))


def step_record(plan: Mapping[str, Any], step: int, slowdown: float) -> dict[str, Any]:
    """A step that took `slowdown` times what was predicted."""
    return {
        "step": step,
        "loss": 2.0 + 9.5 * 0.97**step + 0.05 * (step % 5),
        "step_time_s": plan["step_time_s"] * slowdown,
        "tokens_per_s_per_gpu": plan["tokens_per_s_per_gpu"] / slowdown,
        "mfu_causal": plan["mfu_causal"] / slowdown,
        "memory_gib": 66.2,
    }
