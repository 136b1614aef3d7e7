"""From the flags of bookcorpus.py to a packed data set: corpus, tokenizer, packing, each checked before the long work begins."""

from __future__ import annotations

from pathlib import Path

from seqloom.data.corpora import load_corpus
from seqloom.data.folders import check_target
from seqloom.data.metadata import FILE, Metadata, Pack
from seqloom.data.packing import DEFAULT_PACK, check_lengths, pack_corpus
from seqloom.data.split import check_share
from seqloom.data.tokenizer import TRAIN, load_tokenizer, training_vocab
from seqloom.errors import UserError


def prepare(
    data_path_or_name: str,
    tokenizer_path_or_name: str,
    save_path: str,
    sequence_length: int,
    overwrite: bool = False,
    num_proc: int = 1,
    max_documents: int | None = None,
    pack: Pack = DEFAULT_PACK,
    validation: float = 0.0,
) -> tuple[Metadata, bool]:
    """Make the data set of `python bookcorpus.py` and return its metadata and whether it was made now or already there.

    Raises UserError for every wrong flag, the cheap ones before anything is read.
    """
    check_lengths(sequence_length, num_proc)
    check_share(validation)
    if max_documents is not None and max_documents < 1:
        raise UserError(f"--max_documents is {max_documents}: give a positive number")
    if tokenizer_path_or_name.startswith(TRAIN):
        training_vocab(tokenizer_path_or_name)
    check_target(Path(save_path), FILE)
    corpus = load_corpus(data_path_or_name)
    if max_documents is not None:
        corpus = corpus.select(range(min(max_documents, len(corpus))))
    return pack_corpus(
        corpus,
        load_tokenizer(tokenizer_path_or_name, corpus),
        save_path,
        sequence_length,
        corpus_name=data_path_or_name,
        tokenizer_name=tokenizer_path_or_name,
        overwrite=overwrite,
        num_proc=num_proc,
        pack=pack,
        validation=validation,
    )
