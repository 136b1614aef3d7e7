"""How a data set is made, whatever it is made of: the flags of bookcorpus.py that are no names of corpora or tokenizers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from seqloom.data.blend import check_weights
from seqloom.data.metadata import DEFAULT_PACK, ChatLabels, Pack
from seqloom.data.split import check_share
from seqloom.errors import UserError


@dataclass(frozen=True)
class Settings:
    """Rows of `sequence_length` tokens, packed as `pack` says; a share `validation` of the documents lies in a data set of its own.

    `weights`: the corpora's shares of the tokens, or none. `chat_labels`: which tokens of chats count as labels. `num_proc`: processes
    that tokenize, None for as many as are fastest. `overwrite`: replace a data set that was made otherwise.
    """

    sequence_length: int
    pack: Pack = DEFAULT_PACK
    validation: float = 0.0
    weights: tuple[float, ...] = ()
    chat_labels: ChatLabels = "assistant"
    num_proc: int | None = None
    overwrite: bool = False

    def check(self, names: Sequence[str]) -> None:
        """Raise UserError for a value that cannot be used with the corpora of these names."""
        for flag, value in (("sequence_length", self.sequence_length), ("num_proc", self.num_proc)):
            if value is not None and value < 1:
                raise UserError(f"--{flag} is {value}: give a positive number")
        check_share(self.validation)
        check_weights(self.weights, names)
