"""What a strategy, a reshard and a storage choice cost: seconds and bytes on one rank.

Role in the pipeline: between the search space and the solver. Compute comes from achieved rates (`seqloom.cost.compute`), collectives from
the alpha-beta model with the link level that the mesh axis spans (`seqloom.cost.communication`). A backward matrix product costs two
forward ones; a pointwise cluster costs the traffic of its borders, as `torch.compile` leaves it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

from seqloom.cost.communication import AxisSpan, CollectiveKind, collective_seconds, wire_bytes
from seqloom.cost.compute import ATTENTION_BACKWARD_RATIO, attention_seconds, bandwidth_seconds, matmul_seconds
from seqloom.cost.hardware import Hardware
from seqloom.graph import Graph, Node, Value
from seqloom.ops.flops import flops, workspace_bytes
from seqloom.ops.saved import is_view, saved_for_backward
from seqloom.plan.clusters import Cluster
from seqloom.plan.labels import ATTENTION
from seqloom.plan.placement import Layout, Move, local_shape
from seqloom.plan.space import Axis, Strategy

LIKE = " as kept by "  # a tensor of its own, of the size of a value: `logits as kept by losses`
MATMULS = ("aten.linear.default", "aten.matmul.default", "aten.mm.default")


@dataclass(frozen=True)
class Price:
    """Cost of one cluster under one strategy on one rank. `saved` maps (value, layout) to bytes that autograd keeps.

    `working_bytes` are the gradients of its inputs and outputs and its temporaries, alive while its backward runs.
    """

    forward_s: float
    backward_s: float
    saved: Mapping[tuple[str, Layout], int]
    working_bytes: int


@dataclass(frozen=True)
class Machine:
    """The mesh of one scale unit laid over the hardware: axis sizes outer to inner, consecutive ranks, and `dp` units of it."""

    hardware: Hardware
    axes: tuple[Axis, ...]
    dp: int

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Sizes of the plan axes, outer to inner."""
        return tuple(axis.size for axis in self.axes)

    def span(self, axes: Sequence[int]) -> AxisSpan:
        """The ranks that some axes together span; neighbouring axes are exact, others are priced by their outermost one's reach."""
        stride = prod(self.sizes[max(axes) + 1 :])
        return AxisSpan(prod(self.sizes[a] for a in axes), stride if _adjacent(axes) else prod(self.sizes[min(axes) + 1 :]))

    def sum_span(self) -> AxisSpan:
        """The ranks over which parameters of `sum` axes are reduced and sharded: those axes and the scale units."""
        chosen = [a for a, axis in enumerate(self.axes) if axis.role == "sum"]
        inner = prod(axis.size for axis in self.axes if axis.role == "split")
        return AxisSpan(self.dp * prod(self.sizes[a] for a in chosen), inner)


def _adjacent(axes: Sequence[int]) -> bool:
    return list(axes) == list(range(min(axes), max(axes) + 1))


_COLLECTIVES: dict[tuple[str, str], tuple[tuple[CollectiveKind, bool], ...]] = {
    # (from, to) -> collectives of forward and backward; True where the bytes are those of the gathered tensor
    ("S", "R"): (("all_gather", True),),
    ("S", "B"): (("all_gather", True), ("reduce_scatter", True)),
    ("S", "S"): (("all_to_all", False), ("all_to_all", False)),
    ("P", "R"): (("all_reduce", False),),
    ("P", "B"): (("all_reduce", False), ("all_reduce", False)),
    ("P", "S"): (("reduce_scatter", False), ("all_gather", False)),
    ("R", "S"): (("all_gather", False),),
    ("R", "B"): (("all_reduce", False),),
    ("B", "S"): (),
    ("B", "R"): (),
}
_BACKWARD_ONLY = {("R", "S"), ("R", "B")}


def move_collectives(value: Value, before: Layout, move: Move, machine: Machine) -> list[tuple[bool, CollectiveKind, int]]:
    """Collectives of one reshard as (is backward, kind, bytes); bytes as `seqloom.cost.communication` counts them."""
    local = prod(local_shape(value.shape, before, machine.sizes)) * value.dtype.itemsize
    ranks = prod(machine.sizes[a] for a in move.axes)
    pair = (move.src.kind, move.dst.kind)
    found = []
    for index, (kind, gathered) in enumerate(_COLLECTIVES[pair]):
        backward = index == 1 or pair in _BACKWARD_ONLY
        if value.requires_grad or not backward:
            found.append((backward, kind, local * ranks if gathered else local))
    return found


def move_seconds(value: Value, before: Layout, move: Move, machine: Machine) -> tuple[float, float]:
    """Forward and backward seconds of one reshard, with the local copies that pack and unpack it."""
    span = machine.span(move.axes)
    seconds = [0.0, 0.0]
    for backward, kind, nbytes in move_collectives(value, before, move, machine):
        seconds[backward] += collective_seconds(machine.hardware, kind, nbytes, span) + bandwidth_seconds(machine.hardware, 2.0 * nbytes)
    if not seconds[0] and not seconds[1] and move.dst.kind == "S":
        local = prod(local_shape(value.shape, before, machine.sizes)) * value.dtype.itemsize
        seconds = [bandwidth_seconds(machine.hardware, local), bandwidth_seconds(machine.hardware, local)]
    return seconds[0], seconds[1]


def move_wire_bytes(value: Value, before: Layout, move: Move, machine: Machine) -> dict[CollectiveKind, int]:
    """Bytes that one rank sends in forward and backward, by kind."""
    ranks = prod(machine.sizes[a] for a in move.axes)
    total: dict[CollectiveKind, int] = {}
    for _, kind, nbytes in move_collectives(value, before, move, machine):
        total[kind] = total.get(kind, 0) + wire_bytes(kind, nbytes, ranks)
    return total


def price(graph: Graph, cluster: Cluster, strategy: Strategy, machine: Machine) -> Price:
    """Seconds and bytes of a cluster under a strategy on one rank."""
    shapes = {name: local_shape(graph.values[name].shape, strategy.layouts[name], machine.sizes) for name in cluster.values}
    nbytes = {name: prod(shape) * graph.values[name].dtype.itemsize for name, shape in shapes.items()}
    pieces = prod(size for size, split in zip(machine.sizes, strategy.splits, strict=True) if split)
    forward, backward = _seconds(graph, cluster, shapes, nbytes, pieces, machine.hardware)
    activations = [n for n in (*cluster.inputs, *cluster.outputs) if graph.values[n].requires_grad and graph.values[n].kind != "parameter"]
    working = sum(nbytes[name] for name in activations) + _workspace(cluster.nodes[0], shapes)
    return Price(forward, backward, _saved(graph, cluster, strategy, nbytes), working)


def flops_of(node: Node) -> int:
    """Forward FLOPs of a whole node."""
    return flops(node.op, node.args, dict(node.kwargs), node.bound)


def _workspace(node: Node, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Temporaries of a registered operator at its local sizes."""
    sizes = dict(node.bound.sizes)
    for name, dims in zip(node.inputs, node.bound.inputs, strict=True):
        sizes.update({dim[0]: size for dim, size in zip(dims or (), shapes[name], strict=False) if len(dim) == 1})
    return workspace_bytes(node.op, node.args, dict(node.kwargs), sizes)


def _seconds(
    graph: Graph,
    cluster: Cluster,
    shapes: Mapping[str, tuple[int, ...]],
    nbytes: Mapping[str, int],
    pieces: int,
    hardware: Hardware,
) -> tuple[float, float]:
    """Forward and backward seconds of a cluster at its local sizes."""
    node = cluster.nodes[0]
    trained = any(graph.values[name].requires_grad for name in cluster.outputs)
    if node.op in MATMULS:
        m, n, k = matmul_sizes(node, shapes)
        dtype = graph.values[node.outputs[0]].dtype
        forward = matmul_seconds(hardware, m, n, k, dtype)
        return forward, matmul_seconds(hardware, m, k, n, dtype) + matmul_seconds(hardware, n, k, m, dtype)
    if node.op == ATTENTION:
        count, dtype = flops_of(node) / pieces, graph.values[node.outputs[0]].dtype
        backward = attention_seconds(hardware, ATTENTION_BACKWARD_RATIO * count, dtype, backward=True)
        return attention_seconds(hardware, count, dtype), backward
    traffic = sum(nbytes[name] for name in (*cluster.inputs, *cluster.outputs))
    if node.op == "aten.embedding.default":
        traffic = 2 * nbytes[node.outputs[0]]
    moved = bandwidth_seconds(hardware, traffic)
    count = flops_of(node) / pieces if cluster.heavy else 0.0
    if count:
        dtype = graph.values[node.inputs[0]].dtype
        side = 4096
        forward = max(moved, matmul_seconds(hardware, side, side, side, dtype) * count / (2.0 * side**3))
        return forward, 3 * forward  # a registered operator with FLOPs keeps its inputs only: it recomputes before it differentiates
    return moved, 2 * moved if trained else 0.0


def matmul_sizes(node: Node, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int, int]:
    """(m, n, k) of a linear or matmul node on one rank: rows, columns and contracted size."""
    left, right = (shapes[name] for name in node.inputs[:2])
    columns = right[0] if node.op == "aten.linear.default" else right[-1]
    return prod(left[:-1]), columns, left[-1]


def _saved(graph: Graph, cluster: Cluster, strategy: Strategy, nbytes: Mapping[str, int]) -> dict[tuple[str, Layout], int]:
    """What autograd keeps of the cluster, each storage once: a view counts as the value that it looks into."""
    base: dict[str, str] = {}
    kept: dict[tuple[str, Layout], int] = {}
    for node in cluster.nodes:
        if is_view(node.op):
            base.update(dict.fromkeys(node.outputs, base.get(node.inputs[0], node.inputs[0])))
        if not any(graph.values[name].requires_grad for name in node.outputs):
            continue
        for side, index in saved_for_backward(node.op, node.args, dict(node.kwargs), graph.values):
            name = (node.outputs if side == "output" else node.inputs)[index]
            if side == "like_input":
                kept[f"{name}{LIKE}{node.outputs[0]}", strategy.layouts[name]] = nbytes[name]
            elif graph.values[name].kind not in ("parameter", "buffer"):
                name = base.get(name, name)
                kept[name, strategy.layouts[name]] = nbytes[name]
    return kept


def kept_value(graph: Graph, name: str) -> Value:
    """The value whose shape a kept tensor has."""
    return graph.values[name.partition(LIKE)[0]]


def view_root(graph: Graph, cluster: Cluster) -> str | None:
    """The input that a cluster made of views only looks into; None for other clusters."""
    if all(is_view(node.op) for node in cluster.nodes) and len(cluster.inputs) == 1:
        return cluster.inputs[0]
    return None
