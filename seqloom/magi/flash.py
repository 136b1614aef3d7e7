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
from seqloom.magi.kernels import Final, Gradients, merge_, no_gradients, nothing_yet
from seqloom.magi.varlen import Call, calls
from seqloom.ops.installed import module, refused_on_gpu, refused_package

MOST_HEAD_DIM = 256
PACKAGE_2, PACKAGE_3 = "flash_attn.flash_attn_interface", "flash_attn_interface"
PACKED = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")


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
        output, lse = nothing_yet(query)
        for call in calls(tuple(bands), query.device):
            part, own = self._forward(call, call.queries.take(query), call.keys.take(key), call.keys.take(value), scale, softcap)
            merged, total = call.queries.take(output), call.queries.take(lse)
            merge_(merged, total, part.to(output.dtype), own.t().to(lse.dtype))  # own is [heads, rows]
            call.queries.put_(output, merged)
            call.queries.put_(lse, total)
        return output, lse

    def backward(self, given: Final, bands: Sequence[Band], scale: float, softcap: float) -> Gradients:
        """As `Kernel.backward`. The package finds `delta` again from gradient and output."""
        grad, query, key, value, output, lse, _ = given
        d_query, d_key, d_value = no_gradients(given)
        for call in calls(tuple(bands), query.device):
            taken = [call.queries.take(x) for x in (grad, query)] + [call.keys.take(x) for x in (key, value)]
            found = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in taken[1:]]
            own = call.queries.take(lse).t().contiguous()
            self._backward(call, (*taken, call.queries.take(output), own, *found), scale, softcap)
            for total, part, rows in zip((d_query, d_key, d_value), found, (call.queries, call.keys, call.keys), strict=True):
                rows.add_(total, part)
        return d_query, d_key, d_value

    def _forward(self, call: Call, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp `[heads, rows]` of one call."""
        run = module(PACKAGE_2)._flash_attn_varlen_forward
        last = {"alibi_slopes": None, "return_softmax": False}
        return run(query, key, value, *_packed(call), dropout_p=0.0, causal=call.causal, **_options(call, scale, softcap), **last)[:2]

    def _backward(self, call: Call, tensors: tuple[Tensor, ...], scale: float, softcap: float) -> None:
        """`tensors`: gradient, query, key, value, output, log-sum-exp `[heads, rows]`, and the three gradients to write."""
        run = module(PACKAGE_2)._flash_attn_varlen_backward
        last = {"alibi_slopes": None, "deterministic": torch.are_deterministic_algorithms_enabled()}
        run(*tensors, *_packed(call), dropout_p=0.0, causal=call.causal, **_options(call, scale, softcap), **last)


class Flash3(Flash2):
    """The same by flash_attn_interface: on Hopper GPUs."""

    name = "flash3"

    @staticmethod
    def refusal(device: torch.device, dtype: torch.dtype, head_dim: int, softcap: bool) -> str | None:
        """As `Flash2.refusal`."""
        gpu = refused_on_gpu(device, dtype, head_dim, MOST_HEAD_DIM, (9, 0), (10, 0))
        return gpu or refused_package(PACKAGE_3, "_flash_attn_forward", "window_size_left", "FlashAttention 3 (flash_attn_interface)")

    def _forward(self, call: Call, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
        run, packed = module(PACKAGE_3)._flash_attn_forward, dict(zip(PACKED, _packed(call), strict=True))
        return run(query, key, value, **packed, causal=call.causal, **_options(call, scale, softcap))[:2]

    def _backward(self, call: Call, tensors: tuple[Tensor, ...], scale: float, softcap: float) -> None:
        run, packed = module(PACKAGE_3)._flash_attn_backward, dict(zip(PACKED, _packed(call), strict=True))
        *given, dq, dk, dv = tensors
        last = {"is_causal": call.causal, "deterministic": torch.are_deterministic_algorithms_enabled()}
        run(*given, **packed, dq=dq, dk=dk, dv=dv, **_options(call, scale, softcap), **last)


def _packed(call: Call) -> tuple[Tensor, Tensor, int, int]:
    """What is packed how, in the order of `PACKED`."""
    return call.queries.cu_seqlens, call.keys.cu_seqlens, call.queries.longest, call.keys.longest


def _options(call: Call, scale: float, softcap: float) -> dict[str, float]:
    return {"softmax_scale": scale, "window_size_left": call.left, "window_size_right": call.right, "softcap": softcap}
