"""The training state of a checkpoint beside its tensors: plain JSON that any number of ranks, under any plan, can continue from.

Entries: `step`, `tokens_seen`, `data` (the place in the data), `rng` (per rank), `optimizer` (its settings), `plan` and `mesh` (what it ran
under, for the reader's eyes), `tied` (alias -> parameter; checkpoints store a tied weight once).
"""

from __future__ import annotations

import base64
import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from seqloom.checkpoint import group
from seqloom.data.loader import Loader
from seqloom.runtime.program import Program
from seqloom.trainer.config import TrainConfig


def training_state(
    config: TrainConfig, program: Program, loader: Loader, step: int, tokens_seen: int, device: torch.device
) -> dict[str, Any]:
    """The state after `step` steps. Collective: the random generators of all ranks are gathered."""
    request = config.compile
    return {
        "step": step,
        "tokens_seen": tokens_seen,
        "data": loader.state_dict(),
        "rng": group.gather_json(random_state(device)),
        "optimizer": dataclasses.asdict(config.optimizer),
        "plan": {
            "name": request.name,
            "plan_ngpus": request.plan_ngpus,
            "runtime_ngpus": request.runtime_ngpus,
            "zero": program.ZERO,
            "precision": request.precision,
        },
        "mesh": {"dp": request.runtime_ngpus // request.plan_ngpus, **program.MESH},
        "tied": dict(program.TIED),
    }


def random_state(device: torch.device) -> dict[str, str]:
    """PyTorch's generators of this rank as text."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {kind: base64.b64encode(state.numpy().tobytes()).decode() for kind, state in states.items()}


def restore_random_state(rng: list[dict[str, str]], device: torch.device, seed: int, step: int) -> None:
    """Continue this rank's generators; where the number of ranks changed, seed them anew from the run's seed, the step and the rank."""
    if len(rng) != dist.get_world_size():
        seed_random_state(seed, step)
        return
    mine = rng[dist.get_rank()]
    torch.set_rng_state(_bytes(mine["cpu"]))
    if device.type == "cuda" and "cuda" in mine:
        torch.cuda.set_rng_state(_bytes(mine["cuda"]), device)


def seed_random_state(seed: int, step: int) -> None:
    """Give every rank generators of its own."""
    torch.manual_seed(((seed * 1_000_003 + step) * 65_537 + dist.get_rank()) % 2**63)


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
