"""Double precision everywhere, so that parity can be asked to 1e-9.

Models cast to float32 by name in places (norms, rotary embedding, softmax): in a float64 model those casts would throw away the digits
that the comparison needs. `widen` changes them in a graph, `Float64Mode` in a model that runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from seqloom.graph import Graph, Value


def widen(graph: Graph) -> Graph:
    """`graph` with float64 in place of every float32: in its values and in the dtype arguments of its nodes."""
    values = {name: Value(**{**vars(value), "dtype": _wide(value.dtype)}) for name, value in graph.values.items()}
    nodes = tuple(
        type(node)(**{**vars(node), "args": _wide_args(node.args), "kwargs": tuple((k, _wide_args(v)) for k, v in node.kwargs)})
        for node in graph.nodes
    )
    return graph.replace(values=values, nodes=nodes)


class Float64Mode(TorchDispatchMode):
    """Inside, an operator asked for float32 gives float64. The model's parameters and buffers must be float64 already."""

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Run `func` with float64 in place of float32 among its arguments."""
        return func(*tree_map(_wide, args), **tree_map(_wide, kwargs or {}))


def _wide(item: Any) -> Any:
    return torch.float64 if item is torch.float32 else item


def _wide_args(tree: Any) -> Any:
    if isinstance(tree, tuple):
        return tuple(_wide_args(item) for item in tree)
    return _wide(tree)
