"""Ranks and their mesh: start `torch.distributed`, lay the ranks out on named axes, give the process group of an axis.

The mesh has the axis `dp` (scale units) in front, then the plan's axes, outer to inner.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from seqloom.runtime.rendezvous import agents_store, own_part

DP = "dp"


def init_distributed(device_type: str, timeout: timedelta = timedelta(minutes=30)) -> torch.device:
    """Join the job that torchrun started (or become a job of one rank) and return this rank's device.

    `device_type` is `cpu` (gloo) or `cuda` (NCCL; the device is chosen by `LOCAL_RANK`). `timeout` bounds every collective.
    """
    device = torch.device(device_type)
    if device_type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
        lent = agents_store(timeout)
        if lent is not None:
            rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            store = own_part(lent, rank, world_size, timeout)
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
        elif "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    return device


def build_mesh(plan_mesh: Mapping[str, int], dp: int, device_type: str) -> DeviceMesh:
    """The mesh of `dp` scale units of the plan: axes `dp`, then `plan_mesh` in its order. Its sizes multiply to the world size."""
    return init_device_mesh(device_type, (dp, *plan_mesh.values()), mesh_dim_names=(DP, *plan_mesh))


def axis_mesh(mesh: DeviceMesh, *names: str) -> DeviceMesh:
    """The one-dimensional mesh of one axis, or of several flattened in mesh order."""
    if len(names) == 1:
        return mesh[names[0]]
    ordered = tuple(sorted(names, key=mesh.mesh_dim_names.index))
    return mesh[ordered]._flatten("_".join(ordered))


def axis_group(mesh: DeviceMesh, *names: str) -> ProcessGroup:
    """The process group of this rank along one axis, or along several: its ranks are then ordered as in the mesh."""
    return axis_mesh(mesh, *names).get_group()


def axis_rank(mesh: DeviceMesh, *names: str) -> int:
    """This rank's index along one axis, or along several flattened in mesh order: 0 to the product of their sizes - 1."""
    return axis_mesh(mesh, *names).get_local_rank()
