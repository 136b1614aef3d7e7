"""What one device does by itself: matrix products, attention, elementwise work, launches, the link to host memory.

Role in the pipeline: `python -m seqloom profile` calls these with a `Clock` and turns their figures (FLOPS, bytes per second, seconds)
into the fractions of a hardware file. Inputs are random, never zeros: a GPU multiplies zeros faster than numbers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from seqloom.cost.measure_clock import Clock
from seqloom.ops import kernels as attention_kernels
from seqloom.ops.fused import plain_attention
from seqloom.ops.kernel_rates import ATTENTION_BACKWARD_RATIO
from seqloom.ops.kernels import Kind

KERNELS: Mapping[str, tuple[str, ...]] = {
    "cpu": ("flash", "math"),
    "cuda": ("cudnn", "flash2", "flash3", "flash4", "efficient", "flex", "math"),
}
"""Attention kernels by the names of hardware files: those that plain attention runs with, FlexAttention, PyTorch's without fusion."""
_SMALL_OPERATORS = 200


@dataclass(frozen=True)
class Sizes:
    """Sizes of what is measured: large enough to reach a device's rates, small enough to take a fraction of a second.

    Matrix products have two dimensions of `outer` and one of `inner`; attention is `[1, heads, positions, head_dim]`; elementwise chains
    run over `tokens` of `hidden` and `ffn` features; `large` bytes are copied.
    """

    outer: int
    inner: tuple[int, ...]
    heads: int
    positions: int
    head_dim: int
    tokens: int
    hidden: int
    ffn: int
    large: int


SIZES: Mapping[str, Sizes] = {
    "cpu": Sizes(1024, (16, 32, 64, 128, 256, 512, 1024), 4, 2048, 64, 1024, 1024, 2816, 64 * 2**20),
    "cuda": Sizes(8192, (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192), 16, 16384, 128, 16384, 4096, 14336, 2**30),
}


def matmul_flops(clock: Clock, outer: int, inner: int, dtype: torch.dtype) -> float:
    """Achieved FLOPS of the three products of a linear layer (its output, the gradients of input and weight) in which `inner` is in turn
    the contracted size, the number of columns, the number of rows; all other sizes are `outer`.
    """
    wide, thin = (_random(clock, outer, size, dtype=dtype) for size in (outer, inner))
    products: tuple[Callable[[], Tensor], ...] = (lambda: F.linear(thin, thin), lambda: wide @ thin, lambda: thin.t() @ wide)
    return 3 * 2.0 * outer * outer * inner / sum(clock.seconds(product) for product in products)


def attention_flops(
    clock: Clock, sizes: Sizes, dtype: torch.dtype, kernels: Sequence[str], say: Callable[[str], object]
) -> dict[str, tuple[float, float]]:
    """Kernel name -> achieved forward and backward FLOPS of causal attention, of the work that the mask leaves.

    Kernels that do not run on this device, or not in its memory, are left out, and `say` is told which and why.
    """
    query, key, value = (_random(clock, 1, sizes.heads, sizes.positions, sizes.head_dim, dtype=dtype).requires_grad_() for _ in range(3))
    flops = 4.0 * sizes.heads * sizes.positions**2 * sizes.head_dim / 2
    found = {}
    for name in kernels:
        refusal = _refusal(name, Kind(query.device, dtype, sizes.head_dim, False))
        if refusal is None:
            try:
                run = _causal(name, query)
                forward, backward = forward_backward_seconds(clock, lambda run=run: run(query, key, value), (query, key, value))
                found[name] = flops / forward, ATTENTION_BACKWARD_RATIO * flops / backward
                continue
            except Exception as error:  # not enough memory, or whatever a package of another release or another GPU raises
                refusal = f"fails ({(str(error).strip() or type(error).__name__).splitlines()[0]})"
        say(f"attention {name} is left out: it {refusal}")
    return found


def _refusal(name: str, kind: Kind) -> str | None:
    """Why a kernel cannot run here, as the end of a sentence; None where it can, as far as can be told before."""
    if name == "flex" and kind.device.type != "cuda":
        return f"needs a GPU, not {kind.device.type}: PyTorch has no backward of FlexAttention elsewhere"
    return attention_kernels.KERNELS[name].refusal(kind) if name in attention_kernels.KERNELS else None


def _causal(name: str, query: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Causal attention by a kernel, of query, key and value as large as `query`."""
    if name in attention_kernels.KERNELS:
        return lambda q, k, v: plain_attention(q, k, v, q.shape[3] ** -0.5, True, name)
    if name == "flex":
        length = query.shape[2]
        mask = create_block_mask(lambda b, h, row, column: column <= row, None, None, length, length, device=query.device)
        run = torch.compile(flex_attention, fullgraph=True)
        return lambda q, k, v: run(q, k, v, block_mask=mask)

    def math(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return math


def forward_backward_seconds(clock: Clock, fn: Callable[[], Tensor], inputs: Sequence[Tensor]) -> tuple[float, float]:
    """Seconds of `fn` with gradients recorded, and of the gradients of its output with respect to `inputs`."""
    output = fn()
    gradient = torch.randn_like(output)
    return clock.seconds(fn), clock.seconds(lambda: torch.autograd.grad(output, inputs, gradient, retain_graph=True))


def memory_bandwidth(clock: Clock, sizes: Sizes) -> float:
    """Bytes per second, read and written, of the better of a large copy and a large add into memory that is there already."""
    source, other = (_random(clock, sizes.large // 4) for _ in range(2))
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / clock.seconds(lambda: target.copy_(source))
    return max(copy, 3 * source.nbytes / clock.seconds(lambda: torch.add(source, other, out=target)))


def fused_bandwidth(clock: Clock, sizes: Sizes) -> float:
    """Bytes per second of one elementwise kernel that makes its result: what a fused chain reaches."""
    source, other = (_random(clock, sizes.large // 4) for _ in range(2))
    return 3 * source.nbytes / clock.seconds(lambda: source + other)


def chain_bandwidth(clock: Clock, sizes: Sizes, dtype: torch.dtype) -> float:
    """Bytes per second of the elementwise chains of decoder layers, operator by operator, forward and backward.

    As many layers run as keep `8 * large` bytes: a step holds what it will need in the backward, so its memory is never that of the
    operator before. Bytes are what each operator of the forward reads and writes, three times: a backward moves about twice as much.
    """
    layers, moved = [], 0.0
    while moved < 24.0 * sizes.large:
        for chain, shapes, passes in _CHAINS:
            inputs = [_random(clock, *shape(sizes), dtype=dtype).requires_grad_() for shape in shapes]
            layers.append((chain, inputs))
            moved += 3.0 * passes * inputs[0].nbytes

    def step() -> None:
        outputs = [chain(*inputs) for chain, inputs in layers]
        torch.autograd.grad(outputs, [x for _, inputs in layers for x in inputs], [torch.ones_like(x) for x in outputs])

    return moved / clock.seconds(step)


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * (x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt())


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    heads = x.unflatten(1, (-1, cosine.shape[-1])).transpose(0, 1)
    half = cosine.shape[-1] // 2
    return heads * cosine + torch.cat((-heads[..., half:], heads[..., :half]), dim=-1) * sine


def _hidden(sizes: Sizes) -> tuple[int, ...]:
    return sizes.tokens, sizes.hidden


def _head(sizes: Sizes) -> tuple[int, ...]:
    return sizes.tokens, sizes.head_dim


_CHAINS = (  # chain, shapes of its inputs, tensors of the first input's size that its operators read and write
    (_norm, (_hidden, lambda sizes: (sizes.hidden,)), 7),
    (_rotated, (_hidden, _head, _head), 10),
    (_gated, (lambda sizes: (sizes.tokens, sizes.ffn),) * 2, 5),
    (torch.add, (_hidden, _hidden), 3),
)


def launch_seconds(clock: Clock) -> float:
    """Seconds of the smallest operator in a chain of them, with gradients recorded: what it takes to start one."""
    tiny = _random(clock, 8).requires_grad_()

    def chain() -> None:
        x = tiny
        for _ in range(_SMALL_OPERATORS):
            x = x + 1.0

    return clock.seconds(chain) / _SMALL_OPERATORS


def host_bandwidth(clock: Clock, sizes: Sizes) -> float:
    """Bytes per second between device and host memory, the slower direction; host memory is pinned beside a GPU."""
    source = _random(clock, sizes.large // 4)
    if clock.device.type == "cpu":
        return source.nbytes / clock.seconds(source.clone)
    host = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
    there = clock.seconds(lambda: host.copy_(source, non_blocking=True))
    return source.nbytes / max(there, clock.seconds(lambda: source.copy_(host, non_blocking=True)))


def memory_bytes(device: torch.device, local_ranks: int) -> int:
    """Memory of a device; of the machine's memory one rank's share on CPUs, within the limit of the process's control group."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text(encoding="utf-8").strip() if limit.is_file() else "max"
    return (total if text == "max" else min(total, int(text))) // local_ranks


def _random(clock: Clock, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype, device=clock.device)
