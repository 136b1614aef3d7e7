"""Compiling without training: `train.py --run_mode compile` and `python -m seqloom compile`."""

from __future__ import annotations

import os

from seqloom.errors import UserError
from seqloom.trainer.config import CompileConfig
from seqloom.trainer.summary import kernel_note, prediction_line


def compile_only(config: CompileConfig) -> None:
    """Write the program of a config and print what was planned. Raises `UserError`, also in a job of several ranks: one must do it."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("compiling takes one plain process: use `python train.py --run_mode compile ...` without torchrun")
    request = config.request()
    from seqloom.emit.pipeline import compile_program
    from seqloom.report.plan_page import write_plan_page

    compiled = compile_program(request)
    write_plan_page(compiled.folder)
    print(f"wrote {compiled.folder}")
    print(f"predicted: {prediction_line(compiled.plan)}")
    for axis, share in compiled.plan["repeated"].items():
        print(
            f"note: {share:.0%} of the compute is repeated by all {compiled.plan['mesh'][axis]} ranks of {axis}: splitting it would not pay"
        )
    note = kernel_note(config.attention_kernel)
    if note:
        print(f"note: {note}")
