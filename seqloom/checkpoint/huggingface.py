"""Hugging Face folders: read weights slice by slice, write sharded safetensors with an index.

Role in the pipeline: a run that starts from published weights reads them through `HFReader`; `merge` writes its result with
`write_hf_folder`. Only safetensors are read: a pickled `pytorch_model.bin` is refused, for loading one runs what is in it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from seqloom.checkpoint.reader import TensorReader
from seqloom.checkpoint.tensorfile import TensorFile, TensorFileWriter, TensorInfo
from seqloom.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MARK = {"format": "pt", "writer": "seqloom"}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
WRITTEN_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
_GENERATION_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


class HFReader(TensorReader):
    """Names -> (shape, dtype) of a Hugging Face folder's weights, and slices of them; only the headers are read at first.

    `reader[name]`, `name in reader`, `reader.read_slice(name, offsets, sizes)`, and `reader.fill(name, tensor)`, which fills what this
    rank holds of a DTensor. Raises `UserError` when the folder has no safetensors, a shard is missing, or the index contradicts it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._files: dict[str, TensorFile] = {}
        self._file_of: dict[str, str] = self._read_index()
        for file in dict.fromkeys(self._file_of.values()):
            if not (self.folder / file).is_file():
                raise UserError(f"{self.folder} is incomplete: the shard {file} that its index names is missing; download the model again")

    def _read_index(self) -> dict[str, str]:
        index = self.folder / INDEX
        if index.is_file():
            try:
                weight_map = json.loads(index.read_text())["weight_map"]
                bad = next((f for f in weight_map.values() if PurePosixPath(f).name != f or f in ("", "..")), None)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{index} is not an index of safetensors shards ({error}): download the model again") from error
            if bad is not None:
                raise UserError(f"{index} names the file {bad!r} outside its folder: do not use this model")
            return weight_map
        if (self.folder / SINGLE).is_file():
            return dict.fromkeys(self._open(SINGLE), SINGLE)
        pickled = sorted(path.name for path in self.folder.glob("pytorch_model*.bin"))
        reason = (
            f"only {pickled[0]}, a pickle that is never loaded; save it with safetensors" if pickled else f"neither {SINGLE} nor {INDEX}"
        )
        raise UserError(f"{self.folder} has no weights that can be read: it holds {reason}")

    def _open(self, file: str) -> TensorFile:
        if file not in self._files:
            self._files[file] = TensorFile(self.folder / file)
        return self._files[file]

    def __getitem__(self, name: str) -> TensorInfo:
        file = self._open(self._file_of[name])
        if name not in file:
            raise UserError(f"{file.path} does not hold {name}, which the index says is there: download the model again")
        return file[name]

    def __contains__(self, name: object) -> bool:
        return name in self._file_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def read_slice(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        """See `TensorReader`."""
        self[name]
        return self._open(self._file_of[name]).read_slice(name, offsets, sizes)

    def close(self) -> None:
        """Close the files that were opened."""
        for file in self._files.values():
            file.close()
        self._files.clear()


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a folder that make a tokenizer (and a generation config), in a fixed order."""
    return [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]


@dataclass(frozen=True)
class _Weight:
    """One tensor to write: its name in the reader and the type and shape it gets."""

    source: str
    info: TensorInfo


def hf_nbytes(reader: TensorReader, names: Mapping[str, str], dtype: torch.dtype) -> int:
    """Bytes of the weights that `write_hf_folder` would write."""
    return sum(weight.info.nbytes for weight in _weights(reader, names, dtype).values())


def write_hf_folder(
    folder: Path,
    reader: TensorReader,
    names: Mapping[str, str],
    config: Mapping[str, Any],
    *,
    dtype: str = "bfloat16",
    beside: Sequence[Path] = (),
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write weights, index, config and generation config into an existing empty `folder`, and copy the files `beside` them there.

    `names` maps the names written to the names in `reader`, in the order of writing. Floating-point tensors become `dtype`; they pass
    through memory in batches of rows. A shard holds at most `max_shard_bytes` (one larger tensor gets a shard of its own).
    """
    weights = _weights(reader, names, WRITTEN_DTYPES[dtype])
    shards = _shards(weights, max_shard_bytes)
    for file, shard in shards.items():
        with TensorFileWriter(folder / file, {name: weight.info for name, weight in shard.items()}, MARK) as writer:
            for weight in shard.values():
                for batch in reader.batches(weight.source):
                    writer.append(batch.to(weight.info.dtype))
    if len(shards) > 1:
        total = sum(weight.info.nbytes for weight in weights.values())
        weight_map = {name: file for file, shard in shards.items() for name in shard}
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    _write_json(folder / "config.json", {**{k: v for k, v in config.items() if k != "torch_dtype"}, "dtype": dtype})
    generation = {"_from_model_config": True, **{key: config[key] for key in _GENERATION_KEYS if config.get(key) is not None}}
    _write_json(folder / "generation_config.json", generation)
    for path in beside:
        (folder / path.name).write_bytes(path.read_bytes())


def _weights(reader: TensorReader, names: Mapping[str, str], dtype: torch.dtype) -> dict[str, _Weight]:
    weights = {}
    for name, source in names.items():
        shape, stored = reader[source]
        weights[name] = _Weight(source, TensorInfo(shape, dtype if stored.is_floating_point else stored))
    return weights


def _shards(weights: Mapping[str, _Weight], max_bytes: int) -> dict[str, dict[str, _Weight]]:
    """File name -> the tensors in it, filled in order."""
    parts: list[dict[str, _Weight]] = [{}]
    filled = 0
    for name, weight in weights.items():
        if parts[-1] and filled + weight.info.nbytes > max_bytes:
            parts.append({})
            filled = 0
        parts[-1][name] = weight
        filled += weight.info.nbytes
    if len(parts) == 1:
        return {SINGLE: parts[0]}
    return {f"model-{number:05d}-of-{len(parts):05d}.safetensors": part for number, part in enumerate(parts, 1)}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
