"""Where the communication goes: bytes that one rank sends in a step, by kind of collective."""

from __future__ import annotations

from seqloom.report.bars import Bar, bar_list
from seqloom.report.documents import Documents
from seqloom.report.markup import Markup, tag
from seqloom.report.text import nbytes, percent, words


def communication_section(documents: Documents) -> Markup:
    """A bar a kind, the largest first."""
    kinds = {kind: count for kind, count in documents.plan["comm_bytes"].items() if count}
    total, largest = sum(kinds.values()), max(kinds.values(), default=1)
    ordered = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
    bars = [Bar(words(kind), f"{nbytes(count)}, {percent(count / total)}", count / largest, colour="link") for kind, count in ordered]
    sentence = f"One rank sends {nbytes(total)} in a step." if bars else "The ranks of this plan send each other nothing."
    return tag("section", tag("h2", "Communication"), tag("p", sentence), bar_list(bars) if bars else None, id="communication")
