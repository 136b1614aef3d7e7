"""Cross entropy of a linear head, a chunk of tokens at a time: the logits of the whole sequence never exist.

At 131,072 tokens and a vocabulary of 128,256 the logits alone are 32 GB in half precision, and softmax and loss want as much again. Here
the head, the softmax and the loss run on `chunk_size` tokens at once and are computed again in the backward pass, so memory is linear in
the chunk; what is kept is the input of the head. Registered with seqloom the way any user would register a function of their own:

    @register_op("b l d^, n^ d^, b l -> b l")

says that batch `b` and positions `l` may be split over devices, while the hidden size `d` and the vocabulary `n` may not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from custom_ops.chunk_softmax import gradient_of, losses_of
from seqloom.errors import UserError
from seqloom.ops import register_op
from seqloom.ops.precision import sum_dtype


def _loss_dtype(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    return sum_dtype(dtypes[0])


def _flops(sizes: Mapping[str, Any]) -> int:
    return 2 * sizes["b"] * sizes["l"] * sizes["d"] * sizes["n"]


def _workspace(sizes: Mapping[str, Any]) -> int:
    """The gradient of the weight adds up in fp32 beside the logits of one chunk in fp32 and their gradient; then it is cast."""
    rows = min(sizes["chunk_size"], sizes["b"] * sizes["l"])
    return max(8 * rows * sizes["n"] + 4 * sizes["n"] * sizes["d"], 2 * rows * sizes["n"] + 6 * sizes["n"] * sizes["d"])


def _side(sizes: Mapping[str, Any]) -> int:
    """Smallest dimension of its products: the rows of a chunk, the hidden size or the vocabulary."""
    return min(sizes["chunk_size"], sizes["b"] * sizes["l"], sizes["d"], sizes["n"])


@register_op(
    "b l d^, n^ d^, b l -> b l",
    dtype=_loss_dtype,
    flops=_flops,
    saved=("hidden_states", "weight", "labels"),
    workspace=_workspace,
    side=_side,
    choices={"chunk_size": (512, 1024, 2048, 4096, 8192)},
)
def chunk_linear_cross_entropy(hidden_states: Tensor, weight: Tensor, labels: Tensor, padding_idx: int, chunk_size: int = 1024) -> Tensor:
    """Per-token cross entropy of `hidden_states @ weight.T`.

    hidden_states `[b, l, d]`, weight `[n, d]`, labels `[b, l]` (integers) -> losses `[b, l]`, in fp32 for half-precision inputs, else in
    their dtype; 0 where the label is `padding_idx`. Chunks hold `chunk_size` tokens, the last one what is left. Gradients of hidden
    states and weight are exact; no tensor with more than `chunk_size` rows of `n` is made. Raises `UserError` for `chunk_size` < 1.
    """
    if chunk_size < 1:
        raise UserError(f"chunk_linear_cross_entropy: chunk_size={chunk_size} leaves no tokens in a chunk: use 1 or more")
    return _ChunkedLoss.apply(hidden_states, weight, labels, padding_idx, chunk_size)


class _ChunkedLoss(torch.autograd.Function):
    """Forward keeps the inputs and one log-sum-exp per token; backward makes each chunk's logits again."""

    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, weight: Tensor, labels: Tensor, padding_idx: int, chunk_size: int) -> Tensor:
        tokens, targets = hidden_states.reshape(-1, hidden_states.shape[-1]), labels.reshape(-1)
        dtype = sum_dtype(hidden_states.dtype)
        losses, lse = (torch.empty(targets.shape, dtype=dtype, device=tokens.device) for _ in range(2))
        counted = targets != padding_idx
        for rows in _chunks(len(targets), chunk_size):
            losses[rows], lse[rows] = losses_of(tokens[rows] @ weight.t(), targets[rows], counted[rows])
        ctx.save_for_backward(hidden_states, weight, labels, lse)
        ctx.padding_idx, ctx.chunk_size = padding_idx, chunk_size
        return losses.view(labels.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden_states, weight, labels, lse = ctx.saved_tensors
        tokens, targets, grad = hidden_states.reshape(-1, hidden_states.shape[-1]), labels.reshape(-1), grad.reshape(-1)
        wants_tokens, wants_weight = ctx.needs_input_grad[:2]
        d_tokens = torch.empty_like(tokens) if wants_tokens else None
        # Hundreds of chunks add up here: half precision would lose most of the small terms.
        d_weight = torch.zeros_like(weight, dtype=lse.dtype) if wants_weight else None
        counted = targets != ctx.padding_idx
        for rows in _chunks(len(targets), ctx.chunk_size):
            d_logits = gradient_of(tokens[rows] @ weight.t(), targets[rows], lse[rows], grad[rows], counted[rows])
            if d_tokens is not None:
                d_tokens[rows] = d_logits @ weight
            if d_weight is not None:
                d_weight += d_logits.t() @ tokens[rows]
        return (
            None if d_tokens is None else d_tokens.view(hidden_states.shape),
            None if d_weight is None else d_weight.to(weight.dtype),
            None,
            None,
            None,
        )


def _chunks(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
