"""Who writes what of a checkpoint: every distinct piece of state once, the bytes shared out evenly.

Role in the pipeline: the first step of a save, on all ranks, while the tensors lie still. Each rank tells which pieces it holds; each
works out the same `Division`. `write` then writes the pieces, from the live tensors or from copies of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from seqloom.checkpoint import group
from seqloom.checkpoint.slices import Box, local_boxes, local_tensor
from seqloom.checkpoint.tensorfile import DTYPES, TensorInfo, dtype_name
from seqloom.errors import UserError


@dataclass(frozen=True)
class Job:
    """One piece and the rank that writes it."""

    name: str
    box: Box
    info: TensorInfo
    owner: int

    @property
    def key(self) -> str:
        """Name in the shard file: the tensor's own, and where the piece starts if it is only a part."""
        return self.name if self.box.sizes == self.info.shape else f"{self.name}@{','.join(map(str, self.box.offsets))}"

    @property
    def stored(self) -> TensorInfo:
        """Shape and dtype of the piece."""
        return TensorInfo(self.box.sizes, self.info.dtype)


@dataclass(frozen=True)
class Division:
    """Every tensor of a checkpoint and every piece of it, the same on all ranks."""

    jobs: tuple[Job, ...]
    infos: Mapping[str, TensorInfo]

    @property
    def nbytes(self) -> int:
        """Bytes of all pieces."""
        return sum(job.stored.nbytes for job in self.jobs)

    def mine(self) -> list[Job]:
        """What this rank writes."""
        return [job for job in self.jobs if job.owner == group.rank()]


def divide(doing: str, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> Division:
    """Share the writing of `tensors` out. Collective. Aliases of tied weights (`state["tied"]`) are left out.

    Raises `UserError` on all ranks where ranks disagree about a tensor, or where the pieces leave gaps or overlap.
    """
    tied = set(state.get("tied") or {})
    kept = {name: tensor for name, tensor in tensors.items() if name.removeprefix("model.") not in tied}
    return _assign(group.attempt(doing, lambda: _propose(kept)))


def piece(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    """The part of this rank's local tensor that lies at `box` of the global one; it shares the tensor's memory."""
    place = next(held.place for held in local_boxes(tensor) if held.part == box)
    return place.narrow(local_tensor(tensor))


def _propose(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """What this rank holds, as JSON: per tensor dtype, shape, whether it is plain, and its boxes."""
    answer = {}
    for name, tensor in tensors.items():
        boxes = [(box.part.offsets, box.part.sizes) for box in local_boxes(tensor)]
        answer[name] = (dtype_name(tensor.dtype), tuple(tensor.shape), isinstance(tensor, DTensor), boxes)
    return answer


def _assign(proposals: Sequence[Mapping[str, Any]]) -> Division:
    """Who writes which piece: of the ranks that hold it, the one with the fewest bytes so far. The same on every rank.

    Plain tensors go to the first rank that has them. Raises `UserError` where ranks disagree or pieces leave gaps or overlap.
    """
    infos: dict[str, TensorInfo] = {}
    holders: dict[str, dict[Box, list[int]]] = defaultdict(lambda: defaultdict(list))
    for rank, proposal in enumerate(proposals):
        for name, (dtype, shape, is_split, boxes) in proposal.items():
            info = TensorInfo(tuple(shape), DTYPES[dtype])
            if infos.setdefault(name, info) != info:
                raise UserError(f"cannot save {name}: rank {rank} has {info}, an earlier rank {infos[name]}; all ranks need the same shape")
            for offsets, sizes in boxes:
                ranks = holders[name][Box(tuple(offsets), tuple(sizes))]
                if is_split or not ranks:
                    ranks.append(rank)
    load, jobs = [0] * len(proposals), []
    for name, info in infos.items():
        if sum(box.numel for box in holders[name]) * info.dtype.itemsize != info.nbytes:
            raise UserError(f"cannot save {name}: the parts that the ranks hold do not make up its shape {info.shape} exactly once")
        for box, ranks in sorted(holders[name].items()):
            owner = min(ranks, key=lambda rank: (load[rank], rank))
            jobs.append(Job(name, box, info, owner))
            load[owner] += jobs[-1].stored.nbytes
    return Division(tuple(jobs), infos)
