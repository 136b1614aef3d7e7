"""SwiGLU, silu(gate) * up, that keeps only its two inputs for the backward pass (Shazeer, arXiv:2002.05202).

Written out, PyTorch also keeps silu(gate), a third tensor of the size of the MLP's hidden layer. A small example of a custom operator: put
a function in a module, say which dimensions it has, and call it in the model.

    from custom_ops.swiglu import swiglu

    class MLP(torch.nn.Module):
        def forward(self, x):
            return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))

`python -m seqloom check-op custom_ops.swiglu:swiglu` shows that the annotation tells the truth; `python -m seqloom compile` then keeps the
call as one operator, may split every dimension of it, and the emitted program imports this function.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seqloom.ops import register_op


@register_op("* f, * f -> * f", saved=("gate", "up"))
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, element by element; both `[*, f]`."""
    return _SwiGLU.apply(gate, up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return torch.nn.functional.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        sigmoid = torch.sigmoid(gate)
        d_silu = sigmoid * (1 + gate * (1 - sigmoid))
        return grad * up * d_silu, grad * gate * sigmoid
