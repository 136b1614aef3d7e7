"""Twenty AdamW steps in fp32 of emitted programs on several ranks: the losses of the plain model in one process, within 1e-5.

The reference is transformers and `torch.optim.AdamW`, with no line of ours but the data: what a user would write for one device. Every
step sees the same two rows, as two micro-batches, as two scale units, or as one micro-batch of two rows that the plan splits.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from parity_cases import CONFIGS, SEQ_LEN, Case, Split, source
from procs import run_ranks
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from seqloom.runtime.materialize import materialize
from seqloom.runtime.mesh import DP, build_mesh
from seqloom.runtime.optimizer import build_optimizer
from seqloom.runtime.parity import random_batches
from seqloom.runtime.program import PROGRAM_FILE, load_program
from seqloom.runtime.step import IGNORED, MicroBatch, TrainStep

pytestmark = pytest.mark.timeout(600)
STEPS, ROWS = 20, 2
TOLERANCE = 1e-5
CLIP = 1.0
SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1, "eps": 1e-8}
CASES = (
    Case("llama", Split("sp2", 2), 3, False, 2),
    Case("llama", Split("sp2", 2), 1, True, 2),
    Case("llama", Split("tp2", 2), 3, False, 2),
    Case("llama", Split("tp_sp2", 2), 0, True, 2),
    Case("llama", Split("dp2", 2, batch=2), 3, False),
    Case("llama", Split(None, 1, units=2), 1, False),
    Case("llama", Split("sp2,tp2", 4), 3, False, 2),
    Case("llama", Split("sp2,tp2", 4), 0, True, 2),
    Case("llama", Split("sp2", 2, units=2), 1, False),
    Case("gpt2", Split("sp2,tp2", 4), 1, False, 2),
    Case("gpt2", Split("tp2", 2), 3, False, 2),
    Case("qwen3", Split("dp2,tp2", 4, batch=2), 3, False),
)


@dataclass(frozen=True)
class Curve:
    """Loss and gradient norm of each step."""

    losses: list[float]
    norms: list[float]


def rows(step: int) -> MicroBatch:
    """The step's two rows; they do not have as many labels that count. Four batches come round and round, so that they can be learned."""
    batch = random_batches(CONFIGS["llama"](), ROWS, SEQ_LEN, 1, seed=step % 4)[0]
    batch["labels"][0, -9:] = IGNORED
    return batch


def unit_batches(case: Case, step: int, unit: int) -> list[MicroBatch]:
    """The rows of one scale unit, as its micro-batches."""
    mine = {name: tensor.chunk(case.split.units)[unit] for name, tensor in rows(step).items()}
    return [
        {name: tensor[first : first + case.split.batch] for name, tensor in mine.items()}
        for first in range(0, ROWS // case.split.units, case.split.batch)
    ]


def plain_training(weights: Path) -> Curve:
    """The reference: one process, PyTorch and transformers."""
    model = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32, attn_implementation="sdpa").train()
    decaying = [param for param in model.parameters() if param.dim() > 1]
    others = [param for param in model.parameters() if param.dim() == 1]
    optimizer = torch.optim.AdamW([{"params": decaying}, {"params": others, "weight_decay": 0.0}], **SETTINGS)
    curve = Curve([], [])
    for step in range(STEPS):
        batch = rows(step)
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED)
        loss.backward()
        curve.losses.append(loss.item())
        curve.norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        optimizer.step()
        optimizer.zero_grad()
    return curve


def train_all(rank: int, world_size: int, cases: list[Case], place: Path) -> dict[str, Curve]:
    """The body of one process: every case in turn, from the same weights."""
    return {case.id: _train(case, place) for case in cases}


def _train(case: Case, place: Path) -> Curve:
    program, device = load_program(place / case.id), torch.device("cpu")
    mesh = build_mesh(program.MESH, case.split.units, "cpu")
    config, weights = CONFIGS[case.model](), place / f"weights-{case.model}"
    model = materialize(program, mesh, config, weights=weights, seed=0, device=device, compute_dtype=torch.float32)
    step = TrainStep(model, program, mesh, build_optimizer(model, **SETTINGS), device, CLIP)
    curve = Curve([], [])
    for index in range(STEPS):
        result = step(unit_batches(case, index, mesh.get_local_rank(DP)))
        curve.losses.append(result.loss.item())
        curve.norms.append(result.grad_norm.item())
    return curve


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the initial weights of each model, as transformers initializes them."""
    folder = tmp_path_factory.mktemp("training")
    for model in sorted({case.model for case in CASES}):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(CONFIGS[model](), dtype=torch.float32).save_pretrained(folder / f"weights-{model}")
    return folder


@pytest.fixture(scope="module")
def plain(place: Path) -> dict[str, Curve]:
    return {model: plain_training(place / f"weights-{model}") for model in sorted({case.model for case in CASES})}


@pytest.fixture(scope="module")
def curves(request: pytest.FixtureRequest, place: Path) -> dict[str, list[Curve]]:
    """What every rank reports, by case id, for all selected tests."""
    params = [item.callspec.params for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    found: dict[str, list[Curve]] = {}
    cases = {row["case"].id: row["case"] for row in params if "case" in row}.values()
    for case in cases:
        (place / case.id).mkdir()
        (place / case.id / PROGRAM_FILE).write_text(source(case, torch.float32))
    for world_size in sorted({case.split.world_size for case in cases}):
        mine = [case for case in cases if case.split.world_size == world_size]
        results = run_ranks(train_all, world_size, mine, place, timeout=120 + 40 * len(mine))
        found |= {case.id: [result[case.id] for result in results] for case in mine}
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_losses_are_those_of_one_process(case: Case, curves: dict[str, list[Curve]], plain: dict[str, Curve]) -> None:
    found, wanted = curves[case.id][0], plain[case.model]
    assert found.losses == pytest.approx(wanted.losses, rel=0, abs=TOLERANCE)
    assert found.norms == pytest.approx(wanted.norms, rel=1e-3)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_every_rank_reports_the_same(case: Case, curves: dict[str, list[Curve]]) -> None:
    assert len(curves[case.id]) == case.split.world_size
    assert all(curve == curves[case.id][0] for curve in curves[case.id])


def test_training_is_long_and_rough_enough_to_show_a_mistake(plain: dict[str, Curve]) -> None:
    """The loss falls by far more than the tolerance, and the gradients are clipped."""
    for curve in plain.values():
        assert curve.losses[0] - curve.losses[-1] > 0.1
        assert max(curve.norms) > CLIP


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_every_step_sees_both_rows_once(case: Case) -> None:
    batches = [batch for unit in range(case.split.units) for batch in unit_batches(case, 3, unit)]
    assert len(batches) == case.accumulation * case.split.units
    for name, whole in rows(3).items():
        assert torch.equal(torch.cat([batch[name] for batch in batches]), whole)
