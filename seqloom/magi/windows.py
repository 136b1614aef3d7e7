"""Sliding windows over a mask whose rows already lie on ranks: of its cells those in a band along the diagonal.

Role in the pipeline: the layers of a model may have different windows, but its rows lie in one way. The key of a micro-batch says who
attends whom where there is no window; a layer with one attends by that mask cut here, on the same dispatch. A window of w lets row i see
rows i - w + 1 to i, as in `seqloom.ops.attention`; None is no window.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from seqloom.errors import UserError
from seqloom.magi.bands import Slice, band_of
from seqloom.magi.mask import AttnMask

Windows = tuple[int | None, ...]


def distinct(windows: Iterable[int | None]) -> Windows:
    """Each window once, no window first, then rising."""
    found = set(windows)
    return (*([None] if None in found else []), *sorted(window for window in found if window is not None))


def widest(windows: Iterable[int | None]) -> int | None:
    """The window with which a row sees most: no window where there is one without."""
    found = distinct(windows)
    return found[-1] if found and found[0] is not None else None


def cut_to_window(mask: AttnMask, window: int | None) -> AttnMask:
    """The cells of `mask` in which row i attends a row j with i - window < j <= i; the mask itself where these are all.

    Raises `UserError` for a window below 1, and where no cell of the mask is in the window.
    """
    if window is None:
        return mask
    if window < 1:
        raise UserError(f"magi attention: window={window} shows no key to a query: pass 1 or more, or None for all keys")
    slices: list[Slice] = []
    whole = True
    for slice_ in zip(mask.q_ranges, mask.k_ranges, mask.attn_types, strict=True):
        band = band_of(*slice_)
        if band is None or (band.lo > -window and band.hi <= 0):
            slices.append(slice_)
        else:
            slices += replace(band, lo=max(band.lo, 1 - window), hi=min(band.hi, 0)).as_slices()
            whole = False
    return mask if whole else AttnMask(*([slice_[part] for slice_ in slices] for part in range(3)), mask.total_seqlen)
