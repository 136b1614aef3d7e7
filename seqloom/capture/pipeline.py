"""Capture from end to end: a config becomes a graph with blocks, a loss and annotations.

The steps, each a function of its own: build the model on meta (`hf`), trace it (`tracing`), widen to float64 if asked (`float64`),
simplify (`simplify`), add the loss (`head`), find the repeated blocks (`blocks`), name the values (`names`), annotate every node.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from seqloom.capture.blocks import find_blocks
from seqloom.capture.float64 import widen
from seqloom.capture.head import add_loss
from seqloom.capture.hf import build_model, check_attention, refuse_dropout, tied_keys
from seqloom.capture.names import rename
from seqloom.capture.simplify import simplify
from seqloom.capture.tracing import trace
from seqloom.graph import Graph
from seqloom.ops import rules

if TYPE_CHECKING:
    from transformers import PretrainedConfig

DEFAULT_LOSS = "chunk_linear_cross_entropy:chunk_linear_cross_entropy"


@dataclass(frozen=True)
class Captured:
    """A captured model.

    `graph`: inputs `input_ids`, `position_ids`, `labels` `[b, l]`, output the sum of the per-token losses. `tied`: state-dict key of an
    alias -> key of the parameter that the graph holds. `model_class`: name of the transformers class. `num_parameters`: elements of
    all parameters, tied ones once.
    """

    graph: Graph
    tied: Mapping[str, str]
    model_class: str
    num_parameters: int


def capture(
    config: PretrainedConfig,
    *,
    batch_size: int,
    seq_len: int,
    dtype: torch.dtype,
    loss: str = DEFAULT_LOSS,
    loss_chunk: int = 1024,
) -> Captured:
    """Capture the causal language model of `config` for inputs `[batch_size, seq_len]`; no weights and no device are touched.

    `dtype` is the dtype of the parameters and thereby of the computation; float64 makes everything float64, for parity. `loss` names
    the registered operator used where the head is a plain linear, `loss_chunk` its chunk in tokens. Raises `UserError` for a model that
    cannot be built or traced, uses dropout, hides its attention, or contains an operator without a rule.
    """
    model = build_model(config, dtype)
    graph = trace(model, batch_size, seq_len)
    if dtype == torch.float64:
        graph = widen(graph)
    graph = simplify(graph)
    refuse_dropout(graph, config)
    check_attention(graph, config)
    graph = add_loss(graph, loss, loss_chunk, torch.float64 if dtype == torch.float64 else torch.float32)
    graph = find_blocks(graph, {path: type(module).__name__ for path, module in model.named_modules()})
    graph = annotate(rename(graph))
    count = sum(parameter.numel() for parameter in model.parameters())
    return Captured(graph, tied_keys(model), type(model).__name__, count)


def annotate(graph: Graph) -> Graph:
    """`graph` with the bound annotation of every operator. Raises `UserError` for an operator without a rule."""
    blocks = {}
    for name, block in graph.blocks.items():
        first = next(node for node in graph.nodes if node.is_block and node.block == name)
        blocks[name] = _annotated(block, first.module)
    return _annotated(graph, "").replace(blocks=blocks)


def _annotated(graph: Graph, prefix: str) -> Graph:
    nodes = []
    for node in graph.nodes:
        if not node.is_block:
            module = ".".join(part for part in (prefix, node.module) if part)
            node = dataclasses.replace(node, bound=rules.bind(node.op, node.args, dict(node.kwargs), graph.values, module=module))
        nodes.append(node)
    return graph.replace(nodes=tuple(nodes))
