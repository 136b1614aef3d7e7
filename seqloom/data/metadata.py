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
DEFAULT_PACK: Pack = "documents"
ChatLabels = Literal["assistant", "all"]


@dataclass(frozen=True)
class Part:
    """What one corpus gave to a data set: `tokens` of `documents`, which lay in the column `column`; `unused` documents with tokens were
    left out because another corpus ran out first. `name` is what the user called it, `digest` what it held."""

    name: str
    digest: str
    column: str
    chat: bool = False
    tokens: int = 0
    documents: int = 0
    unused: int = 0


@dataclass(frozen=True)
class Metadata:
    """`rows` rows of `sequence_length` tokens that hold `tokens` tokens (padding not counted) of `documents` documents.

    `tokenizer` and `corpus` are what the user named them, the digests (SHA-256) what they held; every id is below `vocab_size`.
    `pack` says whether the rows know their documents; folders written before there was a choice are streams. `typical_row` are the
    lengths of the documents in a row of median work (the sum of squared lengths); in a stream that is the whole row. `validation` is the
    share of the corpus' documents that lie in a data set of their own in the folder `validation` and not in these rows.

    `parts` are the corpora in the order they were named, `weights` the shares of tokens that were asked for. `chat_labels` and
    `chat_template` (a digest) are empty where there are no chats. `labels` is how many labels count, `cut` how many documents lie in more
    than one row. Folders written by older versions lack all of these.
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
    parts: tuple[Part, ...] = ()
    weights: tuple[float, ...] = ()
    chat_labels: str = ""
    chat_template: str = ""
    labels: int | None = None
    cut: int | None = None

    def __post_init__(self) -> None:
        """One document as long as the row where no lengths are given; what JSON gives as lists and dicts becomes what it was."""
        object.__setattr__(self, "typical_row", tuple(self.typical_row) or (self.sequence_length,))
        object.__setattr__(self, "weights", tuple(self.weights))
        object.__setattr__(self, "parts", tuple(Part(**part) if isinstance(part, dict) else part for part in self.parts))

    def shares(self) -> list[str]:
        """For each corpus of a blend a line that says its share and what was left unused."""
        if len(self.parts) < 2:
            return []
        return [
            f"{part.tokens / self.tokens:.1%} from {part.name}: {part.documents:,} documents, {part.tokens:,} tokens"
            + (f"; {part.unused:,} documents left unused" if part.unused else "")
            for part in self.parts
        ]

    def difference(self, other: Metadata) -> str | None:
        """The first setting in which another data set was made differently, in words, or None. Names of the same contents may differ."""
        if self.sequence_length != other.sequence_length:
            return f"sequence_length is {self.sequence_length} there, not {other.sequence_length}"
        if self.pack != other.pack:
            return f"made with --pack {self.pack} there, not {other.pack}"
        if self.validation != other.validation:
            return f"made with --validation {self.validation:g} there, not {other.validation:g}"
        return self._other_corpus(other) or self._other_contents("tokenizer", other) or self._other_chats(other)

    def _other_corpus(self, other: Metadata) -> str | None:
        if self.weights != other.weights:
            mine, now = (" ".join(f"{weight:g}" for weight in metadata.weights) or "none" for metadata in (self, other))
            return f"made with --weights {mine} there, not {now}"
        if self.corpus_digest != other.corpus_digest and self.corpus == other.corpus:
            for mine, now in zip(self.parts, other.parts, strict=False):
                if (mine.column, mine.chat) != (now.column, now.chat):
                    flags = [f"--{'chat' if part.chat else 'text'}_column {part.column}" for part in (mine, now)]
                    return f"{mine.name} was read with {flags[0]} there, not {flags[1]}"
        return self._other_contents("corpus", other)

    def _other_contents(self, label: str, other: Metadata) -> str | None:
        digest = f"{label}_digest"
        if getattr(self, digest) == getattr(other, digest):
            return None
        called, now_called = getattr(self, label), getattr(other, label)
        if called != now_called:
            return f"{label} is {called} there, not {now_called}"
        return f"{label} {called} holds other documents or rules now"

    def _other_chats(self, other: Metadata) -> str | None:
        if self.chat_labels != other.chat_labels:
            return f"made with --chat_labels {self.chat_labels} there, not {other.chat_labels}"
        return "made with another chat template there" if self.chat_template != other.chat_template else None


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
