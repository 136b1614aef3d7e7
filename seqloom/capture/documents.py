"""A pass over the captured graph: plain causal attention becomes attention inside documents, which a sequence split can run.

Role in the pipeline: after `capture`, when the data set packs documents or magi attention is asked for. In: a graph and the lengths of
the documents of a typical row. Out: the same graph with `magi_attention` in the place of every `attention`; the planner counts with the
lengths.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from seqloom.errors import UserError
from seqloom.graph import Graph, Node
from seqloom.ops.registry import resolve
from seqloom.ops.rules import arguments_of, bind

PLAIN = "seqloom.ops.attention:attention"
MAGI = "seqloom.magi.operator:magi_attention"


def attend_inside_documents(graph: Graph, documents: Sequence[int]) -> Graph:
    """`graph` with attention inside documents; `documents` are the lengths in a typical row, which they fill.

    Raises `UserError` for attention that is not causal or has a window: a key of documents says nothing of either.
    """
    blocks = {name: _replaced(block, tuple(documents)) for name, block in graph.blocks.items()}
    return _replaced(graph, tuple(documents)).replace(blocks=blocks)


def _replaced(graph: Graph, documents: tuple[int, ...]) -> Graph:
    return graph.replace(nodes=tuple(_magi(graph, node, documents) if node.op == PLAIN else node for node in graph.nodes))


def _magi(graph: Graph, node: Node, documents: tuple[int, ...]) -> Node:
    given = arguments_of(resolve(PLAIN), node.args, dict(node.kwargs))
    length = graph.values[node.inputs[0]].shape[2]
    if not given.get("causal", True) or given.get("window") is not None:
        what = "attention that is not causal" if not given.get("causal", True) else f"a sliding window of {given['window']}"
        raise UserError(
            f"this model has {what}, which attention inside documents does not know yet: pack the text with --pack stream and leave "
            f"--attention magi out"
        )
    if sum(documents) != length:
        raise ValueError(f"documents of {sum(documents)} tokens in rows of {length}")
    args = tuple(given[name] for name in ("query", "key", "value"))
    kwargs = {"scale": given["scale"], "documents": documents}
    if given.get("softcap") is not None:
        kwargs["softcap"] = given["softcap"]
    bound = bind(MAGI, args, kwargs, graph.values, module=node.module)
    return dataclasses.replace(node, op=MAGI, args=args, kwargs=tuple(kwargs.items()), bound=bound)
