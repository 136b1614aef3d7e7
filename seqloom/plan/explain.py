"""`python -m seqloom explain`: a plan in words and tables, from its `plan.json`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from seqloom.errors import UserError

PLAN = "plan.json"


def run(folder: Path) -> int:
    """Print the plan in `folder`; return the exit code. Raises `UserError` where there is none."""
    path = folder / PLAN
    if not path.is_file():
        raise UserError(f"there is no {PLAN} in {folder}: compile a program with that --name first")
    print("\n".join(explain(json.loads(path.read_text(encoding="utf-8")))))
    return 0


def explain(plan: Mapping[str, Any]) -> Iterator[str]:
    """The lines of the explanation of a `plan.json`."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items()) or "one rank"
    yield f"mesh {mesh}, {plan['dp']} scale unit{'s' if plan['dp'] > 1 else ''}, ZeRO {plan['zero']}, on {plan['hardware']}"
    yield (
        f"predicted: {plan['step_time_s']:.3g} s a step, {plan['tokens_per_s_per_gpu']:,.0f} tokens/s a device, "
        f"MFU {plan['mfu_causal']:.0%} causal ({plan['mfu_full']:.0%} counting full attention)"
    )
    yield "time in s:     " + ", ".join(f"{part} {seconds:.3g}" for part, seconds in plan["time_s"].items() if seconds)
    memory = plan["peak_memory_gib"]
    parts = ", ".join(f"{part} {gib:.2f}" for part, gib in memory.items() if part != "total")
    yield f"memory in GiB: {memory['total']:.2f} of {plan['memory_limit_gib']:.2f} ({parts})"
    yield "sent a step:   " + (", ".join(f"{kind} {count / 1e9:.2f} GB" for kind, count in plan["comm_bytes"].items()) or "nothing")
    for axis, share in plan["repeated"].items():
        yield f"repeated:      {share:.0%} of the compute runs whole on every rank of {axis}"
    solver = plan["solver"]
    yield (
        f"solver:        {solver['status']}, gap {solver['gap']:.1e}, {solver['programs']} programs of up to "
        f"{solver['variables']} variables in {solver['seconds']:.1f} s"
    )
    for block, rows in plan["blocks"].items():
        yield from _block(block, rows, plan["segments"].get(block, {}))


def _block(block: str, rows: list[Mapping[str, Any]], segments: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    count = next((row["keep"] + row["recompute"] for row in segments.values()), 1)
    yield ""
    yield f"{block} x {count}" if segments else block
    yield f"  {'operator':<28}{'split':<18}{'forward ms':>11}{'backward ms':>13}"
    segment = None
    for row in rows:
        if row.get("segment", segment) != segment and segments:
            segment = row["segment"]
            yield f"  -- {segment}: {'recomputed' if segments[segment]['recompute'] else 'kept'}"
        yield f"  {_title(row):<28}{_split(row):<18}{row['forward_s'] * 1e3:>11.3f}{row['backward_s'] * 1e3:>13.3f}"


def _title(row: Mapping[str, Any]) -> str:
    return row["operator"] if "operator" in row else f"  reshard {row['reshard']}"


def _split(row: Mapping[str, Any]) -> str:
    if "operator" in row:
        return " ".join(f"{letter}@{axis}" for axis, letter in row["strategy"].items()) or "-"
    return f"{row['from']} -> {row['to']}"
