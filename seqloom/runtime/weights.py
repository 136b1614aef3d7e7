"""Weights of a Hugging Face folder, streamed from safetensors slices straight into this rank's pieces.

In: the program's allocated model and a folder with `model.safetensors` or an index of several files. Each rank reads only the
rectangles that it holds. Tied parameters are found under either name, and the names of a headless checkpoint (`h.0.attn` for
`transformer.h.0.attn`, as GPT-2's is published) under theirs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from seqloom.checkpoint.slices import local_boxes, local_tensor
from seqloom.errors import UserError
from seqloom.runtime.initialize import original_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def has_weights(folder: Path) -> bool:
    """Whether a folder holds safetensors weights that `fill_from_folder` can read."""
    return (folder / SINGLE_FILE).is_file() or (folder / INDEX_FILE).is_file()


def fill_from_folder(model: nn.Module, hf_config: PretrainedConfig, folder: Path, tied: Mapping[str, str]) -> None:
    """Fill this rank's pieces of every parameter of `model`; `tied` maps aliases to the names the program declares.

    Raises `UserError` that names the keys that are missing, unexpected or of another shape, or the file that cannot be read.
    """
    files = _files_by_key(folder)
    wanted = dict(model.named_parameters())
    original = original_model(hf_config)
    keys = _match(wanted, files, original, tied, folder)
    by_file: dict[Path, list[str]] = {}
    for name, key in keys.items():
        by_file.setdefault(files[key], []).append(name)
    for path, names in by_file.items():
        try:
            with safe_open(path, framework="pt") as file:
                for name in names:
                    _read(file, keys[name], name, wanted[name], path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"the weights file {path} cannot be read ({error}); fetch or save it again") from error


@torch.no_grad()
def _read(file: object, key: str, name: str, param: nn.Parameter, path: Path) -> None:
    piece = file.get_slice(key)
    if tuple(piece.get_shape()) != tuple(param.shape):
        raise UserError(f"{key} in {path} has shape {tuple(piece.get_shape())} but the program needs {tuple(param.shape)} for {name}")
    for box in local_boxes(param):
        ranges = tuple(slice(start, start + size) for start, size in zip(box.part.offsets, box.part.sizes, strict=True))
        box.place.narrow(local_tensor(param)).copy_(piece[ranges])


def _files_by_key(folder: Path) -> dict[str, Path]:
    """The file that holds each tensor of the folder."""
    index = folder / INDEX_FILE
    if index.is_file():
        try:
            files = {key: folder / name for key, name in json.loads(index.read_text())["weight_map"].items()}
        except (ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{index} is not an index of safetensors files; fetch or save the model again") from error
        missing = sorted({path.name for path in files.values() if not path.is_file()})
        if missing:
            raise UserError(f"{folder} lacks the weights file {missing[0]} that its index names; fetch or save the model again")
        return files
    single = folder / SINGLE_FILE
    if not single.is_file():
        raise UserError(f"{folder} has no {SINGLE_FILE} and no {INDEX_FILE}; give a folder that has, or initialize randomly")
    try:
        with safe_open(single, framework="pt") as file:
            return dict.fromkeys(file.keys(), single)
    except (SafetensorError, OSError) as error:
        raise UserError(f"the weights file {single} cannot be read ({error}); fetch or save it again") from error


def _match(
    wanted: Iterable[str], files: Mapping[str, Path], original: PreTrainedModel, tied: Mapping[str, str], folder: Path
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
