"""Recomputation in tiles: a segment that treats every position alike runs on one stretch of the sequence after the other.

An emitted block writes `checkpoint_tiles(self.mlp_forward, x, tiles=8, in_dims=(1,), out_dims=(1,))`. Only inputs and outputs outlive the
forward; the backward recomputes and differentiates one tile at a time, so that a wide activation (of an MLP, of the logits) never exists
for more than one tile (TiledMLP of Arctic Long Sequence Training, arXiv:2506.13996).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from seqloom.errors import UserError


def checkpoint_tiles(
    function: Callable[..., Any], *args: Any, tiles: int, in_dims: Sequence[int | None], out_dims: Sequence[int]
) -> Tensor | tuple[Tensor, ...]:
    """`function(*args)`, run and recomputed in `tiles` pieces, or in as many as there are elements where these are fewer.

    Argument i is cut along dimension `in_dims[i]` into pieces whose lengths differ by one at most, or passed whole where that is None.
    `function` returns a tensor, or a tuple of tensors; output j of the tiles is concatenated along `out_dims[j]`. Raises `UserError`
    where the numbers of arguments, outputs and dimensions do not agree.
    """
    if len(in_dims) != len(args) or all(dim is None for dim in in_dims):
        raise UserError(f"checkpoint_tiles was given {len(args)} arguments and in_dims {in_dims}: give a dimension, or None, for each")
    tiles = at_most(tiles, args, in_dims)
    cut = [pieces(arg, tiles, dim) for arg, dim in zip(args, in_dims, strict=True)]
    results = [checkpoint(function, *piece, use_reentrant=False) for piece in zip(*cut, strict=True)]
    single = isinstance(results[0], Tensor)
    outputs = list(zip(*([result] if single else result for result in results), strict=True))
    if len(outputs) != len(out_dims):
        raise UserError(f"checkpoint_tiles was given {len(out_dims)} out_dims for {len(outputs)} outputs: give one dimension for each")
    joined = tuple(torch.cat(parts, dim) for parts, dim in zip(outputs, out_dims, strict=True))
    return joined[0] if single else joined


def at_most(tiles: int, args: Sequence[Tensor], dims: Sequence[int | None]) -> int:
    """`tiles`, or the shortest of the dimensions to be cut where that is less: a plan for long sequences also runs on short ones."""
    return min([tiles, *(arg.size(dim) for arg, dim in zip(args, dims, strict=True) if dim is not None)])


def pieces(arg: Tensor, tiles: int, dim: int | None) -> Sequence[Tensor]:
    """What each tile gets of one tensor: nearly equal parts, or the whole where `dim` is None.

    One split, whose backward is one concatenation, and not a slice and a sum for every tile.
    """
    return [arg] * tiles if dim is None else torch.tensor_split(arg, tiles, dim)
