"""Flags that people know from nnScaler's example and that are not needed here: each is refused with what to use in its place."""

from __future__ import annotations

from collections.abc import Sequence

from seqloom.errors import UserError

INSTEAD = {
    "trace_strategy": "the graph is captured on meta tensors, without a GPU and without weights: leave it out",
    "enable_chunk_loss": "the loss head is computed in chunks by itself: leave it out, or choose the tokens of one with --loss_chunk",
    "recompute_modules": "the planner chooses what each layer recomputes: leave it out, or use --recompute none or --recompute all",
    "explore_pipeline": "plans have no pipeline stages; every layer is split over all ranks: leave it out",
    "pipeline_pivots": "plans have no pipeline stages; every layer is split over all ranks: leave it out",
    "pipeline_nstages": "plans have no pipeline stages; every layer is split over all ranks: leave it out",
    "attn_implementation": "attention is planned like any operator: leave it out, or see --attention and --attention_kernel",
    "instance_name": "a run has one name: use --name",
    "gen_reuse": "a program is used again while nothing that it was made of has changed: leave it out",
}


def refuse(args: Sequence[str]) -> None:
    """Raise `UserError` for the first of these flags on a command line."""
    for word in args:
        name = word.removeprefix("--").split("=", 1)[0].replace("-", "_")
        if word.startswith("--") and name in INSTEAD:
            raise UserError(f"--{name} is a flag of nnScaler that seqloom does not have: {INSTEAD[name]}")
