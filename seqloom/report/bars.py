"""Two figures that several sections share: the parts of a whole in one bar, and a list of bars to compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from seqloom.report.markup import Child, Markup, tag
from seqloom.report.svg import fluid, line, rect, share, text

_BAR = 26


@dataclass(frozen=True)
class Part:
    """A part of a whole: what it is called, how much it is, that as text, and its colour."""

    label: str
    value: float
    text: str
    colour: str


@dataclass(frozen=True)
class Bar:
    """A line of a list of bars: `value` and `note` are text, `length` is a share of the longest; None draws no bar."""

    label: Child
    value: str
    length: float | None
    note: str | None = None
    colour: str = "forward"
    chosen: bool = False


def stacked_bar(title: str, parts: Sequence[Part], limit: tuple[float, str] | None = None) -> Markup:
    """The parts in one bar with a legend below, and a line at the limit: its value and its text."""
    total = sum(part.value for part in parts)
    scale = max(total, limit[0] if limit else 0.0) or 1.0
    label = f"{title}: {', '.join(f'{part.label} {part.text}' for part in parts)}" + (f"; limit {limit[1]}" if limit else "")
    marks, start = [rect(0, 18, "100%", _BAR, "faint")], 0.0
    for part in parts:
        marks.append(rect(share(start / scale), 18, share(part.value / scale), _BAR, part.colour))
        start += part.value
    if limit:
        place = share(min(limit[0] / scale, 0.9985))
        marks += [line(place, 12, place, 18 + _BAR + 6, "limit-line"), text(place, 10, f"limit {limit[1]}", "limit", "end")]
    return tag("div", fluid(label, 18 + _BAR + 6, *marks), legend(parts))


def legend(parts: Sequence[Part]) -> Markup:
    """The parts by colour, with their values."""
    entries = (tag("li", tag("i", class_=part.colour, aria_hidden="true"), part.label, tag("b", part.text)) for part in parts)
    return tag("ul", entries, class_="legend")


def bar_list(bars: Sequence[Bar]) -> Markup:
    """A line each: label, value, bar, note."""
    return tag("ul", (_line(bar) for bar in bars), class_="bars")


def _line(bar: Bar) -> Markup:
    drawing = None
    if bar.length is not None:
        drawing = tag("svg", rect(0, 1, share(min(1.0, bar.length)), 5, bar.colour), height=7, aria_hidden="true")
    return tag(
        "li",
        tag("span", bar.label, class_="label"),
        tag("span", bar.value, class_="value"),
        drawing,
        tag("span", bar.note, class_="note") if bar.note else None,
        class_="chosen" if bar.chosen else None,
    )
