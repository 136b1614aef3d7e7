"""Attention in pieces of the query positions: equal to the whole in output and every gradient, linear in memory, counted and priced."""

import math
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensor_sizes import TensorSizes
from test_attention import dense, make, results
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from seqloom.graph import Ref, Value
from seqloom.ops import attention as attention_module
from seqloom.ops import fused
from seqloom.ops.attention import attention
from seqloom.ops.flops import flops, local_flops, workspace_bytes
from seqloom.ops.rules import bind, starts_of
from seqloom.ops.saved import saved_for_backward

torch.set_num_threads(1)
NAME = "seqloom.ops.attention:attention"
ARGS = tuple(map(Ref, "qkv"))
OPTIONS = [{}, {"causal": False}, {"window": 3}, {"softcap": 2.0}, {"softcap": 2.0, "causal": False}, {"softcap": 1.5, "window": 5}]


def in_pieces(cuts, function=attention):
    """Attention of each stretch of queries between two cuts, told where it starts, put together again."""

    def run(query, key, value, scale, **options):
        pieces = zip(cuts[:-1], cuts[1:], strict=True)
        return torch.cat([function(query[:, :, a:b], key, value, scale, query_start=a, **options) for a, b in pieces], 2)

    return run


def assert_equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


# --- truth -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("heads", [(1, 1), (2, 3), (3, 1), (1, 4)], ids=str)
@pytest.mark.parametrize("cuts", [(0, 6, 12), (0, 3, 6, 9, 12), (0, 1, 2, 12), (0, 11, 12)], ids=str)
def test_pieces_are_the_whole(options, heads, cuts):
    tensors = make(2, *heads, 12, 12, 8)
    expected = results(dense, tensors, 0.3, **options)
    assert_equal(results(in_pieces(cuts), tensors, 0.3, **options), expected)
    assert_equal(results(attention, tensors, 0.3, **options), expected)


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 3), st.integers(1, 40), st.integers(1, 4)),
    st.sets(st.integers(1, 39), max_size=4),
    st.one_of(st.none(), st.integers(1, 45)),
    st.one_of(st.none(), st.floats(0.5, 20)),
    st.booleans(),
    st.integers(0, 5),
)
def test_any_cuts(sizes, inner, window, softcap, causal, seed):
    b, k, g, length, e = sizes
    cuts = [0, *sorted(cut for cut in inner if cut < length), length]
    tensors = make(b, k, g, length, length, 2 * e, seed=seed)
    options = {"window": window if causal else None, "softcap": softcap, "causal": causal}
    assert_equal(results(in_pieces(cuts), tensors, 0.5, **options), results(dense, tensors, 0.5, **options))


@pytest.mark.parametrize("options", [{}, {"window": 4}, {"softcap": 2.0}], ids=str)
@pytest.mark.parametrize("chunk", [2, 512])
def test_keys_behind_the_last_query_are_not_seen(options, chunk, monkeypatch):
    """A piece in the middle: later keys change nothing and get a gradient of zero."""
    monkeypatch.setattr(attention_module, "_CHUNK", chunk)
    query, key, value = make(1, 2, 2, 12, 12, 8)
    for start, stop in ((0, 5), (4, 9), (8, 12)):
        piece = query[:, :, start:stop].detach().requires_grad_()
        output, _, d_key, d_value = results(attention, (piece, key, value), 0.3, query_start=start, **options)
        cut = [x[:, :, :stop].detach().requires_grad_() for x in (key, value)]
        again, _, *own = results(attention, (piece, *cut), 0.3, query_start=start, **options)
        torch.testing.assert_close(output, again, rtol=0, atol=1e-14)
        assert_equal((d_key[:, :, :stop], d_value[:, :, :stop]), tuple(own))
        assert not d_key[:, :, stop:].any() and not d_value[:, :, stop:].any()


def test_gradcheck_of_a_later_piece():
    query, key, value = make(1, 2, 2, 3, 8, 4)
    assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, 0.4, query_start=4), (query, key, value))


@pytest.mark.parametrize("size", [1.0, 40.0])
def test_scores_far_apart_do_not_overflow(size):
    """Where one part's scores exceed the other's by hundreds, its weight is all there is."""
    query, key, value = (x.detach() for x in make(1, 1, 1, 6, 12, 4))
    key[:, :, 6:] += size
    tensors = [x.clone().requires_grad_() for x in (query * size, key, value)]
    found = results(attention, tensors, 1.0, query_start=6)
    whole = [torch.cat([torch.zeros_like(tensors[0]), tensors[0]], 2), tensors[1], tensors[2]]
    expected = dense(*whole, 1.0)[:, :, 6:]
    assert all(x.isfinite().all() for x in found)
    assert_equal(found[0], expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_lower_precision(dtype, tolerance):
    tensors = make(1, 2, 2, 24, 24, 16, dtype=dtype)
    found = results(in_pieces((0, 8, 16, 24)), tensors, 0.25)
    expected = results(dense, [x.detach().double().requires_grad_() for x in tensors], 0.25)
    for mine, its in zip(found, expected, strict=True):
        assert mine.dtype == dtype
        assert (mine.double() - its).norm() <= tolerance * its.norm()


def test_transposed_inputs_as_models_pass_them():
    tensors = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in make(2, 2, 2, 8, 8, 8)]
    assert_equal(results(in_pieces((0, 4, 8)), tensors, 0.3), results(dense, tensors, 0.3))


def test_only_wanted_gradients():
    query, key, value = make(1, 2, 2, 4, 8, 8)
    (found,) = torch.autograd.grad(attention(query, key.detach(), value.detach(), 0.3, query_start=4).sum(), query)
    (expected,) = torch.autograd.grad(attention(query, key, value, 0.3, query_start=4).sum(), query)
    assert torch.equal(found, expected)
    assert not attention(*(x.detach() for x in (query, key, value)), 0.3, query_start=4).requires_grad


# --- where programs run it ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"window": 3}, {"softcap": 2.0}], ids=str)
def test_compiles_without_a_graph_break(options):
    tensors = make(1, 2, 2, 8, 8, 8)
    compiled = torch.compile(in_pieces((0, 4, 8)), fullgraph=True, backend="aot_eager")
    assert_equal(results(compiled, tensors, 0.3, **options), results(dense, tensors, 0.3, **options))


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_activation_checkpointing(reentrant):
    tensors = make(1, 2, 2, 8, 8, 8)

    def again(query, key, value, scale, query_start):
        return checkpoint(attention, query, key, value, scale, True, None, None, query_start, use_reentrant=reentrant)

    weights = torch.randn(1, 4, 8, 8, dtype=torch.float64)
    for function in (in_pieces((0, 4, 8), again), dense):
        for x in tensors:
            x.grad = None
        (function(*tensors, 0.3) * weights).sum().backward()
        found = [x.grad for x in tensors]
        if function is not dense:
            first = found
    assert_equal(first, found)


def test_meta_tensors():
    with torch.device("meta"):
        query, key = torch.empty(1, 4, 6, 8, requires_grad=True), torch.empty(1, 2, 12, 8, requires_grad=True)
        attention(query, key, key, 0.3, query_start=6).sum().backward()
    assert query.grad.is_meta and key.grad.shape == key.shape


def test_full_size_on_fake_tensors():
    """The last of eight pieces of 131,072 positions, as the dry run sees it."""
    with FakeTensorMode():
        query = torch.empty(1, 32, 16384, 128, dtype=torch.bfloat16, requires_grad=True)
        key = torch.empty(1, 8, 131072, 128, dtype=torch.bfloat16, requires_grad=True)
        with TensorSizes() as sizes:
            attention(query, key, key, 0.1, query_start=114688).sum().backward()
        assert key.grad.shape == key.shape and query.grad.dtype == torch.bfloat16
        assert sizes.largest <= key.numel()


def test_the_whole_takes_the_path_it_always_took():
    """No start and as many keys as queries: one call of PyTorch's function and nothing around it."""
    with TensorSizes() as sizes:
        results(attention, make(1, 2, 2, 8, 8, 8), 0.3)
    mine = {name for name in sizes.operators if "flash" in name}
    assert mine == {
        "aten._scaled_dot_product_flash_attention_for_cpu.default",
        "aten._scaled_dot_product_flash_attention_for_cpu_backward.default",
    }
    assert not any(word in name for name in sizes.operators for word in ("slice", "cat", "logaddexp"))


# --- memory ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [(2, 1), (1, 2)], ids=str)
@pytest.mark.parametrize("start", [0, 300, 599])
def test_no_square_matrix(dtype, heads, start):
    """Nothing made is larger than the largest input: no mask and no scores."""
    length = 300
    tensors = make(1, *heads, length, 900, 8, dtype=dtype)
    with TensorSizes() as sizes:
        results(attention, tensors, 0.3, query_start=start)
    assert sizes.largest <= max(x.numel() for x in tensors) < length * 300


@pytest.mark.parametrize("options", [{"window": 30}, {"softcap": 3.0}], ids=str)
def test_explicit_path_holds_no_square_matrix(options, monkeypatch):
    monkeypatch.setattr(attention_module, "_CHUNK", 20)
    tensors = make(1, 2, 1, 300, 900, 4)
    with TensorSizes() as sizes:
        results(attention, tensors, 0.3, query_start=600, **options)
    columns = 20 + options["window"] - 1 if "window" in options else 900
    assert sizes.largest <= max(tensors[1].numel(), 2 * 20 * columns) < 300 * 900


def test_autograd_keeps_what_the_hint_says():
    """Query, key, value, output, and one number per query row."""
    query, key, value = make(1, 2, 2, 4, 12, 8)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        output = attention(query, key, value, 0.3, query_start=8)
    assert saved_for_backward(NAME, ARGS, {"scale": 0.3, "query_start": 8}) == (("input", 0), ("input", 1), ("input", 2), ("output", 0))
    assert sorted(x.numel() for x in kept) == sorted([query.numel(), key.numel(), value.numel(), output.numel(), 1 * 4 * 4])
    pointers = {x.untyped_storage().data_ptr() for x in kept}
    assert {x.untyped_storage().data_ptr() for x in (query, key, value, output)} <= pointers


def workspace(shape, **kwargs):
    b, k, g, length, keys, e = shape
    sizes = {"b": b, "k": k, "g": g, "l": length, "m": keys, "e": e}
    return workspace_bytes(NAME, ARGS, {"scale": 0.3, **kwargs}, sizes)


@pytest.mark.parametrize("options", [{"softcap": 3.0}, {"window": 40}], ids=str)
@pytest.mark.parametrize("start", [0, 200])
def test_workspace_hint_bounds_the_temporaries_of_a_piece(options, start, monkeypatch):
    monkeypatch.setattr(attention_module, "_CHUNK", 32)
    tensors = make(1, 2, 2, 100, 300, 8, dtype=torch.float32)
    with TensorSizes() as sizes:
        results(attention, tensors, 0.3, query_start=start, **options)
    assert 6 * 4 * min(sizes.largest, 4 * 32 * 300) <= 1.2 * workspace((1, 2, 2, 100, 300, 8), query_start=start, **options)


class Alive(torch.utils._python_dispatch.TorchDispatchMode):
    """Bytes of storages made inside, at the most that were alive at once; views of others count nothing."""

    def __init__(self):
        super().__init__()
        self.alive = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, torch.Tensor)}
        for x in torch.utils._pytree.tree_leaves(found):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.known | given:
                storage, size, key = x.untyped_storage(), x.untyped_storage().nbytes(), x.untyped_storage()._cdata
                self.known.add(key)
                self.alive += size
                self.peak = max(self.peak, self.alive)
                weakref.finalize(storage, self.gone, key, size)
        return found

    def gone(self, key, size):
        self.known.discard(key)
        self.alive -= size


@pytest.mark.parametrize("shape", [(1, 2, 4, 64, 512, 16), (1, 8, 1, 64, 128, 16), (1, 1, 2, 16, 512, 16)], ids=str)
def test_workspace_hint_bounds_what_a_later_piece_holds(shape):
    """In bf16, on top of the gradients of the inputs, which the plan counts by themselves."""
    b, k, g, length, keys, e = shape
    query, key, value = make(b, k, g, length, keys, e, dtype=torch.bfloat16)
    output = attention(query, key, value, 0.3, query_start=keys - length)
    grad = torch.ones_like(output)
    with Alive() as alive:
        torch.autograd.grad(output, (query, key, value), grad)
    gradients = 2 * (query.numel() + key.numel() + value.numel())
    assert alive.peak - gradients <= workspace(shape, query_start=keys - length)
    with Alive() as alive:
        attention(query, key, value, 0.3, query_start=keys - length)
    assert alive.peak - 2 * output.numel() <= workspace(shape, query_start=keys - length)


# --- FLOPs -------------------------------------------------------------------------------------------------------------------


def counted(shape, **kwargs):
    b, k, g, length, keys, e = shape
    sizes = {"b": b, "k": k, "g": g, "l": length, "m": keys, "e": e}
    return local_flops(NAME, ARGS, {"scale": 0.3, **kwargs}, sizes) / (4 * b * k * g * e)


def visible(length, keys, start=0, causal=True, window=None):
    """Pairs by counting, and how many of them lie on the diagonal."""
    p, j = start + torch.arange(length)[:, None], torch.arange(keys)[None]
    seen = torch.ones(length, keys, dtype=torch.bool)
    if causal:
        seen &= j <= p
    if window is not None:
        seen &= j > p - window
    return int(seen.sum())


@settings(deadline=None)
@given(st.integers(1, 20), st.integers(1, 5), st.one_of(st.none(), st.integers(1, 120)), st.booleans())
def test_flops_of_a_piece_are_its_visible_pairs(length, pieces, window, causal):
    """Up to half a pair per query and one for rounding: a diagonal, of the mask or of the window's ramp, counts half."""
    window, keys, total = window if causal else None, length * pieces, 0
    for start in range(0, keys, length):
        found = counted((2, 3, 2, length, keys, 8), query_start=start, causal=causal, window=window)
        assert abs(found - visible(length, keys, start, causal, window)) <= length / 2 + 1 or pieces == 1 and window is not None
        total += found
    if window is None or window >= keys:
        whole = counted((2, 3, 2, keys, keys, 8), causal=causal, window=window)
        assert total <= whole <= total + pieces
        if length % 2 == 0:
            assert total == whole


def test_the_last_piece_of_a_causal_split_has_the_most():
    piece = [counted((1, 8, 4, 16384, 131072, 128), query_start=start) for start in range(0, 131072, 16384)]
    assert piece == sorted(piece) and sum(piece) == 131072**2 / 2
    assert piece[0] == 16384**2 / 2 and piece[-1] / (sum(piece) / 8) == pytest.approx(15 / 8)
    full = [counted((1, 8, 4, 16384, 131072, 128), query_start=start, causal=False) for start in range(0, 131072, 16384)]
    assert set(full) == {16384 * 131072}
    windowed = [counted((1, 8, 4, 16384, 131072, 128), query_start=start, window=4096) for start in range(0, 131072, 16384)]
    assert set(windowed[1:]) == {16384 * 4096} and windowed[0] == 16384 * 4096 - 4096**2 / 2


@pytest.mark.parametrize(("kwargs", "pairs"), [({}, 50), ({"causal": False}, 100), ({"window": 3}, 30), ({"window": 30}, 50)])
def test_flops_of_the_whole_stay(kwargs, pairs):
    values = {name: Value(name, (2, heads, 10, 8), torch.float32) for name, heads in (("q", 6), ("k", 3), ("v", 3))}
    kwargs = {"scale": 0.1, **kwargs}
    bound = bind(NAME, ARGS, kwargs, values)
    assert flops(NAME, ARGS, kwargs, bound) == local_flops(NAME, ARGS, {**kwargs, "query_start": 0}, bound.sizes) == 4 * 2 * 6 * pairs * 8


def test_the_planner_finds_the_start():
    assert starts_of(NAME) == {"l": "query_start"}


# --- kernels of devices that are not here -------------------------------------------------------------------------------------


CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
CPU_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
SEED, OFFSET = torch.tensor(1), torch.tensor(2)


class StandIns:
    """The GPU kernels by their conventions, computed by the CPU's: each has its own log-sum-exp and order of arguments."""

    def _scaled_dot_product_flash_attention(self, q, k, v, dropout, causal, *, scale):
        output, lse = CPU(q, k, v, dropout, causal, scale=scale)
        return output, lse.contiguous(), None, None, q.shape[2], k.shape[2], SEED, OFFSET, None

    def _scaled_dot_product_flash_attention_backward(
        self, grad, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, dropout, causal, seed, offset, *, scale
    ):
        assert (cum_q, cum_k, max_q, max_k) == (None, None, q.shape[2], k.shape[2]) and (seed, offset) == (SEED, OFFSET)
        assert lse.is_contiguous()
        return CPU_BACKWARD(grad, q, k, v, out, lse, dropout, causal, scale=scale)

    def _scaled_dot_product_efficient_attention(self, q, k, v, bias, compute_lse, dropout, causal, *, scale):
        assert bias is None and compute_lse and q.shape[1] == k.shape[1]
        output, lse = CPU(q, k, v, dropout, causal, scale=scale)
        return output, torch.nn.functional.pad(lse, (0, -q.shape[2] % 32), value=math.inf), SEED, OFFSET

    def _scaled_dot_product_efficient_attention_backward(
        self, grad, q, k, v, bias, out, lse, seed, offset, dropout, wanted, causal, *, scale
    ):
        rows = q.shape[2]
        assert bias is None and wanted == [True, True, True, False] and (seed, offset) == (SEED, OFFSET)
        assert lse.shape[2] % 32 == 0 and lse.is_contiguous() and (lse[..., rows:] == math.inf).all()
        return *CPU_BACKWARD(grad, q, k, v, out, lse[..., :rows], dropout, causal, scale=scale), None

    def _scaled_dot_product_cudnn_attention(self, q, k, v, bias, compute_lse, dropout, causal, *, scale):
        assert bias is None and compute_lse
        output, lse = CPU(q, k, v, dropout, causal, scale=scale)
        return output, lse.contiguous()[..., None], None, None, q.shape[2], k.shape[2], SEED, OFFSET, None

    def _scaled_dot_product_cudnn_attention_backward(
        self, grad, q, k, v, out, lse, seed, offset, bias, cum_q, cum_k, max_q, max_k, dropout, causal, *, scale
    ):
        assert (bias, cum_q, cum_k, max_q, max_k) == (None, None, None, q.shape[2], k.shape[2]) and (seed, offset) == (SEED, OFFSET)
        assert lse.shape == (*q.shape[:3], 1) and lse.is_contiguous()
        return CPU_BACKWARD(grad, q, k, v, out, lse[..., 0], dropout, causal, scale=scale)


@pytest.mark.parametrize(("kernel", "groups"), [("flash2", 2), ("cudnn", 2), ("efficient", 1)])
def test_merging_by_the_conventions_of_each_kernel(kernel, groups, monkeypatch):
    monkeypatch.setattr(fused, "_ATEN", StandIns())
    monkeypatch.setattr(fused, "_kernel_name", lambda *_: kernel)
    tensors = make(2, 2, groups, 12, 12, 8)
    assert_equal(results(in_pieces((0, 5, 12)), tensors, 0.3), results(dense, tensors, 0.3))


@pytest.mark.parametrize(("kernel", "groups"), [("flash2", 2), ("cudnn", 1), ("efficient", 1)])
def test_arguments_fit_the_real_kernels(kernel, groups):
    """On meta tensors: names, order and number of arguments, and shapes."""
    query = torch.empty(1, 2 * groups, 40, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
    key, value = (torch.empty(1, 2, 128, 64, dtype=torch.bfloat16, device="meta", requires_grad=True) for _ in range(2))
    output = fused.later_attention(query, key, value, 0.1, 64, kernel)
    output.sum().backward()
    assert output.shape == query.shape == query.grad.shape and output.dtype == torch.bfloat16
    assert key.grad.shape == value.grad.shape == key.shape


def test_without_a_fused_kernel_the_explicit_path_runs(monkeypatch):
    monkeypatch.setattr(fused, "_kernel_name", lambda *_: None)
    tensors = make(2, 2, 2, 12, 12, 8)
    with TensorSizes() as sizes:
        attention(tensors[0][:, :, 8:], *tensors[1:], 0.3, query_start=8)
    assert not any("flash" in name for name in sizes.operators)
    assert_equal(results(in_pieces((0, 5, 12)), tensors, 0.3), results(dense, tensors, 0.3))
