"""Parameters of a block are on their way while the block before it computes, forward and backward."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from parity_cases import CONFIGS, SEQ_LEN, VOCAB, Case, Data, Job, Split, job, micro_batches, source
from procs import run_ranks
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard import _fsdp_param_group as param_group

from seqloom.runtime.parity import program_gradients
from seqloom.runtime.program import PROGRAM_FILE


def events(rank: int, world_size: int, task: Job) -> list[tuple[str, int]]:
    """What happens to the blocks of a program during a step, in order: `("gather" | "forward" | "backward", layer)`, -1 for the root."""
    found: list[tuple[str, int]] = []
    gather = param_group.foreach_all_gather

    def layer(name: str | None) -> int:
        number = re.search(r"layers\.(\d+)", name or "")
        return int(number[1]) if number else -1

    def recorded(params, *args):
        found.append(("gather", layer(params[0]._param_fqn)))
        return gather(params, *args)

    def done(module, args, output):
        if isinstance(module, FSDPModule):
            name = module._get_fsdp_state()._fsdp_param_group._module_fqn
            found.append(("forward", layer(name)))
            if isinstance(output, torch.Tensor) and output.requires_grad:
                output.register_hook(lambda grad: found.append(("backward", layer(name))))

    param_group.foreach_all_gather = recorded
    torch.nn.modules.module.register_module_forward_hook(done)
    program_gradients(task.folder, task.config, task.weights, micro_batches(task.data))
    return found


@pytest.fixture(scope="module")
def order(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, int]]:
    place: Path = tmp_path_factory.mktemp("prefetch") / "program"
    place.mkdir()
    (place / PROGRAM_FILE).write_text(source(Case("llama", Split("sp2", 2), 3, False)))
    return run_ranks(events, 2, job("prefetch", place, "llama", CONFIGS["llama"](), Data(VOCAB, SEQ_LEN, 1, 1, 1)))[0]


def test_forward(order: list[tuple[str, int]]) -> None:
    assert order.index(("gather", 0)) < order.index(("forward", 0))
    for layer in (1, 2):
        assert order.index(("gather", layer)) < order.index(("forward", layer - 1)) < order.index(("forward", layer))


def test_no_more_than_two_blocks_are_gathered(order: list[tuple[str, int]]) -> None:
    """What the planner counts."""
    assert order.index(("gather", 2)) > order.index(("forward", 0))


def test_backward(order: list[tuple[str, int]]) -> None:
    behind = order[order.index(("forward", -1)) :]
    assert behind.index(("gather", 1)) < behind.index(("backward", 1))  # while the last layer is differentiated
    assert behind.index(("gather", 0)) < behind.index(("backward", 0))
