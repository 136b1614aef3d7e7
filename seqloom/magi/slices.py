"""PyTorch's fused attention kernels on bands: every band becomes rectangles and triangles, which flash attention and cuDNN know.

An upper triangle is a causal square with rows and columns in reverse order. Each piece (`seqloom.magi.pieces`) is one call, merged by
log-sum-exp; the backward of each call is given the final output and log-sum-exp, so that their gradients add up.

In and out: as `seqloom.magi.kernels.Kernel`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from seqloom.magi.bands import Band
from seqloom.magi.kernels import Final, Gradients, merge_, no_gradients, nothing_yet
from seqloom.magi.pieces import Form, pieces
from seqloom.ops.fused import kernel_for, run_backward, run_forward
from seqloom.ops.kernels import ANY_SHAPE, KERNELS
from seqloom.ops.precision import sum_dtype


class Slices:
    """One fused call for every piece of a band."""

    name = "sdpa"

    @staticmethod
    def refusal(device: torch.device, dtype: torch.dtype, head_dim: int, softcap: bool) -> str | None:
        """Why these tensors cannot be run here, as the end of a sentence; None where they can."""
        if softcap:
            return "has no soft cap"
        sample = torch.empty(1, 1, 1, head_dim, dtype=dtype, device=device)
        return None if kernel_for(sample, sample, ANY_SHAPE) else f"does not take {dtype} with head size {head_dim} on {device.type}"

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, bands: Sequence[Band], scale: float, softcap: float
    ) -> tuple[Tensor, Tensor]:
        """As `Kernel.forward`; `softcap` must be 0."""
        output, lse = nothing_yet(query)
        dtype, kernel = output.dtype, _kernel(query, key)
        for piece in (piece for band in bands for piece in pieces(band)):
            rows, columns = slice(piece.q_start, piece.q_end), slice(piece.k_start, piece.k_end)
            q, k, v = _heads(kernel, query[rows], key[columns], value[columns], piece.form)
            out, own, _ = run_forward(kernel, q, k, v, scale, piece.form != "full")
            merge_(output[rows], lse[rows], _rows(out, piece.form).to(dtype), _rows(own.unsqueeze(-1), piece.form)[..., 0].to(dtype))
        return output, lse

    def backward(self, given: Final, bands: Sequence[Band], scale: float, softcap: float) -> Gradients:
        """As `Kernel.backward`. The fused kernels find `delta` again from gradient and output."""
        grad, query, key, value, output, lse, _ = given
        dtype, kernel = sum_dtype(query.dtype), _kernel(query, key)
        d_query, d_key, d_value = no_gradients(given)
        for piece in (piece for band in bands for piece in pieces(band)):
            rows, columns = slice(piece.q_start, piece.q_end), slice(piece.k_start, piece.k_end)
            q, k, v = _heads(kernel, query[rows], key[columns], value[columns], piece.form)
            d_out, out = (_turned(x[rows], piece.form) for x in (grad, output))
            own = _turned(lse[rows].unsqueeze(-1), piece.form)[..., 0].contiguous()
            found = run_backward(kernel, d_out, q, k, v, out, own, scale, piece.form != "full")
            for total, part, place in zip((d_query, d_key, d_value), found, (rows, columns, columns), strict=True):
                total[place] += _grouped(_rows(part, piece.form), total.shape[1]).to(dtype)
        return d_query, d_key, d_value


def _turned(x: Tensor, form: Form) -> Tensor:
    """`[rows, heads, dim]` -> `[1, heads, rows, dim]`, rows in reverse order for an upper triangle."""
    return (x.flip(0) if form == "upper" else x).transpose(0, 1).unsqueeze(0).contiguous()


def _kernel(query: Tensor, key: Tensor) -> str:
    """Which of PyTorch's kernels runs `[rows, heads, dim]`; `refusal` has asked already whether one does."""
    return kernel_for(query.transpose(0, 1)[None], key.transpose(0, 1)[None], ANY_SHAPE)


def _heads(kernel: str, query: Tensor, key: Tensor, value: Tensor, form: Form) -> tuple[Tensor, Tensor, Tensor]:
    """What a fused call takes; key/value heads repeated for their groups where the kernel knows none."""
    groups = 1 if KERNELS[kernel].grouped else query.shape[1] // key.shape[1]
    return _turned(query, form), *(_turned(x.repeat_interleave(groups, 1) if groups > 1 else x, form) for x in (key, value))


def _rows(x: Tensor, form: Form) -> Tensor:
    """`[1, heads, rows, dim]` -> `[rows, heads, dim]` in the order of the rows."""
    rows = x[0].transpose(0, 1)
    return rows.flip(0) if form == "upper" else rows


def _grouped(x: Tensor, heads: int) -> Tensor:
    """Gradients of repeated heads summed for each key/value head."""
    return x if x.shape[1] == heads else x.unflatten(1, (heads, -1)).sum(2)
