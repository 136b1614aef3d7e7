"""The order of the documents of several corpora in one data set: each has its share of the tokens in any stretch, none is used twice.

In: the lengths of the documents of each corpus, and their weights. Out: which document follows which. A document lies where the middle of
it would be read if every corpus were read at the speed of its weight: with c tokens of its corpus before it and a length of n, that is at
(c + n / 2) / weight. So up to any place a corpus is at most half a document ahead of its share or behind it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from seqloom.errors import UserError


@dataclass(frozen=True)
class Order:
    """Documents one after the other: number `documents[i]` of corpus `corpora[i]`. The documents of one corpus rise."""

    corpora: np.ndarray
    documents: np.ndarray

    def __len__(self) -> int:
        return len(self.documents)

    def only(self, which: np.ndarray) -> Order:
        """Some of them, in the same order; `which` is bool, one for each."""
        return Order(self.corpora[which], self.documents[which])


def check_weights(weights: Sequence[float], names: Sequence[str]) -> None:
    """Raise UserError unless there are no weights, or a positive one for each corpus."""
    if weights and len(weights) != len(names):
        raise UserError(f"--weights has {len(weights)} numbers for {len(names)} corpora ({', '.join(names)}): give each one its weight")
    for weight, name in zip(weights, names, strict=False):
        if not (math.isfinite(weight) and weight > 0):
            raise UserError(f"--weights gives {name} {weight:g}: give a positive number, or leave the corpus out")


def blend(lengths: Sequence[np.ndarray], weights: Sequence[float], names: Sequence[str]) -> Order:
    """The order of all documents that have tokens; `lengths` are the tokens of the documents of each corpus.

    With weights the blend ends where the first corpus runs out. Without, every document is used, and corpora are as dense as they are
    large. Raises UserError where the first document of a corpus is too long for its share.
    """
    if len(lengths) == 1:
        documents = np.flatnonzero(lengths[0])
        return Order(np.zeros(len(documents), np.int16), documents)
    totals = [int(tokens.sum(dtype=np.int64)) for tokens in lengths]
    if weights and not all(totals):
        raise UserError(f"{names[totals.index(0)]} has no tokens to blend: leave it out of --data_path_or_name")
    speeds = list(weights) or totals
    end = min((total / speed for total, speed in zip(totals, speeds, strict=True) if total), default=0.0)
    places, corpora, documents = [], [], []
    for corpus, (tokens, speed) in enumerate(zip(lengths, speeds, strict=True)):
        mine = np.flatnonzero(tokens)
        middles = (np.cumsum(tokens[mine], dtype=np.float64) - tokens[mine] / 2) / (speed or 1)
        mine = mine[middles <= end]
        if weights and not len(mine):
            raise UserError(_no_room(names, totals, speeds, end, corpus))
        places.append(middles[: len(mine)])
        corpora.append(np.full(len(mine), corpus, np.int16))
        documents.append(mine)
    order = np.argsort(np.concatenate(places), kind="stable")
    return Order(np.concatenate(corpora)[order], np.concatenate(documents)[order])


def _no_room(names: Sequence[str], totals: list[int], speeds: list[float], end: float, corpus: int) -> str:
    first_out = min(range(len(totals)), key=lambda index: totals[index] / speeds[index])
    return (
        f"the blend ends where {names[first_out]} runs out, with room for {end * speeds[corpus]:,.0f} tokens of {names[corpus]}, less than "
        f"half of its first document: change --weights, or cut its documents"
    )
