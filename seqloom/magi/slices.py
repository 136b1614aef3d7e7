"""PyTorch's fused attention kernels on bands: every band becomes rectangles and triangles, which flash attention and cuDNN know.

A band between two diagonals is cut, by rows and columns, into full rectangles, lower triangles (causal squares) and upper triangles; an
upper triangle is a causal square with rows and columns in reverse order. Each is one call, merged by log-sum-exp; the backward of each call
is given the final output and log-sum-exp, so that their gradients add up.

In and out: as `seqloom.magi.kernels.Kernel`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from seqloom.magi.bands import Band
from seqloom.magi.kernels import Final, Gradients, accumulate, merge_, no_gradients, nothing_yet
from seqloom.ops.fused import kernel_for, run_backward, run_forward

Form = Literal["full", "lower", "upper"]


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows [q_start, q_end) x columns [k_start, k_end): all cells, or of a square those under (over) its diagonal, with it."""

    q_start: int
    q_end: int
    k_start: int
    k_end: int
    form: Form


@functools.lru_cache(maxsize=1024)
def pieces(band: Band) -> tuple[Piece, ...]:
    """The cells of a band as full rectangles and triangles, each cell once."""
    return tuple(_pieces(band))


def _pieces(band: Band) -> Iterator[Piece]:
    tight = band.tight()
    if tight is None:
        return
    low = tight.lo > tight.k_start - (tight.q_end - 1)  # the lower diagonal cuts cells off
    high = tight.hi < tight.k_end - 1 - tight.q_start
    if not low and not high:
        yield Piece(tight.q_start, tight.q_end, tight.k_start, tight.k_end, "full")
    elif low and high:
        yield from _between(tight)
    elif high:
        yield from _under(tight)
    else:
        yield from _over(tight)


def _under(band: Band) -> Iterator[Piece]:
    """Cells with j - i <= hi: a triangle where the diagonal crosses, full columns to its left, full rows below."""
    end = min(band.q_end, band.k_end - band.hi)  # the first row that sees all columns, or behind the last
    start = max(band.q_start, band.k_start - band.hi)
    left = start + band.hi  # of the triangle's first row: its last column
    if left > band.k_start:
        yield Piece(start, end, band.k_start, left, "full")
    yield Piece(start, end, left, end + band.hi, "lower")
    if end < band.q_end:
        yield Piece(end, band.q_end, band.k_start, band.k_end, "full")


def _over(band: Band) -> Iterator[Piece]:
    """Cells with j - i >= lo: as `_under`, turned round."""
    mirrored = Band(-band.q_end, -band.q_start, -band.k_end, -band.k_start, -band.hi, -band.lo)
    turned: dict[Form, Form] = {"full": "full", "lower": "upper"}
    for piece in _under(mirrored):
        yield Piece(1 - piece.q_end - 1, 1 - piece.q_start - 1, -piece.k_end, -piece.k_start, turned[piece.form])


def _between(band: Band) -> Iterator[Piece]:
    """Cells between two diagonals: stretches of rows no longer than the band is wide, each cut at the column where the diagonals part."""
    width = band.hi - band.lo + 1
    for start in range(band.q_start, band.q_end, width):
        end = min(start + width, band.q_end)
        middle = start + band.hi  # row `start` ends here: further columns know no lower diagonal in this stretch but the first
        for columns in ({"k_end": middle + 1}, {"k_start": middle + 1}):
            part = band.cut(q_start=start, q_end=end, **columns)
            if part is not None:
                yield from _pieces(part)


class Slices:
    """One fused call for every piece of a band."""

    name = "sdpa"

    @staticmethod
    def refusal(device: torch.device, dtype: torch.dtype, head_dim: int, softcap: bool) -> str | None:
        """Why these tensors cannot be run here, as the end of a sentence; None where they can."""
        if softcap:
            return "has no soft cap"
        sample = torch.empty(1, 1, 1, head_dim, dtype=dtype, device=device)
        return None if kernel_for(sample, sample) else f"does not take {dtype} with head size {head_dim} on {device.type}"

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, bands: Sequence[Band], scale: float, softcap: float
    ) -> tuple[Tensor, Tensor]:
        """As `Kernel.forward`; `softcap` must be 0."""
        output, lse = nothing_yet(query)
        dtype = output.dtype
        for piece in (piece for band in bands for piece in pieces(band)):
            rows, columns = slice(piece.q_start, piece.q_end), slice(piece.k_start, piece.k_end)
            q, k, v = _heads(query[rows], key[columns], value[columns], piece.form)
            out, own, _ = run_forward(kernel_for(q, k), q, k, v, scale, piece.form != "full")
            merge_(output[rows], lse[rows], _rows(out, piece.form).to(dtype), _rows(own.unsqueeze(-1), piece.form)[..., 0].to(dtype))
        return output, lse

    def backward(self, given: Final, bands: Sequence[Band], scale: float, softcap: float) -> Gradients:
        """As `Kernel.backward`. The fused kernels find `delta` again from gradient and output."""
        grad, query, key, value, output, lse, _ = given
        dtype = accumulate(query.dtype)
        d_query, d_key, d_value = no_gradients(given)
        for piece in (piece for band in bands for piece in pieces(band)):
            rows, columns = slice(piece.q_start, piece.q_end), slice(piece.k_start, piece.k_end)
            q, k, v = _heads(query[rows], key[columns], value[columns], piece.form)
            d_out, out = (_turned(x[rows], piece.form) for x in (grad, output))
            own = _turned(lse[rows].unsqueeze(-1), piece.form)[..., 0].contiguous()
            kernel = kernel_for(q, k)
            found = run_backward(kernel, d_out, q, k, v, out, own, scale, piece.form != "full")
            for total, part, place in zip((d_query, d_key, d_value), found, (rows, columns, columns), strict=True):
                total[place] += _grouped(_rows(part, piece.form), total.shape[1]).to(dtype)
        return d_query, d_key, d_value


def _turned(x: Tensor, form: Form) -> Tensor:
    """`[rows, heads, dim]` -> `[1, heads, rows, dim]`, rows in reverse order for an upper triangle."""
    return (x.flip(0) if form == "upper" else x).transpose(0, 1).unsqueeze(0).contiguous()


def _heads(query: Tensor, key: Tensor, value: Tensor, form: Form) -> tuple[Tensor, Tensor, Tensor]:
    """What a fused call takes; key/value heads repeated for their groups."""
    groups = query.shape[1] // key.shape[1]
    return _turned(query, form), *(_turned(x.repeat_interleave(groups, 1) if groups > 1 else x, form) for x in (key, value))


def _rows(x: Tensor, form: Form) -> Tensor:
    """`[1, heads, rows, dim]` -> `[rows, heads, dim]` in the order of the rows."""
    rows = x[0].transpose(0, 1)
    return rows.flip(0) if form == "upper" else rows


def _grouped(x: Tensor, heads: int) -> Tensor:
    """Gradients of repeated heads summed for each key/value head."""
    return x if x.shape[1] == heads else x.unflatten(1, (heads, -1)).sum(2)
