"""What the benchmarks for one GPU share: the device and its facts, a try in a process of its own, compiling, the table, the result file.

Role: `hardware.py`, `kernels.py`, `rehearse_8b_128k.py`, `head_to_head.py` and `longest.py` import it, and through it find seqloom where it
is not installed. A device machine may lack `datasets`, `tyro` and `ruff`: nothing here needs them. Without a GPU all runs at toy size.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]  # seqloom and chunk_linear_cross_entropy, which a bare machine has not installed

import torch  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "gpu"
GIB = 2.0**30
LIMIT_S = 480.0  # of one script, as a run on a lent machine allows
OUT_OF_MEMORY = "out of memory"
HOST_SHARE = 0.7  # of the host memory that is free, which a plan may use
TOY_MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
    "dtype": "float32",
}


@dataclass(frozen=True)
class Bench:
    """A run of a script: where, at what size, where the result goes, when it must be over."""

    name: str
    device: torch.device
    toy: bool
    write: bool
    out: Path | None
    ends: float

    @property
    def left_s(self) -> float:
        """Seconds that are left."""
        return self.ends - time.monotonic()

    @property
    def dtype(self) -> torch.dtype:
        """The type of the computation: bfloat16, but fp32 where a processor would emulate that."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def precision(self) -> str:
        """The same as a flag of the compiler."""
        return "bf16" if self.device.type == "cuda" else "fp32"

    @property
    def place(self) -> Path | None:
        """The file of the result, None where it is not kept."""
        return self.out or (RESULTS / f"{self.name}.json" if self.write else None)

    def keep(self, content: Mapping[str, Any]) -> None:
        """Write the result, with the machine's facts in front. Scripts call it as they go: what was measured survives a kill."""
        place = self.place
        if place is None:
            return
        place.parent.mkdir(parents=True, exist_ok=True)
        staged = place.with_name(place.name + ".part")
        staged.write_text(json.dumps({"machine": facts(self.device), "toy": self.toy, **content}, indent=1) + "\n", encoding="utf-8")
        os.replace(staged, place)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that all scripts have."""
    parser.add_argument("--device", choices=("cuda", "cpu"), help="where; the GPU when not given, the CPU where there is none")
    parser.add_argument("--toy", action="store_true", help="toy size, as always without a GPU")
    parser.add_argument("--write", action="store_true", help=f"keep the result in {RESULTS.relative_to(ROOT)}")
    parser.add_argument("--out", type=Path, help="keep the result in this file")
    parser.add_argument("--limit_s", type=float, default=LIMIT_S, help="begin nothing that would end after so many seconds")


def bench(name: str, args: argparse.Namespace) -> Bench:
    """The run that the flags ask for. Ends the program where a GPU is asked for that is not there."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: --device cuda: this machine has no GPU that PyTorch can use: leave it away to run at toy size on the CPU")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that processes of tries end with this one
    on_gpu = torch.cuda.is_available() and args.device != "cpu"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    return Bench(name, device, args.toy or not on_gpu, args.write, args.out, time.monotonic() + args.limit_s)


def facts(device: torch.device) -> dict[str, Any]:
    """The machine beside a result: the device, its memory, versions, the date."""
    from seqloom.cost.measure_kernels import memory_bytes
    from seqloom.cost.profile import processor

    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else processor(),
        "kind": device.type,
        "memory_gib": memory_bytes(device, 1) / GIB,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        **{package: version(package) for package in ("triton", "transformers", "liger-kernel", "torchtitan", "flash-attn")},
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def version(package: str) -> str | None:
    """The installed version of a package, None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# --- a try in a process of its own -----------------------------------------------------------------------------------------------


def run_child(script: str | Path, task: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
    """What `script --task FILE` found, in a fresh process: its memory is its own, and a crash is a line of the result.

    The answer has `error`, a sentence, where there are no figures: out of memory, out of time, or the last line that the process wrote.
    """
    if timeout_s <= 0:
        return {"error": "no time left"}
    with tempfile.TemporaryDirectory(prefix="seqloom-try-") as name:
        folder = Path(name)
        (folder / "task.json").write_text(json.dumps({**task, "answer": str(folder / "answer.json")}), encoding="utf-8")
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", **os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
        with (folder / "log").open("w") as log:
            command = [sys.executable, str(script), "--task", str(folder / "task.json")]
            child = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                code: int | None = child.wait(timeout_s)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)  # compiler workers too, which would hold the device; also where we are ended
                child.wait()
        return _answer(folder, code, timeout_s)


def _answer(folder: Path, code: int | None, timeout_s: float) -> dict[str, Any]:
    answer = folder / "answer.json"
    if code == 0 and answer.is_file():
        return json.loads(answer.read_text(encoding="utf-8"))
    lines = (folder / "log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    if code is None:
        return {"error": f"took more than {timeout_s:.0f} s", "last_line": lines[-1] if lines else ""}
    if code == -signal.SIGKILL:
        return {"error": f"{OUT_OF_MEMORY} on the host: the system ended the process"}
    return {"error": lines[-1] if lines else f"exit code {code}", "log": lines[-20:]}


def be_child(task_file: Path, work: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Be the process that `run_child` started: do the task, and write what was found, or what was missing."""
    from seqloom.errors import UserError

    task = json.loads(task_file.read_text(encoding="utf-8"))
    try:
        found = work(task)
    except UserError as error:
        found = out_of_memory(error.__cause__) or {"error": str(error)}
    except RuntimeError as error:
        found = out_of_memory(error)
        if found is None:
            raise
    Path(task["answer"]).write_text(json.dumps(found), encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)  # whatever threads of compilers still hold


def out_of_memory(error: BaseException | None) -> dict[str, Any] | None:
    """The answer of a try that ran out of the device's memory; None where `error` is another one."""
    text = str(error)
    memory = isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "ALLOC_FAILED" in text
    return {"error": OUT_OF_MEMORY, "detail": text.splitlines()[0]} if memory else None


# --- compiling ---------------------------------------------------------------------------------------------------------------------


def compile_plan(folder: Path, name: str, **asked: Any) -> dict[str, Any]:
    """Compile a program into `folder/name` and return its plan. Raises `UserError` where nothing fits.

    Where ruff is not installed the program is written as it is: its layout alone is ruff's.
    """
    import seqloom.emit.program as emitted
    from seqloom.emit.pipeline import compile_program
    from seqloom.emit.request import CompileRequest

    if version("ruff") is None:
        emitted.format_source = lambda text: text
    return dict(compile_program(CompileRequest(output_folder=folder, name=name, **asked)).plan)


def brief(plan: Mapping[str, Any]) -> dict[str, Any]:
    """What a result keeps of a plan: how it splits, what it does with activations, what it predicts."""
    names = ("mesh", "zero", "hardware", "seq_len", "step_time_s", "time_s", "peak_memory_gib", "memory_limit_gib", "host_memory_gib")
    return {name: plan.get(name) for name in (*names, "segments", "mfu_causal")}


def hardware_for(bench: Bench, folder: Path, asked: str | None = None) -> str:
    """The description of the device, as a file in `folder`: that of its name, else the one of the nearest memory.

    Its memory is at most what the device has, its host memory what is free here. `asked` names another description, taken as it is.
    """
    from seqloom.cost.hardware import load_hardware
    from seqloom.runtime.rehearse import free_bytes

    here = facts(bench.device)
    name = asked or nearest(here["device"], here["memory_gib"], bench.device.type)
    load_hardware(name)  # a name that does not exist ends here in a sentence
    source = Path(name) if Path(name).is_file() else ROOT / "configs" / "hardware" / f"{name}.json"
    described = json.loads(source.read_text(encoding="utf-8"))
    if asked is None and bench.device.type == "cuda":
        described["memory_bytes"] = min(described["memory_bytes"], int(here["memory_gib"] * GIB))
        described["host_memory_bytes"] = min(described["host_memory_bytes"], int(HOST_SHARE * free_bytes(torch.device("cpu"))))
    file = folder / f"{described['name']}.json"
    file.write_text(json.dumps(described), encoding="utf-8")
    return str(file)


def nearest(device_name: str, memory_gib: float, kind: str) -> str:
    """The name in configs/hardware for a device: `NVIDIA H200` is h200-141gb."""
    files = sorted((ROOT / "configs" / "hardware").glob("*.json"))
    if kind == "cpu":
        return "cpu"
    named = [file.stem for file in files if file.stem.split("-")[0] in device_name.lower()]
    if named:
        return named[0]
    memory = {file.stem: json.loads(file.read_text(encoding="utf-8"))["memory_bytes"] / GIB for file in files if file.stem != "cpu"}
    return min(memory, key=lambda stem: abs(memory[stem] - memory_gib))


def toy_model(folder: Path, seq_len: int, **sizes: Any) -> str:
    """The folder of a config of a Llama for a smoke run."""
    place = folder / "toy_model"
    place.mkdir(parents=True, exist_ok=True)
    config = {**TOY_MODEL, "max_position_embeddings": seq_len, **sizes}
    (place / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(place)


# --- measuring ---------------------------------------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Give memory that nobody uses back, and count the peak anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: torch.device) -> float:
    """The most that tensors took of the device since `release`; on the CPU the largest resident set of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Lines of aligned text; words to the left, figures to the right, `-` for None."""
    cells = [["-" if cell is None else f"{cell:,.4g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    figures = [all(isinstance(row[i], int | float | None) for row in rows) for i in range(len(header))]
    widths = [max(len(line[i]) for line in (header, *cells)) for i in range(len(header))]
    aligned = [
        [cell.rjust(width) if right else cell.ljust(width) for cell, width, right in zip(line, widths, figures, strict=True)]
        for line in (list(header), *cells)
    ]
    return "\n".join("  ".join(line).rstrip() for line in aligned)
