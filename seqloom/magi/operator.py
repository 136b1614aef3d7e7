"""Magi attention as an operator of a compiled program: `magi_attention(query, key, value, scale, group=...)`.

Role in the pipeline: where documents are packed, or where the sequence is split inside attention, the compiler puts this operator in the
place of plain attention. Its annotation freezes the sequence; `context_parallel="l"` says that the operator splits it itself, over
`group`. In: this rank's pieces of query, key and value. Who attends whom is no tensor: it is the key made last for the group
(`seqloom.magi.key.use_key`), which the trainer sets before each micro-batch, cut to the layer's sliding `window` where it has one.
`documents`, lengths of the documents of a typical row, and `windows`, those of all layers where they differ, are what the planner counts
with; a program does not pass them, and where one process alone passes documents, they are the mask.

`torch.compile` sees one operator of PyTorch's library forward and one backward, so a compiled block around it does not break.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from seqloom.errors import UserError
from seqloom.magi import attention as engine
from seqloom.magi.attention import Runtime
from seqloom.magi.key import DistAttnRuntimeKey, make_key, most_recent_key, runtime_of
from seqloom.magi.share import documents_mask, share, visible_pairs
from seqloom.magi.windows import Windows
from seqloom.ops.precision import sum_dtype
from seqloom.ops.registry import register_op

ALONE = ""  # the name of no group: this process alone


def _flops(sizes: Mapping[str, Any]) -> int:
    """Two products of 2 * e per visible pair; the diagonal of a document counts half, as in plain attention, as does a window's edge."""
    lengths = sizes["documents"] or (sizes["l"],)
    pairs = sum(visible_pairs(length, sizes["window"]) for length in lengths) * sizes["l"] // sum(lengths)
    return 4 * sizes["b"] * sizes["k"] * sizes["g"] * pairs * sizes["e"]


def _received(sizes: Mapping[str, Any]) -> int:
    """Rows of keys and values that the busiest rank receives."""
    lengths = tuple(sizes["documents"])
    return sizes["b"] * share(lengths, sum(lengths) // sizes["l"], sizes["window"], tuple(sizes["windows"])).received if lengths else 0


def _comm(sizes: Mapping[str, Any]) -> int:
    """Elements of keys and values that come to a rank in the forward pass."""
    return 2 * _received(sizes) * sizes["k"] * sizes["e"]


def _workspace(sizes: Mapping[str, Any]) -> int:
    """Bytes of temporaries of the backward pass: keys and values side by side, received, and sent (as many), in 2 bytes; the gradients of
    all of them in 4, of the queries twice (sum and part); and where heads share keys, keys, values and gradients of the largest call, no
    longer than the window, once for each head.
    """
    rows, heads, key_heads, received = sizes["b"] * sizes["l"], sizes["k"] * sizes["g"], sizes["k"], _received(sizes)
    pairs = 2 * (rows + 2 * received) * key_heads * sizes["e"]
    largest = max(rows, received) if sizes["window"] is None else min(max(rows, received), sizes["window"])
    repeated = 8 * largest * heads * sizes["e"] if heads > key_heads else 0
    return 6 * pairs + 8 * rows * heads * sizes["e"] + repeated


@register_op(
    "b (k g) l^ e^, b k l^ e^, b k l^ e^ -> b (k g) l^ e^",
    flops=_flops,
    comm=_comm,
    saved=("query", "key", "value", "output"),
    workspace=_workspace,
    context_parallel="l",
)
def magi_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    documents: tuple[int, ...] = (),
    windows: Windows = (),
    group: ProcessGroup | None = None,
) -> Tensor:
    """Attention of this rank's queries to the sequence of all ranks of `group`, by the mask of the key made last for it.

    query `[b, k * g, l, e]`, key and value `[b, k, l, e]` -> `[b, k * g, l, e]`; the rows of the batch follow each other as documents of
    one sequence. With a `window` row i sees no row further back than i - window + 1. Without a group `documents` may give the lengths of
    those of every row in place of a key. Raises `UserError` where no key was made, for rows of another number than the key's, and for a
    window below 1.
    """
    if window is not None and window < 1:
        raise UserError(f"magi attention: window={window} shows no key to a query: pass 1 or more, or None for all keys")
    batch, length = query.shape[0], query.shape[2]
    rows = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]  # [b * l, heads, e]
    if torch.compiler.is_compiling():
        name = ALONE if group is None else group.group_name
        output, _ = torch.ops.seqloom.magi_forward(*rows, name, scale, softcap or 0.0, window or 0)
    else:
        layout = _documents_key(documents, batch) if documents and group is None else _latest_key(group)
        runtime = _runtime(layout.within(window), rows[0], softcap)
        output, _ = engine.attend(*rows, None, runtime, scale, softcap or 0.0)
    return output.unflatten(0, (batch, length)).transpose(1, 2)


def _documents_key(documents: tuple[int, ...], batch: int) -> DistAttnRuntimeKey:
    borders = accumulate(documents * batch, initial=0)
    return make_key(documents_mask(list(borders)), None, None, None, None, current=False)


def _latest_key(group: ProcessGroup | None) -> DistAttnRuntimeKey:
    return most_recent_key(group if group is not None and group.size() > 1 else None)


def _runtime(key: DistAttnRuntimeKey, query: Tensor, softcap: float | None) -> Runtime:
    if len(query) != key.local_rows:
        raise UserError(
            f"attention got {len(query)} rows where the key made last gives this rank {key.local_rows}: make a key for these rows first"
        )
    return runtime_of(key, query.device, query.dtype, query.shape[2], bool(softcap))


# --- what torch.compile sees -----------------------------------------------------------------------------------------------------


def _named(name: str, query: Tensor, softcap: float, window: int) -> Runtime:
    """`window` 0 is none: an operator of the library takes no None for a number."""
    group = None if name == ALONE else dist.distributed_c10d._resolve_process_group(name)
    return _runtime(_latest_key(group).within(window or None), query, softcap)


@torch.library.custom_op("seqloom::magi_forward", mutates_args=())
def _magi_forward(
    query: Tensor, key: Tensor, value: Tensor, group: str, scale: float, softcap: float, window: int
) -> tuple[Tensor, Tensor]:
    output, lse = engine.forward(query, key, value, _named(group, query, softcap, window), scale, softcap)
    return output.to(query.dtype), lse


@_magi_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, group: str, scale: float, softcap: float, window: int) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(query.shape[:2], dtype=sum_dtype(query.dtype))


@torch.library.custom_op("seqloom::magi_backward", mutates_args=())
def _magi_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    group: str,
    scale: float,
    softcap: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    delta = (grad.to(lse.dtype) * output.to(lse.dtype)).sum(-1)
    runtime = _named(group, query, softcap, window)
    found = engine.backward(grad.contiguous(), query, key, value, output, lse, delta, runtime, scale, softcap)
    return tuple(gradient.to(x.dtype).contiguous() for gradient, x in zip(found, (query, key, value), strict=True))


@_magi_backward.register_fake
def _(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    group: str,
    scale: float,
    softcap: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, *ctx.options = inputs
    ctx.save_for_backward(query, key, value, *output)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *torch.ops.seqloom.magi_backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None, None


_magi_forward.register_autograd(_differentiate, setup_context=_keep)
