"""The tables of a comparison: the runs and their figures, how far the losses lie apart, and the settings that differ.

In: `RunDocuments` and the names of runs. Out: sections.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from seqloom.report.compare_data import differing_settings, loss_difference
from seqloom.report.markup import Child, Markup, tag
from seqloom.report.run_documents import RunDocuments
from seqloom.report.run_head import run_state
from seqloom.report.text import duration, gib, number, percent

_ABSENT = "\u2013"


def runs_table(names: Sequence[str], runs: Sequence[RunDocuments], colours: Sequence[str]) -> Markup:
    """A line for each run: state, steps, last and best loss, throughput, memory, time."""
    titles = ("run", "state", "step", "mean loss, last 50", "best evaluation", "tokens/s/GPU", "MFU", "peak memory", "time running")
    rows = []
    for name, run, colour in zip(names, runs, colours, strict=True):
        label = tag("td", tag("i", class_=colour, aria_hidden="true"), name, class_="swatch")
        rows.append(tag("tr", label, tag("td", run_state(run)), (tag("td", cell, class_="n") for cell in _figures(run))))
    return _table(titles, rows, 2)


def _figures(run: RunDocuments) -> list[str]:
    log = run.log
    best = min((found.loss for found in log.evaluations if found.loss is not None), default=None)
    return [
        f"{log.last_step:,}",
        _of(np.nanmean, log.steps["loss"][-50:], "{:.4f}".format),
        _ABSENT if best is None else f"{best:.4f}",
        _of(np.nanmedian, log.steps["tokens_per_s_per_gpu"], number),
        _of(np.nanmedian, log.steps["mfu_causal"], percent),
        _of(np.nanmax, log.steps["memory_gib"], gib),
        duration(float(log.seconds()[-1])) if log.count else _ABSENT,
    ]


def _of(figure: Callable[[np.ndarray], float], values: np.ndarray, show: Callable[[float], str]) -> str:
    """A figure of a column in words."""
    return show(float(figure(values))) if np.isfinite(values).any() else _ABSENT


def losses_section(names: Sequence[str], runs: Sequence[RunDocuments]) -> Markup:
    """How far the loss of each run lies from that of the first, step by step."""
    titles = ("run", "common steps", "largest difference", "at step", "mean of all, unsigned", "at the newest")
    rows = []
    for name, run in zip(names[1:], runs[1:], strict=True):
        found = loss_difference(runs[0], run)
        cells = [_ABSENT] * 5
        if found is not None:
            cells = [f"{found.steps:,}", _signed(found.largest), f"{found.step:,}", f"{found.mean:.3g}", _signed(found.last)]
        rows.append(tag("tr", tag("td", name), (tag("td", cell, class_="n") for cell in cells)))
    what = f"The loss of each run less that of {names[0]} at the steps that both made, in nats per token."
    return tag("section", tag("h2", "Loss at the same steps"), tag("p", what, class_="muted"), _table(titles, rows), id="losses")


def settings_section(names: Sequence[str], runs: Sequence[RunDocuments]) -> Markup:
    """The settings that are not the same in all runs."""
    found = differing_settings(runs)
    heading = tag("h2", "Settings that differ")
    if not found:
        same = "All settings are the same." if all(run.info for run in runs) else "The settings are not known of every run."
        return tag("section", heading, tag("p", same), id="settings")
    rows = (
        tag("tr", tag("td", name, class_="mono"), (tag("td", _ABSENT if cell is None else cell, class_="mono") for cell in values))
        for name, values in found.items()
    )
    return tag("section", heading, _table(("setting", *names), rows, 1 + len(names)), id="settings")


def _signed(value: float) -> str:
    return "0" if value == 0 else f"{value:+.3g}".replace("-", "\u2212")


def _table(titles: Sequence[str], rows: Iterable[Child], words: int = 1) -> Markup:
    """A table whose first `words` columns are words and whose others are numbers."""
    head = tag("tr", (tag("th", title, scope="col", class_=None if index < words else "n") for index, title in enumerate(titles)))
    return tag("div", tag("table", tag("thead", head), tag("tbody", rows)), class_="scroll", tabindex=0)
