"""What GPU and which optional packages are here: kernels ask before they are chosen. Packages are imported when first needed, never before.

Role: `seqloom.ops.kernels` and `seqloom.magi.choose` refuse a kernel with the sentence that these functions end. In: device, dtype, head
size, names of modules. Out: a reason, or None.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from types import ModuleType

import torch


def refused_on_gpu(
    device: torch.device, dtype: torch.dtype, head_dim: int, most: int, least: tuple[int, int], below: tuple[int, int] | None = None
) -> str | None:
    """Why a half-precision kernel for heads of up to `most` elements and GPUs of capability `least` (and under `below`) cannot run here."""
    if device.type != "cuda":
        return f"needs an NVIDIA GPU, not {device.type}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if head_dim % 8 or head_dim > most:
        return f"takes head sizes that are multiples of 8 up to {most}, not {head_dim}"
    found = torch.cuda.get_device_capability(device)
    if found < least or (below is not None and found >= below):
        bound = "" if below is None else f" and below {below[0]}.{below[1]}"
        return f"needs compute capability {least[0]}.{least[1]} or more{bound}, and this GPU has {found[0]}.{found[1]}"
    return None


@functools.cache
def refused_package(name: str, function: str, parameter: str, wanted: str) -> str | None:
    """Why module `name` cannot be used: it does not import, or its `function` has no `parameter` as that of the release `wanted` has."""
    try:
        found = getattr(module(name), function, None)
    except (ImportError, OSError, RuntimeError) as error:  # a build for another PyTorch fails with any of these
        return f"needs {wanted}, which cannot be imported ({str(error).splitlines()[0]})"
    found = getattr(found, "_init_fn", found)  # a custom operator of PyTorch hides its parameters
    if found is None or parameter not in inspect.signature(found).parameters:
        return f"needs {wanted}, and the installed {name.partition('.')[0]} has another interface"
    return None


def module(name: str) -> ModuleType:
    """The module `name`."""
    return importlib.import_module(name)
