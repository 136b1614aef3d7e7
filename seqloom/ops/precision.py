"""The precision of sums: what operators add up in, given what their tensors are stored in."""

from __future__ import annotations

import torch


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, losses and log-sum-exps over tensors of `dtype`: fp32 for half precision, otherwise the dtype itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
