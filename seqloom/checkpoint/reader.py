"""One way to read tensors slice by slice, whatever holds them: a step folder, a merged file, a Hugging Face folder.

Role in the pipeline: `read` fills a program's tensors from a `TensorReader`, `merge` streams all of one into a file. A reader is a
mapping of names to `(shape, dtype)`; nothing is read before it is asked for.
"""

from __future__ import annotations

import json
import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from seqloom.checkpoint.digest import HEX_LENGTH
from seqloom.checkpoint.folders import StepFolder, open_step
from seqloom.checkpoint.manifest import FORMAT, VERSION, Manifest, Piece
from seqloom.checkpoint.slices import Box, cover, local_boxes, local_tensor
from seqloom.checkpoint.tensorfile import TensorFile, TensorInfo
from seqloom.errors import UserError

MERGED_KEY = "seqloom"
DIGEST_KEY = "digest"
NO_DIGEST = "0" * HEX_LENGTH
ROW_BATCH_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Extent:
    """Where a wanted part of a tensor lies: a file of the checkpoint, from its first byte there to its end, and how many bytes it has."""

    file: str
    first: int
    end: int
    nbytes: int


class TensorReader(Mapping[str, TensorInfo]):
    """Names -> (global shape, dtype), and slices of the named tensors."""

    @abstractmethod
    def read_slice(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        """The elements `offsets[d] : offsets[d] + sizes[d]` of a tensor, on the CPU, in its stored dtype."""

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor."""
        shape = self[name].shape
        return self.read_slice(name, (0,) * len(shape), shape)

    def batches(self, name: str) -> Iterator[torch.Tensor]:
        """A whole tensor in order, in batches of rows of about 32 MiB (a single row may be larger)."""
        shape, dtype = self[name]
        if not shape or math.prod(shape) * dtype.itemsize <= ROW_BATCH_BYTES:
            yield self.read(name)
            return
        rows = max(1, ROW_BATCH_BYTES // (math.prod(shape[1:]) * dtype.itemsize))
        for first in range(0, shape[0], rows):
            count = min(rows, shape[0] - first)
            yield self.read_slice(name, (first, *(0 for _ in shape[1:])), (count, *shape[1:]))

    @torch.no_grad()
    def fill(self, name: str, tensor: torch.Tensor) -> None:
        """Copy what this rank holds of `tensor` (plain or DTensor) from the tensor `name`, converting the dtype where it differs."""
        local = local_tensor(tensor)
        for box in local_boxes(tensor):
            box.place.narrow(local).copy_(self.read_slice(name, box.part.offsets, box.part.sizes))

    @abstractmethod
    def close(self) -> None:
        """Close the files."""


class CheckedReader(TensorReader):
    """A reader of files whose digests are known: it can tell which bytes a slice needs, and look at its files while they are read."""

    @abstractmethod
    def extents(self, name: str, wanted: Box) -> Iterator[Extent]:
        """Where the parts of a slice lie; nothing but headers is read."""

    @abstractmethod
    def file(self, name: str) -> TensorFile:
        """A file of the checkpoint, opened."""


class StepReader(CheckedReader):
    """The tensors of a step folder, put together from the pieces of its manifest."""

    def __init__(self, step: StepFolder) -> None:
        self.step = step
        self._files: dict[str, TensorFile] = {}

    @property
    def folder(self) -> Path:
        """The step folder."""
        return self.step.path

    @property
    def manifest(self) -> Manifest:
        """Its manifest."""
        return self.step.manifest

    def __getitem__(self, name: str) -> TensorInfo:
        return self.manifest.tensors[name].info

    def __iter__(self) -> Iterator[str]:
        return iter(self.manifest.tensors)

    def __len__(self) -> int:
        return len(self.manifest.tensors)

    def read_slice(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        """See `TensorReader`; raises `UserError` where a shard file is missing or disagrees with the manifest."""
        wanted = Box(tuple(offsets), tuple(sizes))
        parts = [(self._holding(name, piece), piece, common) for piece, common in self._parts(name, wanted)]
        result = torch.empty(wanted.sizes if len(parts) != 1 else 0, dtype=self[name].dtype)  # the files have been found as large
        for file, piece, common in parts:
            inside = common.within(piece.box)
            stored = file.read_slice(piece.key, inside.offsets, inside.sizes)
            if len(parts) == 1:
                return stored
            common.within(wanted).narrow(result).copy_(stored)
        return result

    def extents(self, name: str, wanted: Box) -> Iterator[Extent]:
        """See `CheckedReader`."""
        for piece, common in self._parts(name, wanted):
            if common.numel:
                first, end = self._holding(name, piece).extent(piece.key, common.within(piece.box))
                yield Extent(piece.file, first, end, common.numel * self[name].dtype.itemsize)

    def file(self, name: str) -> TensorFile:
        """See `CheckedReader`."""
        if name not in self._files:
            self._files[name] = TensorFile(self.step.file(name))
        return self._files[name]

    def _parts(self, name: str, wanted: Box) -> Iterator[tuple[Piece, Box]]:
        """The pieces that meet a slice of a tensor, each with the common part."""
        pieces = self.manifest.tensors[name].pieces
        try:
            for index, common in cover(wanted, [piece.box for piece in pieces]):
                yield pieces[index], common
        except ValueError as error:
            raise UserError(f"{self.folder}: the manifest has no whole {name} ({error}): use another checkpoint") from error

    def _holding(self, name: str, piece: Piece) -> TensorFile:
        """The shard file of a piece, after a look at whether it holds what the manifest says."""
        file = self.file(piece.file)
        expected = TensorInfo(piece.box.sizes, self[name].dtype)
        if file.get(piece.key) != expected:
            raise UserError(f"{file.path} holds {file.get(piece.key)} as {piece.key}, the manifest says {expected}: use another checkpoint")
        return file

    def close(self) -> None:
        """Close the shard files that were opened."""
        for file in self._files.values():
            file.close()
        self._files.clear()


class MergedReader(CheckedReader):
    """A merged file: every tensor whole, `header` the JSON document of its metadata (step, versions, state, model config)."""

    def __init__(self, path: Path) -> None:
        self._file = TensorFile(path)
        self.digest = self._file.metadata.get(DIGEST_KEY)
        try:
            self.header: dict[str, Any] = json.loads(self._file.metadata[MERGED_KEY])
            known = (self.header["format"], self.header["version"]) == (FORMAT, VERSION) and isinstance(self.header["state"], dict)
        except (ValueError, KeyError, TypeError) as error:
            self.close()
            raise UserError(f"{path} is not a merged checkpoint of seqloom: make one with ckpt_merger.py --output_fname") from error
        if not known:
            self.close()
            raise UserError(f"{path} is a merged checkpoint of another version than {VERSION}: merge again with this version")

    def __getitem__(self, name: str) -> TensorInfo:
        return self._file[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._file)

    def __len__(self) -> int:
        return len(self._file)

    def read_slice(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        """See `TensorReader`."""
        return self._file.read_slice(name, offsets, sizes)

    def extents(self, name: str, wanted: Box) -> Iterator[Extent]:
        """See `CheckedReader`."""
        if wanted.numel:
            yield Extent(self._file.path.name, *self._file.extent(name, wanted), wanted.numel * self[name].dtype.itemsize)

    def file(self, name: str) -> TensorFile:
        """See `CheckedReader`; there is one file."""
        return self._file

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def open_checkpoint(path: Path) -> tuple[CheckedReader, dict[str, Any]]:
    """A reader of a step folder or merged file, and the training state. Digests are not checked."""
    if path.is_dir():
        step = open_step(path)
        return StepReader(step), dict(step.manifest.state)
    reader = MergedReader(path)
    return reader, reader.header["state"]


def is_merged_file(path: Path) -> bool:
    """Whether `path` is a safetensors file that a merge wrote."""
    try:
        MergedReader(path).close()
    except UserError:
        return False
    return True
