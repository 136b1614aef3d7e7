"""Attention over ranks against dense attention, in fp64: output, log-sum-exp and every gradient, for every kind of mask."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from procs import run_ranks
from torch import Tensor

from custom_ops import magi_attention as magi
from seqloom.errors import UserError
from seqloom.magi import masks
from seqloom.magi.mask import AttnMask

HEADS, KV_HEADS, DIM = 4, 2, 8
CU = (0, 40, 41, 90, 200)
MASKS: Mapping[str, AttnMask] = {
    "full": AttnMask(((0, 128),), ((0, 128),), (0,), 128),
    "causal": AttnMask(((0, 128),), ((0, 128),), (1,), 128),
    "causal, 997 rows": AttnMask(((0, 997),), ((0, 997),), (1,), 997),
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
DEGREES = (0, 1, 3, "auto")


def tensors(rows: int, seed: int = 0) -> list[Tensor]:
    """q, k, v, gradient of the output `[rows, heads, dim]` and sinks `[2, heads]`."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, HEADS, DIM), (rows, KV_HEADS, DIM), (rows, KV_HEADS, DIM), (rows, HEADS, DIM), (2, HEADS)]
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]


def dense(mask: AttnMask, sinks: bool, softcap: float) -> dict[str, Tensor]:
    """What attention gives when every cell is written out."""
    q, k, v, grad, sink = tensors(mask.total_seqlen_q)
    q, k, v, sink = (x.requires_grad_() for x in (q, k, v, sink))
    groups = HEADS // KV_HEADS
    scores = torch.einsum("rhd,chd->hrc", q, k.repeat_interleave(groups, 1)) * DIM**-0.5
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    allowed = torch.from_numpy(np.array(mask.dense()))
    scores = scores.masked_fill(~allowed, float("-inf"))
    if sinks:
        scores = torch.cat([scores, sink.t()[:, None].expand(-1, len(q), -1)], -1)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None]).exp()[..., : len(k)]
    out = torch.einsum("hrc,chd->rhd", weights, v.repeat_interleave(groups, 1))
    out.backward(grad)
    found = {"out": out.detach(), "lse": lse.detach().t(), "dq": q.grad, "dk": k.grad, "dv": v.grad}
    return {**found, "dsink": sink.grad} if sinks else found


def attended(mask: AttnMask, group: Any, sinks: bool, softcap: float, config: magi.DistAttnConfig, chunk: int | None) -> dict[str, Tensor]:
    """The same by dispatched rows; what is local is gathered, the sinks' gradients are summed."""
    ranges = (mask.q_ranges, mask.k_ranges, mask.attn_types, mask.total_seqlen_q, mask.total_seqlen_k)
    key = magi.magi_attn_flex_key(*ranges, HEADS, KV_HEADS, DIM, chunk_size=chunk, cp_group_or_mesh=group, dist_attn_config=config)
    q, k, v, grad, sink = tensors(mask.total_seqlen_q)
    local = [magi.dispatch(x, key).requires_grad_() for x in (q, k, v)]
    sink = sink.requires_grad_() if sinks else None
    # A gap between rows: nothing may take them to be contiguous.
    out, meta = magi.calc_attn(*(torch.stack((x, x), -1)[..., 0] for x in local), key, sink=sink, softcap=softcap)
    out.backward(magi.dispatch(grad, key))
    found = {"out": out.detach(), "lse": meta.lse, "dq": local[0].grad, "dk": local[1].grad, "dv": local[2].grad}
    found = {name: magi.undispatch(x, key) for name, x in found.items()}
    if sinks:
        dist.all_reduce(sink.grad, group=group) if group is not None else None
        found["dsink"] = sink.grad
    return found


CASES = [
    *((name, False, 0.0, magi.DistAttnConfig(degree=degree, uneven=index % 2 == 1), None) for index, (name, degree) in enumerate(
        itertools.product(MASKS, DEGREES))),
    *((name, True, 0.0, magi.DistAttnConfig(), 8) for name in ("causal", "window", "uncovered rows")),
    ("packed causal", True, 3.0, magi.DistAttnConfig(degree=2), 16),
    ("causal", False, 2.0, magi.DistAttnConfig(algorithm="area"), 8),
    ("packed causal", False, 0.0, magi.DistAttnConfig(kernel="reference"), 16),
    ("global window", False, 0.0, magi.DistAttnConfig(kernel="reference", degree=0), 16),
]  # fmt: skip


def run_cases(rank: int, world_size: int) -> dict[int, dict[str, float]]:
    """The largest difference of every tensor of every case."""
    group = dist.group.WORLD if world_size > 1 else None
    found = {}
    for index, (name, sinks, softcap, config, chunk) in enumerate(CASES):
        wanted = dense(MASKS[name], sinks, softcap) if rank == 0 else {}
        got = attended(MASKS[name], group, sinks, softcap, config, chunk)
        found[index] = {part: difference(got[part], x) for part, x in wanted.items()}
    return found


def difference(got: Tensor, wanted: Tensor) -> float:
    """The largest absolute difference; infinities must agree."""
    same = got == wanted
    return float(torch.where(same, 0.0, (got - wanted).abs()).max())


@pytest.fixture(scope="module", params=[1, 2, 4, 8])
def differences(request: pytest.FixtureRequest) -> dict[int, dict[str, float]]:
    return run_ranks(run_cases, request.param, timeout=280)[0]


def test_every_mask_gives_what_dense_attention_gives(differences: dict[int, dict[str, float]]) -> None:
    bad = {(CASES[index], part): off for index, parts in differences.items() for part, off in parts.items() if not off < 1e-10}
    assert not bad
    assert all(len(parts) >= 5 for parts in differences.values())


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
