"""Rows between the whole sequence and the ranks: dispatch, undispatch, roll.

Role: everything around attention works on a rank's own rows, in the order that the dispatch gave them; these functions bring rows there,
gather them back, and shift them as one sequence. The whole sequence is the same on every rank, and so is its gradient.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from seqloom.errors import UserError
from seqloom.magi.groupcast import Route, add_rows_, group_cast, group_reduce
from seqloom.magi.key import DistAttnRuntimeKey, global_rows, longest_rows, places
from seqloom.ops.transfer import to_device


def dispatch(x: Tensor, key: DistAttnRuntimeKey, pad_value: float = 0.0) -> Tensor:
    """`[total, ...]` -> `[local rows, ...]`. Raises `UserError` for another length."""
    if len(x) != key.total_seqlen:
        raise UserError(f"dispatch got {len(x)} rows for a key of {key.total_seqlen}: pass the whole sequence, unpadded")
    return _Dispatch.apply(x, key, pad_value)


def undispatch(x: Tensor, key: DistAttnRuntimeKey) -> Tensor:
    """`[local rows, ...]` -> `[total, ...]`. Raises `UserError` for another length."""
    _check_local("undispatch", x, 0, key)
    return _Undispatch.apply(x, key)


def roll(x: Tensor, shift: int, dim: int, key: DistAttnRuntimeKey) -> Tensor:
    """Row i of the result is row i - shift of the sequence, modulo its length. Raises `UserError` for another length along `dim`."""
    _check_local("roll", x, dim, key)
    return _Roll.apply(x.transpose(0, dim), shift % key.total_seqlen, key).transpose(0, dim)


def _check_local(name: str, x: Tensor, dim: int, key: DistAttnRuntimeKey) -> None:
    if x.shape[dim] != key.local_rows:
        raise UserError(f"{name} got {x.shape[dim]} rows where the key gives this rank {key.local_rows}: pass rows dispatched with it")


def _scatter(x: Tensor, key: DistAttnRuntimeKey, pad_value: float) -> Tensor:
    rows = global_rows(key, x.device)
    inside = rows < key.total_seqlen
    local = x.index_select(0, torch.where(inside, rows, 0))
    return torch.where(inside.view(-1, *[1] * (x.dim() - 1)), local, torch.tensor(pad_value, dtype=x.dtype, device=x.device))


def _gather(x: Tensor, key: DistAttnRuntimeKey) -> Tensor:
    longest, ranks = longest_rows(key), key.dispatch.num_ranks
    padded = torch.cat([x, x.new_zeros(longest - len(x), *x.shape[1:])]).contiguous()
    if key.group is not None:
        gathered = x.new_empty(ranks * longest, *x.shape[1:])
        dist.all_gather_into_tensor(gathered, padded, group=key.group)
        padded = gathered
    return padded.index_select(0, places(key, x.device))


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, key: DistAttnRuntimeKey, pad_value: float) -> Tensor:
        ctx.key = key
        return _scatter(x, key, pad_value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _gather(grad, ctx.key), None, None


class _Undispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, key: DistAttnRuntimeKey) -> Tensor:
        ctx.key = key
        return _gather(x, key)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _scatter(grad, ctx.key, 0.0), None


class _Roll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: int, key: DistAttnRuntimeKey) -> Tensor:
        ctx.shift, ctx.key = shift, key
        way, order = _roll_route(key, shift, x.device)
        received = group_cast(x, way, key.group).wait() if key.group is not None else x.index_select(0, way.sent)
        return received.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        way, order = _roll_route(ctx.key, ctx.shift, grad.device)
        received = torch.empty_like(grad).index_copy_(0, order, grad)  # every row of the result came from one row
        back = group_reduce(received, way, ctx.key.group).wait() if ctx.key.group is not None else received
        total = torch.zeros_like(grad)
        add_rows_(total, back, way)
        return total, None, None


@functools.lru_cache(maxsize=64)
def _roll_route(key: DistAttnRuntimeKey, shift: int, device: torch.device) -> tuple[Route, Tensor]:
    """The route of a roll, and for every local row its place among the received ones."""
    ranks, total = key.dispatch.num_ranks, key.total_seqlen
    hosted = [np.asarray(key.dispatch.position_ids(rank)) for rank in range(ranks)]
    owner, place = (np.empty(key.dispatch.padded_seqlen, dtype=np.int64) for _ in range(2))
    for rank, rows in enumerate(hosted):
        owner[rows], place[rows] = rank, np.arange(len(rows))
    sources = [np.where(rows < total, (rows - shift) % total, rows) for rows in hosted]  # the row that each row of the result comes from
    sent = [place[wanted[owner[wanted] == key.rank]] for wanted in sources]
    mine = owner[sources[key.rank]]
    order = np.empty(len(mine), dtype=np.int64)
    order[np.argsort(mine, kind="stable")] = np.arange(len(mine))
    way = Route(
        to_device(torch.from_numpy(np.concatenate(sent)), device),
        tuple(len(rows) for rows in sent),
        tuple(int((mine == rank).sum()) for rank in range(ranks)),
    )
    return way, to_device(torch.from_numpy(order), device)
