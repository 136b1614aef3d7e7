"""Declared parameters have the original names and global shapes; `local` reads their pieces and says what their gradients are."""

import pytest
import torch
from procs import run_ranks
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from seqloom.runtime.mesh import build_mesh
from seqloom.runtime.parameters import declare, declare_buffers, local


def test_declare_makes_nested_names_on_the_default_device():
    module = nn.Module()
    with torch.device("meta"):
        declare(module, {"self_attn.q_proj.weight": (6, 4), "self_attn.q_proj.bias": (6,), "norm.weight": (4,)}, dtype=torch.float64)
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == {
        "self_attn.q_proj.weight": (6, 4),
        "self_attn.q_proj.bias": (6,),
        "norm.weight": (4,),
    }
    assert all(p.is_meta and p.requires_grad and p.dtype == torch.float64 for p in module.parameters())
    assert module.self_attn.q_proj.weight is dict(module.named_parameters())["self_attn.q_proj.weight"]


def test_declare_joins_existing_modules_and_refuses_a_taken_name():
    module = nn.Module()
    declare(module, {"proj.weight": (2, 2)})
    declare(module, {"proj.bias": (2,)})
    assert list(module.state_dict()) == ["proj.weight", "proj.bias"]
    with pytest.raises(ValueError, match=r"proj\.bias is declared twice"):
        declare(module, {"proj.bias": (2,)})


def test_buffers_persistent_or_not():
    module = nn.Module()
    declare_buffers(module, {"rotary_emb.inv_freq": ((8,), torch.float32)})
    declare_buffers(module, {"mask": ((2, 2), torch.bool)}, persistent=True)
    assert {name: (tuple(b.shape), b.dtype) for name, b in module.named_buffers()} == {
        "rotary_emb.inv_freq": ((8,), torch.float32),
        "mask": ((2, 2), torch.bool),
    }
    assert list(module.state_dict()) == ["mask"]


def test_local_of_a_plain_tensor_is_itself():
    weight = nn.Parameter(torch.ones(3))
    assert local(weight) is weight


def _gradients(rank, world_size):
    mesh = build_mesh({"sp": 2, "tp": 2}, 1, "cpu")["sp", "tp"]
    sp, tp = mesh.get_local_rank("sp"), mesh.get_local_rank("tp")
    whole = torch.arange(8.0).view(4, 2)

    split = nn.Parameter(distribute_tensor(whole, mesh, [Replicate(), Shard(0)]))
    piece = local(split, partial_grad=("sp",))
    assert not isinstance(piece, DTensor) and torch.equal(piece, whole.chunk(2)[tp])
    (piece * (sp + 1)).sum().backward()
    gradient = split.grad.redistribute(placements=[Replicate(), Shard(0)])
    assert torch.equal(gradient.full_tensor(), torch.full((4, 2), 3.0))

    same = nn.Parameter(distribute_tensor(whole, mesh, [Replicate(), Replicate()]))
    (local(same) * 5).sum().backward()
    assert torch.equal(same.grad.full_tensor(), torch.full((4, 2), 5.0))

    parts = nn.Parameter(distribute_tensor(whole, mesh, [Replicate(), Replicate()]))
    (local(parts, partial_grad=("tp",)) * 5 * (tp + 1)).sum().backward()
    assert torch.equal(parts.grad.full_tensor(), torch.full((4, 2), 15.0))


def test_gradients_of_split_and_replicated_axes():
    run_ranks(_gradients, 4)
