"""Forward floating-point operations of the operators that do matrix products; the others count as nothing beside them.

A contraction takes two operations per combination of all its dimensions: `m k+, k+ n -> m n` takes 2 * m * n * k. A registered function
counts itself through `flops=`, a function of its sizes by name and of its constant arguments by parameter name.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from seqloom.annotation import Bound
from seqloom.graph import Ref
from seqloom.ops.call import base_name
from seqloom.ops.matmul import CONTRACTIONS
from seqloom.ops.registry import RegisteredOp, resolve
from seqloom.ops.rules import arguments_of, is_registered_name


def flops(op: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], bound: Bound) -> int:
    """Forward FLOPs of one whole call with these bound sizes (a piece of an even split takes its share)."""
    return local_flops(op, args, kwargs, bound.sizes)


def local_flops(op: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], sizes: Mapping[str, int]) -> int:
    """Forward FLOPs of one piece with these (local) sizes by name and these constants: a start among `kwargs` counts."""
    if is_registered_name(op):
        entry = resolve(op)
        return entry.flops(_known(entry, args, kwargs, sizes)) if entry.flops else 0
    return 2 * prod(sizes.values()) if base_name(op) in CONTRACTIONS else 0


def matmul_side(op: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], sizes: Mapping[str, int]) -> int | None:
    """Smallest dimension of the matrix products of a registered function at these (local) sizes; None where it does not say (`side=`)
    and for PyTorch's operators, whose shapes say it."""
    entry = resolve(op) if is_registered_name(op) else None
    return entry.side(_known(entry, args, kwargs, sizes)) if entry and entry.side else None


def workspace_bytes(op: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], sizes: Mapping[str, int]) -> int:
    """Bytes of temporaries that a registered function makes at its largest, for the (local) sizes given; 0 for PyTorch's operators."""
    if not is_registered_name(op):
        return 0
    entry = resolve(op)
    return entry.workspace(_known(entry, args, kwargs, sizes)) if entry.workspace else 0


def _known(entry: RegisteredOp, args: tuple[Any, ...], kwargs: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
    """What a hint may ask for: sizes by name of dimension, constants by name of parameter."""
    defaults = {name: p.default for name, p in entry.signature.parameters.items() if p.default is not p.empty}
    constants = {name: value for name, value in arguments_of(entry, args, kwargs).items() if not isinstance(value, Ref)}
    return {**defaults, **constants, **sizes}
