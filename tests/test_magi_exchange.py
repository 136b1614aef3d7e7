"""The exchange plan carried out with numbers instead of tensors: every cell once, rows at their minimum, stages, and other masks."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from magi_samples import any_mask, slice_masks

from seqloom.errors import UserError
from seqloom.magi import masks, stages
from seqloom.magi import table as tables
from seqloom.magi.bands import band_of
from seqloom.magi.dispatch import Dispatch, plan_dispatch
from seqloom.magi.exchange import plan_exchange
from seqloom.magi.mask import AttnMask
from seqloom.magi.objective import AttentionCost, Level

COST = AttentionCost(cell_s=1e-9, launch_s=0.0, levels=(Level(8, 1e-8, 0.0),))
degrees = st.sampled_from((0, 1, 2, 3, 7, "auto"))


def by_hand(partitions, chunk_size: int, total: int, cost: AttentionCost = COST) -> Dispatch:
    """A dispatch with these partitions; areas do not matter to the exchange."""
    padded = chunk_size * sum(map(len, partitions))
    return Dispatch(tuple(map(tuple, partitions)), (0,) * len(partitions), chunk_size, total, padded, cost, 0.0)


@st.composite
def random_dispatches(draw, total: int) -> Dispatch:
    """Chunks dealt out at random, ranks perhaps without any; the cost makes rows dear or cheap."""
    chunk_size, num_ranks = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    owners = draw(st.lists(st.integers(0, num_ranks - 1), min_size=-(-total // chunk_size), max_size=-(-total // chunk_size) + 3))
    partitions = [[chunk for chunk, owner in enumerate(owners) if owner == rank] for rank in range(num_ranks)]
    return by_hand(partitions, chunk_size, total, AttentionCost(1e-9, 0.0, (Level(8, draw(st.sampled_from((1e-9, 1e-7))), 0.0),)))


def buffer_rows(exchange, rank: int, stage: int) -> np.ndarray:
    """The global rows in a rank's receive buffer, as its sources send them."""
    dispatch, rows = exchange.dispatch, []
    for source in range(dispatch.num_ranks):
        local = dispatch.position_ids(source)
        sender, receiver = exchange.ranks[source].stages[stage], exchange.ranks[rank].stages[stage]
        sent = [local[start:end] for start, end in sender.send[rank]]
        piece = np.concatenate([np.zeros(0, int), *sent])
        assert (np.diff(piece) > 0).all()
        assert len(piece) == receiver.receive_splits[source] == sender.send_splits[rank]
        rows.append(piece)
    assert len(exchange.ranks[rank].stages[stage].send[rank]) == 0
    return np.concatenate(rows)


def computed_cells(exchange) -> np.ndarray:
    """How often every cell of the padded square is computed over all ranks and stages."""
    dispatch = exchange.dispatch
    count = np.zeros((dispatch.padded_seqlen, dispatch.padded_seqlen), int)
    for rank, plan in enumerate(exchange.ranks):
        local = dispatch.position_ids(rank)
        assert plan.rows == len(local) and len(plan.stages) == exchange.degree
        parts = [(plan.host, local)] + [(stage.bands, buffer_rows(exchange, rank, index)) for index, stage in enumerate(plan.stages)]
        for bands, columns in parts:
            for band in bands:
                assert band == band.tight() and band.q_end <= len(local) and band.k_end <= len(columns)
                apart = np.arange(band.k_start, band.k_end) - np.arange(band.q_start, band.q_end)[:, None]
                inside = (band.lo <= apart) & (apart <= band.hi)
                count[np.ix_(local[band.q_start : band.q_end], columns[band.k_start : band.k_end])] += inside
    return count


def minimal_rows(mask, dispatch) -> np.ndarray:
    """Rows that each rank needs and does not host, from the dense mask: bool `[ranks, rows]`."""
    dense = mask.dense()
    rows = [local[local < mask.total_seqlen_q] for local in map(dispatch.position_ids, range(dispatch.num_ranks))]
    needed = np.array([dense[local].any(axis=0) for local in rows])
    for rank, local in enumerate(rows):
        needed[rank, local] = False
    return needed


def check(mask, exchange) -> None:
    """Every cell once, and exactly the minimal rows received, each once."""
    dispatch, total = exchange.dispatch, mask.total_seqlen_q
    count = computed_cells(exchange)
    assert (count[:total, :total] == mask.dense()).all() and count.sum() == mask.area
    needed = minimal_rows(mask, dispatch)
    assert exchange.received_rows == tuple(needed.sum(axis=1))
    assert sum(exchange.sent_rows) == sum(exchange.received_rows)
    for rank, plan in enumerate(exchange.ranks):
        received = np.concatenate([np.zeros(0, int)] + [buffer_rows(exchange, rank, stage) for stage in range(exchange.degree)])
        assert np.sort(received).tolist() == np.flatnonzero(needed[rank]).tolist()
        assert exchange.sent_rows[rank] == sum(sum(stage.send_splits) for stage in plan.stages)


@given(any_mask, st.integers(1, 8), st.one_of(st.none(), st.integers(1, 9)), degrees, st.booleans())
@settings(deadline=None, max_examples=200)
def test_every_cell_once_and_no_row_too_many(mask, num_ranks, chunk_size, degree, uneven):
    check(mask, plan_exchange(mask, plan_dispatch(mask, num_ranks, chunk_size, uneven=uneven), degree))


@given(any_mask, degrees, st.data())
@settings(deadline=None, max_examples=200)
def test_any_dispatch_will_do(mask, degree, data):
    check(mask, plan_exchange(mask, data.draw(random_dispatches(mask.total_seqlen_q)), degree))


@given(slice_masks(), st.integers(1, 6), degrees, st.data())
@settings(deadline=None)
def test_a_new_mask_on_an_old_dispatch(mask, num_ranks, degree, data):
    total = mask.total_seqlen_q
    dispatch = plan_dispatch(mask, num_ranks, data.draw(st.integers(1, 6)))
    other = masks.sliding_window([0, total], data.draw(st.integers(0, 9)), data.draw(st.integers(-1, 9)))
    check(other, plan_exchange(other, dispatch, degree))


def test_the_example_of_two_ranks():
    mask = masks.packed([0, 16])
    exchange = plan_exchange(mask, by_hand([(0, 3), (1, 2)], 4, 16))
    assert exchange.received_rows == (8, 4) and exchange.sent_rows == (4, 8)
    first, second = exchange.ranks
    assert first.stages[0].send == ((), ((0, 4),)) and second.stages[0].send == (((0, 8),), ())
    assert first.stages[0].receive_splits == (0, 8) and second.stages[0].receive_splits == (4, 0)
    assert first.host == (band_of((0, 8), (0, 8), 1),)
    assert first.stages[0].bands == (band_of((4, 8), (0, 8), 0),)
    assert second.stages[0].bands == (band_of((0, 8), (0, 4), 0),)
    assert second.host == (band_of((0, 8), (0, 8), 1),)


def test_bands_that_lie_side_by_side_in_the_buffer_are_one():
    exchange = plan_exchange(masks.packed([0, 64], causal=False), by_hand([range(r, 16, 4) for r in range(4)], 4, 64))
    for plan in exchange.ranks:
        assert plan.host == (band_of((0, 16), (0, 16), 0),)
        assert plan.stages[0].bands == (band_of((0, 16), (0, 48), 0),)


def test_a_window_over_two_sources_in_sequence_is_not_cut_between_them():
    mask = masks.sliding_window([0, 16], 8)
    exchange = plan_exchange(mask, by_hand([(0,), (1,), (2,), (3,)], 4, 16))
    assert len(exchange.ranks[2].stages[0].bands) == 1
    assert exchange.ranks[2].stages[0].receive_splits == (4, 4, 0, 0)


@pytest.mark.parametrize("num_ranks, mask", [(1, masks.packed([0, 40])), (4, masks.packed(list(range(0, 65, 16))))])
def test_without_travelling_rows_there_are_no_stages(num_ranks, mask):
    for degree in (0, 1, 3, "auto"):
        exchange = plan_exchange(mask, plan_dispatch(mask, num_ranks, 4), degree)
        assert exchange.degree == 0 and all(plan.stages == () for plan in exchange.ranks)
        check(mask, exchange)


def test_ranks_without_rows_take_part_in_every_stage():
    mask = masks.packed([0, 32, 40])
    exchange = plan_exchange(mask, by_hand([(0,), (1,), (2,), (3,), (4,)], 8, 40), 3)
    assert exchange.received_rows == (0, 8, 16, 24, 0)
    assert [len(plan.stages) for plan in exchange.ranks] == [3] * 5
    assert exchange.ranks[4].stages == tuple(exchange.ranks[4].stages[:1]) * 3 == (exchange.ranks[4].stages[0],) * 3
    check(mask, exchange)


@given(st.integers(1, 7), st.integers(2, 6))
@settings(deadline=None)
def test_stages_of_a_full_mask_are_even_in_rows(degree, num_ranks):
    mask = masks.packed([0, num_ranks * 24], causal=False)
    exchange = plan_exchange(mask, plan_dispatch(mask, num_ranks, 8), degree)
    for plan in exchange.ranks:
        rows = [sum(stage.receive_splits) for stage in plan.stages]
        assert max(rows) - min(rows) <= 2


@pytest.mark.parametrize("mask", [masks.packed([0, 4096]), masks.sliding_window([0, 4096], 1500), masks.packed([0, 700, 2900, 4096])])
@pytest.mark.parametrize("degree", [2, 4])
def test_stages_are_even_in_predicted_time(mask, degree):
    exchange = plan_exchange(mask, plan_dispatch(mask, 4, 128), degree)
    per_row = exchange.dispatch.cost.cells_per_row(4)
    for plan in exchange.ranks:
        weights = [sum(band.area for band in stage.bands) + per_row * sum(stage.receive_splits) for stage in plan.stages]
        mean = sum(weights) / degree
        # within the range where a cut falls, the cells are taken to be spread evenly: at most a chunk's worth is misplaced at each end
        assert max(abs(weight - mean) for weight in weights) <= 128 * max(exchange.dispatch.rows(0), 1)


def test_stages_take_rows_in_global_order():
    mask = masks.packed([0, 256], causal=False)
    exchange = plan_exchange(mask, plan_dispatch(mask, 4, 16), 3)
    for rank in range(4):
        rows = [buffer_rows(exchange, rank, stage) for stage in range(3)]
        assert all(one.max() < other.min() for one, other in itertools.pairwise(rows))


def plan_with(row_s: float, launch_s: float) -> int:
    """The automatic degree of a full mask when a row takes `row_s` and a stage `launch_s`; a cell takes 1 ns."""
    mask = masks.packed([0, 4096], causal=False)
    cost = AttentionCost(1e-9, launch_s, (Level(8, row_s, 0.0),))
    return plan_exchange(mask, by_hand([range(r, 32, 4) for r in range(4)], 128, 4096, cost), "auto").degree


def test_the_automatic_degree_follows_the_cost_model():
    area_s = 4096 * 1024 * 1e-9  # of a rank; a quarter of it is hosted
    rows = 3072
    assert plan_with(0.1 * area_s / rows, 0.0) == 1  # all rows are there before the host part is done
    assert plan_with(area_s / rows, 0.0) == stages.MOST_STAGES
    assert plan_with(area_s / rows, area_s) == 1  # stages cost more than they hide
    assert plan_with(0.45 * area_s / rows, 1e-9) in (2, 3)


@given(any_mask, st.integers(2, 6), st.integers(1, 6))
@settings(deadline=None)
def test_areas_of_ranges_are_the_cells_in_their_columns(mask, num_ranks, chunk_size):
    dispatch = plan_dispatch(mask, num_ranks, chunk_size)
    transfers = plan_exchange(mask, dispatch).transfers
    order = np.lexsort((transfers.start, transfers.target))
    target, start, end = transfers.target[order], transfers.start[order], transfers.end[order]
    dense = mask.dense()
    expected = []
    for rank, first, last in zip(target, start, end, strict=True):
        rows = dispatch.position_ids(int(rank))
        expected.append(dense[rows[rows < mask.total_seqlen_q], first:last].sum())
    assert stages.range_areas(mask, dispatch, target, start, end).tolist() == expected


def test_plans_are_made_when_asked_for_and_kept(monkeypatch):
    made = []
    plain = tables.cut
    monkeypatch.setattr(tables, "cut", lambda table, axis, *ranges: made.append(axis) or plain(table, axis, *ranges))
    mask = masks.packed([0, 512])
    dispatch = plan_dispatch(mask, 8, 16)
    made.clear()
    exchange = plan_exchange(mask, dispatch)
    listed = len(made)
    assert exchange.ranks[3] is exchange.ranks[3] and exchange.ranks[-1] is exchange.ranks[7]
    assert len(exchange.ranks) == 8 and listed == 1 and len(made) <= listed + 2 * 3
    with pytest.raises(IndexError):
        exchange.ranks[8]


@pytest.mark.parametrize("degree", [-1, "most", 1.5])
def test_impossible_degrees_end_in_one_sentence(degree):
    mask = masks.packed([0, 64])
    with pytest.raises(UserError, match="overlap degree .* is impossible: give a number of stages"):
        plan_exchange(mask, plan_dispatch(mask, 2), degree)


@pytest.mark.parametrize("mask", [masks.packed([0, 63]), AttnMask([(0, 4)], [(0, 6)], ["full"], (64, 66))])
def test_a_mask_of_other_rows_ends_in_one_sentence(mask):
    with pytest.raises(UserError, match="the dispatch 64: plan the exchange with a mask of the rows"):
        plan_exchange(mask, plan_dispatch(masks.packed([0, 64]), 2))
