"""Where the time goes: the parts of a step, and a micro-batch drawn on the lanes compute, communication and host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from seqloom.report.bars import Part, stacked_bar
from seqloom.report.documents import Documents
from seqloom.report.markup import Markup, tag
from seqloom.report.style import series
from seqloom.report.svg import HINT, fluid, line, rect, seconds_axis, share, text
from seqloom.report.text import percent, plural, seconds, words

COLOURS = {"forward": "forward", "backward": "backward", "recompute": "six", "reshard": "link", "optimizer": "two"}
LANES = {"compute": "forward", "communication": "link", "host": "host"}
_PHASES = ("forward", "backward", "optimizer")
_LANE, _BAR, _TOP = 46, 22, 22
Interval = tuple[float, float]


def time_section(documents: Documents) -> Markup:
    """The bar of the step, and the timeline where the plan has one."""
    plan = documents.plan
    times = {name: value for name, value in plan["time_s"].items() if value}
    colours = series(times, COLOURS)
    parts = [Part(words(name), value, seconds(value), colours[name]) for name, value in times.items()]
    batches = plan.get("grad_accumulation_steps", 1)
    note = f"{seconds(plan['step_time_s'])} for {plural(batches, 'micro-batch', 'micro-batches')}"
    work = plan.get("flops_per_rank")
    if work and sum(work.values()):
        note += f"; {percent(work.get('recompute', 0.0) / sum(work.values()))} of the arithmetic is recomputation"
    events = plan.get("timeline")
    return tag(
        "section",
        tag("h2", "Time of one step"),
        tag("p", f"{note}."),
        tag("figure", stacked_bar("Step time by part", parts)),
        _timeline(events) if events else None,
        id="time",
    )


def _timeline(events: Sequence[Mapping[str, Any]]) -> Markup:
    lanes = [lane for lane in LANES if any(event["lane"] == lane for event in events)]
    lanes += list(dict.fromkeys(event["lane"] for event in events if event["lane"] not in LANES))
    end = max(event["end_s"] for event in events) or 1.0
    sentences = lane_sentences(events, end)
    label = f"Timeline of forward, backward and optimizer over {seconds(end)}: " + "; ".join(sentences.values())
    height = _TOP + _LANE * len(lanes) + 18
    return tag(
        "figure",
        tag("h3", "One micro-batch, forward, backward and optimizer"),
        fluid(
            label,
            height,
            _phases(events, end, height - 18),
            [_lane(lane, _TOP + _LANE * i, events, end, sentences[lane]) for i, lane in enumerate(lanes)],
            seconds_axis(end, height - 4),
        ),
        tag("span", HINT, class_="readout", aria_live="polite"),
        tag("figcaption", "Exposed: not hidden behind computing."),
    )


def lane_sentences(events: Sequence[Mapping[str, Any]], end: float) -> dict[str, str]:
    """For each lane the share of the time in which it is busy and, but for compute, how much of that is exposed: nothing is computed."""
    busy: dict[str, list[Interval]] = {}
    for event in events:
        busy.setdefault(event["lane"], []).append((event["start_s"], event["end_s"]))
    merged = {lane: merge(intervals) for lane, intervals in busy.items()}
    compute = merged.get("compute", [])
    sentences = {}
    for lane, intervals in merged.items():
        total = _length(intervals)
        sentences[lane] = f"{lane} {percent(total / end)} busy"
        if lane != "compute":
            alone = total - overlap(intervals, compute)
            sentences[lane] += f", {seconds(alone)} exposed" if alone > 1e-6 * end else ", all behind compute"
    return sentences


def merge(intervals: Sequence[Interval]) -> list[Interval]:
    """The union of intervals, in order, without overlaps."""
    union: list[Interval] = []
    for start, end in sorted(intervals):
        if union and start <= union[-1][1]:
            union[-1] = (union[-1][0], max(union[-1][1], end))
        else:
            union.append((start, end))
    return union


def overlap(first: Sequence[Interval], second: Sequence[Interval]) -> float:
    """Length of the intersection of two unions as `merge` gives them."""
    return _length(first) + _length(second) - _length(merge([*first, *second]))


def _length(intervals: Sequence[Interval]) -> float:
    return sum(end - start for start, end in intervals)


def _lane(lane: str, top: float, events: Sequence[Mapping[str, Any]], end: float, sentence: str) -> Markup:
    colour = LANES.get(lane, "five")
    pieces = [event for event in events if event["lane"] == lane]
    bars = []
    for index, event in enumerate(pieces):
        start, length = event["start_s"], event["end_s"] - event["start_s"]
        tip = f"{event['label']}: {seconds(length)}, from {seconds(start)} on"
        shade = "backward" if colour == "forward" and index % 2 else colour
        bars.append(rect(share(start / end), top + 17, share(length / end), _BAR, shade, tip))
    return tag("g", text(0, top + 12, sentence, "muted"), rect(0, top + 17, "100%", _BAR, "faint"), bars)


def _phases(events: Sequence[Mapping[str, Any]], end: float, bottom: float) -> list[Markup]:
    """Where forward, backward and optimizer begin, as far as the labels of the compute lane say."""
    marks = []
    for phase in _PHASES:
        mine = [event for event in events if event["lane"] == "compute" and event["label"].partition(" ")[0] == phase]
        if not mine:
            continue
        start = min(event["start_s"] for event in mine) / end
        marks.append(line(share(start), 4, share(start), bottom))
        if start < 0.9:
            marks.append(text(share(start), 12, phase, "strong", dx=4))
    return marks
