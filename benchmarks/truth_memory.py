"""Predicted against dry run: peak memory, operations and bytes sent of plans at full size, and the parity of every plan.

    python benchmarks/truth_memory.py                 # compile and dry-run every plan; an hour of two cores with --verify
    python benchmarks/truth_memory.py 8b-32k 1b       # plans whose names start so
    python benchmarks/truth_memory.py --verify        # and run every plan small, in fp64 over processes, against the original model
    python benchmarks/truth_memory.py --write         # keep what was found in benchmarks/results/truth_memory.json, plan by plan

Every plan is compiled and run dry by the commands that a user has; ratios are predicted over measured. Memory is meant to be within a
tenth, operations and bytes sent are meant to be equal.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "truth_memory.json"
MOST_RANKS = 16  # that a plan is verified on; one of more is laid over a mesh of two ranks an axis
LLAMA_8B = "--model_id llama3_8b --grad_accumulation_steps 1"
PLANS: Mapping[str, str] = {
    "8b-128k on 8": f"{LLAMA_8B} --seq_len 131072 --plan_ngpus 8",
    "8b-128k on 8, FlashAttention-3": f"{LLAMA_8B} --seq_len 131072 --plan_ngpus 8 --attention_kernel flash3",
    "8b-128k on 8, tp_sp8": f"{LLAMA_8B} --seq_len 131072 --plan_ngpus 8 --force tp_sp8",
    "8b-128k on 8, cp8": f"{LLAMA_8B} --seq_len 131072 --plan_ngpus 8 --force cp8",
    "8b-128k on 16": f"{LLAMA_8B} --seq_len 131072 --plan_ngpus 16",
    "8b-32k on 8, recompute none": f"{LLAMA_8B} --seq_len 32768 --plan_ngpus 8 --recompute none",
    "8b-32k on 8, sp2 and tp4, recompute all": f"{LLAMA_8B} --seq_len 32768 --plan_ngpus 8 --force sp2,tp4 --recompute all",
    "8b-8k on 8, batch 8": f"{LLAMA_8B} --seq_len 8192 --plan_ngpus 8 --micro_batch_size 8",
    "8b-512k on 16": f"{LLAMA_8B} --seq_len 524288 --plan_ngpus 16",
    "8b-1m on 8": f"{LLAMA_8B} --seq_len 1048576 --plan_ngpus 8",
    "1b-32k on 2, ZeRO 1": "--model_id llama3_1b --seq_len 32768 --plan_ngpus 2 --zero 1",
    "1b-32k on 4, ZeRO 2, recompute all": "--model_id llama3_1b --seq_len 32768 --plan_ngpus 4 --zero 2 --recompute all",
    "1b-128k on 1": "--model_id llama3_1b --seq_len 131072 --plan_ngpus 1",
    "70b-128k on 64": "--model_id llama3_70b --seq_len 131072 --plan_ngpus 64 --grad_accumulation_steps 1",
    "405b-128k on 512": "--model_id llama3_405b --seq_len 131072 --plan_ngpus 512 --grad_accumulation_steps 1",
}


def main() -> None:
    """Compile, dry-run, compare; exit with 1 where a plan is further off than it may be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plans", nargs="*", help="beginnings of names; all when none is given")
    parser.add_argument("--verify", action="store_true", help="also run `verify` on every plan")
    parser.add_argument("--write", action="store_true", help=f"keep the results in {RESULT}")
    args = parser.parse_args()
    chosen = [name for name in PLANS if not args.plans or name.startswith(tuple(args.plans))]
    print(f"{'plan':<42}{'mesh':<20}{'storage':<18}{'peak GiB':>9}{'ratio':>7}{'FLOPs':>8}{'bytes':>8}  parity")
    fine = True
    for name in chosen:
        with tempfile.TemporaryDirectory(prefix="seqloom-truth-") as folder:
            found = measure(PLANS[name], Path(folder), args.verify)
        fine = fine and within(found)
        print(line(name, found), flush=True)
        if args.write:
            keep(name, found)
    sys.exit(0 if fine else 1)


def measure(flags: str, folder: Path, verify: bool) -> dict[str, Any]:
    """Compile into `folder` and dry-run: what was planned, and predicted and measured figures with their ratios."""
    words = flags.split()
    ranks = words[words.index("--plan_ngpus") + 1]
    command("compile", *words, "--runtime_ngpus", ranks, folder=folder)
    command("dryrun", folder=folder, codes=(0, 1))
    plan = json.loads((folder / "default" / "plan.json").read_text(encoding="utf-8"))
    dry = json.loads((folder / "default" / "dryrun.json").read_text(encoding="utf-8"))
    predicted, worst = dry["predicted"], max(dry["ranks"], key=lambda rank: rank["peak_gib"])
    found = {
        "flags": flags,
        "mesh": plan["mesh"],
        "storage": plan["storage"],
        "segments": plan["segments"],
        "step_time_s": plan["step_time_s"],
        "predicted": predicted,
        "ranks": dry["ranks"],
        "peak_ratio": predicted["peak_gib"] / worst["peak_gib"],
        "flops_ratio": predicted["flops"] / max(rank["flops"] for rank in dry["ranks"]),
        "bytes_ratio": ratio(predicted["comm_bytes"], worst["comm_bytes"]),
    }
    if verify:
        fewer = ("--ranks_per_axis", "2") if int(ranks) > MOST_RANKS else ()
        said = command("verify", *fewer, folder=folder, codes=(0, 1))
        found["verify"] = next((text for text in reversed(said.splitlines()) if re.search(r"\d", text)), said[-200:])
    return found


def ratio(predicted: Mapping[str, float], measured: Mapping[str, float]) -> float:
    """Of all bytes sent; of the kind of collective that is furthest off where kinds differ."""
    kinds = {*predicted, *measured}
    ratios = [predicted.get(kind, 0.0) / measured[kind] if measured.get(kind) else float("inf") for kind in kinds]
    return max(ratios, key=lambda value: abs(value - 1), default=1.0)


def command(name: str, *words: str, folder: Path, codes: Sequence[int] = (0,)) -> str:
    """Run `python -m seqloom NAME`; return what it printed. Ends this program where it fails."""
    process = subprocess.run(
        [sys.executable, "-m", "seqloom", name, *words, "--output_folder", str(folder)], cwd=ROOT, capture_output=True, text=True
    )
    if process.returncode not in codes:
        sys.exit(f"seqloom {name} {' '.join(words)}: {process.stderr.strip()[-500:]}")
    return process.stdout


def within(found: Mapping[str, Any]) -> bool:
    """Whether a plan's figures are as near as they must be."""
    return abs(found["peak_ratio"] - 1) <= 0.1 and all(abs(found[name] - 1) <= 1e-6 for name in ("flops_ratio", "bytes_ratio"))


def line(name: str, found: Mapping[str, Any]) -> str:
    """One row of the table."""
    mesh = " ".join(f"{axis}{size}" for axis, size in found["mesh"].items()) or "one rank"
    storage = f"ZeRO {found['storage']['zero']}"
    peak = max(rank["peak_gib"] for rank in found["ranks"])
    figures = f"{peak:>9.2f}{found['peak_ratio']:>7.3f}{found['flops_ratio']:>8.4f}{found['bytes_ratio']:>8.4f}"
    return f"{name:<42}{mesh:<20}{storage:<18}{figures}  {found.get('verify', '-')}"


def keep(name: str, found: Mapping[str, Any]) -> None:
    """Put one plan's figures into the file of results, in the order of `PLANS`."""
    known = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.is_file() else {}
    known[name] = found
    ordered = {plan: known[plan] for plan in PLANS if plan in known}
    RESULT.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
