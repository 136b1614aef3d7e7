"""Weights of a Hugging Face folder, streamed from safetensors slices straight into this rank's pieces.

In: the program's allocated model and a folder with `model.safetensors` or an index of several files. Each rank reads only the
rectangles that it holds. Tied parameters are found under either name, and the names of a headless checkpoint (`h.0.attn` for
`transformer.h.0.attn`, as GPT-2's is published) under theirs.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from seqloom.checkpoint import HFReader
from seqloom.errors import UserError
from seqloom.runtime.initialize import original_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def fill_from_folder(model: nn.Module, hf_config: PretrainedConfig, folder: Path, tied: Mapping[str, str]) -> None:
    """Fill this rank's pieces of every parameter of `model`; `tied` maps aliases to the names the program declares.

    Raises `UserError` that names the keys that are missing, unexpected or of another shape, or the file that cannot be read.
    """
    reader = HFReader(folder)
    wanted = dict(model.named_parameters())
    for name, key in _match(wanted, reader, original_model(hf_config), tied, folder).items():
        stored = tuple(reader[key].shape)
        if stored != tuple(wanted[name].shape):
            raise UserError(f"{key} in {folder} has shape {stored} but the program needs {tuple(wanted[name].shape)} for {name}")
        reader.fill(key, wanted[name])
    reader.close()


def _match(
    wanted: Iterable[str], files: Collection[str], original: PreTrainedModel, tied: Mapping[str, str], folder: Path
) -> dict[str, str]:
    """The stored key of each parameter. Keys the original model itself ignores (old mask buffers) are not unexpected."""
    prefix = f"{original.base_model_prefix}."
    aliases = {canonical: [alias for alias, target in tied.items() if target == canonical] for canonical in tied.values()}
    keys, missing, known = {}, [], set()
    for name in wanted:
        names = [candidate for key in (name, *aliases.get(name, ())) for candidate in (key, key.removeprefix(prefix))]
        found = next((candidate for candidate in names if candidate in files), None)
        known.update(names)
        if found is None:
            missing.append(name)
        else:
            keys[name] = found
    if missing:
        raise UserError(f"the weights in {folder} lack {_listed(missing)}; give the folder of the model the program was compiled for")
    ignored = re.compile("|".join([*(original._keys_to_ignore_on_load_unexpected or ()), r"(?!)"]))
    buffers = {name for name, _ in original.named_buffers()}
    unexpected = [key for key in files if key not in known and key not in buffers and not ignored.search(key)]
    if unexpected:
        raise UserError(f"the weights in {folder} have {_listed(unexpected)}, which the program lacks; give the folder it was compiled for")
    return keys


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
