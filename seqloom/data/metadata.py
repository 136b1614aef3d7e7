"""What a packed data set says of itself: the file `seqloom.json` in its folder."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from seqloom.errors import UserError

FILE = "seqloom.json"
TOKENIZER_FOLDER = "tokenizer"
VALIDATION_FOLDER = "validation"
FORMAT_VERSION = 1
STREAM, DOCUMENTS = "stream", "documents"
Pack = Literal["stream", "documents"]


@dataclass(frozen=True)
class Metadata:
    """`rows` rows of `sequence_length` tokens that hold `tokens` tokens (padding not counted) of `documents` documents.

    `tokenizer` and `corpus` are what the user named them, the digests (SHA-256) what they held; every id is below `vocab_size`.
    `pack` says whether the rows know their documents; folders written before there was a choice are streams. `typical_row` are the
    lengths of the documents in a row of median work (the sum of squared lengths); in a stream that is the whole row. `validation` is the
    share of the corpus' documents that lie in a data set of their own in the folder `validation` and not in these rows.
    """

    sequence_length: int
    vocab_size: int
    tokenizer: str
    tokenizer_digest: str
    corpus: str
    corpus_digest: str
    rows: int
    tokens: int
    documents: int
    version: int = FORMAT_VERSION
    pack: Pack = STREAM
    typical_row: tuple[int, ...] = ()
    validation: float = 0.0

    def __post_init__(self) -> None:
        """One document as long as the row where no lengths are given; what JSON gives as a list becomes a tuple."""
        object.__setattr__(self, "typical_row", tuple(self.typical_row) or (self.sequence_length,))

    def difference(self, other: Metadata) -> str | None:
        """The first setting in which another data set was made differently, in words, or None. Names of the same contents may differ."""
        if self.sequence_length != other.sequence_length:
            return f"sequence_length is {self.sequence_length} there, not {other.sequence_length}"
        if self.pack != other.pack:
            return f"made with --pack {self.pack} there, not {other.pack}"
        if self.validation != other.validation:
            return f"made with --validation {self.validation:g} there, not {other.validation:g}"
        for label in ("corpus", "tokenizer"):
            digest = f"{label}_digest"
            if getattr(self, digest) == getattr(other, digest):
                continue
            called, now_called = getattr(self, label), getattr(other, label)
            if called != now_called:
                return f"{label} is {called} there, not {now_called}"
            return f"{label} {called} holds other documents or rules now"
        return None


def write_metadata(folder: Path, metadata: Metadata) -> None:
    """Write `seqloom.json` into a folder."""
    (folder / FILE).write_text(json.dumps(dataclasses.asdict(metadata), indent=2) + "\n", encoding="utf-8")


def read_metadata(folder: Path) -> Metadata:
    """Read `seqloom.json` of a data set. Raises UserError if the folder was not made by bookcorpus.py or the file is damaged."""
    if not folder.exists():
        raise UserError(f"there is no data set {folder}: make it with `python bookcorpus.py --save_path {folder} ...`")
    path = folder / FILE
    if not path.is_file():
        raise UserError(f"{folder} is no packed data set (it has no {FILE}): make one with `python bookcorpus.py --save_path ...`")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        known = {field.name for field in dataclasses.fields(Metadata)}
        metadata = Metadata(**{key: value for key, value in fields.items() if key in known})
        if metadata.version == FORMAT_VERSION:
            _check_pack(metadata)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}): make the data set again with bookcorpus.py --overwrite") from error
    if metadata.version != FORMAT_VERSION:
        raise UserError(f"{folder} has format {metadata.version}, this version reads {FORMAT_VERSION}: make it again with bookcorpus.py")
    return metadata


def _check_pack(metadata: Metadata) -> None:
    if metadata.pack not in get_args(Pack):
        raise ValueError(f"pack is {metadata.pack}, not one of {', '.join(get_args(Pack))}")
    if min(metadata.typical_row) < 1 or sum(metadata.typical_row) != metadata.sequence_length:
        raise ValueError(f"the lengths of typical_row do not add up to {metadata.sequence_length}")
