"""A chart of a run: curves over steps, tokens or time, with axes, guides and marks, read by pointing, touching or with arrow keys.

In: `Chart`s, plain data. Out: figures. Widths are shares of the column and heights are pixels, so a chart fits any screen. The points that
are drawn also stand beside the drawing as data, from which the script of the page reads what is pointed at.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from seqloom.report.axes import Format, Scale, short
from seqloom.report.markup import Markup, join, tag
from seqloom.report.svg import line, path, polygon_path, share, stretched, text

_TOP, _BOTTOM = 14, 20


@dataclass(frozen=True)
class Curve:
    """`y` over `x`, both finite and of one length. `look` is a class of the stylesheet; `dots` draws points instead of a line.

    `hidden` curves are only read out, `silent` ones only drawn. `unit` is written behind values, and `factor` turns them into that unit.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    colour: str = "one"
    look: str = ""
    dots: bool = False
    hidden: bool = False
    silent: bool = False
    unit: str = ""
    factor: float = 1.0


@dataclass(frozen=True)
class Guide:
    """A horizontal line to compare with: a prediction, or a limit. Its text stands in the legend."""

    value: float
    text: str
    look: str = "guide"


@dataclass(frozen=True)
class Mark:
    """Something that happened at `x`: its kind and what is to be said of it."""

    x: float
    kind: str
    text: str


@dataclass(frozen=True)
class Chart:
    """A figure: its title with the unit, what it shows in a sentence, and its parts. `right` writes a second scale: factor and format."""

    title: str
    unit: str
    sentence: str
    curves: Sequence[Curve]
    y: Scale
    guides: Sequence[Guide] = ()
    marks: Sequence[Mark] = ()
    height: int = 150
    format: Format = short
    right: tuple[float, Format] | None = None
    axis: str = "steps"
    legend: Sequence[tuple[str, str]] = field(default=())


def chart_figure(chart: Chart, x: Scale, level: str = "h3") -> Markup:
    """The chart over the horizontal scale `x`."""
    levels = chart.y.marks(chart.height // 36)
    right = _right(chart, *chart.right) if chart.right else None
    plot = tag("div", _left(chart, levels), _drawing(chart, x, levels), right, class_=f"plot{' both' if right else ''}")
    return tag(
        "figure",
        tag(level, chart.title, tag("small", chart.unit)),
        _legend([*chart.legend, *((guide.text, f"bar {guide.look}") for guide in chart.guides)]),
        plot,
        tag("span", class_="readout"),
        tag("script", Markup(_json(_data(chart, x))), type="application/json"),
        class_="chart",
        tabindex=0,
    )


def _drawing(chart: Chart, x: Scale, levels: Sequence[float]) -> Markup:
    total = _TOP + chart.height + _BOTTOM
    return tag(
        "svg",
        tag("desc", chart.sentence),
        [line(0, _y(chart, level), "100%", _y(chart, level)) for level in levels],
        [_stem(chart, x, mark) for mark in chart.marks],
        stretched(0, _TOP, "100%", chart.height, [_line(chart, x, curve) for curve in chart.curves if not curve.dots and not curve.hidden]),
        [_dots(chart, x, curve) for curve in chart.curves if curve.dots],
        [line(0, _y(chart, guide.value), "100%", _y(chart, guide.value), guide.look) for guide in chart.guides],
        x_axis(x, short, total - 5),
        tag("line", y1=_TOP, y2=_TOP + chart.height, class_="cursor"),
        [tag("circle", r=3.5, class_=f"dot {curve.colour}") for curve in chart.curves if not (curve.hidden or curve.silent)],
        role="img",
        aria_label=f"{chart.title}: {chart.sentence}",
        height=total,
    )


def x_axis(x: Scale, form: Format, baseline: float) -> Markup:
    """Round values under a drawing; what they are stands beside it, under the other scale."""
    marks = []
    for value in x.marks(4):
        place = float(x.place(value))
        anchor = "end" if place > 0.93 else "middle" if place > 0.04 else None
        marks.append(text(share(place), baseline, form(value), "muted", anchor, font_size=11))
    return join(marks)


def axis_name(name: str, baseline: float) -> Markup:
    """What the values of a horizontal scale are, left of them."""
    return text("100%", baseline, name, "muted", "end", font_size=11, dx=-8)


def _left(chart: Chart, levels: Sequence[float]) -> Markup:
    """The values of the hairlines, left of the drawing, and below them what the horizontal scale is."""
    marks = [text("100%", _y(chart, level) + 4, chart.format(level), "muted", "end", font_size=11, dx=-8) for level in levels]
    total = _TOP + chart.height + _BOTTOM
    return tag("svg", marks, axis_name(chart.axis, total - 5), height=total, aria_hidden="true")


def _right(chart: Chart, factor: float, form: Format) -> Markup:
    """The second scale, right of the drawing: the values of the first one times a factor."""
    values = Scale(chart.y.low * factor, chart.y.high * factor).marks(chart.height // 36)
    marks = [text(0, _y(chart, value / factor) + 4, form(value), "muted", font_size=11, dx=8) for value in values]
    return tag("svg", marks, height=_TOP + chart.height + _BOTTOM, aria_hidden="true")


def _line(chart: Chart, x: Scale, curve: Curve) -> Markup | None:
    if not len(curve.x):
        return None
    xs, ys = 1000 * x.place(curve.x), 1000 - 1000 * chart.y.place(curve.y)
    return path(polygon_path(list(zip(xs.tolist(), ys.tolist(), strict=True)), closed=False), f"line {curve.colour} {curve.look}".strip())


def _dots(chart: Chart, x: Scale, curve: Curve) -> list[Markup]:
    places = zip(x.place(curve.x).tolist(), curve.y.tolist(), strict=True)
    return [tag("circle", cx=share(place), cy=_y(chart, value), r=3, class_=f"point {curve.colour}") for place, value in places]


def _stem(chart: Chart, x: Scale, mark: Mark) -> Markup:
    """A restart is a line from top to bottom; what befell a step is a tick at the top."""
    place = share(float(x.place(mark.x)))
    bottom = _TOP + chart.height if mark.kind == "restart" else _TOP - 3
    return line(place, 3, place, bottom, f"stem {mark.kind}")


def _legend(entries: Sequence[tuple[str, str]]) -> Markup | None:
    if not entries:
        return None
    return tag("ul", (tag("li", tag("i", class_=look, aria_hidden="true"), name) for name, look in entries), class_="legend")


def _y(chart: Chart, value: float) -> float:
    return _TOP + chart.height * (1 - float(chart.y.place(value)))


def _data(chart: Chart, x: Scale) -> dict[str, Any]:
    """What the script needs to tell a point from a place, and the values there. A curve over the points of the one before has `x` null."""
    curves, before = [], None
    for curve in (curve for curve in chart.curves if not curve.silent):
        same = before is not None and np.array_equal(before, curve.x)
        entry = {
            "name": curve.name,
            "unit": curve.unit,
            "x": None if same else _rounded(curve.x, 9),
            "y": _rounded(curve.y * curve.factor, 5),
        }
        if not curve.hidden:
            entry["factor"] = curve.factor
        curves.append(entry)
        before = curve.x
    marks = [{"x": mark.x, "text": mark.text} for mark in chart.marks]
    y = chart.y
    return {
        "axis": chart.axis,
        "x": [x.low, x.high],
        "y": [y.low, y.high],
        "log": y.log,
        "top": _TOP,
        "height": chart.height,
        "curves": curves,
        "marks": marks,
    }


def _rounded(values: np.ndarray, digits: int) -> list[float]:
    short_values = [float(f"{value:.{digits}g}") for value in values.tolist()]
    return [int(value) if value.is_integer() else value for value in short_values]


def _json(document: Any) -> str:
    """JSON that cannot end the element it stands in."""
    return json.dumps(document, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
