"""The loss of a run as a picture, for people who want a file to send: the page of the run shows more."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from seqloom.report.decimate import running_mean
from seqloom.report.run_log import LogReader

PLOT_FILE = "loss.png"


def plot_loss(folder: Path, title: str) -> Path:
    """Draw `loss.png` from `log.jsonl`: the loss of each step, its running mean, and the learning rate. Returns the file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = LogReader(folder).read().steps
    steps, values = columns["step"], columns["loss"]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    loss = figure.add_subplot()
    loss.plot(steps, values, color="tab:blue", linewidth=0.8, alpha=0.35)
    loss.plot(steps, running_mean(values, 1 + len(values) // 20, np.arange(len(values))), color="tab:blue", linewidth=1.6)
    loss.set(title=title, xlabel="step", ylabel="loss (nats per token)")
    loss.grid(alpha=0.3)
    rate = loss.twinx()
    rate.plot(steps, columns["lr"], color="tab:orange", linewidth=0.8, linestyle="--")
    rate.set_ylabel("learning rate", color="tab:orange")
    rate.set_ylim(bottom=0)
    path = folder / PLOT_FILE
    figure.savefig(path, dpi=120)
    return path
