"""The examples: sequences split by magi attention give the losses and gradient norms of one whole model, in a loop and in a Trainer."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from procs import run_ranks
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SIZES = {"steps": 3, "hidden_size": 32, "layers": 1, "vocab_size": 61, "check": True}
PATIENCE = 240.0  # seconds: every rank imports the Trainer, which takes long on a machine with other work


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def loop(rank: int, world_size: int) -> Tensor:
    """Distance of the hand-written loop's figures from those of the unsplit model, two data parallel sequences at least."""
    fsdp2 = example("fsdp2_magi")
    args, device = fsdp2.Arguments(cp=2, seq_len=192, **SIZES), torch.device("cpu")
    mesh = init_device_mesh("cpu", (world_size // 2, 2), mesh_dim_names=("dp", "cp"))
    return (fsdp2.train(args, mesh, device) - fsdp2.train_unsplit(args, world_size // 2, device)).abs().max()


def trainer(rank: int, world_size: int, cp: int, plain: bool) -> Tensor:
    """Loss and gradient norm of every step of the Trainer."""
    os.environ.update(MASTER_ADDR="localhost", LOCAL_WORLD_SIZE=str(world_size))  # as torchrun sets them
    magi = example("trainer_magi")
    return magi.train(magi.Arguments(cp=cp, documents=4, longest=64, plain=plain, **SIZES), world_size)


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_loop_is_the_unsplit_model(ranks: int) -> None:
    assert max(run_ranks(loop, ranks)) <= 1e-5


@pytest.fixture(scope="module")
def one_process() -> Tensor:
    pytest.importorskip("accelerate")
    return run_ranks(trainer, 1, 1, True, timeout=PATIENCE)[0]


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_trainer_is_that_of_one_process(one_process: Tensor, ranks: int) -> None:
    for found in run_ranks(trainer, ranks, 2, False, timeout=PATIENCE):
        torch.testing.assert_close(found, one_process, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["fsdp2_magi", "trainer_magi"])
def test_an_example_fits_on_two_screens(name: str) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 150
