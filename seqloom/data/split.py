"""Some documents of a corpus are kept from training, to evaluate on: the same ones for the same corpus and share, wherever it is done."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from seqloom.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

_SEED = 0


def check_share(share: float) -> None:
    """Raise UserError unless a share of the documents can be kept from training."""
    if not 0 <= share < 1:
        raise UserError(f"--validation is {share:g}: give the share of documents to evaluate on, at least 0 and below 1")


def split_documents(corpus: Dataset, share: float) -> tuple[Dataset, Dataset | None]:
    """The documents to train on and those to evaluate on, both in the order of the corpus; None where `share` is 0.

    Raises UserError for a corpus of a single document: there is nothing to split.
    """
    if share == 0:
        return corpus, None
    if len(corpus) < 2:
        raise UserError("--validation keeps documents from training, but the corpus has a single one: leave it out, or split the text")
    count = min(max(1, round(share * len(corpus))), len(corpus) - 1)
    held_out = np.zeros(len(corpus), bool)
    held_out[np.random.default_rng(_SEED).permutation(len(corpus))[:count]] = True
    return corpus.select(np.flatnonzero(~held_out)), corpus.select(np.flatnonzero(held_out))
