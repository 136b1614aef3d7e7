"""Rows on disk: a folder that `datasets.load_from_disk` reads, written once and in pieces of bounded size.

In: blocks of rows as `packing.py` makes them. Out: Arrow files with the columns `input_ids` and `labels` (int32, `sequence_length` each)
and, where rows know their documents, `cu_seqlens` (lists of int32), and the two JSON files that name them. `Dataset.save_to_disk` would
copy every row once more.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from seqloom.data.documents import CU_SEQLENS, Borders
from seqloom.data.metadata import DOCUMENTS, Pack
from seqloom.data.packing import IGNORED

if TYPE_CHECKING:
    import pyarrow as pa

COLUMNS = ("input_ids", "labels")
BLOCK_TOKENS = 2**22  # written at once: 16 MiB a column
FILE_BYTES = 2**29


class RowWriter:
    """Writes rows into `folder`; the data set is complete when the block in which it is used ends well.

    `rows` and `labels` count what was written: rows, and labels that count.
    """

    def __init__(self, folder: Path, seq_len: int, pack: Pack) -> None:
        import pyarrow as pa

        self.folder = folder
        self.seq_len = seq_len
        borders = [(CU_SEQLENS, pa.list_(pa.int32()))] if pack == DOCUMENTS else []
        self.schema = pa.schema([(name, pa.list_(pa.int32(), seq_len)) for name in COLUMNS] + borders)
        self.rows = self.labels = self.files = self._bytes = 0
        self._writer: pa.RecordBatchStreamWriter | None = None

    def write(self, input_ids: np.ndarray, labels: np.ndarray, borders: Borders | None = None) -> None:
        """Append rows: two int32 arrays of shape `[rows, seq_len]`, and the rows' borders if they are packed by documents."""
        import pyarrow as pa

        step = max(1, BLOCK_TOKENS // self.seq_len)
        for start in range(0, len(input_ids), step):
            pieces = (array[start : start + step].reshape(-1) for array in (input_ids, labels))
            arrays: list[pa.Array] = [pa.FixedSizeListArray.from_arrays(pa.array(piece), self.seq_len) for piece in pieces]
            if borders is not None:
                offsets = borders.offsets[start : start + step + 1]
                values = borders.values[offsets[0] : offsets[-1]]
                arrays.append(pa.ListArray.from_arrays(pa.array(offsets - offsets[0], pa.int32()), pa.array(values)))
            self._write_batch(pa.record_batch(arrays, schema=self.schema))
        self.rows += len(input_ids)
        self.labels += int(np.count_nonzero(labels != IGNORED))

    def _write_batch(self, batch: pa.RecordBatch) -> None:
        import pyarrow as pa

        if self._writer is None or self._bytes + batch.nbytes > FILE_BYTES:
            self._close()
            self._writer = pa.ipc.new_stream(str(self._file(self.files)), self.schema)
            self.files, self._bytes = self.files + 1, 0
        self._bytes += batch.nbytes
        self._writer.write_batch(batch)

    def _file(self, number: int) -> Path:
        return self.folder / f"rows-{number:05d}.arrow"

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: Any) -> None:
        self._close()
        if kind is None:
            self._name_files()

    def _name_files(self) -> None:
        """Write what `datasets.load_from_disk` reads first: the features, and the names of the files."""
        from datasets import DatasetInfo, Features, config

        DatasetInfo(features=Features.from_arrow_schema(self.schema)).write_to_directory(str(self.folder))
        state = {
            "_data_files": [{"filename": self._file(number).name} for number in range(self.files)],
            "_fingerprint": None,  # `datasets` makes one of the files
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": None,
        }
        (self.folder / config.DATASET_STATE_JSON_FILENAME).write_text(json.dumps(state, indent=2), encoding="utf-8")
