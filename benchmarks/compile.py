"""How long a compile takes and how much memory, from process start to files written, beside the limits.

    python benchmarks/compile.py                 # all cases, one after the other, on an idle machine
    python benchmarks/compile.py 8b warm         # these cases; warm needs the files of a compile before it, so it makes one first
    python benchmarks/compile.py --write         # all cases, kept in benchmarks/results/compile.json

Every case is a process of its own, `python -m seqloom compile ...`. All but `warm` start from an empty output folder; `warm` compiles once
more with one flag changed. Memory is the most that the process and its children hold at one moment. CPU seconds are steadier than the wall
clock on a shared machine; the limits are for the wall clock of an idle one with 2 cores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "compile.json"
GB = 1e9
SAMPLE_S = 0.02  # how often memory is looked at


@dataclass(frozen=True)
class Case:
    """One compile and its limits in seconds of wall clock and GB; `after` is compiled first into the same folder, unmeasured."""

    model_id: str
    ranks: int
    limit_s: float
    limit_gb: float
    flags: tuple[str, ...] = ()
    after: str | None = None

    @property
    def arguments(self) -> list[str]:
        """The flags of the compile."""
        ranks = str(self.ranks)
        return ["--model_id", self.model_id, "--seq_len", "131072", "--plan_ngpus", ranks, "--runtime_ngpus", ranks, *self.flags]


CASES = {
    "8b": Case("llama3_8b", 8, 30.0, 1.5),
    "warm": Case("llama3_8b", 8, 10.0, 1.5, flags=("--zero", "1"), after="8b"),
    "70b": Case("llama3_70b", 64, 60.0, 3.0),
    "405b": Case("llama3_405b", 512, 90.0, 4.5),
}


def measure(case: Case) -> dict[str, Any]:
    """One compile: its seconds and memory, their ratios to the limits, and where the time went; `error` where there is no plan."""
    with tempfile.TemporaryDirectory() as folder:
        if case.after is not None:
            run(CASES[case.after].arguments, folder)
        load = os.getloadavg()[0]
        found = run(case.arguments, folder)
        plan_file = Path(folder, "default", "plan.json")
        if "error" not in found:
            plan = json.loads(plan_file.read_text(encoding="utf-8"))
            found |= {"stages_s": plan["timings"], "solver": plan["solver"], "mesh": plan["mesh"], "step_time_s": plan["step_time_s"]}
    ratios = {"wall_to_limit": found["wall_s"] / case.limit_s, "memory_to_limit": found["peak_gb"] / case.limit_gb}
    limits = {"limit_s": case.limit_s, "limit_gb": case.limit_gb}
    return {"arguments": case.arguments, "load_before": load, **limits, **ratios, **found}


def run(arguments: list[str], folder: str) -> dict[str, Any]:
    """Compile into `folder`: wall and CPU seconds and peak GB; `error`, the last line that it said, where it fails."""
    command = [sys.executable, "-m", "seqloom", "compile", *arguments, "--output_folder", folder]
    with tempfile.TemporaryFile("w+") as said:
        before, started = os.times(), time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=said)
        peak = 0
        while process.poll() is None:
            peak = max(peak, tree_bytes(process.pid))
            time.sleep(SAMPLE_S)
        after, ended = os.times(), time.perf_counter()
        cpu = after.children_user + after.children_system - before.children_user - before.children_system
        said.seek(0)
        lines = said.read().strip().splitlines()
    found = {"wall_s": ended - started, "cpu_s": cpu, "peak_gb": peak / GB}
    return found if process.returncode == 0 else {**found, "error": lines[-1] if lines else f"exit code {process.returncode}"}


def tree_bytes(pid: int) -> int:
    """Resident bytes of a process and its descendants now; 0 for one that has ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") + sum(tree_bytes(int(child)) for child in children)


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cores": len(os.sched_getaffinity(0)),
        "processor": names[0] if names else platform.machine(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GB, 1),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "transformers", "scipy")},
    }


def report(name: str, found: dict[str, Any]) -> str:
    """Lines about one case."""
    lines = [
        f"{name}: {found['wall_s']:.1f} s wall ({found['wall_to_limit']:.2f} x the limit of {found['limit_s']:g} s), "
        f"{found['cpu_s']:.1f} s CPU, {found['peak_gb']:.2f} GB ({found['memory_to_limit']:.2f} x {found['limit_gb']:g} GB), "
        f"load before {found['load_before']:.1f}"
    ]
    if "error" in found:
        return f"{lines[0]}\n  no plan: {found['error']}"
    stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in found["stages_s"].items())
    solver = found["solver"]
    lines.append(f"  {stages}; {solver['programs']} programs, at most {solver['variables']:,} variables, {solver['status']}")
    lines.append(f"  mesh {found['mesh']}, {found['step_time_s']:.3g} s a step")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and keep the results when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="case", help=f"which of {', '.join(CASES)}; all when not given")
    parser.add_argument("--write", action="store_true", help=f"keep the results of all cases in {RESULT.relative_to(ROOT)}")
    given = parser.parse_args()
    if unknown := [name for name in given.cases if name not in CASES]:
        parser.error(f"there is no case {unknown[0]}: take some of {', '.join(CASES)}")
    if given.write and given.cases:
        parser.error("--write keeps all cases: leave out the names of cases")
    results = {}
    for name in given.cases or CASES:
        results[name] = measure(CASES[name])
        print(report(name, results[name]), flush=True)
    if given.write:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps({"machine": machine(), "cases": results}, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {RESULT.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
