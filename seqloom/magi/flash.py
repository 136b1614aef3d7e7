"""FlashAttention 2 and 3 on bands, where their packages are installed: few calls, packed sequences, windows, soft cap, grouped heads.

Role: the kernels 'flash2' (package flash_attn, 2.7 or later) and 'flash3' (flash_attn_interface, as FlashAttention's folder hopper
installs it). Their low-level backward takes output and log-sum-exp from outside: given the final ones, the gradients of all calls add up.
Papers: Dao, arXiv:2307.08691; Shah et al., arXiv:2407.08608. In and out: as `seqloom.magi.kernels.Kernel`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from seqloom.magi.bands import Band
from seqloom.magi.installed import module, refused_on_gpu, refused_package
from seqloom.magi.kernels import accumulate, merge_
from seqloom.magi.varlen import Call, calls

MOST_HEAD_DIM = 256
PACKAGE_2, PACKAGE_3 = "flash_attn.flash_attn_interface", "flash_attn_interface"


class Flash2:
    """One call of flash_attn for all slices of one type."""

    name = "flash2"

    @staticmethod
    def refusal(device: torch.device, dtype: torch.dtype, head_dim: int, softcap: bool) -> str | None:
        """Why these tensors cannot be run here, as the end of a sentence; None where they can."""
        gpu = refused_on_gpu(device, dtype, head_dim, MOST_HEAD_DIM, (8, 0))
        return gpu or refused_package(PACKAGE_2, "_flash_attn_varlen_forward", "window_size_left", "flash_attn 2.7 or later")

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, bands: Sequence[Band], scale: float, softcap: float
    ) -> tuple[Tensor, Tensor]:
        """As `Kernel.forward`."""
        dtype = accumulate(query.dtype)
        output = torch.zeros(query.shape, dtype=dtype, device=query.device)
        lse = torch.full(query.shape[:2], float("-inf"), dtype=dtype, device=query.device)
        for call in calls(tuple(bands), query.device):
            part, own = self._forward(call, call.queries.take(query), call.keys.take(key), call.keys.take(value), scale, softcap)
            merged, total = call.queries.take(output), call.queries.take(lse)
            merge_(merged, total, part.to(dtype), own.t().to(dtype))  # own is [heads, rows]
            call.queries.put_(output, merged)
            call.queries.put_(lse, total)
        return output, lse

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        lse: Tensor,
        delta: Tensor,
        bands: Sequence[Band],
        scale: float,
        softcap: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `Kernel.backward`. The package finds `delta` again from gradient and output."""
        dtype = accumulate(query.dtype)
        d_query, d_key, d_value = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (query, key, value))
        for call in calls(tuple(bands), query.device):
            given = [call.queries.take(x) for x in (grad, query)] + [call.keys.take(x) for x in (key, value)]
            found = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in given[1:]]
            own = call.queries.take(lse).t().contiguous()
            self._backward(call, *given, call.queries.take(output), own, *found, scale, softcap)
            for total, part, rows in zip((d_query, d_key, d_value), found, (call.queries, call.keys, call.keys), strict=True):
                rows.add_(total, part)
        return d_query, d_key, d_value

    def _forward(self, call: Call, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
        return module(PACKAGE_2)._flash_attn_varlen_forward(
            query,
            key,
            value,
            call.queries.cu_seqlens,
            call.keys.cu_seqlens,
            call.queries.longest,
            call.keys.longest,
            dropout_p=0.0,
            softmax_scale=scale,
            causal=call.causal,
            window_size_left=call.left,
            window_size_right=call.right,
            softcap=softcap,
            alibi_slopes=None,
            return_softmax=False,
        )[:2]

    def _backward(
        self,
        call: Call,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        lse: Tensor,
        d_query: Tensor,
        d_key: Tensor,
        d_value: Tensor,
        scale: float,
        softcap: float,
    ) -> None:
        module(PACKAGE_2)._flash_attn_varlen_backward(
            grad,
            query,
            key,
            value,
            output,
            lse,
            d_query,
            d_key,
            d_value,
            call.queries.cu_seqlens,
            call.keys.cu_seqlens,
            call.queries.longest,
            call.keys.longest,
            dropout_p=0.0,
            softmax_scale=scale,
            causal=call.causal,
            window_size_left=call.left,
            window_size_right=call.right,
            softcap=softcap,
            alibi_slopes=None,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )


class Flash3(Flash2):
    """The same by flash_attn_interface: on Hopper GPUs."""

    name = "flash3"

    @staticmethod
    def refusal(device: torch.device, dtype: torch.dtype, head_dim: int, softcap: bool) -> str | None:
        """As `Flash2.refusal`."""
        gpu = refused_on_gpu(device, dtype, head_dim, MOST_HEAD_DIM, (9, 0), (10, 0))
        return gpu or refused_package(PACKAGE_3, "_flash_attn_forward", "window_size_left", "FlashAttention 3 (flash_attn_interface)")

    def _forward(self, call: Call, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
        return module(PACKAGE_3)._flash_attn_forward(
            query,
            key,
            value,
            cu_seqlens_q=call.queries.cu_seqlens,
            cu_seqlens_k=call.keys.cu_seqlens,
            max_seqlen_q=call.queries.longest,
            max_seqlen_k=call.keys.longest,
            softmax_scale=scale,
            causal=call.causal,
            window_size_left=call.left,
            window_size_right=call.right,
            softcap=softcap,
        )[:2]

    def _backward(
        self,
        call: Call,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        lse: Tensor,
        d_query: Tensor,
        d_key: Tensor,
        d_value: Tensor,
        scale: float,
        softcap: float,
    ) -> None:
        module(PACKAGE_3)._flash_attn_backward(
            grad,
            query,
            key,
            value,
            output,
            lse,
            cu_seqlens_q=call.queries.cu_seqlens,
            cu_seqlens_k=call.keys.cu_seqlens,
            max_seqlen_q=call.queries.longest,
            max_seqlen_k=call.keys.longest,
            dq=d_query,
            dk=d_key,
            dv=d_value,
            softmax_scale=scale,
            is_causal=call.causal,
            window_size_left=call.left,
            window_size_right=call.right,
            softcap=softcap,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
