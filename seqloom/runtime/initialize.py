"""Random weights and computed buffers, made by the original model's own code, one module at a time.

In: the program's allocated model, the Hugging Face config, a seed. The original model is built on meta; each of its modules that owns
parameters becomes real on the CPU for a moment, is initialized by the model's `_init_weights` from a generator seeded by (seed, path of
the module), gives each rank its slice and is freed. So the values depend neither on the plan nor on the number of ranks, and the
largest single module bounds the memory. Buffers (rotary frequencies) are recomputed by the same code.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from seqloom.checkpoint.slices import local_boxes, local_tensor
from seqloom.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def original_model(hf_config: PretrainedConfig) -> PreTrainedModel:
    """The original model on meta in fp32: its modules, names and initialization, without its weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(hf_config), dtype=torch.float32, attn_implementation="eager")


@torch.no_grad()
def fill_random(model: nn.Module, hf_config: PretrainedConfig, seed: int) -> None:
    """Fill this rank's pieces of every parameter of `model` with the original model's random initialization, drawn in fp32.

    Raises `UserError` where the original model has no such parameter, or its initialization leaves one unset.
    """
    original = original_model(hf_config)
    wanted = dict(model.named_parameters())
    for path, module in original.named_modules():
        names = {f"{path}.{leaf}".removeprefix("."): leaf for leaf in module._parameters}
        targets = {leaf: wanted.pop(name) for name, leaf in names.items() if name in wanted}
        if targets:
            with _real(module._parameters, list(targets), float("nan")), _random(seed, path):
                _initialize(original, path)
                for leaf, param in targets.items():
                    _store(f"{path}.{leaf}", module._parameters[leaf], param)
    if wanted:
        raise UserError(f"the model of this config has no parameter {min(wanted)}, which the program declares; compile it again")


@torch.no_grad()
def fill_buffers(model: nn.Module, hf_config: PretrainedConfig) -> None:
    """Compute every buffer of `model` as the original model does. Raises `UserError` for one that it lacks or does not compute."""
    wanted = dict(model.named_buffers())
    if not wanted:
        return
    original = original_model(hf_config)
    for path, module in original.named_modules():
        names = {f"{path}.{leaf}".removeprefix("."): leaf for leaf in module._buffers}
        targets = {leaf: wanted.pop(name) for name, leaf in names.items() if name in wanted}
        if targets:
            # Every buffer of the module becomes real: its initialization may write them all, or one from another.
            with _real(module._buffers, [leaf for leaf, buffer in module._buffers.items() if buffer is not None], float("nan")):
                _initialize(original, path)
                for leaf, buffer in targets.items():
                    _store(f"{path}.{leaf}", module._buffers[leaf], buffer)
    if wanted:
        raise UserError(f"the model of this config has no buffer {min(wanted)}, which the program declares; compile it again")


def _initialize(original: PreTrainedModel, path: str) -> None:
    """Run the model's initialization of one module, then of the modules around it, as transformers does, children first.

    The modules around it matter (GPT-2's attention scales its output projection); everything else in them is on meta, where
    initialization neither costs nor draws random numbers.
    """
    parts = path.split(".") if path else []
    for length in range(len(parts), -1, -1):
        module = original.get_submodule(".".join(parts[:length]))
        _owner(original, parts[:length])._init_weights(module)


def _owner(original: PreTrainedModel, parts: list[str]) -> PreTrainedModel:
    """The innermost model that holds a module (or is it): a composite model's parts bring their own initialization."""
    from transformers import PreTrainedModel

    around = [original.get_submodule(".".join(parts[:length])) for length in range(len(parts), -1, -1)]
    return next(module for module in around if isinstance(module, PreTrainedModel))


@contextlib.contextmanager
def _real(tensors: dict[str, Tensor | None], leaves: list[str], fill: float) -> Iterator[None]:
    """Put real tensors in place of meta ones for a moment. Floating-point ones are filled, so that what stays unset is seen."""
    kept = {leaf: tensors[leaf] for leaf in leaves}
    for leaf, meta in kept.items():
        real = torch.full(meta.shape, fill, dtype=meta.dtype) if meta.is_floating_point() else torch.zeros(meta.shape, dtype=meta.dtype)
        tensors[leaf] = nn.Parameter(real, requires_grad=meta.requires_grad) if isinstance(meta, nn.Parameter) else real
    try:
        yield
    finally:
        tensors.update(kept)


@contextlib.contextmanager
def _random(seed: int, path: str) -> Iterator[None]:
    """Draw from a stream of its own for each module, and leave the global generator as it was."""
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        yield


def _store(name: str, source: Tensor, target: Tensor) -> None:
    """Copy this rank's boxes of `source` (whole, on the CPU) into the local part of `target`."""
    if source.shape != target.shape:
        raise UserError(f"{name} has shape {tuple(source.shape)} in the model but {tuple(target.shape)} in the program; compile it again")
    if source.is_floating_point() and source.isnan().any():
        raise UserError(f"the initialization of this model in transformers leaves {name} unset; start from a folder with weights")
    for box in local_boxes(target):
        box.place.narrow(local_tensor(target)).copy_(box.part.narrow(source))
