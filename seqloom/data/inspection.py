"""A look at a packed data set: how well its rows are filled, and some of them as text.

In: a folder that bookcorpus.py made. Out: text. What does not count as a label is dim on a terminal and stands in ⟦ ⟧ elsewhere; a
document begins with the number that it has in its row.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import numpy as np

from seqloom.data.documents import scan_borders
from seqloom.data.loader import SCAN_TOKENS, PackedDataset, open_dataset
from seqloom.data.metadata import DOCUMENTS, VALIDATION_FOLDER
from seqloom.data.packing import IGNORED
from seqloom.data.tokenizer import load_tokenizer
from seqloom.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DOCUMENTS_SHOWN = 6  # of a row
TOKENS_SHOWN = 120  # of a document, half of them from its end
DIM, PLAIN = "\x1b[2m", "\x1b[0m"


def inspect(path: Path, rows: int, out: TextIO) -> None:
    """Print what a data set holds and `rows` of its rows. Raises UserError if there is none or it is damaged."""
    if rows < 0:
        raise UserError(f"--inspect is {rows}: give how many rows to show, 0 for none")
    dataset = open_dataset(path)
    tokenizer = _tokenizer(dataset)
    print(*_facts(dataset), sep="\n", file=out)
    if dataset.metadata.validation:
        print("", *_facts(open_dataset(dataset.path / VALIDATION_FOLDER)), sep="\n", file=out)
    terminal = out.isatty() and "NO_COLOR" not in os.environ
    marks = (DIM, PLAIN) if terminal else ("⟦", "⟧")
    if rows:
        print(f"\n{'dim' if terminal else '⟦ ⟧'}: does not count as a label", file=out)
    for row in np.unique(np.linspace(0, dataset.rows - 1, min(rows, dataset.rows)).astype(int)):
        print("", *_row(dataset, tokenizer, int(row), marks), sep="\n", file=out)


def _tokenizer(dataset: PackedDataset) -> PreTrainedTokenizerBase:
    try:
        return load_tokenizer(str(dataset.tokenizer_path.absolute()))
    except UserError as error:
        raise UserError(f"the tokenizer in {dataset.path} is gone or damaged: make the data set again with --overwrite") from error


@dataclass(frozen=True)
class _Filling:
    """How rows are filled: `per_row` documents of each row, or None for a stream."""

    padding: int
    labels: int
    per_row: np.ndarray | None


def _filling(dataset: PackedDataset) -> _Filling:
    metadata = dataset.metadata
    padding = dataset.rows * dataset.seq_len - metadata.tokens
    labels = metadata.labels if metadata.labels is not None else count_labels(dataset)
    if metadata.pack != DOCUMENTS:
        return _Filling(padding, labels, None)
    per_row = np.concatenate([np.diff(borders.offsets) - 1 for borders in scan_borders(dataset.table)])
    per_row[-1] -= padding > 0  # the padding has borders too
    return _Filling(padding, labels, per_row)


def count_labels(dataset: PackedDataset) -> int:
    """How many labels count. Reads every row."""
    step = max(1, SCAN_TOKENS // dataset.seq_len)
    starts = range(0, dataset.rows, step)
    return sum(np.count_nonzero(dataset.read(np.arange(start, min(start + step, dataset.rows)))[1] != IGNORED) for start in starts)


def _facts(dataset: PackedDataset) -> Iterator[str]:
    metadata, filling = dataset.metadata, _filling(dataset)
    positions = dataset.rows * dataset.seq_len
    yield f"{dataset.path}: {dataset.rows:,} rows of {dataset.seq_len:,} tokens, packed by --pack {metadata.pack}"
    yield f"  {metadata.documents:,} documents, {metadata.tokens:,} tokens, vocabulary {dataset.vocab_size:,} of {metadata.tokenizer}"
    yield f"  padding             {filling.padding / positions:.3%} of the positions"
    yield f"  labels that count   {filling.labels / positions:.3%} of the positions"
    if filling.per_row is None:
        yield f"  documents per row   {metadata.documents / dataset.rows:.2f} on average (rows of a stream do not know their documents)"
    else:
        least, median, most = filling.per_row.min(), np.median(filling.per_row), filling.per_row.max()
        yield f"  documents per row   {least:,} at least, {median:,g} in the median, {most:,} at most"
    if metadata.cut is not None:
        yield f"  cut by a row's end  {metadata.cut:,} documents, {metadata.cut / metadata.documents:.1%}"
    if len(metadata.parts) < 2:
        yield f"  corpus              {metadata.corpus}"
    yield from (f"  {line}" for line in metadata.shares())


def _row(dataset: PackedDataset, tokenizer: PreTrainedTokenizerBase, row: int, marks: tuple[str, str]) -> Iterator[str]:
    """The documents of a row as text, each with what it is and how long."""
    ids, counts = _tokens(dataset, row)
    borders = dataset.read_cu_seqlens(np.array([row])).tolist()
    filled = min(dataset.seq_len, dataset.metadata.tokens - row * dataset.seq_len)
    starts = [start for start in borders[:-1] if start < filled]
    kind = "document" if dataset.metadata.pack == DOCUMENTS else "stream"
    yield f"row {row}"
    for number, start in enumerate(starts[:DOCUMENTS_SHOWN], 1):
        stop = min(borders[number], filled)
        yield f"-- {kind} {number} of {len(starts)}: {stop - start:,} tokens"
        yield _marked(tokenizer, ids[start:stop], counts[start:stop], marks)
    if len(starts) > DOCUMENTS_SHOWN:
        yield f"-- and {len(starts) - DOCUMENTS_SHOWN:,} more documents"
    if filled < dataset.seq_len:
        yield f"-- padding: {dataset.seq_len - filled:,} tokens"


def _tokens(dataset: PackedDataset, row: int) -> tuple[np.ndarray, np.ndarray]:
    """The ids of a row, and which of them count as a label. The label of the first is the last one of the row before."""
    rows = np.array([max(row - 1, 0), row])
    ids, labels = dataset.read(rows)
    before = labels[0, -1:] if row else np.array([IGNORED])
    return ids[1], np.concatenate((before, labels[1, :-1])) != IGNORED


def _marked(tokenizer: PreTrainedTokenizerBase, ids: np.ndarray, counts: np.ndarray, marks: tuple[str, str]) -> str:
    """The text of tokens, what does not count between marks; of many only those at both ends."""
    if len(ids) > TOKENS_SHOWN:
        half = TOKENS_SHOWN // 2
        parts = [_marked(tokenizer, ids[side], counts[side], marks) for side in (slice(half), slice(-half, None))]
        return f" ... {len(ids) - TOKENS_SHOWN:,} tokens ... ".join(parts)
    changes = np.flatnonzero(np.diff(counts)) + 1
    text = ""
    for part, counted in zip(np.split(ids, changes), np.split(counts, changes), strict=True):
        piece = tokenizer.decode(part, clean_up_tokenization_spaces=False)
        text += piece if counted[0] else marks[0] + piece + marks[1]
    return text
