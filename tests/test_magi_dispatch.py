"""Dispatch: chunks once each, balance and rows beside the area-only rule, the objective by hand, and the sentences for bad input."""

import dataclasses
import itertools
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from magi_samples import any_mask, slice_cells

from seqloom.cost.hardware import load_hardware
from seqloom.errors import UserError
from seqloom.magi import masks
from seqloom.magi.assign import area_only, contiguous, folded
from seqloom.magi.bands import TYPE_NAMES
from seqloom.magi.chunks import chunks_of
from seqloom.magi.dispatch import default_chunk_size, plan_dispatch
from seqloom.magi.exchange import plan_exchange
from seqloom.magi.mask import AttnMask
from seqloom.magi.objective import AttentionCost, Level, attention_cost

H100 = load_hardware("h100-80gb")
DOCUMENTS = (4096, 1024, 4096, 512, 2560, 1024, 3072)
PACKED_16K = masks.packed([0, *itertools.accumulate(DOCUMENTS)])
CAUSAL_16K = masks.packed([0, 16384])
WINDOW_4K = masks.sliding_window([0, 4096], 512)


def with_links(scale: float, latency_s: float = 0.0):
    """An H100 whose links are `scale` times as fast, with `latency_s`."""
    links = tuple(dataclasses.replace(k, bandwidth_bytes_per_s=k.bandwidth_bytes_per_s * scale, latency_s=latency_s) for k in H100.links)
    return dataclasses.replace(H100, links=links)


def brute_rows(mask, dispatch) -> np.ndarray:
    """Rows that travel to a rank (first index) from another, counted in the dense mask."""
    dense, ranks = mask.dense(), range(dispatch.num_ranks)
    hosted = [rows[rows < mask.total_seqlen_q] for rows in map(dispatch.position_ids, ranks)]
    rows = np.array([[dense[hosted[target]].any(axis=0)[hosted[source]].sum() for source in ranks] for target in ranks])
    np.fill_diagonal(rows, 0)
    return rows


@given(any_mask, st.integers(1, 8), st.one_of(st.none(), st.integers(1, 9)), st.booleans(), st.sampled_from(("auto", "area")))
@settings(deadline=None, max_examples=200)
def test_every_row_is_hosted_once_and_every_cell_is_counted_once(mask, num_ranks, chunk_size, uneven, algorithm):
    dispatch = plan_dispatch(mask, num_ranks, chunk_size, algorithm, uneven=uneven)
    total, size = mask.total_seqlen_q, dispatch.chunk_size
    rows = [dispatch.position_ids(rank) for rank in range(num_ranks)]
    assert np.sort(np.concatenate(rows)).tolist() == list(range(dispatch.padded_seqlen))
    assert dispatch.num_ranks == num_ranks and total <= dispatch.padded_seqlen and dispatch.total_seqlen == total
    counts = [len(chunks) for chunks in dispatch.partitions]
    if uneven:
        assert max(counts) - min(counts) <= 1 and dispatch.padded_seqlen == -(-total // size) * size
    else:
        assert len(set(counts)) == 1 and dispatch.padded_seqlen == -(-total // (size * num_ranks)) * size * num_ranks
    dense = mask.dense()
    for rank, local in enumerate(rows):
        assert dispatch.partitions[rank] == tuple(sorted(dispatch.partitions[rank]))
        assert len(local) == dispatch.rows(rank)
        assert dispatch.areas[rank] == dense[local[local < total]].sum()
        assert local.tolist() == [row for start, end in dispatch.ranges(rank) for row in range(start, end)]
        assert all(end < start for (_, end), (start, _) in itertools.pairwise(dispatch.ranges(rank)))
        assert (dispatch.owners[local // size] == rank).all()


@given(any_mask, st.integers(1, 8), st.integers(1, 9), st.booleans(), st.sampled_from((0.001, 0.1, 1.0, 100.0)))
@settings(deadline=None, max_examples=200)
def test_the_prediction_is_the_objective_and_never_worse_than_the_area_only_rule(mask, num_ranks, chunk_size, uneven, speed):
    auto, area = (plan_dispatch(mask, num_ranks, chunk_size, name, with_links(speed), uneven=uneven) for name in ("auto", "area"))
    assert auto.predicted_s <= area.predicted_s
    for dispatch in (auto, area):
        rows = brute_rows(mask, dispatch)
        assert (plan_exchange(mask, dispatch).moved == rows).all()
        assert dispatch.predicted_s == dispatch.cost.step_seconds(np.array(dispatch.areas), rows)


@given(any_mask, st.integers(1, 8), st.integers(1, 9))
@settings(deadline=None)
def test_the_order_in_which_slices_are_given_makes_no_difference(mask, num_ranks, chunk_size):
    other = AttnMask(mask.q_ranges[::-1], mask.k_ranges[::-1], mask.attn_types[::-1], mask.total_seqlen)
    assert plan_dispatch(mask, num_ranks, chunk_size) == plan_dispatch(other, num_ranks, chunk_size)


def test_other_processes_find_the_same_dispatch():
    code = (
        "from seqloom.magi.masks import packed; from seqloom.magi.dispatch import plan_dispatch; "
        f"print(plan_dispatch(packed([0, {', '.join(map(str, itertools.accumulate(DOCUMENTS)))}]), 8, 256).partitions)"
    )
    found = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in range(2)}
    assert found == {f"{plan_dispatch(PACKED_16K, 8, 256).partitions}\n"}


def test_dispatches_are_values():
    one, other = plan_dispatch(PACKED_16K, 8, 256), plan_dispatch(PACKED_16K, 8, 256)
    assert one == other and hash(one) == hash(other) and one is not other
    assert one != plan_dispatch(PACKED_16K, 8, 256, "area")


@pytest.mark.parametrize(
    "mask, chunk_size, balance, share",
    [
        (PACKED_16K, 256, 1.02, 0.33),
        (WINDOW_4K, 64, 1.07, 0.13),
        (masks.sliding_window([0, 4096], 511), 64, 1.07, 0.13),
        (CAUSAL_16K, 256, 1.001, 0.94),
    ],
)
def test_balance_and_rows_at_eight_ranks(mask, chunk_size, balance, share):
    dispatch = plan_dispatch(mask, 8, chunk_size)
    assert dispatch.balance <= balance
    assert plan_exchange(mask, dispatch).share_of_all_gather <= share


@pytest.mark.parametrize(
    "mask, chunk_size, balance, share", [(PACKED_16K, 256, 1.0102, 0.49), (WINDOW_4K, 64, 1.0583, 0.91), (CAUSAL_16K, 256, 1.0, 0.93)]
)
def test_the_area_only_rule_moves_more(mask, chunk_size, balance, share):
    dispatch = plan_dispatch(mask, 8, chunk_size, "area")
    assert dispatch.balance == pytest.approx(balance, abs=1e-3)
    assert share <= plan_exchange(mask, dispatch).share_of_all_gather <= share + 0.02


@given(st.lists(st.integers(0, 50), min_size=1, max_size=30), st.integers(1, 6), st.booleans())
def test_the_area_only_rule_is_greedy_by_falling_area(areas, num_ranks, uneven):
    count = -(-len(areas) // num_ranks) * num_ranks
    chunks = dataclasses.replace(
        chunks_of(masks.packed([0, len(areas)]), 1, num_ranks, uneven), areas=np.array(areas + [0] * (count - len(areas)))
    )
    room, extra = len(areas) // num_ranks if uneven else count // num_ranks, len(areas) % num_ranks if uneven else 0
    held, loads, expected = [0] * num_ranks, [0] * num_ranks, {}
    for chunk in sorted(range(chunks.kept), key=lambda chunk: -chunks.areas[chunk]):
        free = [rank for rank in range(num_ranks) if held[rank] < room or (held[rank] == room and extra)]
        rank = min(free, key=lambda rank: loads[rank])
        extra -= held[rank] == room
        held[rank] += 1
        loads[rank] += int(chunks.areas[chunk])
        expected[chunk] = rank
    owners = area_only(chunks)
    assert {chunk: int(owners[chunk]) for chunk in expected} == expected
    assert (np.bincount(owners, minlength=num_ranks) == count // num_ranks).all()


def test_contiguous_and_folded_starts():
    chunks = chunks_of(masks.packed([0, 12]), 1, 3, False)
    assert contiguous(chunks).tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
    assert folded(chunks).tolist() == [0, 0, 1, 1, 2, 2, 2, 2, 1, 1, 0, 0]
    chunks = chunks_of(masks.packed([0, 10]), 1, 3, True)
    assert contiguous(chunks).tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 1, 2]
    assert folded(chunks).tolist() == [0, 0, 1, 2, 2, 2, 1, 1, 0, 0, 1, 2]


def random_slices(random: np.random.Generator) -> AttnMask:
    """A mask of up to six random slices over 12 to 40 rows."""
    total = int(random.integers(12, 41))
    taken, slices = np.zeros((total, total), bool), []
    while len(slices) < 2:
        for _ in range(6):
            q_range, k_range = (tuple(np.sort(random.integers(0, total + 1, 2)).tolist()) for _ in range(2))
            piece = (q_range, k_range, str(random.choice(TYPE_NAMES)))
            cells = slice_cells(*piece, taken.shape)
            if cells.any() and not (cells & taken).any():
                taken |= cells
                slices.append(piece)
    return AttnMask(*zip(*slices, strict=True), total)


@pytest.mark.parametrize("speed", [0.01, 1.0])
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_small_problems_come_close_to_the_best_assignment_there_is(num_ranks, speed):
    random, ratios = np.random.default_rng(0), []
    owners = [
        np.array(each) for each in sorted(set(itertools.permutations([rank for rank in range(num_ranks) for _ in range(6 // num_ranks)])))
    ]
    for _ in range(40):
        mask = random_slices(random)
        dispatch = plan_dispatch(mask, num_ranks, -(-mask.total_seqlen_q // 6), hardware=with_links(speed))
        chunks = chunks_of(mask, dispatch.chunk_size, num_ranks, False)
        best = min(dispatch.cost.step_seconds(chunks.loads(each), chunks.rows_moved(each)) for each in owners)
        assert chunks.count == 6 and dispatch.predicted_s >= best
        ratios.append(dispatch.predicted_s / best)
    assert np.mean(ratios) <= 1.1 and np.median(ratios) <= 1.02


def test_slower_links_move_fewer_rows():
    moved = [
        sum(plan_exchange(CAUSAL_16K, plan_dispatch(CAUSAL_16K, 8, 256, hardware=with_links(speed))).received_rows) for speed in (10, 0.02)
    ]
    assert moved[1] < moved[0]


def test_search_finds_documents_that_fit_on_ranks():
    mask = masks.packed(list(range(0, 8 * 512 + 1, 512)))
    dispatch = plan_dispatch(mask, 8, 64)
    assert dispatch.balance == 1.0 and plan_exchange(mask, dispatch).received_rows == (0,) * 8


def test_default_chunks():
    assert default_chunk_size(131072, 8) == 2048
    assert default_chunk_size(11021, 8) == 128
    assert default_chunk_size(997, 8) == 16
    assert default_chunk_size(1, 8) == 1
    assert plan_dispatch(masks.packed([0, 11021]), 8).padded_seqlen == 11264


def test_the_cost_of_cells_and_rows_by_hand():
    cost = attention_cost(H100, 8, num_heads_q=32, num_heads_kv=8, head_dim=128, dtype_bytes=2)
    assert cost.cell_s == pytest.approx(32 * 128 * (4 / 600e12 + 10 / 515e12), rel=1e-3)
    assert cost.levels[0].row_s == pytest.approx(3 * 2 * 8 * 128 * 2 / 3.4e11)
    assert cost.levels[0].latency_s == pytest.approx(15e-6)
    assert cost.cells_per_row(8) == round(cost.levels[0].row_s / cost.cell_s)
    assert cost.cells_per_row(16) == round(cost.levels[1].row_s / cost.cell_s)


def test_the_slowest_of_links_and_directions_decides():
    cost = AttentionCost(cell_s=1.0, launch_s=0.0, levels=(Level(2, 1.0, 100.0), Level(4, 10.0, 1000.0)))
    rows = np.zeros((4, 4), int)
    rows[1, 0], rows[2, 0] = 50, 3  # from rank 0: 50 rows to its neighbour, 3 over the outer link
    assert cost.latency_seconds(rows).tolist() == [1100.0, 100.0, 1000.0, 0.0]
    assert cost.exchange_seconds(rows).tolist() == [1150.0, 150.0, 1030.0, 0.0]
    assert cost.step_seconds(np.array([7, 7, 2000, 7]), rows) == 2000.0


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ({"num_ranks": 0}, "a dispatch over 0 ranks"),
        ({"chunk_size": 0}, "in chunks of 0 rows is impossible"),
        ({"algorithm": "best"}, "algorithm 'best' is unknown: use one of auto, area"),
        ({"hardware": "h1000"}, "hardware `h1000` is neither"),
        ({"num_heads_q": 6, "num_heads_kv": 4}, "6 query heads do not divide over 4"),
        ({"dtype_bytes": 3}, "no peak for elements of 3 bytes"),
        ({"num_ranks": 10**6}, "joins 16384 ranks, not 1000000"),
    ],
)
def test_bad_input_ends_in_one_sentence(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        plan_dispatch(**{"mask": masks.packed([0, 64]), "num_ranks": 2, **arguments})


def test_queries_and_keys_must_be_the_same_rows():
    with pytest.raises(UserError, match="4 queries and 6 keys"):
        plan_dispatch(AttnMask([(0, 4)], [(0, 6)], ["full"], (4, 6)), 2)
