"""Attention over ranks against dense attention, in fp64: output, log-sum-exp and every gradient, for every kind of mask."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from magi_dense import DIM, HEADS, KV_HEADS, attended, dense, difference, tensors
from procs import run_ranks
from torch import Tensor

from custom_ops import magi_attention as magi
from seqloom.errors import UserError
from seqloom.magi import masks
from seqloom.magi.mask import AttnMask

CU = (0, 40, 41, 90, 200)
MASKS: Mapping[str, AttnMask] = {
    "full": AttnMask(((0, 128),), ((0, 128),), (0,), 128),
    "causal": AttnMask(((0, 128),), ((0, 128),), (1,), 128),
    "packed causal": masks.packed(CU),
    "packed full": masks.packed(CU, causal=False),
    "window": masks.sliding_window(CU, 9),
    "window both ways": masks.sliding_window(CU, 5, 7),
    "window with sinks": masks.sliding_window(CU, 9, sinks=3),
    "global window": masks.global_window(CU, 6, 9, 4),
    "block causal": masks.block_causal(CU, 16),
    "shared question": masks.shared_question((0, 30, 70, 111)),
    "prefix": masks.prefix_lm(CU, (10, 1, 20, 110)),
    "uncovered rows": AttnMask(((10, 30), (50, 60)), ((0, 25), (64, 96)), (1, 2), 96),
    "a band": AttnMask(((5, 60),), ((20, 90),), (3,), 101),
}
# Totals that divide by nothing, over chunks that end where no document does.
CU_997 = (0, 100, 101, 463, 997)
LONG: Mapping[str, AttnMask] = {
    "causal 997": AttnMask(((0, 997),), ((0, 997),), (1,), 997),
    "shared question 997": masks.shared_question(CU_997),
    "prefix 997": masks.prefix_lm(CU_997, (40, 1, 200, 300)),
    "block causal 997": masks.block_causal(CU_997, 50),
    "uncovered rows 997": AttnMask(((13, 300), (501, 900)), ((0, 400), (600, 997)), (1, 2), 997),
    "window 997": masks.sliding_window(CU_997, 64, sinks=2),
}
ALL = {**MASKS, **LONG}
DEGREES = (0, 1, 2, "auto")
Case = tuple[str, bool, float, magi.DistAttnConfig, int | None]  # mask, sinks, soft cap, options, chunk size

CASES: list[Case] = [
    *((name, False, 0.0, magi.DistAttnConfig(degree=degree, uneven=index % 2 == 1), None) for index, (name, degree) in enumerate(
        itertools.product(MASKS, DEGREES))),
    *((name, name.startswith("uncovered"), 0.0, magi.DistAttnConfig(degree=degree, uneven=degree == 2), None)
        for name, degree in itertools.product(LONG, DEGREES)),
    *((name, True, 0.0, magi.DistAttnConfig(), 8) for name in ("causal", "window", "uncovered rows")),
    ("packed causal", True, 3.0, magi.DistAttnConfig(degree=3), 16),
    ("causal", False, 2.0, magi.DistAttnConfig(algorithm="area"), 8),
    ("packed causal", False, 0.0, magi.DistAttnConfig(kernel="reference"), 16),
    ("global window", False, 0.0, magi.DistAttnConfig(kernel="reference", degree=0), 16),
]  # fmt: skip
Found = dict[str, Tensor]


@pytest.fixture(scope="module")
def wanted() -> dict[tuple[str, bool, float], Found]:
    return {case: dense(ALL[case[0]], *case[1:]) for case in {case[:3] for case in CASES}}


def run_cases(rank: int, world_size: int, wanted: dict[tuple[str, bool, float], Found]) -> dict[int, dict[str, float]]:
    """The largest difference of every tensor of every case."""
    group = dist.group.WORLD if world_size > 1 else None
    found = {}
    for index, (name, *options) in enumerate(CASES):
        got = attended(ALL[name], group, *options)
        found[index] = {part: difference(got[part], x) for part, x in wanted[CASES[index][:3]].items()}
    return found


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_every_mask_gives_what_dense_attention_gives(wanted: dict[tuple[str, bool, float], Found], ranks: int) -> None:
    differences = run_ranks(run_cases, ranks, wanted, timeout=280)[0]
    bad = {(CASES[index], part): off for index, parts in differences.items() for part, off in parts.items() if not off < 1e-10}
    assert not bad
    assert len(differences) == len(CASES) and all(len(parts) >= 5 for parts in differences.values())


# --- a long total ----------------------------------------------------------------------------------------------------------------

LENGTH, ONE_HEAD = 11_021, (1, 1, 4)
CU_LONG = (0, 2_003, 2_004, 5_419, 8_363, LENGTH)
LONGEST: Mapping[str, tuple[AttnMask, bool, int]] = {  # mask, sinks, degree
    "causal": (AttnMask(((0, LENGTH),), ((0, LENGTH),), (1,), LENGTH), False, 1),
    "packed causal": (masks.packed(CU_LONG), True, 2),
}


def run_long(rank: int, world_size: int, wanted: dict[str, Found]) -> dict[str, dict[str, float]]:
    group = dist.group.WORLD if world_size > 1 else None
    found = {}
    for name, (mask, sinks, degree) in LONGEST.items():
        got = attended(mask, group, sinks, config=magi.DistAttnConfig(degree=degree), shape=ONE_HEAD)
        found[name] = {part: difference(got[part], x) for part, x in wanted[name].items()}
    return found


@pytest.fixture(scope="module")
def wanted_long() -> dict[str, Found]:
    return {name: dense(mask, sinks, shape=ONE_HEAD) for name, (mask, sinks, _) in LONGEST.items()}


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_a_total_of_11021_rows(wanted_long: dict[str, Found], ranks: int) -> None:
    for found in run_ranks(run_long, ranks, wanted_long, timeout=280):
        assert max(off for parts in found.values() for off in parts.values()) < 1e-10


# --- rows ------------------------------------------------------------------------------------------------------------------------


def run_rows(rank: int, world_size: int) -> None:
    group = dist.group.WORLD
    for mask, uneven in ((masks.packed(CU), False), (masks.packed((0, 30, 997)), True), (MASKS["causal"], False)):
        config = magi.DistAttnConfig(uneven=uneven)
        cu = [0, *(end for _, end in mask.q_ranges)]
        key = magi.magi_attn_varlen_key(cu, cu, HEADS, KV_HEADS, DIM, causal=True, cp_group_or_mesh=group, dist_attn_config=config)
        total = mask.total_seqlen_q
        x = torch.randn(total, 3, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
        assert magi.get_most_recent_key(group) is key
        local = magi.dispatch(x, key, pad_value=7.0)
        ids = magi.get_position_ids(key)
        assert torch.equal(local[ids < total], x[ids[ids < total]]) and bool((local[ids >= total] == 7).all())
        assert torch.equal(magi.undispatch(local, key), x)
        weights = torch.randn(total, 3, generator=torch.Generator().manual_seed(2)).double()
        (magi.undispatch(local.sin(), key) * weights).sum().backward()
        assert torch.equal(x.grad, weights * x.detach().cos())
        for shift in (1, -1, 17, total - 1, 0):
            leaf = x.detach().clone().requires_grad_()
            rolled = magi.roll(magi.dispatch(leaf, key), shift, 0, key)
            assert torch.equal(magi.undispatch(rolled, key), leaf.roll(shift, 0))
            (magi.undispatch(rolled, key) * weights).sum().backward()
            assert torch.equal(leaf.grad, weights.roll(-shift, 0))
        turned = magi.roll(magi.dispatch(x, key).t(), 1, 1, key)
        assert torch.equal(magi.undispatch(turned.t(), key), x.roll(1, 0))


@pytest.mark.parametrize("ranks", [2, 4])
def test_rows_go_out_and_come_back_and_roll_as_one_sequence(ranks: int) -> None:
    run_ranks(run_rows, ranks, timeout=120)


def run_new_mask(rank: int, world_size: int) -> dict[str, float]:
    """A window's layers on rows that a causal mask laid out; and the calls of releases before 1.0."""
    group = dist.group.WORLD
    old = MASKS["packed causal"]
    q, k, v, _, _ = tensors(old.total_seqlen_q)
    local, key = magi.magi_attn_varlen_dispatch(q.flatten(1), CU, CU, head_dim=DIM, pad_size=0, chunk_size=10, cp_group=group, causal=True)
    local = local.unflatten(1, (HEADS, DIM))
    k, v = magi.dispatch(k, key), magi.dispatch(v, key)
    found = {}
    for name, new in (
        ("packed causal", key),
        ("window", magi.make_varlen_key_for_new_mask_after_dispatch(CU, CU, key, window_size=(9, 0))),
    ):
        assert new.dispatch == key.dispatch
        out = magi.undispatch(magi.calc_attn(local, k, v, new)[0], new)
        found[name] = difference(out, dense(MASKS[name], False, 0.0)["out"])
    return found


def test_a_new_mask_on_an_old_dispatch() -> None:
    assert max(run_ranks(run_new_mask, 4, timeout=120)[0].values()) < 1e-10


# --- mistakes --------------------------------------------------------------------------------------------------------------------


def test_a_key_used_on_other_tensors_is_one_sentence() -> None:
    key = magi.magi_attn_flex_key([(0, 64)], [(0, 64)], "causal", 64, 64, HEADS, KV_HEADS, DIM)
    q, k, v, _, sink = tensors(64)
    longer = tensors(65)
    with pytest.raises(UserError, match="gives this rank 64 rows, but q has 65"):
        magi.calc_attn(*longer[:3], key)
    with pytest.raises(UserError, match="made for 4 query heads, but the tensors have 2"):
        magi.calc_attn(q[:, :2], k, v, key)
    with pytest.raises(UserError, match="made for 8 elements of a head, but the tensors have 4"):
        magi.calc_attn(q[..., :4], k[..., :4], v[..., :4], key)
    with pytest.raises(UserError, match="squash the batch first"):
        magi.calc_attn(q[None], k[None], v[None], key)
    with pytest.raises(UserError, match="sink has 3 heads and q 4"):
        magi.calc_attn(q, k, v, key, sink=sink[:, :3])
    with pytest.raises(UserError, match="dispatch got 65 rows for a key of 64"):
        magi.dispatch(longer[0], key)
    with pytest.raises(UserError, match="roll got 65 rows"):
        magi.roll(longer[0], 1, 0, key)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "options", "words"),
    [
        (6, 4, {}, "6 query heads cannot share 4 key/value heads"),
        (4, 2, {"dist_attn_config": magi.DistAttnConfig(degree=-1)}, "degree -1 is no number of stages"),
    ],
)
def test_keys_that_make_no_sense(heads: int, kv_heads: int, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        magi.magi_attn_flex_key([(0, 8)], [(0, 8)], "causal", 8, 8, heads, kv_heads, DIM, **options)


def test_queries_and_keys_must_be_one_sequence() -> None:
    with pytest.raises(UserError, match="not 8 and 9 rows"):
        magi.magi_attn_flex_key([(0, 8)], [(0, 9)], "causal", 8, 9)


def test_a_kernel_that_does_not_exist() -> None:
    config = magi.DistAttnConfig(kernel="flash9")
    key = magi.magi_attn_flex_key([(0, 8)], [(0, 8)], "causal", 8, 8, HEADS, KV_HEADS, DIM, dist_attn_config=config)
    with pytest.raises(UserError, match="no attention kernel 'flash9'"):
        magi.calc_attn(*tensors(8)[:3], key)


def test_helpers() -> None:
    assert magi.squash_batch_dim(torch.zeros(2, 3, 4)).shape == (6, 4)
    assert magi.compute_pad_size(1000, 8, 128) == 24 and magi.compute_pad_size(1000, 8, 64, 128) == 24
    key = magi.magi_attn_varlen_key([0, 5, 9], [0, 5, 9], causal=True)
    assert torch.equal(magi.get_position_ids(key)[:9], torch.arange(9))
    assert len({key, magi.magi_attn_varlen_key([0, 5, 9], [0, 5, 9], causal=True)}) == 1
