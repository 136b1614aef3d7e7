"""What a run prints before its first step: what it derived from the flags, the plan in one line, and where files go."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from seqloom.report import text
from seqloom.report.text import plural
from seqloom.trainer.config import LAST
from seqloom.trainer.settings_file import RESOLVED_FILE, changed

if TYPE_CHECKING:
    from seqloom.trainer.build import Run
    from seqloom.trainer.facts import Facts

_SAID = ("model_id", "dataset_path", "name", "plan_ngpus", "runtime_ngpus", "output_folder", "checkpoint_dir", "log_dir", "resume_path")
"""Settings that other lines of the table tell of."""
_COMPILED, _AS_WRITTEN = "blocks compiled with torch.compile, which the first step waits for", "blocks as written"


def summary(run: Run, known: Facts, done: int) -> str:
    """A short table; `done` steps were made before."""
    compile_config, loader = run.config.compile, run.loader
    origin = f"weights of {run.weights}" if run.weights else f"random weights, seed {run.config.seed}"
    left = run.total_steps - done
    epochs = run.total_steps * run.rows_per_step / run.dataset.rows
    evaluation = []
    if run.evaluator is not None:
        every = plural(run.config.eval_every, "step")
        evaluation = [("evaluation", f"{run.evaluator.dataset.path}: {run.evaluator.rows:,} rows, every {every} and at the end")]
    rows = [
        ("model", f"{compile_config.model_id}: {known.parameters:,} parameters, {origin}"),
        ("data", f"{run.dataset.path}: {run.dataset.rows:,} rows of {run.dataset.seq_len:,} tokens"),
        *evaluation,
        (
            "step",
            f"{plural(loader.dp_size, 'scale unit')} x {plural(loader.accumulation, 'micro-batch', 'micro-batches')} x "
            f"{plural(loader.micro_batch_size, 'row')} = {known.tokens_per_step:,} tokens of {text.flops(known.flops_per_token)} each",
        ),
        ("run", f"{plural(left, 'step')}{f' after {done}' if done else ''}, {epochs:.2f} epochs in all; {compile_config.precision}"),
        ("ranks", f"{run.mesh.size()} on {run.device.type}, {_COMPILED if run.compiled else _AS_WRITTEN}"),
        ("plan", plan_line(run)),
        ("predicted", prediction_line(run.plan, known)),
        ("settings", f"{_settings(run)} (all: {run.config.log_folder / RESOLVED_FILE})"),
        ("program", str(run.program_folder)),
        ("checkpoints", f"{run.config.run_folder}, every {plural(run.config.output.checkpoint_every, 'step')} and at the end"),
        ("report", f"{run.config.log_folder / 'report.html'}, log.jsonl and TensorBoard events beside it"),
        ("stop", f"SIGTERM or SIGUSR1 saves and ends; go on with --resume_path {LAST}"),
    ]
    note = kernel_note(compile_config.attention_kernel)
    rows += [("note", note)] if note else []
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def plan_line(run: Run) -> str:
    """Mesh, storage and what becomes of activations."""
    axes = " x ".join(f"{name} {size}" for name, size in (("dp", run.loader.dp_size), *run.program.MESH.items()) if size > 1)
    return f"{axes or 'one rank'}, ZeRO {run.program.ZERO}, {_modes(run.plan)}"


def prediction_line(plan: dict[str, Any], known: Facts | None = None) -> str:
    """Step time, MFU (of which peak, where `known`) and memory of a rank, and the hardware they hold for."""
    memory = f"{plan['peak_memory_gib']['total']:.3g} of {plan['memory_limit_gib']:.3g} GiB a rank"
    peak = f" of {text.flops(known.peak_flops)}/s with causal attention" if known else ""
    return f"{plan['step_time_s']:.3g} s a step, MFU {plan['mfu_causal']:.1%}{peak}, {memory}, on {plan['hardware']}"


def _settings(run: Run) -> str:
    """The settings that are not at their default and that no other line tells."""
    told = {name: value for name, value in changed(run.config).items() if name not in _SAID}
    return (
        ", ".join(f"{name} {' '.join(map(str, value)) if isinstance(value, list) else value}" for name, value in told.items()) or "as given"
    )


def measured_mfu(plan: dict[str, Any], step_time_s: float) -> float:
    """Causal MFU of a measured step: the plan's, scaled by predicted over measured time, as the FLOPs are the same."""
    return plan["mfu_causal"] * plan["step_time_s"] / step_time_s


def kernel_note(kernel: str | None) -> str | None:
    """What is to be said of a plan that was made for an attention kernel that not every PyTorch has; None where there is nothing."""
    if kernel is None:
        return None
    return f"the plan is for the attention kernel {kernel}; where it is not installed the fastest that is there runs, and the run says so"


def _modes(plan: dict[str, Any]) -> str:
    """`activations kept`, or each segment with what is done with it in how many layers."""
    told: dict[str, str] = {}
    for block in plan["segments"].values():
        for name, row in block.items():
            layers = sum(count for mode, count in row.items() if mode not in ("tiles", "kept"))
            used = [f"{mode} {count}/{layers}" for mode, count in row.items() if mode not in ("tiles", "kept", "keep") and count]
            if used:
                told[name] = f"{name} {' '.join(used)}"
    return ", ".join(told.values()) or "activations kept"
