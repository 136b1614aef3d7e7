"""The look of the page: colours for light and dark, type, and the few rules that make it fit a phone.

Colours have names of what they show; tests hold them to the contrast that text (4.5) and marks (3) need on either background.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping

LIGHT = {
    "paper": "#fdfcf9",
    "raised": "#f5f3ec",
    "ink": "#23252a",
    "muted": "#62656c",
    "rule": "#dcd8cd",
    "forward": "#2f6294",
    "backward": "#628ab3",
    "link": "#b65f12",
    "host": "#2b7d72",
    "one": "#2f6294",
    "two": "#7b5aa6",
    "three": "#b65f12",
    "four": "#2b7d72",
    "five": "#8a8172",
    "six": "#a8445a",
    "limit": "#b02a37",
}
DARK = {
    "paper": "#15171b",
    "raised": "#1e2127",
    "ink": "#e4e2dc",
    "muted": "#a3a6ad",
    "rule": "#363a42",
    "forward": "#7fb0e0",
    "backward": "#527ba6",
    "link": "#e39a52",
    "host": "#58b8a9",
    "one": "#7fb0e0",
    "two": "#b398dc",
    "three": "#e39a52",
    "four": "#58b8a9",
    "five": "#a39a8b",
    "six": "#e08296",
    "limit": "#f0808a",
}
SERIES = ("one", "two", "three", "four", "five", "six")
"""Colours of parts that have no colour of their own, in order."""


def series(names: Iterable[str], known: Mapping[str, str]) -> dict[str, str]:
    """A colour for every name: its own, or one of the series that no other name here has."""
    names = list(names)
    free = itertools.cycle([colour for colour in SERIES if colour not in {known.get(name) for name in names}] or SERIES)
    return {name: known[name] if name in known else next(free) for name in names}


_RULES = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;color-scheme:light dark}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 "Iowan Old Style","Palatino Linotype",Palatino,Georgia,serif;
  overflow-wrap:anywhere}
main,header,footer{max-width:992px;margin:0 auto;padding:0 16px}
header{padding-top:40px}
h1{font-size:30px;line-height:1.15;font-weight:400;margin:0 0 4px}
h2{font-size:21px;font-weight:400;font-style:italic;margin:56px 0 4px}
h3{font-size:16px;font-weight:600;margin:28px 0 4px}
p{margin:4px 0 12px;max-width:66ch}
svg,table,dl,.bars,.legend,.readout,summary,.facts{font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
.lede{font-size:18px;color:var(--muted)}
.muted,figcaption{color:var(--muted)}
figure{margin:12px 0 24px}
figcaption{font-size:14px;max-width:66ch;margin-top:6px}
svg{display:block;width:100%;overflow:hidden;font-size:12px}
svg text{fill:var(--ink)} svg text.muted{fill:var(--muted)} svg text.strong{font-weight:600} svg text.limit{fill:var(--limit)}
svg .mono,td.mono,code{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
code{font-size:.88em}
svg .rule{stroke:var(--rule);stroke-width:1} svg .limit-line{stroke:var(--limit);stroke-width:1.5}
svg .band{fill:var(--raised)} svg .edge{fill:none;stroke:var(--muted);stroke-width:1.1;opacity:.75}
svg .ghost{fill:transparent} svg .curve{fill:none;stroke:var(--forward);stroke-width:1.4;vector-effect:non-scaling-stroke}
svg .area{stroke:var(--paper);stroke-width:.8;vector-effect:non-scaling-stroke} svg .faint{fill:var(--rule)}
[data-tip]:hover{filter:brightness(1.18)}
svg .ghost[data-tip]:hover,svg .row[data-tip]:hover .ghost{fill:var(--ink);fill-opacity:.07;filter:none}
svg .row[data-tip]:hover{filter:none}
.narrow{max-width:460px} .wide{display:none}
@media(min-width:860px){.wide{display:block}.narrow{display:none}}
dl.key{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:16px 24px;margin:28px 0 20px}
dl.key div{border-top:2px solid var(--ink);padding-top:6px}
dl.key dt{font-size:13px;color:var(--muted)} dl.key dd{margin:0;font-size:24px;line-height:1.25;font-variant-numeric:tabular-nums}
dl.key dd small{display:block;font-size:13px;color:var(--muted);line-height:1.35}
dl.facts{display:grid;grid-template-columns:auto 1fr;gap:2px 16px;font-size:14px;margin:0}
dl.facts dt{color:var(--muted)} dl.facts dd{margin:0}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:2px 20px;margin:8px 0 0;padding:0;font-size:13px}
.legend i{display:inline-block;width:11px;height:11px;margin-right:6px;border-radius:2px}
.legend b{font-weight:600;font-variant-numeric:tabular-nums;margin-left:4px}
.bars{list-style:none;margin:8px 0;padding:0;font-size:14px}
.bars li{display:grid;grid-template-columns:1fr auto;gap:0 16px;padding:5px 0;border-bottom:1px solid var(--rule)}
.scroll table{overflow-wrap:normal}
.bars .value{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.bars svg,.bars .note{grid-column:1/-1} .bars .note{color:var(--muted);font-size:13px}
.bars .chosen{font-weight:600} .bars .label{min-width:0}
.readout{min-height:2.9em;display:block;font-size:13px;line-height:1.4;color:var(--muted);margin-top:6px}
.plot{display:grid;grid-template-columns:56px 1fr}
.scroll{overflow-x:auto;max-width:100%}
table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums;width:100%}
th,td{text-align:left;padding:4px 12px 4px 0;border-bottom:1px solid var(--rule);vertical-align:baseline}
th{font-weight:600} th.n,td.n{text-align:right;white-space:nowrap} td.strip{width:30%;min-width:90px}
tr.group th{padding-top:16px;font-style:italic;font-weight:400;font-size:14px}
details{margin:16px 0} summary{cursor:pointer;font-size:14px;color:var(--muted);padding:6px 0}
a:focus-visible,summary:focus-visible,.scroll:focus-visible{outline:2px solid var(--forward);outline-offset:2px}
footer{margin-top:64px;padding-top:12px;padding-bottom:40px;font-size:13px;color:var(--muted)}
@media(max-width:560px){td.strip,th.strip{display:none}h1{font-size:25px}h2{margin-top:44px}}
@media print{.readout{display:none}}
"""


def stylesheet() -> str:
    """The whole stylesheet."""
    names = [name for name in LIGHT if name not in ("paper", "raised", "ink", "muted", "rule")]
    fills = "".join(f"svg .{name}{{fill:var(--{name})}}i.{name}{{background:var(--{name})}}" for name in names)
    return f":root{{{_variables(LIGHT)}}}@media(prefers-color-scheme:dark){{:root{{{_variables(DARK)}}}}}{fills}{_RULES}"


def _variables(colours: dict[str, str]) -> str:
    return "".join(f"--{name}:{value};" for name, value in colours.items())
