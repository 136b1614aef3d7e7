"""A small language model whose operations, bytes sent and bytes kept can be worked out on paper: see tests/test_dryrun.py.

Sequence and weights are split as in a large plan: tokens over `sp` and `tp`, heads and features over `tp` inside a block (gathered and
reduced along the sequence), heads over both around attention, the MLP computed again in the backward.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.utils.checkpoint import checkpoint

from chunk_linear_cross_entropy import chunk_linear_cross_entropy
from seqloom.ops.attention import attention
from seqloom.runtime.collectives import all_gather, all_to_all, reduce_scatter
from seqloom.runtime.mesh import axis_group
from seqloom.runtime.parameters import declare, local

D, F_, V, E, L = 64, 128, 100, 8, 256  # hidden, MLP, vocabulary, head size, tokens
LAYERS = 2

MESH = {"sp": 2, "tp": 2}
INPUTS = {"input_ids": (None, ("sp", "tp")), "labels": (None, ("sp", "tp"))}
SHAPES = {"input_ids": (1, L), "labels": (1, L)}
LOSS_PARTIAL = ("sp", "tp")
PLACEMENTS = {
    "embed.weight": {"tp": Replicate()},
    "head.weight": {"tp": Replicate()},
    **{f"layers.*.{name}.weight": {"tp": Shard(0)} for name in ("q", "k", "v", "up")},
    **{f"layers.*.{name}.weight": {"tp": Shard(1)} for name in ("o", "down")},
}
SUM_GRADS = ("sp",)
ZERO = 3
TIED = {}


class Layer(nn.Module):
    def __init__(self, mesh: DeviceMesh):
        super().__init__()
        self.sp, self.tp = axis_group(mesh, "sp"), axis_group(mesh, "tp")
        declare(self, {f"{name}.weight": (D, D) for name in "qkvo"} | {"up.weight": (F_, D), "down.weight": (D, F_)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(x)
        return x + checkpoint(self.mlp, x, use_reentrant=False)

    def attend(self, x: Tensor) -> Tensor:
        x = all_gather(x, 1, self.tp, partial_grad=True)  # [b, l@sp, d]
        q, k, v = (self.heads(F.linear(x, local(w.weight))) for w in (self.q, self.k, self.v))
        y = attention(q, k, v, scale=E**-0.5, causal=True)  # [b, h@tp·sp, l, e]
        y = all_to_all(y, 2, 1, self.sp).transpose(1, 2).flatten(2)  # [b, l@sp, d@tp]
        return reduce_scatter(F.linear(y, local(self.o.weight)), 1, self.tp)

    def heads(self, x: Tensor) -> Tensor:
        return all_to_all(x.unflatten(2, (-1, E)).transpose(1, 2), 1, 2, self.sp)

    def mlp(self, x: Tensor) -> Tensor:
        x = all_gather(x, 1, self.tp, partial_grad=True)
        return reduce_scatter(F.linear(F.gelu(F.linear(x, local(self.up.weight))), local(self.down.weight)), 1, self.tp)


class Model(nn.Module):
    def __init__(self, mesh: DeviceMesh):
        super().__init__()
        declare(self, {"embed.weight": (V, D), "head.weight": (V, D)})
        self.layers = nn.ModuleList(Layer(mesh) for _ in range(LAYERS))

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = F.embedding(input_ids, local(self.embed.weight, partial_grad=("tp",)))  # [b, l@sp·tp, d]
        for layer in self.layers:
            x = layer(x)
        losses = chunk_linear_cross_entropy(x, local(self.head.weight, partial_grad=("tp",)), labels, padding_idx=-100, chunk_size=L // 8)
        return losses.sum(dtype=torch.float32)


MODEL = Model
BLOCKS = (Layer,)
