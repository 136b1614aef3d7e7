"""Attention over ranks and what it must give: dense attention with every cell written out, rows in blocks so that long sequences fit."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from magi_fake_packages import dense_backward, dense_forward
from torch import Tensor

from custom_ops import magi_attention as magi
from seqloom.magi.mask import AttnMask

HEADS, KV_HEADS, DIM = 4, 2, 8
Shape = tuple[int, int, int]  # query heads, key/value heads, head size
SHAPE: Shape = (HEADS, KV_HEADS, DIM)
ROWS = 1024  # in a block


def tensors(rows: int, shape: Shape = SHAPE, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v, gradient of the output `[rows, heads, dim]` and sinks `[2, heads]`."""
    heads, kv_heads, dim = shape
    generator = torch.Generator().manual_seed(rows)
    shapes = [(rows, heads, dim), (rows, kv_heads, dim), (rows, kv_heads, dim), (rows, heads, dim), (2, heads)]
    return [torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for shape in shapes]


def dense(mask: AttnMask, sinks: bool = False, softcap: float = 0.0, shape: Shape = SHAPE) -> dict[str, Tensor]:
    """Output, log-sum-exp and gradients of dense attention, fp64."""
    rows = mask.total_seqlen_q
    torch.set_num_threads(1)  # more wait for each other where tests run side by side
    q, k, v, grad, sink = tensors(rows, shape)
    scale = shape[2] ** -0.5
    found: dict[str, list[Tensor]] = {"out": [], "lse": [], "dq": []}
    d_key, d_value, d_sink = torch.zeros_like(k), torch.zeros_like(v), torch.zeros_like(sink)
    for start in range(0, rows, ROWS):
        block = slice(start, start + ROWS)
        cells = allowed_cells(mask, start, min(start + ROWS, rows))
        columns = np.flatnonzero(cells.any(0))  # outside of the first to the last of them nothing is seen
        seen = slice(int(columns[0]), int(columns[-1]) + 1) if len(columns) else slice(0, 1)
        allowed = torch.from_numpy(np.ascontiguousarray(cells[:, seen]))
        out, lse = dense_forward(q[block], k[seen], v[seen], allowed, scale, softcap)
        if sinks:
            total = torch.logaddexp(lse, sink.logsumexp(0))
            out, lse = out * (lse - total).exp()[..., None], total
            d_sink -= ((sink[:, None] - lse).exp() * (grad[block] * out).sum(-1)).sum(1)
        parts = dense_backward(grad[block], q[block], k[seen], v[seen], out, lse, allowed, scale, softcap)
        for name, part in zip(found, (out, lse, parts[0]), strict=True):
            found[name].append(part)
        d_key[seen] += parts[1]
        d_value[seen] += parts[2]
    whole = {**{name: torch.cat(parts) for name, parts in found.items()}, "dk": d_key, "dv": d_value}
    return {**whole, "dsink": d_sink} if sinks else whole


def allowed_cells(mask: AttnMask, start: int, end: int) -> np.ndarray:
    """Rows [start, end) of the dense mask."""
    allowed = np.zeros((end - start, mask.total_seqlen_k), bool)
    rows, columns = np.arange(start, end)[:, None], np.arange(mask.total_seqlen_k)
    for band in mask.bands:
        inside = (band.q_start <= rows) & (rows < band.q_end) & (band.k_start <= columns) & (columns < band.k_end)
        allowed |= inside & (band.lo <= columns - rows) & (columns - rows <= band.hi)
    return allowed


def key_of(mask: AttnMask, group: Any, config: magi.DistAttnConfig, chunk: int | None = None, shape: Shape = SHAPE) -> Any:
    """The key of a mask, as users make it."""
    ranges = (mask.q_ranges, mask.k_ranges, mask.attn_types, mask.total_seqlen_q, mask.total_seqlen_k)
    return magi.magi_attn_flex_key(*ranges, *shape, chunk_size=chunk, cp_group_or_mesh=group, dist_attn_config=config)


def attended(
    mask: AttnMask,
    group: Any,
    sinks: bool = False,
    softcap: float = 0.0,
    config: magi.DistAttnConfig | None = None,
    chunk: int | None = None,
    shape: Shape = SHAPE,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """As `dense`, by dispatched rows; what is local is gathered, the sinks' gradients are summed."""
    key = key_of(mask, group, config or magi.DistAttnConfig(), chunk, shape)
    q, k, v, grad, sink = tensors(mask.total_seqlen_q, shape, dtype)
    local = [magi.dispatch(x, key).requires_grad_() for x in (q, k, v)]
    sink = sink.requires_grad_() if sinks else None
    # A gap between rows: nothing may take them to be contiguous.
    out, meta = magi.calc_attn(*(torch.stack((x, x), -1)[..., 0] for x in local), key, sink=sink, softcap=softcap)
    out.backward(magi.dispatch(grad, key))
    found = {"out": out.detach(), "lse": meta.lse, "dq": local[0].grad, "dk": local[1].grad, "dv": local[2].grad}
    found = {name: magi.undispatch(x, key) for name, x in found.items()}
    if sinks:
        if key.group is not None:
            dist.all_reduce(sink.grad, group=key.group)
        found["dsink"] = sink.grad
    return found


def difference(got: Tensor, wanted: Tensor) -> float:
    """The largest absolute difference; infinities must agree."""
    same = got == wanted
    return float(torch.where(same, 0.0, (got - wanted).abs()).max())
