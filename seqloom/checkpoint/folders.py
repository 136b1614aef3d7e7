"""Names and states of folders: `<run>/step-N`, staging folders, the `latest` pointer, and which checkpoints of a run are good.

Role in the pipeline: `write` commits through here, `read`, `merge` and `inspect` find checkpoints through here. Nothing here
communicates between ranks.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from pathlib import Path

from seqloom.checkpoint.manifest import MANIFEST, Manifest
from seqloom.errors import UserError

LATEST = "latest"
_STEP = re.compile(r"step-(0|[1-9][0-9]*)")
_STAGING = ".staging-"


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


def structural_damage(folder: Path) -> str | None:
    """What is wrong with a step folder as far as the manifest and file sizes tell, or None. Digests are not computed."""
    try:
        manifest = Manifest.read(folder)
    except UserError as error:
        return str(error)
    return next(manifest.wrong_sizes(folder), None)


def make_staging(target: Path) -> Path:
    """A new empty folder beside `target` to write in, named so that nobody takes it for a finished one."""
    staging = staging_path(target.parent, target.name)
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
    """Make a finished staging folder the checkpoint `target` in one atomic rename, then point `latest` at it. All is on disk after."""
    for path in (staging, *(p for p in staging.rglob("*") if p.is_dir())):
        sync(path)
    os.rename(staging, target)
    sync(target.parent)
    write_durably(target.parent / f"{_STAGING}step-{LATEST}", f"{target.name}\n".encode())
    os.replace(target.parent / f"{_STAGING}step-{LATEST}", target.parent / LATEST)
    sync(target.parent)


def write_durably(path: Path, data: bytes) -> None:
    """Write a small file and flush it to disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


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
