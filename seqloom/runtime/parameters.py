"""Parameters as an emitted program declares and reads them.

The program declares every parameter once, with the original model's name and its global shape; the runtime then turns some of them
into DTensors. In the forward, `local` gives this rank's plain tensor of a parameter, whichever it has become.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate


def declare(module: nn.Module, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype | None = None) -> None:
    """Create uninitialized parameters on the default device under dotted names, with the modules that hold them.

    `shapes` maps `self_attn.q_proj.weight` to its global shape. `dtype` is PyTorch's default unless given. Raises `ValueError` where
    a name is taken.
    """
    for name, shape in shapes.items():
        holder, leaf = _holder(module, name)
        holder.register_parameter(leaf, nn.Parameter(torch.empty(shape, dtype=dtype)))


def declare_buffers(module: nn.Module, buffers: Mapping[str, tuple[tuple[int, ...], torch.dtype]], persistent: bool = False) -> None:
    """Create uninitialized buffers under dotted names; `buffers` maps a name to its shape and dtype.

    Only `persistent` ones are in the state dict. Raises `ValueError` where a name is taken.
    """
    for name, (shape, dtype) in buffers.items():
        holder, leaf = _holder(module, name)
        holder.register_buffer(leaf, torch.empty(shape, dtype=dtype), persistent=persistent)


def local(param: Tensor, partial_grad: tuple[str, ...] = ()) -> Tensor:
    """This rank's piece of a parameter as a plain tensor, part of the autograd graph.

    A split axis keeps its split in the gradient. On a replicated axis every rank computes the same gradient, unless the axis is named in
    `partial_grad`: then each rank's is a part of the sum, and the parts are added up once.
    """
    if not isinstance(param, DTensor):
        return param
    placements = [
        Partial() if isinstance(placement, Replicate) and axis in partial_grad else placement
        for axis, placement in zip(param.device_mesh.mesh_dim_names, param.placements, strict=True)
    ]
    return param.to_local(grad_placements=placements)


def _holder(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that directly holds `name`, made where missing, and the last part of the name."""
    *path, leaf = name.split(".")
    for part in path:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module._modules[part]
    if hasattr(module, leaf):
        raise ValueError(f"{name} is declared twice")
    return module, leaf
