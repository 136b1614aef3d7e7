"""The chunked loss: exact against the plain one, small in memory, and at home wherever a program runs it."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensor_sizes import TensorSizes
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from chunk_linear_cross_entropy import chunk_linear_cross_entropy
from custom_ops import chunk_softmax
from custom_ops.chunk_softmax import use_path
from seqloom.errors import UserError
from seqloom.graph import Ref
from seqloom.ops.check import check_op
from seqloom.ops.flops import matmul_side, workspace_bytes
from seqloom.ops.registry import choices_of, resolve

torch.set_num_threads(1)
PAD = -100


def plain(hidden_states, weight, labels, padding_idx):
    logits = hidden_states @ weight.t()
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=padding_idx)


def make(b, length, d, n, dtype=torch.float64, seed=0, padding_idx=PAD):
    generator = torch.Generator().manual_seed(seed)
    hidden_states = torch.randn(b, length, d, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(n, d, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, n, (b, length), generator=generator)
    labels[torch.rand(b, length, generator=generator) < 0.3] = padding_idx
    return hidden_states, weight, labels


def results(loss_fn, hidden_states, weight, *rest):
    losses = loss_fn(hidden_states, weight, *rest)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(losses.shape, dtype=torch.float64, generator=generator).to(losses.dtype)
    return losses, *torch.autograd.grad((losses * weights).sum(), (hidden_states, weight))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 13), st.integers(1, 5), st.integers(1, 9), st.integers(1, 20), st.integers(0, 9))
def test_equals_the_plain_loss(b, length, d, n, chunk_size, seed):
    hidden_states, weight, labels = make(b, length, d, n, seed=seed)
    expected = results(plain, hidden_states, weight, labels, PAD)
    found = results(chunk_linear_cross_entropy, hidden_states, weight, labels, PAD, chunk_size)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert (found[0][labels == PAD] == 0).all()


def test_gradcheck():
    hidden_states, weight, labels = make(2, 5, 3, 7)
    assert torch.autograd.gradcheck(lambda h, w: chunk_linear_cross_entropy(h, w, labels, PAD, 4), (hidden_states, weight))


@pytest.mark.parametrize("padding_idx", [0, 3, PAD])
def test_padding_may_be_a_class(padding_idx):
    hidden_states, weight, labels = make(2, 6, 4, 5, padding_idx=padding_idx)
    expected = results(plain, hidden_states, weight, labels, padding_idx)
    torch.testing.assert_close(results(chunk_linear_cross_entropy, hidden_states, weight, labels, padding_idx, 4), expected)


def test_all_positions_padded():
    hidden_states, weight, labels = make(1, 5, 4, 6)
    losses, d_hidden, d_weight = results(chunk_linear_cross_entropy, hidden_states, weight, torch.full_like(labels, PAD), PAD)
    assert not losses.any() and not d_hidden.any() and not d_weight.any()


def test_large_logits_do_not_overflow():
    hidden_states, weight, labels = make(1, 6, 4, 5, dtype=torch.float32)
    big = (hidden_states.detach() * 1e4).requires_grad_()
    found = results(chunk_linear_cross_entropy, big, weight, labels, PAD, 4)
    assert all(x.isfinite().all() for x in found)
    torch.testing.assert_close(found, results(plain, big, weight, labels, PAD))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(dtype):
    """Half precision gives fp32 losses, no worse than the same inputs in fp64 up to the rounding of logits and gradients."""
    hidden_states, weight, labels = make(2, 32, 16, 50, dtype=dtype)
    losses, d_hidden, d_weight = results(chunk_linear_cross_entropy, hidden_states, weight, labels, PAD, 5)
    assert losses.dtype == torch.float32 and d_hidden.dtype == d_weight.dtype == dtype
    exact = results(plain, hidden_states.detach().double().requires_grad_(), weight.detach().double().requires_grad_(), labels, PAD)
    tolerance = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float32: 1e-5}[dtype]
    for found, expected in zip((losses, d_hidden, d_weight), exact, strict=True):
        assert (found.double() - expected).norm() <= tolerance * expected.norm()


def test_weight_gradient_of_many_chunks_keeps_small_terms():
    """256 chunks in bf16: a sum carried in bf16 would stall at 256 times its smallest term."""
    hidden_states = torch.full((1, 1024, 1), 1.0, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    chunk_linear_cross_entropy(hidden_states, weight, torch.zeros(1, 1024, dtype=torch.long), PAD, 1).sum().backward()
    assert weight.grad.tolist() == [[-512.0], [512.0]]


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
def test_only_wanted_gradients(wanted):
    hidden_states, weight, labels = make(2, 6, 4, 5)
    hidden_states, weight = (x.detach().requires_grad_(w) for x, w in zip((hidden_states, weight), wanted, strict=True))
    losses = chunk_linear_cross_entropy(hidden_states, weight, labels, PAD, 4)
    assert losses.requires_grad == any(wanted)
    if any(wanted):
        losses.sum().backward()
    assert [x.grad is not None for x in (hidden_states, weight)] == list(wanted)


def test_strided_inputs():
    hidden_states, weight, labels = make(3, 4, 5, 6)
    swapped = hidden_states.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    assert not swapped.is_contiguous()
    found = results(chunk_linear_cross_entropy, swapped, weight, labels.t().contiguous().t(), PAD, 4)
    torch.testing.assert_close(found, results(plain, hidden_states, weight, labels, PAD))


@pytest.mark.parametrize("chunk_size", [0, -3])
def test_bad_chunk_size(chunk_size):
    with pytest.raises(UserError, match=f"chunk_size={chunk_size} leaves no tokens"):
        chunk_linear_cross_entropy(*make(1, 2, 3, 4), PAD, chunk_size)


# --- memory ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_is_larger_than_a_chunk_of_logits(dtype):
    n, chunk_size = 500, 16
    hidden_states, weight, labels = make(1, 200, 4, n, dtype=dtype)
    with TensorSizes() as sizes:
        chunk_linear_cross_entropy(hidden_states, weight, labels, PAD, chunk_size).sum().backward()
    assert sizes.largest == chunk_size * n
    with TensorSizes() as whole:
        plain(hidden_states, weight, labels, PAD).sum().backward()
    assert whole.largest == 200 * n


def test_workspace_hint():
    """Ten bytes per logit of a chunk, and the weight gradient in fp32 beside its product in half precision."""
    name = "chunk_linear_cross_entropy:chunk_linear_cross_entropy"
    args, sizes = (Ref("h"), Ref("w"), Ref("y")), {"b": 1, "l": 200, "d": 4, "n": 500}
    assert workspace_bytes(name, args, {"padding_idx": PAD, "chunk_size": 16}, sizes) == 8 * 16 * 500 + 4 * 500 * 4
    assert workspace_bytes(name, args, {"padding_idx": PAD}, sizes) == 8 * 200 * 500 + 4 * 500 * 4
    assert workspace_bytes("aten.add.Tensor", args, {}, sizes) == 0


def test_backward_keeps_inputs_and_one_number_per_token():
    hidden_states, weight, labels = make(2, 30, 4, 50)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        chunk_linear_cross_entropy(hidden_states, weight, labels, PAD, 7)
    assert sorted(x.numel() for x in kept) == sorted([hidden_states.numel(), weight.numel(), labels.numel(), labels.numel()])


# --- where programs run it ---------------------------------------------------------------------------------------------------


def test_fake_and_meta_tensors():
    """The dry run at the full size of Llama3-8B at 128K tokens: shapes only."""
    with FakeTensorMode():
        hidden_states = torch.empty(1, 131072, 4096, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(128256, 4096, dtype=torch.bfloat16, requires_grad=True)
        losses = chunk_linear_cross_entropy(hidden_states, weight, torch.empty(1, 131072, dtype=torch.long), PAD, 16384)
        losses.sum().backward()
        assert losses.shape == (1, 131072) and losses.dtype == torch.float32
        assert hidden_states.grad.shape == hidden_states.shape and weight.grad.dtype == torch.bfloat16
    with torch.device("meta"):
        h, w = torch.empty(1, 9, 4, requires_grad=True), torch.empty(5, 4)
        chunk_linear_cross_entropy(h, w, torch.empty(1, 9, dtype=torch.long), PAD, 4).sum().backward()
    assert h.grad.is_meta


def test_compiles_without_a_graph_break():
    hidden_states, weight, labels = make(1, 9, 4, 6)
    expected = results(chunk_linear_cross_entropy, hidden_states, weight, labels, PAD, 4)
    compiled = torch.compile(lambda h, w, y: chunk_linear_cross_entropy(h, w, y, PAD, 4), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(results(compiled, hidden_states, weight, labels), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_activation_checkpointing(reentrant):
    hidden_states, weight, labels = make(2, 9, 4, 6)
    expected = results(chunk_linear_cross_entropy, hidden_states, weight, labels, PAD, 4)
    wrapped = lambda h, w, y: checkpoint(chunk_linear_cross_entropy, h, w, y, PAD, 4, use_reentrant=reentrant)  # noqa: E731
    if reentrant:
        losses = wrapped(hidden_states, weight, labels)
        generator = torch.Generator().manual_seed(1)
        (losses * torch.randn(losses.shape, dtype=torch.float64, generator=generator)).sum().backward()
        torch.testing.assert_close((losses, hidden_states.grad, weight.grad), expected)
    else:
        torch.testing.assert_close(results(wrapped, hidden_states, weight, labels), expected)


def test_registration():
    entry = resolve("chunk_linear_cross_entropy:chunk_linear_cross_entropy")
    assert str(entry.annotation) == "b l d^, n^ d^, b l -> b l"
    for dtype, out in ((torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)):
        assert entry.output_dtype([dtype, dtype, torch.int64]) == out
    assert check_op(entry.name, args={"padding_idx": 2, "chunk_size": 3}).ok


def test_the_chunk_is_the_planners_to_choose():
    """Larger chunks make larger products and need more memory; the result stays."""
    name, args = "chunk_linear_cross_entropy:chunk_linear_cross_entropy", (Ref("h"), Ref("w"), Ref("y"))
    choices = choices_of(name)["chunk_size"]
    assert list(choices_of(name)) == ["chunk_size"] and choices == (512, 1024, 2048, 4096, 8192)
    sizes = {"b": 1, "l": 16384, "d": 4096, "n": 128256}
    kwargs = [{"padding_idx": PAD, "chunk_size": chunk} for chunk in choices]
    assert [matmul_side(name, args, k, sizes) for k in kwargs] == [512, 1024, 2048, 4096, 4096]
    assert [matmul_side(name, args, k, {**sizes, "l": 700, "b": 2}) for k in kwargs] == [512, 1024, 1400, 1400, 1400]
    assert matmul_side(name, args, {"padding_idx": PAD}, {**sizes, "n": 300}) == 300
    needed = [workspace_bytes(name, args, k, sizes) for k in kwargs]
    assert needed == sorted(set(needed))
    assert needed[1] - needed[0] == 2 * 512 * 128256  # there the gradient of the weight is the larger part


def test_every_choice_computes_the_same():
    hidden_states, weight, labels = make(1, 9000, 2, 5)
    expected = results(plain, hidden_states, weight, labels, PAD)
    for chunk in choices_of("chunk_linear_cross_entropy:chunk_linear_cross_entropy")["chunk_size"]:
        torch.testing.assert_close(results(chunk_linear_cross_entropy, hidden_states, weight, labels, PAD, chunk), expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_the_compiled_path_computes_the_same(dtype, tolerance):
    """Also where a label is padding, where padding is a class, and in a last chunk of another size."""
    torch._dynamo.reset()
    for padding_idx in (PAD, 3):
        hidden_states, weight, labels = make(2, 9, 8, 40, dtype, padding_idx=padding_idx)
        expected = results(chunk_linear_cross_entropy, hidden_states, weight, labels, padding_idx, 5)
        with use_path("compiled"):
            found = results(chunk_linear_cross_entropy, hidden_states, weight, labels, padding_idx, 5)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_the_faster_path_is_taken_on_a_gpu_and_told(monkeypatch, caplog):
    logits = SimpleNamespace(is_cuda=True, device=torch.device("cpu"), dtype=torch.float32, shape=(4, 6))
    seconds = {"plain": 2e-3, "compiled": 1e-3}
    monkeypatch.setattr(chunk_softmax, "_seconds", lambda logits, path: seconds[path])
    with caplog.at_level("INFO"):
        assert chunk_softmax.path_of(logits) == "compiled"
    assert caplog.messages == ["loss head, 4 x 6 logits a chunk on cpu: path 'compiled' (plain 2.00 ms, compiled 1.00 ms)"]
    seconds["plain"] = 0.0
    assert chunk_softmax.path_of(logits) == "compiled"  # measured once
    torch.use_deterministic_algorithms(True)
    try:
        assert chunk_softmax.path_of(logits) == "plain"
    finally:
        torch.use_deterministic_algorithms(False)


def test_without_a_compiler_the_loss_says_so_and_goes_on(monkeypatch, caplog):
    def fails(logits, path):
        if path == "compiled":
            raise RuntimeError("no Triton here\nand more")
        return 1.0

    monkeypatch.setattr(chunk_softmax, "_seconds", fails)
    assert chunk_softmax.path_of(SimpleNamespace(is_cuda=True, device=torch.device("cpu"), dtype=torch.float32, shape=(2, 3))) == "plain"
    assert "path 'plain', which is slow, as torch.compile fails (no Triton here)" in caplog.text


def test_the_path_that_is_asked_for_is_taken_in_threads_too():
    """On a GPU the backward pass runs in a thread of autograd."""
    with use_path("compiled"), ThreadPoolExecutor(1) as pool:
        assert pool.submit(chunk_softmax.path_of, torch.ones(2, 3)).result() == "compiled"
    assert chunk_softmax.path_of(torch.ones(2, 3)) == "plain"
