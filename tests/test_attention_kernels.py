"""Which kernel plain attention runs with: the choice, what is said of it, how one is asked for; every kernel by its conventions."""

from __future__ import annotations

import logging
import sys
import types
from collections.abc import Callable, Iterator

import pytest
import torch
from magi_fake_packages import dense_backward, dense_forward
from tensor_sizes import TensorSizes
from test_attention import dense, make, results
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from seqloom.errors import UserError
from seqloom.ops import fused, installed, kernels
from seqloom.ops.attention import attention
from seqloom.ops.kernel_rates import AttentionRate, device_rates
from seqloom.ops.kernels import KERNELS, Kernel, Kind, Wish, choose, follow_plan, kernel_for, use_kernel
from seqloom.ops.packages import PACKAGES, package_attention

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
HALF = torch.bfloat16
KIND = Kind(CUDA, HALF, 128, True)
H100 = {
    "cudnn": AttentionRate(0.6067, 0.5207),
    "flash3": AttentionRate(0.6876, 0.5935),
    "flex": AttentionRate(0.3953, 0.274),
    "flash2": AttentionRate(0.3701, 0.3337),
}


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No plan, no wish and no earlier choice, before and after."""
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    caches = (kernels._decided, kernels._rates_of, installed.refused_package)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Says which kernels are present on a GPU."""

    def only(*names: str) -> None:
        why = refusals(*names)
        found = {name: Kernel(lambda kind, name=name: why[name], kernel.grouped) for name, kernel in KERNELS.items()}
        monkeypatch.setattr(kernels, "KERNELS", found)
        monkeypatch.setattr(fused, "KERNELS", kernels.KERNELS)

    return only


def refusals(*present: str) -> dict[str, str | None]:
    return {name: None if name in present else "is not here" for name in KERNELS}


# --- the choice ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("present", "wish", "chosen"),
    [
        (("cudnn", "flash2", "efficient"), Wish(), "cudnn"),
        (("flash3", "cudnn", "flash2"), Wish(), "flash3"),
        (("flash4", "cudnn", "flash2"), Wish(), "flash4"),
        (("efficient",), Wish(), "efficient"),
        (("flash",), Wish(), "flash"),
        ((), Wish(), None),
        (("cudnn", "flash2"), Wish(rates=tuple(H100.items())), "cudnn"),
        (("cudnn", "flash2", "flash3"), Wish(rates=tuple(H100.items())), "flash3"),
        (("flash2", "efficient"), Wish(rates=tuple(H100.items())), "flash2"),
        (("cudnn", "flash2"), Wish(rates=(("flash2", H100["flash2"]),)), "flash2"),  # one without rates comes after those with
        (("flash4", "cudnn"), Wish(rates=tuple(H100.items())), "cudnn"),
        (("cudnn", "flash2"), Wish(rates=(("cudnn", AttentionRate(0.9, 0.1)), ("flash2", AttentionRate(0.4, 0.4)))), "flash2"),
        (("cudnn", "flash3"), Wish(planned="cudnn", rates=tuple(H100.items())), "cudnn"),
        (("cudnn", "flash2"), Wish(planned="flash3", rates=tuple(H100.items())), "cudnn"),
        (("cudnn", "flash2"), Wish(planned="flex", rates=tuple(H100.items())), "cudnn"),
        (("cudnn", "flash2"), Wish(asked="flash2", planned="cudnn", rates=tuple(H100.items())), "flash2"),
    ],
)
def test_the_choice(present, wish, chosen):
    assert choose(KIND, wish, refusals(*present)).kernel == chosen


WHERE = "attention on cuda, bfloat16, head size 128, grouped heads: "


@pytest.mark.parametrize(
    ("present", "wish", "sentence", "warning"),
    [
        (("cudnn",), {}, "kernel 'cudnn', the first of those that are here", False),
        (("cudnn", "flash2"), {"rates": H100}, "kernel 'cudnn', the fastest here by the rates of h100-80gb", False),
        (("cudnn", "flash2"), {"planned": "cudnn", "rates": H100}, "kernel 'cudnn', which the plan is for", False),
        (
            ("cudnn", "flash3"),
            {"planned": "cudnn", "rates": H100},
            "kernel 'cudnn', which the plan is for; 'flash3' is here too and takes 0.88 of its time: plan for it with "
            "--attention_kernel flash3",
            False,
        ),
        (
            ("cudnn", "flash2"),
            {"planned": "flash3", "rates": H100},
            "the plan is for kernel 'flash3', which is not here; kernel 'cudnn' runs instead and takes 1.14 times as long by the rates of "
            "h100-80gb",
            True,
        ),
        (
            ("flash4",),
            {"planned": "flash3", "rates": H100},
            "the plan is for kernel 'flash3', which is not here; kernel 'flash4' runs instead, and h100-80gb has no rates to compare them",
            True,
        ),
        (
            ("cudnn",),
            {"planned": "flex", "rates": H100},
            "the plan is for kernel 'flex', which does not run plain attention; kernel 'cudnn' runs instead and takes 0.55 times as long "
            "by the rates of h100-80gb",
            True,
        ),
        ((), {}, "no fused kernel takes these tensors, so the slower explicit path runs", True),
    ],
)
def test_what_is_said(present, wish, sentence, warning):
    rates = wish.pop("rates", {})
    choice = choose(KIND, Wish(**wish, rates=tuple(rates.items()), source="h100-80gb" if rates else ""), refusals(*present))
    assert (choice.sentence, choice.warning) == (WHERE + sentence, warning)


def test_a_cpu_never_warns():
    assert not choose(Kind(CPU, HALF, 64, False), Wish(planned="cudnn", rates=tuple(H100.items())), refusals("flash")).warning


def test_it_is_said_once_a_kind_and_by_rank_0(here, caplog, monkeypatch):
    here("cudnn", "flash2")
    with follow_plan("flash3", H100, "the plan's hardware"), caplog.at_level(logging.INFO, logger=kernels.__name__):
        for head_size in (64, 128, 64):
            assert kernel_for(Kind(CUDA, HALF, head_size, False)) == "cudnn"
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    said = "the plan is for kernel 'flash3', which is not here; kernel 'cudnn' runs instead and takes 1.14 times as long by the rates of "
    assert caplog.messages == [f"attention on cuda, bfloat16, head size {size}: {said}the plan's hardware" for size in (64, 128)]
    caplog.clear()
    monkeypatch.setattr(kernels.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(kernels.dist, "get_rank", lambda: 1)
    kernel_for(Kind(CUDA, HALF, 32, False))
    assert not caplog.records


# --- rates -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "file"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-80gb"),
        ("NVIDIA H100 PCIe", "h100-80gb"),
        ("NVIDIA H200", "h200-141gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA B200", "b200-180gb"),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_a_device_finds_its_file(device, file):
    found = device_rates(device, HALF)
    assert (found and found[0]) == file
    if file == "h100-80gb":
        assert found[1] == H100


def test_rates_of_the_device_are_used_where_no_plan_gives_any(here, monkeypatch):
    here("cudnn", "flash2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    assert kernel_for(KIND) == "flash2"  # the only one with rates
    with follow_plan(None, H100, "mine.json"):
        assert kernel_for(KIND) == "cudnn"
        assert kernels.known_rates(CUDA, HALF) == H100
    assert kernel_for(KIND) == "flash2"


def test_time_is_that_of_both_passes():
    assert AttentionRate(0.5, 0.25).time == 2 + 10


# --- asking for one --------------------------------------------------------------------------------------------------------------


def test_a_kernel_is_asked_for_inside_a_context(here):
    here("cudnn", "flash2")
    with use_kernel("flash2"):
        assert kernel_for(KIND) == "flash2"
        with use_kernel(None):
            assert kernel_for(KIND) == "cudnn"
        assert kernel_for(KIND) == "flash2"
    assert kernel_for(KIND) == "cudnn"


def test_the_environment_asks_and_the_context_wins(here, monkeypatch):
    here("cudnn", "flash2", "efficient")
    monkeypatch.setenv(kernels.VARIABLE, "flash2")
    assert kernel_for(KIND) == "flash2"
    with use_kernel("efficient"):
        assert kernel_for(KIND) == "efficient"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("flash9", "there is no attention kernel 'flash9': use one of flash3, flash4, cudnn, flash2, efficient, flash"),
        ("cudnn", "kernel 'cudnn' needs a GPU, not cpu; ask for another, or for none"),
        ("flash2", "kernel 'flash2' needs a GPU, not cpu; ask for another, or for none"),
        ("flash3", "kernel 'flash3' needs an NVIDIA GPU, not cpu; ask for another, or for none"),
    ],
)
def test_a_kernel_that_cannot_run_is_one_sentence(name, words, monkeypatch):
    tensors = make(1, 1, 1, 4, 4, 8)
    with pytest.raises(UserError) as caught, use_kernel(name):
        attention(*tensors, 0.3)
    assert str(caught.value) == f"use_kernel({name!r}): {words}"
    monkeypatch.setenv(kernels.VARIABLE, name)
    with pytest.raises(UserError) as caught:
        attention(*tensors, 0.3)
    assert str(caught.value) == f"{kernels.VARIABLE}={name}: {words}"


def test_among_leaves_out_wishes_for_others(here):
    here("cudnn", "flash2", "efficient")
    with follow_plan("cudnn", H100, "mine.json"), use_kernel("cudnn"):
        assert kernel_for(KIND, kernels.ANY_SHAPE) == "flash2"


# --- what refuses ----------------------------------------------------------------------------------------------------------------


def package(name: str, **functions: object) -> types.ModuleType:
    found = types.ModuleType(name)
    vars(found).update(functions)
    return found


def put(monkeypatch: pytest.MonkeyPatch, module: types.ModuleType) -> None:
    for end in range(1, module.__name__.count(".") + 1):
        parent = ".".join(module.__name__.split(".")[:end])
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.parametrize(
    ("name", "capability", "kind", "words"),
    [
        ("flash3", (10, 0), KIND, "needs compute capability 9.0 or more and below 10.0, and this GPU has 10.0"),
        ("flash3", (9, 0), KIND._replace(dtype=torch.float32), "takes float16 and bfloat16, not float32"),
        ("flash3", (9, 0), KIND._replace(head_size=512), "takes head sizes that are multiples of 8 up to 256, not 512"),
        ("flash3", (9, 0), KIND, "needs FlashAttention 3 (flash_attn_interface), which cannot be imported"),
        ("flash4", (8, 0), KIND, "needs compute capability 9.0 or more and below 12.0, and this GPU has 8.0"),
        ("flash4", (10, 0), KIND._replace(head_size=256), "takes head sizes that are multiples of 8 up to 128, not 256"),
        ("flash4", (10, 0), KIND, "needs FlashAttention 4 (flash_attn.cute), which cannot be imported"),
        ("flash", (9, 0), KIND, "needs a CPU, not cuda"),
    ],
)
def test_refusals(name, capability, kind, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: capability)
    assert KERNELS[name].refusal(kind).startswith(words)


def test_packages_of_another_release_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (9, 0))
    old = package(kernels.PACKAGE_3, _flash_attn_forward=lambda q, window_size_left: None, _flash_attn_backward=lambda q, causal: None)
    put(monkeypatch, old)
    assert KERNELS["flash3"].refusal(KIND).endswith("and the installed flash_attn_interface has another interface")
    put(monkeypatch, package(kernels.PACKAGE_4, _flash_attn_fwd=lambda q, k, v, return_lse: None))
    assert KERNELS["flash4"].refusal(KIND).endswith("and the installed flash_attn has another interface")


@pytest.mark.parametrize(
    ("mask", "takers"),
    [({"window": True}, {"flash3", "flash4", "flash2"}), ({"softcap": True}, {"flash3"}), ({}, {*KERNELS})],
    ids=["window", "softcap", "none"],
)
def test_masks_that_a_kernel_lacks_refuse_it(mask, takers):
    kind = KIND._replace(**mask)
    lacking = {name for name, kernel in KERNELS.items() if Kernel(lambda _: None, True, kernel.window, kernel.softcap).refusal(kind)}
    assert lacking == {*KERNELS} - takers
    with pytest.raises(UserError, match="use_kernel\\('flash'\\): kernel 'flash' has no sliding window"), use_kernel("flash"):
        attention(*make(1, 1, 1, 8, 8, 8), 0.3, window=2)


def test_a_plan_for_a_kernel_without_windows_is_warned_of(here):
    here("cudnn", "flash2")
    found = {name: Kernel(kernel.refuses, kernel.grouped, KERNELS[name].window) for name, kernel in kernels.KERNELS.items()}
    choice = choose(
        KIND._replace(window=True), Wish(planned="cudnn"), {name: k.refusal(KIND._replace(window=True)) for name, k in found.items()}
    )
    assert choice.kernel == "flash2" and choice.warning
    assert "grouped heads, sliding window: the plan is for kernel 'cudnn', which has no sliding window; kernel 'flash2'" in choice.sentence


@pytest.mark.parametrize(("name", "shared"), [("cudnn", True), ("flash2", True), ("efficient", False)])
def test_pytorch_is_asked_with_small_tensors_of_the_kind(name, shared, monkeypatch):
    asked, empty = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, device, **rest: asked.append((shape, device, rest)) or empty(*shape, **rest))
    monkeypatch.setattr(kernels, "SDPAParams", lambda *found: found)
    refusal = kernels._by_pytorch(lambda found: asked.append(found[3:]) or False, shared)
    assert refusal(KIND) == "does not take bfloat16 with head size 128: so says PyTorch"
    options = {"dtype": HALF, "requires_grad": True}
    assert asked == [((1, 2, 64, 128), CUDA, options), ((1, 1 if shared else 2, 64, 128), CUDA, options), (None, 0.0, True, shared)]
    assert KERNELS[name].grouped is shared
    assert refusal(KIND._replace(deterministic=True)).endswith("head size 128 in one order of sums: so says PyTorch")


def test_pytorchs_questions_are_real():
    """The checks take these parameters in this PyTorch; without a GPU they say no."""
    params = kernels.SDPAParams(*[torch.empty(1, 2, 64, 64, requires_grad=True)] * 3, None, 0.0, True, False)
    for ask in (kernels.can_use_cudnn_attention, kernels.can_use_flash_attention, kernels.can_use_efficient_attention):
        assert isinstance(ask(params), bool)


# --- what runs -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("heads", [(2, 1), (2, 3)], ids=str)
@pytest.mark.parametrize(("start", "options"), [(0, {}), (0, {"causal": False}), (5, {})], ids=str)
def test_parity_on_a_cpu(dtype, heads, start, options):
    query, key, value = make(2, *heads, 12, 12, 8, dtype=dtype)
    rows = query[:, :, start:].detach().requires_grad_()
    found = results(lambda q, k, v: attention(q, k, v, 0.3, query_start=start, **options), [rows, key, value])
    exact = [x.detach().double().requires_grad_() for x in (query, key, value)]
    expected = results(lambda q, k, v: dense(q, k, v, 0.3, **options)[:, :, start:], exact)
    expected = (expected[0], expected[1][:, :, start:], *expected[2:])
    tolerance = 1e-5 if dtype == torch.float32 else 1e-11
    for mine, its in zip(found, expected, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), its, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"query_start": 4}], ids=str)
def test_compiles_whole_with_the_kernel_as_a_constant(options):
    tensors = make(1, 2, 2, 8, 12, 8)
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, k, v: attention(q, k, v, 0.3, **options), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(results(compiled, tensors), results(lambda *x: attention(*x, 0.3, **options), tensors))


def test_without_a_fused_kernel_the_explicit_path_runs_and_holds_no_square_matrix(monkeypatch):
    monkeypatch.setattr(fused, "_kernel_name", lambda *_: None)
    tensors = make(2, 2, 2, 12, 12, 8)
    for options in ({}, {"causal": False}):
        with TensorSizes() as sizes:
            found = results(attention, tensors, 0.3, **options)
        assert not any("flash" in name for name in sizes.operators)
        torch.testing.assert_close(found, results(dense, tensors, 0.3, **options))


SDPA = {
    "cudnn": "aten._scaled_dot_product_cudnn_attention.default",
    "flash2": "aten._scaled_dot_product_flash_attention.default",
    "efficient": "aten._scaled_dot_product_efficient_attention.default",
}


COPIES = {"aten.clone.default", "aten.copy_.default", "aten._to_copy.default", "aten.repeat_interleave.self_int", "aten.cat.default"}


class Names(TorchDispatchMode):
    """The operators that run, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))

    @property
    def calls(self) -> list[str]:
        return [name for name in self.names if "attention" in name or name.startswith("seqloom")]


def as_models_pass_it(heads: int, length: int, device: str) -> Tensor:
    return torch.empty(1, length, heads, 64, dtype=HALF, device=device).transpose(1, 2)


def side_by_side(heads: int, length: int, device: str) -> Tensor:
    return torch.empty(1, heads, length, 64, dtype=HALF, device=device)


@pytest.mark.parametrize("kernel", ["cudnn", "flash2", *PACKAGES])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("layout", [as_models_pass_it, side_by_side])
def test_on_a_gpu_the_chosen_kernel_is_called_by_name(kernel, causal, layout, here):
    """On fake CUDA tensors, which have shapes and strides but no gradients in a PyTorch for CPUs."""
    here(kernel)
    with FakeTensorMode(), Names() as operators:
        query, key, value = (layout(heads, 256, "cuda") for heads in (8, 2, 2))
        output = attention(query, key, value, 0.1, causal=causal)
    assert output.shape == query.shape and output.dtype == HALF and output.device == CUDA
    assert operators.calls == [SDPA.get(kernel, "seqloom.package_forward.default")]
    assert not COPIES & {*operators.names}


@pytest.mark.parametrize("kernel", [*SDPA, *PACKAGES])
@pytest.mark.parametrize(("start", "options"), [(0, {}), (0, {"causal": False}), (128, {})], ids=str)
@pytest.mark.parametrize("layout", [as_models_pass_it, side_by_side])
def test_nothing_is_copied_around_a_kernel(kernel, start, options, layout, monkeypatch):
    """On meta tensors, forward and backward: only the kernels of PyTorch merge two calls for a later piece."""
    monkeypatch.setattr(fused, "_kernel_name", lambda *_: kernel)
    heads = 8 if kernel == "efficient" else 2
    query, key, value = (layout(n, m, "meta").requires_grad_() for n, m in ((8, 128), (heads, 256), (heads, 256)))
    with Names() as forward:
        output = attention(query, key, value, 0.1, query_start=start, **options)
    grad = torch.empty_like(output)
    with Names() as backward:
        found = torch.autograd.grad(output, (query, key, value), grad)
    pieces = 2 if start and kernel in SDPA else 1
    name = SDPA.get(kernel, "seqloom.package_forward.default")
    assert forward.calls == [name] * pieces
    assert (
        backward.calls
        == [name.replace("forward", "backward") if kernel in PACKAGES else name.replace(".default", "_backward.default")] * pieces
    )
    assert [x.shape for x in found] == [query.shape, key.shape, value.shape]
    assert not COPIES & {*forward.names, *backward.names} or pieces == 2
    if kernel in PACKAGES:
        assert output.transpose(1, 2).is_contiguous(), "as the projection after it reads it"


@pytest.mark.parametrize("start", [0, 50, 128])
@pytest.mark.parametrize("size", [64, 20])
@pytest.mark.parametrize("layout", [as_models_pass_it, side_by_side])
def test_a_window_is_one_call_of_flash_attention_over_the_keys_within_it(start, size, layout, monkeypatch):
    """On meta tensors: its window ends at the last key, as documented for keys that are more than the queries."""
    monkeypatch.setattr(fused, "_kernel_name", lambda *_: "flash2")
    monkeypatch.setattr(fused, "_ATEN", Recorder())
    query, key, value = (layout(heads, length, "meta")[..., :size].requires_grad_() for heads, length in ((8, 128), (2, 256), (2, 256)))
    output = attention(query, key, value, 0.1, window=30, query_start=start)
    found = torch.autograd.grad(output, (query, key, value), torch.empty_like(output))
    assert output.shape == query.shape and [x.shape for x in found] == [query.shape, key.shape, value.shape]
    (rows, lengths, options), first = fused._ATEN.calls[0], max(0, start - 29)
    width = -(-size // 8) * 8
    assert rows == [(1, 128, 8, width), *[(1, start + 128 - first, 2, width)] * 2]
    assert lengths == [None, None, 128, start + 128 - first, 0.0, False, False]
    assert options == {"scale": 0.1, "window_size_left": 29, "window_size_right": 0}


class Recorder:
    """PyTorch's flash attention, which notes how it is called."""

    def __init__(self) -> None:
        self.calls: list = []

    def _flash_attention_forward(self, *args, **options):
        self.calls.append(([tuple(x.shape) for x in args[:3]], list(args[3:]), options))
        return torch.ops.aten._flash_attention_forward(*args, **options)


def test_heads_are_repeated_only_for_the_kernel_that_knows_no_groups():
    query, key, value = make(1, 2, 3, 4, 4, 8)
    for kernel in ("cudnn", "flash2", "flash3", "flash4", "flash"):
        assert fused.repeat_heads(kernel, query, key, value) == (key, value)
    assert [x.shape[1] for x in fused.repeat_heads("efficient", query, key, value)] == [6, 6]


def test_flash2_pads_head_sizes_that_no_kernel_has():
    query, key = (torch.empty(1, heads, 64, 20, dtype=HALF, device="meta", requires_grad=True) for heads in (4, 2))
    output = fused.plain_attention(query, key, key, 0.1, True, "flash2")
    output.sum().backward()
    assert output.shape == query.shape == query.grad.shape and key.grad.shape == key.shape


# --- packages --------------------------------------------------------------------------------------------------------------------


def visible(rows: int, columns: int, causal: bool, left: int, right: int) -> Tensor:
    """The masks of these packages end at the last key; -1 is an open side."""
    place, right = torch.arange(rows)[:, None] + columns - rows, 0 if causal else right
    j = torch.arange(columns)
    return ((j <= place + right) | (right < 0)) & ((j >= place - left) | (left < 0))


def batch_forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    """Output `[b, l, heads, e]` and log-sum-exp `[b, heads, l]` of dense attention."""
    assert all(x.stride(-1) == 1 for x in (q, k, v))
    parts = [dense_forward(*x, mask, scale, softcap) for x in zip(q, k, v, strict=True)]
    return torch.stack([out for out, _ in parts]).to(q.dtype), torch.stack([lse.t() for _, lse in parts]).float()


def batch_backward(given: tuple[Tensor, ...], mask: Tensor, scale: float, softcap: float) -> list[Tensor]:
    """Gradients of q, k and v, given the gradient, q, k, v, the output and the log-sum-exp."""
    *rows, lse = given
    assert lse.is_contiguous() and lse.dtype == torch.float32 and all(x.stride(-1) == 1 for x in rows)
    parts = [dense_backward(*one, mask, scale, softcap) for one in zip(*rows, lse.transpose(1, 2), strict=True)]
    return [torch.stack(x) for x in zip(*parts, strict=True)]


def flash_attn_3(log: list) -> types.ModuleType:
    """The functions of FlashAttention 3 with the parameters that are passed, named as the package names them."""

    def _flash_attn_forward(q, k, v, softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1, softcap=0.0):
        mask = visible(q.shape[1], k.shape[1], causal, window_size_left, window_size_right)
        return *batch_forward(q, k, v, mask, softmax_scale, softcap), torch.empty(0), torch.empty(0)

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False, window_size_left=-1,
        window_size_right=-1, softcap=0.0, deterministic=False,
    ):  # fmt: skip
        log.append(deterministic)
        mask = visible(q.shape[1], k.shape[1], is_causal, window_size_left, window_size_right)
        for into, part in zip((dq, dk, dv), batch_backward((dout, q, k, v, out, softmax_lse), mask, softmax_scale, softcap), strict=True):
            into.copy_(part)
        return torch.empty(0)

    return package(kernels.PACKAGE_3, _flash_attn_forward=_flash_attn_forward, _flash_attn_backward=_flash_attn_backward)


def flash_attn_4(log: list) -> types.ModuleType:
    """Those of FlashAttention 4: an open side is None, and gradients are returned."""

    def mask_of(q: Tensor, k: Tensor, causal: bool, left: int | None, right: int | None) -> Tensor:
        return visible(q.shape[1], k.shape[1], causal, *(-1 if side is None else side for side in (left, right)))

    def _flash_attn_fwd(q, k, v, softmax_scale=None, causal=False, window_size_left=None, window_size_right=None, return_lse=False):
        assert return_lse
        return batch_forward(q, k, v, mask_of(q, k, causal, window_size_left, window_size_right), softmax_scale, 0.0)

    def _flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, window_size_left=None, window_size_right=None, deterministic=False
    ):
        log.append(deterministic)
        mask = mask_of(q, k, causal, window_size_left, window_size_right)
        found = batch_backward((dout, q, k, v, out, lse), mask, softmax_scale, 0.0)
        return tuple(part.to(x.dtype).contiguous() for part, x in zip(found, (q, k, v), strict=True))

    return package(kernels.PACKAGE_4, _flash_attn_fwd=_flash_attn_fwd, _flash_attn_bwd=_flash_attn_bwd)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list:
    noted: list = []
    for fake in (flash_attn_3(noted), flash_attn_4(noted)):
        put(monkeypatch, fake)
    return noted


MASKS = [{"window": 3}, {"window": 1}, {"softcap": 1.5}, {"softcap": 1.5, "window": 4}, {"softcap": 1.5, "causal": False}]


@pytest.mark.parametrize("kernel", PACKAGES)
@pytest.mark.parametrize(
    ("start", "options"), [(0, {}), (0, {"causal": False}), (5, {}), *((start, mask) for start in (0, 5) for mask in MASKS)], ids=str
)
@pytest.mark.parametrize("transposed", [True, False])
def test_packages_by_their_conventions(kernel, start, options, transposed, log, here, monkeypatch):
    """As published by each: layout, order and names of arguments, causal masks that end at the last key, grouped heads."""
    if "softcap" in options and not KERNELS[kernel].softcap:
        return
    monkeypatch.setattr(fused, "_kernel_name", lambda *_: kernel)
    tensors = make(2, 2, 3, 12, 12, 8, dtype=torch.float32)
    if transposed:
        tensors = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in tensors]
    query = tensors[0][:, :, start:].detach().requires_grad_()
    found = results(lambda q, k, v: attention(q, k, v, 0.3, query_start=start, **options), [query, *tensors[1:]])
    expected = results(lambda q, k, v: dense(q, k, v, 0.3, **options)[:, :, start:], tensors)
    expected = (expected[0], expected[1][:, :, start:], *expected[2:])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    if not start:
        assert [x.stride() for x in found[1:]] == [x.stride() for x in tensors], "a gradient lies as its tensor does"
    assert log == [False]


@pytest.mark.parametrize("kernel", PACKAGES)
def test_packages_are_single_operators_of_a_compiled_graph(kernel, log):
    tensors = make(1, 2, 2, 8, 8, 8, dtype=torch.float32)
    run = lambda q, k, v: package_attention(kernel, q, k, v, 0.3, True)  # noqa: E731
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(results(compiled, tensors), results(run, tensors))
    torch.library.opcheck(
        torch.ops.seqloom.package_forward.default, (*(x.transpose(1, 2) for x in tensors), kernel, 0.3, True, 0, 0.0), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("kernel", PACKAGES)
def test_packages_add_in_one_order_where_pytorch_does(kernel, log):
    tensors = make(1, 1, 1, 4, 4, 8, dtype=torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        results(lambda q, k, v: package_attention(kernel, q, k, v, 0.3, True), tensors)
    finally:
        torch.use_deterministic_algorithms(False)
    assert log == [True]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kernel", [name for name in KERNELS if name != "flash"])
@pytest.mark.parametrize(
    ("start", "options"),
    [(0, {}), (0, {"causal": False}), (300, {}), *((start, mask) for start in (0, 300) for mask in ({"window": 100}, {"softcap": 2.0}))],
    ids=str,
)
def test_on_a_real_gpu_every_kernel_that_is_present_agrees(kernel, start, options):
    query, key, value = (x.detach().to("cuda", HALF).requires_grad_() for x in make(2, 2, 4, 512, 512, 64))
    refusal = KERNELS[kernel].refusal(Kind(query.device, HALF, 64, True, window="window" in options, softcap="softcap" in options))
    if refusal is not None:
        pytest.skip(refusal)
    rows = query[:, :, start:].detach().requires_grad_()
    grad = torch.randn(rows.shape, dtype=HALF, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    with use_kernel(kernel):
        output = attention(rows, key, value, 64**-0.5, query_start=start, **options)
        found = (output, *torch.autograd.grad(output, (rows, key, value), grad))
    exact = [x.detach().cpu().double().requires_grad_() for x in (query, key, value)]
    whole = dense(*exact, 64**-0.5, **options)[:, :, start:]
    expected = (whole, *torch.autograd.grad(whole, exact, grad.cpu().double()))
    for mine, its in zip(found, (expected[0], expected[1][:, :, start:], *expected[2:]), strict=True):
        assert (mine.cpu().double() - its).norm() <= 2e-2 * its.norm()
