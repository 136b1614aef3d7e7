"""Writing a folder as a whole: under another name first, renamed when it is complete, so that half a result is never found."""

from __future__ import annotations

import errno
import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from seqloom.errors import UserError


@contextmanager
def staged_folder(target: Path, marker: str, overwrite: bool = False) -> Iterator[Path]:
    """A new empty folder that becomes `target` when the block ends well, and vanishes when it does not.

    It stands beside `target`, so the last step is one rename. An existing folder is replaced with `overwrite` only, and only if it
    holds the file `marker`, which tells that it is a result of the same kind; an empty one is always filled. Raises UserError before
    the block runs if `target` cannot be written or must not be replaced, and from within it when the disk is full.
    """
    target = target.expanduser().absolute()
    _check_replaceable(target, marker, overwrite)
    staging = _make_staging(target)
    try:
        yield staging
        _move(staging, target)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"the disk of {target.parent} is full: free some space or choose another output folder") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def remove_abandoned(target: Path) -> None:
    """Remove what processes that were killed left of `target`. Only for a caller that knows that no other one writes it now."""
    for staging in target.parent.glob(f".{glob.escape(target.name)}.partial-*"):
        shutil.rmtree(staging, ignore_errors=True)


def check_target(target: Path, marker: str) -> None:
    """Raise UserError if `target` can never be written by `staged_folder`, not even with `overwrite`.

    Cheap: it is called before long work whose result goes there.
    """
    target = target.expanduser().absolute()
    _check_replaceable(target, marker, overwrite=True)
    _make_staging(target).rmdir()


def _make_staging(target: Path) -> Path:
    staging = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        staging.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot write to {target.parent} ({error.strerror}): choose an output folder that can be written") from error
    return staging


def _check_replaceable(target: Path, marker: str, overwrite: bool) -> None:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not (target / marker).is_file():
        raise UserError(f"{target} exists and holds something else (it has no {marker}): choose another output folder")
    if not overwrite:
        raise UserError(f"{target} exists: pass --overwrite to replace it, or choose another output folder")


def _move(staging: Path, target: Path) -> None:
    """Rename, the old folder out of the way first: at every moment either the old or the new one is whole."""
    if not target.exists():
        staging.rename(target)
        return
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    target.rename(old)
    staging.rename(target)
    shutil.rmtree(old)
