"""Fill tensors from a checkpoint, and check every block of it on the way.

Role in the pipeline: the last step of `read.load_checkpoint`, on all ranks. A rank hashes the blocks of which it wants at least half,
while it reads them for its tensors; the rest, which no rank wants so much of, is shared out evenly. So together the ranks hash all of
the checkpoint, and read little more than they need.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from seqloom.checkpoint import group
from seqloom.checkpoint.digest import BLOCK_BYTES
from seqloom.checkpoint.reader import CheckedReader, TensorReader
from seqloom.checkpoint.slices import local_boxes, local_tensor
from seqloom.checkpoint.stream import BlockStream
from seqloom.checkpoint.verify import BlockId, Contents, disagreement, shared_digests

ENOUGH = 0.5


@dataclass(frozen=True)
class Wanted:
    """A tensor to fill, plain or DTensor, and the name that it is stored under."""

    source: str
    tensor: torch.Tensor


def fill(doing: str, reader: TensorReader, wanted: Sequence[Wanted]) -> None:
    """Fill what this rank holds of each tensor. Collective; raises `UserError` on all ranks where it fails on one."""
    group.attempt(doing, lambda: _fill(reader, wanted))


def fill_checked(doing: str, reader: CheckedReader, path: Path, wanted: Sequence[Wanted]) -> str | None:
    """Fill the tensors and hash the whole checkpoint; what is wrong with it, or None. Collective; raises as `fill` does.

    Where something is wrong the tensors may have been filled with it.
    """
    contents, claimed = Contents({}), []

    def look() -> None:
        nonlocal contents, claimed
        contents = Contents.of(path)
        claimed = _blocks_wanted(reader, contents, wanted)

    group.attempt(doing, look)
    found = shared_digests(contents, claimed)
    group.attempt(doing, lambda: found.update(_fill_hashing(reader, contents, claimed, wanted)))
    return disagreement(contents, found)


@torch.no_grad()
def spoil(tensors: Iterable[torch.Tensor]) -> None:
    """Overwrite tensors with what no run can take for values: NaN, for integers their least value."""
    for tensor in tensors:
        local = local_tensor(tensor)
        if local.dtype.is_floating_point or local.dtype.is_complex:
            local.fill_(float("nan"))
        else:
            local.fill_(False if local.dtype == torch.bool else torch.iinfo(local.dtype).min)


def _fill(reader: TensorReader, wanted: Sequence[Wanted]) -> None:
    for pair in wanted:
        reader.fill(pair.source, pair.tensor)


def _blocks_wanted(reader: CheckedReader, contents: Contents, wanted: Sequence[Wanted]) -> list[BlockId]:
    """The blocks of which this rank's tensors want at least half."""
    shares: dict[BlockId, float] = defaultdict(float)
    for pair in wanted:
        for box in local_boxes(pair.tensor):
            for extent in reader.extents(pair.source, box.part):
                density = extent.nbytes / (extent.end - extent.first)
                for index in range(extent.first // BLOCK_BYTES, (extent.end - 1) // BLOCK_BYTES + 1):
                    start = index * BLOCK_BYTES
                    shares[extent.file, index] += density * (min(extent.end, start + BLOCK_BYTES) - max(extent.first, start))
    rest = {(name, index): contents.files[name].size - index * BLOCK_BYTES for name, index in shares}
    return [block for block, share in shares.items() if share >= ENOUGH * min(BLOCK_BYTES, rest[block])]


def _fill_hashing(reader: CheckedReader, contents: Contents, claimed: Sequence[BlockId], wanted: Sequence[Wanted]) -> dict[BlockId, str]:
    """Fill the tensors with a stream before every file of which blocks are claimed; the digests of these."""
    indices: dict[str, list[int]] = defaultdict(list)
    for name, index in claimed:
        indices[name].append(index)
    for name, own in indices.items():
        file = contents.files[name]
        reader.file(name).read_through(BlockStream(file.path, file.size, own, file.overlay))
    _fill(reader, wanted)
    return {(name, index): digest for name in indices for index, digest in reader.file(name).finish_stream().items()}
