"""What binds the plan, and which change would help most."""

from __future__ import annotations

from seqloom.report.bars import Bar, bar_list
from seqloom.report.documents import Documents
from seqloom.report.markup import Markup, tag
from seqloom.report.text import percent, seconds


def verdict_section(documents: Documents) -> Markup | None:
    """The binding constraint in one sentence, then the changes by what they would gain; nothing where the plan says neither."""
    binding, advice = documents.plan.get("binding"), documents.plan.get("advice") or []
    if not binding and not advice:
        return None
    ordered = sorted(advice, key=lambda change: -(change.get("gain") or 0.0))
    return tag(
        "section",
        tag("h2", f"What binds: {binding['constraint']}" if binding else "What would help"),
        tag("p", binding["sentence"]) if binding else None,
        tag("h3", "What would help") if binding and advice else None,
        bar_list([_bar(change) for change in ordered]) if advice else None,
        id="binding",
    )


def _bar(change: dict) -> Bar:
    gain, step = change.get("gain"), change.get("step_time_s")
    value = f"{seconds(step)} a step" if step is not None else ""
    if gain is not None:
        value = f"{value + ', ' if value else ''}{percent(abs(gain))} {'shorter' if gain >= 0 else 'longer'}"
    length = max(0.0, gain) if gain is not None else None
    return Bar(change["change"], value, length, change.get("sentence"), "host")
