"""The manifest of a checkpoint: what every file and every tensor of a step folder is. JSON, with a digest of its own.

Role in the pipeline: `write` builds a `Manifest` and writes it last; `read`, `merge` and `inspect` start from it. docs/checkpoints.md
describes the format. A manifest is data to distrust: names that leave the folder and sizes that contradict each other are refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from seqloom.checkpoint.digest import BLOCK_BYTES, HASH, HEX_LENGTH, hash_bytes, root_digest
from seqloom.checkpoint.slices import Box
from seqloom.checkpoint.tensorfile import DTYPES, TensorInfo, dtype_name, is_shape
from seqloom.errors import UserError

FORMAT = "seqloom-checkpoint"
VERSION = 2
MANIFEST = "manifest.json"
_DIGEST_LINE = b'\n "digest": "%s"\n}\n'


@dataclass(frozen=True)
class FileEntry:
    """One file: its size and the digests of its blocks."""

    nbytes: int
    blocks: tuple[str, ...]

    @property
    def digest(self) -> str:
        """The digest of the whole file."""
        return root_digest(self.blocks)


@dataclass(frozen=True)
class Piece:
    """A part of a tensor: the tensor called `key` in `file` lies at `box` of the global tensor."""

    file: str
    key: str
    box: Box


@dataclass(frozen=True)
class TensorEntry:
    """One tensor: global shape and dtype, and the pieces that hold each element exactly once."""

    info: TensorInfo
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Manifest:
    """A whole checkpoint as data. `state` is the training state, plain JSON; files are named relative to the folder."""

    step: int
    world_size: int
    files: Mapping[str, FileEntry]
    tensors: Mapping[str, TensorEntry]
    state: Mapping[str, Any]
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """The text of `manifest.json`. Its last field is the digest of all bytes before that field's line."""
        document = {
            "format": FORMAT,
            "version": VERSION,
            "step": self.step,
            "world_size": self.world_size,
            "plan": self.state.get("plan"),
            "mesh": self.state.get("mesh"),
            "versions": dict(self.versions),
            "hash": HASH,
            "block_bytes": BLOCK_BYTES,
            "files": {name: {"bytes": f.nbytes, "digest": f.digest, "blocks": f.blocks} for name, f in self.files.items()},
            "tensors": {name: _tensor_to_json(entry) for name, entry in self.tensors.items()},
            "state": dict(self.state),
        }
        lines = ",\n".join(f" {json.dumps(key)}: {_dump(value)}" for key, value in document.items())
        body = b"{\n" + lines.encode() + b","
        return body + _DIGEST_LINE % hash_bytes(body).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """The manifest of such a text; raises `ValueError` saying what is wrong with it."""
        tail = len(_DIGEST_LINE % (b"0" * HEX_LENGTH))
        body = data[:-tail]
        found = hash_bytes(body)
        if data[len(body) :] != _DIGEST_LINE % found.encode():
            written = data[len(body) :].split(b'"')[-2:-1] or [b"none"]
            raise ValueError(f"its bytes have digest {found}, its last line says {written[0].decode(errors='replace')}")
        document = json.loads(data)
        _require(document["format"] == FORMAT, f"its format is {document['format']!r}, not {FORMAT!r}")
        _require(document["version"] == VERSION, f"its version is {document['version']}, this program reads {VERSION}")
        _require((document["hash"], document["block_bytes"]) == (HASH, BLOCK_BYTES), "its hash or block size is not known here")
        files = {_safe_name(name): _file_from_json(name, entry) for name, entry in document["files"].items()}
        tensors = {name: _tensor_from_json(name, entry, files) for name, entry in document["tensors"].items()}
        return cls(document["step"], document["world_size"], files, tensors, document["state"], document["versions"])

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a step folder. Raises `UserError` when there is none or it is damaged."""
        path = folder / MANIFEST
        try:
            return cls.from_bytes(path.read_bytes())
        except OSError as error:
            raise UserError(f"{folder} is not a checkpoint: cannot read {path} ({error.strerror})") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{path} is damaged ({error}): use another checkpoint or a good copy of this one") from error

    def wrong_sizes(self, folder: Path, places: Mapping[str, Path] | None = None) -> Iterator[str]:
        """A sentence part for every file of `folder` that is missing, is a link out of it, or has another size.

        A file that `places` names is looked for in that folder instead.
        """
        for name, entry in self.files.items():
            home = (places or {}).get(name, folder)
            try:
                found = os.stat(home / name).st_size
                inside = Path(os.path.realpath(home / name)).is_relative_to(os.path.realpath(home))
            except OSError as error:
                yield f"{name} is missing" if isinstance(error, FileNotFoundError) else f"{name}: {error.strerror}"
                continue
            if not inside:
                yield f"{name} is a link that leaves the folder"
            elif found != entry.nbytes:
                yield f"{name} has {found} bytes, the manifest says {entry.nbytes}"


def _dump(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _tensor_to_json(entry: TensorEntry) -> dict[str, Any]:
    pieces = [{"file": p.file, "key": p.key, "offsets": p.box.offsets, "sizes": p.box.sizes} for p in entry.pieces]
    return {"dtype": dtype_name(entry.info.dtype), "shape": entry.info.shape, "pieces": pieces}


def _file_from_json(name: str, entry: dict[str, Any]) -> FileEntry:
    result = FileEntry(entry["bytes"], tuple(entry["blocks"]))
    _require(_is_size(result.nbytes) and len(result.blocks) == -(-result.nbytes // BLOCK_BYTES), f"the number of blocks of {name}")
    _require(result.digest == entry["digest"], f"the digest of {name} does not follow from its blocks")
    return result


def _tensor_from_json(name: str, entry: dict[str, Any], files: Mapping[str, FileEntry]) -> TensorEntry:
    info = TensorInfo(tuple(entry["shape"]), DTYPES[entry["dtype"]])
    _require(is_shape(info.shape), f"the shape of {name}")
    pieces = []
    for piece in entry["pieces"]:
        box = Box(tuple(piece["offsets"]), tuple(piece["sizes"]))
        _require(all(map(_is_size, box.offsets)) and is_shape(box.sizes) and len(box.offsets) == len(info.shape), f"a slice of {name}")
        fits = all(o + n <= size for o, n, size in zip(box.offsets, box.sizes, info.shape, strict=True))
        _require(fits, f"a slice of {name} lies outside its shape")
        _require(piece["file"] in files, f"{name} is in {piece['file']!r}, which is not a file of this checkpoint")
        pieces.append(Piece(piece["file"], piece["key"], box))
    held = sum(piece.box.numel for piece in pieces)
    _require(held * info.dtype.itemsize == info.nbytes, f"the pieces of {name} do not hold it exactly once")
    return TensorEntry(info, tuple(pieces))


def _safe_name(name: str) -> str:
    path = PurePosixPath(name)
    unsafe = path.is_absolute() or not path.parts or ".." in path.parts or "\\" in name or "\0" in name or path.as_posix() != name
    _require(not unsafe, f"the file name {name!r} leaves the folder")
    return name


def _is_size(value: object) -> bool:
    return type(value) is int and value >= 0


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
