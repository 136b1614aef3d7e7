"""Every attention kernel against dense attention: on random bands, in parts that are merged, and with gradients by the final log-sum-exp.

Packages that need a GPU are replaced by what `magi_fake_packages` makes of their documentation; FlexAttention's backward, which PyTorch
refuses on CPUs, runs through its own autograd with that refusal taken away.
"""

from __future__ import annotations

import logging
import sys
import types
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from magi_fake_packages import FAKES, dense_backward, dense_forward
from magi_samples import any_mask, band_cells
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import flex_attention as torch_flex

from seqloom.errors import UserError
from seqloom.magi import choose
from seqloom.magi.bands import Band
from seqloom.magi.choose import KERNELS, by_speed, choose_kernel, in_many_pieces
from seqloom.magi.flex import BLOCK, block_cells, block_mask, intervals
from seqloom.magi.kernels import Final, Kernel, determinism, merge_
from seqloom.magi.varlen import calls
from seqloom.ops import installed
from seqloom.ops.kernel_rates import AttentionRate
from seqloom.ops.kernels import follow_plan

CPU = torch.device("cpu")
HEADS, KV_HEADS, DIM = 4, 2, 8
SCALE = 0.3
ALL = ("reference", "sdpa", "flash2", "flash3", "magi", "flex")
quick = settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict]]:
    """The packages are there, and note their calls; FlexAttention runs as plain Python with its backward."""
    noted: list[dict] = []
    for make in FAKES.values():
        fake = make(noted)
        parent, _, child = fake.__name__.rpartition(".")
        for part in (parent.partition(".")[0], parent):
            if part and part not in sys.modules:
                monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
        monkeypatch.setitem(sys.modules, fake.__name__, fake)
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    yield noted


def tensors(rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v and the gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, HEADS, DIM), (columns, KV_HEADS, DIM), (columns, KV_HEADS, DIM), (rows, HEADS, DIM)]
    return [torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for shape in shapes]


def cells(bands: list[Band], rows: int, columns: int) -> Tensor:
    found = np.zeros((rows, columns), bool)
    for band in bands:
        found |= band_cells(band, found.shape)
    return torch.from_numpy(found)


def in_two_parts(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, bands: list[Band], softcap: float) -> tuple[Tensor, ...]:
    """Output, log-sum-exp and gradients when the left half of the columns is one buffer and the right half another."""
    middle = len(k) // 2
    parts = []
    for first, last in ((0, middle), (middle, len(k))):
        cut = [band.cut(k_start=first, k_end=last) for band in bands]
        parts.append((slice(first, last), [band.shifted(0, -first) for band in cut if band is not None]))
    output, lse = torch.zeros_like(q), torch.full(q.shape[:2], float("-inf"), dtype=q.dtype)
    for columns, own in parts:
        merge_(output, lse, *kernel.forward(q, k[columns], v[columns], own, SCALE, softcap))
    delta = (grad * output).sum(-1)
    d_query, rest = torch.zeros_like(q), []
    for columns, own in parts:
        found = kernel.backward(Final(grad, q, k[columns], v[columns], output, lse, delta), own, SCALE, softcap)
        d_query += found[0]
        rest.append(found[1:])
    return output, lse, d_query, *(torch.cat(x) for x in zip(*rest, strict=True))


def close(got: Tensor, wanted: Tensor, limit: float) -> bool:
    return got.shape == wanted.shape and bool(torch.where(got == wanted, 0.0, (got - wanted).abs()).max() < limit)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@given(mask=any_mask, seed=st.integers(0, 100))
@quick
def test_a_kernel_gives_dense_attention_and_its_parts_add_up(log, name, softcap, mask, seed):
    if softcap and KERNELS[name].refusal(CPU, torch.float64, DIM, True) == "has no soft cap":
        return
    rows = columns = mask.total_seqlen_q
    q, k, v, grad = tensors(rows, columns, seed)
    allowed = torch.from_numpy(np.array(mask.dense()))
    output, lse = dense_forward(q, k, v, allowed, SCALE, softcap)
    wanted = (output, lse, *dense_backward(grad, q, k, v, output, lse, allowed, SCALE, softcap))
    got = in_two_parts(KERNELS[name], q, k, v, grad, list(mask.bands), softcap)
    assert all(close(one, other, 1e-10) for one, other in zip(got, wanted, strict=True))


@pytest.mark.parametrize("name", ALL)
def test_what_a_sink_adds_to_the_denominator_is_in_the_gradients_of_every_kernel(log, name):
    """The final log-sum-exp is larger than that of all keys together."""
    bands = [Band(0, 20, 0, 30, -100, 10), Band(20, 31, 3, 30, -100, 100)]
    q, k, v, grad = tensors(31, 30)
    allowed = cells(bands, 31, 30)
    output, lse = dense_forward(q, k, v, allowed, SCALE, 0.0)
    total = torch.logaddexp(lse, torch.randn(HEADS, dtype=torch.float64, generator=torch.Generator().manual_seed(4)))
    output = output * (lse - total).exp()[..., None]
    wanted = dense_backward(grad, q, k, v, output, total, allowed, SCALE, 0.0)
    got = KERNELS[name].backward(Final(grad, q, k, v, output, total, (grad * output).sum(-1)), bands, SCALE, 0.0)
    assert all(close(one, other, 1e-10) for one, other in zip(got, wanted, strict=True))


@pytest.mark.parametrize("name", ALL)
def test_half_precision_is_summed_in_fp32(log, name):
    bands = [Band(0, 40, 0, 40, -100, 0)]
    q, k, v, grad = tensors(40, 40, dtype=torch.bfloat16)
    exact = [x.double() for x in (q, k, v, grad)]
    output, lse = KERNELS[name].forward(q, k, v, bands, SCALE, 0.0)
    assert output.dtype == lse.dtype == torch.float32
    wanted = dense_forward(*exact[:3], cells(bands, 40, 40), SCALE, 0.0)
    assert close(output.double(), wanted[0], 0.02) and close(lse.double(), wanted[1], 0.02)
    kept = output.to(q.dtype)
    found = KERNELS[name].backward(Final(grad, q, k, v, kept, lse, (grad.float() * kept.float()).sum(-1)), bands, SCALE, 0.0)
    assert all(x.dtype == torch.float32 for x in found)
    wanted = dense_backward(exact[3], *exact[:3], *wanted, cells(bands, 40, 40), SCALE, 0.0)
    assert all(close(one.double(), other, 0.06) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", ALL)
def test_no_band_is_no_output(log, name):
    q, k, v, grad = tensors(5, 7)
    output, lse = KERNELS[name].forward(q, k, v, [], SCALE, 0.0)
    assert not output.any() and bool((lse == float("-inf")).all())
    found = KERNELS[name].backward(Final(grad, q, k, v, output, lse, (grad * output).sum(-1)), [], SCALE, 0.0)
    assert [x.shape for x in found] == [q.shape, k.shape, v.shape] and not any(x.any() for x in found)


# --- packed calls ----------------------------------------------------------------------------------------------------------------


def test_documents_are_one_call_of_a_package(log):
    bands = [Band(start, end, start, end, start - end, 0) for start, end in ((0, 10), (10, 25), (30, 33))]
    q, k, v, _ = tensors(33, 33)
    KERNELS["flash2"].forward(q, k, v, bands, SCALE, 0.0)
    assert log == [{"sequences": 3}]
    (call,) = calls(tuple(bands), CPU)
    assert call.causal and call.queries.index is not None and call.queries.longest == 15  # rows 25 to 29 are left out


def test_neighbouring_rows_are_not_copied():
    (call,) = calls((Band(3, 10, 3, 10, -9, 0), Band(10, 25, 10, 25, -20, 0)), CPU)
    assert call.queries.index is None and call.keys.index is None and (call.queries.start, call.queries.end) == (3, 25)
    assert call.queries.cu_seqlens.tolist() == [0, 7, 22]


@given(mask=any_mask)
@quick
def test_calls_cover_every_cell_once_and_no_row_twice_in_a_call(mask):
    times = np.zeros((mask.total_seqlen_q, mask.total_seqlen_k), int)
    for call in calls(mask.bands, CPU):
        for rows in (call.queries, call.keys):
            taken = rows.take(torch.arange(mask.total_seqlen_q)).tolist()
            assert len(set(taken)) == len(taken) == int(rows.cu_seqlens[-1])
        taken = [rows.take(torch.arange(mask.total_seqlen_q)).split(rows.cu_seqlens.diff().tolist()) for rows in (call.queries, call.keys)]
        for rows, columns in zip(*taken, strict=True):
            for i, row in enumerate(rows.tolist()):
                place = i + len(columns) - len(rows)
                low = 0 if call.left < 0 else max(0, place - call.left)
                high = len(columns) if call.right < 0 else min(len(columns), place + call.right + 1)
                times[row, columns[low:high].numpy()] += 1
    assert (times == mask.dense()).all()


# --- FlexAttention's mask --------------------------------------------------------------------------------------------------------


@given(mask=any_mask, block=st.sampled_from((4, 7)))
@quick
def test_block_masks_and_intervals_are_the_bands(mask, block):
    rows, columns = mask.total_seqlen_q, mask.total_seqlen_k
    dense = np.asarray(mask.dense())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("seqloom.magi.flex.BLOCK", block)
        counted = block_cells(mask.bands, rows, columns)
    padded = np.zeros((-(-rows // block) * block, -(-columns // block) * block), int)
    padded[:rows, :columns] = dense
    assert (counted == padded.reshape(-(-rows // block), block, -(-columns // block), block).sum((1, 3))).all()
    starts, ends = intervals(mask.bands, rows)
    column = np.arange(columns)
    assert (((starts[..., None] <= column) & (column < ends[..., None])).sum(0) == dense).all()
    assert len(starts) & (len(starts) - 1) == 0


def test_a_block_mask_lists_full_and_mixed_blocks():
    found = block_mask((Band(0, 4 * BLOCK, 0, 4 * BLOCK, -4 * BLOCK, 0),), 4 * BLOCK, 4 * BLOCK, CPU)
    assert found.kv_num_blocks.tolist() == [[[1, 1, 1, 1]]] and found.full_kv_num_blocks.tolist() == [[[0, 1, 2, 3]]]
    assert found.kv_indices[0, 0, :, 0].tolist() == [0, 1, 2, 3] and found.full_kv_indices[0, 0, 3, :3].tolist() == [0, 1, 2]
    assert found.sparsity() == pytest.approx(100 * 6 / 16)


@pytest.mark.parametrize("softcap", [0.0, 1.5])
def test_flex_over_blocks(log, softcap):
    """Longer than a block, lengths that no block divides; several intervals a row."""
    bands = [Band(0, 300, 0, 200, -300, 40), Band(10, 290, 230, 421, 150, 300), Band(295, 299, 300, 400, -500, 500)]
    q, k, v, grad = tensors(300, 421)
    allowed = cells(bands, 300, 421)
    output, lse = dense_forward(q, k, v, allowed, SCALE, softcap)
    wanted = (output, lse, *dense_backward(grad, q, k, v, output, lse, allowed, SCALE, softcap))
    got = in_two_parts(KERNELS["flex"], q, k, v, grad, bands, softcap)
    assert all(close(one, other, 1e-10) for one, other in zip(got, wanted, strict=True))


def test_compiled_flex_is_not_compiled_anew_for_every_mask():
    """What a GPU runs, up to code generation: one graph for all lengths and masks with as many intervals a row."""
    counter = CompileCounter()
    torch._dynamo.reset()
    run = torch.compile(torch_flex.flex_attention, dynamic=True, fullgraph=True, backend=counter)
    for rows in (300, 421, 512, 777, 900):
        q, k, v, _ = (x.transpose(0, 1).unsqueeze(0).contiguous().float() for x in tensors(rows, rows))
        mask = block_mask((Band(0, rows // 2, 0, rows, -rows, 0), Band(rows // 2, rows, 5, rows, -rows, 0)), rows, rows, CPU)
        run(q, k, v, None, mask, enable_gqa=True, return_aux=torch_flex.AuxRequest(lse=True))
    assert counter.frame_count <= 2
    torch._dynamo.reset()


def test_flex_differentiates_inside_an_operator_of_the_library(log):
    bands = [Band(0, 40, 0, 40, -40, 0)]
    q, k, v, grad = tensors(40, 40)
    output, lse = KERNELS["flex"].forward(q, k, v, bands, SCALE, 0.0)

    @torch.library.custom_op("seqloom_tests::flex_backward", mutates_args=())
    def inside(grad: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return KERNELS["flex"].backward(Final(grad, q, k, v, output, lse, (grad * output).sum(-1)), bands, SCALE, 0.0)[1].clone()

    allowed = cells(bands, 40, 40)
    wanted = dense_backward(grad, q, k, v, output, lse, allowed, SCALE, 0.0)[1]
    assert close(torch.ops.seqloom_tests.flex_backward(grad, q, k, v), wanted, 1e-10)


# --- the choice ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """What the choice sees of a GPU, with the capability that the list holds; PyTorch's fused kernels take half precision."""
    capability = [(9, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: capability[0])
    half = (torch.float16, torch.bfloat16)
    refusal = lambda device, dtype, head_dim, softcap: "has no soft cap" if softcap else None if dtype in half else "does not"  # noqa: E731
    monkeypatch.setattr(KERNELS["sdpa"], "refusal", refusal, raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "triton" or None)
    for cache in (choose_kernel, installed.refused_package):
        cache.cache_clear()
    yield capability
    for cache in (choose_kernel, installed.refused_package):
        cache.cache_clear()


CUDA = torch.device("cuda", 0)
HALF = torch.bfloat16


def test_a_gpu_with_all_packages_takes_the_fastest_that_fits(log, gpu):
    assert choose_kernel(None, CUDA, HALF, 128, False).name == "magi"
    assert choose_kernel(None, CUDA, HALF, 256, False).name == "flash3"
    gpu[0] = (8, 0)
    choose_kernel.cache_clear()
    assert choose_kernel(None, CUDA, HALF, 128, False).name == "flash2"
    assert choose_kernel(None, CUDA, HALF, 128, True).name == "flash2"
    assert choose_kernel(None, CUDA, torch.float32, 128, False).name == "flex"
    assert choose_kernel(None, CUDA, torch.float64, 128, False).name == "reference"


@pytest.mark.parametrize(
    ("times", "order"),
    [
        ({}, ["magi", "flash3", "flash2", "sdpa", "flex", "reference"]),
        ({"flash2": 10.2, "sdpa": 6.4, "flex": 11.6, "flash3": 5.7}, ["magi", "flash3", "sdpa", "flash2", "flex", "reference"]),
        ({"flash3": 9.0, "flex": 3.0}, ["magi", "flex", "flash2", "sdpa", "flash3", "reference"]),  # those without rates stay
        ({"flash2": 10.2, "sdpa": 10.2}, ["magi", "flash3", "flash2", "sdpa", "flex", "reference"]),
    ],
)
def test_kernels_with_rates_are_ordered_by_them(times, order):
    assert by_speed(list(KERNELS), times) == order


def test_the_choice_goes_by_the_rates_of_the_plan(log, gpu, monkeypatch):
    monkeypatch.setattr(choose, "kernel_for", lambda kind, among: "flash2")
    monkeypatch.setattr(KERNELS["magi"], "refusal", lambda *_: "is not here", raising=False)
    rates = {"flash2": AttentionRate(0.4, 0.3), "flash3": AttentionRate(0.7, 0.6), "flex": AttentionRate(0.8, 0.8)}
    with follow_plan("flash2", rates, "mine.json"):
        assert choose.times_of(("flash3", "sdpa", "reference"), CUDA, HALF, 128) == {
            "flash3": rates["flash3"].time,
            "sdpa": rates["flash2"].time,
        }
        assert choose_kernel(None, CUDA, HALF, 128, False).name == "flex"
    choose_kernel.cache_clear()
    assert choose_kernel(None, CUDA, HALF, 128, False).name == "flash3"


def test_a_gpu_without_packages_takes_pytorch(gpu):
    assert choose_kernel(None, CUDA, HALF, 128, False).name == "sdpa"
    assert choose_kernel(None, CUDA, HALF, 128, False, many=True).name == "flex"
    assert choose_kernel(None, CUDA, HALF, 128, True).name == "flex"


def test_a_cpu_takes_fused_attention_and_says_so(caplog):
    choose_kernel.cache_clear()
    with caplog.at_level(logging.INFO, logger=choose.__name__):
        assert choose_kernel(None, CPU, torch.float64, 8, False).name == "sdpa"
        assert choose_kernel(None, CPU, torch.float64, 8, True).name == "reference"
        choose_kernel(None, CPU, torch.float64, 8, False)
    assert caplog.messages == [
        "magi attention on cpu, torch.float64, head size 8: kernel 'sdpa'",
        "magi attention on cpu, torch.float64, head size 8 with a soft cap: kernel 'reference'",
    ]


@pytest.mark.parametrize(
    ("name", "device", "dtype", "head_dim", "softcap", "words"),
    [
        ("flash9", CPU, HALF, 64, False, "no attention kernel 'flash9': use one of magi, flash3, flash2, sdpa, flex, reference"),
        ("flex", CPU, HALF, 64, False, "kernel 'flex' needs a GPU, not cpu"),
        ("flash2", CPU, HALF, 64, False, "kernel 'flash2' needs an NVIDIA GPU, not cpu"),
        ("flash2", CUDA, HALF, 64, False, "kernel 'flash2' needs flash_attn 2.7 or later, which cannot be imported"),
        ("flash3", CUDA, HALF, 64, False, "kernel 'flash3' needs FlashAttention 3"),
        ("magi", CUDA, HALF, 64, False, "kernel 'magi' needs magi_attention 1.1, which cannot be imported"),
        ("magi", CUDA, HALF, 96, False, "kernel 'magi' takes head sizes 64 and 128, not 96"),
        ("flash2", CUDA, torch.float32, 64, False, "kernel 'flash2' takes float16 and bfloat16, not float32"),
        ("flash2", CUDA, HALF, 260, False, "takes head sizes that are multiples of 8 up to 256, not 260"),
        ("flex", CUDA, torch.float64, 64, False, "takes float16, bfloat16 and float32, not float64"),
        ("flex", CUDA, HALF, 8, False, "takes head sizes from 16 on, not 8"),
        ("sdpa", CUDA, HALF, 64, True, "kernel 'sdpa' has no soft cap"),
    ],
)
def test_a_kernel_that_cannot_run_is_one_sentence(gpu, name, device, dtype, head_dim, softcap, words):
    with pytest.raises(UserError) as caught:
        choose_kernel(name, device, dtype, head_dim, softcap)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_gpus_of_another_generation_and_packages_of_another_release(log, gpu, monkeypatch):
    gpu[0] = (10, 0)
    with pytest.raises(UserError, match="needs compute capability 9.0 or more and below 10.0, and this GPU has 10.0"):
        choose_kernel("flash3", CUDA, HALF, 128, False)
    gpu[0] = (7, 5)
    with pytest.raises(UserError, match="needs compute capability 8.0 or more, and this GPU has 7.5"):
        choose_kernel("flash2", CUDA, HALF, 128, False)
    gpu[0] = (9, 0)
    old = types.ModuleType("flash_attn.flash_attn_interface")
    old._flash_attn_varlen_forward = lambda q, k, v, window_size: None
    monkeypatch.setitem(sys.modules, old.__name__, old)
    installed.refused_package.cache_clear()
    with pytest.raises(UserError, match="needs flash_attn 2.7 or later, and the installed flash_attn has another interface"):
        choose_kernel("flash2", CUDA, HALF, 128, False)


def test_masks_of_many_pieces():
    window = [Band(0, 2000, 0, 2000, -9, 0)]
    assert in_many_pieces(window) and not in_many_pieces([Band(0, 2000, 0, 2000, -2000, 0)])


# --- determinism -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flash2", "flash3", "magi"])
def test_packages_are_told_to_add_in_one_order(log, name):
    bands = [Band(0, 20, 0, 20, -20, 0)]
    q, k, v, grad = tensors(20, 20)
    for wanted in (False, True):
        log.clear()
        with determinism(wanted):
            output, lse = KERNELS[name].forward(q, k, v, bands, SCALE, 0.0)
            KERNELS[name].backward(Final(grad, q, k, v, output, lse, (grad * output).sum(-1)), bands, SCALE, 0.0)
        assert log[-1]["deterministic"] is wanted


def test_pytorch_is_set_as_before():
    assert not torch.are_deterministic_algorithms_enabled()
    with determinism(True):
        assert torch.are_deterministic_algorithms_enabled()
        with determinism(False):
            assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    with determinism(True):
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)


def test_a_deterministic_reference_on_a_gpu_needs_the_setting_of_its_library(gpu, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with pytest.raises(UserError, match="start with CUBLAS_WORKSPACE_CONFIG=:4096:8"):
        choose_kernel("reference", CUDA, HALF, 128, False, deterministic=True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    assert choose_kernel("reference", CUDA, HALF, 128, False, deterministic=True).name == "reference"
