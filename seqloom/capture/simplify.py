"""Clean-up of a traced graph: one form for each operation, nothing that changes nothing.

In: the graph of `tracing.trace`. Out: a graph of the same function with fewer kinds of operators: every cast is `aten.to.dtype`, every
change of shape `aten.reshape.default` with concrete sizes, biases are added by `aten.add.Tensor`, Conv1D is `aten.matmul.default`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from seqloom.graph import Graph, Node, Ref, Value, map_refs

RESHAPE = "aten.reshape.default"
TO = "aten.to.dtype"
MATMUL = "aten.matmul.default"
ADD = "aten.add.Tensor"
LINEAR = "aten.linear.default"

# What a rule gives for a node: nodes that take its place, or the value that was there all along.
Rewrite = list[Node] | Ref


@dataclass(frozen=True)
class _Scope:
    """What the rules see while the graph is walked: values and producers so far; rules add the values of new nodes."""

    values: dict[str, Value]
    producers: dict[str, Node]

    def shape(self, ref: Ref) -> tuple[int, ...]:
        """Shape of a value."""
        return self.values[ref.name].shape

    def source(self, ref: Ref, op: str) -> Ref | None:
        """The first argument of the node that made `ref`, if that node is an `op`."""
        node = self.producers.get(ref.name)
        return node.args[0] if node is not None and node.op == op else None

    def new(self, base: str, suffix: str, **changes: Any) -> Ref:
        """A new value like the value `base`."""
        value = dataclasses.replace(self.values[base], name=f"{base}_{suffix}", **changes)
        self.values[value.name] = value
        return Ref(value.name)


Rule = Callable[[Node, _Scope], Rewrite]


def simplify(graph: Graph) -> Graph:
    """`graph` in normal form, dead nodes removed."""
    # Conv1D is recognized by the reshapes around it, so reshapes are merged only afterwards.
    return sweep(_rewrite(_rewrite(graph, _RULES), {"reshape": _merge_reshapes}))


def _rewrite(graph: Graph, rules: Mapping[str, Rule]) -> Graph:
    """One walk over the nodes, each replaced by what the rule of its operator (without overload) gives."""
    scope = _Scope(dict(graph.values), {})
    same: dict[str, Ref] = {}
    nodes: list[Node] = []
    for node in graph.nodes:
        node = substitute(node, same)
        result = rules.get(node.op.split(".")[1] if node.op.startswith("aten.") else "", _keep)(node, scope)
        if isinstance(result, Ref):
            same[node.outputs[0]] = result
            continue
        nodes.extend(result)
        scope.producers.update((name, made) for made in result for name in made.outputs)
    outputs = tuple(same.get(name, Ref(name)).name for name in graph.outputs)
    return graph.replace(values=scope.values, nodes=tuple(nodes), outputs=outputs)


def sweep(graph: Graph) -> Graph:
    """`graph` without the nodes and buffers that its outputs do not need. Inputs stay, and parameters: their keys belong to the model."""
    needed = set(graph.outputs)
    kept: list[Node] = []
    for node in reversed(graph.nodes):
        if needed.intersection(node.outputs):
            kept.append(node)
            needed.update(node.inputs)
            needed.update(node.outputs)
    values = {name: value for name, value in graph.values.items() if name in needed or value.kind in ("input", "parameter")}
    return graph.replace(values=values, nodes=tuple(reversed(kept)))


def substitute(node: Node, same: Mapping[str, Ref]) -> Node:
    """`node` with some of its arguments replaced."""

    def swap(ref: Ref) -> Ref:
        return same.get(ref.name, ref)

    return dataclasses.replace(node, args=map_refs(node.args, swap), kwargs=tuple((key, map_refs(v, swap)) for key, v in node.kwargs))


# --- rules -----------------------------------------------------------------------------------------------------------------------


def _keep(node: Node, scope: _Scope) -> Rewrite:
    return [node]


def _identity(node: Node, scope: _Scope) -> Rewrite:
    return node.args[0]


def _cast(node: Node, scope: _Scope) -> Rewrite:
    """Every spelling of a cast; a move between devices is none of the graph's business."""
    out = scope.values[node.outputs[0]]
    if scope.values[node.args[0].name].dtype == out.dtype:
        return node.args[0]
    return [_node(node, TO, (node.args[0], out.dtype))]


def _reshape(node: Node, scope: _Scope) -> Rewrite:
    """Every spelling of a reshape."""
    shape = scope.shape(Ref(node.outputs[0]))
    return node.args[0] if scope.shape(node.args[0]) == shape else [_node(node, RESHAPE, (node.args[0], shape))]


def _merge_reshapes(node: Node, scope: _Scope) -> Rewrite:
    """A reshape of a reshape starts from the first one's input."""
    source = scope.source(node.args[0], RESHAPE) or node.args[0]
    return _reshape(dataclasses.replace(node, args=(source, *node.args[1:])), scope)


def _expand(node: Node, scope: _Scope) -> Rewrite:
    shape = scope.shape(Ref(node.outputs[0]))
    return node.args[0] if scope.shape(node.args[0]) == shape else [_node(node, node.op, (node.args[0], shape))]


def _slice(node: Node, scope: _Scope) -> Rewrite:
    """`slice(x, dim, start, end, step)` with the bounds that Python's rules give them; "to the end" comes as 2**63 - 1."""
    x, dim, start, end, step = (*node.args, *(0, None, None, 1)[len(node.args) - 1 :])
    size = scope.shape(x)[dim]
    start, end, step = slice(start, end, step).indices(size)
    if (start, end, step) == (0, size, 1):
        return x
    args = (x, dim, start, end) if step == 1 else (x, dim, start, end, step)
    return [_node(node, node.op, args)]


def _cat(node: Node, scope: _Scope) -> Rewrite:
    """Parts without elements go (the part of a head that a partial rotary embedding leaves alone, where it rotates all)."""
    parts, *dim = node.args
    full = tuple(part for part in parts if scope.values[part.name].numel) or parts
    return full[0] if len(full) == 1 else [_node(node, node.op, (full, *dim))]


def _dropout(node: Node, scope: _Scope) -> Rewrite:
    """Off where p = 0 or in evaluation; `hf.refuse_dropout` has a word for the others."""
    x, probability, train = node.args
    return [node] if probability and train else x


def _detach(node: Node, scope: _Scope) -> Rewrite:
    """Needed only where there is a gradient to stop."""
    return [node] if scope.values[node.args[0].name].requires_grad else node.args[0]


def _times(node: Node, scope: _Scope) -> Rewrite:
    """A factor or divisor of exactly 1 (the rotary embedding's attention scaling, as a rule) goes."""
    x, factor = node.args[:2]
    changes = node.kwargs or isinstance(factor, Ref) or factor != 1 or scope.values[x.name].dtype != scope.values[node.outputs[0]].dtype
    return [node] if changes else x


def _linear(node: Node, scope: _Scope) -> Rewrite:
    """A bias is added by a node of its own: split along the contraction, the product is a partial sum and the bias is not."""
    x, weight, bias = (*node.args, None)[:3]
    if bias is None:
        return [_node(node, LINEAR, (x, weight))]
    product = scope.new(node.outputs[0], "product")
    return [_node(node, LINEAR, (x, weight), product), _node(node, ADD, (product, bias))]


def _addmm(node: Node, scope: _Scope) -> Rewrite:
    """`bias + x @ weight` as matmul and add. Conv1D flattens its input first: where it did, the leading dimensions are kept."""
    bias, flat, weight = node.args
    if any(value != 1 for _, value in node.kwargs):
        return [node]
    source = scope.source(flat, RESHAPE)
    x = source if source is not None and scope.shape(source)[-1] == scope.shape(flat)[-1] else flat
    out = node.outputs[0]
    shape = (*scope.shape(x)[:-1], scope.shape(weight)[-1])
    product = scope.new(out, "product", shape=shape)
    if x is flat:
        return [_node(node, MATMUL, (x, weight), product), _node(node, ADD, (product, bias))]
    total = scope.new(out, "sum", shape=shape)
    flatten = _node(node, RESHAPE, (total, scope.shape(Ref(out))))
    return [_node(node, MATMUL, (x, weight), product), _node(node, ADD, (product, bias), total), flatten]


def _node(like: Node, op: str, args: tuple[Any, ...], output: Ref | None = None) -> Node:
    outputs = like.outputs if output is None else (output.name,)
    return dataclasses.replace(like, op=op, args=args, kwargs=(), outputs=outputs)


_RULES: dict[str, Rule] = {
    **dict.fromkeys(("contiguous", "alias", "clone", "lift_fresh_copy"), _identity),
    **dict.fromkeys(("to", "_to_copy", "type_as"), _cast),
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as"), _reshape),
    **dict.fromkeys(("expand", "expand_as"), _expand),
    "slice": _slice,
    "cat": _cat,
    "dropout": _dropout,
    "detach": _detach,
    **dict.fromkeys(("mul", "div"), _times),
    "linear": _linear,
    "addmm": _addmm,
}
