"""safetensors files as streams: written tensor by tensor with digests on the way, read slice by slice.

Role in the pipeline: `write`, `merge` and `huggingface` write through `TensorFileWriter`; every reader reads through `TensorFile`.
The layout is safetensors': 8 bytes (length of the header), a JSON header, the tensors' bytes in the header's order. The library reads
what this module writes; the writer exists because the library needs all tensors in memory at once and cannot hash, the reader because
memory-mapped pages of a large file would count as memory of the process.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from seqloom.checkpoint.digest import CHUNK_BYTES, BlockHasher, read_exactly, read_into
from seqloom.checkpoint.slices import Box
from seqloom.checkpoint.stream import BlockStream
from seqloom.errors import UserError

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100 * 2**20
BUFFER_BYTES = 16 * 2**20
_ALIGNMENT = 8


class TensorInfo(NamedTuple):
    """Global shape and element type of a stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


def is_shape(sizes: Sequence[object]) -> bool:
    """Whether these are sizes that a tensor can have: whole numbers whose product fits 64 bits, zeros aside."""
    return all(type(n) is int and n >= 0 for n in sizes) and math.prod(n or 1 for n in sizes) < 2**63


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in safetensors (`F32`); raises `UserError` for one that the format does not have."""
    if dtype not in DTYPE_NAMES:
        raise UserError(f"tensors of type {dtype} cannot be stored in safetensors: convert them to one of {', '.join(DTYPES)}")
    return DTYPE_NAMES[dtype]


def header_bytes(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str] | None = None) -> bytes:
    """The length field and the header of a file that holds `tensors` in this order, padded with spaces to 8 bytes."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, info in tensors.items():
        offsets = [position, position + info.nbytes]
        header[name] = {"dtype": dtype_name(info.dtype), "shape": list(info.shape), "data_offsets": offsets}
        position = offsets[1]
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=True).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


class TensorFileWriter:
    """Writes one safetensors file in a stream: all shapes are known first, the bytes follow in the same order.

    `with TensorFileWriter(path, tensors) as writer: writer.append(tensor)`; the tensors' elements are appended in order, whole or in
    parts. Leaving the block flushes the file to disk. `blocks` are the digests of the file as it was written, `nbytes` its size.
    """

    def __init__(self, path: Path, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str] | None = None) -> None:
        self._hasher = BlockHasher()
        header = header_bytes(tensors, metadata)
        self.nbytes = len(header) + sum(info.nbytes for info in tensors.values())
        self.blocks: tuple[str, ...] = ()
        self._written = self._under_way = 0
        self._file = open(path, "xb", buffering=0)  # noqa: SIM115 - closed by __exit__
        self._write(memoryview(header))

    def append(self, tensor: torch.Tensor) -> None:
        """Write the next elements of the file, from any device, through a buffer of bounded size when they are not on the CPU."""
        flat = tensor.detach().reshape(-1)
        step = max(1, BUFFER_BYTES // flat.element_size())
        for start in range(0, flat.numel(), step):
            part = flat[start : start + step].cpu().contiguous()
            self._write(memoryview(part.view(torch.uint8).numpy()))

    def _write(self, view: memoryview) -> None:
        self._written += len(view)
        while len(view):
            chunk = view[:CHUNK_BYTES]
            self._hasher.update(chunk)  # first, so that the write finds it in the processor's cache
            view = view[len(chunk) :]
            while len(chunk):
                chunk = chunk[self._file.write(chunk) :]
        if self._written - self._under_way >= BUFFER_BYTES:
            self._start_disk()

    def _start_disk(self) -> None:
        """Let the disk begin with what has been written, so that it works while we hash and the last flush finds little left."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), self._under_way, self._written - self._under_way, os.POSIX_FADV_DONTNEED)
        self._under_way = self._written

    def finish(self) -> None:
        """Flush to disk; raises `RuntimeError` when fewer or more bytes came than the header promised."""
        if self._written != self.nbytes:
            raise RuntimeError(f"{self._file.name}: {self._written} bytes written, {self.nbytes} promised")
        os.fsync(self._file.fileno())
        self.blocks = self._hasher.blocks()

    def __enter__(self) -> TensorFileWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self._file.close()


@dataclass(frozen=True)
class _Entry:
    info: TensorInfo
    start: int

    def extent(self, box: Box) -> tuple[int, int]:
        """The first byte in the file, and the end, of a part of the tensor that has elements."""
        strides = [math.prod(self.info.shape[dim + 1 :]) * self.info.dtype.itemsize for dim in range(len(self.info.shape))]
        ends = zip(box.offsets, box.sizes, strides, strict=True)
        last = sum((offset + size - 1) * stride for offset, size, stride in ends)
        first = sum(offset * stride for offset, stride in zip(box.offsets, strides, strict=True))
        return self.start + first, self.start + last + self.info.dtype.itemsize


class TensorFile(Mapping[str, TensorInfo]):
    """One safetensors file: a mapping of names to `TensorInfo`, and slices read without the rest. Nothing in it is executed.

    Raises `UserError` naming the file when it is missing, truncated, extended, or not safetensors; all sizes are checked against the
    file's before anything is allocated.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stream: BlockStream | None = None
        try:
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}; put the file back or choose another checkpoint") from error
        try:
            self.metadata, self._entries = self._read_header()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            self.close()
            raise UserError(f"{path} is not a whole safetensors file ({error}): replace it with a good copy") from error

    def _read_header(self) -> tuple[dict[str, str], dict[str, _Entry]]:
        descriptor = self._file.fileno()
        total = os.fstat(descriptor).st_size
        length = int.from_bytes(read_exactly(descriptor, 8, 0), "little")
        _require(total >= 8 and length <= min(total - 8, MAX_HEADER_BYTES), f"a header of {length} bytes in a file of {total}")
        header = json.loads(bytes(read_exactly(descriptor, length, 8)))
        metadata = header.pop("__metadata__", {})
        entries, expected = {}, 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            info = TensorInfo(tuple(entry["shape"]), DTYPES[entry["dtype"]])
            start, end = entry["data_offsets"]
            _require(is_shape(info.shape) and all(map(is_shape, ((start,), (end,)))), f"sizes of {name}")
            _require(start == expected and end - start == info.nbytes, f"bytes {start} to {end} for {name} of {info.nbytes} bytes")
            entries[name], expected = _Entry(info, 8 + length + start), end
        _require(8 + length + expected == total, f"{total} bytes where the header tells of {8 + length + expected}")
        return metadata, entries

    def __getitem__(self, name: str) -> TensorInfo:
        return self._entries[name].info

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def read_slice(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        """The elements `offsets[d] : offsets[d] + sizes[d]` of a stored tensor, on the CPU; only their bytes are read, through the
        stream where there is one.

        Raises `KeyError` for an unknown name, `ValueError` for a slice outside the tensor, `UserError` where the file cannot be read.
        """
        info, start = self._entries[name].info, self._entries[name].start
        inside = all(min(o, n) >= 0 and o + n <= size for o, n, size in zip(offsets, sizes, info.shape, strict=True))
        if not inside:
            raise ValueError(f"{tuple(offsets)} + {tuple(sizes)} is not inside {name} of shape {info.shape}")
        result = torch.empty(tuple(sizes), dtype=info.dtype)
        if result.numel():
            view = memoryview(result.reshape(-1).view(torch.uint8).numpy())
            for first, last, position in _byte_runs(info, Box(tuple(offsets), tuple(sizes))):
                if self._read_into(view[first:last], start + position) != last - first:
                    raise UserError(f"{self.path} ended while {name} was being read: replace it with a good copy")
        return result

    def _read_into(self, view: memoryview, offset: int) -> int:
        try:
            if self._stream is not None:
                return self._stream.read_into(self._file.fileno(), view, offset)
            return read_into(self._file.fileno(), view, offset)
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror}; replace it with a good copy") from error

    def extent(self, name: str, box: Box) -> tuple[int, int]:
        """Where a part of a stored tensor lies in the file, from its first byte to its end; the part has elements."""
        return self._entries[name].extent(box)

    def read_through(self, stream: BlockStream) -> None:
        """From now on read through `stream`, most of the file and in order."""
        self._stream = stream
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def finish_stream(self) -> dict[int, str]:
        """The digests of the blocks of the stream, by index; what was not asked for of them is read now."""
        return self._stream.finish(self._file.fileno()) if self._stream is not None else {}

    def read(self, name: str) -> torch.Tensor:
        """A whole stored tensor."""
        return self.read_slice(name, *_box_arguments(self[name].shape))

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _box_arguments(shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return (0,) * len(shape), shape


def _byte_runs(info: TensorInfo, box: Box) -> Iterator[tuple[int, int, int]]:
    """The contiguous stretches of a non-empty box: (first byte and end in the packed result, first byte in the stored tensor)."""
    split = len(info.shape)
    while split and box.sizes[split - 1] == info.shape[split - 1]:
        split -= 1
    inner = max(split - 1, 0)
    strides = [math.prod(info.shape[dim + 1 :]) * info.dtype.itemsize for dim in range(len(info.shape))]
    length = math.prod(box.sizes[inner:]) * info.dtype.itemsize
    base = sum(offset * stride for offset, stride in zip(box.offsets, strides, strict=True))
    for number in range(math.prod(box.sizes[:inner])):
        position, rest = base, number
        for dim in reversed(range(inner)):
            rest, index = divmod(rest, box.sizes[dim])
            position += index * strides[dim]
        yield number * length, (number + 1) * length, position


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
