"""Sliding windows over a mask that is laid out already: the mask cut, what the planner counts, and the operator beside dense attention."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from magi_dense import dense, difference, tensors
from magi_samples import any_mask, cumulative
from procs import run_ranks
from torch._dynamo.testing import CompileCounterWithBackend

from custom_ops.magi_attention import dispatch, undispatch
from seqloom.errors import UserError
from seqloom.magi import key as keys
from seqloom.magi.key import make_key, use_key
from seqloom.magi.masks import packed, sliding_window
from seqloom.magi.operator import magi_attention
from seqloom.magi.share import documents_mask, share, visible_pairs
from seqloom.magi.windows import cut_to_window, distinct, widest
from seqloom.ops.attention import attention
from seqloom.ops.check import check_op

CU = [0, 20, 21, 26, 56, 96]
WINDOWS = [None, 1, 7, 24, 200]


def in_window(rows: int, window: int) -> np.ndarray:
    """Cells (i, j) with i - window < j <= i, from the definition."""
    distance = np.arange(rows)[:, None] - np.arange(rows)
    return (distance >= 0) & (distance < window)


# --- masks ---------------------------------------------------------------------------------------------------------------------------


@given(any_mask, st.integers(1, 50))
@settings(max_examples=300, deadline=None)
def test_a_mask_cut_to_a_window_has_its_cells_within_it(mask, window):
    expected = mask.dense() & in_window(mask.total_seqlen_q, window)
    if not expected.any():
        with pytest.raises(UserError, match="covers nothing"):
            cut_to_window(mask, window)
        return
    cut = cut_to_window(mask, window)
    assert (cut.dense() == expected).all() and cut.area == expected.sum()
    assert cut is not mask or (expected == mask.dense()).all()


@given(cumulative(most=40), st.integers(1, 40))
@settings(deadline=None)
def test_documents_cut_to_a_window_are_documents_with_one(cu_seqlens, window):
    mask = documents_mask(cu_seqlens)
    assert (cut_to_window(mask, window).dense() == sliding_window(cu_seqlens, window - 1, 0).dense()).all()
    assert cut_to_window(mask, None) is cut_to_window(mask, max(np.diff(cu_seqlens))) is mask


def test_a_window_without_a_row_is_one_sentence():
    with pytest.raises(UserError, match="window=0 shows no key"):
        cut_to_window(packed([0, 4]), 0)
    with pytest.raises(UserError, match="window=-1 shows no key"):
        magi_attention(*(torch.randn(1, 2, 8, 4) for _ in range(3)), scale=0.5, window=-1, documents=(8,))


def test_no_window_is_the_widest():
    assert distinct([5, None, 3, 5]) == (None, 3, 5) and distinct([4, 4]) == (4,)
    assert (widest([5, None, 3]), widest([3, 5]), widest([None]), widest([])) == (None, 5, None, None)


# --- what the planner counts with ----------------------------------------------------------------------------------------------------


@given(st.integers(1, 200), st.integers(1, 220))
@settings(max_examples=300, deadline=None)
def test_pairs_are_the_cells_with_edges_counted_half(length, window):
    cells = int((in_window(length, window)).sum())
    edges = length + max(0, length - window + 1)
    assert cells - edges // 2 - length // window - 2 <= visible_pairs(length, window) <= cells
    assert visible_pairs(length, window) == visible_pairs(length) if window >= length else True


def test_pairs_at_the_size_of_real_windows():
    assert visible_pairs(131072, 4096) == pytest.approx(131072 * 4096 - 4096 * 4096 // 2, rel=3e-4)
    assert visible_pairs(4096, 4096) == visible_pairs(4096) == 4096 * 4096 // 2


def test_a_window_leaves_little_to_exchange():
    whole, narrow = share((65536,), 8), share((65536,), 8, 1024)
    assert narrow.received < 0.3 * whole.received and narrow.balance < 1.1 and narrow.host > whole.host
    assert share((65536,), 8, 65536) == whole and share((100, 28), 1, 5).received == 0


def test_a_window_beside_full_layers_is_counted_on_their_layout():
    """The rows lie as full layers want them, so that the window's layers receive more than they would alone."""
    alone, beside = share((65536,), 8, 1024), share((65536,), 8, 1024, (None, 1024))
    assert share((65536,), 8, None, (None, 1024)) == share((65536,), 8)
    assert alone.received < beside.received < share((65536,), 8).received


# --- the operator --------------------------------------------------------------------------------------------------------------------


def attended(window: int | None, softcap: float, group: dist.ProcessGroup | None) -> dict[str, torch.Tensor]:
    """Output and gradients of the operator on the rows of a key, as one sequence."""
    key = make_key(documents_mask(CU), None, None, None, group, chunk_size=4)
    q, k, v, grad, _ = tensors(CU[-1])
    local = [dispatch(x, key).requires_grad_() for x in (q, k, v)]
    heads = [x.transpose(0, 1).unsqueeze(0) for x in local]
    out = magi_attention(*heads, scale=q.shape[2] ** -0.5, softcap=softcap or None, window=window, group=group)[0].transpose(0, 1)
    out.backward(dispatch(grad, key))
    found = {"out": out.detach(), **{f"d{name}": x.grad for name, x in zip("qkv", local, strict=True)}}
    return {name: undispatch(x, key) for name, x in found.items()}


def run_windows(rank, world_size, wanted):
    group = dist.group.WORLD if world_size > 1 else None
    return max(difference(attended(*case, group)[name], x[name]) for case, x in wanted.items() for name in ("out", "dq", "dk", "dv"))


@pytest.fixture(scope="module")
def wanted():
    cases = [(window, softcap) for window in WINDOWS for softcap in (0.0, 2.0)]
    return {case: dense(sliding_window(CU, -1 if case[0] is None else case[0] - 1, 0), softcap=case[1]) for case in cases}


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_window_gives_what_dense_attention_gives(wanted, ranks):
    assert max(run_ranks(run_windows, ranks, wanted)) < 1e-10


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_one_document_is_plain_attention_with_the_window(softcap):
    query, key, value = (torch.randn(2, heads, 32, 8, dtype=torch.float64) for heads in (4, 2, 2))
    found = magi_attention(query, key, value, 0.3, softcap=softcap, window=9, documents=(32,))
    assert torch.allclose(found, attention(query, key, value, 0.3, window=9, softcap=softcap), rtol=0, atol=1e-12)


def test_its_annotation_is_true_with_a_window():
    sizes = {"b": 2, "k": 2, "g": 2, "l": 24, "e": 8}
    args = {"scale": 0.3, "documents": (10, 3, 11), "window": 4, "windows": (None, 4)}
    report = check_op("custom_ops.magi_attention:magi_attention", sizes=sizes, args=args)
    assert report.ok and {split.name for split in report.splits} >= {"b", "k"}


def test_a_compiled_block_takes_layers_of_two_windows():
    """Without a graph break; the next micro-batch has another mask and compiles nothing anew."""

    def block(query, key, value):
        return (magi_attention(magi_attention(query, key, value, scale=0.3, window=5), key, value, scale=0.3) * 2).sum()

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled_block = torch.compile(block, fullgraph=True, backend=counter)
    query, key, value = (torch.randn(2, heads, 16, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    for borders in ([0, 5, 16, 32], [0, 16, 30, 32]):
        use_key(make_key(documents_mask(borders), None, None, None, None, current=False))
        found = torch.autograd.grad(compiled_block(query, key, value), (query, key, value))
        wanted = torch.autograd.grad(block(query, key, value), (query, key, value))
        assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(found, wanted, strict=True))
    assert counter.frame_count == 1


def test_a_key_keeps_what_was_planned_of_it(monkeypatch):
    """A layer with a window plans nothing where that was done ahead, and one whose window covers all documents is a full layer."""
    key = make_key(documents_mask(CU), None, None, None, None)
    assert key.within(None) is key.within(40) is key and key.within(7) is key.within(7) is not key
    assert key.within(7).dispatch is key.dispatch
    exchanges = [key.exchange, key.within(7).exchange]
    monkeypatch.setattr(keys, "plan_exchange", None)
    tensor = torch.randn(1, 2, CU[-1], 8, dtype=torch.float16)
    for window in (None, 7, 40):
        magi_attention(tensor, tensor, tensor, scale=0.3, window=window)
    assert exchanges == [key.exchange, key.within(7).exchange]
