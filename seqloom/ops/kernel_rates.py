"""How fast attention kernels are: the achieved rates that hardware files hold, and the one figure that orders them.

Role: `seqloom.ops.kernels` chooses by these rates, and `seqloom.cost` prices with them. In: the name of a device, a dtype. Out: the rates
of the hardware file that describes the device, read as plain JSON: this room knows no hardware, only which kernel is faster.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ATTENTION_BACKWARD_RATIO = 2.5
"""FLOPs of a fused attention backward over its forward: five matmuls (scores again, dV, dP, dQ, dK) against two."""
FOLDER = Path(__file__).resolve().parents[2] / "configs" / "hardware"  # beside the package, in a checkout and installed alike


@dataclass(frozen=True)
class AttentionRate:
    """Achieved fraction of peak FLOPS of one attention kernel on long sequences, of the FLOPs that a causal mask leaves."""

    forward: float
    backward: float

    @property
    def time(self) -> float:
        """Time of a forward and a backward pass, in units of the forward's at the peak: what kernels are compared by."""
        return 1 / self.forward + ATTENTION_BACKWARD_RATIO / self.backward


Rates = Mapping[str, AttentionRate]


def parse_rates(kernels: Mapping[str, Mapping[str, float]]) -> dict[str, AttentionRate]:
    """Rates from JSON: kernel name -> {"forward": fraction, "backward": fraction}."""
    return {name: AttentionRate(rate["forward"], rate["backward"]) for name, rate in kernels.items()}


@functools.cache
def device_rates(device_name: str, dtype: torch.dtype) -> tuple[str, Rates] | None:
    """The file in `configs/hardware` that describes a device (`NVIDIA H100 80GB HBM3`: h100-80gb) and its rates for `dtype`; None where
    there is none.
    """
    words = set(re.findall(r"[A-Z0-9]+", device_name.upper()))
    for path in sorted(FOLDER.glob("*.json")):
        if path.stem.partition("-")[0].upper() in words:
            return path.stem, parse_rates(_attention(json.loads(path.read_text(encoding="utf-8"))["rates"], dtype))
    return None


def _attention(rates: Mapping[str, Any], dtype: torch.dtype) -> Mapping[str, Mapping[str, float]]:
    return rates.get("by_dtype", {}).get(str(dtype).removeprefix("torch."), rates)["attention"]
