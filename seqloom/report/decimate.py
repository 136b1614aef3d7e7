"""Fewer points of a long curve, with every spike in its place.

In: the values of a curve. Out: which of them to draw: of each stretch of equally many values the least and the greatest.
"""

from __future__ import annotations

import numpy as np


def kept(values: np.ndarray, most: int) -> np.ndarray:
    """Ascending places of at most `most` (at least 4) of the finite values, with the first and the last of them.

    The finite values are cut into stretches of equal length, give or take one, and the least and greatest of each are among those kept.
    """
    finite = np.flatnonzero(np.isfinite(values))
    if len(finite) <= most:
        return finite
    bounds = stretches(len(finite), (most - 2) // 2)
    heights = values[finite]
    chosen = {0, len(finite) - 1}
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        part = heights[start:end]
        chosen |= {int(start + part.argmin()), int(start + part.argmax())}
    return finite[sorted(chosen)]


def stretches(count: int, parts: int) -> np.ndarray:
    """Borders of `parts` stretches of `count` values: stretch i is from border i up to, but without, border i + 1."""
    return np.arange(parts + 1) * count // parts


def running_mean(values: np.ndarray, width: int, places: np.ndarray) -> np.ndarray:
    """At each place the mean of its value and those before it, `width` at most; nan counts as nothing. Shape: as `places`."""
    windows = (values[max(0, place + 1 - width) : place + 1] for place in places.tolist())
    known = [window[np.isfinite(window)] for window in windows]
    return np.array([window.mean() if len(window) else np.nan for window in known], dtype=float)
