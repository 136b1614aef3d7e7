"""The parts `elementwise` and `optimizer` of `kernels.py`: work that memory bounds, as seqloom runs it and as others do.

A row `compiled` is what seqloom's programs run on a GPU, but alone: within a block the compiler fuses it with its neighbours. Beside it are
the operator run step by step, PyTorch's own fused one, and those of apex, flash-attn and Liger where they are installed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from meter import Meter
from torch import Tensor
from torch.nn import functional as F
from workbench import peak_gib

from seqloom.cost.measure_kernels import forward_backward_seconds

EPSILON = 1e-5
Function = Callable[..., Tensor]


def norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMS norm with its sums in fp32, `[l, d]`."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPSILON)).to(x.dtype)


def rotary(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary embedding of `[heads, l, e]` by `[l, e]`."""
    half = x.shape[-1] // 2
    return x * cosine + torch.cat((-x[..., half:], x[..., :half]), -1) * sine


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, `[l, f]`."""
    return F.silu(gate) * up


def torch_norm() -> Function:
    """PyTorch's fused RMS norm."""
    return lambda x, weight: F.rms_norm(x, weight.shape, weight, EPSILON)


def apex_norm() -> Function:
    """RMS norm of NVIDIA apex."""
    from apex.normalization.fused_layer_norm import fused_rms_norm_affine

    return lambda x, weight: fused_rms_norm_affine(x, weight, weight.shape, EPSILON)


def flash_norm() -> Function:
    """RMS norm of flash-attn, in Triton."""
    from flash_attn.ops.triton.layer_norm import rms_norm_fn

    return lambda x, weight: rms_norm_fn(x, weight, None, eps=EPSILON)


def liger_norm() -> Function:
    """RMS norm of Liger; its gradient may not take the place of the given one, which is used again here."""
    from liger_kernel.transformers.functional import liger_rms_norm

    return lambda x, weight: liger_rms_norm(x, weight, EPSILON, in_place=False)


def flash_rotary() -> Function:
    """Rotary embedding of flash-attn: rows are `[1, l, heads, e]`, angles those of the first half of a head."""
    from flash_attn.layers.rotary import apply_rotary_emb

    def run(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        return apply_rotary_emb(x.transpose(0, 1)[None], cosine[:, :half], sine[:, :half])[0].transpose(0, 1)

    return run


def flash_swiglu() -> Function:
    """SwiGLU of flash-attn."""
    from flash_attn.ops.activations import swiglu

    return swiglu


def liger_swiglu() -> Function:
    """SwiGLU of Liger."""
    from liger_kernel.transformers.functional import liger_swiglu

    return liger_swiglu


OPERATORS: Mapping[str, Function] = {"norm": norm, "rotary": rotary, "swiglu": swiglu}
OTHERS: Mapping[str, Mapping[str, Callable[[], Function]]] = {
    "norm": {"torch": torch_norm, "apex": apex_norm, "flash-attn": flash_norm, "liger": liger_norm},
    "rotary": {"flash-attn": flash_rotary},
    "swiglu": {"flash-attn": flash_swiglu, "liger": liger_swiglu},
}
"""By operator, what gives the function of another maker; an `ImportError` where it is not installed."""
PASSES = {"norm": (2, 3), "rotary": (2, 2), "swiglu": (3, 5)}
"""Tensors of the large size that must be read or written: forward, backward."""


def elementwise(meter: Meter) -> list[dict[str, Any]]:
    """Norm, rotary embedding and SwiGLU by every maker; bytes are those of inputs, outputs and their gradients."""
    rows: list[dict[str, Any]] = []
    backend = "inductor" if meter.device.type == "cuda" else "aot_eager"  # a smoke run need not build C++
    for name, fn in OPERATORS.items():
        ways: dict[str, Callable[[], Function]] = {
            "eager": lambda fn=fn: fn,
            "compiled": lambda fn=fn: torch.compile(fn, dynamic=False, backend=backend),
            **OTHERS[name],
        }
        for how, make in ways.items():
            with meter.tried(rows, operator=name, how=how) as row:
                elementwise_row(meter, name, make(), row)
    return rows


def elementwise_row(meter: Meter, name: str, fn: Function, row: dict[str, Any]) -> None:
    """Times forward and backward into `row`."""
    sizes = meter.sizes
    table = (sizes.tokens, sizes.head_dim)
    shapes = {
        "norm": ((sizes.tokens, sizes.hidden), (sizes.hidden,)),
        "rotary": ((sizes.hidden // sizes.head_dim, *table), table, table),
        "swiglu": ((sizes.tokens, sizes.ffn), (sizes.tokens, sizes.ffn)),
    }
    inputs = [meter.random(*shape) for shape in shapes[name]]
    differentiated = inputs[:1] if name == "rotary" else inputs
    for tensor in differentiated:
        tensor.requires_grad_()
    seconds = forward_backward_seconds(meter.clock, lambda: fn(*inputs), differentiated)
    forward, backward = (count * inputs[0].nbytes for count in PASSES[name])
    row["forward"], row["backward"] = meter.traffic(forward, seconds[0]), meter.traffic(backward, seconds[1])
    row["both"] = meter.traffic(forward + backward, sum(seconds))


def optimizer(meter: Meter) -> list[dict[str, Any]]:
    """AdamW over fp32 masters: reads weight, gradient and both moments, writes all but the gradient, 28 bytes a parameter."""
    sizes, rows = meter.sizes, []
    ways: dict[str, Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]] = {
        "AdamW fused": lambda params: torch.optim.AdamW(params, fused=True),
        "AdamW foreach": lambda params: torch.optim.AdamW(params, foreach=True),
        "apex FusedAdam": apex_adam,
    }
    for name, make in ways.items():
        with meter.tried(rows, optimizer=name, parameters=sizes.parameters) as row:
            # as many tensors as a rank's shards of 32 layers
            params = [torch.nn.Parameter(meter.random(sizes.parameters // 291, dtype=torch.float32)) for _ in range(291)]
            for param in params:
                param.grad = torch.randn_like(param)
            seconds = meter.clock.seconds(make(params).step)
            row["step"] = meter.traffic(28.0 * sum(param.numel() for param in params), seconds)
            row["peak_gib"] = peak_gib(meter.device)
            del params, param
    return rows


def apex_adam(params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW of NVIDIA apex."""
    from apex.optimizers import FusedAdam

    return FusedAdam(params, adam_w_mode=True)
