"""The loss head: from logits to the sum of the per-token losses.

In: a simplified graph whose output is the logits `[b, l, n]`. Out: the graph with an input `labels` `[b, l]` (already shifted, -100
where a position does not count) and one scalar output, the loss sum. Where the logits are a plain linear of the hidden states and
nothing else, that linear and the loss are one registered operator that never holds all logits; otherwise the model's own head stays.
"""

from __future__ import annotations

import logging

import torch

from seqloom.capture.simplify import LINEAR, TO, sweep
from seqloom.errors import UserError
from seqloom.graph import Graph, Node, Ref, Value
from seqloom.ops import registry

IGNORE_INDEX = -100
CROSS_ENTROPY = "aten.cross_entropy_loss.default"
_NO_REDUCTION = 0

_log = logging.getLogger(__name__)


def add_loss(graph: Graph, loss: str, loss_chunk: int, accumulate: torch.dtype) -> Graph:
    """`graph` with the loss sum as its output.

    `loss` names the registered operator `(hidden [b, l, d], weight [n, d], labels [b, l], ignore_index, chunk) -> [b, l]`;
    `accumulate` is the dtype in which a kept head computes its loss. Raises `UserError` if the operator cannot be found or does not
    give one loss per token.
    """
    logits = graph.values[graph.outputs[0]]
    labels = Value("labels", logits.shape[:2], torch.int64, "input")
    head = _plain_linear(graph)
    if head is not None:
        losses = _fused_losses(graph, head, loss, loss_chunk, accumulate)
    else:
        _log.info("%s changes its logits after the last linear: its own head is kept, and %s is not used.", graph.name, loss)
        losses = _losses_of_logits(logits, accumulate)
    values = {**graph.values, labels.name: labels}
    nodes = list(graph.nodes)
    for node, value in losses:
        values[value.name] = value
        nodes.append(node)
    total = Value("loss", (), losses[-1][1].dtype, requires_grad=True)
    nodes.append(Node("aten.sum.default", (Ref(losses[-1][1].name),), (), (total.name,), None))
    values[total.name] = total
    return sweep(graph.replace(values=values, nodes=tuple(nodes), inputs=(*graph.inputs, labels.name), outputs=(total.name,)))


def _plain_linear(graph: Graph) -> Node | None:
    """The node that makes the logits, if it is a linear without bias whose weight is a parameter and whose input is `[b, l, d]`."""
    node = graph.producers().get(graph.outputs[0])
    if node is None or node.op != LINEAR:
        return None
    x, weight = (graph.values[ref.name] for ref in node.args)
    return node if weight.kind == "parameter" and len(x.shape) == 3 else None


def _fused_losses(graph: Graph, head: Node, loss: str, chunk: int, accumulate: torch.dtype) -> list[tuple[Node, Value]]:
    entry = registry.resolve(loss)
    x, weight = (graph.values[ref.name] for ref in head.args)
    shapes = entry.annotation.infer([x.shape, weight.shape, x.shape[:2]])
    if shapes != (x.shape[:2],):
        raise UserError(
            f"{loss} gives {list(shapes)} where one loss per token, {tuple(x.shape[:2])}, is needed: "
            "annotate it with 'b l d^, n^ d^, b l -> b l'."
        )
    dtype = entry.output_dtype([x.dtype, weight.dtype, torch.int64])
    args = (*head.args, Ref("labels"), IGNORE_INDEX, chunk)
    node = Node(loss, args, (), ("losses",), None, head.module, head.module_class)
    losses = Value("losses", x.shape[:2], dtype, requires_grad=True)
    return [(node, losses), *_cast(losses, accumulate)]


def _losses_of_logits(logits: Value, accumulate: torch.dtype) -> list[tuple[Node, Value]]:
    """Cross entropy of kept logits: cast, classes to dimension 1 as PyTorch wants them, one loss per token."""
    b, length, n = logits.shape
    steps = _cast(logits, accumulate)
    current = steps[-1][1] if steps else logits
    by_class = Value("logits_by_class", (b, n, length), accumulate, requires_grad=True)
    steps.append((Node("aten.transpose.int", (Ref(current.name), 1, 2), (), (by_class.name,), None), by_class))
    losses = Value("losses", (b, length), accumulate, requires_grad=True)
    args = (Ref(by_class.name), Ref("labels"), None, _NO_REDUCTION, IGNORE_INDEX)
    steps.append((Node(CROSS_ENTROPY, args, (), (losses.name,), None), losses))
    return steps


def _cast(value: Value, dtype: torch.dtype) -> list[tuple[Node, Value]]:
    """A cast of `value` where it is needed: sums over many tokens must not be made in bf16."""
    if value.dtype == dtype:
        return []
    made = Value(f"{value.name}_cast", value.shape, dtype, requires_grad=value.requires_grad)
    return [(Node(TO, (Ref(value.name), dtype), (), (made.name,), None), made)]
