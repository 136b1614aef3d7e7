"""Placements: every reshard path, carried out on simulated ranks, moves values and gradients where the layouts say, at the least cost."""

from __future__ import annotations

import itertools
from math import prod
from zlib import crc32

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from seqloom.plan.placement import B, Layout, Move, P, Placement, R, S, cached_moves, divides, local_shape, reshard_path

Ranks = dict[tuple[int, ...], np.ndarray]  # coordinates in the mesh -> the piece that this rank holds


# --- simulated ranks: what a layout means -------------------------------------------------------------------------------------------


def coordinates(sizes: tuple[int, ...]) -> list[tuple[int, ...]]:
    """All ranks of a mesh, in mesh order (the last axis is the innermost)."""
    return list(itertools.product(*map(range, sizes)))


def cut(whole: np.ndarray, layout: Layout, sizes: tuple[int, ...], at: tuple[int, ...]) -> np.ndarray:
    """The slice of `whole` that a rank's splits leave it; the earlier axis is the outer one."""
    for placement, size, place in zip(layout, sizes, at, strict=True):
        if placement.kind == "S":
            whole = np.split(whole, size, axis=placement.dim)[place]
    return whole


def spread(whole: np.ndarray, layout: Layout, sizes: tuple[int, ...], summed: str, rng: np.random.Generator) -> Ranks:
    """Pieces of `whole`: along axes whose kind is `summed` the ranks hold random parts of the sum, along the others equal copies."""
    over = [a for a, p in enumerate(layout) if p.kind == summed]
    parts: dict[tuple[int, ...], np.ndarray] = {}
    groups = list(itertools.product(*(range(sizes[a]) for a in over)))
    left = whole
    for group in groups[:-1]:
        parts[group] = rng.integers(-9, 9, whole.shape) * 12  # every part divides by the groups that B -> R divides by
        left = left - parts[group]
    parts[groups[-1]] = left
    return {at: cut(parts[tuple(at[a] for a in over)], layout, sizes, at) for at in coordinates(sizes)}


def collect(pieces: Ranks, layout: Layout, sizes: tuple[int, ...], summed: str) -> np.ndarray:
    """The whole that pieces in a layout stand for; fails where copies are not equal."""
    held = dict(pieces)
    for axis in reversed(range(len(sizes))):
        joined: Ranks = {}
        for outer in {at[:axis] for at in held}:
            row = [held[(*outer, place)] for place in range(sizes[axis])]
            if layout[axis].kind == "S":
                joined[outer] = np.concatenate(row, axis=layout[axis].dim)
            elif layout[axis].kind == summed:
                joined[outer] = sum(row)
            else:
                assert all(np.array_equal(piece, row[0]) for piece in row), f"copies differ on axis {axis} of {layout}"
                joined[outer] = row[0]
        held = joined
    return held[()]


# --- simulated collectives: what a move does (the table of docs/architecture.md) -----------------------------------------------------


def groups_of(sizes: tuple[int, ...], axes: tuple[int, ...]) -> list[list[tuple[int, ...]]]:
    """The flattened groups over some axes, members in mesh order."""
    found: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for at in coordinates(sizes):
        found.setdefault(tuple(c for a, c in enumerate(at) if a not in axes), []).append(at)
    return list(found.values())


def all_gather(row, dim):
    return [np.concatenate(row, axis=dim)] * len(row)


def all_reduce(row):
    return [sum(row)] * len(row)


def shard(row, dim):
    return [np.split(piece, len(row), axis=dim)[i] for i, piece in enumerate(row)]


def reduce_scatter(row, dim):
    return shard(all_reduce(row), dim)


def all_to_all(row, split_dim, concat_dim):
    cuts = [np.split(piece, len(row), axis=split_dim) for piece in row]
    return [np.concatenate([piece[i] for piece in cuts], axis=concat_dim) for i in range(len(row))]


def pad(row, dim):
    found = []
    for i, piece in enumerate(row):
        blank = np.zeros_like(piece)
        found.append(np.concatenate([piece if j == i else blank for j in range(len(row))], axis=dim))
    return found


def divide(row):
    assert all(np.all(piece % len(row) == 0) for piece in row)
    return [piece // len(row) for piece in row]


def same(row):
    return row


FORWARD = {
    "SR": lambda row, i, j: all_gather(row, i),
    "SB": lambda row, i, j: all_gather(row, i),
    "SS": lambda row, i, j: all_to_all(row, j, i),
    "PR": lambda row, i, j: all_reduce(row),
    "PB": lambda row, i, j: all_reduce(row),
    "PS": lambda row, i, j: reduce_scatter(row, j),
    "RS": lambda row, i, j: shard(row, j),
    "BS": lambda row, i, j: shard(row, j),
    "RB": lambda row, i, j: same(row),
    "BR": lambda row, i, j: same(row),
}
BACKWARD = {
    "SR": lambda row, i, j: shard(row, i),
    "SB": lambda row, i, j: reduce_scatter(row, i),
    "SS": lambda row, i, j: all_to_all(row, i, j),
    "PR": lambda row, i, j: same(row),
    "PB": lambda row, i, j: all_reduce(row),
    "PS": lambda row, i, j: all_gather(row, j),
    "RS": lambda row, i, j: all_gather(row, j),
    "BS": lambda row, i, j: pad(row, j),
    "RB": lambda row, i, j: all_reduce(row),
    "BR": lambda row, i, j: divide(row),
}


def carry(pieces: Ranks, move: Move, sizes: tuple[int, ...], table: dict) -> Ranks:
    """One move as its collective on every flattened group of its axes."""
    done: Ranks = {}
    run = table[move.src.kind + move.dst.kind]
    for group in groups_of(sizes, move.axes):
        done.update(zip(group, run([pieces[at] for at in group], move.src.dim, move.dst.dim), strict=True))
    return done


# --- layouts and meshes --------------------------------------------------------------------------------------------------------------

SHAPE = (24, 48, 12)
KINDS: list[Placement] = [R, B, P, *(S(d) for d in range(len(SHAPE)))]
meshes = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)


def random_cost(seed: int):
    """A positive cost for every (layout, move), the same each time it is asked."""

    def cost(shape, layout, move):
        return 0.1 + crc32(repr((seed, layout, move)).encode()) / 2**32 * 5

    return cost


@st.composite
def layouts(draw, sizes, kinds=tuple(KINDS)):
    layout = tuple(draw(st.sampled_from(kinds)) for _ in sizes)
    assume(divides(SHAPE, layout, sizes))
    return layout


@st.composite
def journeys(draw):
    """A mesh and two layouts; an axis of one rank lies the same in both but for P, which cannot be made."""
    sizes = draw(meshes)
    src = draw(layouts(sizes))
    dst = draw(layouts(sizes, tuple(k for k in KINDS if k != P)))
    return sizes, src, dst


# --- every path gives the target -----------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(journeys(), st.integers(0, 2**16))
def test_a_path_carries_values_and_gradients_from_layout_to_layout(journey, seed):
    sizes, src, dst = journey
    rng = np.random.default_rng(seed)
    found = reshard_path(SHAPE, src, dst, sizes, random_cost(seed))
    assert found is not None, "only a partial sum cannot be made"
    moves = found[1]
    whole = rng.integers(-99, 99, SHAPE)
    pieces, layout = spread(whole, src, sizes, "P", rng), src
    for move in moves:
        assert all(layout[a] == move.src for a in move.axes)
        pieces, layout = carry(pieces, move, sizes, FORWARD), move.layout
        assert np.array_equal(collect(pieces, layout, sizes, "P"), whole), f"{move} lost values"
        assert all(pieces[at].shape == local_shape(SHAPE, layout, sizes) for at in pieces)
    assert layout == dst
    gradient = rng.integers(-9, 9, SHAPE) * 12**3
    back = spread(gradient, dst, sizes, "B", rng)
    for move, before in reversed(list(zip(moves, (src, *(m.layout for m in moves)), strict=False))):
        back = carry(back, move, sizes, BACKWARD)
        assert np.array_equal(collect(back, before, sizes, "B"), gradient), f"{move} lost gradients"


@pytest.mark.parametrize("sizes", [(1,), (4,), (2, 3), (3, 1), (2, 2, 2)])
def test_every_pair_of_layouts_has_a_path_except_to_partial(sizes):
    kinds = [R, B, P, S(0), S(1)] if len(sizes) < 3 else [R, P, S(0)]
    every = [layout for layout in itertools.product(kinds, repeat=len(sizes)) if divides(SHAPE, layout, sizes)]
    for src, dst in itertools.product(every, every):
        made = any(d == P and s != P for s, d in zip(src, dst, strict=True))
        found = reshard_path(SHAPE, src, dst, sizes, lambda *_: 1.0)
        assert (found is None) == made, (src, dst)
        if found is not None:
            assert found[0] == len(found[1])


def test_two_axes_that_make_the_same_move_go_together():
    cost = lambda shape, layout, move: 1.0  # noqa: E731
    assert [m.axes for m in reshard_path(SHAPE, (S(1), S(1)), (S(0), S(0)), (2, 2), cost)[1]] == [(0, 1)]
    assert [m.axes for m in reshard_path(SHAPE, (P, P), (R, R), (2, 2), cost)[1]] == [(0, 1)]
    assert [m.axes for m in reshard_path(SHAPE, (P, R, P), (S(1), R, S(1)), (2, 2, 2), cost)[1]] == [(0, 2)]


def test_an_outer_axis_waits_for_the_inner_one():
    """Axis 0 may not leave a dimension that axis 1 splits inside it: the pieces would be out of order."""
    moves = cached_moves(SHAPE, (2, 2), (S(0), S(0)), (0, 1))
    assert {m.axes for m in moves} == {(1,), (0, 1)}
    assert not [m for m in cached_moves(SHAPE, (2, 2), (R, S(0)), (0,)) if m.axes == (0,) and m.dst == S(0)]


# --- the cost is the least -----------------------------------------------------------------------------------------------------------


def brute_force(src: Layout, dst: Layout, sizes: tuple[int, ...], cost) -> float:
    """Bellman-Ford over every layout: relax all moves until nothing changes."""
    dims = tuple(sorted({p.dim for p in (*src, *dst) if p.kind == "S"}))
    best = {src: 0.0}
    changed = True
    while changed:
        changed = False
        for layout in list(best):
            for move in cached_moves(SHAPE, sizes, layout, dims):
                spent = best[layout] + cost(SHAPE, layout, move)
                if spent < best.get(move.layout, np.inf) - 1e-12:
                    best[move.layout], changed = spent, True
    return best[dst]


@settings(max_examples=120, deadline=None)
@given(journeys(), st.integers(0, 2**16))
@example(((1, 1), (S(2), P), (B, S(1))), 12268)  # six moves are the cheapest
def test_the_cost_is_that_of_the_shortest_path(journey, seed):
    sizes, src, dst = journey
    memo: dict = {}
    drawn = random_cost(seed)

    def cost(shape, layout, move):
        if (layout, move) not in memo:
            memo[layout, move] = drawn(shape, layout, move)
        return memo[layout, move]

    spent, moves = reshard_path(SHAPE, src, dst, sizes, cost)
    layouts_before = (src, *(m.layout for m in moves))
    assert spent == pytest.approx(sum(cost(SHAPE, before, m) for before, m in zip(layouts_before, moves, strict=False)))
    assert spent == pytest.approx(brute_force(src, dst, sizes, cost))


# --- shapes and words ----------------------------------------------------------------------------------------------------------------


@given(meshes, st.data())
def test_local_shapes_multiply_back_and_agree_with_divides(sizes, data):
    shape = tuple(data.draw(st.lists(st.integers(1, 24), min_size=2, max_size=3)))
    layout = tuple(data.draw(st.sampled_from([R, B, P, S(0), S(1)])) for _ in sizes)
    if not divides(shape, layout, sizes):
        with pytest.raises(ValueError, match="does not divide by"):
            local_shape(shape, layout, sizes)
        return
    pieces = prod(size for size, p in zip(sizes, layout, strict=True) if p.kind == "S")
    assert prod(local_shape(shape, layout, sizes)) * pieces == prod(shape)


def test_words():
    assert [str(p) for p in (R, B, P, S(3))] == ["R", "B", "P", "S(3)"]
    assert reshard_path(SHAPE, (R, S(1)), (R, S(1)), (2, 2), lambda *_: 1.0) == (0.0, ())
