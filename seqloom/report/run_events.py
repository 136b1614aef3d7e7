"""What happened in a run beside its steps: lanes of marks over the steps, and a table of the newest.

In: `RunDocuments`. Out: a section, or nothing where nothing happened.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime

from seqloom.report.axes import short
from seqloom.report.chart import axis_name, x_axis
from seqloom.report.markup import Markup, tag
from seqloom.report.run_charts import marks_of, steps_scale
from seqloom.report.run_documents import RunDocuments
from seqloom.report.run_log import EVALUATION, FINISH, RESTART, SKIPPED, SPIKE, START, STOP, STRAGGLER, Event
from seqloom.report.svg import line, share, text
from seqloom.report.text import join_words, plural

NEWEST = 60
COLOURS = {
    START: "four",
    RESTART: "four",
    STOP: "five",
    FINISH: "four",
    "checkpoint": "one",
    EVALUATION: "three",
    SPIKE: "limit",
    SKIPPED: "limit",
    STRAGGLER: "six",
}
_LANE = 22


def events_section(documents: RunDocuments) -> Markup | None:
    """Lanes and table."""
    events = documents.log.events
    if not events:
        return None
    return tag("section", tag("h2", "Events"), _lanes(documents), _table(events), id="events")


def _lanes(documents: RunDocuments) -> Markup | None:
    """A lane for each kind that happened within the steps, in the order of COLOURS."""
    log = documents.log
    marks = {kind: marks_of(log, kind) for kind in _kinds(event.kind for event in log.events)} if log.count else {}
    lanes = [kind for kind, found in marks.items() if found]
    if not lanes:
        return None
    x, height = steps_scale(log), _LANE * len(lanes) + 22
    counted = Counter(event.kind for event in log.events)
    names = [text("100%", _middle(row) + 4, kind, "muted", "end", font_size=11, dx=-8) for row, kind in enumerate(lanes)]
    drawn = [
        [
            line(0, _middle(row), "100%", _middle(row), "lane"),
            [_mark(share(float(x.place(mark.x))), row, COLOURS.get(kind, "two"), _tip(mark.x, mark.text)) for mark in marks[kind]],
        ]
        for row, kind in enumerate(lanes)
    ]
    sentence = join_words(f"{counted[kind]:,} {kind}" for kind in lanes)
    drawing = tag(
        "svg",
        tag("desc", sentence),
        drawn,
        x_axis(x, short, height - 5),
        role="img",
        aria_label=f"Events over the steps: {sentence}",
        height=height,
        class_="over",
    )
    return tag(
        "figure",
        tag("div", tag("svg", names, axis_name("steps", height - 5), height=height, aria_hidden="true"), drawing, class_="plot"),
        tag("span", "Point at or touch a mark to read it.", class_="readout"),
        class_="wide-left lanes",
    )


def _kinds(found: Iterable[str]) -> list[str]:
    """Each kind once: known ones in their order, then the others as they come."""
    there = dict.fromkeys(found)
    return [*(kind for kind in COLOURS if kind in there), *(kind for kind in there if kind not in COLOURS)]


def _tip(step: float, told: str) -> str:
    return f"step {int(step):,}: {told}"


def _middle(row: int) -> float:
    return _LANE * row + _LANE / 2


def _mark(place: str, row: int, colour: str, tip: str) -> Markup:
    """A tick, in a piece of air that is easy to hit."""
    top = _LANE * row + 4
    seen = tag("rect", x=place, y=top, width=3, height=_LANE - 8, rx=1, class_=colour, transform="translate(-1.5)")
    return tag("g", seen, tag("rect", x=place, y=top - 4, width=14, height=_LANE, class_="hit", transform="translate(-7)"), data_tip=tip)


def _table(events: tuple[Event, ...]) -> Markup:
    """The newest events, newest first."""
    titles = (("step", "n"), ("time (UTC)", None), ("what", None), ("", None))
    head = tag("tr", (tag("th", title, scope="col", class_=kind) for title, kind in titles))
    rows = (
        tag(
            "tr",
            tag("td", f"{event.step:,}", class_="n"),
            tag("td", moment(event.time), class_="when"),
            tag("td", event.kind),
            tag("td", event.text),
        )
        for event in reversed(events[-NEWEST:])
    )
    left_out = f"The newest {NEWEST} of {len(events):,}; all are in log.jsonl." if len(events) > NEWEST else None
    return tag(
        "details",
        tag("summary", f"{plural(len(events), 'event')} in a table"),
        tag("div", tag("table", tag("thead", head), tag("tbody", rows)), class_="scroll", tabindex=0),
        tag("p", left_out, class_="muted") if left_out else None,
    )


def moment(time: float | None) -> str:
    """`2026-11-22 04:12:09`; empty where unknown."""
    try:
        return "" if time is None else datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (OverflowError, OSError, ValueError):
        return ""
