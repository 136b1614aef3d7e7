"""What several benchmarks share: jobs of processes that torchrun starts, and what is told of the machine beside a result."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def torchrun(ranks: int, *words: str | Path) -> None:
    """Run a program on so many ranks of one thread each, quietly; where it fails, its last words are printed and the error raised."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        print(done.stdout[-6000:], file=sys.stderr)
        done.check_returncode()


def machine() -> dict[str, Any]:
    """The machine, and how many processes were at work on it when this was called."""
    return {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(), "load_before": os.getloadavg()[0]}


def keep(name: str, content: dict[str, Any]) -> None:
    """Write a result to `results/<name>.json`."""
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def text_and_model(folder: Path, seq_len: int, pack: str = "documents", **sizes: int) -> None:
    """`folder/data`: part of the Python standard library's sources in rows of `seq_len`; `folder/model`: a Llama of these sizes for it."""
    from seqloom.capture.mini_model import Sizes, create_mini_model
    from seqloom.data.prepare import prepare

    with contextlib.redirect_stdout(None):
        prepare("stdlib", "train:2048", str(folder / "data"), seq_len, max_documents=200, pack=pack)
        create_mini_model("llama3_8b", str(folder / "model"), sizes=Sizes(**sizes), dataset_path=str(folder / "data"))
