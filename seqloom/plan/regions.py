"""The graph as the solver sees it: regions that are planned once, and the values that pass between them.

A region is the outer graph or one distinct block, with the number of times it runs. A value that crosses a block's border lies in a
`slot`: the inputs and outputs of all calls that are wired together (the residual stream of 32 layers is one slot) share one layout, so
the plan of a block holds for each of its calls and nothing is resharded between two blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from seqloom.graph import Graph, Node
from seqloom.plan.clusters import Cluster, clusters
from seqloom.plan.labels import Labels, is_attention, label_graph
from seqloom.plan.segments import Segment, segments

OUTER = ""


@dataclass(frozen=True)
class Region:
    """One graph to be planned once: its clusters in execution order, its segments (none for the outer graph), its number of calls.

    `common` are the inputs without gradient that are one and the same tensor in all calls (a block's `cos` and `sin`).
    """

    key: str
    graph: Graph
    count: int
    parts: tuple[Cluster, ...]
    segments: tuple[Segment, ...]
    labels: Labels
    common: frozenset[str] = frozenset()

    def segment_of(self, part: int) -> int | None:
        """Index of the segment that holds a cluster."""
        return next((i for i, s in enumerate(self.segments) if s.start <= part < s.stop), None)


@dataclass(frozen=True)
class Regions:
    """All regions and slots. `slot_of[(region key, value)]` is the slot in which a border value lies."""

    graph: Graph
    parts: Mapping[str, Region]
    slot_of: Mapping[tuple[str, str], str]

    @property
    def outer(self) -> Region:
        """The graph around the blocks."""
        return self.parts[OUTER]


DROPPED = {"auto": (), "heads": ("l",), "gather": ("k", "g"), "magi": ("k", "g")}  # dimensions that attention may then not be split along


def build_regions(graph: Graph, attention: str = "auto") -> Regions:
    """Regions and slots of a captured graph; `attention` says how attention may be split, a key of `DROPPED`."""
    labels = label_graph(graph)
    calls = [node for node in graph.nodes if node.is_block]
    counts: dict[str, int] = {}
    for call in calls:
        counts[call.block] = counts.get(call.block, 0) + 1
    parts = {OUTER: Region(OUTER, graph, 1, _restricted(clusters(graph), attention), (), labels[OUTER])}
    for name, count in counts.items():
        block = graph.blocks[name]
        inside = _restricted(clusters(block), attention)
        common = _common(block, [call for call in calls if call.block == name])
        parts[name] = Region(name, block, count, inside, segments(block, inside), labels[name], common)
    return Regions(graph, parts, _slots(graph, calls))


def _common(block: Graph, calls: list[Node]) -> frozenset[str]:
    """Inputs without gradient for which every call gets the same value."""
    given = zip(block.inputs, *(call.inputs for call in calls), strict=True)
    return frozenset(inner for inner, *outer in given if len(set(outer)) == 1 and not block.values[inner].requires_grad)


def _restricted(parts: tuple[Cluster, ...], attention: str) -> tuple[Cluster, ...]:
    """The clusters without the splits of attention that are ruled out."""
    dropped = DROPPED[attention]

    def restrict(part: Cluster) -> Cluster:
        return replace(part, classes=tuple(option for option in part.classes if option.name not in dropped))

    return tuple(restrict(part) if dropped and is_attention(part.nodes[0].op) else part for part in parts)


def _slots(graph: Graph, calls: list[Node]) -> dict[tuple[str, str], str]:
    parent: dict[tuple[str, str], tuple[str, str]] = {}

    def find(item: tuple[str, str]) -> tuple[str, str]:
        while parent.setdefault(item, item) != item:
            item = parent[item]
        return item

    made = {name for call in calls for name in call.outputs}
    for call in calls:
        block = graph.blocks[call.block]
        pairs = [*zip(call.inputs, block.inputs, strict=True), *zip(call.outputs, block.outputs, strict=True)]
        for outer, inner in pairs:
            find((call.block, inner))
            if outer in made:
                parent[find((OUTER, outer))] = find((call.block, inner))
    return {item: "/".join(find(item)) for item in list(parent)}
