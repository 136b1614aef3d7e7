"""Predicted beside measured: the truth about the plan, as far as it is known, and the loss of the run."""

from __future__ import annotations

from seqloom.report.comparisons import Comparison, Group, read_comparisons
from seqloom.report.documents import Documents, Training
from seqloom.report.markup import Markup, tag
from seqloom.report.svg import fluid, line, path, polygon_path, rect, share, stretched, text
from seqloom.report.text import number, plural

_LOW, _HIGH, _NEAR = 0.5, 1.5, 0.1


def measured_section(documents: Documents) -> Markup:
    """A table with a group for each measurement, or how to measure."""
    groups = read_comparisons(documents)
    return tag(
        "section",
        tag("h2", "Predicted and measured"),
        comparison_table(groups) if groups else _how_to(documents.name),
        _loss(documents.training) if documents.training and len(documents.training.losses) > 1 else None,
        id="measured",
    )


def _how_to(name: str) -> Markup:
    return tag(
        "p",
        "Nothing has been measured yet. ",
        tag("code", f"python -m seqloom dryrun --name {name}"),
        " runs the program of each rank on fake tensors at full size, with no GPU; its figures appear here.",
    )


def comparison_table(groups: list[Group]) -> Markup:
    """Predicted, measured and their ratio, a group for each measurement."""
    titles = (("", None), ("predicted", "n"), ("measured", "n"), ("ratio", "n"), ("", "strip"))
    head = tag("tr", (tag("th", title, scope="col", class_=kind) for title, kind in titles))
    caption = f"Ratio: predicted over measured; the ground of the strip is within {_NEAR:.0%}."
    return tag(
        "figure",
        tag("table", tag("thead", head), tag("tbody", ([_title(group), *map(_row, group.rows)] for group in groups))),
        tag("figcaption", caption),
    )


def _title(group: Group) -> Markup:
    return tag("tr", tag("th", group.title, scope="rowgroup", colspan=5), class_="group")


def _row(row: Comparison) -> Markup:
    return tag(
        "tr",
        tag("td", row.name),
        tag("td", "\u2013" if row.predicted is None else row.show(row.predicted), class_="n"),
        tag("td", row.show(row.measured), class_="n"),
        tag("td", "\u2013" if row.ratio is None else f"{row.ratio:.3f}", class_="n"),
        tag("td", _strip(row.ratio) if row.ratio is not None else None, class_="strip"),
    )


def _strip(ratio: float) -> Markup:
    """A dot on a line from half to one and a half times what was measured; what lies beyond is at the end."""
    place = min(max(_share(ratio), 0.015), 0.985)
    colour = "host" if abs(ratio - 1) <= _NEAR else "limit"
    return tag(
        "svg",
        rect(share(_share(1 - _NEAR)), 1, share(2 * _NEAR / (_HIGH - _LOW)), 12, "faint"),
        line("50%", 0, "50%", 14),
        tag("circle", cx=share(place), cy=7, r=4, class_=colour),
        height=14,
        aria_hidden="true",
    )


def _share(ratio: float) -> float:
    return (ratio - _LOW) / (_HIGH - _LOW)


def _loss(training: Training) -> Markup:
    """The loss of each step as a line, with its first and last value."""
    (first, start), (last, end) = training.losses[0], training.losses[-1]
    low, high = min(loss for _, loss in training.losses), max(loss for _, loss in training.losses)
    room = (high - low) or 1.0
    points = [(1000 * (step - first) / (last - first), 1000 - 1000 * (loss - low) / room) for step, loss in training.losses]
    label = f"Loss of {plural(training.steps, 'step')}: from {number(start)} to {number(end)} nats per token"
    return tag(
        "figure",
        tag("h3", "Loss of the training run"),
        fluid(
            label,
            150,
            stretched(0, 20, "100%", 110, path(polygon_path(points, closed=False), "curve")),
            text(0, 12, f"{number(start)} at step {first}", "muted"),
            text("100%", 12, f"{number(end)} at step {last}", "strong", "end"),
            line(0, 131, "100%", 131),
            text(0, 146, f"nats per token, lowest {number(low)}", "muted", font_size=11),
        ),
    )
