"""What a run says of each step: one line, one JSON record, TensorBoard scalars, and a plot of the loss in the end.

In: a `StepRecord` per step, on rank 0. Out: on the terminal a progress bar, elsewhere plain lines; under `<log_dir>/<name>/` the files
`log.jsonl`, TensorBoard events and `loss.png`. A resumed run continues the files; where a step was run twice the later record counts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter
    from tqdm import tqdm

    from seqloom.trainer.evaluate import Evaluation

LOG_FILE = "log.jsonl"
PLOT_FILE = "loss.png"
SCALARS = ("loss", "grad_norm", "lr", "tokens_per_s", "tokens_per_s_per_gpu", "mfu_causal", "memory_gib", "data_wait_s", "step_time_s")


@dataclass(frozen=True)
class StepRecord:
    """One step. Rates count every position of the rows, `tokens` only those whose label counts.

    `memory_gib` is the peak of the rank that needed most, `data_wait_s` the wait of the rank that waited longest; `mfu_causal` is
    relative to the hardware planned for.
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


def step_line(record: StepRecord, total_steps: int) -> str:
    """The line of a step, in columns that stay in place from line to line."""
    step = f"step {record.step:>{len(str(total_steps))}}/{total_steps}"
    return (
        f"{step}  loss {record.loss:.4f}  grad {record.grad_norm:.3f}  lr {record.lr:.2e}  {record.tokens_per_s:,.0f} tok/s "
        f"({record.tokens_per_s_per_gpu:,.0f}/gpu)  mfu {100 * record.mfu_causal:.1f}%  mem {record.memory_gib:.2f} GiB  "
        f"data {1000 * record.data_wait_s:.0f} ms  eta {clock(record.eta_s)}"
    )


def clock(seconds: float) -> str:
    """Seconds as `4:05` or `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class RunLog:
    """The sinks of one run: console, `log.jsonl`, TensorBoard. Use it as a context manager; only rank 0 has one."""

    def __init__(self, folder: Path, first_step: int, total_steps: int, console: TextIO = sys.stdout) -> None:
        """`first_step` is the number of the next step: 1 starts the files anew, a later one continues them."""
        self.folder, self.total_steps, self.console = folder, total_steps, console
        self.file = (folder / LOG_FILE).open("w" if first_step == 1 else "a", encoding="utf-8")
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
        self.file.write(json.dumps(dataclasses.asdict(record)) + "\n")
        self.file.flush()
        for name in SCALARS:
            self.board.add_scalar(name, getattr(record, name), record.step)
        line = step_line(record, self.total_steps)
        if self.bar is not None:
            self.bar.set_postfix_str(line.split("  ", 1)[1], refresh=False)
            self.bar.update(1)
        else:
            self.say(line)

    def evaluation(self, found: Evaluation) -> None:
        """Report an evaluation."""
        figures = {**dataclasses.asdict(found), "perplexity": found.perplexity}
        known = {name: value if math.isfinite(value) else None for name, value in figures.items()}  # JSON has no infinity
        record = {"step": found.step, "evaluation": known}
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        self.board.add_scalar("eval_loss", found.loss, found.step)
        self.say(
            f"evaluation after step {found.step}: loss {found.loss:.4f}, perplexity {found.perplexity:.4g}, {found.tokens:,} tokens of "
            f"{found.rows:,} rows in {found.seconds:.1f} s"
        )

    def skip(self, step: int, why: str) -> None:
        """Report a step that changed nothing."""
        self.file.write(json.dumps({"step": step, "skipped": why}) + "\n")
        self.file.flush()
        if self.bar is not None:
            self.bar.update(1)
        self.say(f"warning: {why}")

    def say(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        if self.bar is not None:
            self.bar.write(text, file=self.console)
        else:
            print(text, file=self.console, flush=True)


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

    def say(self, text: str) -> None:
        """Nothing."""


def read_log(folder: Path) -> list[dict]:
    """The records of a run by step, each step once; empty lines, one that was cut off, skipped steps and evaluations do not count."""
    records = {}
    for line in (folder / LOG_FILE).read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if "evaluation" not in record:
            records[record["step"]] = record
    return [records[step] for step in sorted(records) if "loss" in records[step]]


def plot_loss(folder: Path, title: str) -> Path:
    """Draw `loss.png` from `log.jsonl`: the loss of each step, its running mean, and the learning rate. Returns the file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = read_log(folder)
    steps = [record["step"] for record in records]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    loss = figure.add_subplot()
    values = [record["loss"] for record in records]
    loss.plot(steps, values, color="tab:blue", linewidth=0.8, alpha=0.35)
    loss.plot(steps, running_mean(values, 1 + len(values) // 20), color="tab:blue", linewidth=1.6)
    loss.set(title=title, xlabel="step", ylabel="loss (nats per token)")
    loss.grid(alpha=0.3)
    rate = loss.twinx()
    rate.plot(steps, [record["lr"] for record in records], color="tab:orange", linewidth=0.8, linestyle="--")
    rate.set_ylabel("learning rate", color="tab:orange")
    rate.set_ylim(bottom=0)
    path = folder / PLOT_FILE
    figure.savefig(path, dpi=120)
    return path


def running_mean(values: list[float], width: int) -> list[float]:
    """Mean of each value and of those before it, `width` at most."""
    sums = [0.0, *itertools.accumulate(values)]
    return [(sums[i] - sums[max(0, i - width)]) / min(i, width) for i in range(1, len(sums))]


def _tensorboard(folder: Path, first_step: int) -> SummaryWriter:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=first_step)


def _bar(first_step: int, total_steps: int, console: TextIO) -> tqdm:
    from tqdm import tqdm

    return tqdm(total=total_steps, initial=first_step - 1, file=console, desc="step", dynamic_ncols=True)
