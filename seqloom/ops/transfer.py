"""Copies from the host to a device that the host does not wait for.

Role: inputs and index tensors are made on the host and used on a GPU. A copy from ordinary memory makes the host wait until the GPU has
done what it was given before; one from pinned memory does not, and PyTorch keeps the memory until the copy is done.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor`, which lies on the host, on `device`: a copy in the order of the device's current stream; itself where it is there."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
