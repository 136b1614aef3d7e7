"""Where text comes from: every kind of corpus becomes one `datasets.Dataset` with a single column `text`.

In: what the user wrote after `--data_path_or_name`. Out: one row per document, in an order that depends on the input alone. Nothing is
tokenized here and nothing is held in memory that `datasets` can map from disk.
"""

from __future__ import annotations

import glob
import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from seqloom.data.hub import hub_clients
from seqloom.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

TEXT = "text"
STDLIB = "stdlib"
BUILDERS = {".txt": "text", ".jsonl": "json", ".parquet": "parquet"}
ALTERNATIVES = "give a local dataset folder, .txt/.jsonl/.parquet files, or `stdlib` (the Python standard library's sources)"


def load_corpus(path_or_name: str) -> Dataset:
    """The documents of a corpus: a dataset with the one column `text`.

    `path_or_name` is `stdlib`; files (.txt: one document a file, .jsonl: one object with "text" a line, .parquet: a column "text";
    globs and lists with commas allowed); a folder written by `save_to_disk` or one that holds such files; or a hub id, of which the
    split `train` is taken. Raises UserError for whatever cannot be read, naming the alternatives.
    """
    if path_or_name == STDLIB:
        return _stdlib_corpus()
    folder = Path(path_or_name).expanduser()
    if folder.is_dir():
        corpus = _folder_corpus(folder)
    elif _names_files(path_or_name):
        corpus = _files_corpus(_expand(path_or_name))
    elif path_or_name.count("/") > 1 or path_or_name.startswith((".", "/", "~")):
        raise UserError(f"there is no data folder or file {path_or_name}: {ALTERNATIVES}")
    else:
        corpus = _hub_corpus(path_or_name)
    return _text_only(corpus, path_or_name)


def corpus_digest(corpus: Dataset) -> str:
    """SHA-256 of the documents in order: two corpora with the same digest pack to the same rows."""
    digest = hashlib.sha256()
    for batch in corpus.iter(batch_size=1000):
        for text in batch[TEXT]:
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


def _text_only(corpus: Dataset, name: str) -> Dataset:
    from datasets import Value

    if TEXT not in corpus.column_names:
        raise UserError(f"{name} has no column `text` but {', '.join(corpus.column_names)}: rename the column that holds the documents")
    kind = corpus.features[TEXT]
    if kind not in (Value("string"), Value("large_string")):
        raise UserError(f"the column `text` of {name} holds {kind}, not strings: give it one string per document")
    if len(corpus) == 0:
        raise UserError(f"{name} has no documents: give a corpus with text in it")
    return corpus.select_columns([TEXT])
