"""Bands: the one shape that masks, chunks, host parts and remote parts of an attention mask are made of.

Role in the pipeline: a user's slice (`q_range`, `k_range`, type) becomes a `Band`; cutting a band to sub-ranges of rows or columns gives
a band again, and so does moving it to another coordinate system; kernels take bands, or the at most three typed slices of one.

A slice of rows [qs, qe) and columns [ks, ke) allows, by its type:

| type           | cells                                            | as a band                            |
|---|---|---|
| full (0)       | all                                              | no bound                             |
| causal (1)     | under the diagonal through the bottom right cell | hi = ke - qe                         |
| inv_causal (2) | over the diagonal through the top left cell      | lo = ks - qs                         |
| bi_causal (3)  | between the two                                  | lo = ks - qs, hi = ke - qe           |
"""

from __future__ import annotations

from dataclasses import dataclass

FULL, CAUSAL, INV_CAUSAL, BI_CAUSAL = range(4)
TYPE_NAMES = ("full", "causal", "inv_causal", "bi_causal")

Range = tuple[int, int]  # [start, end)
Slice = tuple[Range, Range, int]  # rows, columns, type


@dataclass(frozen=True, slots=True, order=True)
class Band:
    """Cells (row i, column j) with q_start <= i < q_end, k_start <= j < k_end and lo <= j - i <= hi.

    Coordinates are absolute in whatever system the holder names (global rows, or local rows and rows of a receive buffer): `lo` and `hi`
    are not relative to the rectangle. `tight` gives the form in which equal sets of cells compare equal.
    """

    q_start: int
    q_end: int
    k_start: int
    k_end: int
    lo: int
    hi: int

    @property
    def area(self) -> int:
        """Number of cells, exact, in constant time."""
        if self.lo > self.hi or self.q_start >= self.q_end or self.k_start >= self.k_end:
            return 0
        return self._cells_up_to(self.hi) - self._cells_up_to(self.lo - 1)

    def _cells_up_to(self, diagonal: int) -> int:
        """Cells of the rectangle with j - i <= diagonal: row i has clamp(i + diagonal + 1 - k_start, 0, columns) of them."""
        first = self.q_start + diagonal + 1 - self.k_start
        last = self.q_end + diagonal - self.k_start
        columns = self.k_end - self.k_start
        return _triangle(last) - _triangle(first - 1) - _triangle(last - columns) + _triangle(first - columns - 1)

    @property
    def is_full(self) -> bool:
        """Whether every cell of the rectangle is in the band."""
        return self.lo <= self.k_start - self.q_end + 1 and self.hi >= self.k_end - 1 - self.q_start

    def shifted(self, rows: int, columns: int) -> Band:
        """The same cells in coordinates that are larger by `rows` and `columns`."""
        turn = columns - rows
        return Band(
            self.q_start + rows, self.q_end + rows, self.k_start + columns, self.k_end + columns, self.lo + turn, self.hi + turn
        )  # fmt: skip

    def tight(self) -> Band | None:
        """The same cells in the smallest rectangle, `lo` and `hi` on diagonals that have cells; None without a cell."""
        if self.lo > self.hi or self.k_start >= self.k_end:
            return None
        q_start, q_end = max(self.q_start, self.k_start - self.hi), min(self.q_end, self.k_end - self.lo)
        if q_start >= q_end:
            return None
        k_start, k_end = max(self.k_start, q_start + self.lo), min(self.k_end, q_end + self.hi)
        return Band(q_start, q_end, k_start, k_end, max(self.lo, k_start - q_end + 1), min(self.hi, k_end - 1 - q_start))

    def cut(
        self, q_start: int | None = None, q_end: int | None = None, k_start: int | None = None, k_end: int | None = None
    ) -> Band | None:
        """The tight band of the cells in rows [q_start, q_end) and columns [k_start, k_end); a bound not given does not cut."""
        return Band(
            self.q_start if q_start is None else max(self.q_start, q_start),
            self.q_end if q_end is None else min(self.q_end, q_end),
            self.k_start if k_start is None else max(self.k_start, k_start),
            self.k_end if k_end is None else min(self.k_end, k_end),
            self.lo,
            self.hi,
        ).tight()

    def meet(self, other: Band) -> Band | None:
        """The tight band of the cells that both have (same coordinates); None where they share none."""
        bounds = Band(self.q_start, self.q_end, self.k_start, self.k_end, max(self.lo, other.lo), min(self.hi, other.hi))
        return bounds.cut(other.q_start, other.q_end, other.k_start, other.k_end)

    def as_slices(self) -> tuple[Slice, ...]:
        """The same cells as at most three slices `(q_range, k_range, type)` with rising, disjoint row ranges.

        Above row `right` the right edge follows `hi` and below it stands at `k_end`; the left edge stands at `k_start` above row `left`
        and follows `lo` below it. Between these two rows and the ends lie the (at most three) pieces.
        """
        band = self.tight()
        if band is None:
            return ()
        right = _turning_row(band, band.k_end - 1 - band.hi)
        left = _turning_row(band, band.k_start - band.lo)
        cuts = sorted({band.q_start, right, left, band.q_end})
        slices = []
        for start, end in zip(cuts, cuts[1:], strict=False):
            follows_hi, follows_lo = start < right, start >= left
            k_range = (start + band.lo if follows_lo else band.k_start, end + band.hi if follows_hi else band.k_end)
            slices.append(((start, end), k_range, CAUSAL * follows_hi + INV_CAUSAL * follows_lo))
        return tuple(slices)


def band_of(q_range: Range, k_range: Range, attn_type: int) -> Band | None:
    """The tight band of a slice in the coordinates of its ranges, `attn_type` one of 0 to 3; None where it allows no cell."""
    (q_start, q_end), (k_start, k_end) = q_range, k_range
    lo = k_start - q_start if attn_type in (INV_CAUSAL, BI_CAUSAL) else k_start - q_end + 1
    hi = k_end - q_end if attn_type in (CAUSAL, BI_CAUSAL) else k_end - 1 - q_start
    return Band(q_start, q_end, k_start, k_end, lo, hi).tight()


def _triangle(n: int) -> int:
    """1 + 2 + ... + n; 0 for n < 1."""
    return n * (n + 1) // 2 if n > 0 else 0


def _turning_row(band: Band, row: int) -> int:
    """The row where an edge of a tight band starts or stops to stand still; at an end of the band where it only touches the corner there.

    At the turning row itself both readings hold, so an edge that turns in the first (last) row is one kind from the first (to the last) on.
    """
    if row <= band.q_start:
        return band.q_start
    return band.q_end if row >= band.q_end - 1 else row
