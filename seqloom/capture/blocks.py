"""Block discovery: the repeated pieces of a flat graph become graphs of their own, identical ones once.

A piece is what ran inside a module whose path ends in an integer and whose parent is a `ModuleList` (`model.layers.3`). Each is lifted
out as a graph with canonical value names and parameter keys relative to its path; pieces whose graphs are equal (operators, shapes,
dtypes, constants, wiring, parameter keys) are calls of one block. In: a flat graph and the class name of every module. Out: the graph
with a `block:` node per piece.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from seqloom.graph import BLOCK, Graph, Node, Ref, Value, map_refs


@dataclass(frozen=True)
class _Piece:
    """A piece lifted out: `body` has canonical names; `inputs` and `outputs` are the values of the outer graph in the same order."""

    prefix: str
    nodes: tuple[Node, ...]
    body: Graph
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def find_blocks(graph: Graph, classes: Mapping[str, str]) -> Graph:
    """`graph` with every piece replaced by a call of its block. `classes`: module path -> class name."""
    readers = _readers(graph.nodes)
    pieces = [piece for prefix, nodes in _runs(graph, classes) if (piece := _lift(graph, prefix, nodes, readers)) is not None]
    bodies: list[Graph] = []
    members: list[list[_Piece]] = []
    for piece in pieces:
        if piece.body not in bodies:
            bodies.append(piece.body)
            members.append([])
        members[bodies.index(piece.body)].append(piece)
    names = _block_names([classes[group[0].prefix] for group in members])
    previous = {piece.prefix: before for before, piece in zip([None, *pieces], pieces, strict=False)}
    blocks: dict[str, Graph] = {}
    calls: dict[str, Node] = {}
    for name, body, group in zip(names, bodies, members, strict=True):
        order = _input_order(body, group, previous)
        blocks[name] = body.replace(name=name, inputs=tuple(body.inputs[i] for i in order))
        for piece in group:
            args = tuple(Ref(piece.inputs[i]) for i in order)
            calls[piece.prefix] = Node(BLOCK + name, args, (), piece.outputs, None, piece.prefix, classes[piece.prefix])
    return _replace_pieces(graph, pieces, calls, blocks)


def relative_path(path: str, prefix: str) -> str | None:
    """`path` seen from the module at `prefix`: "" for that module itself, None outside of it."""
    if not prefix:
        return path
    if path == prefix:
        return ""
    return path.removeprefix(prefix + ".") if path.startswith(prefix + ".") else None


def _runs(graph: Graph, classes: Mapping[str, str]) -> list[tuple[str, tuple[Node, ...]]]:
    """(prefix, nodes) of every candidate whose nodes stand together, in order of execution."""
    runs: list[tuple[str, list[Node]]] = []
    for node in graph.nodes:
        prefix = _candidate(node.module, classes)
        if not runs or runs[-1][0] != prefix:
            runs.append((prefix, []))
        runs[-1][1].append(node)
    prefixes = [prefix for prefix, _ in runs]
    return [(prefix, tuple(nodes)) for prefix, nodes in runs if prefix and prefixes.count(prefix) == 1]


def _candidate(path: str, classes: Mapping[str, str]) -> str:
    """The outermost element of a `ModuleList` on the way to `path`, "" if there is none."""
    parts = path.split(".")
    for i, part in enumerate(parts):
        if part.isdigit() and classes.get(".".join(parts[:i])) == "ModuleList":
            return ".".join(parts[: i + 1])
    return ""


def _readers(nodes: Sequence[Node]) -> Counter[str]:
    """How many nodes read each value."""
    return Counter(name for node in nodes for name in set(node.inputs))


def _lift(graph: Graph, prefix: str, nodes: tuple[Node, ...], readers: Counter[str]) -> _Piece | None:
    """The piece as a graph of its own, None if its parameters are used elsewhere too (shared layers stay in the outer graph)."""
    inside = {name for node in nodes for name in node.outputs}
    elsewhere = set(readers - _readers(nodes)) | set(graph.outputs)
    state = {v.name: key for v in graph.values.values() if v.fqn is not None and (key := relative_path(v.fqn, prefix))}
    if any(name in elsewhere for name in state):
        return None
    used = dict.fromkeys(name for node in nodes for name in node.inputs)
    inputs = tuple(name for name in used if name not in inside and name not in state)
    outputs = tuple(name for node in nodes for name in node.outputs if name in elsewhere)
    body = _body(graph, prefix, nodes, inputs, outputs, state)
    return _Piece(prefix, nodes, body, inputs, outputs)


def _body(
    graph: Graph, prefix: str, nodes: Sequence[Node], inputs: Sequence[str], outputs: Sequence[str], state: Mapping[str, str]
) -> Graph:
    """The piece with values named by their order, so that pieces of the same structure give equal graphs."""
    produced = [name for node in nodes for name in node.outputs]
    names = {name: f"v{i}" for i, name in enumerate([*inputs, *state, *produced])}
    values: dict[str, Value] = {}
    for old, new in names.items():
        value = dataclasses.replace(graph.values[old], name=new, fqn=state.get(old))
        values[new] = dataclasses.replace(value, kind="input") if old in inputs else value
    body = [_moved(node, names, prefix) for node in nodes]
    return Graph("", values, tuple(body), tuple(names[n] for n in inputs), tuple(names[n] for n in outputs))


def _moved(node: Node, names: Mapping[str, str], prefix: str) -> Node:
    def rename(ref: Ref) -> Ref:
        return Ref(names[ref.name])

    return dataclasses.replace(
        node,
        args=map_refs(node.args, rename),
        kwargs=tuple((key, map_refs(value, rename)) for key, value in node.kwargs),
        outputs=tuple(names[name] for name in node.outputs),
        module=relative_path(node.module, prefix) or "",
    )


def _input_order(body: Graph, group: Sequence[_Piece], previous: Mapping[str, _Piece | None]) -> list[int]:
    """Order of the inputs: first the one that carries the model from piece to piece, then the others by first use.

    The carried one comes from the piece before; where no call follows another, it is the first input with a gradient.
    """
    count = len(body.inputs)
    votes = [sum(1 for p in group if (before := previous[p.prefix]) is not None and p.inputs[i] in before.outputs) for i in range(count)]
    grads = [int(body.values[name].requires_grad) for name in body.inputs]
    first = min(range(count), key=lambda i: (-votes[i], -grads[i], i), default=0)
    return [*range(count)[first : first + 1], *range(first), *range(first + 1, count)]


def _block_names(classes: Sequence[str]) -> list[str]:
    """One name per distinct block: its class, numbered from 1 where a class has several (alternating kinds of layers)."""
    names: list[str] = []
    for i, cls in enumerate(classes):
        name = cls if classes.count(cls) == 1 else f"{cls}{classes[: i + 1].count(cls)}"
        while name in names or (name != cls and name in classes):
            name += "_"
        names.append(name)
    return names


def _replace_pieces(graph: Graph, pieces: Sequence[_Piece], calls: Mapping[str, Node], blocks: Mapping[str, Graph]) -> Graph:
    owner = {id(node): piece.prefix for piece in pieces for node in piece.nodes}
    nodes: list[Node] = []
    for node in graph.nodes:
        prefix = owner.get(id(node))
        if prefix is None:
            nodes.append(node)
        elif not nodes or nodes[-1] is not calls[prefix]:
            nodes.append(calls[prefix])
    moved = {v.name for p in pieces for v in graph.values.values() if v.fqn is not None and relative_path(v.fqn, p.prefix)}
    made = {name for node in nodes for name in node.outputs}
    values = {n: v for n, v in graph.values.items() if (n in made if v.kind == "activation" else n not in moved)}
    return graph.replace(values=values, nodes=tuple(nodes), blocks=dict(blocks))
