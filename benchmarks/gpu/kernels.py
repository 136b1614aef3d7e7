"""Every kind of kernel that a training step runs, as shares of what the device can do.

    python benchmarks/gpu/kernels.py                        # Llama3-8B, one rank of 8 at 128K tokens, bf16; about 4 minutes
    python benchmarks/gpu/kernels.py --write                # and kept in benchmarks/results/gpu/kernels.json
    python benchmarks/gpu/kernels.py --parts attention      # one part
    python benchmarks/gpu/kernels.py --device cpu --toy     # a smoke run

The ceilings are measured first, in the same process: the best of a few large square matrix products, and a large copy on the device, bytes
read and written. A product and attention have a share of the first, by the operations that they must do (causal attention: half the
square; its backward 2.5 times the forward); elementwise work and optimizers have a share of the second, by the bytes that they must move.
Times are medians on random data. A kernel that is not installed, or refuses, is told with its reason.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from workbench import Bench, add_flags, bench, facts, out_of_memory, peak_gib, release, table

from seqloom.cost.measure_clock import Clock
from seqloom.cost.measure_kernels import forward_backward_seconds

BUDGET_S = 0.25  # of the repeats of one figure
BACKWARD = 2.5  # operations of attention's backward to those of its forward
MOST_EXPLICIT = 8192  # positions: kernels that write scores out take minutes and more memory than there is for more
IGNORED = -100
SDPA = {
    "cpu": {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH},
    "cuda": {
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "flash2": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "math": SDPBackend.MATH,
    },
}
"""Kernels of `scaled_dot_product_attention`, by the names of hardware files."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of what is measured: those of one rank of a Llama.

    Attention is `[1, heads, l, head_dim]` for each `l` of `lengths`; products and elementwise work have `tokens` rows; the loss head has
    `vocab` classes, and is compared with others at `few_tokens`; `parameters` are those that the optimizer of the rank updates.
    """

    squares: tuple[int, ...] = (8192, 12288, 16384)
    copied: int = 4 * 2**30
    lengths: tuple[int, ...] = (8192, 32768, 131072)
    heads: int = 4
    kv_heads: int = 1
    head_dim: int = 128
    tokens: int = 16384
    hidden: int = 4096
    kv_hidden: int = 1024
    ffn: int = 14336
    vocab: int = 128256
    chunks: tuple[int, ...] = (512, 1024, 2048, 4096, 8192)
    few_tokens: int = 4096
    parameters: int = 1_003_782_656


TOY = Sizes((128, 256), 2**22, (64, 128), 4, 1, 16, 64, 64, 16, 176, 512, (16, 32), 32, 10_000)


class Meter:
    """Times functions on the device and turns seconds into shares of its ceilings."""

    def __init__(self, run: Bench, sizes: Sizes) -> None:
        self.run, self.sizes, self.device, self.dtype = run, sizes, run.device, run.dtype
        self.clock = Clock(run.device, BUDGET_S if run.device.type == "cuda" else 0.01)
        self.flops = self.bandwidth = math.nan

    def random(self, *shape: int, dtype: torch.dtype | None = None, grad: bool = False) -> Tensor:
        """Random numbers on the device."""
        return torch.randn(*shape, dtype=dtype or self.dtype, device=self.device).requires_grad_(grad)

    def arithmetic(self, flops: float, seconds: float) -> dict[str, float]:
        """Milliseconds, TFLOP/s and the share of the largest product's."""
        return {"ms": 1e3 * seconds, "tflops": flops / seconds / 1e12, "share": flops / seconds / self.flops}

    def traffic(self, nbytes: float, seconds: float) -> dict[str, float]:
        """Milliseconds, GB/s and the share of a large copy's."""
        return {"ms": 1e3 * seconds, "gb_per_s": nbytes / seconds / 1e9, "share": nbytes / seconds / self.bandwidth}

    @contextmanager
    def tried(self, rows: list[dict[str, Any]], **what: Any) -> Iterator[dict[str, Any]]:
        """A row of figures; where the kernel refuses or memory does not suffice, the row holds the reason in `error`."""
        row = dict(what)
        try:
            yield row
        except Exception as error:  # of whatever kind a package raises: the other kernels are measured all the same
            lines = str(error).strip().splitlines() or [type(error).__name__]
            row.update(out_of_memory(error) or {"error": lines[0]})
        rows.append(row)
        release(self.device)


def main() -> None:
    """Measure the ceilings, then every part; the result is kept after each of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    args = parser.parse_args()
    run = bench("kernels", args)
    meter = Meter(run, TOY if run.toy else Sizes())
    found: dict[str, Any] = {"dtype": str(run.dtype), "sizes": vars(meter.sizes), "ceilings": ceilings(meter)}
    print(f"{facts(run.device)['device']}, {run.dtype}: {meter.flops / 1e12:,.4g} TFLOP/s, {meter.bandwidth / 1e9:,.4g} GB/s", flush=True)
    for part in args.parts:
        if run.left_s < 0:
            found[part] = [{"error": "no time left"}]
            continue
        header, measure, columns = PARTS[part]
        found[part] = measure(meter)
        print(f"\n{header}\n{table(columns, [[shown(row, column) for column in columns] for row in found[part]])}", flush=True)
        run.keep(found)


def shown(row: Mapping[str, Any], column: str) -> Any:
    """A cell: the entry of that name, or its entry `share` as a percentage."""
    if column == "note":
        return row.get("error") or row.get("note") or ""
    outer, _, inner = column.partition(" ")
    value = row.get(outer)
    if isinstance(value, Mapping):
        value = value.get(inner)
    return f"{value:.1%}" if inner == "share" and value is not None else value


# --- ceilings ----------------------------------------------------------------------------------------------------------------------


def ceilings(meter: Meter) -> dict[str, Any]:
    """The best of large square products, and a large copy, both into memory that is there already."""
    squares = {}
    for size in meter.sizes.squares:
        left, right, out = meter.random(size, size), meter.random(size, size), meter.random(size, size)
        squares[size] = 2.0 * size**3 / meter.clock.seconds(lambda left=left, right=right, out=out: torch.mm(left, right, out=out))
        del left, right, out
        release(meter.device)
    meter.flops = max(squares.values())
    meter.bandwidth = copied_bytes(meter)
    release(meter.device)
    return {"flops": meter.flops, "squares": squares, "bytes_per_s": meter.bandwidth, "copied_bytes": meter.sizes.copied}


def copied_bytes(meter: Meter) -> float:
    """Bytes a second of a large copy, read and written."""
    source = torch.empty(meter.sizes.copied // 4, device=meter.device).normal_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / meter.clock.seconds(lambda: target.copy_(source))


# --- attention -----------------------------------------------------------------------------------------------------------------------


def attention(meter: Meter) -> list[dict[str, Any]]:
    """Causal attention with grouped heads: PyTorch's kernels, the one that seqloom's programs call, and those of magi attention."""
    rows: list[dict[str, Any]] = []
    for length in meter.sizes.lengths:
        for name, make in (*sdpa_kernels(meter), ("seqloom", seqloom_attention), *magi_kernels(meter, length)):
            if meter.run.left_s < 30 and not meter.run.toy:
                rows.append({"kernel": name, "length": length, "error": "no time left"})
                continue
            with meter.tried(rows, kernel=name, length=length) as row:
                if name in ("torch math", "magi reference") and length > MOST_EXPLICIT:
                    row["error"] = f"writes scores out: not run above {MOST_EXPLICIT:,} positions"
                    continue
                attention_row(meter, length, make, row)
    return rows


def attention_row(meter: Meter, length: int, make: Callable[[Sequence[Tensor]], Any], row: dict[str, Any]) -> None:
    """Times forward and backward into `row`. `make(inputs)` gives the two functions, or one that autograd differentiates."""
    sizes = meter.sizes
    heads = (sizes.heads, sizes.kv_heads, sizes.kv_heads)
    inputs = [meter.random(1, count, length, sizes.head_dim, grad=True) for count in heads]
    fn = make(inputs)
    if isinstance(fn, tuple):
        seconds = tuple(meter.clock.seconds(part) for part in fn)
    else:
        seconds = forward_backward_seconds(meter.clock, fn, inputs)
    flops = 2.0 * sizes.heads * length**2 * sizes.head_dim  # two products over half the square
    row["forward"] = meter.arithmetic(flops, seconds[0])
    row["backward"] = meter.arithmetic(BACKWARD * flops, seconds[1])
    row["both"] = meter.arithmetic((1 + BACKWARD) * flops, sum(seconds))


def sdpa_kernels(meter: Meter) -> Iterator[tuple[str, Callable[[Sequence[Tensor]], Any]]]:
    """PyTorch's `scaled_dot_product_attention` held to each of its kernels; those that know no groups take repeated key/value heads."""
    for name, backend in SDPA[meter.device.type].items():
        yield f"torch {name}", lambda inputs, backend=backend: held_to(backend, inputs, grouped=True)
        if backend != SDPBackend.MATH:
            yield f"torch {name}, heads repeated", lambda inputs, backend=backend: held_to(backend, inputs, grouped=False)


def held_to(backend: SDPBackend, inputs: Sequence[Tensor], grouped: bool) -> Callable[[], Tensor]:
    """PyTorch's attention with one kernel; to repeat heads is part of it."""
    query, key, value = inputs
    groups = query.shape[1] // key.shape[1]

    def run() -> Tensor:
        keys, values = (x if grouped else x.repeat_interleave(groups, 1) for x in (key, value))
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, keys, values, is_causal=True, enable_gqa=grouped)

    return run


def seqloom_attention(inputs: Sequence[Tensor]) -> Callable[[], Tensor]:
    """What emitted programs call."""
    from seqloom.ops.attention import attention as fn

    return lambda: fn(*inputs, scale=inputs[0].shape[-1] ** -0.5)


def magi_kernels(meter: Meter, length: int) -> Iterator[tuple[str, Callable[[Sequence[Tensor]], Any]]]:
    """The kernels of magi attention, causal over the whole sequence."""
    from seqloom.magi import masks
    from seqloom.magi.choose import KERNELS, choose_kernel
    from seqloom.magi.kernels import Final

    bands, scale = masks.packed([0, length]).bands, meter.sizes.head_dim**-0.5

    def make(name: str, inputs: Sequence[Tensor]) -> tuple[Callable[[], Any], Callable[[], Any]]:
        kernel = choose_kernel(name, meter.device, meter.dtype, meter.sizes.head_dim, False)
        query, key, value = (x.detach()[0].transpose(0, 1).contiguous() for x in inputs)  # [l, heads, head_dim]
        grad = torch.randn_like(query)
        output, lse = kernel.forward(query, key, value, bands, scale, 0.0)
        kept = output.to(query.dtype)
        given = Final(grad, query, key, value, kept, lse, (grad.to(lse.dtype) * kept.to(lse.dtype)).sum(-1))
        return (
            lambda: kernel.forward(query, key, value, bands, scale, 0.0),
            lambda: kernel.backward(given, bands, scale, 0.0),
        )

    for name in KERNELS:
        yield f"magi {name}", lambda inputs, name=name: make(name, inputs)


# --- products ------------------------------------------------------------------------------------------------------------------------


def matmul(meter: Meter) -> list[dict[str, Any]]:
    """The linear layers of a decoder layer and one chunk of the head, forward and backward (both products of it)."""
    sizes, rows = meter.sizes, []
    shapes = {
        "q and o": (sizes.tokens, sizes.hidden, sizes.hidden),
        "k and v": (sizes.tokens, sizes.hidden, sizes.kv_hidden),
        "gate and up": (sizes.tokens, sizes.hidden, sizes.ffn),
        "down": (sizes.tokens, sizes.ffn, sizes.hidden),
        **{f"head, chunk {chunk}": (chunk, sizes.hidden, sizes.vocab) for chunk in sizes.chunks},
    }
    for name, (tokens, inner, outer) in shapes.items():
        with meter.tried(rows, layer=name, shape=f"{tokens} x {inner} x {outer}") as row:
            x, weight = meter.random(tokens, inner, grad=True), meter.random(outer, inner, grad=True)
            forward, backward = forward_backward_seconds(meter.clock, lambda x=x, weight=weight: F.linear(x, weight), (x, weight))
            flops = 2.0 * tokens * inner * outer
            row["forward"], row["backward"] = meter.arithmetic(flops, forward), meter.arithmetic(2 * flops, backward)
            row["both"] = meter.arithmetic(3 * flops, forward + backward)
            del x, weight
    return rows


# --- the loss head -------------------------------------------------------------------------------------------------------------------


def loss_head(meter: Meter) -> list[dict[str, Any]]:
    """Linear head and cross entropy: in chunks over all tokens of a rank, and beside others at few tokens.

    Operations are the three products that any head must do; one that makes logits twice does a fourth.
    """
    from chunk_linear_cross_entropy import chunk_linear_cross_entropy

    sizes, rows = meter.sizes, []

    def chunked(chunk: int) -> Callable[..., Tensor]:
        return lambda x, weight, labels: chunk_linear_cross_entropy(x[None], weight, labels[None], IGNORED, chunk).sum()

    cases = [(f"chunk {chunk}", sizes.tokens, chunked(chunk)) for chunk in sizes.chunks]
    cases += [(f"chunk {sizes.chunks[-1]}", sizes.few_tokens, chunked(sizes.chunks[-1]))]
    cases += [(name, sizes.few_tokens, fn) for name, fn in OTHER_HEADS.items()]
    for name, tokens, fn in cases:
        with meter.tried(rows, head=name, tokens=tokens) as row:
            x, weight = meter.random(tokens, sizes.hidden, grad=True), meter.random(sizes.vocab, sizes.hidden)
            weight.mul_(sizes.hidden**-0.5).requires_grad_()
            labels = torch.randint(sizes.vocab, (tokens,), device=meter.device)

            def step(fn: Callable[..., Tensor] = fn, x: Tensor = x, weight: Tensor = weight, labels: Tensor = labels) -> None:
                torch.autograd.grad(fn(x, weight, labels), (x, weight))

            release(meter.device)
            before = peak_gib(meter.device)
            step()
            row["workspace_gib"] = peak_gib(meter.device) - before
            row["both"] = meter.arithmetic(6.0 * tokens * sizes.hidden * sizes.vocab, meter.clock.seconds(step))
            del x, weight, labels, step
    return rows


def plain_head(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """All logits at once, in fp32 for the loss, as models of transformers do."""
    return F.cross_entropy(F.linear(x, weight).float(), labels, ignore_index=IGNORED, reduction="sum")


def torch_head(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """PyTorch's own fused one, of later releases."""
    if not hasattr(F, "linear_cross_entropy"):
        raise ImportError(f"PyTorch {torch.__version__} has no torch.nn.functional.linear_cross_entropy")
    return F.linear_cross_entropy(x, weight, labels, ignore_index=IGNORED, reduction="sum")


def liger_head(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Liger's fused linear cross entropy."""
    if importlib.util.find_spec("liger_kernel") is None:
        raise ImportError("liger-kernel is not installed")
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(x, weight, labels, ignore_index=IGNORED, reduction="sum")


OTHER_HEADS: Mapping[str, Callable[..., Tensor]] = {"plain torch": plain_head, "torch": torch_head, "liger": liger_head}


# --- elementwise ---------------------------------------------------------------------------------------------------------------------


def norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMS norm with its sums in fp32, `[l, d]`."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def rotary(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary embedding of `[heads, l, e]` by `[l, e]`."""
    half = x.shape[-1] // 2
    return x * cosine + torch.cat((-x[..., half:], x[..., :half]), -1) * sine


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, `[l, f]`."""
    return F.silu(gate) * up


def elementwise(meter: Meter) -> list[dict[str, Any]]:
    """Norm, rotary embedding and SwiGLU, operator by operator and compiled; bytes are those of inputs, outputs and their gradients."""
    sizes, rows = meter.sizes, []
    heads = sizes.hidden // sizes.head_dim
    large = {"norm": sizes.tokens * sizes.hidden, "rotary": sizes.tokens * sizes.hidden, "swiglu": sizes.tokens * sizes.ffn}
    shapes = {
        "norm": ((sizes.tokens, sizes.hidden), (sizes.hidden,)),
        "rotary": ((heads, sizes.tokens, sizes.head_dim), (sizes.tokens, sizes.head_dim), (sizes.tokens, sizes.head_dim)),
        "swiglu": ((sizes.tokens, sizes.ffn), (sizes.tokens, sizes.ffn)),
    }
    # tensors of the large size that must be read or written: forward, backward
    passes = {"norm": (2, 3), "rotary": (2, 2), "swiglu": (3, 5)}
    backend = "inductor" if meter.device.type == "cuda" else "aot_eager"  # a smoke run need not build C++
    for name, fn in {"norm": norm, "rotary": rotary, "swiglu": swiglu}.items():
        for how in ("eager", "compiled"):
            with meter.tried(rows, operator=name, how=how) as row:
                inputs = [meter.random(*shape) for shape in shapes[name]]
                differentiated = inputs[:1] if name == "rotary" else inputs
                for tensor in differentiated:
                    tensor.requires_grad_()
                chosen = torch.compile(fn, dynamic=False, backend=backend) if how == "compiled" else fn
                forward, backward = forward_backward_seconds(
                    meter.clock, lambda chosen=chosen, inputs=inputs: chosen(*inputs), differentiated
                )
                size = large[name] * meter.dtype.itemsize
                row["forward"], row["backward"] = (
                    meter.traffic(count * size, seconds) for count, seconds in zip(passes[name], (forward, backward), strict=True)
                )
                row["both"] = meter.traffic(sum(passes[name]) * size, forward + backward)
                del inputs, differentiated
    return rows


# --- the optimizer -------------------------------------------------------------------------------------------------------------------


def optimizer(meter: Meter) -> list[dict[str, Any]]:
    """AdamW over fp32 masters: reads weight, gradient and both moments, writes all but the gradient, 28 bytes a parameter."""
    sizes, rows = meter.sizes, []
    for how in ("fused", "foreach"):
        with meter.tried(rows, optimizer=f"AdamW {how}", parameters=sizes.parameters) as row:
            # as many tensors as a rank's shards of 32 layers
            params = [torch.nn.Parameter(meter.random(sizes.parameters // 291, dtype=torch.float32)) for _ in range(291)]
            for param in params:
                param.grad = torch.randn_like(param)
            chosen = torch.optim.AdamW(params, lr=1e-4, betas=(0.9, 0.95), **{how: True})
            seconds = meter.clock.seconds(chosen.step)
            row["step"] = meter.traffic(28.0 * sum(param.numel() for param in params), seconds)
            row["peak_gib"] = peak_gib(meter.device)
            del params, param, chosen
    return rows


PARTS: Mapping[str, tuple[str, Callable[[Meter], list[dict[str, Any]]], tuple[str, ...]]] = {
    "attention": (
        "attention, causal: shares of the largest product",
        attention,
        ("kernel", "length", "forward ms", "forward tflops", "forward share", "backward ms", "backward tflops", "backward share", "note"),
    ),
    "matmul": (
        "linear layers: shares of the largest product",
        matmul,
        ("layer", "shape", "forward ms", "forward tflops", "forward share", "backward ms", "backward tflops", "backward share", "note"),
    ),
    "loss_head": (
        "head and loss, forward and backward: shares of the largest product, by three products of the head",
        loss_head,
        ("head", "tokens", "both ms", "both tflops", "both share", "workspace_gib", "note"),
    ),
    "elementwise": (
        "elementwise work: shares of a large copy, by the fewest bytes",
        elementwise,
        ("operator", "how", *(f"{way} {figure}" for way in ("forward", "backward") for figure in ("ms", "gb_per_s", "share")), "note"),
    ),
    "optimizer": (
        "optimizer: shares of a large copy, by the fewest bytes",
        optimizer,
        ("optimizer", "parameters", "step ms", "step gb_per_s", "step share", "peak_gib", "note"),
    ),
}


if __name__ == "__main__":
    main()
