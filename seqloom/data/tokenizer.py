"""The tokenizer of a data set: one that exists (hub id or folder), or one trained on the corpus itself (`train:4096`).

A trained one is a byte-level BPE (Sennrich et al. 2016, https://arxiv.org/abs/1508.07909; on bytes as in GPT-2), so it has no unknown
token and decodes to exactly the text it was given. The same corpus gives the same tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from seqloom.data.chat import MESSAGES
from seqloom.data.corpora import TEXT
from seqloom.data.hub import hub_clients
from seqloom.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

TRAIN = "train:"
END_OF_TEXT = "<|endoftext|>"
BYTES = 256
MIN_VOCAB = BYTES + 1  # every byte and the end of text
TRAINING_BYTES = 100 * 2**20
ALTERNATIVES = "give the folder of a tokenizer, or train:4096 to train one of 4096 tokens on the corpus"


def load_tokenizer(path_or_name: str, corpora: Sequence[Dataset] = ()) -> PreTrainedTokenizerBase:
    """The tokenizer called `path_or_name`: a hub id, a folder, or `train:N`, which trains one of N tokens on `corpora` (column
    `text`, or `messages`: what they say).

    It has an end-of-text token and fits its vocabulary. Raises UserError where it cannot be read or trained.
    """
    if path_or_name.startswith(TRAIN):
        if not corpora:
            raise UserError(f"{path_or_name} needs a corpus to be trained on: {ALTERNATIVES.split(', or')[0]}")
        return train_tokenizer(corpora, training_vocab(path_or_name))
    tokenizer = _from_pretrained(path_or_name)
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer {path_or_name} has no end-of-text token (eos_token) to put between documents: {ALTERNATIVES}")
    return tokenizer


def training_vocab(name: str) -> int:
    """N of `train:N`, the size of the vocabulary. Raises UserError if it is no number or too small for all bytes."""
    size = name.removeprefix(TRAIN)
    if not size.isdecimal() or int(size) < MIN_VOCAB:
        raise UserError(f"{name} does not give a vocabulary size: write train:N with N at least {MIN_VOCAB}, such as train:4096")
    return int(size)


def train_tokenizer(corpora: Sequence[Dataset], vocab_size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE of at most `vocab_size` tokens (fewer if the text has too few pairs to merge), end of text included.

    Of corpora larger than `TRAINING_BYTES` every k-th document is used, k such that about this much remains.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    stride = -(-sum(corpus.data.nbytes for corpus in corpora) // TRAINING_BYTES)
    bpe.train_from_iterator(_texts(corpora, stride), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def _texts(corpora: Sequence[Dataset], stride: int) -> Iterator[list[str]]:
    for corpus in corpora:
        for batch in (corpus.select(range(0, len(corpus), stride)) if stride > 1 else corpus).iter(batch_size=100):
            if MESSAGES in batch:
                yield [message["content"] for chat in batch[MESSAGES] for message in chat or () if message.get("content")]
            else:
                yield [text for text in batch[TEXT] if text]


def _from_pretrained(path_or_name: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    local = Path(path_or_name).expanduser()
    if not local.is_dir() and (local.is_file() or path_or_name.startswith((".", "/", "~"))):
        raise UserError(f"there is no tokenizer folder {path_or_name}: {ALTERNATIVES}")
    try:
        with hub_clients(local_only=local.is_dir()):
            return AutoTokenizer.from_pretrained(str(local) if local.is_dir() else path_or_name, trust_remote_code=False)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(f"cannot load the tokenizer {path_or_name} ({reason}): {ALTERNATIVES}") from error
