"""Runs the programs of tests/handwritten_programs and checks them against the plain model of tests/mlp_lm.py."""

from pathlib import Path

import mlp_lm
import torch
from torch.distributed.tensor import DTensor

from seqloom.checkpoint.slices import local_boxes, local_tensor
from seqloom.runtime.materialize import storage
from seqloom.runtime.optimizer import build_optimizer
from seqloom.runtime.program import load_program
from seqloom.runtime.step import TrainStep, accumulate_gradients, reduce_loss_and_norm

PROGRAMS = Path(__file__).parent / "handwritten_programs"
CPU = torch.device("cpu")
SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1, "eps": 1e-8}
CLIP = 0.5


def variant(folder, name, edit=str, **changes):
    """A program in a folder of its own with some of its text edited, some of its constants changed or added."""
    lines = edit((PROGRAMS / name / "program.py").read_text()).split("\n")
    for constant, value in changes.items():
        lines = [line for line in lines if not line.startswith(f"{constant} = ")] + [f"{constant} = {value!r}"]
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


def check_training(program, mesh, dp, tied, micro, steps, what):
    """The gradients of one accumulation of `micro` micro-batches and then `steps` optimizer steps are those of the plain model."""
    numbers = [[[100 * step + 10 * unit + m for m in range(micro)] for unit in range(dp)] for step in range(steps)]
    expected, final = reference_steps(tied, [[mlp_lm.batch(i) for unit in step for i in unit] for step in numbers])
    mine = [[mlp_lm.batch(i) for i in step[mesh.get_local_rank("dp")]] for step in numbers]
    model = filled(program, mesh, mlp_lm.build(tied).state_dict())
    check_gradients(model, program, mesh, mine[0], expected[0], what)
    train_step = TrainStep(model, program, mesh, build_optimizer(model, **SETTINGS), CPU, CLIP)
    for step, batches in enumerate(mine):
        result = train_step(batches)
        close(result.loss, expected[step][0], f"{what} step {step} loss")
        close(result.grad_norm, expected[step][1], f"{what} step {step} norm")
        assert result.tokens == expected[step][2]
    for key, param in model.named_parameters():
        close(param, final[key], f"{what} final {key}")


def close(got, wanted, what, tolerance=1e-10):
    got = got.full_tensor() if isinstance(got, DTensor) else got
    torch.testing.assert_close(got, wanted.to(got.dtype), rtol=tolerance, atol=tolerance, msg=lambda text: f"{what}: {text}")


def check_gradients(model, program, mesh, batches, expected, what):
    """One accumulation gives the loss, norm and gradients of the plain model; clears the gradients."""
    part, tokens = accumulate_gradients(model, program, mesh, batches, CPU)
    loss, norm = reduce_loss_and_norm(model, program, mesh, part)
    for key, param in model.named_parameters():
        close(param.grad, expected[3][key], f"{what} gradient of {key}")
    close(loss, expected[0], f"{what} loss")
    close(norm, expected[1], f"{what} norm")
    assert tokens == expected[2]
    model.zero_grad(set_to_none=True)
