"""Names and states of folders: `<run>/step-N`, staging folders, the `latest` pointer, and which checkpoints of a run are good.

Role in the pipeline: `write` commits through here, `read`, `merge` and `inspect` find checkpoints through here. Nothing here
communicates between ranks.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from seqloom.checkpoint.manifest import MANIFEST, Manifest
from seqloom.errors import UserError

LATEST = "latest"
FULL = (errno.ENOSPC, errno.EDQUOT)
_STEP = re.compile(r"step-(0|[1-9][0-9]*)")
_STAGING = ".staging-"
NAME_BYTES = 4096  # what a new name in a folder may take: a block
_log = logging.getLogger(__name__)


def step_folder(run_folder: Path, step: int) -> Path:
    """Where the checkpoint of a step belongs."""
    return run_folder / f"step-{step}"


def step_of(folder: Path) -> int:
    """The step of a step folder, by its name."""
    return int(folder.name.removeprefix("step-"))


def steps(run_folder: Path) -> list[int]:
    """Steps that have a folder, oldest first, whatever is in them. Staging folders do not count."""
    if not run_folder.is_dir():
        return []
    matches = (_STEP.fullmatch(path.name) for path in run_folder.iterdir() if path.is_dir())
    return sorted(int(match.group(1)) for match in matches if match)


def is_step_folder(path: Path) -> bool:
    """Whether this is (or was meant to be) one checkpoint: it has a manifest or is named `step-N`."""
    return path.is_dir() and ((path / MANIFEST).exists() or _STEP.fullmatch(path.name) is not None)


@dataclass(frozen=True)
class StepFolder:
    """One checkpoint as it lies on disk: its manifest, and for files that do not lie in `path` itself the folder they lie in."""

    path: Path
    manifest: Manifest
    places: Mapping[str, Path] = field(default_factory=dict)

    def file(self, name: str) -> Path:
        """Where a file of the manifest lies."""
        return self.places.get(name, self.path) / name

    def problem(self) -> str | None:
        """What is wrong as far as file sizes tell, or None."""
        return next(self.manifest.wrong_sizes(self.path, self.places), None)


def open_step(path: Path) -> StepFolder:
    """The checkpoint of a step folder, or of a folder with one folder per machine that hold its files together.

    Raises `UserError` when there is none, its manifest is damaged, or the machines' manifests differ.
    """
    parts = [] if (path / MANIFEST).exists() else collected_parts(path)
    if not parts:
        return StepFolder(path, Manifest.read(path))
    manifest, data = Manifest.read(parts[0]), (parts[0] / MANIFEST).read_bytes()
    for part in parts[1:]:
        if Manifest.read(part) != manifest or (part / MANIFEST).read_bytes() != data:
            raise UserError(f"{parts[0]} and {part} are parts of different checkpoints: collect the files of one step only in {path}")
    return StepFolder(path, manifest, {name: _holder(parts, name, entry.nbytes) for name, entry in manifest.files.items()})


def collected_parts(path: Path) -> list[Path]:
    """The folders in `path` that have a manifest, by name: one per machine, when the files of one step were collected from several."""
    return sorted(part for part in path.iterdir() if not part.name.startswith(".") and (part / MANIFEST).is_file()) if path.is_dir() else []


def _holder(parts: list[Path], name: str, nbytes: int) -> Path:
    """The part that has a file, preferably in its right size."""
    holders = [part for part in parts if (part / name).is_file()]
    return next((part for part in holders if (part / name).stat().st_size == nbytes), (holders or parts)[0])


def structural_damage(folder: Path) -> str | None:
    """What is wrong with a step folder as far as the manifest and file sizes tell, or None. Digests are not computed."""
    try:
        return open_step(folder).problem()
    except UserError as error:
        return str(error)


def make_staging(target: Path) -> Path:
    """A new empty folder beside `target` to write in, named so that nobody takes it for a finished one."""
    staging = staging_path(target.parent, target.name)
    with space_for(NAME_BYTES, target.parent, f"saving {target.name}"):
        staging.mkdir()
    return staging


def staging_path(folder: Path, name: str) -> Path:
    """A name in `folder` that nothing has yet and nobody takes for a finished `name`."""
    return folder / f"{_STAGING}{name}-{secrets.token_hex(4)}"


def sweep_staging(folder: Path, name: str = "step-") -> list[str]:
    """Remove what killed saves or merges of `name...` left in `folder`; returns the names removed."""
    stale = [path for path in folder.iterdir() if path.name.startswith(_STAGING + name)]
    for path in stale:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return [path.name for path in stale]


def set_aside(folder: Path) -> Path:
    """Rename a damaged step folder so that its step can be saved again; nothing is deleted."""
    aside = folder.parent / f"damaged-{folder.name}-{secrets.token_hex(4)}"
    os.rename(folder, aside)
    return aside


def commit(staging: Path, target: Path) -> None:
    """Make a finished staging folder the checkpoint `target` in one atomic rename, then point `latest` at it. All is on disk after.

    When only the pointer cannot be written, that is a warning: nothing is found by it.
    """
    with space_for(NAME_BYTES, staging.parent, f"committing {target.name}"):
        for path in (staging, *(p for p in staging.rglob("*") if p.is_dir())):
            sync(path)
        os.rename(staging, target)
        sync(target.parent)
    pointer = target.parent / f"{_STAGING}step-{LATEST}"
    try:
        write_durably(pointer, f"{target.name}\n".encode())
        os.replace(pointer, target.parent / LATEST)
        sync(target.parent)
    except (UserError, OSError) as error:
        _log.warning("%s is saved, but %s could not be pointed at it: %s", target, target.parent / LATEST, error)


def write_durably(path: Path, data: bytes) -> None:
    """Write a small file and flush it to disk. Raises `UserError` naming the bytes needed and free when the disk is full."""
    with space_for(len(data), path.parent, f"writing {path.name}"), open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def space_for(needed: int, folder: Path, doing: str) -> Iterator[None]:
    """A context that turns the system's word of a full disk into a sentence with the bytes needed and free."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        free = shutil.disk_usage(folder).free
        raise UserError(f"{doing} needs {needed} bytes in {_shown(folder)}, whose disk is full ({free} are free): make room") from error


def _shown(folder: Path) -> Path:
    """A folder as the user knows it: for one that is being written, where it will be."""
    staging = next((path for path in (folder, *folder.parents) if path.name.startswith(_STAGING)), None)
    return staging.parent if staging else folder


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_space(folder: Path, needed: int, doing: str) -> None:
    """Raise `UserError` when the file system of an existing folder has fewer than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(f"{doing} needs {needed} bytes in {folder} but only {free} are free: make room or choose another folder")
