"""Attention by fused kernels: memory linear in the positions, no mask; of a later stretch of the queries too.

Role: what `seqloom.ops.attention` runs. `plain_attention` is one call, which PyTorch differentiates. `later_attention` is for a split of
the query positions: queries that start at position `start` see all keys in front of `start`, and of those from `start` on the ones up to
their own: two calls of a fused kernel, the second with its causal mask, whose results are merged by their log-sum-exp. A fused backward
needs only the inputs, the output and the log-sum-exp of each query row, so given the merged ones it yields the exact gradients of each part
(the identity behind ring attention: Liu et al., arXiv:2310.01889, and the backward of FlashAttention, arXiv:2205.14135).

In: tensors `[b, heads, positions, e]`, in any order in memory that keeps the elements of a head side by side; no copy is made of them. The
kernel is the one that `seqloom.ops.kernels` chooses; PyTorch's operators are called by their own names, so that it is this one that runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from seqloom.ops import kernels
from seqloom.ops.kernels import KERNELS, Kind
from seqloom.ops.packages import PACKAGES, package_attention

_ATEN = torch.ops.aten
_ROWS = 32  # the efficient kernel pads the rows of its log-sum-exp to a multiple of this
_WHOLE = 8  # flash attention takes head sizes that are multiples of this

State = tuple[Tensor, ...]


def kernel_for(query: Tensor, key: Tensor, among: tuple[str, ...] | None = None, window: bool = False, softcap: bool = False) -> str | None:
    """The fused kernel for tensors of this device, dtype, heads and head size and such a mask, of those `among`; None where there is none.

    Raises `UserError` where one is asked for that cannot run (`seqloom.ops.kernels.use_kernel`).
    """
    grouped = query.shape[1] != key.shape[1]
    return _kernel_name(query.device.type, query.device.index, query.dtype, query.shape[3], grouped, among, window, softcap)


@torch.compiler.assume_constant_result
def _kernel_name(
    device: str,
    index: int | None,
    dtype: torch.dtype,
    head_size: int,
    grouped: bool,
    among: tuple[str, ...] | None,
    window: bool,
    softcap: bool,
) -> str | None:
    """The choice, which compiled code takes as a constant."""
    place = torch.device(device) if index is None else torch.device(device, index)
    kind = Kind(place, dtype, head_size, grouped, torch.are_deterministic_algorithms_enabled(), window, softcap)
    return kernels.kernel_for(kind, among)


def repeat_heads(kernel: str, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values as `kernel` takes them: themselves, but repeated for the query heads that share them where it knows no groups."""
    groups = query.shape[1] // key.shape[1]
    if groups == 1 or KERNELS[kernel].grouped:
        return key, value
    return key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)


def plain_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool, kernel: str) -> Tensor:
    """Attention with a kernel of `kernel_for`: query `[b, h, l, e]`, key and value `[b, k, m, e]` -> `[b, h, l, e]`.

    With `causal` there are as many keys as queries.
    """
    if kernel == "flash":
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scale, enable_gqa=query.shape[1] != key.shape[1])
    if kernel in PACKAGES:
        return package_attention(kernel, query, key, value, scale, causal)
    query, key, value = map(_rows, (query, key, value))
    size = query.shape[3]
    if kernel == "flash2" and size % _WHOLE:
        padded = (F.pad(x, (0, -size % _WHOLE)) for x in (query, key, value))
        return run_forward(kernel, *padded, scale, causal)[0][..., :size]
    return run_forward(kernel, query, key, value, scale, causal)[0]


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
    start: int,
    kernel: str,
) -> Tensor:
    """Attention with a sliding window, or a soft cap, by a kernel of `kernel_for` that knows it; query `[b, h, l, e]` from position `start`
    on, key and value `[b, k, m, e]` -> `[b, h, l, e]`.

    The masks of these kernels end at the last key, so they are given the keys up to that of the last query, from the first that one sees.
    """
    if causal:
        seen, first = start + query.shape[2], 0 if window is None else max(0, start - window + 1)
        key, value = (x[:, :, first:seen] for x in (key, value))
    if kernel in PACKAGES:
        return package_attention(kernel, query, key, value, scale, causal, window or 0, softcap or 0.0)
    size = query.shape[3]
    rows = [_rows(x).transpose(1, 2) for x in (query, key, value)]  # [b, l, h, e]
    if size % _WHOLE:
        rows = [F.pad(x, (0, -size % _WHOLE)) for x in rows]
    lengths = (None, None, query.shape[2], key.shape[2])  # no packed sequences
    sides = {"window_size_left": window - 1, "window_size_right": 0}
    return _ATEN._flash_attention_forward(*rows, *lengths, 0.0, False, False, scale=scale, **sides)[0][..., :size].transpose(1, 2)


def _rows(x: Tensor) -> Tensor:
    """`x` with the elements of a head side by side, as kernels read them: itself, but for odd views."""
    return x if x.stride(-1) == 1 else x.contiguous()


def later_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, start: int, kernel: str) -> Tensor:
    """Causal attention of queries at positions `start`, `start + 1`, ... with a kernel of `kernel_for`.

    query `[b, h, l, e]`, key and value `[b, k, m, e]` with `start >= 1` and `start + l <= m` -> `[b, h, l, e]`; keys from `start + l` on
    are seen by no query. Autograd keeps query, key, value, the output and one number per query row.
    """
    if kernel in PACKAGES:  # their causal mask ends at the last key
        seen = start + query.shape[2]
        return package_attention(kernel, query, key[:, :, :seen], value[:, :, :seen], scale, True)
    return _LaterAttention.apply(query, key, value, scale, start, kernel)


class _LaterAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, start: int, kernel: str) -> Tensor:
        stop = start + query.shape[2]
        early = run_forward(kernel, query, key[:, :, :start], value[:, :, :start], scale, False)
        own = run_forward(kernel, query, key[:, :, start:stop], value[:, :, start:stop], scale, True)
        output, lse = _merge(early[:2], own[:2])
        ctx.options, ctx.states = (scale, start, kernel), (len(early[2]), len(own[2]))
        ctx.save_for_backward(query, key, value, output, lse, *early[2], *own[2])
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse, *states = ctx.saved_tensors
        scale, start, kernel = ctx.options
        stop, first = start + query.shape[2], ctx.states[0]

        def part(columns: slice, causal: bool, state: State) -> tuple[Tensor, Tensor, Tensor]:
            return run_backward(kernel, grad, query, key[:, :, columns], value[:, :, columns], output, lse, scale, causal, state)

        d_query, *early = part(slice(0, start), False, tuple(states[:first]))
        d_own, *own = part(slice(start, stop), True, tuple(states[first:]))
        unseen = key.shape[2] - stop
        d_key, d_value = (torch.cat([a, b, b.new_zeros(*b.shape[:2], unseen, b.shape[3])], 2) for a, b in zip(early, own, strict=True))
        return d_query + d_own, d_key, d_value, None, None, None


def _merge(early: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The softmax over two sets of keys from (output, log-sum-exp) of each, in the precision of the log-sum-exp."""
    lse = torch.logaddexp(early[1], own[1])
    mine, its = ((part[1] - lse).exp().unsqueeze(-1) for part in (early, own))
    return (early[0] * mine).addcmul_(own[0].to(mine.dtype), its).to(own[0].dtype), lse


# --- one call of each kernel -----------------------------------------------------------------------------------------------------


def run_forward(kernel: str, query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor, State]:
    """Output `[b, h, l, e]`, log-sum-exp `[b, h, l]`, and what else the backward of one of PyTorch's kernels wants back."""
    if kernel == "flash":
        output, lse = _ATEN._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, scale=scale)
        return output, lse, ()
    if kernel == "flash2":
        output, lse, _, _, _, _, seed, offset, _ = _ATEN._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, scale=scale)
        return output, lse, (seed, offset)
    if kernel == "efficient":
        output, lse, seed, offset = _ATEN._scaled_dot_product_efficient_attention(query, key, value, None, True, 0.0, causal, scale=scale)
        return output, lse[..., : query.shape[2]], (seed, offset)
    result = _ATEN._scaled_dot_product_cudnn_attention(query, key, value, None, True, 0.0, causal, scale=scale)
    return result[0], result[1].squeeze(-1), (result[6], result[7])


def run_backward(
    kernel: str,
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    state: State | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value of one call, given the output and log-sum-exp over all keys.

    `state` is what `run_forward` gave; kernels read it for dropout only, so nothing is lost without it.
    """
    tensors = (grad, query, key, value)
    if state is None:
        state = () if kernel == "flash" else tuple(torch.zeros((), dtype=torch.int64, device=query.device) for _ in range(2))
    if kernel == "flash":
        return _ATEN._scaled_dot_product_flash_attention_for_cpu_backward(*tensors, output, lse, 0.0, causal, scale=scale)
    lengths = (None, None, query.shape[2], key.shape[2])  # no packed sequences
    if kernel == "flash2":
        return _ATEN._scaled_dot_product_flash_attention_backward(*tensors, output, lse, *lengths, 0.0, causal, *state, scale=scale)
    if kernel == "efficient":
        padded = F.pad(lse, (0, -lse.shape[2] % _ROWS), value=float("inf"))
        wanted = [True, True, True, False]
        return _ATEN._scaled_dot_product_efficient_attention_backward(
            *tensors, None, output, padded, *state, 0.0, wanted, causal, scale=scale
        )[:3]
    column = lse.unsqueeze(-1)
    return _ATEN._scaled_dot_product_cudnn_attention_backward(*tensors, output, column, *state, None, *lengths, 0.0, causal, scale=scale)
