"""`python -m seqloom sweep`: the best plan for every sequence length on every machine, as a table.

In: a model, sequence lengths, numbers of GPUs, machines. Out: a line for each, printed as it is found, and a CSV file where one is asked
for. A sequence length is captured once for all machines.
"""

from __future__ import annotations

import csv
import re
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from seqloom.capture.cache import Cache
from seqloom.capture.warm import read_config
from seqloom.cost.hardware import Hardware, load_hardware
from seqloom.emit.replan import best_plan, capture_regions, plan_words
from seqloom.emit.request import CompileRequest
from seqloom.errors import UserError

SUFFIXES = {"": 1, "K": 2**10, "M": 2**20}
COLUMNS = (  # title, width; all but the machine are numbers and stand to the right
    ("tokens", 6),
    ("GPUs", 5),
    ("hardware", 10),
    ("step s", 9),
    ("tok/s/GPU", 9),
    ("MFU", 6),
    ("GiB", 6),
    ("took s", 6),
)
LEFT = ("hardware",)
WIDTH = 120


@dataclass(frozen=True)
class Sweep:
    """What is swept. `gpus` are the ranks of one scale unit; no two scale units are planned."""

    model_id: str
    seq_lens: tuple[int, ...]
    gpus: tuple[int, ...]
    hardware: tuple[str, ...]
    micro_batch_size: int = 1
    grad_accumulation_steps: int = 1
    precision: str = "bf16"


@dataclass(frozen=True)
class Line:
    """One plan, or in `reason` why there is none; `seconds` is what finding it took."""

    seq_len: int
    gpus: int
    hardware: str
    mesh: str = ""
    storage: str = ""
    modes: str = ""
    step_time_s: float | None = None
    tokens_per_s_per_gpu: float | None = None
    mfu_causal: float | None = None
    peak_memory_gib: float | None = None
    reason: str = ""
    seconds: float = 0.0


def run(asked: Sweep, csv_file: Path | None, write: Callable[[str], None]) -> int:
    """Write the table line by line, and the CSV file after each line; return the exit code: 0 where any plan was found.

    Raises `UserError` for an unknown model or machine, and for a file that cannot be written.
    """
    machines = [load_hardware(name) for name in asked.hardware]
    lines: list[Line] = []
    if csv_file is not None:
        write_csv(csv_file, lines)  # a file that cannot be written is told before the searches
    write(_format([title for title, _ in COLUMNS], "plan, or why there is none"))
    for line in sweep(asked, machines):
        lines.append(line)
        write(_show(line))
        if csv_file is not None:
            write_csv(csv_file, lines)
    return 0 if any(not line.reason for line in lines) else 1


def sweep(asked: Sweep, machines: Sequence[Hardware]) -> Iterator[Line]:
    """A line for every sequence length, machine and number of GPUs, in this order."""
    with tempfile.TemporaryDirectory() as folder:
        cache = Cache(Path(folder))
        config = read_config(asked.model_id, cache)
        for seq_len in asked.seq_lens:
            shape = _request(asked, seq_len, 1)
            regions = None
            for hardware in machines:
                for gpus in asked.gpus:
                    started = time.monotonic()
                    regions = regions or capture_regions(cache, config, shape)
                    try:
                        plan = best_plan(regions, _request(asked, seq_len, gpus), hardware)
                    except UserError as error:
                        reason = str(error).partition(";")[0]
                        yield Line(seq_len, gpus, hardware.name, reason=reason, seconds=time.monotonic() - started)
                        continue
                    yield _line(plan, gpus, time.monotonic() - started)


def _request(asked: Sweep, seq_len: int, gpus: int) -> CompileRequest:
    return CompileRequest(
        model_id=asked.model_id,
        seq_len=seq_len,
        plan_ngpus=gpus,
        runtime_ngpus=gpus,
        micro_batch_size=asked.micro_batch_size,
        grad_accumulation_steps=asked.grad_accumulation_steps,
        precision=asked.precision,
    )


def _line(plan: dict[str, Any], gpus: int, seconds: float) -> Line:
    figures = (plan[name] for name in ("step_time_s", "tokens_per_s_per_gpu", "mfu_causal"))
    return Line(plan["seq_len"], gpus, plan["hardware"], *plan_words(plan), *figures, plan["peak_memory_gib"]["total"], "", seconds)


def _show(line: Line) -> str:
    figures = [
        "" if value is None else format(value, spec)
        for value, spec in (
            (line.step_time_s, ",.3f"),
            (line.tokens_per_s_per_gpu, ",.0f"),
            (line.mfu_causal, ".1%"),
            (line.peak_memory_gib, ".1f"),
            (line.seconds, ".1f"),
        )
    ]
    words = line.reason or ", ".join((line.mesh, line.storage, line.modes))
    return _format([tokens_text(line.seq_len), str(line.gpus), line.hardware, *figures], words)


def _format(cells: Sequence[str], words: str) -> str:
    """Cells under their titles, two blanks apart, and the words in what is left of the line and as many more as they need."""
    start = "".join(
        f"{cell:<{width}}  " if title in LEFT else f"{cell:>{width}}  " for cell, (title, width) in zip(cells, COLUMNS, strict=True)
    )
    indent = sum(width + 2 for _, width in COLUMNS)
    return textwrap.fill(words, WIDTH, initial_indent=start, subsequent_indent=" " * indent)


def write_csv(path: Path, lines: Sequence[Line]) -> None:
    """All fields of all lines, with a header. Raises `UserError` where the file cannot be written."""
    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(field.name for field in fields(Line))
            writer.writerows(astuple(line) for line in lines)
    except OSError as error:
        raise UserError(f"--csv {path} cannot be written ({error.strerror}): give a file in a writable folder") from error


def parse_counts(flag: str, text: str) -> tuple[int, ...]:
    """`8K,32K,1M` -> (8192, 32768, 1048576): whole numbers, K and M are powers of 2. Raises `UserError` for anything else."""
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)([KM]?)", part.strip().upper())
        if not match or int(match[1]) < 1:
            raise UserError(
                f"{flag} {text}: `{part.strip()}` is not a whole number above 0, with K or M where you like, such as 8K or 131072"
            )
        found.append(int(match[1]) * SUFFIXES[match[2]])
    return tuple(found)


def tokens_text(count: int) -> str:
    """`131072` -> `128K`; what is no whole number of K stays as it is."""
    for suffix in ("M", "K"):
        if count % SUFFIXES[suffix] == 0:
            return f"{count // SUFFIXES[suffix]}{suffix}"
    return str(count)
