"""Packing: documents become one stream of tokens, the stream becomes rows of equal length.

In: a corpus (column `text`) and a tokenizer. Out: a folder that `datasets.load_from_disk` reads, with `input_ids` and `labels`
(int32, `sequence_length` each), `seqloom.json` and the tokenizer. An end-of-text token follows every document, and row r of length L is

    input_ids = stream[r * L : (r + 1) * L]        labels = stream[r * L + 1 : (r + 1) * L + 1]

so every token is an input exactly once and, but for the first, a label exactly once. The last row is filled up with end-of-text
tokens whose labels are -100, which do not count. Nothing larger than a batch of documents or a block of rows is held in memory.

That is `--pack stream`. With `--pack documents` the rows hold the same tokens and know their documents: a third column `cu_seqlens`
(lists of int32) has the borders inside each row, and what follows a document's end of text is no label of it but -100. A document that
the end of a row cuts goes on in the next row, with the label across the cut. Padding is a document of its own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from seqloom.data.corpora import TEXT, corpus_digest
from seqloom.data.documents import CU_SEQLENS, Borders, find_borders, typical_row
from seqloom.data.folders import staged_folder
from seqloom.data.metadata import DOCUMENTS, FILE, TOKENIZER_FOLDER, VALIDATION_FOLDER, Metadata, Pack, read_metadata, write_metadata
from seqloom.data.split import check_share, split_documents
from seqloom.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
TOKENS = "tokens"
COLUMNS = ("input_ids", "labels")
DEFAULT_PACK: Pack = "documents"
BATCH_BYTES = 4 * 2**20  # of text tokenized at once
BLOCK_TOKENS = 2**22  # written at once: 16 MiB a column
MAX_BATCH = 10_000


def pack_stream(stream: Iterable[np.ndarray], seq_len: int, pad_id: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cut a stream of int32 tokens, given piece by piece, into `(input_ids, labels)` blocks of shape `[rows, seq_len]`.

    How the stream is cut into pieces makes no difference. The last block may hold one row that is partly padding.
    """
    rest = np.empty(0, np.int32)
    for piece in stream:
        rest = np.concatenate((rest, piece))
        full = max(len(rest) - 1, 0) // seq_len * seq_len  # the label of a row's last token is the next row's first
        if full:
            yield rest[:full].reshape(-1, seq_len), rest[1 : full + 1].reshape(-1, seq_len)
            rest = rest[full:]
    if len(rest):
        input_ids = np.full((1, seq_len), pad_id, np.int32)
        labels = np.full((1, seq_len), IGNORED, np.int32)
        input_ids[0, : len(rest)] = rest
        labels[0, : len(rest) - 1] = rest[1:]
        yield input_ids, labels


def pack_documents(
    pieces: Iterable[tuple[np.ndarray, np.ndarray]], seq_len: int, pad_id: int
) -> Iterator[tuple[np.ndarray, np.ndarray, Borders]]:
    """Cut a stream of int32 tokens as `pack_stream` does, into the same rows, with no label across a document's end, and their borders.

    A piece is `(tokens, ends)`: `ends` are the numbers of its tokens behind which a document ends, in [1, len(tokens)]. A document may
    lie in several pieces; the last one ends with the last token, so that the padding behind it is a document of its own.
    """
    ends: list[np.ndarray] = []  # counted from the first token of all; those of rows that were given out are gone
    taken = 0

    def stream() -> Iterator[np.ndarray]:
        nonlocal taken
        for tokens, own_ends in pieces:
            ends.append(taken + own_ends)
            taken += len(tokens)
            yield tokens

    first = 0
    for input_ids, labels in pack_stream(stream(), seq_len, pad_id):
        behind = first + input_ids.size
        known = np.concatenate(ends)
        inside = known[known <= behind] - first
        ends[:] = [known[known > behind]]
        labels = labels.copy()  # it shares its memory with input_ids
        labels.reshape(-1)[inside - 1] = IGNORED
        yield input_ids, labels, find_borders(inside, len(input_ids), seq_len)
        first = behind


def tokenize(corpus: Dataset, tokenizer: PreTrainedTokenizerBase, cache_file: Path, num_proc: int = 1) -> Dataset:
    """Every document as int32 `tokens` with the end-of-text token behind it, in the order of the corpus, kept in `cache_file`.

    Documents without tokens stay empty, without an end of text. A tokenizer written in Rust uses all cores in one process already;
    `num_proc` is for those that do not.
    """
    from datasets import Features, List, Value

    eos = tokenizer.eos_token_id

    def encode(batch: dict[str, list[str | None]]) -> dict[str, list[list[int]]]:
        texts = [text or "" for text in batch[TEXT]]
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        return {TOKENS: [[*ids, eos] if ids else [] for ids in encoded]}

    if num_proc > 1:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads do not survive the fork
    return corpus.map(
        encode,
        batched=True,
        batch_size=int(np.clip(BATCH_BYTES * len(corpus) // max(corpus.data.nbytes, 1), 1, MAX_BATCH)),
        num_proc=num_proc if num_proc > 1 else None,
        remove_columns=corpus.column_names,
        features=Features({TOKENS: List(Value("int32"))}),
        cache_file_name=str(cache_file),
        load_from_cache_file=False,
        new_fingerprint=hashlib.sha256(str(cache_file).encode()).hexdigest()[:16],
        desc="tokenize",
    )


def pack_corpus(
    corpus: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    save_path: str | Path,
    sequence_length: int,
    *,
    corpus_name: str,
    tokenizer_name: str,
    overwrite: bool = False,
    num_proc: int = 1,
    pack: Pack = DEFAULT_PACK,
    validation: float = 0.0,
) -> tuple[Metadata, bool]:
    """Tokenize, pack and save a corpus; returns what was made and whether it was made now or already there. A share `validation` of the
    documents is packed into a data set of its own, in the folder `validation`.

    A folder made of the same text, tokenizer and length in the same way is left as it is. Raises UserError for a folder made otherwise
    (without `overwrite`), one that cannot be written, a corpus without tokens, or a length that is not positive.
    """
    check_lengths(sequence_length, num_proc)
    check_share(validation)
    target, known = Path(save_path), _wanted(corpus, tokenizer, sequence_length, corpus_name, tokenizer_name)
    wanted = dataclasses.replace(known, pack=pack, validation=validation)
    found = _already_there(target, wanted, overwrite)
    if found is not None:
        return found, False
    with staged_folder(target, FILE, overwrite) as staging:
        training, held_out = split_documents(corpus, validation)
        metadata = _write_data_set(training, tokenizer, staging, wanted, num_proc)
        if held_out is not None:
            _write_data_set(held_out, tokenizer, staging / VALIDATION_FOLDER, dataclasses.replace(wanted, validation=0.0), num_proc)
    return metadata, True


def _write_data_set(corpus: Dataset, tokenizer: PreTrainedTokenizerBase, folder: Path, wanted: Metadata, num_proc: int) -> Metadata:
    """Tokenize and pack documents into a folder with the tokenizer and `seqloom.json` beside them; returns what the latter says."""
    scratch = folder / "scratch"
    scratch.mkdir(parents=True)
    tokenized = tokenize(corpus, tokenizer, scratch / "tokens.arrow", num_proc)
    metadata = _write_rows(tokenized, folder, wanted, tokenizer.eos_token_id)
    tokenizer.save_pretrained(folder / TOKENIZER_FOLDER)
    write_metadata(folder, metadata)
    return metadata


def check_lengths(sequence_length: int, num_proc: int) -> None:
    """Raise UserError unless both are positive."""
    for flag, value in (("sequence_length", sequence_length), ("num_proc", num_proc)):
        if value < 1:
            raise UserError(f"--{flag} is {value}: give a positive number")


def _wanted(corpus: Dataset, tokenizer: PreTrainedTokenizerBase, seq_len: int, corpus_name: str, tokenizer_name: str) -> Metadata:
    return Metadata(
        sequence_length=seq_len,
        vocab_size=len(tokenizer),
        tokenizer=tokenizer_name,
        tokenizer_digest=_tokenizer_digest(tokenizer),
        corpus=corpus_name,
        corpus_digest=corpus_digest(corpus),
        rows=0,
        tokens=0,
        documents=0,
    )


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of the vocabulary and, for a tokenizer written in Rust, of all its rules."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else ""
    state = json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer.eos_token_id, rules])
    return hashlib.sha256(state.encode()).hexdigest()


def _already_there(target: Path, wanted: Metadata, overwrite: bool) -> Metadata | None:
    if overwrite or not (target / FILE).is_file():
        return None
    found = read_metadata(target)
    difference = found.difference(wanted)
    if difference:
        raise UserError(f"{target} holds another data set ({difference}): pass --overwrite to replace it, or choose another --save_path")
    return found


def _write_rows(tokenized: Dataset, folder: Path, wanted: Metadata, eos: int) -> Metadata:
    """Write the packed rows of a tokenized corpus as a dataset into `folder`, its scratch files removed; returns the counts too."""
    from datasets import Dataset

    counts = {"tokens": 0, "documents": 0, "rows": 0}
    scratch = folder / "scratch"
    pieces = _token_pieces(tokenized, counts)
    with _RowWriter(scratch / "rows.arrow", wanted.sequence_length, wanted.pack) as writer:
        if wanted.pack == DOCUMENTS:
            blocks = pack_documents(pieces, wanted.sequence_length, eos)
        else:
            blocks = pack_stream((tokens for tokens, _ in pieces), wanted.sequence_length, eos)
        for block in blocks:
            writer.write(*block)
            counts["rows"] += len(block[0])
    if not counts["tokens"]:
        raise UserError(f"the corpus {wanted.corpus} gives no tokens: give documents with text in them")
    table = Dataset.from_file(str(scratch / "rows.arrow"))
    table.save_to_disk(str(folder))
    lengths = typical_row(table) if wanted.pack == DOCUMENTS else wanted.typical_row
    for file in scratch.iterdir():
        file.unlink()
    scratch.rmdir()
    return dataclasses.replace(wanted, **counts, typical_row=lengths)


def _token_pieces(tokenized: Dataset, counts: dict[str, int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The tokens of all documents, piece by piece, each with the numbers of tokens behind which documents end; counts what passes."""
    rows = max(1, min(MAX_BATCH, BLOCK_TOKENS * len(tokenized) * 4 // max(tokenized.data.nbytes, 1)))
    for batch in tokenized.with_format("arrow").iter(batch_size=rows):
        column = batch[TOKENS]
        for chunk in column.chunks:
            tokens = chunk.flatten().to_numpy()
            counts["tokens"] += len(tokens)
            lengths = chunk.value_lengths().to_numpy()
            ends = np.cumsum(lengths, dtype=np.int64)[lengths > 0]
            counts["documents"] += len(ends)
            yield tokens, ends


class _RowWriter:
    """An Arrow stream of rows, written in record batches of at most `BLOCK_TOKENS` tokens a column."""

    def __init__(self, path: Path, seq_len: int, pack: Pack) -> None:
        import pyarrow as pa

        self.seq_len = seq_len
        self.type = pa.list_(pa.int32(), seq_len)
        borders = [(CU_SEQLENS, pa.list_(pa.int32()))] if pack == DOCUMENTS else []
        self.schema = pa.schema([(name, self.type) for name in COLUMNS] + borders)
        self.writer = pa.ipc.new_stream(str(path), self.schema)

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
            self.writer.write_batch(pa.record_batch(arrays, schema=self.schema))

    def __enter__(self) -> _RowWriter:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.writer.close()
