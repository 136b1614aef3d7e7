"""Where the memory goes: the parts of the peak against the limit, and how they rise and fall over a step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from seqloom.report.bars import Part, legend, stacked_bar
from seqloom.report.documents import Documents
from seqloom.report.markup import Markup, join, tag
from seqloom.report.style import series
from seqloom.report.svg import HINT, fluid, line, path, polygon_path, rect, seconds_axis, share, stretched, text, ticks
from seqloom.report.text import gib, percent, words

_TOP, _HEIGHT, _BOTTOM = 18, 220, 22
KNOWN = {
    "states": "parameters, gradients and optimizer states between uses",
    "gathered": "parameters gathered for use",
    "gradients": "gradients before they are reduced",
    "activations": "what backward needs of forward",
    "working": "the largest moment of computing",
}
"""Parts in the order of drawing, lowest first, and what they are."""
COLOURS = {"states": "one", "gathered": "two", "gradients": "five", "activations": "three", "working": "four"}


def memory_section(documents: Documents) -> Markup:
    """The bar of the peak, and the timeline where the plan has one."""
    plan = documents.plan
    peak, limit = plan["peak_memory_gib"], plan["memory_limit_gib"]
    timeline = plan.get("memory_timeline") or []
    names = _ordered([*(name for name in peak if name != "total"), *(name for point in timeline for name in point["gib"])])
    colours = series(names, COLOURS)
    parts = [Part(words(name), peak[name], gib(peak[name]), colours[name]) for name in names if name in peak]
    free = limit - peak["total"]
    room = f"{gib(free)} stay free" if free >= 0 else f"{gib(-free)} too much"
    explained = "; ".join(f"{words(name)}: {KNOWN[name]}" for name in names if name in KNOWN)
    return tag(
        "section",
        tag("h2", "Memory of one rank"),
        tag("p", f"{gib(peak['total'])} at the peak, {percent(peak['total'] / limit)} of what is usable; {room}."),
        tag(
            "figure",
            stacked_bar("Peak memory by part", parts, (limit, gib(limit))),
            tag("figcaption", f"{explained[:1].upper()}{explained[1:]}."),
        ),
        _timeline(timeline, colours, limit) if timeline else None,
        id="memory",
    )


def _ordered(names: Iterable[str]) -> list[str]:
    """Each name once: known parts in their order, then the others as they come."""
    found = dict.fromkeys(names)
    return [*(name for name in KNOWN if name in found), *(name for name in found if name not in KNOWN)]


def _timeline(points: Sequence[Mapping[str, Any]], colours: Mapping[str, str], limit: float) -> Markup:
    """Stacked parts over the time of one micro-batch, in the colours of the bar; points without times are equally far apart."""
    totals = [sum(point["gib"].values()) for point in points]
    peak = max(range(len(points)), key=totals.__getitem__)
    top = max(limit, totals[peak]) * 1.02
    timed = all("time_s" in point for point in points)
    times = [point["time_s"] if timed else index for index, point in enumerate(points)]
    end = max(times) or 1.0
    places = [time / end for time in times]
    parts = [Part(words(name), 0.0, gib(points[peak]["gib"].get(name, 0.0)), colour) for name, colour in colours.items()]
    where = f"{gib(totals[peak])} at {points[peak]['at']}"
    label = f"Memory over one micro-batch, from {points[0]['at']} to {points[-1]['at']}: highest {where}"
    height = _TOP + _HEIGHT + _BOTTOM
    levels = ticks(top, 4)
    drawing = fluid(
        label,
        height,
        [line(0, _y(value, top), "100%", _y(value, top)) for value in levels],
        stretched(0, _TOP, "100%", _HEIGHT, _areas(points, places, colours, top)),
        _limit(limit, top),
        seconds_axis(end, _TOP + _HEIGHT + 15) if timed else None,
        tag("circle", cx=share(places[peak]), cy=_y(totals[peak], top), r=3.5, class_="limit"),
        _hover(points, places, totals),
    )
    return tag(
        "figure",
        tag("h3", "Memory over one micro-batch"),
        tag("p", f"Highest: {where}.", class_="muted"),
        tag("div", _scale(levels, top, height), drawing, class_="plot"),
        tag("span", HINT, class_="readout", aria_live="polite"),
        legend(parts),
        tag("figcaption", "The legend gives the parts at the highest point."),
    )


def _scale(levels: Sequence[float], top: float, height: float) -> Markup:
    """The values of the hairlines, left of the drawing."""
    marks = [text("92%", _y(value, top) + 4, f"{value:g} GiB", "muted", "end", font_size=11) for value in levels]
    return tag("svg", marks, height=height, aria_hidden="true")


def _limit(limit: float, top: float) -> Markup:
    y = _y(limit, top)
    return join([line(0, y, "100%", y, "limit-line"), text("100%", y - 4, f"limit {gib(limit)}", "limit", "end", font_size=11)])


def _areas(points: Sequence[Mapping[str, Any]], places: Sequence[float], colours: Mapping[str, str], top: float) -> list[Markup]:
    """A stripe for each part, on top of those before it, in thousandths of the drawing."""
    xs = [1000 * place for place in places]
    below = [0.0] * len(points)
    areas = []
    for name, colour in colours.items():
        above = [base + point["gib"].get(name, 0.0) for base, point in zip(below, points, strict=True)]
        outline = [*zip(xs, above, strict=True), *zip(reversed(xs), reversed(below), strict=True)]
        areas.append(path(polygon_path([(x, 1000 - 1000 * value / top) for x, value in outline]), f"area {colour}"))
        below = above
    return areas


def _hover(points: Sequence[Mapping[str, Any]], places: Sequence[float], totals: Sequence[float]) -> list[Markup]:
    """An invisible column for each point, up to the next one, that tells its parts."""
    bounds = [*places, 1.0]
    columns = []
    for index, point in enumerate(points):
        parts = ", ".join(f"{words(name)} {gib(value)}" for name, value in point["gib"].items() if value)
        tip = f"{point['at']}: {gib(totals[index])} ({parts})"
        columns.append(rect(share(bounds[index]), _TOP, share(max(0.0, bounds[index + 1] - bounds[index])), _HEIGHT, "ghost", tip))
    return columns


def _y(value: float, top: float) -> float:
    return _TOP + _HEIGHT * (1 - value / top)
