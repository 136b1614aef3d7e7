"""The tables of a run's page: predicted beside measured, the run in stretches of steps, and its settings.

In: `RunDocuments`. Out: sections, or nothing where there is nothing to say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from seqloom.report.comparisons import Comparison, Group
from seqloom.report.decimate import stretches
from seqloom.report.markup import Markup, tag
from seqloom.report.measured import comparison_table
from seqloom.report.run_documents import RunDocuments, settings, table, value
from seqloom.report.text import gib, number, percent, plural, seconds

ROWS = 40


def predicted_section(documents: RunDocuments) -> Markup | None:
    """What the plan predicted beside medians of the steps, without those that warm up, and the highest memory."""
    rows = tuple(_comparisons(documents))
    if not any(row.predicted for row in rows):
        return None
    warm = int((~documents.log.first_after_start()).sum()) or documents.log.count
    title = f"{plural(warm, 'step')}: medians, and the peak of the fullest rank"
    return tag("section", tag("h2", "Predicted and measured"), comparison_table([Group(title, rows)]), id="predicted")


def _comparisons(documents: RunDocuments) -> Iterator[Comparison]:
    log, plan = documents.log, documents.plan
    warm = ~log.first_after_start()
    shown = (("step", "step_time_s", seconds), ("tokens/s per GPU", "tokens_per_s_per_gpu", number), ("MFU, causal", "mfu_causal", percent))
    for name, key, show in shown:
        values = log.steps[key][warm] if warm.any() else log.steps[key]
        if np.isfinite(values).any():
            yield Comparison(name, value(plan, key), float(np.nanmedian(values)), show)
    memory = log.steps["memory_gib"]
    if np.isfinite(memory).any():
        name = "memory of the process" if documents.on_cpu else "peak memory"
        yield Comparison(name, documents.predicted_memory_gib, float(np.nanmax(memory)), gib)


def numbers_section(documents: RunDocuments) -> Markup | None:
    """The run in at most ROWS stretches of equally many steps: what the charts show, as numbers."""
    log = documents.log
    if not log.count:
        return None
    bounds = stretches(log.count, min(ROWS, log.count)).tolist()
    columns = [column for column in _COLUMNS if np.isfinite(log.steps[column.key]).any()]
    evaluations = [(found.step, found.loss) for found in log.evaluations if found.loss is not None]
    titles = ["steps", *(column.title for column in columns), *(["best evaluation"] if evaluations else [])]
    rows = []
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        first, last = (int(log.steps["step"][place]) for place in (start, end - 1))
        cells = [f"{first:,}" if first == last else f"{first:,}\u2013{last:,}"]
        cells += [column.cell(log.steps[column.key][start:end]) for column in columns]
        if evaluations:
            best = min((loss for step, loss in evaluations if first <= step <= last), default=None)
            cells.append("" if best is None else f"{best:.4f}")
        rows.append(cells)
    return _folded("The run in numbers", titles, rows, "numbers")


@dataclass(frozen=True)
class _Column:
    """A column of the run in numbers: what becomes of the values of a stretch, and how that is written."""

    title: str
    key: str
    of: Callable[[np.ndarray], float]
    show: Callable[[float], str]

    def cell(self, values: np.ndarray) -> str:
        """The figure of a stretch; empty where there is none."""
        return self.show(float(self.of(values))) if np.isfinite(values).any() else ""


_COLUMNS = (
    _Column("mean loss", "loss", np.nanmean, "{:.4f}".format),
    _Column("lowest", "loss", np.nanmin, "{:.4f}".format),
    _Column("highest", "loss", np.nanmax, "{:.4f}".format),
    _Column("highest gradient norm", "grad_norm", np.nanmax, number),
    _Column("mean learning rate", "lr", np.nanmean, "{:.3g}".format),
    _Column("tokens/s/GPU", "tokens_per_s_per_gpu", np.nanmedian, number),
    _Column("MFU", "mfu_causal", np.nanmedian, percent),
    _Column("step time", "step_time_s", np.nanmedian, seconds),
    _Column("peak memory", "memory_gib", np.nanmax, gib),
    _Column("longest wait for data", "data_wait_s", np.nanmax, seconds),
)


def settings_section(documents: RunDocuments) -> Markup | None:
    """Every setting of the run with its value, as resolved from flags and defaults."""
    found = settings(table(documents.info, "config"))
    if not found:
        return None
    return _folded(f"The configuration: {plural(len(found), 'setting')}", ["setting", "value"], list(found.items()), "settings", "mono")


def _folded(summary: str, titles: Sequence[str], rows: Iterable[Sequence[str]], id_: str, kind: str = "n") -> Markup:
    """A table that opens when its summary is pressed; its cells are of one kind, but for the first column of words."""
    head = tag("tr", (tag("th", title, scope="col", class_=kind if kind == "n" else None) for title in titles))
    body = (tag("tr", (tag("td", cell, class_=kind) for cell in cells)) for cells in rows)
    return tag(
        "details",
        tag("summary", summary),
        tag("div", tag("table", tag("thead", head), tag("tbody", body)), class_="scroll", tabindex=0),
        id=id_,
    )
