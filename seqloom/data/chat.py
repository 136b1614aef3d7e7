"""Chats: lists of messages become tokens by the tokenizer's own chat template, and it is known which of them the assistant says.

In: lists of `{"role", "content"}`. Out: the tokens of each chat as the template writes it (nothing is put before or behind), and for each
token whether it counts as a label. A template with `{% generation %}` tags says itself what the assistant says. Of any other the chat is
written up to each of the assistant's messages, without and with it: what the second adds is said by the assistant. That holds only where
the template writes a chat from its front to its end, so where one is no beginning of the whole, the chat is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from seqloom.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MESSAGES = "messages"
ASSISTANT = "assistant"
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
GIVE_TEMPLATE = "give one with --chat_template FILE (a Jinja file), or the tokenizer of a model that was tuned to chat"

Chat = list[dict[str, Any]]


def set_chat_template(tokenizer: PreTrainedTokenizerBase, file: str | None) -> None:
    """Give the tokenizer the template in `file`, if there is one. Raises UserError if it has none then, or if the file cannot be used."""
    import jinja2
    from transformers.utils.chat_template_utils import _compile_jinja_template

    if file is not None:
        try:
            tokenizer.chat_template = Path(file).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the chat template {file} ({error}): name a Jinja file as --chat_template") from error
    if not tokenizer.chat_template:
        raise UserError(f"the tokenizer has no chat template to write the chats of --chat_column with: {GIVE_TEMPLATE}")
    try:
        _compile_jinja_template(tokenizer.get_chat_template())
    except (jinja2.TemplateError, ValueError) as error:
        raise UserError(f"the chat template {file or 'of the tokenizer'} is no Jinja template ({error}): {GIVE_TEMPLATE}") from error


def check_messages(messages: Any, where: str) -> None:
    """Raise UserError unless a document is a list of messages whose `role` and `content` are strings."""
    advice = 'give a column of lists of {"role": ..., "content": ...} as --chat_column'
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise UserError(f"{where} holds {_kind(messages)}, not chats: {advice}")
    for message in messages:
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                has = ", ".join(name for name in message if message[name] is not None)
                raise UserError(f"{where} has a message without a `{key}` that is a string (it has {has}): {advice}")


def _kind(value: Any) -> str:
    return f"lists of {type(value[0]).__name__}" if isinstance(value, list) and value else f"values of type {type(value).__name__}"


@dataclass(frozen=True)
class ChatEncoder:
    """Turns chats of the corpus called `name` into tokens; `labels`: `assistant`, only what it says counts, or `all`."""

    tokenizer: PreTrainedTokenizerBase
    labels: str
    name: str

    def __call__(self, chats: list[Chat | None]) -> list[np.ndarray]:
        """The int32 tokens of each chat; those that do not count as labels as their complement (`~token`, which is negative)."""
        found = [np.empty(0, np.int32)] * len(chats)
        full = [index for index, chat in enumerate(chats) if chat]
        for index, tokens in zip(full, self._encode([self._clean(chats[index]) for index in full]), strict=True):
            found[index] = tokens
        return found

    def _encode(self, chats: list[Chat]) -> list[np.ndarray]:
        if not chats:
            return []
        if self.labels == "all":
            return [np.array(ids, np.int32) for ids in self._apply(chats, tokenize=True)["input_ids"]]
        if not self.tokenizer.is_fast:
            raise UserError(
                f"the tokenizer is one written in Python, which cannot tell where in a chat of {self.name} its tokens lie: give a fast "
                f"tokenizer, or --chat_labels all"
            )
        if GENERATION.search(self.tokenizer.get_chat_template()):
            found = self._apply(chats, tokenize=True, return_assistant_tokens_mask=True)
            return [_masked(*both) for both in zip(found["input_ids"], found["assistant_masks"], strict=True)]
        return self._by_prefixes(chats)

    def _by_prefixes(self, chats: list[Chat]) -> list[np.ndarray]:
        texts = self._apply(chats, tokenize=False)
        encoded = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False)
        found = []
        for chat, text, ids, offsets in zip(chats, texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            starts, ends = np.array(offsets, np.int64).reshape(-1, 2).T
            counts = np.zeros(len(ids), bool)
            for first, last in self._assistant_spans(chat, text):
                counts |= (starts < last) & (ends > first)
            found.append(_masked(ids, counts))
        return found

    def _assistant_spans(self, chat: Chat, text: str) -> list[tuple[int, int]]:
        """Where in the text of a chat the assistant speaks: first character and the one behind the last."""
        spans = []
        for index, message in enumerate(chat):
            if message["role"] != ASSISTANT:
                continue
            before = self._apply([chat[:index]], tokenize=False, add_generation_prompt=True)[0]
            through = text if index + 1 == len(chat) else self._apply([chat[: index + 1]], tokenize=False)[0]
            if not (text.startswith(before) and text.startswith(through) and len(before) <= len(through)):
                raise UserError(
                    f"the chat template writes the beginning of a chat of {self.name} otherwise than the whole (at message {index + 1} of "
                    f"{len(chat)}), so what the assistant says cannot be told apart: give a template with {{% generation %}} tags as "
                    f"--chat_template FILE, or --chat_labels all"
                )
            spans.append((len(before), len(through)))
        return spans

    def _clean(self, chat: Chat | None) -> Chat:
        check_messages(chat, self.name)
        return [{key: value for key, value in message.items() if value is not None} for message in chat or ()]

    def _apply(self, chats: list[Chat], **options: Any) -> Any:
        import jinja2

        try:
            return self.tokenizer.apply_chat_template(chats, **options)
        except (jinja2.TemplateError, TypeError, IndexError) as error:
            roles = ", ".join(message["role"] for message in chats[0][:6]) or "no message"
            raise UserError(
                f"the chat template cannot write a chat of {self.name} ({error}; the first one has {roles}): mend the data, give another "
                f"--chat_template FILE, or --chat_labels all if it refuses only the beginnings of chats"
            ) from error


def _masked(ids: list[int], counts: list[int] | np.ndarray) -> np.ndarray:
    tokens = np.array(ids, np.int32)
    return np.where(np.array(counts, bool), tokens, ~tokens)
