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
from seqloom.cost.compute import attention_seconds, bandwidth_seconds, matmul_seconds, pointwise_seconds
from seqloom.cost.hardware import Hardware
from seqloom.graph import Graph, Node, Value
from seqloom.ops.flops import flops, local_flops, matmul_side, workspace_bytes
from seqloom.ops.kernel_rates import ATTENTION_BACKWARD_RATIO
from seqloom.ops.saved import is_view
from seqloom.plan.clusters import Cluster, DimClass
from seqloom.plan.context import Exchange, exchange_of
from seqloom.plan.labels import is_attention
from seqloom.plan.placement import Layout, Move, local_shape
from seqloom.plan.space import Axis, Strategy, with_constants

LIKE = " as kept by "  # a tensor of its own, of the size of a value: `logits as kept by losses`
MATMULS = ("aten.linear.default", "aten.matmul.default", "aten.mm.default")
LARGE = 4096  # side of a matrix product that runs at the full rate
DP = -1  # the axis of scale units, outside every plan axis


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

    @cached_property
    def storage_axes(self) -> tuple[int, ...]:
        """Axes over which parameters are reduced and may be sharded, outer to inner: the scale units and the `sum` axes."""
        return (DP, *(a for a, axis in enumerate(self.axes) if axis.role == "sum"))

    def size(self, axis: int) -> int:
        """Ranks of one axis; `DP` for the scale units."""
        return self.dp if axis == DP else self.sizes[axis]

    def replicated(self, sharded: Sequence[int]) -> tuple[int, ...]:
        """The storage axes that are not in `sharded`."""
        return tuple(axis for axis in self.storage_axes if axis not in sharded)

    def span(self, axes: Sequence[int]) -> AxisSpan:
        """The ranks that some axes (mesh order) together span; axes that do not neighbour are taken as evenly spread over their reach."""
        key = tuple(axes)
        if key not in self._spans:
            ranks = prod(self.size(axis) for axis in key)
            reach = self.size(key[0]) * prod(self.sizes[key[0] + 1 :]) if key else 1
            inner = prod(self.sizes[key[-1] + 1 :]) if key else 1
            neighbours = list(key) == list(range(key[0], key[-1] + 1)) if key else True
            self._spans[key] = AxisSpan(ranks, inner if neighbours else max(1, reach // ranks))
        return self._spans[key]

    @cached_property
    def _spans(self) -> dict[tuple[int, ...], AxisSpan]:
        return {}


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
        copied = (4.0 if kind == "all_to_all" else 2.0) * nbytes  # packed before and unpacked after; the others one of both
        seconds[backward] += collective_seconds(machine.hardware, kind, nbytes, span) + bandwidth_seconds(machine.hardware, copied)
    if not seconds[0] and not seconds[1] and move.dst.kind == "S":
        local = prod(local_shape(value.shape, before, machine.sizes)) * value.dtype.itemsize
        seconds = [bandwidth_seconds(machine.hardware, local), bandwidth_seconds(machine.hardware, local)]
    return seconds[0], seconds[1]


def move_wire_bytes(value: Value, before: Layout, move: Move, machine: Machine, forward_only: bool = False) -> dict[CollectiveKind, int]:
    """Bytes that one rank sends in forward and backward (or forward alone), by kind."""
    ranks = prod(machine.sizes[a] for a in move.axes)
    total: dict[CollectiveKind, int] = {}
    for backward, kind, nbytes in move_collectives(value, before, move, machine):
        if not (backward and forward_only):
            total[kind] = total.get(kind, 0) + wire_bytes(kind, nbytes, ranks)
    return total


def price(graph: Graph, cluster: Cluster, strategy: Strategy, machine: Machine, tiles: int = 1, along: DimClass | None = None) -> Price:
    """Seconds and bytes of a cluster under a strategy on one rank.

    With `tiles` the dimension `along` is worked through in so many pieces, one after the other: seconds are of all of them, bytes of one.
    """
    cluster = with_constants(cluster, strategy.constants)
    shapes = {name: local_shape(graph.values[name].shape, strategy.layouts[name], machine.sizes) for name in cluster.values}
    if along is not None:
        shapes = {name: _tile(shape, along.dims.get(name), tiles) for name, shape in shapes.items()}
    nbytes = {name: prod(shape) * graph.values[name].dtype.itemsize for name, shape in shapes.items()}
    sizes = local_sizes(cluster, strategy, machine.sizes)
    count = rank_flops(cluster, strategy, machine.sizes) / tiles
    forward, backward = _seconds(graph, cluster, shapes, nbytes, count, _side(cluster.nodes[0], sizes), machine.hardware)
    travel = exchange(graph, cluster, strategy, machine)
    if travel is not None:
        forward, backward = travel.seconds(forward, backward, machine.hardware, machine.span(travel.axes))
    activations = [n for n in (*cluster.inputs, *cluster.outputs) if graph.values[n].requires_grad and graph.values[n].kind != "parameter"]
    node = cluster.nodes[0]
    working = sum(nbytes[name] for name in activations) + workspace_bytes(node.op, node.args, dict(node.kwargs), sizes)
    working += 2 * max((nbytes[name] for name in _inside(graph, cluster)), default=0)  # a gradient inside the chain, and the next one
    return Price(tiles * forward, tiles * backward, _saved(cluster, strategy, nbytes), working)


def exchange(graph: Graph, cluster: Cluster, strategy: Strategy, machine: Machine) -> Exchange | None:
    """What travels inside a cluster that splits its sequence itself; None for all others."""
    if not any(option.context for option in cluster.classes):
        return None
    itemsize = graph.values[cluster.inputs[0]].dtype.itemsize
    return exchange_of(cluster, strategy.splits, machine.sizes, local_sizes(cluster, strategy, machine.sizes), itemsize)


def _inside(graph: Graph, cluster: Cluster) -> list[str]:
    """Values with a gradient that a cluster makes and uses up itself; views take no memory."""
    made = [name for node in cluster.nodes if not is_view(node.op) for name in node.outputs]
    return [name for name in made if name not in cluster.outputs and graph.values[name].requires_grad]


def _side(node: Node, sizes: Mapping[str, int]) -> int:
    return matmul_side(node.op, node.args, dict(node.kwargs), sizes) or LARGE


def _tile(shape: tuple[int, ...], dim: int | None, tiles: int) -> tuple[int, ...]:
    return shape if dim is None else (*shape[:dim], -(-shape[dim] // tiles), *shape[dim + 1 :])


def local_sizes(cluster: Cluster, strategy: Strategy, ranks: Sequence[int]) -> dict[str, int]:
    """Sizes by name of a costly node on one rank; where a piece is told its start, that of the last piece, which has the most to do."""
    sizes = dict(cluster.nodes[0].bound.sizes)
    starts = {option.name: option.start for option in cluster.classes}
    for count, split in zip(ranks, strategy.splits, strict=True):
        if split in sizes:
            sizes[split] //= count
    for split in strategy.splits:
        if starts.get(split):
            sizes[str(starts[split])] = cluster.nodes[0].bound.sizes[split] - sizes[split]
    return sizes


def flops_of(node: Node) -> int:
    """Forward FLOPs of a whole node."""
    return flops(node.op, node.args, dict(node.kwargs), node.bound)


def rank_flops(cluster: Cluster, strategy: Strategy, ranks: Sequence[int]) -> float:
    """Forward FLOPs of a costly cluster on one rank (the one with the most to do); 0 for others."""
    if not cluster.heavy:
        return 0.0
    node = with_constants(cluster, strategy.constants).nodes[0]
    if ":" in node.op:
        return float(local_flops(node.op, node.args, dict(node.kwargs), local_sizes(cluster, strategy, ranks)))
    return flops_of(node) / prod(size for size, split in zip(ranks, strategy.splits, strict=True) if split)


def backward_flops(cluster: Cluster, forward: float) -> float:
    """FLOPs of the backward of a costly cluster: two products for one; five for the two of attention; a registered function with FLOPs
    keeps only its inputs and computes again before it differentiates.
    """
    op = cluster.nodes[0].op
    return forward * (ATTENTION_BACKWARD_RATIO if is_attention(op) else 3.0 if ":" in op else 2.0)


def _seconds(
    graph: Graph,
    cluster: Cluster,
    shapes: Mapping[str, tuple[int, ...]],
    nbytes: Mapping[str, int],
    count: float,
    side: int,
    hardware: Hardware,
) -> tuple[float, float]:
    """Forward and backward seconds of a cluster at its local shapes; `count` are its FLOPs, `side` the smallest side of its products."""
    node = cluster.nodes[0]
    trained = any(graph.values[name].requires_grad for name in cluster.outputs)
    if node.op in MATMULS:
        m, n, k = matmul_sizes(node, shapes)
        dtype = graph.values[node.outputs[0]].dtype
        forward = matmul_seconds(hardware, m, n, k, dtype)
        return forward, matmul_seconds(hardware, m, k, n, dtype) + matmul_seconds(hardware, n, k, m, dtype)
    if is_attention(node.op):
        dtype = graph.values[node.outputs[0]].dtype
        backward = attention_seconds(hardware, ATTENTION_BACKWARD_RATIO * count, dtype, backward=True)
        return attention_seconds(hardware, count, dtype), backward
    traffic = sum(nbytes[name] for name in (*cluster.inputs, *cluster.outputs))
    if node.op == "aten.embedding.default":
        traffic = 2 * nbytes[node.outputs[0]]
    moved = pointwise_seconds(hardware, traffic, [traffic] if cluster.heavy else _operator_bytes(cluster, nbytes))
    if count:
        dtype = graph.values[node.inputs[0]].dtype
        forward = max(moved, matmul_seconds(hardware, side, LARGE, LARGE, dtype) * count / (2.0 * side * LARGE**2))
        return forward, 3 * forward  # a registered function with FLOPs keeps its inputs only: it recomputes before it differentiates
    return moved, 2 * moved if trained else 0.0


def _operator_bytes(cluster: Cluster, nbytes: Mapping[str, int]) -> list[int]:
    """Bytes that each operator of a chain reads and writes by itself; views move nothing."""
    return [sum(nbytes[name] for name in (*node.inputs, *node.outputs)) for node in cluster.nodes if not is_view(node.op)]


def matmul_sizes(node: Node, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int, int]:
    """(m, n, k) of a linear or matmul node on one rank: rows, columns and contracted size."""
    left, right = (shapes[name] for name in node.inputs[:2])
    columns = right[0] if node.op == "aten.linear.default" else right[-1]
    return prod(left[:-1]), columns, left[-1]


def _saved(cluster: Cluster, strategy: Strategy, nbytes: Mapping[str, int]) -> dict[tuple[str, Layout], int]:
    """What autograd keeps of the cluster, each storage once."""
    kept: dict[tuple[str, Layout], int] = {}
    for name, like in cluster.saved:
        kept[f"{name}{LIKE}{like}" if like else name, strategy.layouts[name]] = nbytes[name]
    return kept


def kept_value(graph: Graph, name: str) -> Value:
    """The value whose shape a kept tensor has."""
    return graph.values[name.partition(LIKE)[0]]
