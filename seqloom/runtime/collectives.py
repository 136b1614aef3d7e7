"""The reshards: the collectives that turn one placement into another, forward and backward.

Emitted programs call these and nothing else to communicate between operators. A placement says how a tensor *and its gradient* lie
on the ranks of a group of `n` ranks: `S(d)` both split along `d`; `R` both the same everywhere; `B` the same tensor, each rank with a
part of the gradient's sum; `P` each rank with a part of the tensor's sum, the same gradient. Every function here is one row of the
table in docs/architecture.md, and its backward is the transpose of its forward under those meanings.

All take a local tensor and a `ProcessGroup`, work on any dimension and any memory format, and return contiguous copies (`sum_grad` and
`share_grad`: views; `packed_all_to_all`: views of one copy). They are made of PyTorch's functional collectives, so that `torch.compile`
and fake tensors trace through them. Two mesh axes that make the same move together use the group of both
(`seqloom.runtime.mesh.axis_group`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed._functional_collectives
from torch import Tensor
from torch.distributed import ProcessGroup

_ops = torch.ops._c10d_functional


def all_gather(x: Tensor, dim: int, group: ProcessGroup, partial_grad: bool = False) -> Tensor:
    """S(dim) -> R, or -> B with `partial_grad`: gather the pieces along `dim`.

    `x` `[.., l/n, ..]` -> `[.., l, ..]`. Backward: this rank's slice of the gradient, or with `partial_grad` its reduce-scatter.
    """
    if group.size() == 1:
        return x
    return _AllGather.apply(x, dim % x.dim(), group, partial_grad)


def all_to_all(x: Tensor, split_dim: int, concat_dim: int, group: ProcessGroup) -> Tensor:
    """S(concat_dim) -> S(split_dim): split along one dimension instead of another.

    `x` `[.., c/n, .., s, ..]` -> `[.., c, .., s/n, ..]`. Backward: the all-to-all the other way.
    """
    if group.size() == 1:
        return x
    return _AllToAll.apply(x, split_dim % x.dim(), concat_dim % x.dim(), group)


def packed_all_to_all(*tensors: Tensor, split_dim: int, concat_dim: int, group: ProcessGroup) -> tuple[Tensor, ...]:
    """`all_to_all` of several tensors in one collective, as query, key and value.

    The tensors are alike but for the size of `split_dim`. One copy packs all of them, one unpacks them: the results are views of one
    tensor, laid along `split_dim`. Backward: one all-to-all the other way.
    """
    if group.size() == 1:
        return tensors
    rank = tensors[0].dim()
    return _PackedAllToAll.apply(split_dim % rank, concat_dim % rank, group, *tensors)


def all_reduce(x: Tensor, group: ProcessGroup, partial_grad: bool = False) -> Tensor:
    """P -> R, or -> B with `partial_grad`: sum over the ranks. Same shape. Backward: identity, or with `partial_grad` the sum."""
    if group.size() == 1:
        return x
    return _AllReduce.apply(x, group, partial_grad)


def reduce_scatter(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """P -> S(dim): sum over the ranks and keep this rank's slice. `x` `[.., l, ..]` -> `[.., l/n, ..]`. Backward: all-gather."""
    if group.size() == 1:
        return x
    return _ReduceScatter.apply(x, dim % x.dim(), group)


def shard(x: Tensor, dim: int, group: ProcessGroup, partial_grad: bool = False) -> Tensor:
    """R -> S(dim), or B -> S(dim) with `partial_grad`: this rank's slice along `dim`.

    `x` `[.., l, ..]` -> `[.., l/n, ..]`. Backward: all-gather, or with `partial_grad` zeros around this rank's slice.
    """
    if group.size() == 1:
        return x
    return _Shard.apply(x, dim % x.dim(), group, partial_grad)


def sum_grad(x: Tensor, group: ProcessGroup) -> Tensor:
    """R -> B: the tensor as it is. Backward: the sum of the ranks' gradients."""
    if group.size() == 1:
        return x
    return _SumGrad.apply(x, group)


def share_grad(x: Tensor, group: ProcessGroup) -> Tensor:
    """B -> R: the tensor as it is. Backward: each rank takes `1/n` of the gradient, so that the parts sum to it."""
    if group.size() == 1:
        return x
    return _ShareGrad.apply(x, group)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: ProcessGroup, partial_grad: bool) -> Tensor:
        ctx.dim, ctx.group, ctx.partial_grad = dim, group, partial_grad
        return _gathered(x, dim, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        grad = _summed_slice(grad, ctx.dim, ctx.group) if ctx.partial_grad else _slice(grad, ctx.dim, ctx.group)
        return grad, None, None, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, split_dim: int, concat_dim: int, group: ProcessGroup) -> Tensor:
        ctx.split_dim, ctx.concat_dim, ctx.group = split_dim, concat_dim, group
        return _exchanged(x, split_dim, concat_dim, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchanged(grad, ctx.concat_dim, ctx.split_dim, ctx.group), None, None, None


class _PackedAllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, split_dim: int, concat_dim: int, group: ProcessGroup, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.split_dim, ctx.concat_dim, ctx.group = split_dim, concat_dim, group
        ctx.sizes = [x.size(split_dim) // group.size() for x in tensors]
        pieces = [x.unflatten(split_dim, (group.size(), -1)).movedim(split_dim, 0) for x in tensors]
        received = _traded(torch.cat(pieces, split_dim + 1), group)
        return received.movedim(0, concat_dim).flatten(concat_dim, concat_dim + 1).contiguous().split(ctx.sizes, split_dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        pieces = [grad.unflatten(ctx.concat_dim, (ctx.group.size(), -1)).movedim(ctx.concat_dim, 0) for grad in grads]
        received = _traded(torch.cat(pieces, ctx.split_dim + 1), ctx.group).split(ctx.sizes, ctx.split_dim + 1)
        joined = [x.movedim(0, ctx.split_dim).flatten(ctx.split_dim, ctx.split_dim + 1).contiguous() for x in received]
        return None, None, None, *joined


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, partial_grad: bool) -> Tensor:
        ctx.group, ctx.partial_grad = group, partial_grad
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _summed(grad, ctx.group) if ctx.partial_grad else grad, None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _summed_slice(x, dim, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _gathered(grad, ctx.dim, ctx.group), None, None


class _Shard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: ProcessGroup, partial_grad: bool) -> Tensor:
        ctx.dim, ctx.group, ctx.partial_grad = dim, group, partial_grad
        return _slice(x, dim, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        grad = _padded(grad, ctx.dim, ctx.group) if ctx.partial_grad else _gathered(grad, ctx.dim, ctx.group)
        return grad, None, None, None


class _SumGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _summed(grad, ctx.group), None


class _ShareGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad / ctx.group.size(), None


def _gathered(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """Pieces `[.., l/n, ..]` -> `[.., l, ..]`. The ranks arrive stacked in front and are moved before `dim` in one copy."""
    stacked = _ops.wait_tensor(_ops.all_gather_into_tensor(x.contiguous().unsqueeze(0), group.size(), group.group_name))
    return stacked.movedim(0, dim).flatten(dim, dim + 1).contiguous()


def _pieces(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """`[.., l, ..]` -> `[n, .., l/n, ..]`, contiguous: what each rank is to receive, by rank."""
    return x.unflatten(dim, (group.size(), -1)).movedim(dim, 0).contiguous()


def _exchanged(x: Tensor, split_dim: int, concat_dim: int, group: ProcessGroup) -> Tensor:
    received = _traded(_pieces(x, split_dim, group), group)
    return received.movedim(0, concat_dim).flatten(concat_dim, concat_dim + 1).contiguous()


def _traded(pieces: Tensor, group: ProcessGroup) -> Tensor:
    """`[n, ...]`, contiguous, by the rank that is to receive -> `[n, ...]` by the rank that sent."""
    ones = [1] * group.size()
    return _ops.wait_tensor(_ops.all_to_all_single(pieces.contiguous(), ones, ones, group.group_name))


def _summed(x: Tensor, group: ProcessGroup) -> Tensor:
    return _ops.wait_tensor(_ops.all_reduce(x.contiguous(), "sum", group.group_name))


def _summed_slice(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    pieces = _pieces(x, dim, group)
    return _ops.wait_tensor(_ops.reduce_scatter_tensor(pieces, "sum", group.size(), group.group_name)).squeeze(0)


def _slice(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """A copy, never a view: a view would keep the whole tensor in memory."""
    return x.unflatten(dim, (group.size(), -1)).select(dim, group.rank()).clone(memory_format=torch.contiguous_format)


def _padded(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    whole = x.new_zeros(x.shape[:dim] + (group.size(),) + x.shape[dim:])
    whole.select(dim, group.rank()).copy_(x)
    return whole.flatten(dim, dim + 1)
