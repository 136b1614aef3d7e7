"""FLOPs of single operators and bytes of single collectives, as `WorkCounter` sees them."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from seqloom.cost.communication import wire_bytes
from seqloom.ops.attention import attention
from seqloom.runtime import collectives
from seqloom.runtime.counting import WorkCounter
from seqloom.runtime.simulated import fake_job

SIZES = st.integers(1, 40)


def counted(function, *args) -> WorkCounter:
    """What a function does forward and backward."""
    work = WorkCounter()
    with work, work.recomputation():
        work.enter("forward")
        result = function(*args)
        work.enter("backward")
        result.sum().backward()
    return work


@settings(max_examples=20, deadline=None)
@given(SIZES, SIZES, SIZES, st.integers(1, 3))
def test_a_linear_layer(m, n, k, batch):
    with FakeTensorMode():
        x, weight = torch.empty(batch, m, k, requires_grad=True), torch.empty(n, k, requires_grad=True)
        work = counted(F.linear, x, weight)
    assert work.flops == {"forward": 2 * batch * m * n * k, "backward": 4 * batch * m * n * k, "recompute": 0}


@settings(max_examples=20, deadline=None)
@given(SIZES, SIZES, SIZES, st.integers(1, 3))
def test_a_batched_product(m, n, k, batch):
    with FakeTensorMode():
        left, right = torch.empty(batch, m, k, requires_grad=True), torch.empty(batch, k, n)
        work = counted(torch.matmul, left, right)
    assert work.flops == {"forward": 2 * batch * m * n * k, "backward": 2 * batch * m * n * k, "recompute": 0}


@settings(max_examples=20, deadline=None)
@given(groups=st.integers(1, 3), heads=st.integers(1, 3), length=st.integers(1, 64), causal=st.booleans())
def test_fused_attention_counts_the_pairs_that_a_mask_leaves(groups, heads, length, causal):
    batch, width = 2, 8
    with FakeTensorMode():
        query = torch.empty(batch, groups * heads, length, width, requires_grad=True)
        key, value = (torch.empty(batch, heads, length, width, requires_grad=True) for _ in range(2))
        work = counted(attention, query, key, value, 1.0, causal)
    forward = 4 * batch * groups * heads * width * (length * length // (2 if causal else 1))
    assert work.flops == {"forward": forward, "backward": int(2.5 * forward), "recompute": 0}


@settings(max_examples=15, deadline=None)
@given(pieces=st.integers(2, 4), length=st.integers(1, 32))
def test_pieces_of_a_causal_split_add_up(pieces, length):
    """Each piece sees the keys before it and half of its own: together the pairs of the whole mask."""
    total, whole = 0, pieces * length
    for piece in range(pieces):
        with FakeTensorMode():
            query = torch.empty(1, 2, length, 8)
            key, value = (torch.empty(1, 2, whole, 8) for _ in range(2))
            work = WorkCounter()
            with work:
                work.enter("forward")
                attention(query, key, value, 1.0, True, query_start=piece * length)
        seen = piece * length * length + length * length // 2
        assert work.flops["forward"] == 4 * 2 * 8 * seen
        total += seen
    assert total == pytest.approx(whole * whole / 2, abs=pieces)


class Doubled(torch.autograd.Function):
    """A function whose forward runs without gradients, as that of a user's operator."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight.t(), x.t() @ grad


def test_what_runs_again_is_told_from_the_backward():
    def segment(x, weight):
        return Doubled.apply(torch.relu(x @ weight), weight).relu()

    with FakeTensorMode():
        x, weight = (torch.empty(16, 16, requires_grad=True) for _ in range(2))
        once = 2 * 16**3
        assert counted(segment, x, weight).flops == {"forward": 2 * once, "backward": 4 * once, "recompute": 0}
        again = counted(lambda *args: checkpoint(segment, *args, use_reentrant=False), x, weight)
        assert again.flops == {"forward": 2 * once, "backward": 4 * once, "recompute": 2 * once}
        assert counted(segment, x, weight).flops["recompute"] == 0  # the hook is gone


def test_only_forward_and_backward_count():
    work = WorkCounter()
    with FakeTensorMode(), work:
        x = torch.empty(4, 4)
        for phase in ("between", "optimizer"):
            work.enter(phase)
            x @ x
        assert sum(work.flops.values()) == 0
        work.enter("forward")
        x @ x
    assert work.flops["forward"] == 128
    work.clear()
    assert sum(work.flops.values()) == 0


# (function of tensor and group, kind and bytes of forward and backward in units of the input)
MOVES = [
    (lambda x, g: collectives.all_gather(x, 0, g), [("all_gather", "whole")]),
    (lambda x, g: collectives.all_gather(x, 0, g, partial_grad=True), [("all_gather", "whole"), ("reduce_scatter", "whole")]),
    (lambda x, g: collectives.all_to_all(x, 0, 1, g), [("all_to_all", "same"), ("all_to_all", "same")]),
    (lambda x, g: collectives.all_reduce(x, g), [("all_reduce", "same")]),
    (lambda x, g: collectives.all_reduce(x, g, partial_grad=True), [("all_reduce", "same"), ("all_reduce", "same")]),
    (lambda x, g: collectives.reduce_scatter(x, 0, g), [("reduce_scatter", "same"), ("all_gather", "same")]),
    (lambda x, g: collectives.shard(x, 0, g), [("all_gather", "same")]),
    (lambda x, g: collectives.shard(x, 0, g, partial_grad=True), []),
    (lambda x, g: collectives.sum_grad(x, g), [("all_reduce", "same")]),
    (lambda x, g: collectives.share_grad(x, g), []),
]


@settings(max_examples=40, deadline=None)
@given(move=st.sampled_from(MOVES), ranks=st.integers(2, 5), rows=st.integers(1, 9), dtype=st.sampled_from([torch.bfloat16, torch.float64]))
def test_every_reshard(move, ranks, rows, dtype):
    function, parts = move
    with fake_job(0, ranks), FakeTensorMode():
        x = torch.empty(ranks * rows, 2 * ranks, dtype=dtype, requires_grad=True)
        work = counted(function, x, dist.group.WORLD)
        nbytes = x.numel() * dtype.itemsize
    expected: dict[str, int] = {}
    for kind, size in parts:
        expected[kind] = expected.get(kind, 0) + wire_bytes(kind, nbytes * (ranks if size == "whole" else 1), ranks)
    assert work.sent == expected


def test_collectives_of_fsdp_by_group():
    """Gather, reduction and sum as FSDP2 calls them, over a part of the job."""
    with fake_job(1, 6):
        group = dist.new_group([0, 1, 2])
        work = WorkCounter()
        with FakeTensorMode(), work:
            work.enter("backward")
            whole, piece = torch.empty(30), torch.empty(10)
            dist.all_gather_into_tensor(whole, piece, group=group)
            dist.reduce_scatter_tensor(piece, whole, group=group)
            dist.all_reduce(piece, group=group)
    assert work.sent == {"all_gather": 80, "reduce_scatter": 80, "all_reduce": 2 * (40 * 2 // 3)}


def test_a_collective_that_no_plan_uses_is_an_error():
    with fake_job(0, 2), FakeTensorMode(), WorkCounter() as work:
        work.enter("forward")
        with pytest.raises(RuntimeError, match="not counted: c10d"):
            dist.broadcast(torch.empty(4), 0)
