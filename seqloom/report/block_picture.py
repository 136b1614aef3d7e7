"""The block as a picture: operators from top to bottom, the values between them as arcs, how each is split, and what each costs.

Drawn twice, for wide pages and for phones (`Shape`); the stylesheet shows one. Bars have one scale over all blocks of the plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from textwrap import wrap

from seqloom.report.block_rows import MODE_WORDS, MODES, Picture, Row, Segment, read_picture
from seqloom.report.documents import Documents
from seqloom.report.markup import Markup, join, tag
from seqloom.report.svg import HINT, fixed, path, rect, text
from seqloom.report.text import clip, percent, plural, seconds

MODE_COLOURS = {"offload": "host", "recompute": "six", "selective": "two", "keep": "forward"}


@dataclass(frozen=True)
class Shape:
    """Where the columns are, in pixels. `stacked`: a row is two lines, with the bar under the name."""

    name: str
    width: float
    gutter: float
    split_x: float
    bar_x: float
    bar_end: float
    row_height: float
    letters: int
    split_letters: int
    sentence_letters: int
    stacked: bool


WIDE = Shape("wide", 960, 104, 404, 588, 884, 25, 39, 25, 86, stacked=False)
NARROW = Shape("narrow", 328, 46, 60, 60, 322, 48, 29, 36, 44, stacked=True)


def block_section(documents: Documents) -> Markup:
    """A picture of every block, and of what lies around them."""
    plan = documents.plan
    segments = plan.get("segments", {})
    pictures = {name: read_picture(rows, segments.get(name, {})) for name, rows in plan["blocks"].items()}
    longest = max((row.forward_s + row.backward_s for picture in pictures.values() for row in picture.rows), default=0.0) or 1.0
    batches = plan.get("grad_accumulation_steps", 1)
    ordered = sorted(pictures, key=lambda name: name not in segments)
    step_s = plan["step_time_s"]
    figures = [_figure(name, pictures[name], name in segments, longest, batches, step_s) for name in ordered if pictures[name].rows]
    return tag(
        "section",
        tag("h2", "One block, operator by operator"),
        tag(
            "p",
            "From top to bottom in the order of execution. Arcs are the values that flow; ",
            tag("code", "l@sp"),
            " says that dimension l is split over the mesh axis sp; diamonds are the collectives between two splits. "
            "Bars are seconds of one call on one rank, first forward and then backward.",
        ),
        figures,
        id="blocks",
    )


def _figure(name: str, picture: Picture, is_block: bool, longest: float, batches: int, step_s: float) -> Markup:
    layers = picture.layers if is_block else 1
    title = f"{name} \u00d7 {layers}" if is_block else "Around the blocks"
    total = picture.seconds
    about = f"{seconds(total)} a call, {percent(total * layers * batches / step_s)} of the step before recomputation"
    return tag(
        "figure",
        tag("h3", title),
        tag("p", about, class_="muted"),
        (draw(title, picture, shape, longest) for shape in (WIDE, NARROW)),
        tag("span", HINT, class_="readout", aria_live="polite"),
        _key(picture),
    )


def draw(title: str, picture: Picture, shape: Shape, longest: float) -> Markup:
    """The picture in one shape; `longest` is the cost in seconds of the longest bar."""
    headers = {segment.first: _header_height(segment, shape) for segment in picture.segments if segment.layers}
    above = list(accumulate(headers.get(i, 0.0) for i in range(len(picture.rows))))
    tops = [extra + i * shape.row_height for i, extra in enumerate(above)]
    places = [top + (11 if shape.stacked else shape.row_height / 2) for top in tops]
    spine = shape.gutter
    height = tops[-1] + shape.row_height + 6
    label = f"{title}: {plural(sum(not row.is_reshard for row in picture.rows), 'operator')} and the reshards between them, with cost"
    return fixed(
        label,
        shape.width,
        height,
        (_segment(segment, tops, shape) for segment in picture.segments if segment.layers),
        (_edge(places[a], places[b], spine, b - a == 1) for a, b in picture.edges),
        (_row(row, tops[i], places[i], shape, longest) for i, row in enumerate(picture.rows)),
        class_=shape.name,
    )


def _row(row: Row, top: float, y: float, shape: Shape, longest: float) -> Markup:
    x, scale = shape.gutter, (shape.bar_end - shape.bar_x) / longest
    baseline = y + 4
    split_y = baseline + 15 if shape.stacked else baseline
    bar_y, bar_height = (split_y + 5, 6) if shape.stacked else (y - 6, 12)
    forward, backward = row.forward_s * scale, row.backward_s * scale
    colours = ("link", "link") if row.is_reshard else ("forward", "backward")
    cost = seconds(row.forward_s + row.backward_s)
    split = clip(row.split, shape.split_letters)
    return tag(
        "g",
        rect(0, top, shape.width, shape.row_height, "ghost"),
        path(f"M{x} {y - 5}l5 5l-5 5l-5 -5Z", "link") if row.is_reshard else tag("circle", cx=x, cy=y, r=4, class_="forward"),
        text(x + 14, baseline, clip(row.name, shape.letters), "muted" if row.is_reshard else None, font_size=13),
        text(shape.split_x, split_y, split, "mono muted"),
        rect(shape.bar_x, bar_y, max(0.6, forward), bar_height, colours[0]),
        rect(shape.bar_x + forward, bar_y, max(0.4, backward), bar_height, colours[1]),
        text(shape.width - 6, baseline, cost, "muted", "end"),
        class_="row",
        data_tip=row.tip,
    )


def _edge(y1: float, y2: float, x: float, neighbours: bool) -> Markup:
    """An arc on the left, wider the further it goes; neighbours are joined by a straight line."""
    bend = 0.0 if neighbours else min(0.42 * (y2 - y1), 0.92 * x)
    return path(f"M{x:g} {y1:g}C{x - bend:.1f} {y1:g} {x - bend:.1f} {y2:g} {x:g} {y2:g}", "edge")


def _segment(segment: Segment, tops: Sequence[float], shape: Shape) -> Markup:
    """The ground a segment lies on, its name, what becomes of its activations, and a cell for each layer."""
    header = _header_height(segment, shape)
    top = tops[segment.first] - header
    height = tops[segment.last] + shape.row_height - top - 4
    x = shape.gutter + 14
    lines_x, first = (x, top + 35) if shape.stacked else (shape.split_x, top + 19)
    return tag(
        "g",
        rect(shape.gutter - 14, top + 2, shape.width - shape.gutter + 14, height, "band"),
        text(x, top + 19, segment.name, "strong", font_size=13),
        (text(lines_x, first + 14 * i, words, "muted", font_size=11) for i, words in enumerate(_lines(segment, shape))),
        _cells(segment, lines_x, top + header - 19, shape.width - lines_x - 6),
    )


def _lines(segment: Segment, shape: Shape) -> list[str]:
    return wrap(segment.sentence, shape.sentence_letters)


def _header_height(segment: Segment, shape: Shape) -> float:
    """Room above a segment's rows: its name, its sentence in as many lines as it takes, and the cells."""
    return (46 if shape.stacked else 30) + 14 * len(_lines(segment, shape))


def _cells(segment: Segment, x: float, y: float, room: float) -> Markup:
    """One cell a layer, first to last."""
    modes = [mode for mode, count in segment.layers for _ in range(count)]
    pitch = min(10.0, room / len(modes))
    tip = f"{segment.name}: {segment.sentence}"
    cells = (rect(x + i * pitch, y, max(0.8, pitch - 2), 8, MODE_COLOURS[mode]) for i, mode in enumerate(modes))
    return tag("g", list(cells), data_tip=tip)


def _key(picture: Picture) -> Markup | None:
    """What the cells' colours mean: only the modes that occur."""
    used = {mode for segment in picture.segments for mode, _ in segment.layers}
    if not used:
        return None
    entries = (tag("li", tag("i", class_=MODE_COLOURS[mode], aria_hidden="true"), MODE_WORDS[mode]) for mode in MODES if mode in used)
    return join([tag("ul", entries, class_="legend"), tag("figcaption", "A cell is a layer, the first one on the left.")])
