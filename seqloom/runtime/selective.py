"""Selective recomputation: a segment is recomputed in the backward pass, but for the results of some of its matrix products.

An emitted block writes `selective(self.mlp_forward, x, kept=(0, 1))`: the results of the first and the second matrix product of the
segment are kept from the forward, everything else is computed again when the backward needs it (Korthikanti et al., Reducing Activation
Recomputation in Large Transformer Models, arXiv:2205.05198).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext, checkpoint, create_selective_checkpoint_contexts

from seqloom.runtime.compiled import Segment

_aten = torch.ops.aten
# What `linear`, `matmul`, `einsum` and `@` become where operators run.
MATMULS = frozenset({_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default, _aten.linear.default})

Contexts = tuple[AbstractContextManager[None], AbstractContextManager[None]]


def selective(function: Callable[..., Any], *args: Any, kept: tuple[int, ...]) -> Any:
    """`function(*args)`, recomputed in the backward pass but for the results of its matrix products with the ordinals `kept`.

    A compiled segment is compiled with its recomputation: what runs inside of a compiled graph cannot be told from outside what to keep.
    """
    if isinstance(function, Segment):
        return function.inside(_selective, kept)(*args)
    return _selective(function, *args, kept)


def _selective(function: Callable[..., Any], *args: Any) -> Any:
    *args, kept = args
    return checkpoint(function, *args, use_reentrant=False, context_fn=keep_matmuls(*kept))


def keep_matmuls(*indices: int) -> Callable[[], Contexts]:
    """The `context_fn` of `torch.utils.checkpoint.checkpoint` that keeps the results of the matrix products with these ordinals.

    Products are counted from 0 in the order in which the segment runs them, with each run of the segment anew; an ordinal that the
    segment does not reach keeps nothing. The function that it returns holds no state and can be used any number of times.
    """
    return functools.partial(_contexts, indices)  # a partial, and not a closure: `torch.compile` traces through it


def _contexts(kept: tuple[int, ...]) -> Contexts:
    """The contexts of the forward and of the recomputation for one run of a segment."""
    return create_selective_checkpoint_contexts(_policy(kept))


def _policy(kept: tuple[int, ...]) -> Callable[..., CheckpointPolicy]:
    """Whether to keep the result of an operator, for one run of a segment: forward and recomputation are counted apart."""
    seen = {False: 0, True: 0}

    def policy(context: SelectiveCheckpointContext, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if operator not in MATMULS:
            return CheckpointPolicy.PREFER_RECOMPUTE
        ordinal = seen[context.is_recompute]
        seen[context.is_recompute] += 1
        return CheckpointPolicy.MUST_SAVE if ordinal in kept else CheckpointPolicy.PREFER_RECOMPUTE

    return policy
