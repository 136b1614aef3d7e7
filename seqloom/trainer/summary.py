"""What a run prints before its first step: what it derived from the flags, the plan in one line, and where files go."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from seqloom.trainer.build import Run


def summary(run: Run, done: int) -> str:
    """A short table; `done` steps were made before."""
    compile_config, loader = run.config.compile, run.loader
    parameters = sum(param.numel() for param in run.model.parameters())
    origin = f"weights of {run.weights}" if run.weights else f"random weights, seed {run.config.seed}"
    left = run.total_steps - done
    epochs = run.total_steps * run.rows_per_step / run.dataset.rows
    evaluation = []
    if run.evaluator is not None:
        every = plural(run.config.eval_every, "step")
        evaluation = [("evaluation", f"{run.evaluator.dataset.path}: {run.evaluator.rows:,} rows, every {every} and at the end")]
    rows = [
        ("model", f"{compile_config.model_id}: {parameters:,} parameters, {origin}"),
        ("data", f"{run.dataset.path}: {run.dataset.rows:,} rows of {run.dataset.seq_len:,} tokens"),
        *evaluation,
        (
            "step",
            f"{plural(loader.dp_size, 'scale unit')} x {plural(loader.accumulation, 'micro-batch', 'micro-batches')} x "
            f"{plural(loader.micro_batch_size, 'row')} = {run.rows_per_step * run.dataset.seq_len:,} tokens",
        ),
        ("run", f"{plural(left, 'step')}{f' after {done}' if done else ''}, {epochs:.2f} epochs in all; {compile_config.precision}"),
        ("ranks", f"{run.mesh.size()} on {run.device.type}"),
        ("plan", plan_line(run)),
        ("predicted", prediction_line(run.plan)),
        ("files", f"{run.program_folder}, {run.config.run_folder}, {run.config.log_folder}"),
    ]
    note = kernel_note(compile_config.attention_kernel)
    rows += [("note", note)] if note else []
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def plan_line(run: Run) -> str:
    """Mesh, storage and what becomes of activations."""
    axes = " x ".join(f"{name} {size}" for name, size in (("dp", run.loader.dp_size), *run.program.MESH.items()) if size > 1)
    return f"{axes or 'one rank'}, ZeRO {run.program.ZERO}, {_modes(run.plan)}"


def prediction_line(plan: dict[str, Any]) -> str:
    """Step time and memory of a rank, and the hardware they hold for."""
    memory = f"{plan['peak_memory_gib']['total']:.3g} of {plan['memory_limit_gib']:.3g} GiB a rank"
    return f"{plan['step_time_s']:.3g} s a step, {memory}, on {plan['hardware']}"


def measured_mfu(plan: dict[str, Any], step_time_s: float) -> float:
    """Causal MFU of a measured step: the plan's, scaled by predicted over measured time, as the FLOPs are the same."""
    return plan["mfu_causal"] * plan["step_time_s"] / step_time_s


def plural(count: int, one: str, many: str | None = None) -> str:
    """`1 row`, `2 rows`."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def kernel_note(kernel: str | None) -> str | None:
    """What is to be said of a plan that was made for an attention kernel other than PyTorch's; None where there is nothing."""
    if kernel is None:
        return None
    return f"the plan is for the attention kernel {kernel}; training runs PyTorch's own kernels, so expect longer steps than predicted"


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
