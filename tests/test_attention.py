"""Attention against dense math in fp64: masks, windows, caps, grouped heads, gradients, and memory."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensor_sizes import TensorSizes
from torch._subclasses.fake_tensor import FakeTensorMode

from seqloom.errors import UserError
from seqloom.graph import Ref, Value
from seqloom.ops import attention as attention_module
from seqloom.ops.attention import attention
from seqloom.ops.check import check_op
from seqloom.ops.flops import workspace_bytes
from seqloom.ops.registry import resolve
from seqloom.ops.rules import bind

torch.set_num_threads(1)


def dense(query, key, value, scale, causal=True, window=None, softcap=None):
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    i, j = torch.arange(query.shape[2])[:, None], torch.arange(key.shape[2])[None]
    seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool)
    if causal:
        seen &= j <= i
    if window is not None:
        seen &= j > i - window
    return scores.masked_fill(~seen, -math.inf).softmax(-1) @ value


def make(b, k, g, length, keys, e, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((b, k * g, length, e), (b, k, keys, e), (b, k, keys, e))
    return [torch.randn(s, dtype=torch.float64, generator=generator).to(dtype).requires_grad_() for s in shapes]


def results(function, tensors, *args, **kwargs):
    output = function(*tensors, *args, **kwargs)
    weights = torch.randn(output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    return output, *torch.autograd.grad(output, tensors, weights)


OPTIONS = [
    {},
    {"causal": False},
    {"window": 3},
    {"window": 1},
    {"window": 100},
    {"softcap": 2.0},
    {"softcap": 2.0, "causal": False},
    {"softcap": 1.5, "window": 5},
    {"softcap": 1.5, "window": 100},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("heads", [(1, 1), (2, 3), (3, 1), (1, 4)], ids=str)
@pytest.mark.parametrize("chunk", [4, 512])
def test_equals_dense_math(options, heads, chunk, monkeypatch):
    monkeypatch.setattr(attention_module, "_CHUNK", chunk)
    tensors = make(2, *heads, 11, 11, 8)
    expected = results(dense, tensors, 0.3, **options)
    torch.testing.assert_close(results(attention, tensors, 0.3, **options), expected, rtol=1e-10, atol=1e-11)


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 3), st.integers(1, 17), st.integers(1, 4)),
    st.one_of(st.none(), st.integers(1, 20)),
    st.one_of(st.none(), st.floats(0.5, 20)),
    st.integers(0, 5),
)
def test_any_shape(sizes, window, softcap, seed):
    b, k, g, length, e = sizes
    tensors = make(b, k, g, length, length, 2 * e, seed=seed)
    options = {"window": window, "softcap": softcap}
    torch.testing.assert_close(results(attention, tensors, 0.5, **options), results(dense, tensors, 0.5, **options), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}], ids=str)
def test_cross_attention(options):
    tensors = make(2, 2, 2, 5, 9, 8)
    expected = results(dense, tensors, 0.3, causal=False, **options)
    torch.testing.assert_close(results(attention, tensors, 0.3, causal=False, **options), expected)


@pytest.mark.parametrize("options", [{"window": 3}, {"softcap": 1.5}, {"softcap": 1.5, "causal": False}], ids=str)
def test_gradcheck_of_the_explicit_path(options):
    tensors = make(1, 2, 2, 5, 5, 4)
    assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, 0.4, **options), tensors)


@pytest.mark.parametrize("options", [{}, {"window": 5}, {"softcap": 4.0}], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_lower_precision(options, dtype, tolerance):
    tensors = make(1, 2, 2, 24, 24, 16, dtype=dtype)
    found = results(attention, tensors, 0.25, **options)
    expected = results(dense, [x.detach().double().requires_grad_() for x in tensors], 0.25, **options)
    for mine, its in zip(found, expected, strict=True):
        assert mine.dtype == dtype
        assert (mine.double() - its).norm() <= tolerance * its.norm()


def test_transposed_inputs_as_models_pass_them():
    tensors = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in make(2, 2, 2, 7, 7, 8)]
    for options in ({}, {"window": 3}):
        torch.testing.assert_close(results(attention, tensors, 0.3, **options), results(dense, tensors, 0.3, **options))


# --- memory ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [(2, 1), (1, 2)], ids=str)
def test_plain_attention_holds_no_square_matrix(dtype, heads):
    length = 600
    tensors = make(1, *heads, length, length, 8, dtype=dtype)
    with TensorSizes() as sizes:
        results(attention, tensors, 0.3)
    assert "aten._scaled_dot_product_flash_attention_for_cpu.default" in sizes.operators
    assert sizes.largest <= tensors[0].numel() < length * length


@pytest.mark.parametrize("options", [{"window": 30}, {"softcap": 3.0}], ids=str)
def test_explicit_path_holds_no_square_matrix(options, monkeypatch):
    monkeypatch.setattr(attention_module, "_CHUNK", 20)
    length = 600
    tensors = make(1, 2, 1, length, length, 4)
    with TensorSizes() as sizes:
        results(attention, tensors, 0.3, **options)
    columns = 20 + options["window"] - 1 if "window" in options else length
    assert sizes.largest <= max(tensors[0].numel(), 2 * 20 * columns) < length * length


def test_explicit_tiles_shrink_with_the_number_of_keys(monkeypatch):
    monkeypatch.setattr(attention_module, "_TILE", 1000)
    tensors = make(1, 2, 2, 60, 60, 4)
    with TensorSizes() as sizes:
        found = results(attention, tensors, 0.3, softcap=2.0)
    assert sizes.largest <= max(1000, tensors[0].numel())
    torch.testing.assert_close(found, results(dense, tensors, 0.3, softcap=2.0))


@pytest.mark.parametrize("options", [{"softcap": 3.0}, {"window": 40}], ids=str)
def test_workspace_hint_bounds_the_temporaries(options, monkeypatch):
    monkeypatch.setattr(attention_module, "_CHUNK", 32)
    tensors = make(1, 2, 2, 300, 300, 8, dtype=torch.float32)
    values = {n: Value(n, tuple(x.shape), x.dtype) for n, x in zip("qkv", tensors, strict=True)}
    args, kwargs, name = tuple(map(Ref, "qkv")), {"scale": 0.3, **options}, "seqloom.ops.attention:attention"
    hint = workspace_bytes(name, args, kwargs, bind(name, args, kwargs, values).sizes)
    with TensorSizes() as sizes:
        results(attention, tensors, **kwargs)
    assert 6 * 4 * sizes.largest <= 1.2 * hint
    fused = workspace_bytes(name, args, {"scale": 0.3}, bind(name, args, {"scale": 0.3}, values).sizes)
    assert fused == 4 * 4 * 8 * (300 + 300)


def test_full_size_on_fake_tensors():
    with FakeTensorMode():
        query = torch.empty(1, 32, 131072, 128, dtype=torch.bfloat16, requires_grad=True)
        key = torch.empty(1, 8, 131072, 128, dtype=torch.bfloat16, requires_grad=True)
        with TensorSizes() as sizes:
            attention(query, key, key, 0.1).sum().backward()
        assert key.grad.shape == key.shape
        assert sizes.largest <= query.numel()


def test_compiles_without_a_graph_break():
    for options in ({}, {"window": 3}):
        tensors = make(1, 2, 2, 7, 7, 8)
        compiled = torch.compile(lambda q, k, v: attention(q, k, v, 0.3, **options), fullgraph=True, backend="aot_eager")  # noqa: B023
        torch.testing.assert_close(results(compiled, tensors), results(dense, tensors, 0.3, **options))


# --- the operator ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shapes", "options", "words"),
    [
        (
            (1, 2, 1, 6, 4, 8),
            {},
            "6 causal queries from position 0 on go beyond the 4 keys: pass all keys up to the last query, or causal=False",
        ),
        ((1, 2, 1, 4, 6, 8), {"query_start": 3}, "4 causal queries from position 3 on go beyond the 6 keys"),
        ((1, 2, 1, 4, 6, 8), {"query_start": -1}, "query_start=-1 is in front of the first key: pass 0 or more"),
        ((1, 2, 1, 4, 4, 8), {"causal": False, "window": 2}, "a sliding window \\(2\\) needs a causal mask: pass causal=True"),
        ((1, 2, 1, 4, 4, 8), {"window": 0}, "window=0"),
        ((1, 2, 1, 4, 4, 8), {"softcap": 0.0}, "softcap=0.0"),
    ],
)
def test_mistakes(shapes, options, words):
    with pytest.raises(UserError, match=words):
        attention(*make(*shapes), 0.3, **options)


def test_heads_that_do_not_group():
    query, key, _ = make(1, 3, 1, 4, 4, 8)
    with pytest.raises(UserError, match="3 query heads cannot share 2 key/value heads"):
        attention(query, key[:, :2], key[:, :2], 0.3)


@pytest.mark.parametrize(("key_heads", "name", "pieces"), [(4, "k", 4), (1, "g", 8)])
def test_splits_keep_groups_whole(key_heads, name, pieces):
    values = {n: Value(n, (1, h, 16, 8), torch.float32) for n, h in (("q", 8), ("k", key_heads), ("v", key_heads))}
    bound = bind("seqloom.ops.attention:attention", (Ref("q"), Ref("k"), Ref("v")), {"scale": 0.3, "window": 4}, values)
    split, positions = bound.splits()
    assert (split.name, split.size, split.output_dims) == (name, pieces, (1,))
    assert (positions.name, positions.size, positions.input_dims, positions.output_dims) == ("l", 16, (2, None, None), (2,))
    behind = [(s.name, s.size, s.input_dims, s.after) for s in bound.splits(nested=True) if s.after]
    assert behind == ([("g", 2, (1, None, None), ("k",))] if name == "k" else [])


@pytest.mark.parametrize("options", [{}, {"window": 2}, {"softcap": 2.0}, {"causal": False}], ids=str)
def test_annotation_is_true(options):
    assert check_op(resolve("seqloom.ops.attention:attention").name, sizes={"l": 6, "m": 6}, args={"scale": 0.3, **options}).ok
