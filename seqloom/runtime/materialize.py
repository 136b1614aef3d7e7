"""From an emitted program to a model that can train: storage laid out, weights filled.

In: the program, the mesh, and the weights of a Hugging Face folder or a seed. Out: the program's model on the device, its parameters
DTensors in full precision. The steps, in order: build under meta with global shapes; split parameters over the plan axes of PLACEMENTS;
let FSDP2 hold blocks and root over the axes of SHARDED; allocate this rank's pieces; fill them. No rank ever holds the full model.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import distribute_tensor

from seqloom.errors import UserError
from seqloom.runtime.initialize import fill_buffers, fill_random
from seqloom.runtime.mesh import DP, axis_mesh
from seqloom.runtime.program import Program
from seqloom.runtime.weights import fill_from_folder

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def materialize(
    program: Program,
    mesh: DeviceMesh,
    hf_config: PretrainedConfig,
    *,
    weights: Path | None,
    seed: int,
    device: torch.device,
    param_dtype: torch.dtype = torch.float32,
    compute_dtype: torch.dtype = torch.bfloat16,
) -> nn.Module:
    """Build, distribute and fill the model of `program`.

    `weights` is a Hugging Face folder with safetensors, or None to initialize as the original model does, from `seed`: the same values
    whatever the plan and the number of ranks. Parameters are stored as `param_dtype`, computed with as `compute_dtype`, their gradients
    summed in fp32 (in fp64 where they are stored so). Raises `UserError` where weights and program do not agree.
    """
    model = storage(program, mesh, param_dtype, compute_dtype)
    model.to_empty(device=device)
    if weights is None:
        fill_random(model, hf_config, seed)
    else:
        fill_from_folder(model, hf_config, weights, program.TIED)
    fill_buffers(model, hf_config)
    return model


def storage(program: Program, mesh: DeviceMesh, param_dtype: torch.dtype, compute_dtype: torch.dtype) -> nn.Module:
    """The program's model on meta with every parameter in its storage placement: DTensors held by FSDP2."""
    with torch.device("meta"):
        model = program.MODEL(mesh)
    _split_parameters(model, program, mesh, param_dtype)
    _fully_shard(model, program, mesh, param_dtype, compute_dtype)
    return model


def _split_parameters(model: nn.Module, program: Program, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Give every parameter its dtype, and those of PLACEMENTS their DTensor over the axes named there, in mesh order."""
    patterns = {re.compile(re.escape(name).replace(r"\*", r"\d+")): (name, placed) for name, placed in program.PLACEMENTS.items()}
    used = set()
    for name, param in list(model.named_parameters()):
        tensor = torch.empty(param.shape, dtype=dtype, device="meta")
        matches = [entry for pattern, entry in patterns.items() if pattern.fullmatch(name)]
        if matches:
            used.add(matches[0][0])
            placed = matches[0][1]
            axes = tuple(axis for axis in mesh.mesh_dim_names if axis in placed)
            placements = [placed[axis] for axis in axes]
            tensor = distribute_tensor(tensor, mesh[axes], placements, src_data_rank=None)
        holder, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(holder), leaf, nn.Parameter(tensor, requires_grad=param.requires_grad))
    unknown = sorted(set(program.PLACEMENTS) - used)
    if unknown:
        raise UserError(f"PLACEMENTS names {unknown[0]}, which is no parameter of the program; mend the name or compile again")


def _fully_shard(model: nn.Module, program: Program, mesh: DeviceMesh, param_dtype: torch.dtype, compute_dtype: torch.dtype) -> None:
    """Hold each block and the rest of the model as one FSDP2 group; gradients are sums over `dp` and SUM_GRADS, never means."""
    options = {
        "mesh": _storage_mesh(program, mesh),
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=compute_dtype,
            reduce_dtype=torch.promote_types(torch.float32, param_dtype),
            cast_forward_inputs=False,
        ),
    }
    blocks = [module for module in model.modules() if isinstance(module, program.BLOCKS)]
    for block in blocks:
        fully_shard(block, reshard_after_forward=program.ZERO == 3, **options)
    # The root's parameters (embedding, head) are needed again as soon as the backward begins: never reshard them after the forward.
    fully_shard(model, reshard_after_forward=False, **options)
    # A block is gathered in front of the block before it, also where the host is not ahead of the device; backward FSDP2 does so itself.
    for before, block in itertools.pairwise([model, *blocks]):
        before.set_modules_to_forward_prefetch([block])
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _storage_mesh(program: Program, mesh: DeviceMesh) -> DeviceMesh:
    """The ranks that share the storage of the parameters: those of SHARDED.

    Where other axes that sum gradients hold copies of it, a mesh of two dimensions, replicas and shards (hybrid sharding), whatever the
    order of these axes in the mesh.
    """
    copies = [axis for axis in (DP, *program.SUM_GRADS) if axis not in program.SHARDED and mesh[axis].size() > 1]
    if not copies:
        return axis_mesh(mesh, *(program.SHARDED or (DP, *program.SUM_GRADS)))
    replicas = axis_mesh(mesh, *copies)
    if not program.SHARDED:
        return replicas._unflatten(0, (replicas.size(), 1), ("replicas", "shard"))
    return DeviceMesh._concatenate([replicas, axis_mesh(mesh, *program.SHARDED)])
