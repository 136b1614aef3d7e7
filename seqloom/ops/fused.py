"""Causal attention of a later stretch of the queries, by PyTorch's fused kernels: memory linear in the positions, no mask.

Role: the part of `seqloom.ops.attention` that a split of the query positions needs. Queries that start at position `start` see all keys in
front of `start`, and of those from `start` on the ones up to their own: two calls of a fused kernel, the second with its causal mask, whose
results are merged by their log-sum-exp. A fused backward needs only the inputs, the output and the log-sum-exp of each query row, so given
the merged ones it yields the exact gradients of each part (the identity behind ring attention: Liu et al., arXiv:2310.01889, and the
backward of FlashAttention, arXiv:2205.14135).

In: tensors `[b, heads, positions, e]`. The kernel is the one that `scaled_dot_product_attention` itself would use (`kernel_for`).
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend

_ATEN = torch.ops.aten
_CPU = "cpu"
_KERNELS = {SDPBackend.FLASH_ATTENTION: "flash", SDPBackend.EFFICIENT_ATTENTION: "efficient", SDPBackend.CUDNN_ATTENTION: "cudnn"}
_ROWS = 32  # the efficient kernel pads the rows of its log-sum-exp to a multiple of this

State = tuple[Tensor, ...]


def kernel_for(query: Tensor, key: Tensor) -> str | None:
    """The fused kernel for tensors of this device, dtype, heads and head size; None, logged once, where there is none."""
    return _kernel_name(query.device.type, query.device.index, query.dtype, query.shape[1], key.shape[1], query.shape[3])


@torch.compiler.assume_constant_result
def _kernel_name(device: str, index: int | None, dtype: torch.dtype, heads: int, key_heads: int, head_size: int) -> str | None:
    """PyTorch's own choice, found on small tensors of the kind in question: compiled code takes the answer as a constant."""
    if device in ("cpu", "meta"):
        return _CPU
    place = torch.device(device) if index is None else torch.device(device, index)
    query, key = (torch.empty(1, n, 2 * _ROWS, head_size, dtype=dtype, device=place, requires_grad=True) for n in (heads, key_heads))
    choice = torch._fused_sdp_choice(query, key, key, is_causal=True, enable_gqa=heads != key_heads)
    name = _KERNELS.get(SDPBackend(choice))
    if name is None:
        _warn(device, dtype, head_size)
    return name


@functools.cache
def _warn(device: str, dtype: torch.dtype, head_size: int) -> None:
    logging.getLogger(__name__).warning(
        "attention over a split of the queries: no fused kernel on %s takes %s with head size %d, so the slower explicit path runs",
        device,
        dtype,
        head_size,
    )


def later_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, start: int, kernel: str) -> Tensor:
    """Causal attention of queries at positions `start`, `start + 1`, ... with a kernel of `kernel_for`.

    query `[b, h, l, e]`, key and value `[b, k, m, e]` with `start >= 1` and `start + l <= m` -> `[b, h, l, e]`; keys from `start + l` on
    are seen by no query. Autograd keeps query, key, value, the output and one number per query row.
    """
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
    """Output `[b, h, l, e]`, log-sum-exp `[b, h, l]`, and what else the kernel's backward wants back."""
    if kernel == _CPU:
        output, lse = _ATEN._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, scale=scale)
        return output, lse, ()
    if kernel == "flash":
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
        state = () if kernel == _CPU else tuple(torch.zeros((), dtype=torch.int64, device=query.device) for _ in range(2))
    if kernel == _CPU:
        return _ATEN._scaled_dot_product_flash_attention_for_cpu_backward(*tensors, output, lse, 0.0, causal, scale=scale)
    lengths = (None, None, query.shape[2], key.shape[2])  # no packed sequences
    if kernel == "flash":
        return _ATEN._scaled_dot_product_flash_attention_backward(*tensors, output, lse, *lengths, 0.0, causal, *state, scale=scale)
    if kernel == "efficient":
        padded = F.pad(lse, (0, -lse.shape[2] % _ROWS), value=float("inf"))
        wanted = [True, True, True, False]
        return _ATEN._scaled_dot_product_efficient_attention_backward(
            *tensors, None, output, padded, *state, 0.0, wanted, causal, scale=scale
        )[:3]
    column = lse.unsqueeze(-1)
    return _ATEN._scaled_dot_product_cudnn_attention_backward(*tensors, output, column, *state, None, *lengths, 0.0, causal, scale=scale)
