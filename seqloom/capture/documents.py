"""A pass over the captured graph: plain causal attention becomes attention inside documents, which a sequence split can run.

Role in the pipeline: after `capture`, when the data set packs documents or magi attention is asked for. In: a graph and the lengths of
the documents of a typical row. Out: the same graph with `magi_attention` in the place of every `attention`, sliding windows as they were;
the planner counts with the lengths and the windows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from seqloom.errors import UserError
from seqloom.graph import Graph, Node
from seqloom.magi.windows import Windows, distinct
from seqloom.ops.registry import resolve
from seqloom.ops.rules import arguments_of, bind

PLAIN = "seqloom.ops.attention:attention"
MAGI = "seqloom.magi.operator:magi_attention"


def attend_inside_documents(graph: Graph, documents: Sequence[int]) -> Graph:
    """`graph` with attention inside documents; `documents` are the lengths in a typical row, which they fill.

    Raises `UserError` for attention that is not causal: a key of documents says nothing of it.
    """
    parts = (graph, *graph.blocks.values())
    windows = distinct(_given(node).get("window") for part in parts for node in part.nodes if node.op == PLAIN)
    blocks = {name: _replaced(block, tuple(documents), windows) for name, block in graph.blocks.items()}
    return _replaced(graph, tuple(documents), windows).replace(blocks=blocks)


def _given(node: Node) -> dict[str, Any]:
    return arguments_of(resolve(PLAIN), node.args, dict(node.kwargs))


def _replaced(graph: Graph, documents: tuple[int, ...], windows: Windows) -> Graph:
    return graph.replace(nodes=tuple(_magi(graph, node, documents, windows) if node.op == PLAIN else node for node in graph.nodes))


def _magi(graph: Graph, node: Node, documents: tuple[int, ...], windows: Windows) -> Node:
    given = _given(node)
    length = graph.values[node.inputs[0]].shape[2]
    if not given.get("causal", True):
        raise UserError(
            "this model has attention that is not causal, which attention inside documents does not know yet: pack the text with "
            "--pack stream and leave --attention magi out"
        )
    if sum(documents) != length:
        raise ValueError(f"documents of {sum(documents)} tokens in rows of {length}")
    args = tuple(given[name] for name in ("query", "key", "value"))
    kwargs = {"scale": given["scale"], "documents": documents}
    kwargs |= {name: given[name] for name in ("softcap", "window") if given.get(name) is not None}
    if len(windows) > 1:
        kwargs["windows"] = windows
    bound = bind(MAGI, args, kwargs, graph.values, module=node.module)
    return dataclasses.replace(node, op=MAGI, args=args, kwargs=tuple(kwargs.items()), bound=bound)
