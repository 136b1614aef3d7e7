"""Muon over distributed matrices: each update is orthogonalized as the whole matrix that it is, wherever its pieces lie.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) replaces the momentum of a matrix by the nearest matrix with singular values
near one. That does not split: the pieces of a matrix, each orthogonalized, are not the matrix orthogonalized. So momentum and weights stay
sharded, every update is gathered, each rank orthogonalizes the whole and keeps its piece. Learning rates are scaled so that an update has
the size of AdamW's (Liu et al. 2025, Muon is Scalable for LLM Training, section 2.2).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
EPSILON = 1e-7
ADAMW_SIZE = 0.2  # root mean square of a typical update of AdamW, in learning rates


class Muon(Optimizer):
    """Muon with Nesterov momentum over matrices, DTensors or not. `dtype` is what the orthogonalization is computed in.

    `groups` are those of any optimizer, with `weight_decay` each. Every rank of a parameter's mesh must step together.
    """

    def __init__(self, groups: Iterable[dict], lr: float, momentum: float, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": 0.0})
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, group["lr"], group["momentum"], group["weight_decay"])

    def _update(self, param: Tensor, lr: float, momentum: float, weight_decay: float) -> None:
        state = self.state[param]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(param, requires_grad=False)
        buffer = state["momentum_buffer"]
        buffer.lerp_(param.grad, 1 - momentum)
        update = param.grad.lerp(buffer, momentum)
        whole = update.full_tensor() if isinstance(update, DTensor) else update
        direction = orthogonalize(whole.to(self._dtype)).to(param.dtype)
        if isinstance(param, DTensor):
            direction = distribute_tensor(direction, param.device_mesh, param.placements, src_data_rank=None)
        param.mul_(1 - lr * weight_decay)
        param.add_(direction, alpha=-lr * ADAMW_SIZE * math.sqrt(max(param.shape)))


def orthogonalize(matrix: Tensor) -> Tensor:
    """A matrix `[m, n]` with its singular values brought near one, by five Newton-Schulz steps of the fifth order."""
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    near = matrix.T if tall else matrix
    near = near / near.norm().clamp(min=EPSILON)
    for _ in range(STEPS):
        gram = near @ near.T
        near = torch.addmm(near, torch.addmm(gram, gram, gram, beta=b, alpha=c), near, beta=a)
    return near.T if tall else near
