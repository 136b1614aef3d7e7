"""The model of tests/mlp_lm.py, embedding tied to the head, with features split over two ranks and the sequence split between products.

The norm weights work on split tokens: their gradients are parts on each rank. The tied weight is read whole by every rank for the
embedding (the same gradient everywhere) and on split tokens for the head (a part of the gradient on each rank).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard

from seqloom.runtime.collectives import all_gather, reduce_scatter, shard
from seqloom.runtime.mesh import axis_group
from seqloom.runtime.parameters import declare, local

MESH = {"tp": 2}
INPUTS = {"input_ids": (None, None), "labels": (None, "tp")}
SHAPES = {"input_ids": (2, 8), "labels": (2, 8)}
LOSS_PARTIAL = ("tp",)
PLACEMENTS = {
    "layers.*.norm.weight": {"tp": Replicate()},
    "layers.*.up.weight": {"tp": Shard(0)},
    "layers.*.up.bias": {"tp": Shard(0)},
    "layers.*.down.weight": {"tp": Shard(1)},
    "norm.weight": {"tp": Replicate()},
    "embed.weight": {"tp": Replicate()},
}
SUM_GRADS = ()
ZERO = 3
TIED = {"head.weight": "embed.weight"}


class Layer(nn.Module):
    def __init__(self, mesh: DeviceMesh):
        super().__init__()
        self.tp = axis_group(mesh, "tp")
        declare(self, {"norm.weight": (6,), "up.weight": (8, 6), "up.bias": (8,), "down.weight": (6, 8)})

    def forward(self, x: Tensor) -> Tensor:
        h = F.rms_norm(x, (6,), local(self.norm.weight, partial_grad=("tp",)), 1e-6)  # [b, l@tp, d]
        h = all_gather(h, 1, self.tp, partial_grad=True)  # [b, l, d]
        y = F.gelu(F.linear(h, local(self.up.weight), local(self.up.bias)))  # [b, l, f@tp]
        y = y.cumsum(1) / torch.arange(1, y.size(1) + 1, dtype=y.dtype, device=y.device)[:, None]
        return x + reduce_scatter(F.linear(y, local(self.down.weight)), 1, self.tp)  # [b, l@tp, d]


class Model(nn.Module):
    def __init__(self, mesh: DeviceMesh):
        super().__init__()
        self.tp = axis_group(mesh, "tp")
        declare(self, {"embed.weight": (11, 6), "norm.weight": (6,)})
        self.layers = nn.ModuleList(Layer(mesh) for _ in range(2))

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = shard(F.embedding(input_ids, local(self.embed.weight)), 1, self.tp)  # [b, l@tp, d]
        for layer in self.layers:
            x = layer(x)
        h = F.rms_norm(x, (6,), local(self.norm.weight, partial_grad=("tp",)), 1e-6)
        logits = F.linear(h, local(self.embed.weight, partial_grad=("tp",)))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")


MODEL = Model
BLOCKS = (Layer,)
