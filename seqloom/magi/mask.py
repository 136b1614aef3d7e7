"""`AttnMask`: which query row may attend which key row, as a list of slices, checked.

Role in the pipeline: what a user describes (or `masks` builds) and what dispatch and exchange are planned from. Slices may share rows
or columns but no cell: a cell counted twice would weigh twice in the softmax. Rows that no slice covers attend nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from seqloom.errors import UserError
from seqloom.magi.bands import TYPE_NAMES, Band, Range, band_of


@dataclass(frozen=True)
class AttnMask:
    """An attention mask of `total_seqlen_q` rows and `total_seqlen_k` columns; frozen and hashable.

    `q_ranges[n]`, `k_ranges[n]` are [start, end) pairs and `attn_types[n]` one of full, causal, inv_causal, bi_causal (or 0 to 3, which
    is how they are kept). `total_seqlen` is a number of rows, or a pair (queries, keys). Slices that allow no cell are dropped from
    `bands`. Raises `UserError` for ranges out of order or bounds, unknown types, lists of unequal length, slices that share a cell
    (the two are named), and a mask without a cell.
    """

    q_ranges: tuple[Range, ...]
    k_ranges: tuple[Range, ...]
    attn_types: tuple[int, ...]
    total_seqlen: int | tuple[int, int]

    def __post_init__(self) -> None:
        object.__setattr__(self, "total_seqlen", _totals(self.total_seqlen))
        object.__setattr__(self, "q_ranges", _ranges("q_ranges", self.q_ranges, self.total_seqlen_q))
        object.__setattr__(self, "k_ranges", _ranges("k_ranges", self.k_ranges, self.total_seqlen_k))
        object.__setattr__(self, "attn_types", tuple(_type(index, name) for index, name in enumerate(self.attn_types)))
        lengths = {len(self.q_ranges), len(self.k_ranges), len(self.attn_types)}
        if len(lengths) > 1:
            raise UserError(
                f"a mask needs one q range, one k range and one type per slice, not {len(self.q_ranges)} q ranges, "
                f"{len(self.k_ranges)} k ranges and {len(self.attn_types)} types: make the three lists equally long"
            )
        if not self.bands:
            raise UserError(f"the mask covers nothing: none of its {len(self.q_ranges)} slices allows a cell; give at least one that does")
        _refuse_overlap(self)

    @property
    def total_seqlen_q(self) -> int:
        """Number of query rows."""
        return self.total_seqlen if isinstance(self.total_seqlen, int) else self.total_seqlen[0]

    @property
    def total_seqlen_k(self) -> int:
        """Number of key rows."""
        return self.total_seqlen if isinstance(self.total_seqlen, int) else self.total_seqlen[1]

    @cached_property
    def bands(self) -> tuple[Band, ...]:
        """The slices that allow a cell, as tight bands in global rows and columns, in the order given."""
        return tuple(band for _, band in self._numbered_bands)

    @cached_property
    def _numbered_bands(self) -> tuple[tuple[int, Band], ...]:
        bands = (band_of(*slice_) for slice_ in zip(self.q_ranges, self.k_ranges, self.attn_types, strict=True))
        return tuple((index, band) for index, band in enumerate(bands) if band is not None)

    @cached_property
    def table(self) -> np.ndarray:
        """`bands` as int64 `[bands, 6]`, the columns in the order of `Band`'s fields. Not to be written to."""
        table = np.array([(b.q_start, b.q_end, b.k_start, b.k_end, b.lo, b.hi) for b in self.bands], np.int64)
        table.flags.writeable = False
        return table

    @property
    def area(self) -> int:
        """Number of allowed cells."""
        return sum(band.area for band in self.bands)

    def dense(self) -> np.ndarray:
        """The mask as bool `[total_seqlen_q, total_seqlen_k]`, for tests and pictures of short sequences."""
        mask = np.zeros((self.total_seqlen_q, self.total_seqlen_k), bool)
        for band in self.bands:
            rows, columns = np.arange(band.q_start, band.q_end)[:, None], np.arange(band.k_start, band.k_end)
            diagonal = columns - rows
            mask[band.q_start : band.q_end, band.k_start : band.k_end] |= (band.lo <= diagonal) & (diagonal <= band.hi)
        return mask


def _totals(total: Any) -> int | tuple[int, int]:
    pair = (total, total) if np.ndim(total) == 0 else tuple(total)
    if len(pair) != 2 or not all(_is_integer(n) and n >= 1 for n in pair):
        raise UserError(f"total_seqlen is {total!r}: give the number of rows (1 or more), or the pair (queries, keys)")
    return int(pair[0]) if pair[0] == pair[1] else (int(pair[0]), int(pair[1]))


def _ranges(name: str, ranges: Iterable[Sequence[int]], total: int) -> tuple[Range, ...]:
    checked = []
    for index, pair in enumerate(ranges):
        if len(pair) != 2 or not all(_is_integer(n) for n in pair):
            raise UserError(f"{name}[{index}] is {pair!r}: give a [start, end) pair of whole numbers")
        start, end = int(pair[0]), int(pair[1])
        if start > end:
            raise UserError(f"{name}[{index}] = [{start}, {end}) is out of order: its start must not lie behind its end")
        if start < 0 or end > total:
            raise UserError(f"{name}[{index}] = [{start}, {end}) leaves the {total} rows of the sequence: keep it within [0, {total})")
        checked.append((start, end))
    return tuple(checked)


def _type(index: int, name: Any) -> int:
    if isinstance(name, str) and name.lower() in TYPE_NAMES:
        return TYPE_NAMES.index(name.lower())
    if _is_integer(name) and 0 <= name < len(TYPE_NAMES):
        return int(name)
    known = ", ".join(f"{name} ({number})" for number, name in enumerate(TYPE_NAMES))
    raise UserError(f"attn_types[{index}] is {name!r}, which is no mask type: use one of {known}")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _refuse_overlap(mask: AttnMask) -> None:
    """Sweep over rows: of bands sorted by their first row, only those that start before a band ends can share a cell with it."""
    bands = sorted(mask._numbered_bands, key=lambda numbered: numbered[1])
    starts = np.array([band.q_start for _, band in bands])
    reach = np.searchsorted(starts, [band.q_end for _, band in bands])
    for position, (index, band) in enumerate(bands):
        for other_index, other in bands[position + 1 : reach[position]]:
            shared = band.meet(other)
            if shared is not None:
                first, second = sorted((index, other_index))
                raise UserError(
                    f"slices {first} and {second} of the mask both cover row {shared.q_start}, column {_first_column(shared)} "
                    f"({shared.area} cells in all): cut one of them so that no cell is covered twice"
                )


def _first_column(band: Band) -> int:
    """The first column that the first row of a tight band has."""
    return max(band.k_start, band.q_start + band.lo)
