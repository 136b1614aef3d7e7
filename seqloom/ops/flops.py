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
from seqloom.ops.registry import resolve
from seqloom.ops.rules import arguments_of, is_registered_name


def flops(op: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], bound: Bound) -> int:
    """Forward FLOPs of one whole call with these bound sizes (a piece of an even split takes its share)."""
    if is_registered_name(op):
        entry = resolve(op)
        if entry.flops is None:
            return 0
        defaults = {name: p.default for name, p in entry.signature.parameters.items() if p.default is not p.empty}
        constants = {name: value for name, value in arguments_of(entry, args, kwargs).items() if not isinstance(value, Ref)}
        return entry.flops({**defaults, **constants, **bound.sizes})
    if base_name(op) in CONTRACTIONS:
        return 2 * prod(bound.sizes.values())
    return 0
