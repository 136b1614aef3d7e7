"""Dispatch: which rank computes which query chunks of a mask.

Role in the pipeline: `plan_dispatch` turns a mask into a `Dispatch`, the permutation of tokens that everything but attention is unaware
of; `exchange` plans from it which key/value rows travel. Every rank calls it alike and gets the same answer: whole numbers decide, ties
go to the first, nothing is random, and no rank asks another.

How: the tokens are cut into chunks of equal size; every rank gets equally many (even mode: chunks of padding at the end make up the
number, and ranks hold equally many rows) or counts that differ by one (uneven mode). `assign.candidates` proposes assignments, among them
MagiAttention's area-only rule, and improves some by swapping chunks; `objective.AttentionCost.step_seconds` judges them. Predictions
that differ by less than `objective.TOLERANCE` are one and the same, and there the fewest rows on the wire win, but nothing is taken that is
predicted slower than the area-only rule.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from seqloom.cost.hardware import Hardware
from seqloom.errors import UserError
from seqloom.magi.assign import area_only, candidates
from seqloom.magi.bands import Range
from seqloom.magi.chunks import Chunks, chunks_of
from seqloom.magi.mask import AttnMask
from seqloom.magi.objective import TOLERANCE, AttentionCost, attention_cost

ALGORITHMS = ("auto", "area")
CHUNKS_PER_RANK = 8  # of the default chunk size: two make causal masks even, eight packed documents within a few hundredths
CHUNK_MULTIPLE = 128  # rows of a tile of attention kernels


@dataclass(frozen=True)
class Dispatch:
    """An assignment of chunks to ranks; frozen, hashable, the same on every rank.

    `partitions[r]`: the chunks of rank r, ascending; chunk c is the global rows [c, c + 1) x `chunk_size`. `areas[r]`: mask cells in them.
    Rows from `total_seqlen` to `padded_seqlen` are padding without cells. `predicted_s`: the objective in seconds, by `cost`.
    """

    partitions: tuple[tuple[int, ...], ...]
    areas: tuple[int, ...]
    chunk_size: int
    total_seqlen: int
    padded_seqlen: int
    cost: AttentionCost = field(repr=False)
    predicted_s: float

    @property
    def num_ranks(self) -> int:
        """Number of ranks."""
        return len(self.partitions)

    @property
    def balance(self) -> float:
        """The largest rank's cells over the mean: 1.0 is even."""
        return max(self.areas) * self.num_ranks / sum(self.areas)

    @cached_property
    def owners(self) -> np.ndarray:
        """The rank of every chunk, int64 `[chunks]`. Not to be written to."""
        owners = np.empty(sum(map(len, self.partitions)), np.int64)
        for rank, chunks in enumerate(self.partitions):
            owners[list(chunks)] = rank
        owners.flags.writeable = False
        return owners

    def rows(self, rank: int) -> int:
        """Number of rows, padding included, that `rank` hosts."""
        return len(self.partitions[rank]) * self.chunk_size

    def ranges(self, rank: int) -> tuple[Range, ...]:
        """The global rows that `rank` hosts, in local order, as [start, end) ranges; neighbouring chunks are one range."""
        starts, ends = self.runs(rank)
        return tuple(zip(starts.tolist(), ends.tolist(), strict=True))

    def runs(self, rank: int) -> tuple[np.ndarray, np.ndarray]:
        """`ranges` as two int64 arrays: starts and ends."""
        chunks = np.array(self.partitions[rank], np.int64)
        breaks = np.flatnonzero(np.diff(chunks) != 1)
        first = chunks[np.concatenate(([0], breaks + 1))] if len(chunks) else chunks
        last = chunks[np.concatenate((breaks, [len(chunks) - 1]))] if len(chunks) else chunks
        return first * self.chunk_size, (last + 1) * self.chunk_size

    def position_ids(self, rank: int) -> np.ndarray:
        """The global row of every local row, int64 `[rows(rank)]`; padding rows are those from `total_seqlen` on."""
        chunks = np.array(self.partitions[rank], np.int64)
        return (chunks[:, None] * self.chunk_size + np.arange(self.chunk_size)).reshape(-1)


def plan_dispatch(
    mask: AttnMask,
    num_ranks: int,
    chunk_size: int | None = None,
    algorithm: str = "auto",
    hardware: Hardware | str | None = None,
    *,
    uneven: bool = False,
    num_heads_q: int = 32,
    num_heads_kv: int = 8,
    head_dim: int = 128,
    dtype_bytes: int = 2,
) -> Dispatch:
    """The dispatch of `mask` over `num_ranks` ranks in chunks of `chunk_size` rows (None: about eight chunks a rank).

    `algorithm`: "auto" minimizes the objective; "area" is MagiAttention's rule, chunks by falling area to the least loaded rank that has
    room. `hardware` (a description or its name) and the shapes of attention price cells and rows. `uneven`: ranks may differ by one chunk,
    and only the last chunk is padded. Raises `UserError` for a mask with unequal numbers of queries and keys and for impossible numbers.
    """
    if mask.total_seqlen_q != mask.total_seqlen_k:
        raise UserError(
            f"dispatch needs queries and keys of the same rows, and the mask has {mask.total_seqlen_q} queries and "
            f"{mask.total_seqlen_k} keys: give a mask of self-attention"
        )
    if num_ranks < 1 or (chunk_size is not None and chunk_size < 1):
        raise UserError(f"a dispatch over {num_ranks} ranks in chunks of {chunk_size} rows is impossible: give 1 or more of both")
    if algorithm not in ALGORITHMS:
        raise UserError(f"dispatch algorithm {algorithm!r} is unknown: use one of {', '.join(ALGORITHMS)}")
    cost = attention_cost(hardware, num_ranks, num_heads_q, num_heads_kv, head_dim, dtype_bytes)
    chunk_size = chunk_size or default_chunk_size(mask.total_seqlen_q, num_ranks)
    chunks = chunks_of(mask, chunk_size, num_ranks, uneven)
    owners, predicted_s = _choose(chunks, cost, algorithm)
    return _dispatch(chunks, owners, cost, predicted_s)


def default_chunk_size(total_seqlen: int, num_ranks: int) -> int:
    """Rows of a chunk when the user gives none: an eighth of a rank's share, rounded down to a multiple of 128, or to a power of two."""
    share = -(-total_seqlen // (num_ranks * CHUNKS_PER_RANK))
    return share // CHUNK_MULTIPLE * CHUNK_MULTIPLE or 1 << (share.bit_length() - 1)


def _choose(chunks: Chunks, cost: AttentionCost, algorithm: str) -> tuple[np.ndarray, float]:
    """The owners of the chosen candidate and its predicted seconds."""
    plain = area_only(chunks)
    limit = predicted_seconds(chunks, plain, cost)
    if algorithm == "area":
        return plain, limit
    judged = []
    for owners in (plain, *candidates(chunks, plain, cost)):
        rows = chunks.rows_moved(owners)
        judged.append((cost.step_seconds(chunks.loads(owners), rows), int(rows.sum()), len(judged), owners))
    good_enough = min(limit, min(judged)[0] * (1 + TOLERANCE))
    seconds, _, _, owners = min((entry for entry in judged if entry[0] <= good_enough), key=lambda entry: entry[1:3])
    return owners, seconds


def predicted_seconds(chunks: Chunks, owners: np.ndarray, cost: AttentionCost) -> float:
    """The objective of an assignment."""
    return cost.step_seconds(chunks.loads(owners), chunks.rows_moved(owners))


def _dispatch(chunks: Chunks, owners: np.ndarray, cost: AttentionCost, predicted_s: float) -> Dispatch:
    hosted = owners[: chunks.kept]
    partitions = tuple(tuple(np.flatnonzero(hosted == rank).tolist()) for rank in range(chunks.num_ranks))
    areas = tuple(int(load) for load in chunks.loads(owners))
    padded = chunks.kept * chunks.chunk_size
    return Dispatch(partitions, areas, chunks.chunk_size, chunks.total_seqlen, padded, cost, predicted_s)
