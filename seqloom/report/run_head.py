"""The top of a run's page: what runs, how far it is, and the six figures that are looked at first."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import quote

import numpy as np

from seqloom.report.markup import Markup, tag
from seqloom.report.run_documents import RunDocuments, text, value
from seqloom.report.run_events import moment
from seqloom.report.run_log import FINISH, START, STOP
from seqloom.report.text import count_text, duration, gib, number, percent, plural

_LAST = 50  # steps of which the throughput of now is the median
_STATES = {START: "starting", "run": "running", STOP: "stopped", FINISH: "finished"}


def run_state(documents: RunDocuments) -> str:
    """`starting`, `running`, `stopped` or `finished`, as far as the log says: a run that was killed leaves no word."""
    log, total = documents.log, documents.total_steps
    return "finished" if log.state == "run" and total and log.last_step >= total else _STATES[log.state]


def run_header(documents: RunDocuments) -> Markup:
    """Title, what runs, state with progress, key figures."""
    figures = list(_figures(documents))
    return tag(
        "header",
        tag("h1", f"Run {documents.name}"),
        [tag("p", line, class_="lede") for line in _ledes(documents)],
        _state(documents),
        tag("dl", (tag("div", tag("dt", name), tag("dd", told, tag("small", note))) for name, told, note in figures), class_="key six")
        if figures
        else None,
    )


def _ledes(documents: RunDocuments) -> Iterator[str]:
    """The model, then plan and machine in a line."""
    info, plan = documents.info, documents.plan
    parameters, tokens = value(info, "parameters"), value(info, "tokens_per_step")
    model = [text(info, "model_id"), f"{count_text(parameters)} parameters" if parameters else None]
    model += [f"{tokens:,.0f} tokens a step" if tokens else None, text(info, "precision")]
    if any(model):
        yield ", ".join(filter(None, model))
    ranks, machine = value(info, "ranks"), text(plan, "hardware") or text(info, "device")
    place = [plural(int(ranks), "rank") if ranks else None, f"{'on' if ranks else 'On'} {machine}" if machine else None]
    second = [text(info, "plan_line"), " ".join(filter(None, place))]
    if any(second):
        yield "; ".join(filter(None, second))


def _state(documents: RunDocuments) -> Markup:
    """The state in a word, steps done with a bar, and when the log was written last; the script of the page adds how long ago that is."""
    log, state, total = documents.log, run_state(documents), documents.total_steps
    done = f"step {log.last_step:,}" + (f" of {total:,}" if total else "") if log.count else "no step was made yet"
    last = log.last_time
    when = tag("span", "last record ", tag("time", f"{moment(last)} UTC", data_at=f"{last:.0f}")) if moment(last) else None
    bar = tag("progress", value=min(log.last_step, total), max=total, aria_label=f"{done}") if total else None
    link = tag("a", "the plan's page", href=quote(documents.plan_page)) if documents.plan_page else None
    told = tag("p", log.text, class_="muted said") if state == "stopped" and log.text else None
    return tag(
        "div",
        tag("p", tag("b", state, class_=f"badge {state}"), tag("span", done), when, link, class_="state"),
        bar,
        told,
        data_state=state,
    )


def _figures(documents: RunDocuments) -> Iterator[tuple[str, str, str]]:
    log, plan = documents.log, documents.plan
    if not log.count:
        return
    loss = log.steps["loss"]
    yield (
        "loss",
        f"{loss[-1]:.4f}" if np.isfinite(loss[-1]) else "not finite",
        f"{_mean(loss)} over {plural(len(loss[-_LAST:]), 'step')}",
    )
    known = [evaluation for evaluation in log.evaluations if evaluation.loss is not None]
    if known:
        best = min(known, key=lambda evaluation: evaluation.loss)
        yield "best evaluation", f"{best.loss:.4f}", f"after step {best.step:,}"
    for name, key, show in (("tokens/s/GPU", "tokens_per_s_per_gpu", number), ("MFU", "mfu_causal", percent)):
        recent = log.steps[key][-_LAST:]
        if np.isfinite(recent).any():
            predicted = value(plan, key)
            note = f"predicted {show(predicted)}" if predicted is not None else f"median of {plural(len(recent), 'step')}"
            yield name, show(float(np.nanmedian(recent))), note
    yield from _memory(documents)
    yield from _time_left(documents)


def _memory(documents: RunDocuments) -> Iterator[tuple[str, str, str]]:
    memory = documents.log.steps["memory_gib"]
    if not np.isfinite(memory).any():
        return
    peak, limit = float(np.nanmax(memory)), value(documents.plan, "memory_limit_gib")
    predicted = documents.predicted_memory_gib
    note = f"{percent(peak / limit)} of {gib(limit)}" if limit else f"predicted {gib(predicted)}" if predicted else "the fullest rank"
    yield "peak memory", gib(peak), note


def _time_left(documents: RunDocuments) -> Iterator[tuple[str, str, str]]:
    log = documents.log
    running, eta = float(log.seconds()[-1]), log.steps["eta_s"][-1]
    if run_state(documents) == "running" and np.isfinite(eta):
        yield "time left", duration(float(eta)), f"running for {duration(running)}"
    else:
        yield "time running", duration(running), f"{log.count:,} steps"


def _mean(loss: np.ndarray) -> str:
    recent = loss[-_LAST:]
    return f"{np.nanmean(recent):.4f}" if np.isfinite(recent).any() else "not finite"
