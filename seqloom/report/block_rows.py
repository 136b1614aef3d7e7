"""The rows of a block as the picture needs them: operators and reshards, who feeds whom, and the segments they lie in.

In: `blocks[block]` and `segments[block]` of a plan. Out: `Picture`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from seqloom.report.text import join_words, seconds, strategy_text, words

MODES = ("offload", "recompute", "selective", "keep")
"""What becomes of a segment's activations, in the order in which the layers take it."""
MODE_WORDS = {"offload": "offloaded to the host", "recompute": "recomputed", "selective": "recomputed in part", "keep": "kept"}


@dataclass(frozen=True)
class Row:
    """An operator or a reshard: seconds of one call, and one sentence with all of it."""

    name: str
    split: str
    is_reshard: bool
    forward_s: float
    backward_s: float
    tip: str


@dataclass(frozen=True)
class Segment:
    """A stretch of rows and the number of layers by mode; without modes it is kept and there is nothing to say."""

    name: str
    first: int
    last: int
    layers: tuple[tuple[str, int], ...]
    sentence: str


@dataclass(frozen=True)
class Picture:
    """A block: rows in order, edges (from row, to row), segments."""

    rows: tuple[Row, ...]
    edges: tuple[tuple[int, int], ...]
    segments: tuple[Segment, ...]

    @property
    def seconds(self) -> float:
        """Forward and backward of one call."""
        return sum(row.forward_s + row.backward_s for row in self.rows)

    @property
    def layers(self) -> int:
        """How many blocks are alike; 1 where no segment says."""
        return max((sum(count for _, count in segment.layers) for segment in self.segments), default=1) or 1


def read_picture(rows: Sequence[Mapping[str, Any]], segments: Mapping[str, Mapping[str, Any]]) -> Picture:
    """A block of a plan."""
    return Picture(tuple(map(_row, rows)), tuple(_edges(rows)), tuple(_segments(rows, segments)))


def collective(source: str, target: str) -> str:
    """The collectives between two layouts such as `S(1) R`, one word an axis: what the runtime would call."""
    moves = [_move(a, b) for a, b in zip(source.split(), target.split(), strict=False) if a != b]
    return " + ".join(dict.fromkeys(moves)) or "nothing"


def _move(source: str, target: str) -> str:
    pair = source[0] + target[0]
    names = {"SS": "all-to-all", "PS": "reduce-scatter", "PR": "all-reduce", "PB": "all-reduce", "RB": "sum of gradients"}
    if pair in ("SR", "SB"):
        return "all-gather"
    if pair in ("RS", "BS"):
        return "slice"
    return names.get(pair, f"{source} to {target}")


def _row(row: Mapping[str, Any]) -> Row:
    cost = f"forward {seconds(row['forward_s'])}, backward {seconds(row['backward_s'])}"
    if "reshard" in row:
        kind = collective(row["from"], row["to"])
        name, split = f"{kind} of {row['reshard']}", f"{row['from']} \u2192 {row['to']}"
        return Row(name, split, True, row["forward_s"], row["backward_s"], f"{name}, {split}; {cost}")
    split = strategy_text(row["strategy"])
    constants = ", ".join(f"{name} {value}" for name, value in row.get("constants", {}).items())
    layouts = ", ".join(f"{name} {layout}" for name, layout in row["placements"].items())
    tip = f"{row['operator']}, split {split}; {cost}; {f'{constants}; ' if constants else ''}{layouts}"
    return Row(row["operator"], split, False, row["forward_s"], row["backward_s"], tip)


def _edges(rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, int]]:
    """An operator is fed by the rows that made or moved its inputs; values are known by the operator that is named after them."""
    made: dict[str, int] = {}
    moved: dict[tuple[str, str], int] = {}
    edges = []
    for index, row in enumerate(rows):
        if "reshard" in row:
            if row["reshard"] in made:
                edges.append((made[row["reshard"]], index))
            moved[row["reshard"], row["to"]] = index
            continue
        for value, layout in row["placements"].items():
            source = moved.get((value, layout), made.get(value))
            if source is not None:
                edges.append((source, index))
        made.update(dict.fromkeys((value for value in row["placements"] if _is_output(row, value)), index))
    return edges


def _is_output(row: Mapping[str, Any], value: str) -> bool:
    """Placements name the inputs before the outputs, and an operator is named after an output: that one and those behind it."""
    names = list(row["placements"])
    return row["operator"] in names and names.index(value) >= names.index(row["operator"])


def _segments(rows: Sequence[Mapping[str, Any]], modes: Mapping[str, Mapping[str, Any]]) -> list[Segment]:
    """Segments in order. A reshard belongs to the operator behind it, the last ones to the last segment."""
    names: list[str] = []
    following = next((row["segment"] for row in reversed(rows) if "segment" in row), "")
    for row in reversed(rows):
        following = row.get("segment", following)
        names.insert(0, following)
    starts = [index for index, name in enumerate(names) if index == 0 or names[index - 1] != name]
    ends = [*(start - 1 for start in starts[1:]), len(names) - 1]
    return [_segment(names[start], start, end, modes.get(names[start], {})) for start, end in zip(starts, ends, strict=True)]


def _segment(name: str, first: int, last: int, modes: Mapping[str, Any]) -> Segment:
    layers = tuple((mode, modes[mode]) for mode in MODES if modes.get(mode))
    tiles = f" in {modes['tiles']} tiles" if modes.get("tiles", 1) > 1 else ""
    every = "all " if len(layers) == 1 and layers[0][1] > 1 else ""
    sentence = ", ".join(f"{every}{count} {MODE_WORDS[mode]}{tiles if mode == 'recompute' else ''}" for mode, count in layers)
    if modes.get("kept"):
        sentence += f"; {join_words(words(kept) for kept in modes['kept'])} saved"
    return Segment(name, first, last, layers, sentence)
