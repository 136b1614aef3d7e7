"""The training run: build, resume, step after step, save, and leave a model behind.

In: a `TrainConfig`, on every rank of the job. Out: checkpoints under `<checkpoint_dir>/<name>`, logs and `final.json` under
`<log_dir>/<name>`. Rank 0 speaks. A run that was stopped and resumed makes the same steps as one that was not.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from seqloom.checkpoint import find_checkpoint, folders, load_checkpoint, save_checkpoint
from seqloom.errors import UserError
from seqloom.report.plan_page import write_plan_page
from seqloom.runtime.mesh import init_distributed
from seqloom.runtime.optimizer import model_and_optimizer_tensors
from seqloom.trainer.build import Run, build
from seqloom.trainer.config import LAST, TrainConfig
from seqloom.trainer.failure import first_failure_speaks
from seqloom.trainer.final import write_final
from seqloom.trainer.logging import RunLog, StepRecord, plot_loss
from seqloom.trainer.schedule import learning_rate
from seqloom.trainer.start import check_later_checkpoints, choose_device_type, prepare_process
from seqloom.trainer.state import restore_random_state, seed_random_state, training_state
from seqloom.trainer.summary import measured_mfu, summary
from seqloom.trainer.usage import peak_memory_gib, slowest_and_fullest


@dataclass(frozen=True)
class Progress:
    """How far a run has come: steps made and counted tokens seen."""

    step: int = 0
    tokens_seen: int = 0


def train(config: TrainConfig) -> None:
    """Join the job, train, and leave it. Raises `UserError` for a user's mistake, on the rank that is to tell it."""
    device_type = choose_device_type(config.compile.hardware)
    prepare_process(device_type, config.deterministic)
    device = init_distributed(device_type)
    with first_failure_speaks():
        train_on(config, device)
    dist.destroy_process_group()


def train_on(config: TrainConfig, device: torch.device) -> None:
    """The whole training on this rank of a job that all ranks have joined. Raises `UserError` on every rank that finds a mistake."""
    run = build(config, device, _say)
    progress = _start(run)
    _say(summary(run, progress.step))
    if progress.step >= run.total_steps:
        _say(f"step {progress.step} of {run.total_steps} is done already: nothing is left to do")
    else:
        _train(run, progress)


def _start(run: Run) -> Progress:
    """Continue from the checkpoint asked for, or begin: seeds set, nothing done."""
    config = run.config
    path = config.output.resume_path and find_checkpoint(config.output.resume_path, config.run_folder)
    if not path:
        if config.output.resume_path:
            _say(f"{config.run_folder} holds no checkpoint yet: starting from the beginning")
        seed_random_state(config.seed, 0)
        return Progress()
    tensors = model_and_optimizer_tensors(run.model, run.optimizer, initialize=True)
    state = load_checkpoint(path, tensors, verify=config.output.resume_path != LAST)  # `last` was verified when it was found
    check_later_checkpoints(config, state["step"])
    run.loader.load_state_dict(state["data"])
    restore_random_state(state["rng"], run.device, config.seed, state["step"])
    _say(f"resuming from {path} after step {state['step']}")
    return Progress(state["step"], state["tokens_seen"])


def _train(run: Run, progress: Progress) -> None:
    """All steps that are left, a checkpoint every so often and at the end, then what a finished run leaves."""
    every, total = run.config.output.checkpoint_every, run.total_steps
    with _log(run, progress.step + 1) as log:
        while progress.step < total:
            record = _step(run, progress)
            progress = Progress(record.step, record.tokens_seen)
            if log:
                log.step(record)
            if record.step % every == 0 or record.step == total:
                path = _save(run, progress)
                if log:
                    log.say(f"saved {path}")
    run.ahead.close()
    final = write_final(run, progress.step)
    if dist.get_rank() == 0:
        name, folder = run.config.compile.name, run.config.log_folder
        plot_loss(folder, f"{name}: {run.config.compile.model_id}")
        page = write_plan_page(run.program_folder, folder)
        _say(f"finished step {progress.step}: loss {final['loss']:.4f} on the first rows of the data")
        _say(f"checkpoints in {run.config.run_folder}; log.jsonl, loss.png, final.json and TensorBoard events in {folder}")
        _say(f"predicted beside measured in {page}")


def _step(run: Run, progress: Progress) -> StepRecord:
    """One optimizer step and what there is to say of it. Reading the loss waits for the device."""
    step, settings = progress.step + 1, run.config.optimizer
    rate = learning_rate(
        step, peak=settings.lr, schedule=settings.lr_schedule, warmup_steps=settings.warmup_steps, total_steps=run.total_steps
    )
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    started = time.perf_counter()
    micro_batches = run.ahead.next_step()
    waited = time.perf_counter() - started
    result = run.train_step(micro_batches)
    loss, grad_norm, tokens = result.loss.item(), result.grad_norm.item(), int(result.tokens)
    _check_finite(run, step, loss, grad_norm)
    wait, memory = slowest_and_fullest(waited, peak_memory_gib(run.device))
    seconds = time.perf_counter() - started
    rate_of_positions = run.rows_per_step * run.dataset.seq_len / seconds
    return StepRecord(
        step=step,
        loss=loss,
        grad_norm=grad_norm,
        lr=rate,
        tokens=tokens,
        tokens_seen=progress.tokens_seen + tokens,
        epoch=run.loader.place.epoch + run.loader.place.position / run.dataset.rows,
        step_time_s=seconds,
        tokens_per_s=rate_of_positions,
        tokens_per_s_per_gpu=rate_of_positions / dist.get_world_size(),
        mfu_causal=measured_mfu(run.plan, seconds),
        memory_gib=memory,
        data_wait_s=wait,
        eta_s=seconds * (run.total_steps - step),
    )


def _check_finite(run: Run, step: int, loss: float, grad_norm: float) -> None:
    """Stop before a spoiled model is saved."""
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return
    last = [found for found in folders.steps(run.config.run_folder) if found < step]
    where = f"continue from step {last[-1]} with --resume_path {LAST} and" if last else "start again with"
    raise UserError(
        f"step {step} has loss {loss} and gradient norm {grad_norm}, so the run stopped before saving it: "
        f"{where} a smaller --lr or more --warmup_steps"
    )


def _save(run: Run, progress: Progress) -> Path:
    """Write a checkpoint with everything that a merge or a resumed run needs."""
    tokenizer = run.dataset.tokenizer_path
    return save_checkpoint(
        run.config.run_folder,
        progress.step,
        model_and_optimizer_tensors(run.model, run.optimizer),
        training_state(run.config, run.program, run.loader, progress.step, progress.tokens_seen, run.device),
        model_config=json.loads(run.hf_config.to_json_string(use_diff=False)),
        tokenizer_folder=tokenizer if tokenizer.is_dir() else None,
    )


def _log(run: Run, first_step: int) -> contextlib.AbstractContextManager[RunLog | None]:
    """The log of rank 0; the other ranks have none."""
    if dist.get_rank() != 0:
        return contextlib.nullcontext()
    return RunLog(run.config.log_folder, first_step, run.total_steps)


def _say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)
