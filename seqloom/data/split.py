"""Some documents of a corpus are kept from training, to evaluate on: the same ones for the same corpus and share, wherever it is done."""

from __future__ import annotations

import numpy as np

from seqloom.errors import UserError

_SEED = 0


def check_share(share: float) -> None:
    """Raise UserError unless a share of the documents can be kept from training."""
    if not 0 <= share < 1:
        raise UserError(f"--validation is {share:g}: give the share of documents to evaluate on, at least 0 and below 1")


def held_out(corpora: np.ndarray, share: float) -> np.ndarray:
    """Which documents to evaluate on: bool, one for each. `corpora` says of each document which corpus it is of, and every corpus gives
    its share, at least one.

    Raises UserError for a corpus of a single document: there is nothing to split.
    """
    chosen = np.zeros(len(corpora), bool)
    for corpus in np.unique(corpora) if share else ():
        mine = np.flatnonzero(corpora == corpus)
        if len(mine) < 2:
            raise UserError("--validation keeps documents from training, but the corpus has a single one: leave it out, or split the text")
        count = min(max(1, round(share * len(mine))), len(mine) - 1)
        seed = (_SEED, int(corpus)) if corpus else _SEED
        chosen[mine[np.random.default_rng(seed).permutation(len(mine))[:count]]] = True
    return chosen
