"""The benchmarks for one GPU one after the other, unattended: each has eight minutes, and where one fails the next runs all the same.

    python benchmarks/gpu/all.py                       # all, kept in benchmarks/results/gpu
    python benchmarks/gpu/all.py --only kernels,longest --folder /tmp/figures
    python benchmarks/gpu/all.py --toy                 # smoke runs

Each script's output is printed and kept beside its result, in NAME.log. Ends with a line for each, and code 1 where one failed.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results" / "gpu"
LIMIT_S = 480.0
MARGIN_S = 20.0  # a script is told to be done so long before it is ended
SCRIPTS = {  # in the order in which their figures are wanted most; FOLDER is where results are kept
    "rehearse_8b_128k": ("rehearse_8b_128k.py",),
    "hardware": ("hardware.py",),
    "rehearse_measured": ("rehearse_8b_128k.py", "--hardware", "FOLDER/measured.json"),  # the planner with what was measured just now
    "kernels": ("kernels.py",),
    "head_to_head": ("head_to_head.py",),
    "head_to_head_loss": ("head_to_head.py", "--loss"),
    "longest": ("longest.py",),
}


def main() -> int:
    """Run the scripts; 1 where one failed or took too long."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SCRIPTS), help="names with commas")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where results and logs are kept")
    parser.add_argument("--limit_s", type=float, default=LIMIT_S, help="seconds of each")
    parser.add_argument("--toy", action="store_true", help="toy size, as always without a GPU")
    args = parser.parse_args()
    unknown = sorted({*args.only.split(",")} - {*SCRIPTS})
    if unknown:
        parser.error(f"there is no {unknown[0]}: use {', '.join(SCRIPTS)}")
    args.folder.mkdir(parents=True, exist_ok=True)
    told = [run(name, args.folder, args.limit_s, args.toy) for name in args.only.split(",")]
    print("\n" + "\n".join(f"{name:<18} {seconds:>5.0f} s  {outcome}" for name, seconds, outcome in told))
    return int(any(outcome != "done" for _, _, outcome in told))


def run(name: str, folder: Path, limit_s: float, toy: bool) -> tuple[str, float, str]:
    """One script: its name, its seconds, how it ended."""
    script, *flags = (word.replace("FOLDER", str(folder)) for word in SCRIPTS[name])
    words = [*flags, "--out", str(folder / f"{name}.json"), "--limit_s", str(max(1.0, limit_s - MARGIN_S)), *(["--toy"] if toy else [])]
    print(f"\n== {name}", flush=True)
    began = time.monotonic()
    with (folder / f"{name}.log").open("w+", encoding="utf-8") as log:
        command = [sys.executable, "-u", str(HERE / script), *words]
        child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = child.wait(limit_s)
            outcome = "done" if code == 0 else f"failed with code {code}"
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGTERM)  # it ends the process that it started, too
            outcome = f"ended after {limit_s:.0f} s"
        try:
            child.wait(10.0)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        log.seek(0)
        print(log.read(), flush=True)
    return name, time.monotonic() - began, outcome


if __name__ == "__main__":
    sys.exit(main())
