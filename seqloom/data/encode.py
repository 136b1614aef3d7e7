"""Texts become tokens: what is done with a batch of documents, whoever calls it.

In: a list of texts. Out: int32 tokens of each, with the end-of-text token behind them. Chats have `chat.py`. Encoders are called from
several threads or processes at once and hold nothing but the tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Encoder = Callable[[list[Any]], list[np.ndarray]]


@dataclass(frozen=True)
class TextEncoder:
    """Turns texts into tokens with an end of text behind each; a text without tokens stays empty, without an end."""

    tokenizer: PreTrainedTokenizerBase

    def __call__(self, texts: list[str | None]) -> list[np.ndarray]:
        """The int32 tokens of each text."""
        end = self.tokenizer.eos_token_id
        return [np.array([*ids, end] if ids else [], np.int32) for ids in self._ids([text or "" for text in texts])]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not self.tokenizer.is_fast:
            return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        backend = self.tokenizer.backend_tokenizer  # a third faster than through the tokenizer: nothing but ids is made
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def keep_whole(tokenizer: PreTrainedTokenizerBase) -> None:
    """Turn off a tokenizer's own truncation and padding, before threads share it: no token is lost or put in."""
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
