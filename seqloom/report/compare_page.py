"""A page that lays several runs over one another: loss, gradient norm, throughput and memory, over steps, tokens or time.

In: folders of runs. Out: one file that needs no network. Each chart is drawn once for every axis, and the choice of the axis shows one of
them, without a script.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from seqloom.errors import UserError
from seqloom.report.axes import scale_of, span, time_unit
from seqloom.report.chart import Chart, Curve, chart_figure
from seqloom.report.chart_script import CHART_SCRIPT, chart_rules
from seqloom.report.compare_tables import losses_section, runs_table, settings_section
from seqloom.report.decimate import kept, running_mean
from seqloom.report.markup import Child, Markup, tag
from seqloom.report.page import html_page, write_whole
from seqloom.report.run_documents import RunDocuments, read_run
from seqloom.report.style import SERIES
from seqloom.report.text import number

_POINTS, _LEAST, _MOST = 2400, 150, 800  # drawn of all runs together, and of one run at least and at most
_RULES = """
fieldset{border:0;margin:24px 0 0;padding:0;display:flex;flex-wrap:wrap;gap:4px 18px;font-size:14px;
  font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
fieldset legend{float:left;margin-right:6px;color:var(--muted);padding:4px 0} fieldset label{cursor:pointer;padding:4px 0}
fieldset input{accent-color:var(--forward);margin:0 6px 0 0} input:focus-visible{outline:2px solid var(--forward);outline-offset:2px}
@supports selector(:has(*)){.axis{display:none}main:has(#by-steps:checked) .axis.steps,main:has(#by-tokens:checked) .axis.tokens,
main:has(#by-time:checked) .axis.time{display:block}}
td.swatch{white-space:nowrap}
td.swatch i{display:inline-block;width:16px;height:3px;margin-right:8px;vertical-align:middle}
.scroll td.mono{font-size:12px} main>.scroll:first-child{margin-top:24px}
"""


@dataclass(frozen=True)
class _Axis:
    """What charts are drawn over: its id and label, its name behind values, and for each run the values of its steps. Shapes: (count,)."""

    id: str
    label: str
    name: str
    values: Sequence[np.ndarray]


@dataclass(frozen=True)
class _Run:
    """A run that is drawn: its name in the legend, its colour, and a class of the stylesheet for the line."""

    name: str
    documents: RunDocuments
    colour: str
    look: str


@dataclass(frozen=True)
class _Measure:
    """A chart: title, unit, column of the log, unit behind values, and how its scale is chosen."""

    title: str
    unit: str
    key: str
    behind: str = ""
    zero: bool = False
    log: bool = False


_MEASURES = (
    _Measure("Loss", "nats per token", "loss", log=True),
    _Measure("Gradient norm", "", "grad_norm", log=True),
    _Measure("Learning rate", "", "lr", zero=True),
    _Measure("Throughput", "tokens per second and GPU", "tokens_per_s_per_gpu", zero=True),
    _Measure("Peak memory", "GiB, the fullest rank", "memory_gib", " GiB", zero=True),
)


def write_compare_page(run_folders: Sequence[Path], output: Path) -> Path:
    """Write the page that compares these runs to `output` and return it.

    Raises `UserError` where fewer than two runs are given, a folder holds no run, or the page cannot be written.
    """
    if len(run_folders) < 2:
        raise UserError("a comparison needs at least two runs: give the folders of two or more, such as runs/first runs/second")
    return write_whole(output, compare_page([read_run(Path(folder)) for folder in run_folders]))


def compare_page(runs: Sequence[RunDocuments]) -> str:
    """The whole page."""
    names = run_names(runs)
    looks = [(SERIES[index % len(SERIES)], "" if index < len(SERIES) else "dashed") for index in range(len(runs))]
    drawn = [_Run(name, run, *look) for name, run, look in zip(names, runs, looks, strict=True) if run.log.count]
    return html_page(
        f"Runs {', '.join(names)}",
        tag("header", tag("h1", f"{len(runs)} runs compared"), tag("p", ", ".join(names), class_="lede")),
        tag(
            "main",
            runs_table(names, runs, [colour for colour, _ in looks]),
            _charts(drawn) if drawn else tag("p", "No step was made yet in any of these runs."),
            losses_section(names, runs),
            settings_section(names, runs),
        ),
        tag("footer", "Made from log.jsonl and run.json of each run."),
        style=_RULES + chart_rules(),
        script=CHART_SCRIPT,
    )


def run_names(runs: Sequence[RunDocuments]) -> list[str]:
    """A name for each run: its own, with its folder where several have the same one."""
    names = [run.name for run in runs]
    folders = [f"{run.folder.parent.name}/{run.folder.name}" for run in runs]
    return [name if names.count(name) == 1 else f"{name} ({folder})" for name, folder in zip(names, folders, strict=True)]


def _charts(runs: Sequence[_Run]) -> Markup:
    """The choice of the axis, and the charts over each."""
    axes = _axes(runs)
    return tag(
        "section",
        tag("h2", "Curves"),
        tag("fieldset", tag("legend", "Over"), [_choice(axis, axis is axes[0]) for axis in axes]),
        [tag("div", _over(axis, runs), class_=f"axis {axis.id}") for axis in axes],
        id="curves",
    )


def _choice(axis: _Axis, chosen: bool) -> Markup:
    return tag("label", tag("input", type="radio", name_="axis", id=f"by-{axis.id}", checked=chosen), axis.label)


def _axes(runs: Sequence[_Run]) -> list[_Axis]:
    """Steps, then tokens seen and time where every run tells them."""
    logs = [run.documents.log for run in runs]
    axes = [_Axis("steps", "steps", "steps", [log.steps["step"] for log in logs])]
    tokens = [log.steps["tokens_seen"] for log in logs]
    if all(np.isfinite(values).all() for values in tokens):
        axes.append(_Axis("tokens", "tokens seen", "tokens", tokens))
    times = [log.seconds() for log in logs]
    size, unit = time_unit(max(float(values[-1]) for values in times))
    if all(values[-1] > 0 for values in times):
        axes.append(_Axis("time", "time running", unit, [values / size for values in times]))
    return axes


def _over(axis: _Axis, runs: Sequence[_Run]) -> Child:
    """All charts over one axis: the loss first and widest."""
    x = span(axis.values)
    loss, *others = (_chart(measure, axis, runs) for measure in _MEASURES)
    return [
        tag("div", chart_figure(loss, x), class_="wide-left"),
        tag("div", [chart_figure(chart, x) for chart in others if chart.curves], class_="pair"),
    ]


def _chart(measure: _Measure, axis: _Axis, runs: Sequence[_Run]) -> Chart:
    """One figure of all runs; of the loss also its running means and evaluations."""
    most = min(max(_POINTS // len(runs), _LEAST), _MOST)
    loss = measure.key == "loss"
    curves, told = [], []
    for run, xs in zip(runs, axis.values, strict=True):
        values = run.documents.log.steps[measure.key]
        at = kept(values, most)
        if not len(at):
            continue
        curves.append(Curve(run.name, xs[at], values[at], run.colour, f"{'thin ' if loss else ''}{run.look}", unit=measure.behind))
        told.append(f"{run.name} from {number(values[at[0]])} to {number(values[at[-1]])}{measure.behind}")
        if loss:
            mean = running_mean(values, 1 + len(values) // 20, at)
            curves.append(Curve(run.name, xs[at], mean, run.colour, f"strong {run.look}", silent=True))
            curves += _evaluations(run, xs)
    return Chart(
        measure.title,
        measure.unit,
        "; ".join(told),
        curves,
        scale_of([curve.y for curve in curves], zero=measure.zero, log=measure.log),
        height=250 if loss else 150,
        axis=axis.name,
        legend=[(run.name, f"bar {run.colour} {run.look}".strip()) for run in runs] if loss else (),
    )


def _evaluations(run: _Run, xs: np.ndarray) -> list[Curve]:
    """The evaluations of a run as points, at the places of their steps on the axis."""
    found = [(evaluation.step, evaluation.loss) for evaluation in run.documents.log.evaluations if evaluation.loss is not None]
    if not found:
        return []
    steps, losses = np.array(found, dtype=float).T
    at = kept(losses, _LEAST)
    return [Curve(f"{run.name} evaluation", np.interp(steps, run.documents.log.steps["step"], xs)[at], losses[at], run.colour, dots=True)]
