"""Run a captured graph on real tensors: the proof that a graph means what the model means.

`run_graph` calls PyTorch's operators and the registered functions one by one, checks the shape and dtype of every value against the
graph, and lets autograd record it all.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from seqloom.graph import Graph, Node, Ref, map_refs
from seqloom.ops.registry import resolve


def run_graph(graph: Graph, inputs: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Outputs of `graph` for tensors by input name and parameters and buffers by state-dict key."""
    env = {name: inputs[name] for name in graph.inputs}
    env |= {value.name: state[value.fqn] for value in graph.values.values() if value.fqn is not None}
    for name, tensor in env.items():
        _check(graph, name, tensor)
    for node in graph.nodes:
        results = _call_block(graph, node, env, state) if node.is_block else _call(node, env)
        for name, result in zip(node.outputs, results, strict=True):
            _check(graph, name, result)
            env[name] = result
    return tuple(env[name] for name in graph.outputs)


def _call(node: Node, env: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    if ":" in node.op:
        function: Any = resolve(node.op).function
    else:
        function = reduce(getattr, node.op.split("."), torch.ops)
    args = map_refs(_on_cpu(node.args), lambda ref: env[ref.name])
    kwargs = {key: map_refs(value, lambda ref: env[ref.name]) for key, value in node.kwargs}
    result = function(*args, **kwargs)
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _on_cpu(tree: Any) -> Any:
    """A raw trace still names the meta device in the arguments of its casts."""
    if isinstance(tree, tuple):
        return tuple(_on_cpu(item) for item in tree)
    return torch.device("cpu") if isinstance(tree, torch.device) else tree


def _call_block(graph: Graph, node: Node, env: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    block = graph.blocks[node.block]
    inner = {key.removeprefix(node.module + "."): tensor for key, tensor in state.items() if key.startswith(node.module + ".")}
    given = [env[arg.name] for arg in node.args if isinstance(arg, Ref)]
    return run_graph(block, dict(zip(block.inputs, given, strict=True)), inner)


def _check(graph: Graph, name: str, tensor: Tensor) -> None:
    value = graph.values[name]
    assert tuple(tensor.shape) == value.shape, f"{graph.name}.{name}: {tuple(tensor.shape)} for {value.shape}"
    assert tensor.dtype == value.dtype, f"{graph.name}.{name}: {tensor.dtype} for {value.dtype}"
    assert tensor.requires_grad == value.requires_grad, f"{graph.name}.{name}: requires_grad is {tensor.requires_grad}"
