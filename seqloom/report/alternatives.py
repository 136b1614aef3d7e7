"""What was rejected: whole plans, each with the reason, and for every operator the runner-up with what it would have cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from seqloom.report.bars import Bar, bar_list
from seqloom.report.documents import Documents
from seqloom.report.markup import Markup, tag
from seqloom.report.text import gib, mesh_text, seconds, storage_text, strategy_text

_MOST = 12


def alternatives_section(documents: Documents) -> Markup | None:
    """The plan chosen and those that were not, the quickest first; those that cannot run come last."""
    plan = documents.plan
    others = [other for other in plan.get("alternatives", ()) if other.get("reason")]
    if not others:
        return None
    storage = plan.get("storage", {"zero": plan.get("zero")})
    chosen = {"mesh": plan["mesh"], **storage, "step_time_s": plan["step_time_s"], "peak_memory_gib": plan["peak_memory_gib"]["total"]}
    slowest = max([chosen["step_time_s"], *(other.get("step_time_s") or 0.0 for other in others)])
    ordered = sorted(others, key=lambda other: other.get("step_time_s") or float("inf"))
    return tag(
        "section",
        tag("h2", "Plans that were not chosen"),
        tag("p", "Their predicted step, as far as it was needed to reject them."),
        bar_list([_bar(chosen, slowest, chosen=True), *(_bar(other, slowest) for other in ordered)]),
        id="alternatives",
    )


def _bar(plan: Mapping[str, Any], slowest: float, chosen: bool = False) -> Bar:
    """A plan that was tried; where it was left before its best form was found, its seconds are a lower bound."""
    step, peak = plan.get("step_time_s"), plan.get("peak_memory_gib")
    bound = "" if plan.get("exact", True) else "at least "
    figures = [f"{bound}{seconds(step)}" if step is not None else None, gib(peak) if peak is not None else None]
    names = [mesh_text(plan["mesh"]), storage_text(plan.get("zero"), plan.get("sharded", ()))]
    return Bar(
        label=", ".join(name for name in names if name),
        value=", ".join(figure for figure in figures if figure) or "cannot run",
        length=step / slowest if step is not None else None,
        note="chosen" if chosen else plan["reason"],
        colour="forward" if chosen else "five",
        chosen=chosen,
    )


def operators_section(documents: Documents) -> Markup:
    """The nearest runners-up as bars, and every operator in numbers."""
    rivals = sorted(_rivals(documents.plan), key=lambda rival: rival[1]["runner_up"]["extra_s"])
    longest = max((row["runner_up"]["extra_s"] for _, row in rivals), default=0.0) or 1.0
    return tag(
        "section",
        tag("h2", "Operators and their runners-up"),
        tag("p", "What the second best split of an operator would have added to a step, the closest calls first.") if rivals else None,
        bar_list([_rival_bar(block, row, longest) for block, row in rivals[:_MOST]]) if rivals else None,
        tag("details", tag("summary", "Every operator in numbers"), (_table(*item) for item in documents.plan["blocks"].items())),
        id="operators",
    )


def _rivals(plan: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for block, rows in plan["blocks"].items():
        for row in rows:
            if row.get("runner_up"):
                yield block, row


def _rival_bar(block: str, row: Mapping[str, Any], longest: float) -> Bar:
    other = row["runner_up"]
    return Bar(
        label=f"{row['operator']}: {strategy_text(row['strategy'])}, not {strategy_text(other['strategy'])}",
        value=f"+{seconds(other['extra_s'])}",
        length=other["extra_s"] / longest,
        note=block,
        colour="two",
    )


def _table(block: str, rows: list[Mapping[str, Any]]) -> Markup:
    """Operators and reshards of a block; it scrolls sideways in itself where the page is narrow."""
    titles = (("operator", None), ("split or move", None), ("forward", "n"), ("backward", "n"), ("runner-up", None), ("adds a step", "n"))
    head = tag("tr", (tag("th", title, scope="col", class_=kind) for title, kind in titles))
    table = tag("table", tag("thead", head), tag("tbody", (_cells(row) for row in rows)))
    return tag("div", tag("h3", block), tag("div", table, class_="scroll", tabindex=0, role="region", aria_label=f"operators of {block}"))


def _cells(row: Mapping[str, Any]) -> Markup:
    is_reshard = "reshard" in row
    constants = ", ".join(f"{name} {value}" for name, value in row.get("constants", {}).items())
    other = row.get("runner_up")
    return tag(
        "tr",
        tag("td", f"reshard {row['reshard']}" if is_reshard else row["operator"], f" ({constants})" if constants else None),
        tag("td", f"{row['from']} \u2192 {row['to']}" if is_reshard else strategy_text(row["strategy"]), class_="mono"),
        tag("td", seconds(row["forward_s"]), class_="n"),
        tag("td", seconds(row["backward_s"]), class_="n"),
        tag("td", strategy_text(other["strategy"]) if other else None, class_="mono"),
        tag("td", seconds(other["extra_s"]) if other else None, class_="n"),
    )
