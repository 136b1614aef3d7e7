"""Scales of charts: where a value lies between the two ends, linear or logarithmic, and the round values that are written there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from seqloom.report.svg import ticks

_DECADES = 2.0  # values that span more are drawn on a logarithmic scale where the chart allows it
_ROOM = 0.06  # left free above and below a curve, as a share of its height


@dataclass(frozen=True)
class Scale:
    """From `low` to `high`, both finite and low < high; both positive where `log`."""

    low: float
    high: float
    log: bool = False

    def place(self, values: np.ndarray | float) -> np.ndarray:
        """Where values lie, 0 at the low end and 1 at the high one, not beyond either."""
        low, high, inner = self.low, self.high, np.clip(values, self.low, self.high)
        if self.log:
            low, high, inner = math.log(low), math.log(high), np.log(inner)
        return (inner - low) / (high - low)

    def marks(self, count: int) -> list[float]:
        """About `count` round values from end to end; powers of ten where logarithmic."""
        if self.log:
            powers = range(math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9) + 1)
            return [10.0**power for power in powers[:: math.ceil(len(powers) / (count + 1))]]
        step = ticks(self.high - self.low, count)[1]
        first = math.ceil(self.low / step - 1e-9)
        return [index * step for index in range(first, math.floor(self.high / step + 1e-9) + 1)]


def scale_of(values: Iterable[np.ndarray], *, zero: bool = False, log: bool = False) -> Scale:
    """The scale that holds all finite values with some room; from 0 on where `zero`; logarithmic where `log` and that is worth it."""
    parts = [part[np.isfinite(part)] for part in map(np.asarray, values)]
    known = np.concatenate([*parts, np.zeros(0)])
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
    if log and low > 0 and high > low * 10**_DECADES:
        room = (high / low) ** _ROOM
        return Scale(low / room, high * room, log=True)
    if zero and low >= 0:
        return Scale(0.0, high * (1 + _ROOM) if high > 0 else 1.0)
    room = _ROOM * (high - low) or 0.05 * abs(high) or 1.0
    return Scale(low - room, high + room)


def span(values: Iterable[np.ndarray]) -> Scale:
    """The horizontal scale of curves that begin and end at these values: no room at either end."""
    known = np.concatenate([*map(np.asarray, values), np.zeros(0)])
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
    return Scale(low, high) if high > low else Scale(low - 0.5, high + 0.5)


def short(value: float) -> str:
    """A round value in few characters: `0.002`, `1,500`, `20k`, `1.5M`, `2B`."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.6g}{unit}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"


def percents(value: float) -> str:
    """A round share: `40%`."""
    return f"{100 * value:.6g}%"


def time_unit(seconds: float) -> tuple[float, str]:
    """The unit in which so long a time is written, and its seconds."""
    return next((unit for unit in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")) if seconds >= 2 * unit[0]), (1.0, "seconds"))


Format = Callable[[float], str]
