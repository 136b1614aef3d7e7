"""What a segment does with its activations between forward and backward: the modes, and what each replays and keeps.

Role in the pipeline: `problem.py` decides how many of a block's identical layers run each mode, `plan.py` lays them out, the emitter
writes them. From the first layer to the last the modes come in the order of `ORDER`: what must be brought back for backward lies in the
early layers, whose backward comes last, when the layers behind them are free again.

| mode | on the device for backward | replayed in backward |
|---|---|---|
| keep | what autograd saves | nothing |
| selective | the segment's inputs and those matrix products that autograd saves | the rest, up to the last saved tensor |
| recompute | the segment's inputs | everything up to the last saved tensor; with tiles one stretch of the sequence after the other |
| spill | nothing: the segment's inputs lie in host memory | everything, with tiles one stretch of the sequence after the other |
| offload | nothing: what autograd saves lies in host memory | nothing |

Selective recomputation follows Korthikanti et al. 2022 (arXiv:2205.05198, section 5), tiles over the sequence Bekman et al. 2025
(arXiv:2506.13996, "Arctic long sequence training"), section 3.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Literal, NamedTuple

from seqloom.ops.saved import saved_for_backward
from seqloom.plan.clusters import Cluster, DimClass
from seqloom.plan.price import MATMULS
from seqloom.plan.regions import Region

Kind = Literal["offload", "spill", "recompute", "selective", "keep"]
ORDER: tuple[Kind, ...] = ("offload", "spill", "recompute", "selective", "keep")
HOST: tuple[Kind, ...] = ("offload", "spill")  # what waits for backward in host memory
TILES = (4, 16)


class Mode(NamedTuple):
    """One way to treat a segment; `tiles` is 1 but where it is replayed in tiles of the sequence."""

    kind: Kind
    tiles: int = 1

    def __str__(self) -> str:
        return self.kind if self.tiles == 1 else f"{self.kind} in {self.tiles} tiles"


KEEP, SELECTIVE, RECOMPUTE, OFFLOAD = Mode("keep"), Mode("selective"), Mode("recompute"), Mode("offload")
Counts = tuple[tuple[Mode, int], ...]  # modes of a segment in layer order with their numbers of layers, none of them 0


def segment_modes(region: Region, segment: int, recompute: bool | None, offload: bool) -> tuple[Mode, ...]:
    """Modes that a segment may run. `recompute`: None for all that make sense, False for none, True for nothing else where possible."""
    span = region.segments[segment]
    if recompute and span.recomputable:
        return (RECOMPUTE,)
    replay: list[Mode] = []
    if recompute is None and span.recomputable:
        tiles = (1, *(TILES if tile_dims(region, segment) is not None else ()))
        replay = [*([SELECTIVE] if kept_matmuls(region, segment) else []), *(Mode("recompute", count) for count in tiles)]
        replay += [Mode("spill", count) for count in tiles] if offload else []
    return (KEEP, *replay, *([OFFLOAD] if offload else []))


def in_order(counts: Sequence[tuple[Mode, int]]) -> Counts:
    """The modes that are used, in layer order."""
    return tuple(sorted(((m, n) for m, n in counts if n), key=lambda pair: (ORDER.index(pair[0].kind), pair[0].tiles)))


def scaled(counts: Counts, layers: int) -> Counts:
    """The same modes for another number of layers, every used mode with a layer of its own as long as there are enough."""
    total = sum(n for _, n in counts)
    if total == layers:
        return counts
    left = {mode: max(1, n * layers // total) for mode, n in counts[-layers:]}
    widest = max(left, key=lambda mode: left[mode])
    while sum(left.values()) != layers:
        step = 1 if sum(left.values()) < layers else -1
        if step < 0:
            widest = max(left, key=lambda mode: left[mode])
        left[widest] += step
    return tuple(left.items())


def mode_of_layer(counts: Counts, layer: int) -> Mode:
    """The mode of one layer."""
    for mode, count in counts:
        if layer < count:
            return mode
        layer -= count
    raise IndexError(layer)


def saves(region: Region, part: Cluster) -> bool:
    """Whether autograd saves anything (weights included) for a cluster."""
    values = region.graph.values
    return any(
        any(values[out].requires_grad for out in node.outputs) and saved_for_backward(node.op, node.args, dict(node.kwargs), values)
        for node in part.nodes
    )


def replays(region: Region, index: int, mode: Mode) -> bool:
    """Whether the forward of a cluster runs again under a mode of its segment."""
    segment = region.segment_of(index)
    if segment is None or mode.kind in ("keep", "offload"):
        return False
    if mode.kind == "spill":
        return True
    return index in replayed(region, segment) and not (mode.kind == "selective" and index in kept_matmuls(region, segment))


def replayed(region: Region, segment: int) -> tuple[int, ...]:
    """Clusters whose forward runs again when the segment is recomputed.

    PyTorch's checkpoint stops as soon as the last tensor is saved again, and a matrix product saves its operands before it computes:
    a last projection is not computed twice.
    """
    return _replayed(_Key(region, segment))


def reached(region: Region, segment: int) -> tuple[int, ...]:
    """Clusters whose inputs are needed when the segment is recomputed: the replayed ones and the matrix product at which it stops."""
    return _reached(_Key(region, segment))


def kept_matmuls(region: Region, segment: int) -> tuple[int, ...]:
    """Clusters of the segment that `selective` keeps: matrix products whose result another cluster of the segment saves."""
    return _kept_matmuls(_Key(region, segment))


def tile_dims(region: Region, segment: int) -> tuple[tuple[int | None, ...], tuple[int, ...]] | None:
    """Dimension of each input (None: passed whole) and output of the segment that tiles cut, or None where the sequence can not be cut."""
    return _tile_dims(_Key(region, segment))


def tile_class(region: Region, part: Cluster) -> DimClass | None:
    """The class of a cluster that runs along the sequence."""
    kinds = ("parameter", "buffer")
    for option in part.classes:
        if any(region.labels[name][dim] == "l" for name, dim in option.dims.items() if region.graph.values[name].kind not in kinds):
            return option
    return None


class _Key:
    """A region and a segment as a cache key: regions are large and never change."""

    def __init__(self, region: Region, segment: int) -> None:
        self.region, self.segment = region, segment

    def __hash__(self) -> int:
        return hash((id(self.region), self.segment))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and other.region is self.region and other.segment == self.segment


@cache
def _reached(key: _Key) -> tuple[int, ...]:
    span = key.region.segments[key.segment]
    savers = [index for index in range(span.start, span.stop) if saves(key.region, key.region.parts[index])]
    return tuple(range(span.start, savers[-1] + 1)) if savers else ()


@cache
def _replayed(key: _Key) -> tuple[int, ...]:
    found = _reached(key)
    last_is_product = bool(found) and key.region.parts[found[-1]].nodes[0].op in MATMULS
    return found[:-1] if last_is_product else found


@cache
def _kept_matmuls(key: _Key) -> tuple[int, ...]:
    region, span = key.region, key.region.segments[key.segment]
    inside = range(span.start, span.stop)
    if any(":" in node.op for index in inside for node in region.parts[index].nodes):
        return ()  # a registered function may do matrix products of its own: they could not be told apart by counting
    needed = {name for index in inside for name in _saved_names(region, region.parts[index])}
    again = _replayed(key)
    return tuple(i for i in inside if i in again and region.parts[i].nodes[0].op in MATMULS and region.parts[i].outputs[0] in needed)


def _saved_names(region: Region, part: Cluster) -> set[str]:
    found = set()
    for node in part.nodes:
        for side, index in saved_for_backward(node.op, node.args, dict(node.kwargs), region.graph.values):
            if side != "like_input":
                found.add((node.outputs if side == "output" else node.inputs)[index])
    return found


@cache
def _tile_dims(key: _Key) -> tuple[tuple[int | None, ...], tuple[int, ...]] | None:
    region, span = key.region, key.region.segments[key.segment]
    labels, values = region.labels, region.graph.values
    if not span.recomputable:
        return None
    for part in region.parts[span.start : span.stop]:
        along = tile_class(region, part)
        activations = [name for name in part.values if values[name].kind not in ("parameter", "buffer")]
        if along is None or along.reduced or along.start or any(along.dims.get(name) != _l(labels[name]) for name in activations):
            return None
    inputs = tuple(_l(labels[name]) for name in span.inputs)
    outputs = tuple(_l(labels[name]) for name in span.outputs)
    trained = [dim for name, dim in zip(span.inputs, inputs, strict=True) if values[name].requires_grad]
    return None if None in outputs or None in trained or not trained else (inputs, outputs)


def _l(letters: Sequence[str]) -> int | None:
    return letters.index("l") if "l" in letters else None
