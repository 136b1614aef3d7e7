"""Prepare a data set: text or chats -> tokens -> rows of equal length.

python bookcorpus.py --data_path_or_name bookcorpus/bookcorpus --tokenizer_path_or_name meta-llama/Meta-Llama-3-8B-Instruct \
    --save_path ./bookcorpus_llama3_128K --sequence_length 131072

Without a network, on text that every machine has, and a look at what came out:

python bookcorpus.py --data_path_or_name stdlib --tokenizer_path_or_name train:4096 --save_path ./stdlib_1K --sequence_length 1024
python bookcorpus.py --save_path ./stdlib_1K --inspect
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seqloom.data.metadata import DEFAULT_PACK, DOCUMENTS, VALIDATION_FOLDER, ChatLabels, Metadata, Pack, read_metadata
from seqloom.entry import run
from seqloom.errors import UserError

INSPECT = "--inspect"
INSPECT_ROWS = "3"
NEEDED = ("data_path_or_name", "tokenizer_path_or_name", "sequence_length")


@dataclass(frozen=True)
class Arguments:
    """Tokenize a corpus and pack it into rows of equal length, losing and repeating no token. `--debug` shows tracebacks."""

    save_path: str
    """Folder of the packed data set, with the tokenizer inside."""
    data_path_or_name: tuple[str, ...] = ()
    """The text: a hub id, a local dataset folder, .txt/.jsonl/.parquet files (globs and commas allowed), or `stdlib`. Several of them,
    with spaces between, are blended."""
    tokenizer_path_or_name: str | None = None
    """A hub id, a tokenizer's folder, or `train:4096` to train a byte-level BPE of 4096 tokens on the text itself."""
    sequence_length: int | None = None
    """Tokens in a row."""
    text_column: tuple[str, ...] = ("text",)
    """The column that holds the documents: one for all corpora, or one for each."""
    chat_column: tuple[str, ...] = ()
    """The column that holds chats, lists of {"role", "content"}, which the tokenizer's chat template writes: one for all corpora, or one
    for each, `-` for a corpus of texts."""
    chat_labels: ChatLabels = "assistant"
    """Which tokens of chats count as labels: what the assistant says, or all."""
    chat_template: str | None = None
    """A Jinja file with the chat template, in the place of the tokenizer's own."""
    weights: tuple[float, ...] = ()
    """For each corpus its share of the tokens of the blend, which ends where the first corpus runs out. Without, all documents are used."""
    pack: Pack = DEFAULT_PACK
    """`documents`: rows know the documents in them, which attend only within themselves, and labels never cross from one to the next.
    `stream`: a row is one text, whatever documents it holds."""
    validation: float = 0.0
    """Share of the documents that is kept from training and packed into a data set of its own, in the folder `validation` of the other."""
    max_documents: int | None = None
    """Use the first so many documents of each corpus only."""
    num_proc: int | None = None
    """Processes that tokenize. Left out, a tokenizer written in Rust uses all cores from one; other tokenizers and chats one a core."""
    overwrite: bool = False
    """Replace a data set that was made otherwise."""
    inspect: int | None = None
    """Make nothing: show so many rows (3 if no number is given) of the data set in --save_path, decoded, and how well it is packed."""


def main() -> int:
    """Parse, then make a data set or look at one, and print."""
    import tyro

    args = tyro.cli(Arguments, description=Arguments.__doc__, args=_with_rows(sys.argv[1:]))
    if args.inspect is not None:
        from seqloom.data.inspection import inspect

        inspect(Path(args.save_path), args.inspect, sys.stdout)
        return 0
    settings = {name: value for name, value in vars(args).items() if name != "inspect"}
    missing = [f"--{name}" for name in NEEDED if settings[name] in (None, ())]
    if missing:
        raise UserError(f"{', '.join(missing)} missing: give them to make {args.save_path}, or --inspect to look at what is there")
    _make(settings)
    return 0


def _with_rows(argv: list[str]) -> list[str]:
    """The flags, with the number of rows put in behind an `--inspect` that has none."""
    if INSPECT not in argv:
        return argv
    behind = argv.index(INSPECT) + 1
    bare = behind == len(argv) or argv[behind].startswith("--")
    return [*argv[:behind], INSPECT_ROWS, *argv[behind:]] if bare else argv


def _make(settings: dict[str, Any]) -> None:
    from seqloom.data.prepare import prepare

    start = time.perf_counter()
    metadata, made = prepare(**settings)
    _describe(settings["save_path"], metadata)
    if metadata.validation:
        held_out = read_metadata(Path(settings["save_path"]).expanduser() / VALIDATION_FOLDER)
        print(f"  kept for evaluation: {held_out.documents:,} documents, {held_out.tokens:,} tokens, {held_out.rows:,} rows")
    print(f"  made in {time.perf_counter() - start:.1f} s" if made else "  already there, made with the same settings")


def _describe(path: str, metadata: Metadata) -> None:
    padding = metadata.rows * metadata.sequence_length - metadata.tokens
    print(f"{path}: {metadata.rows:,} rows of {metadata.sequence_length:,} tokens, vocabulary {metadata.vocab_size:,}")
    print(f"  {metadata.documents:,} documents, {metadata.tokens:,} tokens, {padding:,} of padding in the last row")
    if metadata.pack == DOCUMENTS:
        lengths = metadata.typical_row
        print(f"  packed by documents: {len(lengths):,} in a typical row, the longest of {max(lengths):,} tokens")
    if metadata.chat_labels and metadata.labels is not None:
        print(f"  {metadata.labels:,} labels count ({metadata.labels / metadata.tokens:.1%} of the tokens)")
    for line in metadata.shares():
        print(f"  {line}")


if __name__ == "__main__":
    run(main)
