"""The model of tests/mlp_lm.py with the sequence split over two ranks, its layers in two segments, each run in the way that MODES names.

`MODES[i]` is for the layer of ordinal i: keep, recompute, selective, tiles or offload.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.checkpoint import checkpoint

from seqloom.runtime.collectives import all_to_all
from seqloom.runtime.mesh import axis_group
from seqloom.runtime.offload import offload
from seqloom.runtime.parameters import declare, local
from seqloom.runtime.selective import selective
from seqloom.runtime.tiles import checkpoint_tiles

MESH = {"sp": 2}
INPUTS = {"input_ids": (None, "sp"), "labels": (None, "sp")}
SHAPES = {"input_ids": (2, 8), "labels": (2, 8)}
LOSS_PARTIAL = ("sp",)
PLACEMENTS = {}
SUM_GRADS = ("sp",)
ZERO = 3
SHARDED = ("dp", "sp")
TIED = {}
MODES = ("keep", "keep")


class Layer(nn.Module):
    def __init__(self, mesh: DeviceMesh, layer: int):
        super().__init__()
        self.sp = axis_group(mesh, "sp")
        self.mode = MODES[layer]
        declare(self, {"norm.weight": (6,), "up.weight": (8, 6), "up.bias": (8,), "down.weight": (6, 8)})

    def forward(self, x: Tensor) -> Tensor:
        if self.mode == "offload":
            y = offload(self.up_forward, x)
        elif self.mode == "recompute":
            y = checkpoint(self.up_forward, x, use_reentrant=False)
        elif self.mode == "tiles":
            y = checkpoint_tiles(self.up_forward, x, tiles=2, in_dims=(1,), out_dims=(1,))
        elif self.mode == "selective":
            y = selective(self.up_forward, x, kept=(0,))
        else:
            y = self.up_forward(x)
        if self.mode == "offload":
            return offload(self.down_forward, x, y)
        return self.down_forward(x, y)

    def up_forward(self, x: Tensor) -> Tensor:
        h = F.rms_norm(x, (6,), local(self.norm.weight), 1e-6)
        return F.gelu(F.linear(h, local(self.up.weight), local(self.up.bias)))

    def down_forward(self, x: Tensor, y: Tensor) -> Tensor:
        y = all_to_all(y, 2, 1, self.sp)  # [b, l, f@sp]
        y = y.cumsum(1) / torch.arange(1, y.size(1) + 1, dtype=y.dtype, device=y.device)[:, None]
        y = all_to_all(y, 1, 2, self.sp)  # [b, l@sp, f]
        return x + F.linear(y, local(self.down.weight))


class Model(nn.Module):
    def __init__(self, mesh: DeviceMesh):
        super().__init__()
        declare(self, {"embed.weight": (11, 6), "norm.weight": (6,), "head.weight": (11, 6)})
        self.layers = nn.ModuleList(Layer(mesh, layer) for layer in range(2))

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = F.embedding(input_ids, local(self.embed.weight))
        for layer in self.layers:
            x = layer(x)
        logits = F.linear(F.rms_norm(x, (6,), local(self.norm.weight), 1e-6), local(self.head.weight))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")


MODEL = Model
BLOCKS = (Layer,)
