"""Steps of hand-written programs equal those of the plain model in one process: loss, norm, every gradient, five AdamW steps, in fp64."""

from pathlib import Path

import mlp_lm
import pytest
import torch
from procs import run_ranks
from torch.distributed.tensor import DTensor

from seqloom.checkpoint.slices import local_boxes, local_tensor
from seqloom.runtime.materialize import storage
from seqloom.runtime.mesh import build_mesh
from seqloom.runtime.optimizer import build_optimizer
from seqloom.runtime.program import load_program
from seqloom.runtime.step import TrainStep, accumulate_gradients, reduce_loss_and_norm

PROGRAMS = Path(__file__).parent / "handwritten_programs"
CPU = torch.device("cpu")
SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1, "eps": 1e-8}
CLIP = 0.5


def variant(folder, name, **changes):
    """A program of its own folder with some of its constants changed."""
    lines = (PROGRAMS / name / "program.py").read_text().split("\n")
    for constant, value in changes.items():
        lines = [f"{constant} = {value!r}" if line.startswith(f"{constant} = ") else line for line in lines]
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / "program.py").write_text("\n".join(lines))
    return load_program(folder)


def filled(program, mesh, weights, param_dtype=torch.float64, compute_dtype=torch.float64):
    """The program's model with the given whole weights."""
    model = storage(program, mesh, param_dtype, compute_dtype)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, param in model.named_parameters():
            for box in local_boxes(param):
                box.place.narrow(local_tensor(param)).copy_(box.part.narrow(weights[name]))
    return model


def reference_steps(tied, batches_of_steps):
    """Per step: loss, gradients, norm; and the weights in the end. Plain PyTorch, one process."""
    model = mlp_lm.build(tied)
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay}, {"params": rest, "weight_decay": 0.0}],
        foreach=False,
        **SETTINGS,
    )
    steps = []
    for batches in batches_of_steps:
        tokens = sum((b["labels"] != -100).sum() for b in batches)
        loss = sum(model(**b) for b in batches) / tokens
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        steps.append((loss.detach(), norm, tokens, gradients))
        optimizer.step()
        optimizer.zero_grad()
    return steps, {name: p.detach() for name, p in model.named_parameters()}


def close(got, wanted, what, tolerance=1e-10):
    got = got.full_tensor() if isinstance(got, DTensor) else got
    torch.testing.assert_close(got, wanted.to(got.dtype), rtol=tolerance, atol=tolerance, msg=lambda text: f"{what}: {text}")


def _parity(rank, world_size, folder, name, plan_mesh, dp, zeros, micro_counts, steps=5):
    tied = name == "tp"
    for zero in zeros:
        for micro in micro_counts:
            program = variant(f"{folder}/{rank}/{zero}", name, ZERO=zero, MESH=plan_mesh)
            mesh = build_mesh(program.MESH, dp, "cpu")
            unit = mesh.get_local_rank("dp")
            numbers = [[[step * 100 + unit_ * 10 + m for m in range(micro)] for unit_ in range(dp)] for step in range(steps)]
            expected, final = reference_steps(tied, [[mlp_lm.batch(i) for u in step for i in u] for step in numbers])
            model = filled(program, mesh, mlp_lm.build(tied).state_dict())
            optimizer = build_optimizer(model, **SETTINGS)
            train_step = TrainStep(model, program, mesh, optimizer, CPU, CLIP)
            what = f"{name} zero {zero} micro {micro}"

            batches = [mlp_lm.batch(i) for i in numbers[0][unit]]
            part, tokens = accumulate_gradients(model, program, mesh, batches, CPU)
            loss, norm = reduce_loss_and_norm(model, program, mesh, part)
            for key, param in model.named_parameters():
                close(param.grad, expected[0][3][key], f"{what} gradient of {key}")
            close(loss, expected[0][0], f"{what} loss")
            close(norm, expected[0][1], f"{what} norm")
            model.zero_grad(set_to_none=True)

            for step, units in enumerate(numbers):
                result = train_step([mlp_lm.batch(i) for i in units[unit]])
                close(result.loss, expected[step][0], f"{what} step {step} loss")
                close(result.grad_norm, expected[step][1], f"{what} step {step} norm")
                assert result.tokens == expected[step][2]
            for key, param in model.named_parameters():
                close(param, final[key], f"{what} final {key}")


CASES = [
    ("sp", {"sp": 1}, 1),
    ("sp", {"sp": 2}, 1),
    ("sp", {"sp": 1}, 2),
    ("sp", {"sp": 2}, 2),
    ("sp", {"sp": 4}, 1),
    ("tp", {"tp": 1}, 1),
    ("tp", {"tp": 2}, 1),
    ("tp", {"tp": 1}, 2),
    ("tp", {"tp": 2}, 2),
    ("tp", {"tp": 4}, 1),
    ("mixed", {"sp": 1, "tp": 1}, 1),
    ("mixed", {"sp": 1, "tp": 2}, 1),
    ("mixed", {"sp": 2, "tp": 2}, 1),
    ("mixed", {"tp": 2, "sp": 2}, 1),
    ("mixed", {"tp": 2, "sp": 1}, 2),
]


@pytest.mark.parametrize(("name", "plan_mesh", "dp"), CASES, ids=lambda value: str(value))
def test_equals_the_plain_model(tmp_path, name, plan_mesh, dp):
    world_size = dp
    for size in plan_mesh.values():
        world_size *= size
    run_ranks(_parity, world_size, str(tmp_path), name, plan_mesh, dp, (0, 1, 3), (1, 2))
