"""From corpora and a tokenizer to a data set in a folder: tokenize, put documents in order, pack, write.

In: documents, a tokenizer, settings. Out: a folder that `datasets.load_from_disk` reads, with `seqloom.json` and the tokenizer, and maybe
the same again in its folder `validation`. Tokens wait in a folder beside it, `.NAME.pieces`, until the data set is complete; a run that
was killed, or goes on with other settings of packing and blending, finds them there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from seqloom.data.blend import Order, blend
from seqloom.data.chat import ASSISTANT, ChatEncoder
from seqloom.data.corpora import Corpus
from seqloom.data.documents import typical_row
from seqloom.data.encode import Encoder, TextEncoder, keep_whole
from seqloom.data.folders import remove_abandoned, staged_folder
from seqloom.data.metadata import DOCUMENTS, FILE, TOKENIZER_FOLDER, VALIDATION_FOLDER, Metadata, Part, read_metadata, write_metadata
from seqloom.data.packing import pack_documents, pack_stream
from seqloom.data.pieces import only_one, tokenize
from seqloom.data.rows import BLOCK_TOKENS, RowWriter
from seqloom.data.settings import Settings
from seqloom.data.split import held_out
from seqloom.data.tokens import TokenStore, spread
from seqloom.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def build(
    corpora: Sequence[Corpus], tokenizer: PreTrainedTokenizerBase, tokenizer_name: str, save_path: str | Path, settings: Settings
) -> tuple[Metadata, bool]:
    """Make a data set and return what it says of itself, and whether it was made now or already there.

    A folder made of the same documents with the same tokenizer and settings is left as it is. Raises UserError for a folder made
    otherwise (without `overwrite`), one that cannot be written, a full disk, or corpora without tokens.
    """
    settings.check([corpus.name for corpus in corpora])
    target = Path(save_path).expanduser().absolute()
    wanted = _wanted(corpora, tokenizer, tokenizer_name, settings)
    found = _already_there(target, wanted, settings.overwrite)
    if found is not None:
        return found, False
    pieces = target.with_name(f".{target.name}.pieces")
    with only_one(pieces, target):
        remove_abandoned(target)
        with staged_folder(target, FILE, settings.overwrite) as staging:
            stores = _tokenize(corpora, tokenizer, wanted, pieces, settings)
            metadata = _write(stores, tokenizer, wanted, staging)
        shutil.rmtree(pieces)
    return metadata, True


def _wanted(corpora: Sequence[Corpus], tokenizer: PreTrainedTokenizerBase, tokenizer_name: str, settings: Settings) -> Metadata:
    digests = [corpus.digest for corpus in corpora]
    chats = any(corpus.chat for corpus in corpora)
    return Metadata(
        sequence_length=settings.sequence_length,
        vocab_size=len(tokenizer),
        tokenizer=tokenizer_name,
        tokenizer_digest=_tokenizer_digest(tokenizer),
        corpus=" + ".join(corpus.name for corpus in corpora),
        corpus_digest=digests[0] if len(digests) == 1 else _digest(digests),
        rows=0,
        tokens=0,
        documents=0,
        pack=settings.pack,
        validation=settings.validation,
        parts=tuple(Part(corpus.name, corpus.digest, corpus.column, corpus.chat) for corpus in corpora),
        weights=settings.weights,
        chat_labels=settings.chat_labels if chats else "",
        chat_template=_digest(tokenizer.get_chat_template()) if chats else "",
    )


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of the vocabulary and, for a tokenizer written in Rust, of all its rules."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return _digest([sorted(tokenizer.get_vocab().items()), tokenizer.eos_token_id, backend.to_str() if backend is not None else ""])


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _already_there(target: Path, wanted: Metadata, overwrite: bool) -> Metadata | None:
    if overwrite or not (target / FILE).is_file():
        return None
    found = read_metadata(target)
    difference = found.difference(wanted)
    if difference:
        raise UserError(f"{target} holds another data set ({difference}): pass --overwrite to replace it, or choose another --save_path")
    return found


def _tokenize(
    corpora: Sequence[Corpus], tokenizer: PreTrainedTokenizerBase, wanted: Metadata, pieces: Path, settings: Settings
) -> list[TokenStore]:
    """The tokens of every corpus, each in a folder named after all that decides what they are."""
    keep_whole(tokenizer)
    stores = []
    for corpus in corpora:
        chats = (wanted.chat_labels, wanted.chat_template) if corpus.chat else ()
        encoder: Encoder = ChatEncoder(tokenizer, settings.chat_labels, corpus.name) if corpus.chat else TextEncoder(tokenizer)
        threaded = tokenizer.is_fast and not corpus.chat  # all cores are used from one process
        num_proc = settings.num_proc or (1 if threaded else len(os.sched_getaffinity(0)))
        folder = pieces / _digest([wanted.tokenizer_digest, corpus.digest, *chats])[:16]
        stores.append(tokenize(corpus.documents, encoder, folder, num_proc, corpus.name))
    if not any(store.lengths.any() for store in stores):
        shutil.rmtree(pieces)
        raise UserError(f"the corpus {wanted.corpus} gives no tokens: give documents with text in them")
    return stores


def _write(stores: list[TokenStore], tokenizer: PreTrainedTokenizerBase, wanted: Metadata, folder: Path) -> Metadata:
    """Write the documents in their order, those to evaluate on into a folder inside; returns what the data set says of itself."""
    lengths = [store.lengths for store in stores]
    order = blend(lengths, wanted.weights, [part.name for part in wanted.parts])
    used = np.bincount(order.corpora, minlength=len(stores)).tolist()
    left = [int(np.count_nonzero(tokens)) - count for tokens, count in zip(lengths, used, strict=True)]
    parts = tuple(dataclasses.replace(part, unused=unused) for part, unused in zip(wanted.parts, left, strict=True))
    kept = held_out(order.corpora, wanted.validation)
    if kept.any():
        without = dataclasses.replace(wanted, validation=0.0)
        _write_data_set(stores, order.only(kept), tokenizer, folder / VALIDATION_FOLDER, without)
    return _write_data_set(stores, order.only(~kept), tokenizer, folder, dataclasses.replace(wanted, parts=parts))


def _write_data_set(stores: list[TokenStore], order: Order, tokenizer: PreTrainedTokenizerBase, folder: Path, wanted: Metadata) -> Metadata:
    """Pack documents into a folder with the tokenizer and `seqloom.json` beside them; returns what the latter says."""
    from datasets import load_from_disk

    folder.mkdir(exist_ok=True)
    pieces = _pieces(stores, order)
    with RowWriter(folder, wanted.sequence_length, wanted.pack) as writer:
        if wanted.pack == DOCUMENTS:
            blocks = pack_documents(pieces, wanted.sequence_length, tokenizer.eos_token_id)
        else:
            blocks = pack_stream((tokens for tokens, _ in pieces), wanted.sequence_length, tokenizer.eos_token_id)
        for block in blocks:
            writer.write(*block)
    counted = _count(stores, order, wanted)
    if not writer.labels and wanted.chat_labels == ASSISTANT:
        raise UserError(f"no label of {wanted.corpus} counts: its chats need messages of the role `{ASSISTANT}`, or give --chat_labels all")
    lengths = typical_row(load_from_disk(str(folder))) if wanted.pack == DOCUMENTS else wanted.typical_row
    metadata = dataclasses.replace(counted, rows=writer.rows, labels=writer.labels, typical_row=lengths)
    tokenizer.save_pretrained(folder / TOKENIZER_FOLDER)
    write_metadata(folder, metadata)
    return metadata


def _count(stores: list[TokenStore], order: Order, wanted: Metadata) -> Metadata:
    """What is known of a data set before it is packed: its tokens and documents, those of each corpus, and how many documents are cut."""
    lengths = _lengths(stores, order)
    ends = np.cumsum(lengths)
    cut = (ends - lengths) // wanted.sequence_length != (ends - 1) // wanted.sequence_length
    tokens = np.bincount(order.corpora, lengths, len(stores))
    documents = np.bincount(order.corpora, minlength=len(stores))
    parts = tuple(
        dataclasses.replace(part, tokens=int(tokens[index]), documents=int(documents[index])) for index, part in enumerate(wanted.parts)
    )
    return dataclasses.replace(wanted, tokens=int(lengths.sum()), documents=len(order), parts=parts, cut=int(cut.sum()))


def _lengths(stores: list[TokenStore], order: Order) -> np.ndarray:
    """The tokens of each document in order, int64."""
    lengths = np.empty(len(order), np.int64)
    for corpus, store in enumerate(stores):
        mine = order.corpora == corpus
        lengths[mine] = store.lengths[order.documents[mine]]
    return lengths


def _pieces(stores: list[TokenStore], order: Order) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The tokens of the documents in order, a block at a time, each with the numbers of tokens behind which documents end."""
    lengths = _lengths(stores, order)
    ends = np.cumsum(lengths)
    start = 0
    while start < len(order):
        behind = int(np.searchsorted(ends, ends[start] - lengths[start] + BLOCK_TOKENS, side="right"))
        stop = max(behind, start + 1)
        yield _gather(stores, order.corpora[start:stop], order.documents[start:stop], lengths[start:stop]), np.cumsum(lengths[start:stop])
        start = stop


def _gather(stores: list[TokenStore], corpora: np.ndarray, documents: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The tokens of some documents: read corpus by corpus, then put in order."""
    by_corpus = np.argsort(corpora, kind="stable")
    tokens = np.concatenate([store.read(documents[corpora == corpus]) for corpus, store in enumerate(stores)])
    if len(stores) == 1:
        return tokens
    ends = np.cumsum(lengths[by_corpus])
    starts = np.empty(len(documents), np.int64)
    starts[by_corpus] = ends - lengths[by_corpus]
    return tokens[spread(starts, lengths)]
