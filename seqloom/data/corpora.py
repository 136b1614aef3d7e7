"""Where text comes from: every kind of corpus becomes one `datasets.Dataset` with a single column, `text` or `messages`.

In: what the user wrote after `--data_path_or_name`, and the column that holds the documents. Out: one row per document, a text or a chat,
in an order that depends on the input alone. Nothing is tokenized here and nothing is held in memory that `datasets` can map from disk.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from seqloom.data.chat import MESSAGES, check_messages
from seqloom.data.hub import hub_clients
from seqloom.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

TEXT = "text"
STDLIB = "stdlib"
FIRST_ROWS = 100  # looked at to tell what a column holds
BUILDERS = {".txt": "text", ".jsonl": "json", ".parquet": "parquet"}
ALTERNATIVES = "give a local dataset folder, .txt/.jsonl/.parquet files, or `stdlib` (the Python standard library's sources)"


@dataclass(frozen=True)
class Corpus:
    """Documents and where they come from: `name` is what the user called them, `column` where they lay there.

    `documents` has the one column `text`, or `messages` where the documents are chats.
    """

    name: str
    documents: Dataset
    column: str = TEXT

    @property
    def chat(self) -> bool:
        """Whether the documents are chats."""
        return self.documents.column_names == [MESSAGES]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the documents in order. Reads all of them once."""
        return corpus_digest(self.documents)


def load_corpus(path_or_name: str, column: str = TEXT, chat: bool = False) -> Dataset:
    """The documents of a corpus: a dataset with the one column `text`, or with `chat` the one column `messages`.

    `path_or_name` is `stdlib`; files (.txt: one document a file, .jsonl: one object a line, .parquet; globs and lists with commas
    allowed); a folder written by `save_to_disk` or one that holds such files; or a hub id, of which the split `train` is taken.
    `column` holds the documents there: strings, or lists of messages with `role` and `content`. Raises UserError for whatever cannot
    be read, naming the alternatives.
    """
    folder = Path(path_or_name).expanduser()
    if path_or_name == STDLIB:
        corpus = _stdlib_corpus()
    elif folder.is_dir():
        corpus = _folder_corpus(folder)
    elif _names_files(path_or_name):
        corpus = _files_corpus(_expand(path_or_name))
    elif path_or_name.count("/") > 1 or path_or_name.startswith((".", "/", "~")):
        raise UserError(f"there is no data folder or file {path_or_name}: {ALTERNATIVES}")
    else:
        corpus = _hub_corpus(path_or_name)
    corpus = _one_column(corpus, path_or_name, column, "chat_column" if chat else "text_column")
    if not chat:
        return _texts(corpus, path_or_name, column)
    first = next((messages for messages in corpus.select(range(min(FIRST_ROWS, len(corpus))))[column] if messages), [])
    check_messages(first, f"the column `{column}` of {path_or_name}")
    return corpus if column == MESSAGES else corpus.rename_column(column, MESSAGES)


def corpus_digest(corpus: Dataset) -> str:
    """SHA-256 of the documents in order: two corpora with the same digest pack to the same rows."""
    digest = hashlib.sha256()
    (column,) = corpus.column_names
    for batch in corpus.iter(batch_size=1000):
        for document in batch[column]:
            text = json.dumps(document) if column == MESSAGES else document
            data = (text or "").encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
    return digest.hexdigest()


def _stdlib_corpus() -> Dataset:
    """The .py files of the running Python's standard library, sorted by path; files that are not UTF-8 are left out."""
    from datasets import Dataset

    root = Path(sysconfig.get_paths()["stdlib"])
    texts = [text for path in _python_files(root) if (text := _decoded(path))]
    if not texts:
        raise UserError(f"the standard library in {root} has no .py sources: give --data_path_or_name a folder, files or a hub id")
    return Dataset.from_dict({TEXT: texts})


def _python_files(root: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - {"site-packages", "dist-packages", "__pycache__"})
        yield from (Path(folder, name) for name in sorted(names) if name.endswith(".py"))


def _decoded(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return None


def _names_files(path_or_name: str) -> bool:
    """Whether every part of a list with commas is a glob or ends like a file of text."""
    return all("*" in part or Path(part).suffix in BUILDERS for part in path_or_name.split(","))


def _expand(names: str) -> list[Path]:
    """The files that a list with commas and globs names, each glob sorted."""
    files: list[Path] = []
    for part in names.split(","):
        found = sorted(glob.glob(os.path.expanduser(part), recursive=True)) if "*" in part else [os.path.expanduser(part)]
        if not found or not all(os.path.isfile(name) for name in found):
            raise UserError(f"there is no data file {part}: {ALTERNATIVES}")
        files += map(Path, found)
    return files


def _folder_corpus(folder: Path) -> Dataset:
    from datasets import Dataset, load_from_disk

    if (folder / "seqloom.json").is_file():
        raise UserError(f"{folder} is already tokenized and packed: give it to train.py as --dataset_path, or name the text it was made of")
    if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
        loaded = load_from_disk(str(folder))
        if isinstance(loaded, Dataset):
            return loaded
        if "train" not in loaded:
            raise UserError(f"the dataset folder {folder} has the splits {', '.join(loaded)} but no `train`: give the folder of one split")
        return loaded["train"]
    for suffix in BUILDERS:
        files = sorted(folder.rglob(f"*{suffix}"))
        if files:
            return _files_corpus(files)
    raise UserError(f"the folder {folder} holds no dataset: {ALTERNATIVES}")


def _files_corpus(files: list[Path]) -> Dataset:
    """Files of one kind, read by `datasets` into its cache (keyed by path, size and time), so that they need not fit in memory."""
    from datasets import load_dataset

    kinds = {file.suffix for file in files}
    if len(kinds) > 1 or not kinds <= set(BUILDERS):
        raise UserError(f"data files must be of one kind ({', '.join(BUILDERS)}), not {', '.join(sorted(kinds))}: split the list")
    builder = BUILDERS[kinds.pop()]
    options = {"sample_by": "document"} if builder == "text" else {}
    try:
        return load_dataset(builder, data_files=[str(file) for file in files], split="train", **options)
    except Exception as error:
        reason = error.__cause__ or error
        raise UserError(f"cannot read {', '.join(map(str, files[:3]))} as {builder} ({reason}): mend the file or leave it out") from error


def _hub_corpus(name: str) -> Dataset:
    """The split `train` of a data set of the hub; repositories that are a loading script are read through their parquet conversion."""
    from datasets import load_dataset

    try:
        with hub_clients():
            try:
                return load_dataset(name, split="train")
            except RuntimeError as error:
                if "script" not in str(error):
                    raise
                return load_dataset(name, split="train", revision="refs/convert/parquet")
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(f"cannot load the data set {name} from the hub or its cache ({reason}): {ALTERNATIVES}") from error


def _one_column(corpus: Dataset, name: str, column: str, flag: str) -> Dataset:
    """The corpus with one of its columns only."""
    if column not in corpus.column_names:
        near = difflib.get_close_matches(column, corpus.column_names, n=1)
        advice = f"did you mean --{flag} {near[0]}?" if near else f"name the one that holds the documents as --{flag}"
        raise UserError(f"{name} has no column `{column}` but {', '.join(corpus.column_names)}: {advice}")
    if len(corpus) == 0:
        raise UserError(f"{name} has no documents: give a corpus with text in it")
    return corpus.select_columns([column])


def _texts(corpus: Dataset, name: str, column: str) -> Dataset:
    """The corpus with its one column called `text`; it holds strings."""
    from datasets import Value

    kind = corpus.features[column]
    if kind not in (Value("string"), Value("large_string")):
        kind = "lists" if "List" in type(kind).__name__ else str(kind)
        raise UserError(f"the column `{column}` of {name} holds {kind}, not strings: name another --text_column, or chats as --chat_column")
    return corpus if column == TEXT else corpus.rename_column(column, TEXT)
