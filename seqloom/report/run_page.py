"""`report.html`: a training run for people, in one file that needs no network.

In: a run's folder with `log.jsonl` and `run.json`. Out: the page beside them, the same bytes for the same files. It may be written while
the run goes on: a page of 100,000 steps takes about a second, and much less with a `LogReader` that has read the beginning.
"""

from __future__ import annotations

from pathlib import Path

from seqloom.report.chart_script import CHART_SCRIPT, chart_rules
from seqloom.report.markup import Markup, tag
from seqloom.report.page import html_page, write_whole
from seqloom.report.run_charts import charts_section
from seqloom.report.run_documents import RunDocuments, read_run
from seqloom.report.run_events import events_section
from seqloom.report.run_head import run_header, run_state
from seqloom.report.run_log import LogReader
from seqloom.report.run_tables import numbers_section, predicted_section, settings_section
from seqloom.report.text import plural

PAGE = "report.html"
SECTIONS = (charts_section, events_section, predicted_section)
TABLES = (numbers_section, settings_section)
_RULES = """
p.state{display:flex;flex-wrap:wrap;gap:2px 18px;align-items:baseline;max-width:none;font-size:14px;color:var(--muted);margin:16px 0 6px;
  font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;font-variant-numeric:tabular-nums}
p.state a{color:var(--forward)}
.badge{font-weight:600;color:var(--ink)} .badge::before{content:"";display:inline-block;width:9px;height:9px;border-radius:50%;
  margin-right:7px;background:var(--forward)}
.badge.finished::before{background:var(--host)}
.badge.stopped::before{background:var(--link)} .badge.starting::before{background:var(--five)}
progress{appearance:none;-webkit-appearance:none;display:block;width:100%;height:5px;border:0;background:var(--rule)}
progress::-webkit-progress-bar{background:var(--rule)} progress::-webkit-progress-value{background:var(--forward)}
progress::-moz-progress-bar{background:var(--forward)}
p.said{font-size:14px;margin-top:8px}
dl.key.six{grid-template-columns:repeat(auto-fit,minmax(136px,1fr));margin-bottom:8px}
figure.lanes svg.over{overflow:visible} td.when{white-space:nowrap;color:var(--muted)}
.lede+.lede{margin-top:-10px} h2+figure.lanes{margin-top:16px}
"""
_SCRIPT = """
const stamp = document.querySelector("time[data-at]");
const age = () => {
  const seconds = Math.max(0, Date.now() / 1000 - stamp.dataset.at);
  const [size, unit] = [[86400, "day"], [3600, "hour"], [60, "minute"], [1, "second"]].find(([size]) => seconds >= size) || [1, "second"];
  const count = Math.floor(seconds / size);
  return `${count} ${unit}${count === 1 ? "" : "s"} ago`;
};
if (stamp) {
  const told = document.createElement("span");
  told.className = "age";
  stamp.after(told);
  const tick = () => told.textContent = ` (${age()})`;
  tick();
  setInterval(tick, 5000);
}
const alive = ["running", "starting"].includes(document.querySelector("[data-state]").dataset.state);
let used = 0;
for (const kind of ["pointermove", "pointerdown", "keydown", "scroll"]) addEventListener(kind, () => used = Date.now(), {passive: true});
if (alive) setInterval(() => {
  if (!document.hidden && !document.querySelector("details[open]") && Date.now() - used > 20000) location.reload();
}, 30000);
"""
"""How old the newest record is; and while the run goes on, the page loads itself again when nobody is reading in it."""


def write_run_page(run_folder: Path, reader: LogReader | None = None) -> Path:
    """Write `report.html` of a run and return its path. A page that is there is replaced in one move, so it may be open meanwhile.

    `reader` is a `LogReader` of this folder: who writes the page repeatedly keeps one, and each line of the log is parsed once.
    Raises `UserError` where the folder holds no run, `run.json` is damaged, or the page cannot be written.
    """
    return write_whole(run_folder / PAGE, run_page(read_run(run_folder, reader)))


def run_page(documents: RunDocuments) -> str:
    """The whole page."""
    return html_page(
        f"Run {documents.name}: {run_state(documents)}",
        run_header(documents),
        tag("main", _nothing_yet(documents), (make(documents) for make in SECTIONS), tag("section", (make(documents) for make in TABLES))),
        _footer(documents),
        style=_RULES + chart_rules(),
        script=CHART_SCRIPT + _SCRIPT,
    )


def _nothing_yet(documents: RunDocuments) -> Markup | None:
    return None if documents.log.count else tag("p", "No step was made yet: the charts begin with the first one.")


def _footer(documents: RunDocuments) -> Markup:
    """What the page was made of."""
    damaged = documents.log.damaged
    sentence = "Made from log.jsonl and run.json."
    if damaged:
        sentence += f" {plural(damaged, 'line')} of the log could not be read: a run that is killed may leave half a line."
    return tag("footer", sentence)
