"""`--profile 10:13`: a trace of some steps with PyTorch's profiler, in which the emitted program's functions stand under their own names.

Role in the pipeline: around the steps asked for, on rank 0. Out: `<log_dir>/<name>/profile/steps-10-13.json.gz`, for ui.perfetto.dev or
chrome://tracing, and a table of the operators that took longest, in `steps-10-13.txt`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from seqloom.runtime.program import Program

FOLDER = "profile"
ROWS = 40  # of the table


class StepProfiler:
    """`before(step)` and `after(step)` around every step; traces the steps of `steps`, none where that is empty."""

    def __init__(self, steps: range, folder: Path, program: Program, device: torch.device) -> None:
        self._steps, self._folder, self._program, self._device = steps, folder / FOLDER, program, device
        self._profile: profile | None = None
        self._undo: list[Callable[[], None]] = []

    def before(self, step: int) -> None:
        """Begin where `step` is the first one, or the first one after a resume among them."""
        if step not in self._steps or self._profile is not None:
            return
        self._undo = [name_functions(owner, prefix) for owner, prefix in _owners(self._program)]
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._device.type == "cuda" else [])]
        self._first = step
        self._profile = profile(activities=kinds, record_shapes=True, acc_events=True)
        self._profile.start()

    def after(self, step: int) -> str | None:
        """End behind the last step; returns what is to be said then."""
        if self._profile is None or step < self._steps[-1]:
            return None
        return self.stop(step)

    def stop(self, step: int) -> str | None:
        """End the trace, behind `step`, and write it; None where there is none."""
        if self._profile is None:
            return None
        traced, self._profile = self._profile, None
        traced.stop()
        for undo in self._undo:
            undo()
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"steps-{self._first}-{step}.json.gz"
        traced.export_chrome_trace(str(path))
        order = "self_cuda_time_total" if self._device.type == "cuda" else "self_cpu_time_total"
        table = traced.key_averages().table(sort_by=order, row_limit=ROWS, max_name_column_width=60)
        path.with_suffix("").with_suffix(".txt").write_text(table, encoding="utf-8")
        return f"profile of steps {self._first} to {step} in {path}: open it in ui.perfetto.dev"


def name_functions(owner: Any, prefix: str) -> Callable[[], None]:
    """Let the profiler see every function that a class or module itself defines under its name; returns what undoes it."""
    wrapped = dict(_functions(owner))
    for name, function in wrapped.items():
        setattr(owner, name, _named(function, f"{prefix}{name}"))
    return lambda: [setattr(owner, name, function) for name, function in wrapped.items()] and None


def _owners(program: Program) -> Iterator[tuple[Any, str]]:
    """The program itself and its classes, with what their functions are called after."""
    yield program, ""
    for cls in (program.MODEL, *program.BLOCKS):
        yield cls, f"{cls.__name__}."


def _functions(owner: Any) -> Iterator[tuple[str, Callable[..., Any]]]:
    home = owner.__name__ if inspect.ismodule(owner) else owner.__module__
    for name, function in list(vars(owner).items()):
        if inspect.isfunction(function) and function.__module__ == home and not name.startswith("__"):
            yield name, function


def _named(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with record_function(name):
            return function(*args, **kwargs)

    return call
