"""From the flags of bookcorpus.py to a packed data set: corpora, tokenizer, packing, each checked before the long work begins."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from seqloom.data.build import build
from seqloom.data.chat import set_chat_template
from seqloom.data.corpora import TEXT, Corpus, load_corpus
from seqloom.data.folders import check_target
from seqloom.data.metadata import DEFAULT_PACK, FILE, ChatLabels, Metadata, Pack
from seqloom.data.settings import Settings
from seqloom.data.tokenizer import TRAIN, load_tokenizer, training_vocab
from seqloom.errors import UserError

NO_CHATS = "-"


def prepare(
    data_path_or_name: str | Sequence[str],
    tokenizer_path_or_name: str,
    save_path: str,
    sequence_length: int,
    overwrite: bool = False,
    num_proc: int | None = None,
    max_documents: int | None = None,
    pack: Pack = DEFAULT_PACK,
    validation: float = 0.0,
    text_column: str | Sequence[str] = TEXT,
    chat_column: str | Sequence[str] = (),
    chat_labels: ChatLabels = "assistant",
    chat_template: str | None = None,
    weights: Sequence[float] = (),
) -> tuple[Metadata, bool]:
    """Make the data set of `python bookcorpus.py` and return its metadata and whether it was made now or already there.

    The columns are one name for all corpora or one for each. Raises UserError for every wrong flag, the cheap ones before anything is
    read.
    """
    names = _listed(data_path_or_name)
    settings = Settings(sequence_length, pack, validation, tuple(weights), chat_labels, num_proc, overwrite)
    settings.check(names)
    texts, chats = _for_each(names, text_column, "text_column"), _for_each(names, chat_column or NO_CHATS, "chat_column")
    has_chats = any(chat != NO_CHATS for chat in chats)
    if not has_chats and (chat_template is not None or chat_labels != Settings.chat_labels):
        raise UserError("--chat_labels and --chat_template say how chats are read: name the column that holds them as --chat_column")
    if max_documents is not None and max_documents < 1:
        raise UserError(f"--max_documents is {max_documents}: give a positive number")
    if tokenizer_path_or_name.startswith(TRAIN):
        training_vocab(tokenizer_path_or_name)
    check_target(Path(save_path), FILE)
    _only_plain_lines()
    corpora = [_corpus(*each, max_documents) for each in zip(names, texts, chats, strict=True)]
    tokenizer = load_tokenizer(tokenizer_path_or_name, [corpus.documents for corpus in corpora])
    if has_chats:
        set_chat_template(tokenizer, chat_template)
    return build(corpora, tokenizer, tokenizer_path_or_name, save_path, settings)


def _listed(value: str | Sequence[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _for_each(names: list[str], columns: str | Sequence[str], flag: str) -> list[str]:
    """The column of each corpus."""
    listed = _listed(columns)
    if len(listed) not in (1, len(names)):
        raise UserError(f"--{flag} has {len(listed)} names for {len(names)} corpora: give one for all, or one for each")
    return listed * len(names) if len(listed) == 1 else listed


def _corpus(name: str, text_column: str, chat_column: str, max_documents: int | None) -> Corpus:
    chat = chat_column != NO_CHATS
    column = chat_column if chat else text_column
    documents = load_corpus(name, column, chat)
    if max_documents is not None:
        documents = documents.select(range(min(max_documents, len(documents))))
    return Corpus(name, documents, column)


def _only_plain_lines() -> None:
    """No bars of `datasets` where nobody sees them move."""
    from datasets import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
