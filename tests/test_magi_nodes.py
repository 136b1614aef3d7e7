"""The exchange over nodes carried out with row numbers: every rank gets the rows of the flat plan, and few cross between nodes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from magi_samples import any_mask

from seqloom.errors import UserError
from seqloom.magi import masks
from seqloom.magi.dispatch import plan_dispatch
from seqloom.magi.exchange import plan_exchange
from seqloom.magi.nodes import node_stages

NO_ROWS = np.zeros(0, int)


def all_to_all(hops, rows) -> list[np.ndarray]:
    """What every member of a group receives when member p holds `rows[p]`; the receive splits are checked."""
    received = []
    for member, hop in enumerate(hops):
        pieces = [
            np.concatenate([NO_ROWS, *(held[start:end] for start, end in other.send[member])])
            for other, held in zip(hops, rows, strict=True)
        ]
        assert tuple(map(len, pieces)) == hop.receive_splits == tuple(other.send_splits[member] for other in hops)
        received.append(np.concatenate(pieces))
    return received


def carried_out(exchange, ranks_per_node: int, stage: int):
    """The stages of all ranks, what came across to each, and what each got in the end, in global row numbers."""
    num_ranks = exchange.dispatch.num_ranks
    plans = [node_stages(exchange, rank, ranks_per_node)[stage] for rank in range(num_ranks)]
    local = [exchange.dispatch.position_ids(rank) for rank in range(num_ranks)]
    across, final = [NO_ROWS] * num_ranks, [NO_ROWS] * num_ranks
    for place in range(ranks_per_node):
        group = range(place, num_ranks, ranks_per_node)
        for rank, rows in zip(group, all_to_all([plans[r].across for r in group], [local[r] for r in group]), strict=True):
            across[rank] = rows
    for first in range(0, num_ranks, ranks_per_node):
        group = range(first, first + ranks_per_node)
        held = [np.concatenate((local[rank], across[rank])) for rank in group]
        for rank, rows in zip(group, all_to_all([plans[r].within for r in group], held), strict=True):
            final[rank] = rows
    return plans, across, final


@given(
    any_mask,
    st.sampled_from(((1, 1), (2, 1), (1, 2), (2, 2), (3, 2), (2, 3), (2, 4), (4, 2))),
    st.integers(1, 6),
    st.sampled_from((1, 2, 3)),
)
@settings(deadline=None, max_examples=200)
def test_ranks_get_the_rows_of_the_flat_plan_and_compute_its_cells(mask, shape, chunk_size, degree):
    nodes, ranks_per_node = shape
    exchange = plan_exchange(mask, plan_dispatch(mask, nodes * ranks_per_node, chunk_size), degree)
    for stage in range(exchange.degree):
        plans, _, final = carried_out(exchange, ranks_per_node, stage)
        for rank, (plan, rows) in enumerate(zip(plans, final, strict=True)):
            flat = exchange.transfers.in_stage(stage).to(rank)
            expected = [row for start, end in zip(flat.start, flat.end, strict=True) for row in range(start, end)]
            assert sorted(rows.tolist()) == sorted(expected)
            assert cells(exchange, rank, plan.bands, rows) == mask_cells(mask, exchange.dispatch.position_ids(rank), expected)


def cells(exchange, rank: int, bands, columns) -> list[tuple[int, int]]:
    """Global (row, column) of every cell of the bands, sorted; a cell twice stays twice."""
    local = exchange.dispatch.position_ids(rank)
    found = []
    for band in bands:
        for row in range(band.q_start, band.q_end):
            for column in range(max(band.k_start, row + band.lo), min(band.k_end, row + band.hi + 1)):
                found.append((int(local[row]), int(columns[column])))
    return sorted(found)


def mask_cells(mask, rows, columns) -> list[tuple[int, int]]:
    dense = mask.dense()
    return sorted((int(row), int(column)) for row in rows if row < mask.total_seqlen_q for column in columns if dense[row, column])


@given(any_mask, st.sampled_from(((2, 2), (2, 3), (3, 2), (2, 4))), st.integers(1, 6))
@settings(deadline=None, max_examples=100)
def test_a_row_crosses_once_to_each_node_that_needs_it(mask, shape, chunk_size):
    nodes, ranks_per_node = shape
    exchange = plan_exchange(mask, plan_dispatch(mask, nodes * ranks_per_node, chunk_size))
    if not exchange.degree:
        return
    _, across, _ = carried_out(exchange, ranks_per_node, 0)
    dense = mask.dense()
    hosted = [
        np.concatenate([exchange.dispatch.position_ids(rank) for rank in range(n * ranks_per_node, (n + 1) * ranks_per_node)])
        for n in range(nodes)
    ]
    for node, rows in enumerate(hosted):
        needed = set(np.flatnonzero(dense[rows[rows < mask.total_seqlen_q]].any(axis=0)).tolist()) - set(rows.tolist())
        crossed = np.concatenate(across[node * ranks_per_node : (node + 1) * ranks_per_node])
        assert sorted(crossed.tolist()) == sorted(needed)


def test_a_full_mask_crosses_a_fraction_of_the_flat_plan():
    mask = masks.packed([0, 64], causal=False)
    exchange = plan_exchange(mask, plan_dispatch(mask, 8, 8))
    plans, across, _ = carried_out(exchange, 4, 0)
    assert sum(map(len, across)) == 64  # each node gets the other's 32 rows once; the flat plan sends each to 4 ranks
    assert sum(exchange.moved[target, source] for target in range(8) for source in range(8) if target // 4 != source // 4) == 256
    assert all(len(plan.bands) == 1 for plan in plans)


def test_one_node_needs_nothing_from_across_and_nodes_of_one_rank_only_that():
    mask = masks.packed([0, 64])
    exchange = plan_exchange(mask, plan_dispatch(mask, 4, 4))
    for rank in range(4):
        (alone,) = node_stages(exchange, rank, 4)
        assert alone.across.receive_splits == (0,) and alone.across.send == ((),)
        assert alone.within.receive_splits == exchange.ranks[rank].stages[0].receive_splits
        assert alone.within.send == exchange.ranks[rank].stages[0].send and alone.bands == exchange.ranks[rank].stages[0].bands
        (apart,) = node_stages(exchange, rank, 1)
        assert apart.across.receive_splits == exchange.ranks[rank].stages[0].receive_splits
        assert apart.across.send == exchange.ranks[rank].stages[0].send and apart.bands == exchange.ranks[rank].stages[0].bands
        assert apart.within.receive_splits == (exchange.received_rows[rank],)


@pytest.mark.parametrize("ranks_per_node", [0, 3, 8])
def test_ranks_must_fill_nodes(ranks_per_node):
    mask = masks.packed([0, 64])
    with pytest.raises(UserError, match=f"4 ranks do not fill nodes of {ranks_per_node}"):
        node_stages(plan_exchange(mask, plan_dispatch(mask, 4)), 0, ranks_per_node)
