"""Compare two checkpoints, whatever holds them: step folders, merged files, Hugging Face folders.

Role in the pipeline: `python -m seqloom checkpoint diff A B` prints what `compare` yields. Tensors are compared bit by bit, in batches of
rows; digests are not checked.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from seqloom.checkpoint import folders
from seqloom.checkpoint.huggingface import INDEX, SINGLE, HFReader
from seqloom.checkpoint.inspect import newest
from seqloom.checkpoint.reader import ROW_BATCH_BYTES, TensorReader, open_checkpoint

_SHOWN_CHARACTERS = 60
_ABSENT = object()


@dataclass(frozen=True)
class Difference:
    """How a tensor of one shape differs: in how many of its elements, and by how much at most.

    `absolute` is infinite where a NaN or an infinity stands against another value. `relative` is to the larger of the two magnitudes.
    """

    elements: int = 0
    absolute: float = 0.0
    relative: float = 0.0

    def joined(self, other: Difference) -> Difference:
        """Of two parts of a tensor together."""
        return Difference(self.elements + other.elements, max(self.absolute, other.absolute), max(self.relative, other.relative))


@dataclass
class Comparison:
    """What `compare` found; `equal` when nothing differs."""

    first: Path
    second: Path
    equal_tensors: int = 0
    lines: list[str] = field(default_factory=list)
    ignored: str | None = None

    @property
    def equal(self) -> bool:
        """Whether both hold the same."""
        return not self.lines

    def text(self) -> Iterator[str]:
        """The lines to print."""
        yield f"A: {self.first}"
        yield f"B: {self.second}"
        yield from (f"  {line}" for line in self.lines)
        yield f"  {self.equal_tensors} tensors are equal" + (f"; {self.ignored}" if self.ignored else "")
        yield "equal" if self.equal else "different"


def compare(first: Path, second: Path) -> Comparison:
    """Compare tensors by name and the training state, leaf by leaf.

    Where one side is a Hugging Face folder only the model is compared, under the names of the folder. Raises `UserError` where there is no
    checkpoint.
    """
    opened = [_open(path) for path in (first, second)]
    (path_a, reader_a, state_a), (path_b, reader_b, state_b) = opened
    result = Comparison(path_a, path_b)
    try:
        model_only = state_a is None or state_b is None
        if model_only:
            result.ignored = "a Hugging Face folder has no optimizer and no training state, so these are not compared"
        names_a, names_b = (_names(reader, state, model_only) for _, reader, state in opened)
        result.lines += [f"only in A: {name}" for name in names_a if name not in names_b]
        result.lines += [f"only in B: {name}" for name in names_b if name not in names_a]
        for name in names_a:
            if name in names_b:
                line = _tensor_line(name, reader_a, names_a[name], reader_b, names_b[name])
                result.lines += [line] if line else []
                result.equal_tensors += line is None
        if not model_only:
            result.lines += [f"state {line}" for line in state_differences(state_a, state_b)]
    finally:
        reader_a.close()
        reader_b.close()
    return result


def tensor_difference(reader_a: TensorReader, name_a: str, reader_b: TensorReader, name_b: str) -> Difference:
    """How two tensors of one shape differ, read in batches of rows. Of one dtype they are compared bit by bit, otherwise by value."""
    total = Difference()
    shape = reader_a[name_a].shape
    width = max(reader_a[name_a].dtype.itemsize, reader_b[name_b].dtype.itemsize)
    rows = max(1, ROW_BATCH_BYTES // max(1, math.prod(shape[1:]) * width))
    for first in range(0, shape[0], rows) if shape else (0,):
        offsets = (first, *(0 for _ in shape[1:])) if shape else ()
        sizes = (min(rows, shape[0] - first), *shape[1:]) if shape else ()
        total = total.joined(_difference(reader_a.read_slice(name_a, offsets, sizes), reader_b.read_slice(name_b, offsets, sizes)))
    return total


def state_differences(first: Any, second: Any, at: str = "") -> Iterator[str]:
    """A line for each leaf of two JSON values that differs: where, and both values, shortened."""
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        for key in dict.fromkeys((*first, *second)):
            yield from state_differences(first.get(key, _ABSENT), second.get(key, _ABSENT), f"{at}.{key}" if at else str(key))
    elif isinstance(first, list) and isinstance(second, list) and len(first) == len(second):
        for index, pair in enumerate(zip(first, second, strict=True)):
            yield from state_differences(*pair, f"{at}[{index}]")
    elif first is _ABSENT or second is _ABSENT or json.dumps(first) != json.dumps(second):
        yield f"{at}: {_shown(first)} in A, {_shown(second)} in B"


def _open(path: Path) -> tuple[Path, TensorReader, Mapping[str, Any] | None]:
    """What a path means, a reader of it, and its training state where it can have one."""
    is_hf = path.is_dir() and not folders.is_step_folder(path) and ((path / INDEX).is_file() or (path / SINGLE).is_file())
    if is_hf:
        return path, HFReader(path), None
    path = newest(path)
    return path, *open_checkpoint(path)


def _names(reader: TensorReader, state: Mapping[str, Any] | None, model_only: bool) -> dict[str, str]:
    """Name in the comparison -> name in the reader."""
    if not model_only or state is None:
        return {name: name for name in reader}
    return {name.removeprefix("model."): name for name in reader if name.startswith("model.")}


def _tensor_line(name: str, reader_a: TensorReader, name_a: str, reader_b: TensorReader, name_b: str) -> str | None:
    """What differs about a tensor that both have, or None."""
    a, b = reader_a[name_a], reader_b[name_b]
    if a.shape != b.shape:
        return f"{name}: shape {list(a.shape)} in A, {list(b.shape)} in B"
    found = tensor_difference(reader_a, name_a, reader_b, name_b)
    parts = []
    if a.dtype != b.dtype:
        parts.append(f"{str(a.dtype).removeprefix('torch.')} in A, {str(b.dtype).removeprefix('torch.')} in B")
    if found.elements:
        total = math.prod(a.shape)
        parts.append(f"{found.elements} of {total} elements differ, by at most {found.absolute:.3g} (relative {found.relative:.3g})")
    return f"{name}: {'; '.join(parts)}" if parts else None


def _difference(a: torch.Tensor, b: torch.Tensor) -> Difference:
    """Of two tensors in memory; values are compared in fp64 (integers exactly where it holds them)."""
    if a.dtype == b.dtype:
        differing = (_bits(a) != _bits(b)).any(-1) if a.numel() else torch.zeros(0, dtype=torch.bool)
    else:
        differing = ~((a.double() == b.double()) | (a.double().isnan() & b.double().isnan())).reshape(-1)
    count = int(differing.sum())
    if not count:
        return Difference()
    x, y = (tensor.reshape(-1)[differing].double() for tensor in (a, b))
    absolute = (x - y).abs().nan_to_num(nan=math.inf, posinf=math.inf)
    relative = (absolute / torch.maximum(x.abs(), y.abs())).nan_to_num(nan=math.inf, posinf=math.inf)
    relative[absolute == 0] = 0.0
    return Difference(count, float(absolute.max()), float(relative.max()))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of each element: [elements, bytes of one]."""
    return tensor.reshape(-1).view(torch.uint8).reshape(-1, tensor.dtype.itemsize)


def _shown(value: Any) -> str:
    if value is _ABSENT:
        return "nothing"
    text = json.dumps(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."
