"""Segments: the stretches of a block whose activations are kept or recomputed together.

A block's clusters are cut before and after attention (never worth recomputing: its backward needs little and its forward costs most) and
wherever a single activation is alive, which is where a residual stream stands alone. The segments become methods of the emitted class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from seqloom.graph import Graph
from seqloom.plan.clusters import Cluster
from seqloom.plan.labels import is_attention


@dataclass(frozen=True)
class Segment:
    """Clusters `start` to `stop` of a block. `inputs` and `outputs` are the activations that cross its borders, in order."""

    name: str
    start: int
    stop: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    recomputable: bool


def segments(block: Graph, parts: Sequence[Cluster]) -> tuple[Segment, ...]:
    """The segments of a block, in order; together they cover all clusters."""
    cuts = [0]
    for index in range(1, len(parts)):
        around_attention = _is_attention(parts[index]) or _is_attention(parts[index - 1])
        if around_attention or len(_alive(block, parts, index)) == 1:
            cuts.append(index)
    cuts.append(len(parts))
    spans = _join_small([(a, b) for a, b in zip(cuts, cuts[1:], strict=False)], parts)
    names = _names(block, parts, spans)
    return tuple(_segment(block, parts, name, a, b) for name, (a, b) in zip(names, spans, strict=True))


def _join_small(spans: list[tuple[int, int]], parts: Sequence[Cluster]) -> list[tuple[int, int]]:
    """A span without a costly cluster joins the one after it (a lone norm, a residual add), or the last one before it."""
    joined: list[tuple[int, int]] = []
    carried: int | None = None
    for start, stop in spans:
        start = start if carried is None else carried
        carried = None
        if any(p.heavy for p in parts[start:stop]):
            joined.append((start, stop))
        elif joined and not _is_attention(parts[joined[-1][1] - 1]) and _only_adds(parts[start:stop]):
            joined[-1] = (joined[-1][0], stop)
        else:
            carried = start
    if carried is not None and joined:
        joined[-1] = (joined[-1][0], len(parts))
    return joined or [(0, len(parts))]


def _only_adds(parts: Sequence[Cluster]) -> bool:
    return all(node.op == "aten.add.Tensor" for part in parts for node in part.nodes)


def _is_attention(part: Cluster) -> bool:
    return is_attention(part.nodes[0].op)


def _alive(block: Graph, parts: Sequence[Cluster], index: int) -> set[str]:
    """Activations with a gradient that are made before cluster `index` and used from there on."""
    made = {out for part in parts[:index] for out in part.outputs} | set(block.inputs)
    used = {name for part in parts[index:] for name in part.inputs} | set(block.outputs)
    return {name for name in made & used if block.values[name].requires_grad}


def _segment(block: Graph, parts: Sequence[Cluster], name: str, start: int, stop: int) -> Segment:
    inside = parts[start:stop]
    made = {out for part in inside for out in part.outputs}
    kinds = ("parameter", "buffer")
    inputs = tuple(dict.fromkeys(n for part in inside for n in part.inputs if n not in made and block.values[n].kind not in kinds))
    used = [n for part in parts[stop:] for n in part.inputs] + list(block.outputs)
    outputs = tuple(n for n in dict.fromkeys(used) if n in made)
    return Segment(name, start, stop, inputs, outputs, not any(_is_attention(part) for part in inside))


def _names(block: Graph, parts: Sequence[Cluster], spans: Sequence[tuple[int, int]]) -> list[str]:
    """`attention_input`, `attention`, `attention_output`, then the name of the submodule that does most (`mlp`)."""
    attention = next((i for i, (a, b) in enumerate(spans) if any(_is_attention(p) for p in parts[a:b])), None)
    names: list[str] = []
    for index, (start, stop) in enumerate(spans):
        if attention is not None and index == attention:
            name = "attention"
        elif attention is not None and abs(index - attention) == 1 and _same_child(parts, spans, index, attention):
            name = "attention_input" if index < attention else "attention_output"
        else:
            name = _child(parts[start:stop]) or "part"
        taken = names.count(name) + sum(n.startswith(f"{name}_") and n[len(name) + 1 :].isdigit() for n in names)
        names.append(f"{name}_{taken + 1}" if taken else name)
    return names


def _child(parts: Sequence[Cluster]) -> str:
    """The submodule that owns most of the costly clusters (module paths inside a block are relative to it)."""
    owners = [part.nodes[0].module.split(".")[0] for part in parts if part.heavy]
    return max(dict.fromkeys(owners), key=owners.count) if owners else ""


def _same_child(parts: Sequence[Cluster], spans: Sequence[tuple[int, int]], index: int, other: int) -> bool:
    return _child(parts[slice(*spans[index])]) == _child(parts[slice(*spans[other])])
