"""Attention: the one operator that capture puts in place of the model's own.

Tensors are `[b, heads, l, e]`: batch, heads, positions, head size. Queries have `k * g` heads for `k` key/value heads (grouped-query
attention), so a split of the heads gives each piece whole groups. The positions of the queries may be split too: each piece then has all
keys and values and is told where it starts (`query_start`), so that its causal mask is right. Those of the keys are frozen.

Plain causal or full attention is one call of a fused kernel (`seqloom.ops.kernels` says which), with memory linear in the number of
positions; a later piece of the queries takes two calls (`seqloom.ops.fused`). A sliding window is one call of flash attention on a GPU, a
soft cap one of FlashAttention 3 where it is installed. Where no fused kernel takes the tensors and the mask, as on CPUs, the explicit path
below does: queries in chunks, each against the keys it can see, recomputed in the backward pass from the log-sum-exp (Dao et al.,
FlashAttention, arXiv:2205.14135), so that no l x l matrix exists.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from seqloom.errors import UserError
from seqloom.ops.precision import sum_dtype
from seqloom.ops.registry import register_op

_CHUNK = 512
_TILE = 2**28  # scores at once, over all heads: 1 GiB in fp32


def _flops(sizes: Mapping[str, Any]) -> int:
    """Two products of 2 * e per visible pair of a query head and a key."""
    return 4 * sizes["b"] * sizes["k"] * sizes["g"] * _pairs(sizes) * sizes["e"]


def _pairs(sizes: Mapping[str, Any]) -> int:
    """Visible pairs of a query and a key; the diagonal of a causal mask counts half, so that pieces add up to half the square.

    A window over all queries counts as full for every one of them; over a piece, as far as its queries reach back.
    """
    (queries, keys), start, window = (sizes["l"], sizes["m"]), sizes["query_start"], sizes["window"]
    if not sizes["causal"]:
        return queries * keys
    if window is None or window >= start + queries:
        return queries * start + queries * queries // 2
    if queries == keys:
        return queries * window

    def up_to(position: int) -> int:
        reach = min(position, window)
        return reach * reach + 2 * window * (position - reach)

    return (up_to(start + queries) - up_to(start)) // 2


def _workspace(sizes: Mapping[str, Any]) -> int:
    """Bytes of temporaries of the backward pass: fused, the query gradient in fp32 and key/value gradients per query head, and for a later
    piece those of both its calls; explicit, six tiles of scores and the key/value gradients in fp32."""
    groups, queries, start = sizes["b"] * sizes["k"], sizes["l"], sizes["query_start"]
    heads, keys = groups * sizes["g"], start + queries if sizes["causal"] else sizes["m"]
    if sizes["softcap"] is None and (sizes["window"] is None or sizes["window"] >= keys):
        largest, twice = (max(start, queries), 2) if sizes["causal"] and start else (keys, 1)
        per_head = 4 * heads * sizes["e"] * (twice * queries + (largest if sizes["g"] > 1 else 0))
        return per_head + (4 * groups * sizes["e"] * keys if twice == 2 else 0)
    columns = _columns(keys, sizes["window"])
    return 4 * (6 * heads * min(queries, _rows(heads, columns)) * columns + 2 * groups * sizes["m"] * sizes["e"])


def _columns(keys: int, window: int | None) -> int:
    """Keys that one chunk of queries can see."""
    return keys if window is None else min(keys, window + _CHUNK)


def _rows(heads: int, columns: int) -> int:
    """Queries in a chunk: as many as keep the scores of all heads within a tile."""
    return max(1, min(_CHUNK, _TILE // (heads * columns)))


@register_op(
    "b (k g) l e^, b k m^ e^, b k m^ e^ -> b (k g) l e^",
    flops=_flops,
    saved=("query", "key", "value", "output"),
    workspace=_workspace,
    starts={"l": "query_start"},
)
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    query_start: int = 0,
) -> Tensor:
    """softmax(mask(cap(scale * query @ key^T))) @ value, per head.

    query `[b, k * g, l, e]`, key and value `[b, k, m, e]` -> `[b, k * g, l, e]`; query head i reads key/value head i // g. Row i of the
    queries is position p = `query_start` + i among the keys and sees position j when j <= p (`causal`) and j > p - `window`; `softcap` c
    replaces a score s by c * tanh(s / c). Raises `UserError` for causal queries beyond the last key, a negative start, a window without a
    causal mask, a window or cap that is not positive, and heads that do not group.
    """
    _check(query, key, causal, window, softcap, query_start)
    seen = query_start + query.shape[2] if causal else key.shape[2]
    window = None if window is None or window >= seen else window
    if softcap is None and window is None:
        return _fused(query, key, value, scale, causal, query_start)
    return _masked(query, key, value, scale, causal, window, softcap, query_start)


def _check(query: Tensor, key: Tensor, causal: bool, window: int | None, softcap: float | None, query_start: int) -> None:
    if query.shape[1] % key.shape[1]:
        raise UserError(f"attention: {query.shape[1]} query heads cannot share {key.shape[1]} key/value heads evenly: use a multiple")
    if query_start < 0:
        raise UserError(f"attention: query_start={query_start} is in front of the first key: pass 0 or more")
    if causal and query_start + query.shape[2] > key.shape[2]:
        where = f"{query.shape[2]} causal queries from position {query_start} on"
        raise UserError(f"attention: {where} go beyond the {key.shape[2]} keys: pass all keys up to the last query, or causal=False")
    if window is not None and window < 1:
        raise UserError(f"attention: window={window} shows no key to a query: pass 1 or more, or None for all keys")
    if softcap is not None and softcap <= 0:
        raise UserError(f"attention: softcap={softcap} is not possible: pass a positive number, or None for no cap")
    if window is not None and not causal:
        raise UserError(f"attention: a sliding window ({window}) needs a causal mask: pass causal=True")


def _fused(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool, query_start: int) -> Tensor:
    # Imported where it runs: it brings the whole of torch.compile along, and a compile needs the annotation of this operator only.
    from seqloom.ops.fused import kernel_for, later_attention, plain_attention, repeat_heads

    kernel = kernel_for(query, key)
    if kernel is None:
        return _ChunkedAttention.apply(query, key, value, scale, causal, None, None, query_start)
    key, value = repeat_heads(kernel, query, key, value)
    if causal and query_start:
        return later_attention(query, key, value, scale, query_start, kernel)
    if causal and query.shape[2] < key.shape[2]:  # the first piece of the queries sees the first keys only
        key, value = (x[:, :, : query.shape[2]] for x in (key, value))
    return plain_attention(query, key, value, scale, causal, kernel)


def _masked(
    query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool, window: int | None, softcap: float | None, query_start: int
) -> Tensor:
    from seqloom.ops.fused import kernel_for, masked_attention  # where it runs, as above

    options = (scale, causal, window, softcap, query_start)
    kernel = kernel_for(query, key, window=window is not None, softcap=softcap is not None)
    return _ChunkedAttention.apply(query, key, value, *options) if kernel is None else masked_attention(query, key, value, *options, kernel)


# --- the explicit path -----------------------------------------------------------------------------------------------------------

_Options = tuple[float, bool, int | None, float | None, int]


class _ChunkedAttention(torch.autograd.Function):
    """Attention with a window or a soft cap, a chunk of queries at a time, in fp32 for half-precision inputs."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, *options: Any) -> Tensor:
        ctx.options = options
        grouped = _group(query, key)
        output, lse = torch.empty_like(grouped), grouped.new_empty(grouped.shape[:-1], dtype=sum_dtype(query.dtype))
        for rows, columns in _tiles(query, key, options):
            scores, _ = _scores(grouped, key, rows, columns, ctx.options)
            lse[..., rows] = scores.logsumexp(-1)
            weights = (scores - lse[..., rows, None]).exp()
            output[..., rows, :] = _times(weights, value[:, :, columns].to(weights.dtype)).to(output.dtype)
        output = output.view(query.shape)
        ctx.save_for_backward(query, key, value, output, lse)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse = ctx.saved_tensors
        scale = ctx.options[0]
        q, out, grad = (_group(x, key) for x in (query, output, grad))
        d_query = torch.empty_like(q)
        d_key, d_value = (torch.zeros_like(x, dtype=lse.dtype) for x in (key, value))
        for rows, columns in _tiles(query, key, ctx.options):
            scores, slope = _scores(q, key, rows, columns, ctx.options)
            weights = (scores - lse[..., rows, None]).exp()
            d_out = grad[..., rows, :].to(lse.dtype)
            delta = (d_out * out[..., rows, :]).sum(-1, keepdim=True)
            d_weights = _times(d_out, value[:, :, columns].to(lse.dtype).transpose(-1, -2))
            d_scores = weights * (d_weights - delta) * slope * scale
            d_query[..., rows, :] = _times(d_scores, key[:, :, columns].to(lse.dtype)).to(d_query.dtype)
            d_key[:, :, columns] += _times_transposed(d_scores, q[..., rows, :])
            d_value[:, :, columns] += _times_transposed(weights, d_out)
        return d_query.view(query.shape), d_key.to(key.dtype), d_value.to(value.dtype), None, None, None, None, None


def _group(x: Tensor, key: Tensor) -> Tensor:
    """`[b, k * g, l, e] -> [b, k, g, l, e]`."""
    return x.unflatten(1, (key.shape[1], -1)).contiguous()


def _tiles(query: Tensor, key: Tensor, options: _Options) -> Iterator[tuple[slice, slice]]:
    """Chunks of queries, each with the range of keys that some query of the chunk can see."""
    (batch, heads, length, _), (_, causal, window, _, begin) = query.shape, options
    keys = begin + length if causal else key.shape[2]
    rows = _rows(batch * heads, _columns(keys, window))
    for start in range(0, length, rows):
        stop = min(start + rows, length)
        first = 0 if window is None else max(0, begin + start - window + 1)
        yield slice(start, stop), slice(first, begin + stop if causal else keys)


def _scores(query: Tensor, key: Tensor, rows: slice, columns: slice, options: _Options) -> tuple[Tensor, Tensor | float]:
    """Masked, capped scores `[b, k, g, rows, columns]` and the derivative of the cap."""
    scale, causal, window, softcap, begin = options
    dtype, slope = sum_dtype(query.dtype), 1.0
    scores = _times(query[..., rows, :].to(dtype), key[:, :, columns].to(dtype).transpose(-1, -2)) * scale
    if softcap is not None:
        capped = torch.tanh(scores / softcap)
        scores, slope = capped * softcap, 1 - capped * capped
    if causal:
        i = torch.arange(begin + rows.start, begin + rows.stop, device=query.device)[:, None]
        j = torch.arange(columns.start, columns.stop, device=query.device)[None]
        hidden = j > i if window is None else (j > i) | (j <= i - window)
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores, slope


def _times(left: Tensor, right: Tensor) -> Tensor:
    """`[b, k, g, r, x] @ [b, k, x, y] -> [b, k, g, r, y]`: the groups are rows of one product per key/value head."""
    return (left.flatten(2, 3) @ right).unflatten(2, left.shape[2:4])


def _times_transposed(left: Tensor, right: Tensor) -> Tensor:
    """`[b, k, g, r, x], [b, k, g, r, y] -> [b, k, x, y]`, summed over groups and rows."""
    return left.flatten(2, 3).transpose(-1, -2) @ right.to(left.dtype).flatten(2, 3)
