"""Reading a packed data set in an order that any number of ranks agree on and that a resumed run continues.

In: the folder written by bookcorpus.py. Out: per optimizer step, this scale unit's micro-batches as torch tensors. The samples of all
epochs form one endless sequence: epoch e is a permutation of all rows drawn from (seed, e), and epoch follows epoch without a gap.
Step after step takes the next `batch_size_global` samples of it, and every scale unit its contiguous share. So the order depends on
neither the number of scale units nor the micro-batch, no row is dropped at the end of an epoch, and a place in it is two integers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from seqloom.data.documents import CU_SEQLENS, first_bad_row, read_borders, restarting_positions, scan_borders, squash
from seqloom.data.metadata import DOCUMENTS, TOKENIZER_FOLDER, Metadata, read_metadata
from seqloom.data.rows import COLUMNS
from seqloom.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

SCAN_TOKENS = 2**22  # read at once when all rows are looked at


@dataclass(frozen=True)
class PackedDataset:
    """A packed data set on disk: `rows` rows of `seq_len` tokens, ids below `vocab_size`. The rows stay on disk until they are read."""

    path: Path
    metadata: Metadata
    table: Dataset

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.metadata.rows

    @property
    def seq_len(self) -> int:
        """Tokens in a row."""
        return self.metadata.sequence_length

    @property
    def vocab_size(self) -> int:
        """Size of the tokenizer's vocabulary."""
        return self.metadata.vocab_size

    @property
    def tokenizer_path(self) -> Path:
        """Folder of the tokenizer the rows were made with."""
        return self.path / TOKENIZER_FOLDER

    def read(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`(input_ids, labels)` of some rows: two int64 arrays of shape `[len(rows), seq_len]`."""
        batch = self._numbers[rows]
        return batch[COLUMNS[0]], batch[COLUMNS[1]]

    def read_cu_seqlens(self, rows: np.ndarray) -> np.ndarray:
        """The borders of all documents of some rows laid one after the other, int64: `[0, ..., seq_len, ..., len(rows) * seq_len]`.

        Rows that are a stream are one document each.
        """
        if self.metadata.pack != DOCUMENTS:
            return np.arange(len(rows) + 1, dtype=np.int64) * self.seq_len
        return squash(read_borders(self._borders[rows][CU_SEQLENS]), self.seq_len)

    def check_vocab(self, vocab_size: int) -> None:
        """Raise UserError naming the first row that holds an id a model of this vocabulary does not have. Reads every row once."""
        start = 0
        for batch in self.table.with_format("arrow").iter(batch_size=max(1, SCAN_TOKENS // self.seq_len)):
            for name in COLUMNS:
                ids = batch[name].combine_chunks().flatten().to_numpy()
                if ids.max() >= vocab_size:
                    where = int(np.argmax(ids >= vocab_size))
                    raise UserError(
                        f"row {start + where // self.seq_len} of {self.path} holds the token id {ids[where]} in {name}, but the model's "
                        f"vocabulary has {vocab_size} tokens: tokenize the text again with the model's tokenizer"
                    )
            start += len(batch)

    # A format is set once and kept: setting it copies and hashes the table's description, ten times the work of reading a row.

    @cached_property
    def _numbers(self) -> Dataset:
        return self.table.with_format("numpy", columns=list(COLUMNS), dtype=np.int64)

    @cached_property
    def _borders(self) -> Dataset:
        return self.table.with_format("arrow", columns=[CU_SEQLENS])


def open_dataset(path: str | Path, seq_len: int | None = None) -> PackedDataset:
    """Open a data set made by bookcorpus.py; with `seq_len` its rows must have this length.

    Raises UserError if there is none, if it is damaged, or if its rows have another length.
    """
    from datasets import load_from_disk

    folder = Path(path).expanduser()
    metadata = read_metadata(folder)
    if seq_len is not None and seq_len != metadata.sequence_length:
        raise UserError(
            f"the rows of {folder} have {metadata.sequence_length} tokens, but --seq_len is {seq_len}: "
            f"leave --seq_len out, or pack the text again with --sequence_length {seq_len}"
        )
    try:
        table = load_from_disk(str(folder))
    except Exception as error:
        raise UserError(f"the data set {folder} cannot be read ({error}): make it again with bookcorpus.py --overwrite") from error
    if len(table) != metadata.rows:
        raise UserError(f"{folder} holds {len(table)} rows, not the {metadata.rows} of its seqloom.json: make it again with --overwrite")
    if metadata.pack == DOCUMENTS:
        _check_borders(table, folder, metadata.sequence_length)
    return PackedDataset(folder, metadata, table)


def _check_borders(table: Dataset, folder: Path, seq_len: int) -> None:
    """Raise UserError unless every row has borders that rise from 0 to its length. Reads that column once."""
    from datasets import List, Value

    if table.features.get(CU_SEQLENS) != List(Value("int32")):
        raise UserError(f"{folder} is packed by documents but has no column {CU_SEQLENS} of their borders: make it again with --overwrite")
    start = 0
    for borders in scan_borders(table):
        row = first_bad_row(borders, seq_len)
        if row is not None:
            raise UserError(
                f"row {start + row} of {folder} has damaged borders of documents ({CU_SEQLENS} does not rise from 0 to {seq_len}): "
                f"make it again with --overwrite"
            )
        start += len(borders.offsets) - 1


@dataclass(frozen=True)
class Place:
    """A place in the endless sequence of samples: the next one is number `position` of epoch `epoch`."""

    epoch: int = 0
    position: int = 0


def epoch_order(rows: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation in which an epoch visits the rows: int64 `[rows]`."""
    return np.random.default_rng((seed, epoch)).permutation(rows)


class Loader:
    """The micro-batches of one scale unit, step after step, without end.

    `batch_size_global` rows make an optimizer step: `dp_size` scale units x `accumulation` micro-batches x `micro_batch_size` rows.
    A batch larger than what is left of an epoch, or than the data set, goes on in the next epoch. Iterating moves the place on.
    Raises UserError if the sizes do not multiply to `batch_size_global`.
    """

    def __init__(
        self,
        dataset: PackedDataset,
        seed: int,
        batch_size_global: int,
        dp_rank: int,
        dp_size: int,
        micro_batch_size: int,
        accumulation: int,
    ) -> None:
        if min(dp_size, micro_batch_size, accumulation) < 1 or dp_size * micro_batch_size * accumulation != batch_size_global:
            raise UserError(
                f"the global batch of {batch_size_global} rows is not {dp_size} scale units x {accumulation} micro-batches x "
                f"{micro_batch_size} rows: change the batch size or the gradient accumulation"
            )
        if not 0 <= dp_rank < dp_size:
            raise ValueError(f"dp_rank {dp_rank} is not one of {dp_size}")
        self.dataset = dataset
        self.seed = seed
        self.batch_size_global = batch_size_global
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self.micro_batch_size = micro_batch_size
        self.accumulation = accumulation
        self.place = Place()
        self._order = (-1, np.empty(0, np.int64))

    def __iter__(self) -> Iterator[list[dict[str, Tensor]]]:
        """Steps without end; each is `accumulation` dicts of int64 tensors.

        `input_ids`, `labels` and `position_ids` are `[micro_batch_size, seq_len]`; positions are 0 at every document's start.
        `cu_seqlens` has the borders of all documents with the rows one after the other: `[0, ..., micro_batch_size * seq_len]`.
        """
        while True:
            yield self.next_step()

    def next_step(self) -> list[dict[str, Tensor]]:
        """The micro-batches of the next optimizer step for this scale unit; the place moves on by one global batch."""
        rows, after = self._take(self.place, self.batch_size_global)
        share = self.batch_size_global // self.dp_size
        mine = rows[self.dp_rank * share : (self.dp_rank + 1) * share].reshape(self.accumulation, self.micro_batch_size)
        batches = [self._micro_batch(part) for part in mine]
        self.place = after
        return batches

    def state_dict(self) -> dict[str, int]:
        """The place in the data: `epoch`, `position` (samples of it already used), and the `seed` and `rows` for which they hold."""
        return {"epoch": self.place.epoch, "position": self.place.position, "seed": self.seed, "rows": self.dataset.rows}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue with the sample after the last one used, whatever the number of scale units and the batch size are now.

        Raises UserError if the state belongs to another order: a data set of another size or another seed.
        """
        mine = self.state_dict()
        for name, word in (("rows", "rows in the data set"), ("seed", "seed")):
            if state[name] != mine[name]:
                raise UserError(
                    f"the run to resume had {word} {state[name]}, this one has {mine[name]}, so its place in the data cannot be found: "
                    f"use the same data set and seed"
                )
        self.place = Place(state["epoch"], state["position"])

    def _take(self, place: Place, count: int) -> tuple[np.ndarray, Place]:
        """The next `count` row numbers from a place on, and the place behind them."""
        parts = []
        epoch, position = place.epoch, place.position
        while count > 0:
            part = self._epoch_order(epoch)[position : position + count]
            parts.append(part)
            count -= len(part)
            position += len(part)
            if position == self.dataset.rows:
                epoch, position = epoch + 1, 0
        return np.concatenate(parts), Place(epoch, position)

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if self._order[0] != epoch:
            self._order = (epoch, epoch_order(self.dataset.rows, self.seed, epoch))
        return self._order[1]

    def _micro_batch(self, rows: np.ndarray) -> dict[str, Tensor]:
        input_ids, labels = (torch.from_numpy(array) for array in self.dataset.read(rows))
        cu_seqlens = self.dataset.read_cu_seqlens(rows)
        position_ids = torch.from_numpy(restarting_positions(cu_seqlens)).view_as(input_ids)
        return {"input_ids": input_ids, "labels": labels, "position_ids": position_ids, "cu_seqlens": torch.from_numpy(cu_seqlens)}
