"""What a run says of each step and of what happens between them: one line, one JSON record, TensorBoard scalars, W&B if asked.

In: a `StepRecord` per step, on rank 0, and events. Out: on the terminal a progress bar, elsewhere plain lines; under `<log_dir>/<name>/`
the file `log.jsonl` and TensorBoard events. A resumed run continues them; where a step was run twice the later one counts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from seqloom.report import text
from seqloom.report.run_log import LOG
from seqloom.trainer.spikes import Note

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter
    from tqdm import tqdm

    from seqloom.trainer.evaluate import Evaluation

EventName = Literal["start", "checkpoint", "stop", "finish", "profile", "memory"]
SCALARS = ("loss", "grad_norm", "lr", "tokens_per_s", "tokens_per_s_per_gpu", "mfu_causal", "memory_gib", "data_wait_s", "step_time_s")


@dataclass(frozen=True)
class StepRecord:
    """One step. Rates count every position of the rows, `tokens` only those whose label counts.

    `memory_gib` is the peak of the rank that needed most, `memory_share` its share of the device, `data_wait_s` the wait of the rank that
    waited longest; `mfu_causal` is relative to the hardware planned for. `time` is when the step ended, in seconds since 1970; `notes` say
    what stood out.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    tokens: int
    tokens_seen: int
    epoch: float
    step_time_s: float
    tokens_per_s: float
    tokens_per_s_per_gpu: float
    mfu_causal: float
    memory_gib: float
    data_wait_s: float
    eta_s: float
    memory_share: float = 0.0
    time: float = 0.0
    notes: tuple[Note, ...] = ()


def step_line(record: StepRecord, total_steps: int, peak_flops: float) -> str:
    """The line of a step, in columns that stay in place from line to line; `peak_flops` of a device is what the MFU is a share of."""
    step = f"step {record.step:>{len(str(total_steps))}}/{total_steps}"
    return (
        f"{step}  loss {record.loss:.4f}  grad {record.grad_norm:.3f}  lr {record.lr:.2e}  {record.tokens_per_s_per_gpu:,.0f} tok/s/gpu  "
        f"mfu {record.mfu_causal:.1%} of {text.flops(peak_flops)}/s  mem {record.memory_gib:.2f} GiB {record.memory_share:.0%}  "
        f"data {1000 * record.data_wait_s:.0f} ms  eta {clock(record.eta_s)}"
    )


def clock(seconds: float) -> str:
    """Seconds as `4:05` or `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class RunLog:
    """The sinks of one run: console, `log.jsonl`, TensorBoard, and `more`, called with the scalars of a step and its number.

    Use it as a context manager; only rank 0 has one.
    """

    def __init__(
        self,
        folder: Path,
        first_step: int,
        total_steps: int,
        peak_flops: float,
        console: TextIO = sys.stdout,
        more: Callable[[dict[str, float], int], None] | None = None,
    ) -> None:
        """`first_step` is the number of the next step: 1 starts the files anew, a later one continues them."""
        self.folder, self.total_steps, self.peak_flops, self.console, self._more = folder, total_steps, peak_flops, console, more
        self.file = (folder / LOG).open("w" if first_step == 1 else "a", encoding="utf-8")
        if first_step > 1:
            self.file.write("\n")  # a killed run may have left half a line
        self.board = _tensorboard(folder, first_step)
        self.bar = _bar(first_step, total_steps, console) if console.isatty() else None

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.board.close()
        if self.bar is not None:
            self.bar.close()

    def step(self, record: StepRecord) -> None:
        """Report one step everywhere."""
        notes = {"notes": [vars(note) for note in record.notes]} if record.notes else {}
        self._write({name: value for name, value in vars(record).items() if name != "notes"} | notes)
        self._scalars({name: getattr(record, name) for name in SCALARS}, record.step)
        line = step_line(record, self.total_steps, self.peak_flops)
        if self.bar is not None:
            self.bar.set_postfix_str(line.split("  ", 1)[1], refresh=False)
            self.bar.update(1)
        else:
            self.say(line)
        for note in record.notes:
            self.say(f"note: step {record.step}: {note.text}")

    def evaluation(self, found: Evaluation) -> None:
        """Report an evaluation."""
        figures = {**dataclasses.asdict(found), "perplexity": found.perplexity}
        known = {name: value if math.isfinite(value) else None for name, value in figures.items()}  # JSON has no infinity
        self._write({"step": found.step, "evaluation": known})
        self._scalars({"eval_loss": found.loss}, found.step)
        self.say(
            f"evaluation after step {found.step}: loss {found.loss:.4f}, perplexity {found.perplexity:.4g}, {found.tokens:,} tokens of "
            f"{found.rows:,} rows in {found.seconds:.1f} s"
        )

    def skip(self, step: int, why: str) -> None:
        """Report a step that changed nothing."""
        self._write({"step": step, "skipped": why})
        if self.bar is not None:
            self.bar.update(1)
        self.say(f"warning: {why}")

    def event(self, step: int, name: EventName, text: str, *, aloud: bool = True) -> None:
        """Report what happened after a step; on the console too if `aloud`."""
        self._write({"step": step, "event": name, "text": text, "time": time.time()})
        if aloud:
            self.say(text)

    def say(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        if self.bar is not None:
            self.bar.write(text, file=self.console)
        else:
            print(text, file=self.console, flush=True)

    def _write(self, record: dict[str, Any]) -> None:
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()

    def _scalars(self, scalars: dict[str, float], step: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self.board.file_writer.add_summary(Summary(value=values), step)  # one event, a ninth of the work of nine `add_scalar`
        if self._more is not None:
            self._more(scalars, step)


class NoLog(contextlib.AbstractContextManager):
    """What the other ranks have in place of a `RunLog`: it says nothing."""

    def __exit__(self, *_: object) -> None:
        pass

    def step(self, record: StepRecord) -> None:
        """Nothing."""

    def evaluation(self, found: Evaluation) -> None:
        """Nothing."""

    def skip(self, step: int, why: str) -> None:
        """Nothing."""

    def event(self, step: int, name: EventName, text: str, *, aloud: bool = True) -> None:
        """Nothing."""

    def say(self, text: str) -> None:
        """Nothing."""


def _tensorboard(folder: Path, first_step: int) -> SummaryWriter:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=first_step)


def _bar(first_step: int, total_steps: int, console: TextIO) -> tqdm:
    from tqdm import tqdm

    return tqdm(total=total_steps, initial=first_step - 1, file=console, desc="step", dynamic_ncols=True)
