"""A captured model as JSON and back, exactly: the same values, types and order, so that a program made from either is the same.

In: a `Captured`. Out: dicts, lists, strings, numbers, booleans and None, which `json` writes and reads without loss. Arguments of nodes
that JSON has no word for are dicts with one key: `{"ref": name}` is a `Ref`, `{"torch": "bfloat16"}` a dtype, memory format or layout,
`{"float": "inf"}` a number that is not finite; a list is a tuple. Reading verifies the graph.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from seqloom.annotation import Bound
from seqloom.capture.pipeline import Captured
from seqloom.graph import Graph, GraphError, Node, Ref, Value, verify

_TORCH_WORDS = (torch.dtype, torch.memory_format, torch.layout)


def captured_to_json(captured: Captured) -> dict[str, Any]:
    """`captured` as a JSON document. Raises `GraphError` for an argument of a node that is none of the kinds named above."""
    return {
        "graph": _graph_to_json(captured.graph),
        "tied": dict(captured.tied),
        "model_class": captured.model_class,
        "num_parameters": captured.num_parameters,
    }


def captured_from_json(document: Mapping[str, Any]) -> Captured:
    """The `Captured` of a document of `captured_to_json`, equal to the one it was made from.

    Raises `GraphError` for a graph that contradicts itself; KeyError, TypeError, ValueError or AttributeError for another document.
    """
    graph = _graph_from_json(document["graph"])
    verify(graph)
    return Captured(graph, dict(document["tied"]), document["model_class"], document["num_parameters"])


# --- graphs ----------------------------------------------------------------------------------------------------------------------


def _graph_to_json(graph: Graph) -> dict[str, Any]:
    return {
        "name": graph.name,
        "values": [_value_to_json(value) for value in graph.values.values()],
        "nodes": [_node_to_json(node) for node in graph.nodes],
        "inputs": list(graph.inputs),
        "outputs": list(graph.outputs),
        "blocks": {name: _graph_to_json(block) for name, block in graph.blocks.items()},
    }


def _graph_from_json(document: Mapping[str, Any]) -> Graph:
    values = [_value_from_json(value) for value in document["values"]]
    return Graph(
        name=document["name"],
        values={value.name: value for value in values},
        nodes=tuple(_node_from_json(node) for node in document["nodes"]),
        inputs=tuple(document["inputs"]),
        outputs=tuple(document["outputs"]),
        blocks={name: _graph_from_json(block) for name, block in document["blocks"].items()},
    )


def _value_to_json(value: Value) -> dict[str, Any]:
    return {**vars(value), "shape": list(value.shape), "dtype": _torch_name(value.dtype)}


def _value_from_json(document: Mapping[str, Any]) -> Value:
    return Value(**{**document, "shape": tuple(document["shape"]), "dtype": _torch_word(document["dtype"])})


def _node_to_json(node: Node) -> dict[str, Any]:
    return {
        "op": node.op,
        "args": [_argument_to_json(arg) for arg in node.args],
        "kwargs": [[key, _argument_to_json(arg)] for key, arg in node.kwargs],
        "outputs": list(node.outputs),
        "bound": None if node.bound is None else _bound_to_json(node.bound),
        "module": node.module,
        "module_class": node.module_class,
    }


def _node_from_json(document: Mapping[str, Any]) -> Node:
    return Node(
        op=document["op"],
        args=tuple(_argument_from_json(arg) for arg in document["args"]),
        kwargs=tuple((key, _argument_from_json(arg)) for key, arg in document["kwargs"]),
        outputs=tuple(document["outputs"]),
        bound=None if document["bound"] is None else _bound_from_json(document["bound"]),
        module=document["module"],
        module_class=document["module_class"],
    )


def _bound_to_json(bound: Bound) -> dict[str, Any]:
    """Sets are written sorted: the same bound is the same text in every process."""
    return {
        "inputs": bound.inputs,
        "outputs": bound.outputs,
        "named_sizes": bound.named_sizes,
        "frozen": sorted(bound.frozen),
        "reduced": sorted(bound.reduced),
        "nested": bound.nested,
    }


def _bound_from_json(document: Mapping[str, Any]) -> Bound:
    return Bound(
        inputs=_tuples(document["inputs"]),
        outputs=_tuples(document["outputs"]),
        named_sizes=_tuples(document["named_sizes"]),
        frozen=frozenset(document["frozen"]),
        reduced=frozenset(document["reduced"]),
        nested=_tuples(document["nested"]),
    )


# --- arguments -------------------------------------------------------------------------------------------------------------------


def _argument_to_json(arg: Any) -> Any:
    if isinstance(arg, tuple):
        return [_argument_to_json(item) for item in arg]
    if isinstance(arg, Ref):
        return {"ref": arg.name}
    if isinstance(arg, _TORCH_WORDS):
        return {"torch": _torch_name(arg)}
    if isinstance(arg, float) and not math.isfinite(arg):
        return {"float": str(arg)}
    # Exact types only: a subclass (an enum, a NumPy number) would come back as something else.
    if arg is None or type(arg) in (bool, int, float, str):
        return arg
    raise GraphError(f"an argument of type {type(arg).__name__} cannot be written as JSON")


def _argument_from_json(document: Any) -> Any:
    if isinstance(document, list):
        return tuple(_argument_from_json(item) for item in document)
    if not isinstance(document, dict):
        return document
    ((kind, text),) = document.items()
    return {"ref": Ref, "torch": _torch_word, "float": float}[kind](text)


def _torch_name(word: torch.dtype | torch.memory_format | torch.layout) -> str:
    return str(word).removeprefix("torch.")


def _torch_word(name: str) -> Any:
    """The constant of PyTorch with that name. Raises ValueError for any other attribute of the module."""
    word = getattr(torch, name)
    if not isinstance(word, _TORCH_WORDS):
        raise ValueError(f"torch.{name} is neither a dtype nor a memory format nor a layout")
    return word


def _tuples(document: Any) -> Any:
    """Nested lists as nested tuples."""
    if isinstance(document, Sequence) and not isinstance(document, str):
        return tuple(_tuples(item) for item in document)
    return document
