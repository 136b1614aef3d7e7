"""What is asked of the planner, and the meshes that could answer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import prod

from seqloom.cost.hardware import Hardware
from seqloom.errors import UserError
from seqloom.plan.labels import is_attention
from seqloom.plan.regions import Regions
from seqloom.plan.space import Axis, parse_force

MAX_AXES = 3
MAX_SPLIT_AXES = 2  # FSDP2 shards around a parameter that is split over at most two axes


@dataclass(frozen=True)
class Request:
    """What is asked of the planner.

    `force` is the text of `--force`, `zero` one level only; `recompute` None lets the planner choose, False recomputes nothing, True all
    that may be; `offload` whether activations may go to host memory; `open_constants` whether constants that functions leave open (the
    chunk of the loss) are chosen; `sum_axes` how many axes may share batch, sequence and heads; `gap` the share of a step below which two
    plans count as equal; `most_axes` how many axes a mesh may have at most.
    """

    ranks: int
    dp: int
    accumulation: int
    hardware: Hardware
    itemsize: int
    force: str | None = None
    zero: int | None = None
    recompute: bool | None = None
    offload: bool = True
    open_constants: bool = True
    sum_axes: int = MAX_AXES
    time_limit_s: float = 20.0
    gap: float = 1e-4
    most_axes: int = MAX_AXES

    @property
    def may_offload(self) -> bool:
        """Whether activations may go to host memory, and there is any."""
        return self.offload and self.hardware.host_memory_bytes > 0

    @property
    def budget_bytes(self) -> float:
        """Memory that a plan may use on one device."""
        return self.hardware.usable_bytes


def candidate_meshes(request: Request) -> Iterator[tuple[Axis, ...]]:
    """Meshes to try, coarse ones first. `sum` axes come before `split` ones: storage sharding goes around tensor parallelism (FSDP2's
    order). Split axes stay inside a node unless `--force` says otherwise: they communicate in every layer.
    """
    if request.force:
        parts = parse_force(request.force)
        if prod(size for _, size in parts) != request.ranks:
            raise UserError(
                f"--force {request.force} makes {prod(n for _, n in parts)} ranks and plan_ngpus is {request.ranks}: make them equal"
            )
        ordered = sorted(parts, key=lambda part: part[0].startswith("tp"))
        yield tuple(Axis(size, "split" if kind.startswith("tp") else "sum", kind) for kind, size in ordered if size > 1)
        return
    node = request.hardware.links[0].ranks_per_group
    for sizes in _factorizations(request.ranks, request.most_axes):
        for splits in range(min(len(sizes), MAX_SPLIT_AXES) + 1):
            if len(sizes) - splits > request.sum_axes or _mirrored(sizes, splits, node) or _straddles(sizes, node):
                continue
            if splits == 0 or prod(sizes[len(sizes) - splits :]) <= node:
                roles = ["sum"] * (len(sizes) - splits) + ["split"] * splits
                yield tuple(Axis(size, role) for size, role in zip(sizes, roles, strict=True))


def wanted_sum_axes(regions: Regions, request: Request) -> int:
    """How many `sum` axes a mesh can make use of: one, and one more for each thing that one alone can not split as it likes.

    These are: rows of the batch that are too few for all ranks; fewer key/value heads than ranks, then fewer query heads; several nodes
    (storage sharded inside).
    """
    batch = regions.graph.values[regions.graph.inputs[0]].shape[0]
    heads: set[tuple[int, int]] = set()
    for part in regions.parts.values():
        for node in (node for cluster in part.parts for node in cluster.nodes if is_attention(node.op)):
            query, key = (part.graph.values[name].shape[1] for name in node.inputs[:2])
            heads.add((query, key))
    short = max((sum(count % request.ranks != 0 for count in pair) for pair in heads), default=0)
    wanted = 1 + (batch > 1 and batch % request.ranks != 0) + short + (request.ranks > request.hardware.links[0].ranks_per_group)
    return min(MAX_AXES, wanted)


def _mirrored(sizes: tuple[int, ...], splits: int, node: int) -> bool:
    """Whether a mesh differs from another one only in the order of two `sum` axes inside a node, and has the smaller one in front."""
    sums = range(len(sizes) - splits)
    return any(sizes[outer] < sizes[inner] and prod(sizes[outer:]) <= node for outer, inner in pairwise(sums))


def _straddles(sizes: tuple[int, ...], node: int) -> bool:
    """Whether a mesh of three axes over whole nodes has no border between axes where nodes end."""
    ranks = prod(sizes)
    return len(sizes) > 2 and ranks > node and ranks % node == 0 and all(prod(sizes[axis:]) != node for axis in range(1, len(sizes)))


def _factorizations(ranks: int, axes: int) -> Iterator[tuple[int, ...]]:
    """Ordered factorizations into up to so many factors above 1, few factors first."""
    if ranks == 1:
        yield ()
        return
    for count in range(1, axes + 1):
        yield from _into(ranks, count)


def _into(ranks: int, count: int) -> Iterator[tuple[int, ...]]:
    if count == 1:
        yield (ranks,)
        return
    for first in range(2, ranks // 2 + 1):
        if ranks % first == 0:
            yield from ((first, *rest) for rest in _into(ranks // first, count - 1) if min(rest) > 1)
