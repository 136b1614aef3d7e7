"""`--wandb PROJECT`: the scalars of every step to Weights & Biases too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from seqloom.errors import UserError


def open_wandb(project: str, name: str, folder: Path, settings: dict[str, Any]) -> Callable[[dict[str, float], int], None]:
    """Begin or continue the run `name` of a project; returns what logs scalars of a step. Raises `UserError` where it cannot begin."""
    try:
        import wandb
    except ImportError as error:
        raise UserError("--wandb needs the package wandb, which is not installed: `pip install wandb`, or leave --wandb out") from error
    try:
        wandb.init(project=project, name=name, id=name, resume="allow", dir=str(folder), config=settings)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(
            f"Weights & Biases cannot begin ({reason}): run `wandb login`, set WANDB_MODE=offline, or leave --wandb out"
        ) from error
    return lambda scalars, step: wandb.log(scalars, step=step)
