"""Which checkpoints of a run stay: the last ones, every so many steps one, and the best by evaluation.

Role in the pipeline: rank 0 calls `keep` after a commit. Damaged and unfinished checkpoints do not count, so they push no good one out,
and they are never deleted here. A checkpoint that is to go gets a staging name first, so a kill in the middle of its deletion leaves
nothing that looks like a checkpoint; the next save sweeps the rest.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from seqloom.checkpoint import folders
from seqloom.checkpoint.verify import damage_alone
from seqloom.errors import UserError

_Stamp = tuple[tuple[str, int, int, int], ...]


@dataclass(frozen=True)
class Kept:
    """A good checkpoint: its step, and the evaluation loss in its training state if there is one."""

    step: int
    loss: float | None = None


@dataclass(frozen=True)
class KeepRule:
    """What stays: the `last` newest (None: all), the steps that are multiples of `every`, the `best` ones with the least loss.

    Raises `UserError` for numbers that make no sense; the newest good checkpoint always stays.
    """

    last: int | None = None
    every: int | None = None
    best: int = 0

    def __post_init__(self) -> None:
        for name, value, least in (("last", self.last, 1), ("every", self.every, 1), ("best", self.best, 0)):
            if value is not None and value < least:
                raise UserError(f"to keep the {name} {value} checkpoints makes no sense: give at least {least}")


def to_remove(checkpoints: Sequence[Kept], rule: KeepRule) -> list[int]:
    """The steps that the rule does not keep, oldest first; `checkpoints` are the good ones, in any order."""
    if rule.last is None:
        return []
    counted = counting(checkpoints, rule)
    return sorted(c.step for c in checkpoints if c.step not in counted and not (rule.every and c.step % rule.every == 0))


def counting(checkpoints: Sequence[Kept], rule: KeepRule) -> set[int]:
    """The steps that fill a number of the rule, so that others go: the newest, and those of least loss (the newer of equal ones)."""
    newest = sorted((c.step for c in checkpoints), reverse=True)[: rule.last]
    judged = sorted((c.loss, -c.step) for c in checkpoints if c.loss is not None)
    return {*newest, *(-negative for _, negative in judged[: rule.best])}


class Judge:
    """Tells whether checkpoints are good. Each is read once, and again only when a file of it has changed since."""

    def __init__(self) -> None:
        self._good: dict[Path, _Stamp] = {}

    def trust(self, folder: Path) -> None:
        """Take a checkpoint that this run has just committed for good as it lies now."""
        self._good[folder] = _stamp(folder)

    def is_good(self, folder: Path) -> bool:
        """Whether all sizes and digests of a step folder are as written."""
        stamp = _stamp(folder)
        if self._good.get(folder) == stamp:
            return True
        if damage_alone(folder) is not None:
            return False
        self._good[folder] = stamp
        return True


def keep(run_folder: Path, rule: KeepRule, judge: Judge | None = None) -> list[Path]:
    """Remove what `rule` does not keep of a run; returns the folders removed. For one process of a job; not collective.

    Digests are checked (see `Judge`) of the checkpoints that count and of those that are to go, and only when something would be removed.
    Raises `OSError` when a folder cannot be removed.
    """
    judge = judge or Judge()
    good = _structurally_good(run_folder)
    while True:
        doomed = to_remove(good, rule)
        decisive = counting(good, rule) | set(doomed) if doomed else set()
        bad = {step for step in decisive if not judge.is_good(folders.step_folder(run_folder, step))}
        if not bad:
            break
        good = [checkpoint for checkpoint in good if checkpoint.step not in bad]
    removed = [folders.step_folder(run_folder, step) for step in doomed]
    for folder in removed:
        remove(folder)
    return removed


def remove(folder: Path) -> None:
    """Delete a step folder. It stops being a checkpoint in one atomic rename, before anything in it is touched."""
    staging = folders.staging_path(folder.parent, folder.name)
    os.rename(folder, staging)
    folders.sync(folder.parent)
    shutil.rmtree(staging)


def _structurally_good(run_folder: Path) -> list[Kept]:
    """The checkpoints of a run whose manifests and file sizes are right."""
    found = []
    for step in folders.steps(run_folder):
        try:
            checkpoint = folders.open_step(folders.step_folder(run_folder, step))
        except UserError:
            continue
        if checkpoint.problem() is None:
            found.append(Kept(step, _loss(checkpoint.manifest.state.get("evaluation"))))
    return found


def _loss(evaluation: object) -> float | None:
    loss = evaluation.get("loss") if isinstance(evaluation, dict) else None
    return float(loss) if isinstance(loss, int | float) else None


def _stamp(folder: Path) -> _Stamp:
    """Name, size, time of change and inode of every file: what another write to one of them would change."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    stats = [(path.relative_to(folder).as_posix(), path.stat()) for path in files]
    return tuple((name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in stats)
