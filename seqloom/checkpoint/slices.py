"""Boxes: which part of a global tensor a rank holds, and how parts meet.

Role in the pipeline: `write` asks which boxes of each tensor this rank holds, `read` asks which stored pieces meet the boxes it wants.
In go tensors or plain placements; out come boxes, `(offsets, sizes)` in the global tensor. Nothing here communicates.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement, Replicate, Shard, _StridedShard

from seqloom.errors import UserError

Run = tuple[int, int]


@dataclass(frozen=True, order=True)
class Box:
    """A rectangular part of a tensor: per dimension its first index and its length. A scalar's box has no dimensions."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        """The box that covers a tensor of `shape`."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.sizes)

    def intersect(self, other: Box) -> Box | None:
        """The common part of two boxes of one tensor, or None where they share no element."""
        starts = [max(a, b) for a, b in zip(self.offsets, other.offsets, strict=True)]
        ends = [min(a + n, b + m) for a, n, b, m in zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)]
        if any(end <= start for start, end in zip(starts, ends, strict=True)):
            return None
        return Box(tuple(starts), tuple(end - start for start, end in zip(starts, ends, strict=True)))

    def within(self, outer: Box) -> Box:
        """This box with offsets counted from the first element of `outer`."""
        return Box(tuple(a - b for a, b in zip(self.offsets, outer.offsets, strict=True)), self.sizes)

    def narrow(self, tensor: torch.Tensor) -> torch.Tensor:
        """The view of `tensor` that this box covers."""
        for dim, (offset, size) in enumerate(zip(self.offsets, self.sizes, strict=True)):
            tensor = tensor.narrow(dim, offset, size)
        return tensor


@dataclass(frozen=True)
class LocalBox:
    """One box that a rank holds: `part` is where it lies in the global tensor, `place` where it lies in the local one."""

    part: Box
    place: Box


def local_boxes(tensor: torch.Tensor) -> tuple[LocalBox, ...]:
    """The boxes of the global tensor that this rank's local tensor holds, empty ones left out.

    A plain tensor is held whole. Raises `UserError` for placements other than Shard and Replicate, and where the local tensor has
    another size than its placements say.
    """
    if not isinstance(tensor, DTensor):
        whole = Box.whole(tensor.shape)
        return (LocalBox(whole, whole),) if whole.numel else ()
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return ()
    boxes = placed_boxes(tuple(tensor.shape), tuple(tensor.device_mesh.shape), coordinate, tensor.placements)
    held, found = sum(box.part.numel for box in boxes), local_tensor(tensor).numel()
    if held != found:
        raise UserError(
            f"a tensor of shape {tuple(tensor.shape)} placed as {tensor.placements} should have {held} elements on this rank but has "
            f"{found}: make it with distribute_tensor or fully_shard"
        )
    return boxes


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The storage of this rank, outside autograd: the tensor itself, or a DTensor's local one."""
    with torch.no_grad():
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def placed_boxes(
    shape: tuple[int, ...], mesh_shape: tuple[int, ...], coordinate: Sequence[int], placements: Sequence[Placement]
) -> tuple[LocalBox, ...]:
    """The boxes of a tensor of global `shape` at one mesh coordinate, in the order of the local tensor.

    One box, but for strided placements that take several stretches of a dimension. Raises `UserError` for partial sums.
    """
    for placement in placements:
        if not isinstance(placement, (Shard, _StridedShard, Replicate)):
            raise UserError(f"a tensor placed as {tuple(placements)} cannot be saved: only Shard and Replicate can; reduce it first")
    runs = [_dim_runs(dim, size, mesh_shape, coordinate, placements) for dim, size in enumerate(shape)]
    starts = [list(itertools.accumulate((stop - start for start, stop in per_dim), initial=0)) for per_dim in runs]
    boxes = []
    for index in itertools.product(*(range(len(per_dim)) for per_dim in runs)):
        chosen = [runs[dim][i] for dim, i in enumerate(index)]
        sizes = tuple(stop - start for start, stop in chosen)
        place = tuple(starts[dim][i] for dim, i in enumerate(index))
        boxes.append(LocalBox(Box(tuple(start for start, _ in chosen), sizes), Box(place, sizes)))
    return tuple(box for box in boxes if box.part.numel)


def _dim_runs(dim: int, size: int, mesh_shape: Sequence[int], coordinate: Sequence[int], placements: Sequence[Placement]) -> list[Run]:
    """The stretches of one dimension held at a coordinate.

    Mesh axes split from left to right. FSDP2 is the exception: it splits what tensor parallelism left, though its axis stands to the
    left, and says so by a strided placement whose split factor is the number of shards of the axes to its right. Read from left to
    right, such a placement misplaces the last rows when the sizes are uneven (7 rows on 3 x 2 ranks), so it is applied last.
    """
    axes = [axis for axis, placement in enumerate(placements) if isinstance(placement, (Shard, _StridedShard)) and placement.dim == dim]
    runs, deferred = [(0, size)], []
    for position, axis in enumerate(axes):
        placement, count, index = placements[axis], mesh_shape[axis], coordinate[axis]
        if not isinstance(placement, _StridedShard):
            runs = _chunk(runs, count, index)
        elif placement.split_factor == math.prod(mesh_shape[later] for later in axes[position + 1 :]):
            deferred.append((count, index))
        else:
            pieces = [_chunk(runs, placement.split_factor, i) for i in range(placement.split_factor)]
            runs = _merge(run for piece in pieces for run in _chunk(piece, count, index))
    for count, index in reversed(deferred):
        runs = _chunk(runs, count, index)
    return runs


def _chunk(runs: Sequence[Run], count: int, index: int) -> list[Run]:
    """The `index`-th of `count` chunks, as `torch.chunk` cuts them: all of the rounded-up length, the last ones shorter or empty."""
    total = sum(stop - start for start, stop in runs)
    length = -(-total // count)
    first, last = index * length, min((index + 1) * length, total)
    taken, position = [], 0
    for start, stop in runs:
        a, b = max(first - position, 0), min(last - position, stop - start)
        if a < b:
            taken.append((start + a, start + b))
        position += stop - start
    return taken


def _merge(runs: Iterable[Run]) -> list[Run]:
    merged: list[Run] = []
    for start, stop in runs:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return merged


def cover(wanted: Box, pieces: Sequence[Box]) -> list[tuple[int, Box]]:
    """The parts of `wanted` that the pieces hold: (index of the piece, common box), each element exactly once.

    Raises `ValueError` where elements of `wanted` are in no piece or in two.
    """
    found = [(index, common) for index, piece in enumerate(pieces) if (common := wanted.intersect(piece)) is not None]
    if not wanted.sizes:
        found = found[:1]
    if sum(common.numel for _, common in found) != wanted.numel:
        raise ValueError(f"the pieces do not hold {wanted} exactly once")
    if any(a.intersect(b) is not None for (_, a), (_, b) in itertools.combinations(found, 2)):
        raise ValueError(f"two pieces hold the same part of {wanted}")
    return found
