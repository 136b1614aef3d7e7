"""The log of a training run, `log.jsonl`, as columns of numbers and a list of events.

In: the folder of a run. Out: `LoggedRun`. Only whole lines count, so a run that is writing can be read, and a `LogReader` reads each line
once however often it is asked. A run that goes back to a checkpoint makes its later steps again: what the log says of those from before is
dropped. Events stay, for they happened.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby, islice
from operator import itemgetter, lt
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

LOG = "log.jsonl"
FIELDS = (
    "step",
    "loss",
    "grad_norm",
    "lr",
    "tokens_seen",
    "step_time_s",
    "tokens_per_s_per_gpu",
    "mfu_causal",
    "memory_gib",
    "data_wait_s",
    "eta_s",
    "time",
)
"""What is kept of a step; `time` is seconds since 1970, the others are as the trainer's record has them."""
START, STOP, FINISH, RESTART, EVALUATION, SKIPPED, SPIKE, STRAGGLER = (
    "start",
    "stop",
    "finish",
    "restart",
    "evaluation",
    "skipped",
    "spike",
    "straggler",
)
BEYOND = 1e100  # no run measures so much: from here on a number counts as none
_BATCH = 200  # lines that are parsed at once: faster than one by one, and other threads wait for a millisecond or two
_STEP = itemgetter(*FIELDS)


@dataclass(frozen=True)
class Evaluation:
    """An evaluation after `step`: loss in nats per token, None where it was not finite."""

    step: int
    loss: float | None
    perplexity: float | None


@dataclass(frozen=True)
class Event:
    """What happened after `step`: its kind in a word, the text of the log, and seconds since 1970 where known."""

    step: int
    kind: str
    text: str
    time: float | None = None


@dataclass(frozen=True, eq=False)
class LoggedRun:
    """A run so far. `steps` has a column for each of FIELDS, all of one length and by ascending step, nan where the log has no number.

    `state` is `start` (no step was made yet), `run`, `stop` or `finish`; `text` is what the log says of stopping. `damaged` counts lines
    that could not be read.
    """

    steps: Mapping[str, np.ndarray]
    evaluations: tuple[Evaluation, ...]
    events: tuple[Event, ...]
    state: str
    text: str
    damaged: int

    @property
    def count(self) -> int:
        """How many steps there are."""
        return len(self.steps["step"])

    @property
    def last_step(self) -> int:
        """The newest step; 0 before the first."""
        return int(self.steps["step"][-1]) if self.count else 0

    @property
    def last_time(self) -> float | None:
        """When the newest record that has a time was written."""
        times = [*self.steps["time"][-1:].tolist(), *(event.time for event in self.events[-1:] if event.time is not None)]
        known = [time for time in times if math.isfinite(time)]
        return max(known) if known else None

    def first_after_start(self) -> np.ndarray:
        """For each step whether it is the first after a start: it warms up and is left out of medians. Shape: (count,)."""
        starts = [event.step for event in self.events if event.kind in (START, RESTART)]
        first = np.zeros(self.count, dtype=bool)
        places = np.searchsorted(self.steps["step"], [0, *starts], side="right")
        first[places[places < self.count]] = True
        return first

    def seconds(self) -> np.ndarray:
        """Seconds the run has been running up to the end of each step, with evaluations and checkpoints, without pauses between restarts.

        Where the log has no times these are the steps alone. Shape: (count,).
        """
        own, times = np.nan_to_num(self.steps["step_time_s"]), self.steps["time"]
        between = np.diff(times, prepend=np.nan)
        counts = (between >= own) & ~self.first_after_start()
        return np.cumsum(np.where(counts, between, own))


class LogReader:
    """Reads a log that grows: every `read()` goes on where the last one ended. A log that became shorter is read anew."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOG
        self._begin()

    def read(self) -> LoggedRun:
        """Everything in the log so far; no step where there is no log yet."""
        if not self.path.is_file() or self.path.stat().st_size < self.offset:
            self._begin()
        if self.path.is_file():
            with self.path.open("rb") as file:
                self._read(file)
        columns = np.array(self.numbers).reshape(-1, len(FIELDS)).T
        columns[~(np.abs(columns) < BEYOND)] = np.nan
        return LoggedRun(
            steps=dict(zip(FIELDS, columns, strict=True)),
            evaluations=tuple(self.evaluations.values()),
            events=tuple(self.events),
            state=self.state,
            text=self.text,
            damaged=self.damaged,
        )

    def _begin(self) -> None:
        self.offset, self.damaged = 0, 0
        self.numbers = array("d")  # the columns, step after step
        self.last = 0.0  # step of the last of them
        self.evaluations: dict[int, Evaluation] = {}
        self.events: list[Event] = []
        self.state, self.text = START, ""

    def _read(self, file: BinaryIO) -> None:
        file.seek(self.offset)
        while lines := [line for line in islice(file, _BATCH) if line.endswith(b"\n")]:
            self.offset += sum(map(len, lines))
            full = [line for line in lines if not line.isspace()]
            records = list(_records(full))
            self.damaged += len(full) - len(records)
            for plain, group in groupby(records, _plain):
                together = list(group)
                if not (plain and self._take_steps(together)):
                    for record in together:
                        self._take(record)

    def _take_steps(self, records: Sequence[Mapping[str, Any]]) -> bool:
        """Take records that are steps one after the other with all that is known of them, as most are; False where they are not."""
        try:
            rows = array("d", chain.from_iterable(map(_STEP, records)))
        except (KeyError, TypeError, OverflowError):
            return False
        steps = [self.last, *rows[:: len(FIELDS)]]
        if not all(map(lt, steps, steps[1:])) or not math.isfinite(steps[-1]):
            return False
        self.numbers.extend(rows)
        self.last, self.state = steps[-1], "run"
        return True

    def _take(self, record: Mapping[str, Any]) -> None:
        step = _number(record.get("step"))
        if not math.isfinite(step):
            self.damaged += 1
        elif isinstance(record.get("evaluation"), dict):
            self._evaluation(int(step), record["evaluation"], record)
        elif "event" in record:
            self._event(int(step), str(record["event"]), record)
        elif "skipped" in record:
            self._happened(int(step), SKIPPED, record["skipped"], record)
        elif "loss" in record:
            self._step(array("d", [_number(record.get(name)) for name in FIELDS]), record)
        else:
            self.damaged += 1

    def _step(self, row: array, record: Mapping[str, Any]) -> None:
        if row[0] <= self.last:
            self._go_back(row[0] - 1)
        self.numbers.extend(row)
        self.last = row[0]
        self.state = "run"
        notes = record.get("notes")
        for note in notes if isinstance(notes, list) else ():
            if isinstance(note, dict):
                self._happened(int(row[0]), str(note.get("kind")), note.get("text"), record)

    def _go_back(self, step: float) -> None:
        """Drop what was found of the steps after `step`, which are to be made again."""
        while self.numbers and self.numbers[-len(FIELDS)] > step:
            del self.numbers[-len(FIELDS) :]
        self.last = self.numbers[-len(FIELDS)] if self.numbers else 0.0
        self.evaluations = {at: found for at, found in self.evaluations.items() if at <= step}

    def _evaluation(self, step: int, found: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        loss, perplexity = (known_number(found.get(name)) for name in ("loss", "perplexity"))
        self.evaluations.pop(step, None)
        self.evaluations[step] = Evaluation(step, loss, perplexity)
        told = "loss is not finite" if loss is None else f"loss {loss:.4f}" + (f", perplexity {perplexity:.4g}" if perplexity else "")
        self._happened(step, EVALUATION, told, record)

    def _event(self, step: int, kind: str, record: Mapping[str, Any]) -> None:
        text = str(record.get("text") or "")
        if kind == START:
            self._go_back(step)
            self.state = "run" if self.numbers else START
        elif kind in (STOP, FINISH):
            self.state, self.text = kind, text
        self._happened(step, RESTART if kind == START and step else kind, text, record)

    def _happened(self, step: int, kind: str, text: Any, record: Mapping[str, Any]) -> None:
        self.events.append(Event(step, kind, str(text), known_number(record.get("time"))))


def _plain(record: Mapping[str, Any]) -> bool:
    """Whether a record is of a step and of nothing else."""
    return "loss" in record and "notes" not in record


def _records(lines: Sequence[bytes]) -> Iterator[dict[str, Any]]:
    """The records of whole lines, without those that cannot be read."""
    try:
        found = json.loads(b"[" + b",".join(lines) + b"]")
    except (ValueError, RecursionError):
        found = []
    if len(found) != len(lines):
        found = [_record(line) for line in lines]
    return (record for record in found if isinstance(record, dict))


def _record(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _number(value: Any) -> float:
    """The number, or nan for anything else."""
    return float(value) if type(value) in (float, int) and abs(value) < BEYOND else math.nan


def known_number(value: Any) -> float | None:
    """The number, or None for anything else."""
    number = _number(value)
    return None if math.isnan(number) else number
