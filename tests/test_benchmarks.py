"""The loops that benchmarks compare seqloom with train alike, and the figures of benchmarks are those of their steps."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
from procs import run_ranks

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def benchmark(name: str) -> ModuleType:
    for needed in ("jobs", "reference_loops", name):
        if needed not in sys.modules:
            spec = importlib.util.spec_from_file_location(needed, BENCHMARKS / f"{needed}.py")
            sys.modules[needed] = module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
    return sys.modules[name]


def losses(rank: int, world_size: int, folder: Path) -> list[list[float]]:
    """The losses of both loops on the same rows, in that order: the Trainer leaves its state behind."""
    os.environ.update(MASTER_ADDR="localhost", LOCAL_WORLD_SIZE=str(world_size))  # as torchrun sets them
    loops = benchmark("reference_loops")
    recipe = loops.Recipe(folder, steps=3, schedule="linear", warmup_steps=1, max_grad_norm=0.1)
    rows = [loops.random_rows(61, 4, 16, seed) for seed in range(recipe.steps)]
    rows[1]["labels"][0, :9] = loops.IGNORED  # so that a mean of the ranks' means would be another number
    return [
        [step.loss for step in run]
        for run in (list(loops.fsdp2_steps(recipe, rows.__getitem__)), loops.train_trainer(recipe, loops.joined(rows)))
    ]


def test_both_reference_loops_train_alike(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).save_pretrained(tmp_path)
    for by_hand, trainer in run_ranks(losses, 2, tmp_path, timeout=240.0):
        assert len(by_hand) == 3
        assert trainer == pytest.approx(by_hand, abs=1e-6)


def test_figures_are_those_of_the_undisturbed_half_of_the_turns() -> None:
    def steps(*seconds_and_waited: tuple[float, float]) -> list[dict[str, float]]:
        return [{"seconds": seconds, "waited": waited, "worked": 1.0, "loss": 2.0} for seconds, waited in seconds_and_waited]

    warm_up, disturbed = (99.0, 0.0), (9.0, 5.0)
    timed = {"seqloom": steps(warm_up, (2, 0), disturbed, (4, 0)), "fsdp2": steps(warm_up, (3, 0), (1, 0), (8, 0))}
    found = benchmark("side_by_side").figures(timed, length=6)
    assert (found["seqloom"]["step_s"], found["seqloom"]["tokens_per_s"], found["fsdp2"]["step_s"]) == (3, 4, 5.5)
    assert (found["seqloom"]["ratio"], found["fsdp2"]["ratio"]) == (1.75, 1)


def test_the_loop_is_compared_with_its_neighbour() -> None:
    quiet = [[(2.0, 0.0, 2.0), (1.9, 0.0, 1.0)], [(4.0, 0.0, 2.0), (3.8, 0.0, 1.0)]]
    disturbed = [[(9.0, 5.0, 2.0), (1.0, 0.0, 1.0)], [(1.0, 0.5, 2.0), (9.0, 0.0, 1.0)]]
    found = benchmark("trainer_loop").compare(disturbed + quiet)
    assert found["ratio"] == pytest.approx(0.95)
    assert found["work_ratio"] == pytest.approx(0.5)
    assert (found["pairs"], found["waited_share"]) == (2, 0)
