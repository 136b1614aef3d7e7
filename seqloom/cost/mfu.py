"""Model FLOPs and model FLOPs utilization (MFU), counted in full and causally.

Role in the pipeline: plans and training logs report both counts. The full count is the published convention (PaLM, Chowdhery et al.
2022, appendix B): attention as if every token saw every other. The causal count is the work a causal mask leaves, half of the
attention term. Recomputation never counts: MFU is of the model's FLOPs, not the hardware's.
"""

from __future__ import annotations

BACKWARD_RATIO = 2
"""FLOPs of the model's backward pass over its forward: one gradient for each of the two operands of every matmul."""


def forward_flops(params: float, layers: int, hidden: int, seq: int, causal: bool = False) -> float:
    """FLOPs of the forward pass over one sequence of `seq` tokens: `2 params seq + 4 layers hidden seq^2`.

    `params` counts the model's parameters, `hidden` is query heads times head dimension. With `causal` the attention term is halved.
    """
    attention = 4.0 * layers * hidden * seq**2
    return 2.0 * params * seq + (attention / 2 if causal else attention)


def step_flops(forward: float, sequences: int) -> float:
    """FLOPs of one optimizer step over `sequences` sequences: forward and backward, without recomputation."""
    return (1 + BACKWARD_RATIO) * forward * sequences


def mfu(forward: float, sequences: int, step_seconds: float, num_devices: int, peak_flops: float) -> float:
    """The fraction of `num_devices` times `peak_flops` that a step of `step_seconds` over `sequences` sequences reaches.

    `forward` is `forward_flops` of one sequence, full or causal; `sequences` is of all micro-batches and all devices together.
    """
    return step_flops(forward, sequences) / (step_seconds * num_devices * peak_flops)
