"""Modes of segments: what is replayed, what is kept, in which layers."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_samples import tiny

from seqloom.plan.modes import (
    KEEP,
    OFFLOAD,
    ORDER,
    RECOMPUTE,
    SELECTIVE,
    Mode,
    in_order,
    kept_matmuls,
    mode_of_layer,
    reached,
    replayed,
    replays,
    scaled,
    segment_modes,
)

COUNTS = st.dictionaries(
    st.sampled_from([KEEP, SELECTIVE, RECOMPUTE, Mode("recompute", 4), Mode("spill", 16), OFFLOAD]), st.integers(1, 40), min_size=1
)


@given(COUNTS)
def test_layers_run_their_modes_in_one_order(counts: dict[Mode, int]) -> None:
    ordered = in_order([*counts.items(), (Mode("recompute", 16), 0)])
    assert dict(ordered) == counts
    total = sum(counts.values())
    layers = [mode_of_layer(ordered, layer) for layer in range(total)]
    assert {mode: layers.count(mode) for mode in counts} == counts
    assert [kind for kind, _ in itertools.groupby(mode.kind for mode in layers)] == [k for k in ORDER if any(m.kind == k for m in counts)]
    with pytest.raises(IndexError):
        mode_of_layer(ordered, total)


@given(COUNTS, st.integers(1, 30))
@settings(deadline=None)
def test_scaling_keeps_the_number_of_layers_and_every_mode_that_has_room(counts: dict[Mode, int], layers: int) -> None:
    ordered = in_order([*counts.items()])
    fewer = scaled(ordered, layers)
    assert sum(n for _, n in fewer) == layers and all(n > 0 for _, n in fewer)
    assert [mode for mode, _ in fewer] == [mode for mode, _ in ordered][-layers:]
    assert scaled(ordered, sum(counts.values())) == ordered


def block() -> tuple:
    region = next(part for key, part in tiny("llama", 2).parts.items() if key)
    return region, {segment.name: index for index, segment in enumerate(region.segments)}


def names(region, indices) -> set[str]:
    return {region.parts[index].outputs[-1] for index in indices}


def test_a_replay_stops_at_the_last_matrix_product() -> None:
    """The last projection of a segment saves its operands before it computes: it is reached, but not run again."""
    region, segments = block()
    mlp = segments["mlp"]
    assert "down_proj" in names(region, reached(region, mlp)) - names(region, replayed(region, mlp))
    assert {"gate_proj", "up_proj"} <= names(region, replayed(region, mlp))
    assert names(region, kept_matmuls(region, mlp)) == {"gate_proj", "up_proj"}


def test_what_each_mode_runs_again() -> None:
    region, segments = block()
    mlp = segments["mlp"]
    span = region.segments[mlp]
    again = {
        mode: {i for i in range(span.start, span.stop) if replays(region, i, mode)}
        for mode in (KEEP, OFFLOAD, SELECTIVE, RECOMPUTE, Mode("spill"))
    }
    assert not again[KEEP] and not again[OFFLOAD]
    assert again[RECOMPUTE] == set(replayed(region, mlp))
    assert again[SELECTIVE] == again[RECOMPUTE] - set(kept_matmuls(region, mlp))
    assert again[Mode("spill")] == set(range(span.start, span.stop))


@pytest.mark.parametrize(
    ("recompute", "offload", "kinds"),
    [
        (None, True, {"keep", "selective", "recompute", "spill", "offload"}),
        (None, False, {"keep", "selective", "recompute"}),
        (False, False, {"keep"}),
        (False, True, {"keep", "offload"}),
        (True, True, {"recompute"}),
    ],
)
def test_modes_that_a_request_leaves(recompute: bool | None, offload: bool, kinds: set[str]) -> None:
    region, segments = block()
    modes = segment_modes(region, segments["mlp"], recompute, offload)
    assert {mode.kind for mode in modes} == kinds and len(set(modes)) == len(modes)
    assert any(mode.tiles > 1 for mode in modes) == (recompute is None), "an MLP may run in tiles of the sequence"
    assert "recompute" not in {mode.kind for mode in segment_modes(region, segments["attention"], True, False)}, (
        "attention is never replayed"
    )
