"""Settings in a file: `--config run.yaml` (or .toml, .json), and the resolved settings that are stored with every run.

In: a file that maps names of flags to values, at the top or under the name of their part (`optimizer: {lr: 1e-4}`). Out: the words of a
command line, which are parsed before those that the user typed, so that flags win over the file and both are checked in one place.
`-` and `_` are the same in names; null stands for "not given". PyTorch is not needed here.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from seqloom.errors import UserError

FLAG = "config"
RESOLVED_FILE = "config.yaml"
ALIASES = {"gpu_mem_constraint": "memory_gib"}
Words = dict[str, list[str]]  # name of a setting -> its words on a command line


def settings_of(cls: type) -> dict[str, str | None]:
    """Every setting of a tree of dataclasses with the part that it belongs to, None for those at the top."""
    hints = typing.get_type_hints(cls)
    found: dict[str, str | None] = {}
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            found.update({inner.name: field.name for inner in dataclasses.fields(hints[field.name])})
        else:
            found[field.name] = None
    return found


def named(words: Sequence[str]) -> Path | None:
    """The file that `--config` names on a command line, None where it does not stand there."""
    found = None
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == f"--{FLAG}":
            found = following
        elif word.startswith(f"--{FLAG}="):
            found = word.split("=", 1)[1]
    return None if found is None else Path(found).expanduser()


def read_settings(path: Path, cls: type) -> Words:
    """The settings of a file as words. Raises `UserError` for a file that cannot be read and for names that are unknown, in the wrong part,
    or given twice.
    """
    known, words = settings_of(cls), {}
    parts = set(filter(None, known.values()))
    for part, name, value in _entries(_mapping(path), parts):
        name = ALIASES.get(name, name)
        if name not in known or name == FLAG:
            close = difflib.get_close_matches(name, [*known, *parts], n=1, cutoff=0.5)
            hint = f"did you mean `{close[0]}`?" if close else "`python train.py --help` lists them all"
            raise UserError(f"{path} has `{name}`, which is no setting: {hint}")
        if part is not None and part != known[name]:
            place = f"under `{known[name]}`, or at the top" if known[name] else "at the top"
            raise UserError(f"{path} has `{name}` under `{part}`: it belongs {place}")
        if name in words:
            raise UserError(f"{path} gives `{name}` twice: leave one of them out")
        words[name] = _words(path, name, value)
    return words


def resolved(config: Any) -> dict[str, Any]:
    """A tree of settings as plain values, in the parts of the tree, for YAML and JSON; where they came from is left out."""
    return {name: value for name, value in _plain(config).items() if name != FLAG}


def write_resolved(config: Any, folder: Path) -> Path:
    """Write all settings of a run into its folder, as a file that `--config` reads; returns its path."""
    import yaml

    path = folder / RESOLVED_FILE
    path.write_text(yaml.safe_dump(resolved(config), sort_keys=False), encoding="utf-8")
    return path


def changed(config: Any) -> dict[str, Any]:
    """The settings that are not at their default, by name."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found.update(changed(value))
        elif field.name != FLAG and value != field.default:
            found[field.name] = _plain(value)
    return found


def blame(words: Words, path: Path, parses: Callable[[list[str]], bool]) -> None:
    """Raise `UserError` naming the first setting of a file that does not parse by itself, where there is one."""
    for name, given in words.items():
        if not parses(given):
            raise UserError(f"{path} gives `{name}` a value that it cannot have ({' '.join(given[1:])}): see --{name} in train.py --help")


def _mapping(path: Path) -> Mapping[str, Any]:
    import yaml

    readers = {".yaml": yaml.safe_load, ".yml": yaml.safe_load, ".toml": tomllib.loads, ".json": json.loads}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"--config {path} is none of {', '.join(readers)}: give a file of settings of one of these kinds")
    try:
        found = reader(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read --config {path} ({error.strerror}): give a file of settings") from error
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"--config {path} is damaged ({' '.join(str(error).split())}): mend it there") from error
    if not isinstance(found or {}, dict):
        raise UserError(f"--config {path} is a {type(found).__name__}: it must map names of settings to values")
    return found or {}


def _entries(settings: Mapping[str, Any], parts: set[str]) -> typing.Iterator[tuple[str | None, str, Any]]:
    """Part, name and value of every setting that is given."""
    for key, value in settings.items():
        key = str(key).replace("-", "_")
        inner = value.items() if key in parts and isinstance(value, dict) else None
        for name, given in inner or ([(key, value)] if inner is None else []):
            if given is not None:
                yield (key if inner is not None else None), str(name).replace("-", "_"), given


def _words(path: Path, name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no_{name}"]
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    if isinstance(value, dict):
        raise UserError(f"{path} gives `{name}` settings of its own: it takes a plain value")
    return [f"--{name}", str(value)]


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
