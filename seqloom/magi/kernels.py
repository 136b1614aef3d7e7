"""Kernels: attention of local queries to the keys of one buffer, over the cells of a list of bands.

Role: `seqloom.magi.attention` calls a kernel once for the host's keys and once for each stage of received ones, and merges the results.
In: query `[rows, heads_q, dim]`, key and value `[columns, heads_kv, dim]`, bands in the coordinates of these tensors, no cell in two of
them. Out: the output of these keys alone in the precision of sums, and the log-sum-exp `[rows, heads_q]`, -inf (and output 0) where no band
covers a row. The backward takes the final log-sum-exp and `delta`, the row sums of gradient x output (FlashAttention-2, Dao 2023,
arXiv:2307.08691, section 3.1), so that the gradients of several calls add up.

Every kernel is an object with `name`, `refusal`, `forward` and `backward`; `reference` here is exact on any device, in any dtype, with any
band and soft cap; `slices` runs PyTorch's fused kernels, `flex` its FlexAttention, `flash` and `magi_kernel` packages; `choose` picks one
and says so in the log. Where PyTorch is set to deterministic algorithms (`determinism`), a kernel adds in one order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from seqloom.magi.bands import Band
from seqloom.ops.precision import sum_dtype

_TILE = 2**26  # scores at once, over all heads


class Final(NamedTuple):
    """What a backward starts from: the gradient of the final output, the inputs, and the final output, log-sum-exp and `delta`."""

    grad: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    lse: Tensor
    delta: Tensor


Gradients = tuple[Tensor, Tensor, Tensor]  # of query, key and value


class Kernel(Protocol):
    """What runs the bands of one buffer. `softcap` is 0 where there is none."""

    name: str

    def refusal(self, device: torch.device, dtype: torch.dtype, head_dim: int, softcap: bool) -> str | None:
        """Why such tensors cannot be run here, to follow "kernel 'name'" in a sentence; None where they can."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, bands: Sequence[Band], scale: float, softcap: float
    ) -> tuple[Tensor, Tensor]:
        """Output `[rows, heads_q, dim]` and log-sum-exp `[rows, heads_q]`, both in `sum_dtype(query.dtype)`."""

    def backward(self, given: Final, bands: Sequence[Band], scale: float, softcap: float) -> Gradients:
        """Gradients of query, key and value through these bands, in `sum_dtype(query.dtype)`."""


@contextmanager
def determinism(wanted: bool) -> Iterator[None]:
    """PyTorch set to deterministic algorithms, if `wanted`, and afterwards set as before."""
    before, warn_only = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if not wanted or (before and not warn_only):
        yield
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def nothing_yet(query: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of no keys at all, to merge others into."""
    dtype = sum_dtype(query.dtype)
    lse = torch.full(query.shape[:2], float("-inf"), dtype=dtype, device=query.device)
    return torch.zeros(query.shape, dtype=dtype, device=query.device), lse


def no_gradients(given: Final) -> Gradients:
    """Zeros for the gradients of query, key and value, to add to."""
    return tuple(torch.zeros(x.shape, dtype=sum_dtype(x.dtype), device=x.device) for x in given[1:4])


def merge_(output: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """Add the softmax over other keys to (`output`, `lse`), in place. Rows that neither covers stay 0 and -inf."""
    total = torch.logaddexp(lse, other_lse)
    covered = total != float("-inf")
    mine, its = (torch.where(covered, (part - total).exp(), 0.0).unsqueeze(-1) for part in (lse, other_lse))
    output.mul_(mine).addcmul_(other, its)
    lse.copy_(total)


class Reference:
    """Explicit scores, a stretch of a band's rows at a time."""

    name = "reference"

    @staticmethod
    def refusal(device: torch.device, dtype: torch.dtype, head_dim: int, softcap: bool) -> str | None:
        """Nothing is refused."""
        return None

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, bands: Sequence[Band], scale: float, softcap: float
    ) -> tuple[Tensor, Tensor]:
        """As `Kernel.forward`."""
        dtype = sum_dtype(query.dtype)
        output, lse = nothing_yet(query)
        for band in tiles(bands, query.shape[1]):
            rows, columns = slice(band.q_start, band.q_end), slice(band.k_start, band.k_end)
            scores, _ = _scores(query[rows].to(dtype), key[columns].to(dtype), band, scale, softcap)
            own = scores.logsumexp(-1)  # [kv heads, groups, rows]
            weights = (scores - own.masked_fill(own == float("-inf"), 0.0).unsqueeze(-1)).exp()
            part = torch.einsum("kgrc,ckd->rkgd", weights, value[columns].to(dtype)).flatten(1, 2)
            merge_(output[rows], lse[rows], part, own.permute(2, 0, 1).flatten(1, 2))
        return output, lse

    def backward(self, given: Final, bands: Sequence[Band], scale: float, softcap: float) -> Gradients:
        """As `Kernel.backward`."""
        grad, query, key, value, _, lse, delta = given
        dtype = sum_dtype(query.dtype)
        d_query, d_key, d_value = no_gradients(given)
        finite = lse.masked_fill(lse == float("-inf"), 0.0)
        for band in tiles(bands, query.shape[1]):
            rows, columns = slice(band.q_start, band.q_end), slice(band.k_start, band.k_end)
            q, k, v, d_out = query[rows].to(dtype), key[columns].to(dtype), value[columns].to(dtype), grad[rows].to(dtype)
            scores, slope = _scores(q, k, band, scale, softcap)
            heads = k.shape[1]
            column = lambda x, heads=heads: x.unflatten(1, (heads, -1)).permute(1, 2, 0).unsqueeze(-1)  # noqa: E731
            weights = (scores - column(finite[rows])).exp()
            d_weights = torch.einsum("rkgd,ckd->kgrc", d_out.unflatten(1, (heads, -1)), v)
            d_scores = weights * (d_weights - column(delta[rows])) * slope * scale
            d_query[rows] += torch.einsum("kgrc,ckd->rkgd", d_scores, k).flatten(1, 2)
            d_key[columns] += torch.einsum("kgrc,rkgd->ckd", d_scores, q.unflatten(1, (heads, -1)))
            d_value[columns] += torch.einsum("kgrc,rkgd->ckd", weights, d_out.unflatten(1, (heads, -1)))
        return d_query, d_key, d_value


def tiles(bands: Sequence[Band], heads: int) -> Iterator[Band]:
    """The bands, cut into stretches of rows whose scores over all heads fit a tile."""
    for band in bands:
        rows = max(1, _TILE // (heads * (band.k_end - band.k_start)))
        for start in range(band.q_start, band.q_end, rows):
            piece = band.cut(q_start=start, q_end=min(start + rows, band.q_end))
            if piece is not None:
                yield piece


def _scores(query: Tensor, key: Tensor, band: Band, scale: float, softcap: float) -> tuple[Tensor, Tensor | float]:
    """Scaled, capped scores `[kv heads, groups, rows, columns]`, -inf outside of the band, and the derivative of the cap."""
    scores = torch.einsum("rkgd,ckd->kgrc", query.unflatten(1, (key.shape[1], -1)), key) * scale
    slope: Tensor | float = 1.0
    if softcap:
        capped = torch.tanh(scores / softcap)
        scores, slope = capped * softcap, 1 - capped * capped
    rows = torch.arange(band.q_start, band.q_end, device=query.device)[:, None]
    columns = torch.arange(band.k_start, band.k_end, device=query.device)[None]
    distance = columns - rows
    return scores.masked_fill((distance < band.lo) | (distance > band.hi), float("-inf")), slope


reference = Reference()
