"""The captured model as data: values, nodes and blocks, with global shapes and no devices.

Role in the pipeline: `capture` produces a `Graph`, `plan` reads it to choose a strategy for every node, `emit` prints it. Passes are
pure functions from graph to graph; `verify` runs after each of them in tests.

A graph is a list of nodes in execution order over named values. A node is one PyTorch operator (`aten.linear.default`), one
registered function (`chunk_linear_cross_entropy:chunk_linear_cross_entropy`), or a call of a block (`block:LlamaDecoderLayer`).
Blocks are the repeated pieces of the model: each distinct one is a graph of its own, stored once in `Graph.blocks`, whose parameter
names are relative to the prefix of the call (`model.layers.3`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch

from seqloom.annotation import Bound

BLOCK = "block:"
Kind = Literal["input", "parameter", "buffer", "activation"]


class GraphError(Exception):
    """The graph contradicts itself: an error of a pass, never of the user."""


@dataclass(frozen=True)
class Value:
    """One tensor. `shape` is global; `fqn` is the state-dict key of a parameter or buffer (relative to the prefix inside a block)."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: Kind = "activation"
    fqn: str | None = None
    requires_grad: bool = False

    @property
    def numel(self) -> int:
        """Number of elements of the whole tensor."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Ref:
    """A value used as an argument of a node."""

    name: str


@dataclass(frozen=True)
class Node:
    """One operator call.

    `args` and `kwargs` hold `Ref`s, constants, and tuples of both. `bound` gives the dimensions of the tensor inputs in the order
    of `inputs` (flattened args, then kwargs) and of `outputs`; it is None for block calls. `module` is the path of the module that
    ran it, `module_class` that module's class name. For a block call `module` is the prefix of the block's parameters.
    """

    op: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    outputs: tuple[str, ...]
    bound: Bound | None
    module: str = ""
    module_class: str = ""

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """Names of the tensor inputs, in order, repeated as often as they are used."""
        return tuple(refs((self.args, tuple(v for _, v in self.kwargs))))

    @property
    def is_block(self) -> bool:
        """Whether this node calls a block."""
        return self.op.startswith(BLOCK)

    @property
    def block(self) -> str:
        """Name of the called block."""
        return self.op.removeprefix(BLOCK)


@dataclass(frozen=True)
class Graph:
    """A graph: `inputs` and `outputs` are value names; parameters and buffers are values that no node produces."""

    name: str
    values: Mapping[str, Value]
    nodes: tuple[Node, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    blocks: Mapping[str, Graph] = field(default_factory=dict)

    def producers(self) -> dict[str, Node]:
        """The node that makes each activation."""
        return {out: node for node in self.nodes for out in node.outputs}

    def consumers(self) -> dict[str, list[Node]]:
        """The nodes that use each value, in order, each once."""
        found: dict[str, list[Node]] = {name: [] for name in self.values}
        for node in self.nodes:
            for name in dict.fromkeys(node.inputs):
                found[name].append(node)
        return found

    def of_kind(self, kind: Kind) -> list[Value]:
        """Values of one kind, in order."""
        return [value for value in self.values.values() if value.kind == kind]

    def parameters(self) -> dict[str, Value]:
        """State-dict key -> parameter, over this graph and every block call in it."""
        return dict(self._state("parameter"))

    def buffers(self) -> dict[str, Value]:
        """State-dict key -> buffer, over this graph and every block call in it."""
        return dict(self._state("buffer"))

    def _state(self, kind: Kind) -> Iterator[tuple[str, Value]]:
        yield from ((value.fqn, value) for value in self.of_kind(kind))
        for node in self.nodes:
            if node.is_block:
                for fqn, value in self.blocks[node.block]._state(kind):
                    yield f"{node.module}.{fqn}", value

    def replace(self, **changes: Any) -> Graph:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def refs(tree: Any) -> Iterator[str]:
    """Names referred to in a nest of args, in order."""
    if isinstance(tree, Ref):
        yield tree.name
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from refs(item)


def map_refs(tree: Any, fn: Callable[[Ref], Any]) -> Any:
    """The nest of args with every `Ref` replaced by `fn(ref)`."""
    if isinstance(tree, Ref):
        return fn(tree)
    if isinstance(tree, (tuple, list)):
        return tuple(map_refs(item, fn) for item in tree)
    return tree


def verify(graph: Graph) -> None:
    """Raise `GraphError` where the graph contradicts itself.

    Checked: every value is defined once and before its use; outputs exist; annotations agree with the shapes of the values;
    block calls agree with their blocks in number, shape and dtype of inputs and outputs.
    """
    known = {v.name for v in graph.values.values() if v.kind != "activation"}
    for key, value in graph.values.items():
        _require(key == value.name, f"{graph.name}: value {value.name} is stored under {key}")
        _require(value.kind in ("input", "activation") or value.fqn is not None, f"{graph.name}: {key} has no state-dict key")
    for node in graph.nodes:
        for name in node.inputs:
            _require(name in known, f"{graph.name}: {node.op} uses {name} before its definition")
        for name in node.outputs:
            _require(name in graph.values, f"{graph.name}: {node.op} defines {name}, which has no shape")
            _require(name not in known, f"{graph.name}: {name} is defined twice")
            known.add(name)
        (_verify_block_call if node.is_block else _verify_bound)(graph, node)
    for name in graph.outputs:
        _require(name in known, f"{graph.name}: output {name} is never defined")
    for block in graph.blocks.values():
        verify(block)


def _verify_bound(graph: Graph, node: Node) -> None:
    _require(node.bound is not None, f"{graph.name}: {node.op} has no annotation")
    for side, names in (("inputs", node.inputs), ("outputs", node.outputs)):
        shapes = getattr(node.bound, side)
        _require(len(shapes) == len(names), f"{graph.name}: {node.op} has {len(names)} {side}, its annotation {len(shapes)}")
        for dims, name in zip(shapes, names, strict=True):
            if dims is None:
                continue
            sizes = tuple(node.bound.size(dim) for dim in dims)
            _require(sizes == graph.values[name].shape, f"{graph.name}: {node.op} expects {sizes} for {name} {graph.values[name].shape}")


def _verify_block_call(graph: Graph, node: Node) -> None:
    _require(node.block in graph.blocks, f"{graph.name}: no block {node.block}")
    block = graph.blocks[node.block]
    for outer, inner in ((node.inputs, block.inputs), (node.outputs, block.outputs)):
        _require(len(outer) == len(inner), f"{graph.name}: call of {node.block} passes {len(outer)} values for {len(inner)}")
        for a, b in zip(outer, inner, strict=True):
            mine, its = graph.values[a], block.values[b]
            same = (mine.shape, mine.dtype) == (its.shape, its.dtype)
            _require(same, f"{graph.name}: call of {node.block} passes {a} {mine.shape} for {b} {its.shape}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise GraphError(message)
