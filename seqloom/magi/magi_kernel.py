"""MagiAttention's own kernel (flex_flash_attn) on bands, where its package is installed: one call for all slices of a buffer.

Role: the kernel 'magi', for Hopper GPUs. A band is at most three typed slices, which are what the kernel takes; it also takes the final
output and log-sum-exp in its backward, since MagiAttention merges stages as we do. Interface of MagiAttention 1.1. In and out: as
`seqloom.magi.kernels.Kernel`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from seqloom.magi.bands import Band
from seqloom.magi.kernels import Final, Gradients, no_gradients, nothing_yet
from seqloom.ops.installed import module, refused_on_gpu, refused_package
from seqloom.ops.precision import sum_dtype
from seqloom.ops.transfer import to_device

PACKAGE = "magi_attention.functional.flex_flash_attn"
MOST_HEAD_DIM = 128  # the sizes that it compiles are 64 and 128
NO_SINK = {"sink": None, "sink_layout": "sh"}  # sinks are in the log-sum-exp already


class Magi:
    """One call of flex_flash_attn for all bands."""

    name = "magi"

    @staticmethod
    def refusal(device: torch.device, dtype: torch.dtype, head_dim: int, softcap: bool) -> str | None:
        """Why these tensors cannot be run here, as the end of a sentence; None where they can."""
        gpu = refused_on_gpu(device, dtype, head_dim, MOST_HEAD_DIM, (9, 0), (10, 0))
        if gpu is None and head_dim not in (64, MOST_HEAD_DIM):
            gpu = f"takes head sizes 64 and {MOST_HEAD_DIM}, not {head_dim}"
        return gpu or refused_package(PACKAGE, "_flex_flash_attn_backward", "swap_bwd_qk_loop", "magi_attention 1.1")

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, bands: Sequence[Band], scale: float, softcap: float
    ) -> tuple[Tensor, Tensor]:
        """As `Kernel.forward`."""
        output, lse = nothing_yet(query)
        if bands:
            module(PACKAGE)._flex_flash_attn_forward(  # adds to `output` and `lse` what is not there yet: all of it
                q=query,
                k=key,
                v=value,
                out=output,
                lse=lse,
                **slices(tuple(bands), query.device),
                **NO_SINK,
                softmax_scale=scale,
                softcap=softcap,
                out_type=output.dtype,
                disable_fwd_atomic_reduction=False,
                deterministic=torch.are_deterministic_algorithms_enabled(),
                sm_margin=0,
            )
        return output, lse

    def backward(self, given: Final, bands: Sequence[Band], scale: float, softcap: float) -> Gradients:
        """As `Kernel.backward`. The package finds `delta` again from gradient and output."""
        grad, query, key, value, output, lse, _ = given
        dtype, found = sum_dtype(query.dtype), no_gradients(given)
        if bands:
            module(PACKAGE)._flex_flash_attn_backward(
                dout=grad,
                q=query,
                k=key,
                v=value,
                out=output,
                lse=lse.contiguous(),
                dq=found[0],
                dk=found[1],
                dv=found[2],
                dsink=None,
                **slices(tuple(bands), query.device),
                **NO_SINK,
                softmax_scale=scale,
                softcap=softcap,
                dq_type=dtype,
                dk_type=dtype,
                dv_type=dtype,
                disable_bwd_dkv_atomic_reduction=False,
                deterministic=torch.are_deterministic_algorithms_enabled(),
                sm_margin=0,
            )
        return found


@functools.lru_cache(maxsize=64)
def slices(bands: tuple[Band, ...], device: torch.device) -> dict[str, Tensor]:
    """The bands' typed slices: `q_ranges`, `k_ranges` int32 `[slices, 2]` and `attn_type_map` int32 `[slices]`."""
    found = [slice_ for band in bands for slice_ in band.as_slices()]
    columns = zip(("q_ranges", "k_ranges", "attn_type_map"), zip(*found, strict=True), strict=True)
    return {name: to_device(torch.tensor(values, dtype=torch.int32), device) for name, values in columns}
