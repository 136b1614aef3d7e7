"""How a tensor and its gradient lie on the ranks of one mesh axis, and the reshards between layouts.

Role in the pipeline: the words that the search space, the memory model and the emitter share. A `Layout` is one `Placement` per mesh
axis, outer axis first. Two axes may split the same dimension; the earlier axis is then the outer one, so a layout alone says which
slice every rank holds. `docs/architecture.md` has the table of placements and of the reshards with their transposes.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from math import prod
from typing import Literal, NamedTuple

Kind = Literal["S", "R", "B", "P"]


class Placement(NamedTuple):
    """One axis: `S` split along `dim`; `R` replicated; `B` replicated, gradient partial; `P` partial, gradient replicated."""

    kind: Kind
    dim: int = -1

    def __str__(self) -> str:
        return f"S({self.dim})" if self.kind == "S" else self.kind


R, B, P = Placement("R"), Placement("B"), Placement("P")
Layout = tuple[Placement, ...]


def S(dim: int) -> Placement:
    """Split along `dim`."""
    return Placement("S", dim)


class Move(NamedTuple):
    """One reshard: `axes` (mesh order) go together from placement `src` to `dst`; `layout` is the layout of the tensor after it."""

    axes: tuple[int, ...]
    src: Placement
    dst: Placement
    layout: Layout


def local_shape(shape: Sequence[int], layout: Layout, sizes: Sequence[int]) -> tuple[int, ...]:
    """Shape of one rank's piece of a tensor of global `shape`; raises ValueError where a split does not divide."""
    local = list(shape)
    for placement, size in zip(layout, sizes, strict=True):
        if placement.kind == "S":
            if local[placement.dim] % size:
                raise ValueError(f"dimension {placement.dim} of {tuple(shape)} does not divide by {size}")
            local[placement.dim] //= size
    return tuple(local)


@lru_cache(maxsize=100_000)
def local_numel(shape: tuple[int, ...], layout: Layout, sizes: tuple[int, ...]) -> int:
    """Elements of one rank's piece of a tensor."""
    return prod(local_shape(shape, layout, sizes))


def divides(shape: Sequence[int], layout: Layout, sizes: Sequence[int]) -> bool:
    """Whether every split of the layout cuts the tensor into equal pieces."""
    pieces: dict[int, int] = {}
    for placement, size in zip(layout, sizes, strict=True):
        if placement.kind == "S":
            pieces[placement.dim] = pieces.get(placement.dim, 1) * size
    return all(shape[dim] % count == 0 for dim, count in pieces.items())


# What a tensor may become on one axis, in one collective (or none). A partial sum is never made on purpose.
_TARGETS: dict[Kind, tuple[Kind, ...]] = {"S": ("S", "R", "B"), "P": ("S", "R", "B"), "R": ("S", "B"), "B": ("S", "R")}


def _moves(shape: tuple[int, ...], sizes: tuple[int, ...], layout: Layout, dims: tuple[int, ...]) -> Iterator[Move]:
    """Every reshard that keeps the layout canonical, one axis or several axes together."""
    for count in range(1, len(layout) + 1):
        for axes in itertools.combinations(range(len(layout)), count):
            src = layout[axes[0]]
            if any(layout[a] != src for a in axes):
                continue
            if count > 1 and src.kind in "RB":
                continue  # local moves gain nothing from going together
            for kind in _TARGETS[src.kind]:
                for dst in (S(d) for d in dims) if kind == "S" else (Placement(kind),):
                    after = tuple(dst if a in axes else p for a, p in enumerate(layout))
                    if dst != src and _canonical(layout, axes, src) and _canonical(after, axes, dst) and divides(shape, after, sizes):
                        yield Move(axes, src, dst, after)


def _canonical(layout: Layout, axes: tuple[int, ...], placement: Placement) -> bool:
    """Whether the moving axes are the innermost ones among those that split the dimension."""
    if placement.kind != "S":
        return True
    others = [a for a, p in enumerate(layout) if p == placement and a not in axes]
    return all(other < axes[0] for other in others)


MoveCost = Callable[[tuple[int, ...], Layout, Move], float]


def reshard_path(
    shape: tuple[int, ...], src: Layout, dst: Layout, sizes: tuple[int, ...], cost: MoveCost
) -> tuple[float, tuple[Move, ...]] | None:
    """The cheapest sequence of reshards from `src` to `dst` for a tensor of global `shape`, by Dijkstra over layouts.

    `cost(shape, layout_before, move)` is in seconds, forward and backward together. None when no sequence exists
    (a partial sum can not be made from anything else).
    """
    return cheapest_path(
        src, dst, lambda layout, dims: [(cost(shape, layout, move), move) for move in cached_moves(shape, sizes, layout, dims)]
    )


Route = tuple[float, tuple[Move, ...]]  # seconds, moves
Priced = Callable[[Layout, tuple[int, ...]], list[tuple[float, Move]]]  # moves out of a layout, to splits of these dimensions


def cheapest_path(src: Layout, dst: Layout, priced: Priced) -> Route | None:
    """As `reshard_path`, with the moves out of a layout and their seconds."""
    if src == dst:
        return 0.0, ()
    return next((route for layout, route in _routes(src, path_dims(src, dst), priced) if layout == dst), None)


def cheapest_paths(src: Layout, dims: tuple[int, ...], priced: Priced) -> dict[Layout, Route]:
    """The cheapest path to every layout that can be reached through splits of `dims` alone."""
    return dict(_routes(src, dims, priced))


def path_dims(src: Layout, dst: Layout) -> tuple[int, ...]:
    """The dimensions that a path between two layouts may split: those that one of them splits."""
    return tuple(sorted({p.dim for p in (*src, *dst) if p.kind == "S"}))


def _routes(src: Layout, dims: tuple[int, ...], priced: Priced) -> Iterator[tuple[Layout, Route]]:
    """Layouts in the order of their distance, each with its path."""
    tie = itertools.count()
    frontier: list[tuple[float, int, Layout, tuple[Move, ...]]] = [(0.0, next(tie), src, ())]
    settled: set[Layout] = set()
    while frontier:
        spent, _, layout, path = heapq.heappop(frontier)
        if layout in settled:
            continue
        settled.add(layout)
        yield layout, (spent, path)
        for seconds, move in priced(layout, dims):
            if move.layout not in settled:
                heapq.heappush(frontier, (spent + seconds, next(tie), move.layout, (*path, move)))


@lru_cache(maxsize=100_000)
def cached_moves(shape: tuple[int, ...], sizes: tuple[int, ...], layout: Layout, dims: tuple[int, ...]) -> tuple[Move, ...]:
    """The moves out of a layout, in a fixed order (so that equal costs are broken the same way everywhere)."""
    return tuple(_moves(shape, sizes, layout, dims))
