"""Packing: documents become one stream of tokens, the stream becomes rows of equal length.

In: the tokens of documents, piece by piece. Out: blocks of rows, `input_ids` and `labels` (int32). Row r of length L is

    input_ids = stream[r * L : (r + 1) * L]        labels = stream[r * L + 1 : (r + 1) * L + 1]

so every token is an input exactly once and, but for the first, a label exactly once. The last row is filled up with end-of-text
tokens whose labels are -100, which do not count. A token that must not count as a label comes in as its complement (`~token`, which is
negative); as a label it is -100. Nothing larger than a piece or a block of rows is held in memory.

That is `--pack stream`. With `--pack documents` the rows hold the same tokens and know their documents: a third column `cu_seqlens`
(lists of int32) has the borders inside each row, and what follows a document's end of text is no label of it but -100. A document that
the end of a row cuts goes on in the next row, with the label across the cut. Padding is a document of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from seqloom.data.documents import Borders, find_borders

IGNORED = -100


def pack_stream(stream: Iterable[np.ndarray], seq_len: int, pad_id: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cut a stream of int32 tokens, given piece by piece, into `(input_ids, labels)` blocks of shape `[rows, seq_len]`.

    How the stream is cut into pieces makes no difference. The last block may hold one row that is partly padding.
    """
    rest = np.empty(0, np.int32)
    for piece in stream:
        rest = np.concatenate((rest, piece))
        full = max(len(rest) - 1, 0) // seq_len * seq_len  # the label of a row's last token is the next row's first
        if full:
            yield _inputs(rest[:full]).reshape(-1, seq_len), _labels(rest[1 : full + 1]).reshape(-1, seq_len)
            rest = rest[full:]
    if len(rest):
        input_ids = np.full((1, seq_len), pad_id, np.int32)
        labels = np.full((1, seq_len), IGNORED, np.int32)
        input_ids[0, : len(rest)] = _inputs(rest)
        labels[0, : len(rest) - 1] = _labels(rest[1:])
        yield input_ids, labels


def _inputs(tokens: np.ndarray) -> np.ndarray:
    return np.where(tokens < 0, ~tokens, tokens) if len(tokens) and tokens.min() < 0 else tokens


def _labels(tokens: np.ndarray) -> np.ndarray:
    return np.where(tokens < 0, IGNORED, tokens) if len(tokens) and tokens.min() < 0 else tokens


def pack_documents(
    pieces: Iterable[tuple[np.ndarray, np.ndarray]], seq_len: int, pad_id: int
) -> Iterator[tuple[np.ndarray, np.ndarray, Borders]]:
    """Cut a stream of int32 tokens as `pack_stream` does, into the same rows, with no label across a document's end, and their borders.

    A piece is `(tokens, ends)`: `ends` are the numbers of its tokens behind which a document ends, in [1, len(tokens)]. A document may
    lie in several pieces; the last one ends with the last token, so that the padding behind it is a document of its own.
    """
    ends: list[np.ndarray] = []  # counted from the first token of all; those of rows that were given out are gone
    taken = 0

    def stream() -> Iterator[np.ndarray]:
        nonlocal taken
        for tokens, own_ends in pieces:
            ends.append(taken + own_ends)
            taken += len(tokens)
            yield tokens

    first = 0
    for input_ids, labels in pack_stream(stream(), seq_len, pad_id):
        behind = first + input_ids.size
        known = np.concatenate(ends)
        inside = known[known <= behind] - first
        ends[:] = [known[known > behind]]
        labels = labels.copy()  # it shares its memory with input_ids
        labels.reshape(-1)[inside - 1] = IGNORED
        yield input_ids, labels, find_borders(inside, len(input_ids), seq_len)
        first = behind
