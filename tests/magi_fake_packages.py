"""flash_attn, flash_attn_interface and magi_attention as they are called, without their kernels: written from what the packages document.

Every function has the parameters of the real one, in their order, checks layouts and dtypes as the real one does, and computes densely in
fp64. The masks are written cell by cell from the packages' own words, not from `seqloom.magi.bands`.
"""

from __future__ import annotations

import types
from typing import Any, NamedTuple

import torch
from torch import Tensor

INF = float("inf")


def dense_forward(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    """Output `[rows, heads, dim]` and log-sum-exp `[rows, heads]` of `allowed` `[rows, columns]`."""
    q, k, v = q.double(), k.double(), v.double()
    scores, _ = dense_scores(q, k, allowed, scale, softcap)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == -INF, 0.0)[..., None]).exp()
    return torch.einsum("hrc,chd->rhd", weights, repeated(v, q)), lse.t()


def dense_scores(q: Tensor, k: Tensor, allowed: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor | float]:
    """Scores `[heads, rows, columns]`, -inf where not allowed, and the derivative of the soft cap."""
    scores = torch.einsum("rhd,chd->hrc", q, repeated(k, q)) * scale
    slope: Tensor | float = 1.0
    if softcap:
        slope = 1 - torch.tanh(scores / softcap) ** 2
        scores = torch.tanh(scores / softcap) * softcap
    return scores.masked_fill(~allowed, -INF), slope


def sums(q: Tensor) -> torch.dtype:
    """Sums are kept in fp32; the fp64 of tests is no real package's."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def repeated(x: Tensor, q: Tensor) -> Tensor:
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def dense_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, allowed: Tensor, scale: float, softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients given the final output and log-sum-exp `[rows, heads]`: FlashAttention's algorithm without tiles."""
    dout, q, k, v, out, lse = (x.double() for x in (dout, q, k, v, out, lse))
    scores, slope = dense_scores(q, k, allowed, scale, softcap)
    weights = (scores - lse.t().masked_fill(lse.t() == -INF, 0.0)[..., None]).exp()
    delta = (dout * out).sum(-1).t()[..., None]
    d_scores = weights * (torch.einsum("rhd,chd->hrc", dout, repeated(v, q)) - delta) * slope * scale
    grouped = lambda x: x.unflatten(1, (k.shape[1], -1)).sum(2)  # noqa: E731
    d_k = grouped(torch.einsum("hrc,rhd->chd", d_scores, q))
    d_v = grouped(torch.einsum("hrc,rhd->chd", weights, dout))
    return torch.einsum("hrc,chd->rhd", d_scores, repeated(k, q)), d_k, d_v


def window_mask(rows: int, columns: int, causal: bool, left: int, right: int) -> Tensor:
    """ "Query i attends keys between i + columns - rows - left and i + columns - rows + right"; -1 is no bound; causal is right 0."""
    right = 0 if causal else right
    place = torch.arange(rows)[:, None] + columns - rows
    j = torch.arange(columns)
    return ((j >= place - left) | (left < 0)) & ((j <= place + right) | (right < 0))


def check_packed(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> None:
    assert q.dim() == k.dim() == v.dim() == 3 and k.shape == v.shape and q.shape[1] % k.shape[1] == 0
    assert all(x.stride(-1) == 1 for x in (q, k, v))
    for cu, longest, x in ((cu_q, max_q, q), (cu_k, max_k, k)):
        assert cu.dtype == torch.int32 and cu.is_contiguous() and cu[0] == 0 and cu[-1] == len(x)
        assert isinstance(longest, int) and longest == int(cu.diff().max())
    assert len(cu_q) == len(cu_k)


def packed_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, causal: bool, left: int, right: int, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp `[heads, rows]` of packed sequences."""
    out, lse = torch.full_like(q, float("nan")), torch.full((q.shape[1], len(q)), float("nan"), dtype=sums(q))
    for rows, columns in pairs(cu_q, cu_k):
        mask = window_mask(rows.stop - rows.start, columns.stop - columns.start, causal, left, right)
        found, own = dense_forward(q[rows], k[columns], v[columns], mask, scale, softcap)
        out[rows], lse[:, rows] = found.to(q.dtype), own.t().to(lse.dtype)
    return out, lse


def packed_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grads: tuple[Tensor, Tensor, Tensor],
    cu_q: Tensor, cu_k: Tensor, causal: bool, left: int, right: int, scale: float, softcap: float,
) -> None:  # fmt: skip
    """Writes the gradients into `grads`."""
    assert lse.shape == (q.shape[1], len(q)) and lse.is_contiguous() and lse.dtype == sums(q) and out.dtype == dout.dtype == q.dtype
    assert [x.shape for x in grads] == [q.shape, k.shape, v.shape] and all(x.is_contiguous() for x in grads)
    for rows, columns in pairs(cu_q, cu_k):
        mask = window_mask(rows.stop - rows.start, columns.stop - columns.start, causal, left, right)
        found = dense_backward(dout[rows], q[rows], k[columns], v[columns], out[rows], lse[:, rows].t(), mask, scale, softcap)
        for grad, part, place in zip(grads, found, (rows, columns, columns), strict=True):
            grad[place] = part


def pairs(cu_q: Tensor, cu_k: Tensor) -> list[tuple[slice, slice]]:
    rows, columns = ([slice(a, b) for a, b in zip(cu.tolist(), cu.tolist()[1:], strict=False)] for cu in (cu_q, cu_k))
    return list(zip(rows, columns, strict=True))


def flash_attn_interface_2(log: list[dict[str, Any]]) -> types.ModuleType:
    """flash_attn.flash_attn_interface of flash_attn 2.7 and 2.8."""

    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left=-1,
        window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False, block_table=None, leftpad_k=None, seqused_k=None,
        zero_tensors=False,
    ):  # fmt: skip
        check_packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        assert dropout_p == 0.0 and alibi_slopes is None and not return_softmax
        log.append({"sequences": len(cu_seqlens_q) - 1})
        options = (causal, window_size_left, window_size_right, softmax_scale, softcap)
        out, lse = packed_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, *options)
        return out, lse, torch.empty(0), torch.empty(2, dtype=torch.int64)

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
        causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state=None, zero_tensors=False,
    ):  # fmt: skip
        check_packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        assert dropout_p == 0.0 and alibi_slopes is None and rng_state is None
        log.append({"deterministic": deterministic})
        options = (causal, window_size_left, window_size_right, softmax_scale, softcap)
        packed_backward(dout, q, k, v, out, softmax_lse, (dq, dk, dv), cu_seqlens_q, cu_seqlens_k, *options)
        return torch.empty(0)

    return as_module("flash_attn.flash_attn_interface", _flash_attn_varlen_forward, _flash_attn_varlen_backward)


def flash_attn_interface_3(log: list[dict[str, Any]]) -> types.ModuleType:
    """flash_attn_interface of FlashAttention 3."""

    def _flash_attn_forward(
        q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None, cu_seqlens_k_new=None, seqused_q=None,
        seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, page_table=None, kv_batch_idx=None, leftpad_k=None, rotary_cos=None,
        rotary_sin=None, seqlens_rotary=None, q_descale=None, k_descale=None, v_descale=None, softmax_scale=None, causal=False,
        window_size_left=-1, window_size_right=-1, attention_chunk=0, softcap=0.0, rotary_interleaved=True, scheduler_metadata=None,
        num_splits=1, pack_gqa=None, sm_margin=0,
    ):  # fmt: skip
        check_packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        log.append({"sequences": len(cu_seqlens_q) - 1})
        options = (causal, window_size_left, window_size_right, softmax_scale, softcap)
        return *packed_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, *options), torch.empty(0), torch.empty(0)

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None, max_seqlen_q=None,
        max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False, window_size_left=-1, window_size_right=-1,
        softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        check_packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        log.append({"deterministic": deterministic})
        options = (is_causal, window_size_left, window_size_right, softmax_scale, softcap)
        packed_backward(dout, q, k, v, out, softmax_lse, (dq, dk, dv), cu_seqlens_q, cu_seqlens_k, *options)
        return torch.empty(0)

    return as_module("flash_attn_interface", _flash_attn_forward, _flash_attn_backward)


class AttnForwardMeta(NamedTuple):
    lse: Tensor
    max_logits: Tensor | None = None


def magi_mask(q_ranges: Tensor, k_ranges: Tensor, types_: Tensor, rows: int, columns: int) -> Tensor:
    """0 full, 1 causal (bottom right), 2 inverse causal (top left), 3 both; no cell may be in two slices."""
    times = torch.zeros(rows, columns, dtype=torch.int64)
    for (q_start, q_end), (k_start, k_end), kind in zip(q_ranges.tolist(), k_ranges.tolist(), types_.tolist(), strict=True):
        i, j = torch.arange(q_end - q_start)[:, None], torch.arange(k_end - k_start)
        under, over = j <= i + (k_end - k_start) - (q_end - q_start), j >= i
        times[q_start:q_end, k_start:k_end] += (under | over | True, under, over, under & over)[kind]
    assert times.max() <= 1
    return times == 1


def flex_flash_attn(log: list[dict[str, Any]]) -> types.ModuleType:
    """magi_attention.functional.flex_flash_attn of MagiAttention 1.1."""

    def check(q, q_ranges, k_ranges, attn_type_map, sink, lse):
        assert all(x.dtype == torch.int32 and x.is_contiguous() for x in (q_ranges, k_ranges, attn_type_map))
        assert sink is None and lse.shape == q.shape[:2] and lse.dtype == sums(q) and all(x.stride(-1) == 1 for x in (q, lse))

    def _flex_flash_attn_forward(
        q, k, v, sink, sink_layout, out, lse, q_ranges, k_ranges, attn_type_map, softmax_scale, softcap, out_type,
        disable_fwd_atomic_reduction, deterministic, sm_margin, ref_block_size=None, max_seqlen_q=None, auto_range_merge=False,
        merge_q_ranges=None, fwd_qk_map=None, fwd_unique_count=None, swap_ab=False, pack_gqa=False,
    ):  # fmt: skip
        check(q, q_ranges, k_ranges, attn_type_map, sink, lse)
        assert not disable_fwd_atomic_reduction  # slices may share rows
        assert out.dtype == out_type and (lse == -INF).all() and (out == 0).all()
        log.append({"deterministic": deterministic, "sequences": len(q_ranges)})
        found, own = dense_forward(q, k, v, magi_mask(q_ranges, k_ranges, attn_type_map, len(q), len(k)), softmax_scale, softcap)
        out.copy_(found)
        lse.copy_(own)
        return out, AttnForwardMeta(lse)

    def _flex_flash_attn_backward(
        dout, q, k, v, sink, sink_layout, out, lse, dq, dk, dv, dsink, q_ranges, k_ranges, attn_type_map, softmax_scale, softcap, dq_type,
        dk_type, dv_type, disable_bwd_dkv_atomic_reduction, deterministic, sm_margin, auto_range_merge=False, merge_k_ranges=None,
        bwd_kq_map=None, bwd_unique_count=None, swap_bwd_qk_loop=False, pack_gqa=False, cat_gqa=False,
    ):  # fmt: skip
        check(q, q_ranges, k_ranges, attn_type_map, sink, lse)
        assert not disable_bwd_dkv_atomic_reduction and out.dtype == dout.dtype == q.dtype
        log.append({"deterministic": deterministic})
        mask = magi_mask(q_ranges, k_ranges, attn_type_map, len(q), len(k))
        found = dense_backward(dout, q, k, v, out, lse, mask, softmax_scale, softcap)
        for buffer, part, dtype in zip((dq, dk, dv), found, (dq_type, dk_type, dv_type), strict=True):
            assert buffer.dtype == dtype and (buffer == 0).all()
            buffer.copy_(part)
        return dq, dk, dv, None

    return as_module("magi_attention.functional.flex_flash_attn", _flex_flash_attn_forward, _flex_flash_attn_backward)


def as_module(name: str, *functions: Any) -> types.ModuleType:
    found = types.ModuleType(name)
    for function in functions:
        setattr(found, function.__name__, function)
    return found


FAKES = {"flash2": flash_attn_interface_2, "flash3": flash_attn_interface_3, "magi": flex_flash_attn}
