"""Readable names: the emitted program calls its variables what the values of the graph are called.

A value that leaves the module which made it is called after that module (`q_proj`, `input_layernorm`); a sum onto the stream that runs
through a block is called like the stream (`hidden_states_1`); a view of a value after the value (`q_proj_transpose`); what attention
takes is `query`, `key`, `value`; the rest after its operator. In: a graph with blocks. Out: the same graph, names unique in each graph,
valid Python identifiers that shadow nothing the emitted code uses.
"""

from __future__ import annotations

import builtins
import dataclasses
import keyword
from collections.abc import Mapping

from seqloom.graph import Graph, Node, Ref, Value, map_refs

STREAM = "hidden_states"
_ATTENTION_INPUTS = ("query", "key", "value")
_RESERVED = frozenset(
    {*dir(builtins), *keyword.kwlist, "torch", "nn", "F", "dist", "self", "math", "local", "collectives", "parameters", "mesh"}
)
_MOVES = frozenset(
    ("reshape", "transpose", "permute", "t", "slice", "select", "split", "split_with_sizes", "chunk", "unbind")
    + ("expand", "unsqueeze", "squeeze", "to")
)
_WORDS = {"pow": "power", "sum": "total", "cat": "joined", "split_with_sizes": "split", "t": "transpose", "abs": "magnitude"}
_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}


def rename(graph: Graph) -> Graph:
    """`graph` and its blocks under readable names; inputs of the graph keep theirs."""
    streams = {name: block.inputs[0] for name, block in graph.blocks.items() if block.inputs}
    given = dict(zip(graph.inputs, graph.inputs, strict=True))
    total = graph.producers()[graph.outputs[0]]
    made_by_block = {out for node in graph.nodes if node.is_block for out in node.outputs}
    given |= {name: "losses" for name in total.inputs if name not in made_by_block} | {total.outputs[0]: "loss"}
    new = _unique(graph, _stems(graph, given, None))
    blocks: dict[str, Graph] = {}
    for name, block in graph.blocks.items():
        call = next(node for node in graph.nodes if node.is_block and node.block == name)
        given = {inner: _without_cast(new[outer], graph.values[outer]) for inner, outer in zip(block.inputs, call.inputs, strict=True)}
        given.update({streams[name]: STREAM} if name in streams else {})
        blocks[name] = _renamed(block, _unique(block, _stems(block, given, streams.get(name))))
    return _renamed(graph, new).replace(blocks=blocks)


def _stems(graph: Graph, given: Mapping[str, str], stream: str | None) -> dict[str, str]:
    """A wished-for name per value; several values may wish for the same."""
    stems = dict(given)
    for value in graph.values.values():
        if value.fqn is not None:
            stems[value.name] = "_".join(value.fqn.split(".")[-2:])
    leaving = _leaving(graph)
    roles = _attention_roles(graph)
    streams = {stream}
    roots: dict[str, str] = {}
    for node in graph.nodes:
        for i, out in enumerate(node.outputs):
            if out in given:
                pass
            elif leaving.get(node.module) == [out] and node.module:
                stems[out] = node.module.split(".")[-1]
            elif not node.is_block and not node.module and _adds_to(node, graph, streams):
                stems[out] = STREAM
                streams.add(out)
            elif out in roles:
                stems[out] = roles[out]
            else:
                stems[out] = _by_operator(node, i, graph, stems, roots)
            if roots.get(out) is None:
                roots[out] = stems[out]
    return stems


def _leaving(graph: Graph) -> dict[str, list[str]]:
    """Module path -> values made directly by that module and used outside of it."""
    made_by = {out: node.module for node in graph.nodes if not node.is_block for out in node.outputs}
    found: dict[str, dict[str, None]] = {}
    for node in graph.nodes:
        for name in node.inputs:
            home = made_by.get(name)
            if home is not None and not (node.module == home or node.module.startswith(home + ".")):
                found.setdefault(home, {})[name] = None
    for name in graph.outputs:
        if name in made_by:
            found.setdefault(made_by[name], {})[name] = None
    return {path: list(names) for path, names in found.items()}


def _attention_roles(graph: Graph) -> dict[str, str]:
    """Names for what attention takes."""
    roles: dict[str, str] = {}
    for node in graph.nodes:
        if node.op.endswith(":attention"):
            for name, role in zip(node.inputs, _ATTENTION_INPUTS, strict=False):
                roles.setdefault(name, role)
    return roles


def _adds_to(node: Node, graph: Graph, streams: set[str | None]) -> bool:
    """Whether the node adds something onto the stream."""
    if node.op != "aten.add.Tensor":
        return False
    shape = graph.values[node.outputs[0]].shape
    return any(name in streams and graph.values[name].shape == shape for name in node.inputs)


def _by_operator(node: Node, index: int, graph: Graph, stems: Mapping[str, str], roots: dict[str, str]) -> str:
    if node.is_block:
        return STREAM
    if ":" in node.op:
        return node.op.split(":")[-1].split(".")[-1] + "_output"
    op = node.op.split(".")[1]
    word = _WORDS.get(op, op).strip("_")
    if op not in _MOVES or not node.inputs:
        return word
    source = node.inputs[0]
    root = roots.get(source, stems.get(source, word))
    roots[node.outputs[index]] = root
    if op == "to":
        dtype = str(graph.values[node.outputs[index]].dtype).removeprefix("torch.")
        return f"{root}_{_DTYPES.get(dtype, dtype)}"
    return f"{root}_{word}_{index}" if len(node.outputs) > 1 else f"{root}_{word}"


def _without_cast(name: str, value: Value) -> str:
    dtype = str(value.dtype).removeprefix("torch.")
    return name.removesuffix(f"_{_DTYPES.get(dtype, dtype)}")


def _unique(graph: Graph, stems: Mapping[str, str]) -> dict[str, str]:
    """Value -> final name: inputs keep theirs, the others get a number where a name is taken."""
    taken: set[str] = set()
    final: dict[str, str] = {}
    for name in [*graph.inputs, *(n for n in graph.values if n not in graph.inputs)]:
        stem = stems[name]
        if not stem.isidentifier() or stem in _RESERVED:
            stem = f"{stem}_" if stem.isidentifier() else f"layer_{stem}"
        candidate, count = stem, 0
        while candidate in taken:
            count += 1
            candidate = f"{stem}_{count}"
        taken.add(candidate)
        final[name] = candidate
    return final


def _renamed(graph: Graph, names: Mapping[str, str]) -> Graph:
    def swap(ref: Ref) -> Ref:
        return Ref(names[ref.name])

    order = _definition_order(graph)
    values = {names[name]: dataclasses.replace(graph.values[name], name=names[name]) for name in order}
    nodes = tuple(
        dataclasses.replace(
            node,
            args=map_refs(node.args, swap),
            kwargs=tuple((key, map_refs(value, swap)) for key, value in node.kwargs),
            outputs=tuple(names[name] for name in node.outputs),
        )
        for node in graph.nodes
    )
    inputs, outputs = tuple(names[n] for n in graph.inputs), tuple(names[n] for n in graph.outputs)
    return graph.replace(values=values, nodes=nodes, inputs=inputs, outputs=outputs)


def _definition_order(graph: Graph) -> list[str]:
    """Inputs, then parameters and buffers, then activations as they are made."""
    state = [value.name for kind in ("parameter", "buffer") for value in graph.of_kind(kind)]
    return [*graph.inputs, *state, *(out for node in graph.nodes for out in node.outputs)]
