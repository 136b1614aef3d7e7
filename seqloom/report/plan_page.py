"""`plan.html`: the plan for people, in one file that needs no network.

In: a compiled program's folder. Out: the page beside its `plan.json`, the same bytes for the same files. Each section is a module of its
own and returns nothing where the plan has nothing for it.
"""

from __future__ import annotations

from pathlib import Path

from seqloom.report.alternatives import alternatives_section, operators_section
from seqloom.report.block_picture import block_section
from seqloom.report.communication import communication_section
from seqloom.report.documents import Documents, read_documents
from seqloom.report.head import model_name, page_header
from seqloom.report.markup import Markup, tag
from seqloom.report.measured import measured_section
from seqloom.report.memory import memory_section
from seqloom.report.page import html_page
from seqloom.report.text import plural
from seqloom.report.timeline import time_section
from seqloom.report.verdict import verdict_section

PAGE = "plan.html"
SECTIONS = (
    verdict_section,
    block_section,
    memory_section,
    time_section,
    communication_section,
    alternatives_section,
    operators_section,
    measured_section,
)


def write_plan_page(folder: Path, run_folder: Path | None = None) -> Path:
    """Write the page of the program in `folder` and return its path.

    `run_folder` holds the log of a training run; where it is not given, the run of the program's name beside it is looked for.
    Raises `UserError` where there is no plan or a file of it is damaged.
    """
    path = folder / PAGE
    path.write_text(plan_page(read_documents(folder, run_folder)), encoding="utf-8")
    return path


def plan_page(documents: Documents) -> str:
    """The whole page."""
    title = f"Plan {documents.name}: {model_name(documents)} at {documents.plan['seq_len']:,} tokens"
    return html_page(title, page_header(documents), tag("main", (section(documents) for section in SECTIONS)), _footer(documents))


def _footer(documents: Documents) -> Markup:
    """How sure the choice is, and what it was made with."""
    sentences = []
    solver = documents.plan.get("solver")
    if solver:
        programs = plural(solver["programs"], "program") if "programs" in solver else "the program"
        sentences.append(f"Solver: {solver['status']}, gap {solver['gap']:.1e}, {programs} of up to {solver['variables']:,} variables.")
    versions = (documents.program or {}).get("versions", {})
    if versions:
        sentences.append("Made with " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".")
    return tag("footer", " ".join(sentences))
