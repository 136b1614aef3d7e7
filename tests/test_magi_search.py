"""The search by swaps: what it knows incrementally equals what it would find anew, its predictions of swaps come true, costs only fall."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from magi_samples import any_mask

from seqloom.magi import search
from seqloom.magi.chunks import Chunks, chunks_of
from seqloom.magi.masks import packed

FIELDS = ("free_before", "own_rows", "compute", "exchange", "overload", "slots")


@st.composite
def problems(draw) -> tuple[Chunks, np.ndarray, int, int]:
    """Chunks of a random mask, random owners of equally many, cells per row, and a limit in cells."""
    mask = draw(any_mask)
    num_ranks = draw(st.integers(2, 5))
    chunks = chunks_of(mask, draw(st.integers(1, 6)), num_ranks, draw(st.booleans()))
    real = np.arange(chunks.count) % num_ranks
    shuffled = np.array(draw(st.permutations(real[: chunks.kept].tolist())), np.int64)
    owners = np.concatenate((shuffled, real[chunks.kept :]))
    return chunks, owners, draw(st.integers(1, 50)), draw(st.integers(0, mask.area))


def total_cost(state) -> int:
    return int((state.exchange + search.OVERLOAD * state.overload).sum())


@given(problems())
@settings(deadline=None, max_examples=200)
def test_received_rows_and_loads_are_those_of_the_assignment(problem):
    chunks, owners, cells_per_row, limit = problem
    state = search._State(chunks, owners, cells_per_row, limit)
    assert (state.compute == chunks.loads(owners)).all()
    assert (state.exchange == cells_per_row * chunks.rows_moved(owners).sum(axis=1)).all()
    assert (state.overload == np.maximum(np.maximum(state.compute, state.exchange) - limit, 0)).all()


@given(problems(), st.data())
@settings(deadline=None, max_examples=200)
def test_a_swap_changes_the_cost_as_predicted_and_the_state_as_anew(problem, data):
    chunks, owners, cells_per_row, limit = problem
    state = search._State(chunks, owners, cells_per_row, limit)
    one, other = (data.draw(st.integers(0, chunks.count - 1)) for _ in range(2))
    if owners[one] == owners[other]:
        return
    taken, given_ = (state.more_rows(np.array([out]), np.array([into]))[0, 0] for out, into in ((one, other), (other, one)))
    ranks = owners[[one, other]]
    predicted = sum(
        int(state.changes(ranks[[index]], np.array([out]), np.array([into]), np.array([rows]))[0])
        for index, out, into, rows in ((0, one, other, taken), (1, other, one, given_))
    )
    before = total_cost(state)
    state.swap([(one, other)])
    assert total_cost(state) - before == predicted
    anew = search._State(chunks, state.owners, cells_per_row, limit)
    assert all((getattr(state, field) == getattr(anew, field)).all() for field in FIELDS)


@given(problems())
@settings(deadline=None, max_examples=200)
def test_improving_never_raises_the_cost_and_keeps_the_counts(problem):
    chunks, owners, cells_per_row, limit = problem
    found = search.improve(chunks, owners, cells_per_row, limit)
    before, after = (total_cost(search._State(chunks, each, cells_per_row, limit)) for each in (owners, found))
    assert after <= before
    assert (np.bincount(found) == np.bincount(owners)).all()
    dropped = np.bincount(found[chunks.kept :], minlength=chunks.num_ranks)
    assert dropped.max() <= max(1, np.bincount(owners[chunks.kept :], minlength=chunks.num_ranks).max())


@given(problems())
@settings(deadline=None, max_examples=100)
def test_runs_of_atoms_are_the_needs(problem):
    chunks = problem[0]
    first_span, first, end = chunks.spans
    needs = np.zeros_like(chunks.needs)
    for chunk, (begin, stop) in enumerate(zip(first_span, [*first_span[1:], len(first)], strict=True)):
        assert begin < stop
        for span in range(begin, stop):
            needs[chunk, first[span] : end[span]] = True
    assert (needs == chunks.needs).all()
    assert (
        chunks.hosted.sum() == chunks.total_seqlen
        and (chunks.hosted[: chunks.total_seqlen // chunks.chunk_size] == chunks.chunk_size).all()
    )


def test_two_documents_that_are_mixed_up_are_sorted_out():
    chunks = chunks_of(packed([0, 8, 16]), 2, 2, False)
    mixed = np.array([0, 1, 0, 1, 0, 1, 0, 1])
    found = search.improve(chunks, mixed, 10, int(chunks.areas.sum()))
    assert chunks.rows_moved(found).sum() == 0
