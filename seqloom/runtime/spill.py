"""Spill: a segment keeps nothing on the device for the backward pass; its inputs wait in host memory and everything is computed again.

An emitted block writes `spill(self.mlp_forward, x)`, or with `tiles=4, in_dims=(1,), out_dims=(1,)` to work through the sequence in pieces,
forward and backward. Longer sequences than this nothing on one machine allows: it is activation checkpointing to the host with sequence
tiling (Bekman et al. 2025, arXiv:2506.13996, sections 3.1 and 3.3).

The segment runs without gradients; its inputs are saved as any operator saves them, so `seqloom.runtime.offload` moves them and brings them
back ahead of time. The backward runs the segment again, a piece at a time, and differentiates it there: gradients of parameters add up in
their `.grad` as usual.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from seqloom.runtime.offload import offload
from seqloom.runtime.tiles import at_most, pieces

Dims = Sequence[int | None]


def spill(function: Callable[..., Any], *args: Tensor, tiles: int = 1, in_dims: Dims = (), out_dims: Sequence[int] = ()) -> Any:
    """`function(*args)`, a tensor or a tuple of tensors, recomputed in the backward pass from inputs that lie on the host.

    With `tiles` above 1 the arguments are cut along `in_dims` (None: passed whole) and the results joined along `out_dims`.
    """
    if not torch.is_grad_enabled():
        return function(*args)
    dims = tuple(in_dims) or (None,) * len(args)
    tiles = 1 if tiles == 1 else at_most(tiles, args, dims)
    return offload(_Spilled.apply, function, tiles, dims, tuple(out_dims), *args)


class _Spilled(torch.autograd.Function):
    """Forward without a graph; backward with one, a tile at a time."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Any], tiles: int, in_dims: Dims, out_dims: tuple[int, ...], *args: Tensor) -> Any:
        ctx.function, ctx.tiles, ctx.in_dims, ctx.out_dims = function, tiles, in_dims, out_dims
        ctx.save_for_backward(*args)
        if tiles == 1:
            return function(*args)
        parts = [function(*cut) for cut in zip(*(pieces(a, tiles, d) for a, d in zip(args, in_dims, strict=True)), strict=True)]
        if isinstance(parts[0], Tensor):
            return torch.cat(parts, out_dims[0])
        return tuple(torch.cat(column, dim) for column, dim in zip(zip(*parts, strict=True), out_dims, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        args, tiles = ctx.saved_tensors, ctx.tiles
        wanted = ctx.needs_input_grad[4:]
        cut_args = [pieces(arg, tiles, dim) for arg, dim in zip(args, ctx.in_dims, strict=True)]
        cut_grads = [pieces(grad, tiles, dim) for grad, dim in zip(grads, ctx.out_dims or (None,) * len(grads), strict=True)]
        found: list[list[Tensor]] = [[] for _ in args]
        for index in range(tiles):
            inputs = [cut[index].detach().requires_grad_(wants) for cut, wants in zip(cut_args, wanted, strict=True)]
            with torch.enable_grad():
                outputs = ctx.function(*inputs)
            outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
            pairs = [(out, cut[index]) for out, cut in zip(outputs, cut_grads, strict=True) if out.requires_grad]
            torch.autograd.backward([out for out, _ in pairs], [grad for _, grad in pairs])
            for column, given in zip(found, inputs, strict=True):
                column.append(given.grad)
        joined = [_joined(column, dim) if wants else None for column, dim, wants in zip(found, ctx.in_dims, wanted, strict=True)]
        return None, None, None, None, *joined


def _joined(grads: Sequence[Tensor], dim: int | None) -> Tensor:
    """The gradient of one argument from those of its tiles."""
    if len(grads) == 1:
        return grads[0]
    return torch.cat(list(grads), dim) if dim is not None else torch.stack(list(grads)).sum(0)
