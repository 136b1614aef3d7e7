"""One training step that says where it is: what the dry run counts and the rehearsal times by part.

In: a materialized model, its optimizer and micro-batches, and a listener. Out: the step's loss and gradient norm; the listener has been
called with the name of each part as it began.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from seqloom.runtime.program import Program
from seqloom.runtime.step import MicroBatch, accumulate_gradients, reduce_loss_and_norm, scale_gradients

Phase = Literal["between", "forward", "backward", "optimizer"]
MAX_GRAD_NORM = 1.0


def run_step(
    model: nn.Module,
    program: Program,
    mesh: DeviceMesh,
    optimizer: Optimizer,
    micro_batches: Sequence[MicroBatch],
    device: torch.device,
    enter: Callable[[Phase], None],
) -> tuple[Tensor, Tensor]:
    """Accumulate, clip, update, clear, as `TrainStep` does; returns loss and gradient norm as scalars on the device.

    `enter` is told "forward" and "backward" of every micro-batch, then "optimizer" (the gradient norm included), then "between". The
    model's own hooks (FSDP2's gathers and reductions) fall into the part that they belong to.
    """
    hooks = (
        model.register_forward_pre_hook(lambda *_: enter("forward"), prepend=True),
        model.register_forward_hook(lambda *_: enter("backward")),
    )
    try:
        loss, _ = accumulate_gradients(model, program, mesh, micro_batches, device)
    finally:
        for hook in hooks:
            hook.remove()
    enter("optimizer")
    loss, grad_norm = reduce_loss_and_norm(model, program, mesh, loss)
    scale_gradients(model, (MAX_GRAD_NORM / (grad_norm + 1e-6)).clamp(max=1.0))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    enter("between")
    return loss, grad_norm
