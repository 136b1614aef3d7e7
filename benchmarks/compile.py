"""How long a compile takes and how much memory, from process start to files written.

    python benchmarks/compile.py                 # Llama3-8B, 131,072 tokens, 8 ranks
    python benchmarks/compile.py --write         # and keep the result in benchmarks/results/compile.json

The ratio sets all stages beside the capture, which is `torch.export` of the model and the passes over its graph, in one run; the CPU
seconds are steadier than the wall clock on a shared machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

RESULT = Path(__file__).parent / "results" / "compile.json"
ARGUMENTS = ["--model_id", "llama3_8b", "--seq_len", "131072", "--plan_ngpus", "8", "--runtime_ngpus", "8"]
CHILD = """
import json, resource, sys, time
from pathlib import Path
sys.argv = sys.argv[1:]
from seqloom.cli import main
main()
usage = resource.getrusage(resource.RUSAGE_SELF)
plan = json.loads(Path(sys.argv[-1], "default", "plan.json").read_text())
print(json.dumps({"cpu_s": usage.ru_utime + usage.ru_stime, "peak_gib": usage.ru_maxrss / 2**20, "timings_s": plan["timings"],
                  "solver_s": plan["solver"]["seconds"], "programs": plan["solver"]["programs"]}))
"""


def measure() -> dict:
    """One compile in a process of its own: wall and CPU seconds, peak memory, seconds by stage."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", CHILD, "seqloom", "compile", *ARGUMENTS, "--output_folder", folder]
        started = os.times().elapsed
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        return {"wall_s": os.times().elapsed - started, **json.loads(result.stdout.splitlines()[-1])}


def main() -> None:
    """Measure, print, and keep the result when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"keep the result in {RESULT}")
    write = parser.parse_args().write
    found = measure()
    ratio = sum(found["timings_s"].values()) / found["timings_s"]["capture"]
    print(f"compile: {found['wall_s']:.1f} s wall, {found['cpu_s']:.1f} s CPU, {found['peak_gib']:.2f} GiB at the peak")
    print("stages:  " + ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in found["timings_s"].items()))
    print(f"ratio:   {ratio:.2f} x the capture alone")
    if write:
        import torch

        machine = {
            "cores": os.cpu_count(),
            "processor": platform.machine(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        }
        RESULT.write_text(json.dumps({"arguments": ARGUMENTS, "machine": machine, "ratio_to_capture": ratio, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
