"""The parts `matmul` and `loss_head` of `kernels.py`: linear layers, and the head with its cross entropy beside other makers' heads."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import torch
from meter import Meter
from torch import Tensor
from torch.nn import functional as F
from workbench import peak_gib, release

from seqloom.cost.measure_kernels import forward_backward_seconds

IGNORED = -100


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
