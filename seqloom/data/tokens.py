"""Tokens of documents on disk: Arrow files of one column, written whole or not at all, read by mapping them into memory.

In: the tokens of documents, batch by batch. Out: `TokenStore`, which knows the length of every document of a corpus and gives any rising
choice of documents as one array. A token whose label does not count is kept as its complement (`~token`, which is negative).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

TOKENS = "tokens"


def write_tokens(path: Path, batches: Iterable[list[np.ndarray]]) -> None:
    """Write documents of int32 tokens; the file appears under its name when it is complete and on disk."""
    import pyarrow as pa

    partial = path.with_name(f"{path.name}.{os.getpid()}")
    schema = pa.schema([(TOKENS, pa.large_list(pa.int32()))])
    try:
        with open(partial, "wb") as file:
            with pa.ipc.new_file(file, schema) as writer:
                for documents in batches:
                    offsets = np.concatenate(([0], np.cumsum([len(tokens) for tokens in documents], dtype=np.int64)))
                    values = np.concatenate([np.empty(0, np.int32), *documents])
                    column = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values))
                    writer.write_batch(pa.record_batch([column], schema=schema))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def holds(path: Path, documents: int) -> bool:
    """Whether `path` is a whole file of so many documents."""
    import pyarrow as pa

    try:
        return sum(len(column) for column in _columns(path)) == documents
    except (OSError, pa.ArrowInvalid):
        return False


def _columns(path: Path) -> list[pa.LargeListArray]:
    import pyarrow as pa

    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    return [reader.get_batch(index).column(0) for index in range(reader.num_record_batches)]


class TokenStore:
    """The tokens of all documents of a corpus, in files that follow one another. `lengths`: tokens of each document, int32."""

    def __init__(self, paths: Sequence[Path]) -> None:
        columns = [column for path in paths for column in _columns(path)]
        self._offsets = [column.offsets.to_numpy() for column in columns]
        self._values = [column.values.to_numpy() for column in columns]
        self._starts = np.cumsum([0, *map(len, columns)])
        self.lengths = np.concatenate([np.empty(0, np.int32), *(np.diff(offsets).astype(np.int32) for offsets in self._offsets)])

    def read(self, documents: np.ndarray) -> np.ndarray:
        """The tokens of documents one after the other, int32. `documents`: their numbers, strictly rising."""
        batches = np.searchsorted(self._starts, documents, side="right") - 1
        parts = [np.empty(0, np.int32)]
        for batch in np.unique(batches):
            inside = documents[batches == batch] - self._starts[batch]
            offsets, values = self._offsets[batch], self._values[batch]
            if inside[-1] - inside[0] + 1 == len(inside):
                parts.append(values[offsets[inside[0]] : offsets[inside[-1] + 1]])
            else:
                parts.append(values[spread(offsets[inside], offsets[inside + 1] - offsets[inside])])
        return np.concatenate(parts)


def spread(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The places of ranges one after the other: `starts[0], starts[0] + 1, ...` (`lengths[0]` of them), `starts[1], ...`; int64."""
    ends = np.cumsum(lengths, dtype=np.int64)
    places = np.arange(ends[-1] if len(ends) else 0)
    return places + np.repeat(starts - (ends - lengths), lengths)
