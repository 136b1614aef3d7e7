"""The charts of a run over its steps: loss, gradient norm, learning rate, throughput and MFU, step time, memory, waiting for data.

In: `RunDocuments`. Out: figures. A curve has at most `POINTS` points, and what is least and greatest anywhere is among them. A chart that
the log has no numbers for is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from seqloom.report.axes import Format, Scale, percents, scale_of, span
from seqloom.report.chart import Chart, Curve, Guide, Mark, chart_figure
from seqloom.report.decimate import kept, running_mean
from seqloom.report.markup import Markup, tag
from seqloom.report.run_documents import RunDocuments, value
from seqloom.report.run_log import RESTART, SKIPPED, SPIKE, STRAGGLER, LoggedRun
from seqloom.report.text import gib, number

POINTS, MARKS = 1000, 120
_FAR = 4.0  # a prediction further than this many times above what was measured is told in the table, not drawn


def charts_section(documents: RunDocuments) -> Markup | None:
    """All charts; nothing before the first step."""
    log = documents.log
    if not log.count:
        return None
    x = steps_scale(log)
    small = (_gradient_norm, _learning_rate, _throughput, _step_time, _memory, _data_wait)
    charts = [chart for chart in (make(documents) for make in small) if chart is not None]
    return tag(
        "div",
        tag("div", chart_figure(loss_chart(documents), x, "h2"), class_="wide-left"),
        tag("div", [chart_figure(chart, x) for chart in charts], class_="pair"),
    )


def steps_scale(log: LoggedRun) -> Scale:
    """From the first step of the log to the last."""
    return span([log.steps["step"]])


def loss_chart(documents: RunDocuments) -> Chart:
    """The loss of every step, its running mean, and evaluations."""
    log = documents.log
    steps, loss = log.steps["step"], log.steps["loss"]
    at = kept(loss, POINTS)
    mean = running_mean(loss, 1 + log.count // 20, at)
    found = [(evaluation.step, evaluation.loss) for evaluation in log.evaluations if evaluation.loss is not None]
    evaluated = np.array(found, dtype=float).reshape(-1, 2)
    evaluated = evaluated[kept(evaluated[:, 1], POINTS // 5)]
    curves = [Curve("loss", steps[at], loss[at], look="thin"), Curve("running mean", steps[at], mean, look="strong")]
    legend = [("each step", "one bar faded"), (f"mean of {1 + log.count // 20:,}" if log.count > 20 else "mean", "one bar")]
    if len(evaluated):
        curves.append(Curve("evaluation", evaluated[:, 0], evaluated[:, 1], "three", dots=True))
        legend.append(("evaluation", "three round"))
    marks = marks_of(log, RESTART, SPIKE, SKIPPED)
    legend += [(kind, f"tick {kind}") for kind in dict.fromkeys(mark.kind for mark in marks)]
    return Chart(
        "Loss",
        "nats per token",
        f"{_from_to(loss)}{f'; evaluation {_from_to(evaluated[:, 1])}' if len(evaluated) else ''}",
        curves,
        scale_of([loss, evaluated[:, 1]], log=True),
        marks=marks,
        height=250,
        legend=legend,
    )


def marks_of(log: LoggedRun, *kinds: str) -> list[Mark]:
    """Events of these kinds within the steps of the log, one for each of MARKS places at most and restarts foremost."""
    x, places = steps_scale(log), {}
    for event in log.events:
        if event.kind in kinds and x.low <= event.step <= x.high:
            key = (event.kind, int(float(x.place(event.step)) * MARKS))
            places[key] = Mark(event.step, event.kind, f"{event.kind}: {event.text}" if event.text else event.kind)
    return sorted(places.values(), key=lambda mark: mark.kind != RESTART)


def _gradient_norm(documents: RunDocuments) -> Chart | None:
    values = documents.log.steps["grad_norm"]
    return _chart(documents, "Gradient norm", "", "gradient norm", values, scale_of([values], log=True), kinds=(RESTART, SPIKE, SKIPPED))


def _learning_rate(documents: RunDocuments) -> Chart | None:
    values = documents.log.steps["lr"]
    return _chart(documents, "Learning rate", "", "learning rate", values, scale_of([values], zero=True))


def _throughput(documents: RunDocuments) -> Chart | None:
    """Tokens a second, with MFU as a second scale where it is always the same share of them."""
    steps = documents.log.steps
    values, mfu = steps["tokens_per_s_per_gpu"], steps["mfu_causal"]
    guides = _predicted(value(documents.plan, "tokens_per_s_per_gpu"), values, number)
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = (mfu / values)[np.isfinite(mfu / values)]
    right = None
    if shares.size and shares.max() <= shares.min() * 1.001 and shares.max() > 0:
        right = (float(np.median(shares)), percents)
    unit = "tokens/s/GPU; MFU on the right" if right else "tokens per second and GPU"
    scale = scale_of([values, _values(guides)], zero=True)
    extra = [("MFU", mfu, "%", 100.0)] if np.isfinite(mfu).any() else []
    return _chart(documents, "Throughput", unit, "tokens/s/GPU", values, scale, guides, (RESTART, STRAGGLER), extra=extra, right=right)


def _step_time(documents: RunDocuments) -> Chart | None:
    values = documents.log.steps["step_time_s"]
    guides = _predicted(value(documents.plan, "step_time_s"), values, lambda seconds: f"{number(seconds)} s")
    scale = scale_of([values, _values(guides)], zero=True)
    return _chart(documents, "Step time", "seconds", "step time", values, scale, guides, (RESTART, STRAGGLER), unit=" s")


def _memory(documents: RunDocuments) -> Chart | None:
    values, unit = documents.log.steps["memory_gib"], "GiB of the process" if documents.on_cpu else "GiB"
    predicted, limit = documents.predicted_memory_gib, value(documents.plan, "memory_limit_gib")
    guides = [] if predicted is None else [Guide(predicted, f"predicted {gib(predicted)}")]
    guides += [] if limit is None else [Guide(limit, f"limit {gib(limit)}", "limit-line")]
    scale = scale_of([values, _values(guides)], zero=True)
    return _chart(documents, "Peak memory", f"{unit}, the fullest rank", "memory", values, scale, guides, unit=" GiB")


def _data_wait(documents: RunDocuments) -> Chart | None:
    steps = documents.log.steps
    with np.errstate(divide="ignore", invalid="ignore"):
        values = steps["data_wait_s"] / steps["step_time_s"]
    values = np.where(np.isfinite(values), values, np.nan)
    scale = scale_of([values, np.array([0.01])], zero=True)
    return _chart(documents, "Waiting for data", "share of the step", "waiting", values, scale, unit="%", factor=100.0)


def _chart(
    documents: RunDocuments,
    title: str,
    told_unit: str,
    name: str,
    values: np.ndarray,
    y: Scale,
    guides: Sequence[Guide] = (),
    kinds: Sequence[str] = (RESTART,),
    extra: Iterable[tuple[str, np.ndarray, str, float]] = (),
    right: tuple[float, Format] | None = None,
    unit: str = "",
    factor: float = 1.0,
) -> Chart | None:
    """A chart of one curve; `extra` curves are only read out: name, values, unit, factor. None where there is no value."""
    log = documents.log
    at = kept(values, POINTS)
    if not len(at):
        return None
    steps = log.steps["step"]
    others = [Curve(other, steps[at], np.nan_to_num(found[at]), hidden=True, unit=sign, factor=by) for other, found, sign, by in extra]
    return Chart(
        title,
        told_unit,
        "; ".join([_from_to(values * factor, unit), *(guide.text for guide in guides)]),
        [Curve(name, steps[at], values[at], unit=unit, factor=factor), *others],
        y,
        guides,
        marks_of(log, *kinds),
        format=percents if unit == "%" else Chart.format,
        right=right,
    )


def _predicted(predicted: float | None, values: np.ndarray, show: Callable[[float], str]) -> list[Guide]:
    """A guide at what was predicted, unless it lies so far above that the curve would be flat."""
    known = values[np.isfinite(values)]
    if predicted is None or not known.size or predicted > _FAR * known.max():
        return []
    return [Guide(predicted, f"predicted {show(predicted)}")]


def _values(guides: Iterable[Guide]) -> np.ndarray:
    return np.array([guide.value for guide in guides], dtype=float)


def _from_to(values: np.ndarray, unit: str = "") -> str:
    """First, last, lowest and highest in words."""
    known = values[np.isfinite(values)]
    if not known.size:
        return "no number"
    ends = f"from {number(known[0])}{unit} to {number(known[-1])}{unit}"
    return f"{ends}, lowest {number(known.min())}{unit}, highest {number(known.max())}{unit}"
