"""FlashAttention 3 and 4 from their packages, as operators that `torch.compile` and fake tensors take whole.

Role: the kernels 'flash3' and 'flash4' of `seqloom.ops.kernels`. The packages want `[b, l, heads, e]` with the elements of a head side by
side: what a model's projections give, so `package_attention` passes transposed views, and nothing is copied. They take grouped heads, and
their causal mask ends at the last key: a later piece of the queries is one call. Papers: Shah et al., FlashAttention-3, arXiv:2407.08608.

PyTorch sees one operator forward and one backward, whose results lie in memory as their fake ones say: the output `[b, l, heads, e]`, each
gradient as its input.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seqloom.ops.installed import module
from seqloom.ops.kernels import PACKAGE_3, PACKAGE_4

PACKAGES = ("flash3", "flash4")


def package_attention(
    kernel: str, query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool, window: int = 0, softcap: float = 0.0
) -> Tensor:
    """Attention by the package `kernel`: query `[b, h, l, e]`, key and value `[b, k, m, e]` -> `[b, h, l, e]`, by autograd's rules.

    With `causal` row i of the queries sees the keys up to m - l + i, with a `window` so many of them; 0 is no window and no cap.
    """
    rows = (x.transpose(1, 2) for x in (query, key, value))
    return torch.ops.seqloom.package_forward(*rows, kernel, scale, causal, window, softcap)[0].transpose(1, 2)


def _mask(causal: bool, window: int, softcap: float) -> dict[str, Any]:
    """What both packages call these. A window is causal by its right side."""
    sides = {"window_size_left": window - 1, "window_size_right": 0} if window else {}
    return {"causal": causal and not window, **sides, **({"softcap": softcap} if softcap else {})}


@torch.library.custom_op("seqloom::package_forward", mutates_args=())
def _package_forward(
    q: Tensor, k: Tensor, v: Tensor, kernel: str, scale: float, causal: bool, window: int, softcap: float
) -> tuple[Tensor, Tensor]:
    """Output `[b, l, heads, e]` and log-sum-exp `[b, heads, l]` in fp32."""
    q, k, v = map(_rows, (q, k, v))
    if kernel == "flash3":
        output, lse = module(PACKAGE_3)._flash_attn_forward(q, k, v, softmax_scale=scale, **_mask(causal, window, softcap))[:2]
    else:
        run, options = module(PACKAGE_4)._flash_attn_fwd, _mask(causal, window, softcap)
        output, lse = run(q, k, v, softmax_scale=scale, **options, return_lse=True)[:2]
    return output, lse.contiguous()


@_package_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, kernel: str, scale: float, causal: bool, window: int, softcap: float) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, length), dtype=torch.float32)


@torch.library.custom_op("seqloom::package_backward", mutates_args=())
def _package_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    lse: Tensor,
    kernel: str,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    grad, q, k, v = map(_rows, (grad, q, k, v))
    found, deterministic = tuple(torch.empty_like(x) for x in (q, k, v)), torch.are_deterministic_algorithms_enabled()
    if kernel == "flash3":
        options = _mask(causal, window, softcap) | dict(zip(("dq", "dk", "dv"), found, strict=True))
        options["is_causal"] = options.pop("causal")
        module(PACKAGE_3)._flash_attn_backward(grad, q, k, v, output, lse, softmax_scale=scale, **options, deterministic=deterministic)
        return found
    run, options = module(PACKAGE_4)._flash_attn_bwd, _mask(causal, window, softcap)
    made = run(q, k, v, output, grad, lse, softmax_scale=scale, **options, deterministic=deterministic)[:3]
    return tuple(x if x.stride() == like.stride() else like.copy_(x) for x, like in zip(made, found, strict=True))


@_package_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    lse: Tensor,
    kernel: str,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.empty_like(_rows(x)) for x in (q, k, v))


def _rows(x: Tensor) -> Tensor:
    """`x` with the elements of a head side by side, as these kernels read them: itself, but for odd views."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *torch.ops.seqloom.package_backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None, None, None


_package_forward.register_autograd(_differentiate, setup_context=_keep)
