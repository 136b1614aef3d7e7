"""Everything that watches a run's steps and changes none of them: log, report, TensorBoard, W&B, spikes, stragglers, profile, memory.

Role in the pipeline: the loop computes each step within `computing`, then tells of it with `step`, and of what happens in between. Rank 0
speaks and writes; where ranks must be asked, all call alike.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.distributed as dist

from seqloom.errors import Stopped, UserError
from seqloom.runtime.optimizer import model_and_optimizer_tensors
from seqloom.trainer.agreement import Word
from seqloom.trainer.build import Run
from seqloom.trainer.config import steps_of
from seqloom.trainer.evaluate import Evaluation
from seqloom.trainer.facts import Facts, write_run_file
from seqloom.trainer.logging import EventName, NoLog, RunLog, StepRecord
from seqloom.trainer.memory import MemoryRecorder, held, verdict
from seqloom.trainer.page import LivePage
from seqloom.trainer.profile import StepProfiler
from seqloom.trainer.settings_file import resolved, write_resolved
from seqloom.trainer.spikes import Unusual
from seqloom.trainer.stragglers import Stragglers
from seqloom.trainer.summary import plan_line
from seqloom.trainer.wandb_log import open_wandb


class Monitor:
    """The watchers of one run that goes on after `done` steps; every rank has one. `open` it, then use it as a context manager around all
    steps.
    """

    def __init__(self, run: Run, known: Facts, done: int) -> None:
        self._run, self._known, self._step = run, known, done
        settings, folder, rank = run.config.monitor, run.config.log_folder, dist.get_rank()
        self._memory = MemoryRecorder(steps_of("memory_snapshot", settings.memory_snapshot), folder, rank, run.device)
        profiled = range(0) if rank else steps_of("profile", settings.profile)
        self._profiler = StepProfiler(profiled, folder, run.program, run.device)
        self._unusual, self._stragglers = Unusual(), Stragglers(run.device)
        self._log: RunLog | NoLog = NoLog()
        self._page: LivePage | None = None

    def open(self) -> None:
        """Open what rank 0 writes to. Raises `UserError` where it cannot be."""
        if dist.get_rank() != 0:
            return
        run, folder, done = self._run, self._run.config.log_folder, self._step
        project = run.config.monitor.wandb
        more = None if project is None else open_wandb(project, run.config.compile.name, folder, resolved(run.config))
        self._log = RunLog(folder, done + 1, run.total_steps, self._known.peak_flops, more=more)
        write_resolved(run.config, folder)
        write_run_file(run, self._known, plan_line(run))
        self._page = LivePage(folder)
        self.event("start", f"{'resumed' if done else 'started'} on {run.mesh.size()} ranks", aloud=False)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self._tell("profile", self._profiler.stop(self._step))
        if isinstance(error, Stopped | UserError):
            self.event("stop", str(error), aloud=False)
        with self._log:
            pass
        if self._page is not None:
            self._page.close()

    @contextlib.contextmanager
    def computing(self, step: int) -> Iterator[None]:
        """Around the computing of a step. Raises `UserError` where the GPU's memory does not suffice."""
        self._profiler.before(step)
        self._memory.before(step)
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise UserError(self._out_of_memory(step)) from error
        self._step = step
        self._tell("profile", self._profiler.after(step))
        self._tell("memory", self._memory.after(step))

    def step(self, record: StepRecord, own_wait_s: float, word: Word) -> None:
        """Tell of a finite step; `own_wait_s` is what this rank waited for data. Collective."""
        slow = self._unusual.slow(word.step_s)
        notes = self._unusual(record.loss, record.grad_norm, word.step_s)
        notes += self._stragglers(record.step, slow, own_wait_s, word.step_s)
        share = record.memory_gib / self._known.device_memory_gib
        self._log.step(replace(record, memory_share=share, time=time.time(), notes=tuple(notes)))
        self._touch()

    def evaluation(self, found: Evaluation) -> None:
        """Tell of an evaluation."""
        self._log.evaluation(found)
        self._touch()

    def skip(self, step: int, why: str) -> None:
        """Tell of a step that changed nothing."""
        self._step = step
        self._log.skip(step, why)

    def event(self, name: EventName, text: str, *, step: int | None = None, aloud: bool = True) -> None:
        """Tell of what happened after the last step, or after `step`."""
        self._log.event(self._step if step is None else step, name, text, aloud=aloud)

    def say(self, text: str) -> None:
        """Print a line."""
        self._log.say(text)

    def _tell(self, name: EventName, text: str | None) -> None:
        if text is not None:
            self.event(name, text)

    def _touch(self) -> None:
        if self._page is not None:
            self._page.touch()

    def _out_of_memory(self, step: int) -> str:
        """One sentence for a GPU that is full, after a snapshot of what it holds."""
        run = self._run
        state = model_and_optimizer_tensors(run.model, run.optimizer)
        gradients = [param.grad for param in run.model.parameters() if param.grad is not None]
        now = held(state, gradients, run.device)
        path = self._memory.write(f"out-of-memory-step-{step}")
        return f"rank {dist.get_rank()} ran out of memory in step {step} (what it held is in {path}): {verdict(now, run.plan)}"
