"""Marks of the figures. Where a figure must fit any width, its horizontal places are shares of it and only its heights are pixels."""

from __future__ import annotations

from collections.abc import Sequence

from seqloom.report.markup import Attribute, Child, Markup, join, tag

Length = float | str
HINT = "Point at or touch a piece to read it."


def share(fraction: float) -> str:
    """A horizontal place or width as a share of the figure."""
    return f"{100 * fraction:.3f}%"


def fluid(label: str, height: float, *children: Child) -> Markup:
    """A figure as wide as its column, `height` pixels high; `label` says what it shows to who cannot see it."""
    return tag("svg", *children, role="img", aria_label=label, height=height)


def fixed(label: str, width: float, height: float, *children: Child, class_: str) -> Markup:
    """A figure drawn at `width` pixels and scaled down where the page is narrower."""
    return tag("svg", *children, role="img", aria_label=label, viewBox=f"0 0 {width:g} {height:g}", class_=class_)


def stretched(x: Length, y: float, width: Length, height: float, *children: Child) -> Markup:
    """A picture of 1000 x 1000 units stretched over a part of a figure: for curves, which shares cannot describe."""
    box = {"viewBox": "0 0 1000 1000", "preserveAspectRatio": "none"}
    return tag("svg", *children, x=x, y=y, width=width, height=height, **box)


def rect(x: Length, y: float, width: Length, height: float, class_: str, tip: str | None = None) -> Markup:
    """A rectangle; `tip` is read out when it is pointed at."""
    return tag("rect", x=x, y=y, width=width, height=height, class_=class_, data_tip=tip)


def line(x1: Length, y1: float, x2: Length, y2: float, class_: str = "rule") -> Markup:
    """A straight line."""
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def text(x: Length, y: float, content: str, class_: str | None = None, anchor: str | None = None, **attributes: Attribute) -> Markup:
    """Text whose baseline is at `y`; `anchor` is middle or end."""
    return tag("text", content, x=x, y=y, class_=class_, text_anchor=anchor, **attributes)


def path(points: str, class_: str, tip: str | None = None) -> Markup:
    """A path in SVG's own notation."""
    return tag("path", d=points, class_=class_, data_tip=tip)


def polygon_path(points: Sequence[tuple[float, float]], closed: bool = True) -> str:
    """Straight lines through the points, in SVG's notation."""
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) + ("Z" if closed else "")


def ticks(end: float, count: int = 5) -> list[float]:
    """Round values from 0 to at most `end`: about `count` of them."""
    if end <= 0:
        return [0.0]
    rough = end / count
    power = 10.0 ** _floor_log10(rough)
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    return [index * step for index in range(int(end / step * 1.0001) + 1)]


def seconds_axis(end: float, baseline: float) -> Markup:
    """Round times from 0 to `end` seconds under a figure that shows them, in one unit."""
    size, unit = next((scale for scale in ((1.0, "s"), (1e-3, "ms")) if end >= scale[0]), (1e-6, "\u00b5s"))
    marks = []
    for value in ticks(end, 4):
        anchor = "end" if value > 0.96 * end else "middle" if value else None
        marks.append(text(share(value / end), baseline, f"{value / size:g} {unit}", "muted", anchor, font_size=11))
    return join(marks)


def _floor_log10(value: float) -> int:
    return int(f"{value:e}".partition("e")[2])
