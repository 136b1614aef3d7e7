"""The look of charts, and the script that tells the values at the place that is pointed at."""

from __future__ import annotations

from seqloom.report.style import SERIES

CHART_RULES = """
.chart :is(h2,h3) small{font-weight:400;font-style:normal;color:var(--muted);margin-left:8px;font-size:13px}
figure.chart{outline-offset:6px} figure.chart:focus-visible{outline:2px solid var(--forward)}
figure.chart svg[role=img]{touch-action:pan-y;cursor:crosshair;overflow:visible}
figure.chart h3{margin:16px 0 0} figure.chart .legend{margin:2px 0 4px}
.plot.both{grid-template-columns:56px 1fr 44px}
.wide-left .plot{grid-template-columns:80px 1fr}
.pair{display:grid;grid-template-columns:1fr;gap:0 32px}
.pair figure{margin:8px 0;min-width:0;display:grid;grid-template-rows:subgrid;grid-row:span 4;gap:0}
.pair h3{grid-row:1} .pair .legend{grid-row:2} .pair .plot{grid-row:3} .pair .readout{grid-row:4}
@media(min-width:760px){.pair{grid-template-columns:1fr 1fr}}
svg .line{fill:none;stroke-width:1.5;stroke-linejoin:round;vector-effect:non-scaling-stroke}
svg .line.thin{stroke-width:1;opacity:.42} svg .line.strong{stroke-width:2}
svg .line.dashed{stroke-dasharray:6 3}
svg .point{stroke:var(--paper);stroke-width:1}
svg .guide{stroke:var(--muted);stroke-width:1.2;stroke-dasharray:5 4}
svg .stem{stroke:var(--muted);stroke-width:1.2}
svg .stem.restart{stroke-dasharray:2 3}
svg .stem.spike,svg .stem.skipped{stroke:var(--limit);stroke-width:2.5} svg .stem.straggler{stroke:var(--three);stroke-width:2.5}
svg .cursor{stroke:var(--ink);stroke-width:1;opacity:.5;visibility:hidden} svg .dot{visibility:hidden;stroke:var(--paper);stroke-width:1.5}
svg .hit{fill:transparent} svg .lane{stroke:var(--rule);stroke-width:1}
.chart .readout{min-height:2.8em;margin-top:2px;font-variant-numeric:tabular-nums}
.chart .readout,figure.chart .legend{padding-left:56px} .wide-left .readout,.wide-left figure.chart .legend{padding-left:80px}
.legend i.bar{width:16px;height:3px;vertical-align:middle} .legend i.faded{opacity:.42}
.legend i.round{border-radius:50%;width:8px;height:8px} .legend i.limit-line{background:var(--limit)}
.legend i.tick{width:3px;height:11px;border-radius:0;vertical-align:-1px;background:var(--limit)}
.legend i.tick.restart{width:2px;background:repeating-linear-gradient(var(--muted) 0 2px,transparent 2px 4px)}
.legend i.guide{background:var(--muted)}
.legend i.guide,.legend i.dashed{-webkit-mask:repeating-linear-gradient(90deg,#000 0 5px,transparent 5px 8px);
mask:repeating-linear-gradient(90deg,#000 0 5px,transparent 5px 8px)}
@media(max-width:559px){.wide-left .plot{grid-template-columns:70px 1fr}.wide-left .readout{min-height:4.2em}
.chart .readout,figure.chart .legend,.wide-left .readout,.wide-left figure.chart .legend{padding-left:0}}
"""

CHART_SCRIPT = """
const charts = [...document.querySelectorAll("figure.chart")].filter(figure => figure.querySelector("script")).map(figure => {
  const data = JSON.parse(figure.querySelector("script").textContent);
  data.curves.forEach((curve, i) => curve.x = curve.x || data.curves[i - 1].x);
  const svg = figure.querySelector("svg[role=img]"), find = selector => [...svg.querySelectorAll(selector)];
  return {figure, data, svg, readout: figure.querySelector(".readout"), cursor: find(".cursor")[0], dots: find(".dot")};
});
const nearest = (values, x) => {
  let low = 0, high = values.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (values[middle] < x) low = middle; else high = middle;
  }
  return high > 0 && x - values[low] <= values[high] - x ? low : Math.max(high, 0);
};
const plain = value => {
  const size = Math.abs(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  return size && size < 1e-3 ? value.toExponential(2) : String(Number(value.toPrecision(4)));
};
const withUnit = (value, unit) => (unit === "%" ? value.toFixed(1) : plain(value)) + unit;
const place = (value, axis) => axis === "steps" ? "step " + Math.round(value).toLocaleString("en") : plain(value) + " " + axis;
const width = data => data.x[1] - data.x[0];
const share = (data, x) => Math.min(1, Math.max(0, (x - data.x[0]) / width(data)));
const height = (data, value) => {
  const [low, high, at] = [...data.y, Math.min(data.y[1], Math.max(data.y[0], value))].map(v => data.log ? Math.log(v) : v);
  return data.top + data.height * (1 - (at - low) / (high - low));
};
const tell = (chart, x, pointed) => {
  const {data, readout, cursor, dots} = chart, told = [];
  let dot = 0;
  for (const curve of data.curves) {
    const i = nearest(curve.x, x), shown = curve.factor !== undefined, mark = shown ? dots[dot++] : null;
    if (i < 0 || !curve.x.length) continue;
    const away = Math.abs(curve.x[i] - x) > 0.015 * width(data);
    told.push(`${curve.name} ${withUnit(curve.y[i], curve.unit)}${away ? ` at ${place(curve.x[i], data.axis)}` : ""}`);
    if (!mark) continue;
    mark.setAttribute("cx", 100 * share(data, curve.x[i]) + "%");
    mark.setAttribute("cy", height(data, curve.y[i] / curve.factor));
    mark.style.visibility = pointed && !away ? "visible" : "hidden";
  }
  const near = pointed ? data.marks.filter(mark => Math.abs(mark.x - x) <= 0.006 * width(data)).slice(0, 2) : [];
  readout.textContent = [`${place(x, data.axis)}: ${told.join(", ")}`, ...near.map(mark => mark.text)].join("; ");
  for (const end of ["x1", "x2"]) cursor.setAttribute(end, 100 * share(data, x) + "%");
  cursor.style.visibility = pointed ? "visible" : "hidden";
};
const alike = (one, other) => one.data.axis === other.data.axis && one.data.x[0] === other.data.x[0] && one.data.x[1] === other.data.x[1];
const tellAll = (chart, x, pointed) => {
  chart.at = pointed ? x : null;
  for (const other of charts) if (alike(chart, other)) tell(other, x, pointed);
};
const longest = chart => chart.data.curves.reduce((best, curve) => curve.x.length > best.length ? curve.x : best, []);
for (const chart of charts) {
  const xs = longest(chart), end = chart.data.x[1];
  if (!xs.length) continue;
  const at = event => {
    const box = chart.svg.getBoundingClientRect(), x = chart.data.x[0] + (event.clientX - box.left) / box.width * width(chart.data);
    tellAll(chart, xs[nearest(xs, x)], true);
  };
  chart.svg.addEventListener("pointermove", at);
  chart.svg.addEventListener("pointerdown", at);
  chart.svg.addEventListener("pointerleave", event => { if (event.pointerType === "mouse") tellAll(chart, end, false); });
  chart.figure.addEventListener("keydown", event => {
    const by = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (!by) return;
    event.preventDefault();
    const now = chart.at == null ? xs.length - 1 : nearest(xs, chart.at) + by;
    tellAll(chart, xs[Math.min(xs.length - 1, Math.max(0, now))], true);
  });
  tell(chart, xs[nearest(xs, end)], false);
}
"""
"""What is pointed at in one chart is told below all charts over the same axis; before that, each tells its newest values."""


def chart_rules() -> str:
    """The stylesheet of charts, with a line in every colour."""
    return CHART_RULES + "".join(f"svg .line.{name}{{stroke:var(--{name})}}" for name in SERIES)
