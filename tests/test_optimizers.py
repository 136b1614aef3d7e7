"""Optimizers by name: under every kind of sharding each makes the steps that PyTorch's own makes on the plain model, in fp64."""

import typing

import mlp_lm
import pytest
import torch
from handwritten import CPU, filled, reference_steps, variant
from procs import run_ranks
from torch import nn
from torch.distributed.tensor import DTensor

from seqloom.runtime.mesh import build_mesh
from seqloom.runtime.muon import orthogonalize
from seqloom.runtime.optimizer import OPTIMIZERS, build_optimizer, model_and_optimizer_tensors
from seqloom.runtime.step import TrainStep, update
from seqloom.trainer.config import OptimizerName

LR, DECAY, CLIP = 1e-2, 0.1, 0.5
LAYOUTS = (("sp", {"sp": 2}, 3), ("tp", {"tp": 2}, 0), ("tp", {"tp": 2}, 3), ("mixed", {"sp": 2, "tp": 1}, 2))


def plain(name, model):
    """What a user of PyTorch would write for one device."""
    named = list(model.named_parameters())
    decaying, others = [p for _, p in named if p.dim() > 1], [p for _, p in named if p.dim() == 1]
    groups = [{"params": decaying, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optim = torch.optim
    if name == "muon":
        blocks = [p for key, p in named if p.dim() == 2 and ".0." in key or ".1." in key and p.dim() == 2]
        rest = [p for p in decaying if all(p is not block for block in blocks)]
        adamw = optim.AdamW([{"params": rest, "weight_decay": DECAY}, groups[1]], lr=LR, betas=(0.9, 0.95))
        return [adamw], blocks
    made = {
        "adamw": lambda: optim.AdamW(groups, lr=LR, betas=(0.9, 0.95)),
        "adam": lambda: optim.Adam(groups, lr=LR, betas=(0.9, 0.95)),
        "nadam": lambda: optim.NAdam(groups, lr=LR, betas=(0.9, 0.95), decoupled_weight_decay=True),
        "radam": lambda: optim.RAdam(groups, lr=LR, betas=(0.9, 0.95), decoupled_weight_decay=True),
        "adamax": lambda: optim.Adamax(groups, lr=LR, betas=(0.9, 0.95)),
        "rmsprop": lambda: optim.RMSprop(groups, lr=LR, alpha=0.95),
        "sgd": lambda: optim.SGD(groups, lr=LR, momentum=0.9),
    }
    return [made[name]()], []


def plain_muon(blocks, buffers):
    """One step of Muon on whole matrices, in fp64."""
    for param in blocks:
        buffer = buffers.setdefault(param, torch.zeros_like(param))
        buffer.mul_(0.95).add_(param.grad, alpha=0.05)
        direction = orthogonalize(param.grad * 0.05 + buffer * 0.95)
        param.data.mul_(1 - LR * DECAY).sub_(direction * LR * 0.2 * max(param.shape) ** 0.5)


def plain_training(name, steps, tied):
    """Losses and final weights of the plain model."""
    model, losses, buffers = mlp_lm.build(tied), [], {}
    optimizers, blocks = plain(name, model)
    for step in range(steps):
        batch = mlp_lm.batch(step)
        loss = model(**batch) / (batch["labels"] != -100).sum()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            plain_muon(blocks, buffers)
        model.zero_grad()
        losses.append(loss.item())
    return losses, {key: p.detach() for key, p in model.named_parameters()}


def _training(rank, world_size, folder):
    """Every optimizer in every layout; half way the state moves to an optimizer made anew, as a checkpoint would move it."""
    for name in OPTIMIZERS:
        expected = {tied: plain_training(name, 6, tied) for tied in (False, True)}
        for index, (program_name, plan_mesh, zero) in enumerate(LAYOUTS):
            tied = program_name == "tp"
            losses, final = expected[tied]
            program = variant(f"{folder}/{rank}/{name}{index}", program_name, ZERO=zero, MESH=plan_mesh)
            mesh = build_mesh(program.MESH, 1, "cpu")
            model = filled(program, mesh, mlp_lm.build(tied).state_dict())
            settings = {"lr": LR, "weight_decay": DECAY, "name": name, "dtype": torch.float64}
            optimizer = build_optimizer(model, **settings)
            for step, loss in enumerate(losses):
                if step == 3:
                    saved = {key: value.clone() for key, value in model_and_optimizer_tensors(model, optimizer).items()}
                    optimizer = build_optimizer(model, **settings)
                    live = model_and_optimizer_tensors(model, optimizer, initialize=True)
                    assert live.keys() == saved.keys(), (name, live.keys() ^ saved.keys())
                    with torch.no_grad():
                        for key, value in saved.items():
                            live[key].copy_(value)
                result = TrainStep(model, program, mesh, optimizer, CPU, CLIP)([mlp_lm.batch(step)])
                assert result.loss.item() == pytest.approx(loss, rel=1e-9), (name, program_name, zero, step)
            for key, param in model.named_parameters():
                whole = param.full_tensor() if isinstance(param, DTensor) else param
                torch.testing.assert_close(whole, final[key], rtol=1e-8, atol=1e-8, msg=f"{name} {program_name} {key}")


def test_every_optimizer_makes_the_steps_of_the_plain_one_in_every_layout(tmp_path):
    run_ranks(_training, 2, str(tmp_path))


def test_the_names_of_the_flag_are_the_optimizers_there_are():
    assert set(typing.get_args(OptimizerName)) == set(OPTIMIZERS)


@pytest.mark.parametrize("shape", [(8, 8), (16, 6), (6, 16)])
def test_muon_on_one_rank_is_pytorchs(shape):
    torch.manual_seed(0)
    start, gradients = torch.randn(shape), torch.randn(3, *shape)
    mine, other = (nn.Parameter(start.clone()) for _ in range(2))
    theirs = torch.optim.Muon([other], lr=0.1, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Module()])})
    model["layers"][0].register_parameter("weight", mine)
    ours = build_optimizer(model, 0.1, weight_decay=0.1, name="muon", dtype=torch.bfloat16)
    for gradient in gradients:
        mine.grad, other.grad = gradient.clone(), gradient.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)


def test_orthogonalized_singular_values_are_near_one():
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalize(torch.randn(24, 40, dtype=torch.float64)))
    assert values.min() > 0.5
    assert values.max() < 1.3


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_a_step_that_is_not_finite_changes_nothing(name):
    model = mlp_lm.build(False)
    optimizer = build_optimizer(model, LR, name=name, dtype=torch.float64)
    before = {key: value.clone() for key, value in model_and_optimizer_tensors(model, optimizer, initialize=True).items()}
    for param in model.parameters():
        param.grad = torch.full_like(param, torch.nan)
    update(optimizer, torch.tensor(False))
    after = model_and_optimizer_tensors(model, optimizer)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    update(optimizer, torch.tensor(True))
    assert all(not torch.equal(before[f"model.{key}"], param) for key, param in model.named_parameters())


def test_the_references_agree():
    """The reference of the other tests of steps and this one agree on AdamW."""
    losses, _ = plain_training("adamw", 2, False)
    steps, _ = reference_steps(False, [[mlp_lm.batch(step)] for step in range(2)])
    assert losses == pytest.approx([step[0].item() for step in steps])
