"""How a block calls its segments: each mode (`seqloom/plan/modes.py`) is one way to write the call.

| mode | call |
|---|---|
| keep | `self.mlp(x)` |
| recompute | `checkpoint(self.mlp, x, use_reentrant=False)` |
| recompute in tiles | `checkpoint_tiles(self.mlp, x, tiles=4, in_dims=(1,), out_dims=(1,))` |
| selective | `selective(self.mlp, x, kept=(0, 1))` |
| spill | `spill(self.mlp, x)`, in tiles as above |
| offload | `offload(self.mlp, x)` |

Where layers differ, the class is told its layer and remembers which modes are its own: `self.offload_mlp = layer < 4`. In: the plain calls
of a block's forward. Out: the same with their modes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from seqloom.plan.clusters import Cluster
from seqloom.plan.modes import KEEP, Mode, kept_matmuls, tile_dims
from seqloom.plan.plan import PlannedRegion, PlannedSegment
from seqloom.plan.price import MATMULS

COUNTED = (*MATMULS, "aten.bmm.default", "aten.addmm.default")  # what `selective` counts
IMPORTS = {
    "checkpoint_tiles(": ("seqloom.runtime.tiles", "checkpoint_tiles"),
    "selective(": ("seqloom.runtime.selective", "selective"),
    "offload(": ("seqloom.runtime.offload", "offload"),
    "spill(": ("seqloom.runtime.spill", "spill"),
    "axis_rank(": ("seqloom.runtime.mesh", "axis_rank"),
    "axis_group(": ("seqloom.runtime.mesh", "axis_group"),
}
"""Text of a call -> the module and the name that it needs."""


def method_name(planned: PlannedRegion, segment: PlannedSegment) -> str:
    """A method must not hide a submodule of the same name."""
    children = {str(v.fqn).split(".")[0] for v in planned.region.graph.of_kind("parameter")}
    name = segment.segment.name
    return f"{name}_forward" if name in children or name == "forward" else name


def mixed(planned: PlannedRegion) -> bool:
    """Whether the layers of a block differ in some mode."""
    return any(len(segment.modes) > 1 for segment in planned.segments)


def block_title(planned: PlannedRegion) -> str:
    """What the class is and what its segments do, as a sentence."""
    count = planned.region.count
    head = f"One of {count} identical blocks" if count > 1 else "One block"
    told = [f"{segment.segment.name} {_told(segment)}" for segment in planned.segments if segment.modes != ((KEEP, count),)]
    return f"{head}; {', '.join(told)}." if told else f"{head}; everything is kept for backward."


_PARTICIPLES = {
    "keep": "kept",
    "selective": "recomputed but for its matrix products",
    "recompute": "recomputed",
    "spill": "recomputed from the host",
    "offload": "offloaded",
}


def _told(segment: PlannedSegment) -> str:
    """`recomputed`, or `offloaded in the first 4 layers, kept in the last 28`."""
    if len(segment.modes) == 1:
        return _participle(segment.modes[0][0])
    places = [
        f"the first {segment.modes[0][1]} layers",
        *(f"the next {n}" for _, n in segment.modes[1:-1]),
        f"the last {segment.modes[-1][1]}",
    ]
    return " and ".join(f"{_participle(mode)} in {place}" for (mode, _), place in zip(segment.modes, places, strict=True))


def _participle(mode: Mode) -> str:
    return _PARTICIPLES[mode.kind] + (f" in {mode.tiles} tiles" if mode.tiles > 1 else "")


def mode_lines(planned: PlannedRegion) -> list[str]:
    """`self.offload_mlp = layer < 4` for every segment whose layers differ."""
    lines = []
    for segment in planned.segments:
        until = 0
        for mode, layers in segment.modes[:-1]:
            until += layers
            lines.append(f"self.{_flag(segment, mode)} = layer < {until}")
    return lines


def _flag(segment: PlannedSegment, mode: Mode) -> str:
    return f"{mode.kind}_{segment.segment.name}"


def with_modes(planned: PlannedRegion, lines: Sequence[str]) -> list[str]:
    """The plain calls of a forward with the modes of their segments; a choice between modes takes the lines of an `if`."""
    methods = {method_name(planned, segment): segment for segment in planned.segments}
    done: list[str] = []
    for line in lines:
        match = re.fullmatch(r"(.*?)self\.(\w+)\((.*)\)", line)
        if not match or match[2] not in methods:
            done.append(line)
            continue
        head, method, arguments = match.groups()
        segment = methods[method]
        calls = [head + _call(planned, segment, mode, method, arguments) for mode, _ in segment.modes]
        for index, ((mode, _), call) in enumerate(zip(segment.modes[:-1], calls[:-1], strict=True)):
            done += [f"{'if' if index == 0 or head == 'return ' else 'elif'} self.{_flag(segment, mode)}:", f"    {call}"]
        done += [calls[-1]] if len(calls) == 1 or head == "return " else ["else:", f"    {calls[-1]}"]
    return done


def _call(planned: PlannedRegion, segment: PlannedSegment, mode: Mode, method: str, arguments: str) -> str:
    if mode.kind == "keep":
        return f"self.{method}({arguments})"
    if mode.kind == "offload":
        return f"offload(self.{method}, {arguments})"
    inputs, outputs = (tile_dims(planned.region, segment.index) if mode.tiles > 1 else None) or ((), ())
    tiles = f", tiles={mode.tiles}, in_dims={inputs!r}, out_dims={outputs!r}" if mode.tiles > 1 else ""
    if mode.kind == "spill":
        return f"spill(self.{method}, {arguments}{tiles})"
    if tiles:
        return f"checkpoint_tiles(self.{method}, {arguments}{tiles})"
    if mode.kind == "selective":
        return f"selective(self.{method}, {arguments}, kept={tuple(_ordinals(planned, segment))!r})"
    return f"checkpoint(self.{method}, {arguments}, use_reentrant=False)"


def _ordinals(planned: PlannedRegion, segment: PlannedSegment) -> list[int]:
    """Places of the kept matrix products among those of the segment."""
    counted = [c.cluster.name for c in segment.clusters if _is_product(c.cluster)]
    return [counted.index(planned.region.parts[index].name) for index in kept_matmuls(planned.region, segment.index)]


def _is_product(cluster: Cluster) -> bool:
    return cluster.nodes[0].op in COUNTED
