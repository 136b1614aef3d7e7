"""The training run: build, resume, step after step, save, and leave a model behind.

In: a `TrainConfig`, on every rank of the job. Out: checkpoints under `<checkpoint_dir>/<name>`, logs, report and `final.json`
under `<log_dir>/<name>`. Rank 0 speaks. A run that was stopped and resumed makes the same steps as one that was not.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from seqloom.checkpoint import find_checkpoint, folders, group, load_checkpoint
from seqloom.checkpoint.background import Saver
from seqloom.checkpoint.keep import Judge, KeepRule, keep
from seqloom.checkpoint.read import load_newest
from seqloom.checkpoint.write import SLACK_BYTES, Beside
from seqloom.errors import Stopped, UserError
from seqloom.report.plan_page import write_plan_page
from seqloom.report.run_page import PAGE as RUN_PAGE
from seqloom.runtime.kernels import planned_kernels
from seqloom.runtime.mesh import init_distributed
from seqloom.runtime.optimizer import model_and_optimizer_tensors
from seqloom.runtime.step import StepResult
from seqloom.trainer.agreement import Word, agree, peak_memory_gib
from seqloom.trainer.build import Run, build
from seqloom.trainer.config import LAST, TrainConfig
from seqloom.trainer.evaluate import Evaluation
from seqloom.trainer.facts import Facts, facts
from seqloom.trainer.failure import first_failure_speaks
from seqloom.trainer.final import write_final
from seqloom.trainer.finite import Skips, first_suspect
from seqloom.trainer.logging import StepRecord
from seqloom.trainer.monitor import Monitor
from seqloom.trainer.plot import plot_loss
from seqloom.trainer.schedule import learning_rate
from seqloom.trainer.signals import StopSignals, name
from seqloom.trainer.start import check_later_checkpoints, check_space, choose_device_type, prepare_process, resume_source
from seqloom.trainer.state import restore_random_state, seed_random_state, training_state
from seqloom.trainer.summary import measured_mfu, summary
from seqloom.trainer.watch import Watch

_LATER = 60.0  # seconds that collectives wait beyond the time after which the watch speaks


@dataclass(frozen=True)
class Progress:
    """How far a run has come: steps made and counted tokens seen."""

    step: int = 0
    tokens_seen: int = 0


def train(config: TrainConfig) -> None:
    """Join the job, train, and leave it. Raises `UserError` for a user's mistake, on the rank that is to tell it, and `Stopped`."""
    device_type = choose_device_type(config.compile.hardware)
    prepare_process(device_type, config.deterministic)
    device = init_distributed(device_type, timedelta(seconds=config.faults.timeout + _LATER))
    with StopSignals() as signals, first_failure_speaks():
        train_on(config, device, signals)
    dist.destroy_process_group()


def train_on(config: TrainConfig, device: torch.device, signals: StopSignals | None = None) -> None:
    """The whole training on this rank of a job that all ranks have joined. Raises `UserError` on every rank that finds a mistake."""
    signals = signals or StopSignals()
    run = build(config, device, _say, signals)
    progress = _start(run)
    group.attempt("starting", lambda: _stop_if(signals))
    known = facts(run)
    _say(summary(run, known, progress.step))
    if progress.step >= run.total_steps:
        _say(f"step {progress.step} of {run.total_steps} is done already: nothing is left to do")
    else:
        with planned_kernels(run.plan, device, _say):
            _train(run, known, progress, signals)


def _start(run: Run) -> Progress:
    """Continue from the checkpoint asked for, or begin: seeds set, nothing done."""
    config, source = run.config, resume_source(run.config)
    tensors = model_and_optimizer_tensors(run.model, run.optimizer, initialize=True)
    whole = [tensor for key, tensor in tensors.items() if key.removeprefix("model.") not in run.program.TIED]
    nbytes = sum(tensor.numel() * tensor.element_size() for tensor in whole)  # wherever their pieces lie
    group.attempt("looking for room", lambda: check_space(config, nbytes + SLACK_BYTES) if dist.get_rank() == 0 else None)
    found = source and _load(config, source, tensors)
    if not found:
        if source:
            _say(f"{config.run_folder} holds no checkpoint yet: starting from the beginning")
        seed_random_state(config.seed, 0)
        return Progress()
    path, state = found
    check_later_checkpoints(config, state["step"])
    run.loader.load_state_dict(state["data"])
    restore_random_state(state["rng"], run.device, config.seed, state["step"])
    _say(f"resuming from {path} after step {state['step']}")
    return Progress(state["step"], state["tokens_seen"])


def _load(config: TrainConfig, source: str, tensors: Mapping[str, Tensor]) -> tuple[Path, dict[str, Any]] | None:
    """Fill the tensors from where the run continues: the file or folder, and the training state; None where the run has none yet."""
    verify = config.output.verify_checkpoint
    if source == LAST:
        return load_newest(config.run_folder, tensors, verify=verify)
    path = find_checkpoint(source, config.run_folder, verify=verify)
    return path and (path, load_checkpoint(path, tensors, verify=verify))


def _stop_if(signals: StopSignals) -> None:
    if signals.asked:
        raise signals.stopped()


def _train(run: Run, known: Facts, progress: Progress, signals: StopSignals) -> None:
    """All steps that are left, a checkpoint every so often and at the end, then what a finished run leaves."""
    monitor = Monitor(run, known, progress.step)
    group.attempt("opening the log", monitor.open)
    loop = _Loop(run, progress, monitor)
    with monitor, contextlib.closing(run.ahead), contextlib.closing(loop.saver), loop.watch:
        while loop.progress.step < run.total_steps:
            loop.step(signals)
        loop.collect()
        _leave(run, loop.progress, monitor)


def _leave(run: Run, progress: Progress, monitor: Monitor) -> None:
    """What a finished run leaves beside checkpoints."""
    final = write_final(run, progress.step)
    monitor.event("finish", f"finished step {progress.step}: loss {final['loss']:.4f} on the first rows of the data")
    if dist.get_rank() == 0:
        name, folder = run.config.compile.name, run.config.log_folder
        plot_loss(folder, f"{name}: {run.config.compile.model_id}")
        page = write_plan_page(run.program_folder, folder)
        monitor.say(
            f"checkpoints in {run.config.run_folder}; log.jsonl, config.yaml, loss.png, final.json and TensorBoard events in {folder}"
        )
        monitor.say(f"report     {folder / RUN_PAGE}")
        monitor.say(f"plan       {page}, with what was measured")


class _Loop:
    """The steps of a run, and what lives as long as they do: the log, the saver, the watch."""

    def __init__(self, run: Run, progress: Progress, monitor: Monitor) -> None:
        self.run, self.progress, self.monitor = run, progress, monitor
        self.faults = run.config.faults
        self.parameters = [name for name, _ in run.model.named_parameters()]
        output = run.config.output
        self.rule, self.judge = KeepRule(output.keep_last, output.keep_every, output.keep_best), Judge()
        timeout = timedelta(seconds=self.faults.timeout + _LATER)
        self.saver = Saver(run.config.run_folder, background=output.async_checkpoint, timeout=timeout, after=self._tidy)
        self.watch = Watch(self.faults.timeout)
        self.saved = progress.step  # the last step that has a checkpoint
        self.evaluation: Evaluation | None = None  # the last one
        self.skips = Skips(self.faults.max_skips if self.faults.nonfinite == "skip" else 0)

    def step(self, signals: StopSignals) -> None:
        """One step and all that follows from it: log, checkpoint, stopping."""
        step = self.progress.step + 1
        rate, started = self._set_rate(step), time.perf_counter()
        self.watch.beat(step, "reading data")
        micro_batches = self.run.ahead.next_step()
        waited = time.perf_counter() - started
        self.watch.beat(step, "computing")
        with self.monitor.computing(step):
            result = self.run.train_step(micro_batches)
            loss, grad_norm, tokens = result.loss.item(), result.grad_norm.item(), int(result.tokens)
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        may_go_on = self.skips.step(finite)
        if not finite:
            self._not_finite(step, result, may_go_on)
        seconds = time.perf_counter() - started
        word = agree(Word(waited, peak_memory_gib(self.run.device), signals.asked, self.saver.writing, seconds))
        self.progress = Progress(step, self.progress.tokens_seen + tokens * finite)
        if finite:
            self.monitor.step(self._record(step, loss, grad_norm, rate, tokens, word), waited, word)
        if self.saver.pending and not word.writing:
            self.collect()
        total, asked = self.run.total_steps, word.stop_signal
        if finite and not asked and self._evaluates_after(step):
            asked = self.evaluate(signals)
        if (finite and step % self.run.config.output.checkpoint_every == 0) or step == total:
            self.save()
        if asked and step < total:
            self._stop(asked)

    def evaluate(self, signals: StopSignals) -> int:
        """Evaluate the present state; returns the number of a signal that cut it short, 0 where none did."""
        step, asked = self.progress.step, 0

        def may_go_on() -> bool:
            nonlocal asked
            self.watch.beat(step, "evaluating")
            asked = agree(Word(0.0, 0.0, signals.asked, 0)).stop_signal
            return not asked

        found = self.run.evaluator(step, may_go_on)
        if found is not None:
            self.evaluation = found
            self.monitor.evaluation(found)
        return asked

    def _evaluates_after(self, step: int) -> bool:
        every = self.run.config.eval_every
        return self.run.evaluator is not None and (step % every == 0 or step == self.run.total_steps)

    def save(self) -> None:
        """Begin a checkpoint of the present state, when the one before it is written."""
        run, progress, tokenizer = self.run, self.progress, self.run.dataset.tokenizer_path
        self.collect()
        self.watch.beat(progress.step, "saving")
        state = training_state(run.config, run.program, run.loader, progress.step, progress.tokens_seen, run.device)
        if self.evaluation is not None and self.evaluation.step == progress.step and math.isfinite(self.evaluation.loss):
            state["evaluation"] = asdict(self.evaluation)
        config = json.loads(run.hf_config.to_json_string(use_diff=False))
        tensors = model_and_optimizer_tensors(run.model, run.optimizer)
        with self._failing_as_asked():
            self.saver.save(progress.step, tensors, Beside(state, config, tokenizer if tokenizer.is_dir() else None))
        if not run.config.output.async_checkpoint:
            self.collect()

    def collect(self) -> None:
        """Wait for the checkpoint that is being written, and say where it is."""
        with self._failing_as_asked():
            folder = self.saver.collect()
            if folder is not None:
                self.saved = folders.step_of(folder)
                self.monitor.event("checkpoint", f"saved {folder}", step=self.saved)

    def _tidy(self, committed: Path) -> None:
        """Remove the checkpoints that are not to be kept, now that there is a new one. In the thread that saves, on every rank."""
        group.attempt("removing old checkpoints", lambda: self._remove_old(committed) if dist.get_rank() == 0 else None)

    def _remove_old(self, committed: Path) -> None:
        self.judge.trust(committed)
        keep(committed.parent, self.rule, self.judge)

    @contextlib.contextmanager
    def _failing_as_asked(self) -> Iterator[None]:
        """A checkpoint that cannot be written ends the run, or is said and left out."""
        try:
            yield
        except UserError as error:
            if self.run.config.output.on_save_error == "stop":
                raise
            self.monitor.say(f"warning: {error}; the run goes on without this checkpoint")

    def _stop(self, signal: int) -> None:
        """Save what there is and leave."""
        step = self.progress.step
        self.collect()
        if self.saved != step:
            self.save()
            self.collect()
        raise Stopped(f"stopped by {name(signal)} after step {step}, which is saved: continue with --resume_path {LAST}")

    def _not_finite(self, step: int, result: StepResult, may_go_on: bool) -> None:
        """Say what was not finite; raise `UserError` where the run may not go on."""
        suspect = first_suspect(result, self.parameters)
        began = f", first in {suspect}" if suspect else ", as a sum of finite parts"
        what = f"step {step} has loss {result.loss.item()} and gradient norm {result.grad_norm.item()}{began}"
        if may_go_on:
            self.monitor.skip(
                step, f"{what}: skipped, the weights are as before ({self.skips.in_a_row} of at most {self.skips.most} in a row)"
            )
            return
        self.collect()
        saved = folders.steps(self.run.config.run_folder)
        where = f"continue from step {saved[-1]} with --resume_path {LAST} and" if saved else "start again with"
        raise UserError(
            f"{what}; the weights are as before, and the run stops without saving this step: {where} a smaller --lr, more --warmup_steps, "
            "or --nonfinite skip"
        )

    def _set_rate(self, step: int) -> float:
        settings, total = self.run.config.optimizer, self.run.total_steps
        rate = learning_rate(
            step,
            peak=settings.lr,
            schedule=settings.lr_schedule,
            warmup_steps=settings.warmup_steps,
            total_steps=total,
            decay_steps=settings.decay_steps,
            min_ratio=settings.min_lr_ratio,
        )
        for group_of_parameters in self.run.optimizer.param_groups:
            group_of_parameters["lr"] = rate
        return rate

    def _record(self, step: int, loss: float, grad_norm: float, rate: float, tokens: int, word: Word) -> StepRecord:
        run, seconds = self.run, word.step_s
        positions_per_s = run.rows_per_step * run.dataset.seq_len / seconds
        return StepRecord(
            step=step,
            loss=loss,
            grad_norm=grad_norm,
            lr=rate,
            tokens=tokens,
            tokens_seen=self.progress.tokens_seen,
            epoch=run.loader.place.epoch + run.loader.place.position / run.dataset.rows,
            step_time_s=seconds,
            tokens_per_s=positions_per_s,
            tokens_per_s_per_gpu=positions_per_s / dist.get_world_size(),
            mfu_causal=measured_mfu(run.plan, seconds),
            memory_gib=word.memory_gib,
            data_wait_s=word.data_wait_s,
            eta_s=seconds * (run.total_steps - step),
        )


def _say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)
