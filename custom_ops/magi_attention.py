"""Attention over any mask with the sequence split over ranks, under the names that MagiAttention users know.

    key = magi_attn_flex_key(q_ranges, k_ranges, types, total, total, num_heads_q, num_heads_kv, head_dim, cp_group_or_mesh=group)
    x = dispatch(x, key)                                  # this rank's rows of [tokens, ...]
    out, meta = calc_attn(q, k, v, key)                   # [tokens, heads, head_dim]; meta.lse [tokens, heads]
    logits = undispatch(logits, key)                      # the whole sequence again

Planning and kernels are those of `seqloom.magi`: no GPU and no extension is needed. A batch is squashed into documents of one sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import DeviceMesh, ProcessGroup

from seqloom.errors import UserError
from seqloom.magi import rows as _rows
from seqloom.magi.attention import attend
from seqloom.magi.key import DistAttnRuntimeKey, global_rows, group_of, make_key, most_recent_key, nodes_of, runtime_of
from seqloom.magi.mask import AttnMask
from seqloom.magi.masks import infer_attn_mask_from_cu_seqlens, infer_attn_mask_from_sliding_window, infer_varlen_mask_from_batch
from seqloom.magi.operator import magi_attention

__all__ = [
    "AttnMask",
    "DistAttnConfig",
    "DistAttnRuntimeKey",
    "calc_attn",
    "compute_pad_size",
    "dispatch",
    "get_most_recent_key",
    "get_position_ids",
    "infer_attn_mask_from_cu_seqlens",
    "infer_attn_mask_from_sliding_window",
    "infer_varlen_mask_from_batch",
    "magi_attention",
    "magi_attn_flex_dispatch",
    "magi_attn_flex_key",
    "magi_attn_varlen_dispatch",
    "magi_attn_varlen_key",
    "make_flex_key_for_new_mask_after_dispatch",
    "make_varlen_key_for_new_mask_after_dispatch",
    "roll",
    "squash_batch_dim",
    "undispatch",
]

Group = ProcessGroup | DeviceMesh | None
Ranges = Sequence[tuple[int, int]]
Window = tuple[int, int]


@dataclass(frozen=True)
class DistAttnConfig:
    """How a key is planned and run.

    `algorithm`: "auto" weighs compute and communication, "area" balances the mask's area alone. `uneven`: chunk counts of ranks may differ
    by one, instead of padding. `degree`: stages whose rows travel while the one before is computed; 0 is one blocking exchange, "auto" lets
    the cost model say. `kernel`: "magi", "flash3", "flash2", "sdpa", "flex", "reference", or None for the fastest that takes the tensors.
    `deterministic`: every sum has one order, so that two runs give the same bits.
    """

    algorithm: str = "auto"
    uneven: bool = False
    degree: int | str = 1
    kernel: str | None = None
    deterministic: bool = False


@dataclass(frozen=True)
class AttnForwardMeta:
    """What `calc_attn` returns beside the output: `lse` `[tokens, heads]` in the precision of sums."""

    lse: Tensor


# --- keys ------------------------------------------------------------------------------------------------------------------------


def magi_attn_flex_key(
    q_ranges: Ranges,
    k_ranges: Ranges,
    attn_mask_type: Sequence[int | str] | int | str,
    total_seqlen_q: int,
    total_seqlen_k: int,
    num_heads_q: int | None = None,
    num_heads_kv: int | None = None,
    head_dim: int | None = None,
    pad_size: int | None = None,
    chunk_size: int | None = None,
    cp_group_or_mesh: Group = None,
    dist_attn_config: DistAttnConfig | None = None,
) -> DistAttnRuntimeKey:
    """The key of a mask of slices; one `attn_mask_type` counts for all of them. `AttnMask` says what is refused.

    `pad_size` is ignored: `dispatch` pads as the chunks ask. With a mesh of two dimensions, nodes x ranks of a node, a row that several
    ranks of a node need crosses to the node once. Raises `UserError` for a mesh of another shape.
    """
    mask = _flex_mask(q_ranges, k_ranges, attn_mask_type, total_seqlen_q, total_seqlen_k)
    return _key(mask, num_heads_q, num_heads_kv, head_dim, chunk_size, cp_group_or_mesh, dist_attn_config)


def magi_attn_varlen_key(
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    num_heads_q: int | None = None,
    num_heads_kv: int | None = None,
    head_dim: int | None = None,
    pad_size: int | None = None,
    chunk_size: int | None = None,
    cp_group_or_mesh: Group = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    global_window_size: int = 0,
    dist_attn_config: DistAttnConfig | None = None,
) -> DistAttnRuntimeKey:
    """The key of documents packed in one sequence, from their cumulative lengths; windows as `infer_attn_mask_from_cu_seqlens` has them."""
    mask = _varlen_mask(cu_seqlens_q, cu_seqlens_k, causal, window_size, global_window_size)
    return _key(mask, num_heads_q, num_heads_kv, head_dim, chunk_size, cp_group_or_mesh, dist_attn_config)


def make_flex_key_for_new_mask_after_dispatch(
    q_ranges: Ranges,
    k_ranges: Ranges,
    attn_mask_type: Sequence[int | str] | int | str,
    key_for_dispatch: DistAttnRuntimeKey,
    dist_attn_config: DistAttnConfig | None = None,
) -> DistAttnRuntimeKey:
    """A key for another mask over rows that lie where `key_for_dispatch` laid them (layers with a window beside full ones)."""
    total = key_for_dispatch.total_seqlen
    return _on_old_rows(_flex_mask(q_ranges, k_ranges, attn_mask_type, total, total), key_for_dispatch, dist_attn_config)


def make_varlen_key_for_new_mask_after_dispatch(
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    key_for_dispatch: DistAttnRuntimeKey,
    causal: bool = False,
    window_size: Window = (-1, -1),
    global_window_size: int = 0,
    dist_attn_config: DistAttnConfig | None = None,
) -> DistAttnRuntimeKey:
    """As `make_flex_key_for_new_mask_after_dispatch`, from cumulative lengths."""
    mask = _varlen_mask(cu_seqlens_q, cu_seqlens_k, causal, window_size, global_window_size)
    return _on_old_rows(mask, key_for_dispatch, dist_attn_config)


def get_most_recent_key(cp_group_or_mesh: Group = None) -> DistAttnRuntimeKey:
    """The key made last for a group. Raises `UserError` where there is none."""
    return most_recent_key(group_of(cp_group_or_mesh))


def get_position_ids(key: DistAttnRuntimeKey) -> Tensor:
    """Global row of every local row, int64 `[local rows]`; those of the padding are `total_seqlen` or more. On the default device."""
    return global_rows(key, torch.get_default_device())


# --- rows ------------------------------------------------------------------------------------------------------------------------


def dispatch(x: Tensor, key: DistAttnRuntimeKey, pad_value: float = 0.0) -> Tensor:
    """This rank's rows of `x` `[total, ...]`, the same on every rank -> `[local rows, ...]`; rows of the padding hold `pad_value`.

    The gradient of `x` is whole on every rank. Raises `UserError` for an `x` of another length.
    """
    return _rows.dispatch(x, key, pad_value)


def undispatch(x: Tensor, key: DistAttnRuntimeKey) -> Tensor:
    """The rows of all ranks in their order, without padding: `[local rows, ...]` -> `[total, ...]` on every rank.

    What follows must be the same on all ranks: its gradient is not summed. Raises `UserError` for an `x` of another length.
    """
    return _rows.undispatch(x, key)


def roll(x: Tensor, shift: int, dim: int, key: DistAttnRuntimeKey) -> Tensor:
    """`torch.roll` of the whole sequence by `shift`, of dispatched rows along `dim`: only rows that change rank travel; padding stays."""
    return _rows.roll(x, shift, dim, key)


def squash_batch_dim(x: Tensor) -> Tensor:
    """`[batch, tokens, ...]` -> `[batch * tokens, ...]`."""
    return x.flatten(0, 1)


def compute_pad_size(total_seqlen_q: int, cp_size: int, *sizes: int) -> int:
    """Rows that `dispatch` adds for chunks of the last of `sizes`; releases before 1.0 pass the head size in front of it."""
    unit = cp_size * sizes[-1]
    return -total_seqlen_q % unit


# --- attention -------------------------------------------------------------------------------------------------------------------


def calc_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key: DistAttnRuntimeKey,
    sink: Tensor | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, AttnForwardMeta]:
    """Attention of this rank's queries to the whole sequence, by the key's mask.

    q `[local rows, heads_q, head_dim]`, k and v `[local rows, heads_kv, head_dim]` -> output like q, and `meta.lse`. `softmax_scale` is
    1 / sqrt(head_dim) when not given; `softcap` 0 is none; `sink` `[sinks, heads_q]` (or `[heads_q]`) adds to every row's denominator, and
    its gradient is the part of this rank's rows. Raises `UserError` for tensors that are not those the key was made for.
    """
    _check(q, k, v, sink, key)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    sinks = sink if sink is None or sink.dim() == 2 else sink.unsqueeze(0)
    out, lse = attend(q, k, v, sinks, runtime_of(key, q.device, q.dtype, q.shape[2], bool(softcap)), scale, softcap)
    return out, AttnForwardMeta(lse)


def _check(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, key: DistAttnRuntimeKey) -> None:
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise UserError(f"calc_attn takes q, k, v of shape [tokens, heads, head_dim], k and v alike, not {shapes}: squash the batch first")
    if len(q) != key.local_rows or len(k) != key.local_rows:
        raise UserError(
            f"the key gives this rank {key.local_rows} rows, but q has {len(q)} and k {len(k)}: pass rows dispatched with this key"
        )
    expected = [(key.num_heads_q, q.shape[1], "query heads"), (key.num_heads_kv, k.shape[1], "key/value heads")]
    for wanted, found, name in [*expected, (key.head_dim, q.shape[2], "elements of a head")]:
        if wanted is not None and wanted != found:
            raise UserError(f"the key was made for {wanted} {name}, but the tensors have {found}: make a key for these tensors")
    if q.shape[1] % k.shape[1] or q.shape[2] != k.shape[2]:
        raise UserError(f"{q.shape[1]} query heads cannot share {k.shape[1]} key/value heads of the same size: use a multiple")
    if sink is not None and sink.shape[-1] != q.shape[1]:
        raise UserError(f"sink has {sink.shape[-1]} heads and q {q.shape[1]}: give one sink (or several) for each query head")


# --- releases before 1.0: key and dispatch in one call ----------------------------------------------------------------------------


def magi_attn_varlen_dispatch(
    x: Tensor,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    head_dim: int | None = None,
    pad_size: int | None = None,
    chunk_size: int | None = None,
    cp_group: Group = None,
    causal: bool = False,
    dist_attn_config: DistAttnConfig | None = None,
) -> tuple[Tensor, DistAttnRuntimeKey]:
    """(this rank's rows of `x`, key) of packed documents."""
    mask = _varlen_mask(cu_seqlens_q, cu_seqlens_k, causal, (-1, -1), 0)
    key = _key(mask, None, None, head_dim, chunk_size, cp_group, dist_attn_config)
    return dispatch(x, key), key


def magi_attn_flex_dispatch(
    x: Tensor,
    q_ranges: Ranges,
    k_ranges: Ranges,
    attn_mask_type: Sequence[int | str] | int | str,
    total_seqlen_q: int,
    total_seqlen_k: int,
    head_dim: int | None = None,
    pad_size: int | None = None,
    chunk_size: int | None = None,
    cp_group: Group = None,
    dist_attn_config: DistAttnConfig | None = None,
) -> tuple[Tensor, DistAttnRuntimeKey]:
    """(this rank's rows of `x`, key) of a mask of slices."""
    mask = _flex_mask(q_ranges, k_ranges, attn_mask_type, total_seqlen_q, total_seqlen_k)
    key = _key(mask, None, None, head_dim, chunk_size, cp_group, dist_attn_config)
    return dispatch(x, key), key


def _flex_mask(q_ranges: Ranges, k_ranges: Ranges, types: Any, total_q: int, total_k: int) -> AttnMask:
    types = [types] * len(q_ranges) if isinstance(types, int | str) else list(types)
    return AttnMask(tuple(map(tuple, q_ranges)), tuple(map(tuple, k_ranges)), tuple(types), (total_q, total_k))


def _varlen_mask(cu_seqlens_q: Any, cu_seqlens_k: Any, causal: bool, window: Window, global_window: int) -> AttnMask:
    return _flex_mask(*infer_attn_mask_from_cu_seqlens(cu_seqlens_q, cu_seqlens_k, causal, window, global_window))


def _key(
    mask: AttnMask,
    heads: int | None,
    kv_heads: int | None,
    head_dim: int | None,
    chunk_size: int | None,
    group: Group,
    config: DistAttnConfig | None,
) -> DistAttnRuntimeKey:
    config = config or DistAttnConfig()
    options = {name: getattr(config, name) for name in ("algorithm", "uneven", "degree", "kernel", "deterministic")}
    return make_key(mask, heads, kv_heads, head_dim, group_of(group), chunk_size=chunk_size, nodes=nodes_of(group), **options)


def _on_old_rows(mask: AttnMask, key: DistAttnRuntimeKey, config: DistAttnConfig | None) -> DistAttnRuntimeKey:
    given = key if config is None else config
    options = {name: getattr(given, name) for name in ("degree", "kernel", "deterministic")}
    sizes = (key.num_heads_q, key.num_heads_kv, key.head_dim)
    return make_key(mask, *sizes, key.group, dispatch=key.dispatch, nodes=key.nodes, **options)
