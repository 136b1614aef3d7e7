"""Emitted blocks are clean under `torch.compile`: a full graph for each, equal gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import FAMILIES
from procs import run_ranks
from transformers import AutoModelForCausalLM

from seqloom.capture import capture
from seqloom.cost.hardware import load_hardware
from seqloom.emit.program import program_source
from seqloom.plan.plan import realize
from seqloom.plan.price import Machine
from seqloom.plan.regions import build_regions
from seqloom.plan.request import Request
from seqloom.plan.solver import solve
from seqloom.runtime.compiled import compile_blocks, segment_names
from seqloom.runtime.materialize import materialize
from seqloom.runtime.mesh import build_mesh
from seqloom.runtime.parity import random_batches
from seqloom.runtime.program import load_program
from seqloom.runtime.step import accumulate_gradients

CPU = torch.device("cpu")


def write(folder: Path, family: str, force: str) -> None:
    """A fp32 program with every segment recomputed, and weights."""
    config = FAMILIES[family](2)
    captured = capture(config, batch_size=1, seq_len=32, dtype=torch.float32, loss_chunk=8)
    regions, hardware = build_regions(captured.graph), load_hardware("cpu")
    decisions, _ = solve(regions, Request(2, 1, 1, hardware, 4, force, 3, True))
    plan = realize(regions, decisions, Machine(hardware, decisions.axes, 1))
    (folder / "program.py").write_text(program_source(plan, captured.model_class, captured.tied, "A summary."))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / "weights")


def _both(rank: int, world_size: int, folder: str, family: str, backend: str) -> tuple[list[float], int, int]:
    """Losses and gradient norms, eager and compiled; how many graphs were compiled, and how many segments the kinds of blocks have."""
    config, program = FAMILIES[family](2), load_program(Path(folder))
    mesh, batches, found = build_mesh(program.MESH, 1, "cpu"), random_batches(FAMILIES[family](2), 1, 32, 1, 0), []
    torch._dynamo.utils.counters.clear()
    for compiled in (False, True):
        model = materialize(program, mesh, config, weights=Path(folder) / "weights", seed=0, device=CPU, compute_dtype=torch.float32)
        if compiled:
            compile_blocks(model, program, backend)
        loss, _ = accumulate_gradients(model, program, mesh, batches, CPU)
        found += [float(loss), *(float(p.grad.full_tensor().norm()) for p in model.parameters())]
    assert not torch._dynamo.utils.counters["graph_break"]
    segments = sum(len(segment_names(block)) for block in program.BLOCKS)
    return found, torch._dynamo.utils.counters["stats"]["unique_graphs"], segments


PLANS = [("llama", "sp2", "aot_eager"), ("llama", "tp_sp2", "aot_eager"), ("gpt2", "sp2", "aot_eager"), ("llama", "sp2", "inductor")]


@pytest.mark.parametrize(("family", "force", "backend"), PLANS)
def test_blocks_compile_whole(family, force, backend, tmp_path):
    """Gradients are those of the eager blocks, no graph breaks, and equal blocks share their graphs."""
    write(tmp_path, family, force)
    for found, graphs, segments in run_ranks(_both, 2, str(tmp_path), family, backend, timeout=280):
        half = len(found) // 2
        assert found[half:] == pytest.approx(found[:half], rel=1e-5)
        assert graphs == segments
