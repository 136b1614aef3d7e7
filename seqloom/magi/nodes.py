"""The exchange over nodes: a row that several ranks of a node need crosses the network once and is handed on within the node.

Role in the pipeline: on a mesh with a node axis the runtime takes a rank's stages from `node_stages` instead of `RankPlan.stages`; the
host bands stay. Ranks are numbered node by node: rank = node x `ranks_per_node` + place. A stage has two hops, each one all-to-all:

- `across`, among the ranks with the same place in all nodes: a rank sends to every other node the rows that anyone there needs in this
  stage (with more stages than one, ranks of a node may need a row in different ones, and it crosses in each).
- `within`, among the ranks of a node: every rank hands on its own rows and those that came across, each rank taking what it needs.

What a rank gets in the end are the rows of the flat plan, by the place of their source, then its node, then in rising global order.
Gradients go the same way back: summed within the node first, so each row's gradient crosses the network once for each node.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from seqloom.errors import UserError
from seqloom.magi.bands import Band, Range
from seqloom.magi.exchange import Exchange, Runs, by_destination, in_runs, local_rows, over_columns
from seqloom.magi.transfers import Transfers, unions


@dataclass(frozen=True)
class Hop:
    """One all-to-all: `send[p]` are row ranges for member p of the group, in the order sent; `receive_splits[p]` rows come from it."""

    send: tuple[tuple[Range, ...], ...]
    receive_splits: tuple[int, ...]

    @property
    def send_splits(self) -> tuple[int, ...]:
        """Rows that go to each member."""
        return tuple(sum(end - start for start, end in ranges) for ranges in self.send)


@dataclass(frozen=True)
class NodeStage:
    """One stage of a rank. `across` sends local rows to nodes; `within` sends to places rows of the local rows followed by what came across
    (numbered on from the last local row); `bands` are local query rows x columns of what `within` brings."""

    across: Hop
    within: Hop
    bands: tuple[Band, ...]


def node_stages(exchange: Exchange, rank: int, ranks_per_node: int) -> tuple[NodeStage, ...]:
    """The stages of `rank` when `ranks_per_node` neighbouring ranks share a node.

    Raises `UserError` unless the ranks fill whole nodes.
    """
    num_ranks = exchange.dispatch.num_ranks
    if ranks_per_node < 1 or num_ranks % ranks_per_node:
        raise UserError(f"{num_ranks} ranks do not fill nodes of {ranks_per_node}: give a number of ranks per node that divides them")
    bands, runs = local_rows(exchange, rank)
    return tuple(
        _node_stage(exchange, rank, ranks_per_node, exchange.transfers.in_stage(stage), bands, runs) for stage in range(exchange.degree)
    )


def _node_stage(exchange: Exchange, rank: int, ranks_per_node: int, moves: Transfers, bands: np.ndarray, runs: Runs) -> NodeStage:
    node, place = divmod(rank, ranks_per_node)
    nodes = exchange.dispatch.num_ranks // ranks_per_node
    total = exchange.dispatch.padded_seqlen

    leaving = moves.picked((moves.source == rank) & (moves.target // ranks_per_node != node))
    to, start, end = unions(leaving.target // ranks_per_node, leaving.start, leaving.end, total)
    first = in_runs(start, runs)
    send = by_destination(to, first, first + end - start, nodes)

    passing = moves.picked((moves.source % ranks_per_node == place) & (moves.target // ranks_per_node == node))
    passing = passing.sorted_by(passing.target, passing.source, passing.start)
    come = passing.source // ranks_per_node != node
    across_splits, begin = _hand_on(exchange, rank, passing, come, nodes, ranks_per_node, runs)
    handed = by_destination(passing.target % ranks_per_node, begin, begin + passing.end - passing.start, ranks_per_node)

    received = moves.to(rank)
    received = received.sorted_by(received.source % ranks_per_node, received.source, received.start)
    lengths = received.end - received.start
    within_splits = np.zeros(ranks_per_node, np.int64)
    np.add.at(within_splits, received.source % ranks_per_node, lengths)
    order = np.argsort(received.start)
    columns = over_columns(bands, received.start[order], received.end[order], (np.cumsum(lengths) - lengths)[order])
    return NodeStage(Hop(send, across_splits), Hop(handed, tuple(within_splits.tolist())), columns)


def _hand_on(
    exchange: Exchange, rank: int, passing: Transfers, come: np.ndarray, nodes: int, ranks_per_node: int, runs: Runs
) -> tuple[tuple[int, ...], np.ndarray]:
    """Rows that come across from every node, and where the ranges of `passing` begin in local rows followed by these."""
    sources, start, end = unions(
        passing.source[come] // ranks_per_node, passing.start[come], passing.end[come], exchange.dispatch.padded_seqlen
    )
    lengths = end - start
    splits = np.zeros(nodes, np.int64)
    np.add.at(splits, sources, lengths)
    places = exchange.dispatch.rows(rank) + np.cumsum(lengths) - lengths
    order = np.argsort(start)  # a row has one source, so these ranges share none
    begin = np.empty(len(passing.start), np.int64)
    begin[come] = in_runs(passing.start[come], (start[order], end[order], places[order]))
    begin[~come] = in_runs(passing.start[~come], runs)
    return tuple(splits.tolist()), begin
