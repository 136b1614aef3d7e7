"""Letters for dimensions: `[b, l, d]` in plans, comments and forced searches.

`b` (batch) and `l` (sequence) are followed from the inputs through every annotation, so they are exact; the other letters go by size:
`d` hidden, `v` vocabulary, `h` query heads, `k` key/value heads, `e` head dim, `f` the widest other weight dimension. A size that has
no letter is written as the number.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from seqloom.capture.documents import MAGI, PLAIN
from seqloom.graph import Graph, Node

Labels = Mapping[str, tuple[str, ...]]


def is_attention(op: str) -> bool:
    """Whether an operator is attention, plain or inside documents."""
    return op in (PLAIN, MAGI)


def label_graph(graph: Graph) -> dict[str, Labels]:
    """Letters of every value's dimensions, for the outer graph (key "") and each block (key = its name)."""
    letters = size_letters(graph)
    known: dict[str, tuple[str, ...]] = {}
    for name in graph.inputs:
        known[name] = tuple("bl"[: len(graph.values[name].shape)])
    found: dict[str, Labels] = {"": known}
    for value in graph.values.values():
        if value.kind in ("parameter", "buffer"):
            known[value.name] = _by_size(value.shape, letters)
    for node in graph.nodes:
        if not node.is_block:
            _follow(graph, node, known, letters)
            continue
        block = graph.blocks[node.block]
        if node.block not in found:
            found[node.block] = _label_block(block, [known[name] for name in node.inputs], letters)
        known.update(zip(node.outputs, (found[node.block][name] for name in block.outputs), strict=True))
    return found


def _label_block(block: Graph, inputs: list[tuple[str, ...]], letters: Mapping[int, str]) -> Labels:
    known = dict(zip(block.inputs, inputs, strict=True))
    for value in block.values.values():
        if value.kind in ("parameter", "buffer"):
            known[value.name] = _by_size(value.shape, letters)
    for node in block.nodes:
        _follow(block, node, known, letters)
    return known


def _follow(graph: Graph, node: Node, known: dict[str, tuple[str, ...]], letters: Mapping[int, str]) -> None:
    names: dict[str, str] = {}
    for value, dims in zip(node.inputs, node.bound.inputs, strict=True):
        if graph.values[value].kind in ("parameter", "buffer"):
            continue
        for dim, letter in zip(dims or (), known[value], strict=False):
            if letter in ("b", "l") and len(dim) == 1:
                names.setdefault(dim[0], letter)
    for value, dims in zip(node.outputs, node.bound.outputs, strict=True):
        sizes = _by_size(graph.values[value].shape, letters)
        known[value] = tuple("·".join(names.get(n, "") for n in dim).strip("·") or size for dim, size in zip(dims, sizes, strict=True))


def _by_size(shape: Iterable[int], letters: Mapping[int, str]) -> tuple[str, ...]:
    return tuple(letters.get(size, str(size)) for size in shape)


def size_letters(graph: Graph) -> dict[int, str]:
    """Letter of each known size, from the attention operator and the weights."""
    letters: dict[int, str] = {}
    graphs = [graph, *graph.blocks.values()]
    for part in graphs:
        for node in part.nodes:
            if is_attention(node.op):
                query, key = (part.values[name].shape for name in node.inputs[:2])
                for size, letter in ((query[3], "e"), (query[1], "h"), (key[1], "k")):
                    letters.setdefault(size, letter)
            elif node.op == "aten.embedding.default":
                vocab, hidden = part.values[node.inputs[0]].shape
                letters.setdefault(hidden, "d")
                letters.setdefault(vocab, "v")
    wide = [size for part in graphs for value in part.of_kind("parameter") if len(value.shape) == 2 for size in value.shape]
    rest = [size for size in wide if size not in letters]
    if rest:
        letters[max(rest)] = "f"
    return letters
