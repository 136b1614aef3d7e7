"""Bands as calls of a kernel that takes packed sequences: each call has many pairs of a row range and a column range, all of one shape.

Role: `seqloom.magi.flash` runs these calls. A band is at most three typed slices (`Band.as_slices`), and FlashAttention knows every type:
its causal mask and its windows are aligned to the bottom right corner of rows x columns. Slices of one type whose rows and columns are
disjoint go in one call; their rows are brought side by side where they are not so already.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from seqloom.magi.bands import BI_CAUSAL, CAUSAL, INV_CAUSAL, Band, Range, Slice
from seqloom.ops.transfer import to_device


@dataclass(frozen=True, eq=False)
class Rows:
    """Disjoint ranges of rows in rising order: `cu_seqlens` int32 `[ranges + 1]`, the longest range; `index` None for a single stretch."""

    start: int
    end: int
    index: Tensor | None
    cu_seqlens: Tensor
    longest: int

    def take(self, x: Tensor) -> Tensor:
        """These rows of `x`; a view where they are one stretch."""
        return x[self.start : self.end] if self.index is None else x.index_select(0, self.index)

    def add_(self, target: Tensor, x: Tensor) -> None:
        """Add `x` to these rows of `target`. No row is here twice, so the sums have one order."""
        if self.index is None:
            target[self.start : self.end] += x
        else:
            target.index_add_(0, self.index, x.to(target.dtype))

    def put_(self, target: Tensor, x: Tensor) -> None:
        """Write `x` to these rows of `target`."""
        if self.index is None:
            target[self.start : self.end] = x
        else:
            target.index_copy_(0, self.index, x)


@dataclass(frozen=True, eq=False)
class Call:
    """One call: pair n is row range n of `queries` x column range n of `keys`. `left`, `right` are window sizes, -1 for no bound."""

    queries: Rows
    keys: Rows
    causal: bool
    left: int
    right: int


@functools.lru_cache(maxsize=64)
def calls(bands: tuple[Band, ...], device: torch.device) -> tuple[Call, ...]:
    """The calls that compute every cell of `bands` once."""
    found = []
    for (causal, left, right), pairs in _groups(bands):
        queries, keys = zip(*sorted(pairs), strict=True)
        found.append(Call(_rows(queries, device), _rows(keys, device), causal, left, right))
    return tuple(found)


def _groups(bands: Sequence[Band]) -> Iterator[tuple[tuple[bool, int, int], list[tuple[Range, Range]]]]:
    """Pairs by (causal, left, right), of one group disjoint in rows and in columns."""
    groups: dict[tuple[bool, int, int], list[list[tuple[Range, Range]]]] = {}
    for slice_ in (slice_ for band in bands for slice_ in band.as_slices()):
        pair = slice_[:2]
        fitting = groups.setdefault(_shape(slice_), [])
        for pairs in fitting:
            if not any(_meet(pair[0], rows) or _meet(pair[1], columns) for rows, columns in pairs):
                pairs.append(pair)
                break
        else:
            fitting.append([pair])
    return ((shape, pairs) for shape, fitting in groups.items() for pairs in fitting)


def _shape(slice_: Slice) -> tuple[bool, int, int]:
    """(causal, left, right): row i of `rows` sees column i + columns - rows and `left` before it, `right` behind it."""
    (q_start, q_end), (k_start, k_end), kind = slice_
    surplus = (k_end - k_start) - (q_end - q_start)  # not negative where a row's first or last column follows the diagonal
    if kind == CAUSAL:
        return True, -1, 0
    if kind == INV_CAUSAL:
        return False, surplus, -1
    return (False, surplus, 0) if kind == BI_CAUSAL else (False, -1, -1)


def _meet(one: Range, other: Range) -> bool:
    return one[0] < other[1] and other[0] < one[1]


def _rows(ranges: Sequence[Range], device: torch.device) -> Rows:
    lengths = [end - start for start, end in ranges]
    joined = all(one[1] == other[0] for one, other in zip(ranges, ranges[1:], strict=False))
    index = None if joined else to_device(torch.from_numpy(np.concatenate([np.arange(*range_) for range_ in ranges])), device)
    cu_seqlens = to_device(torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32), device)
    return Rows(ranges[0][0], ranges[-1][1], index, cu_seqlens, max(lengths))
