"""Prepare a data set: text -> tokens -> rows of equal length.

python bookcorpus.py --data_path_or_name bookcorpus/bookcorpus --tokenizer_path_or_name meta-llama/Meta-Llama-3-8B-Instruct \
    --save_path ./bookcorpus_llama3_128K --sequence_length 131072

Without a network, on text that every machine has:

python bookcorpus.py --data_path_or_name stdlib --tokenizer_path_or_name train:4096 --save_path ./stdlib_1K --sequence_length 1024
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from seqloom.data.metadata import DOCUMENTS, VALIDATION_FOLDER, Pack, read_metadata
from seqloom.data.packing import DEFAULT_PACK
from seqloom.entry import run


@dataclass(frozen=True)
class Arguments:
    """Tokenize a corpus and pack it into rows of equal length, losing and repeating no token. `--debug` shows tracebacks."""

    data_path_or_name: str
    """The text: a hub id, a local dataset folder, .txt/.jsonl/.parquet files (globs and commas allowed), or `stdlib`."""
    tokenizer_path_or_name: str
    """A hub id, a tokenizer's folder, or `train:4096` to train a byte-level BPE of 4096 tokens on the text itself."""
    save_path: str
    """Folder of the packed data set, with the tokenizer inside."""
    sequence_length: int
    """Tokens in a row."""
    overwrite: bool = False
    """Replace a data set that was made otherwise."""
    num_proc: int = 1
    """Processes that tokenize; fast tokenizers use all cores in one."""
    max_documents: int | None = None
    """Use the first so many documents only."""
    pack: Pack = DEFAULT_PACK
    """`documents`: rows know the documents in them, which attend only within themselves, and labels never cross from one to the next.
    `stream`: a row is one text, whatever documents it holds."""
    validation: float = 0.0
    """Share of the documents that is kept from training and packed into a data set of its own, in the folder `validation` of the other."""


def main() -> int:
    """Parse, pack, print."""
    import tyro

    args = tyro.cli(Arguments, description=Arguments.__doc__)
    from seqloom.data.prepare import prepare

    start = time.perf_counter()
    metadata, made = prepare(**vars(args))
    padding = metadata.rows * metadata.sequence_length - metadata.tokens
    print(f"{args.save_path}: {metadata.rows:,} rows of {metadata.sequence_length:,} tokens, vocabulary {metadata.vocab_size:,}")
    print(f"  {metadata.documents:,} documents, {metadata.tokens:,} tokens, {padding:,} of padding in the last row")
    if metadata.pack == DOCUMENTS:
        lengths = metadata.typical_row
        print(f"  packed by documents: {len(lengths):,} in a typical row, the longest of {max(lengths):,} tokens")
    if args.validation:
        held_out = read_metadata(Path(args.save_path).expanduser() / VALIDATION_FOLDER)
        print(f"  kept for evaluation: {held_out.documents:,} documents, {held_out.tokens:,} tokens, {held_out.rows:,} rows")
    print(f"  made in {time.perf_counter() - start:.1f} s" if made else "  already there, made with the same settings")
    return 0


if __name__ == "__main__":
    run(main)
