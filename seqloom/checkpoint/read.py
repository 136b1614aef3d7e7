"""Find a checkpoint and load it under any plan: each rank reads only the slices that it holds.

Role in the pipeline: the trainer calls `find_checkpoint` and then `load_checkpoint` on all ranks. How the checkpoint was split when it
was written does not matter: wanted slices of the global tensors are met with the stored pieces. Nothing in a file is executed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from seqloom.checkpoint import folders, group
from seqloom.checkpoint.fill import Wanted, fill, fill_checked, spoil
from seqloom.checkpoint.reader import CheckedReader, TensorReader, open_checkpoint
from seqloom.checkpoint.verify import damage
from seqloom.errors import UserError

_log = logging.getLogger(__name__)
_SHOWN = 3
T = TypeVar("T")


class DamagedError(UserError):
    """A checkpoint is not what was written; `found` says what is wrong with it, without advice."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path} is damaged ({problem}): resume from another checkpoint, or put a good copy in its place")
        self.found = f"{path} is damaged: {problem}"


def find_checkpoint(path_or_last: str, run_folder: Path, *, verify: bool = True) -> Path | None:
    """The step folder or merged file to load. Collective: call it on all ranks; all get the same answer.

    `last` means the newest good checkpoint of `run_folder`, or None where the run has none yet. Otherwise a step folder, a run folder
    (its newest good step) or a merged file. Damaged checkpoints that are passed over are named in a warning; digests are part of the
    judgement unless `verify` is False, so what `last` finds need not be verified again by `load_checkpoint`. Raises `UserError` when
    the path is none of these, and when there are checkpoints but none is good: a run never starts from scratch without a word.
    """
    if path_or_last == "last":
        return newest_good(run_folder, verify=verify)
    path = Path(path_or_last)
    if folders.is_step_folder(path) or path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"there is no checkpoint at {path}: give `last`, a step folder, a run folder or a merged file")
    found = newest_good(path, verify=verify)
    if found is None:
        raise UserError(f"{path} holds no step folder: give `last`, a step folder, a run folder or a merged file")
    return found


def newest_good(run_folder: Path, *, verify: bool = True) -> Path | None:
    """The newest undamaged step folder of a run, None where there is no step folder. Collective; see `find_checkpoint`."""
    found = _newest(run_folder, lambda folder: _refuse(folder, damage(folder, digests=verify)))
    return found and found[0]


def load_newest(
    run_folder: Path, tensors: Mapping[str, torch.Tensor], *, verify: bool = True, strict: bool = True
) -> tuple[Path, dict[str, Any]] | None:
    """Load the newest good checkpoint of a run: its folder and training state, or None where the run has no step folder. Collective.

    The same as `find_checkpoint("last")` and then `load_checkpoint`, but the bytes are read once: a checkpoint that turns out damaged
    while it fills the tensors is named in a warning and the one before it fills them anew. Raises `UserError` as both do.
    """
    return _newest(run_folder, lambda folder: load_checkpoint(folder, tensors, verify=verify, strict=strict))


def _newest(run_folder: Path, take: Callable[[Path], T]) -> tuple[Path, T] | None:
    """The newest step folder that `take` does not find damaged, and what `take` made of it. Collective, as `take` may be."""
    problem = None
    for folder in reversed([folders.step_folder(run_folder, step) for step in group.gather_json(folders.steps(run_folder))[0]]):
        try:
            taken = take(folder)
        except DamagedError as error:
            problem = error.found
            _warn("%s", problem)
            continue
        if problem is not None:
            _warn("using the previous good checkpoint %s", folder)
        return folder, taken
    if problem is not None:
        raise UserError(f"no checkpoint of {run_folder} is good ({problem}): restore one, or move them away to start from scratch")
    return None


def _warn(text: str, what: object) -> None:
    """Rank 0 warns."""
    if group.rank() == 0:
        _log.warning(text, what)


def load_checkpoint(path: Path, tensors: Mapping[str, torch.Tensor], *, verify: bool = True, strict: bool = True) -> dict[str, Any]:
    """Fill `tensors` in place from a step folder or a merged file; returns the training state. Collective over the default group.

    `tensors` is named as in `save_checkpoint`; each may be plain or a DTensor of any placement, on any device. With `strict` the
    names must be the checkpoint's, those of all ranks together; without it the common ones are filled. Raises `UserError` on all
    ranks when a name, shape or dtype differs or the manifest or a file's size is wrong; nothing has been filled then. Bytes are read
    once and hashed on the way: when a digest is wrong (unless `verify` is False) or a file cannot be read, `UserError` is raised on all
    ranks and every tensor is full of NaN (integers: their least value), so that nothing can go on from what was filled.
    """
    doing = f"loading {path}"
    _refuse(path, damage(path, digests=False))
    reader, state = open_checkpoint(path)
    try:
        unwanted = group.attempt(doing, lambda: _match(path, reader, tensors, state, strict))
        unexpected = set.intersection(*map(set, unwanted))
        if strict and unexpected:
            raise UserError(
                f"{path} holds tensors that the program does not have: {_some(sorted(unexpected))}; load it with the same model"
            )
        wanted = _in_stored_order(reader, tensors, state)
        try:
            _refuse(path, _fill_checked(doing, reader, path, wanted) if verify else fill(doing, reader, wanted))
        except BaseException:
            spoil(tensors.values())
            raise
    finally:
        reader.close()
    return state


def _fill_checked(doing: str, reader: CheckedReader, path: Path, wanted: list[Wanted]) -> str | None:
    """Fill and hash in one pass; where that fails on some rank, which is then known to all, look for damage, which is the better reason."""
    try:
        return fill_checked(doing, reader, path, wanted)
    except Exception:
        problem = damage(path)
        if problem is None:
            raise
        return problem


def _refuse(path: Path, problem: str | None) -> None:
    if problem is not None:
        raise DamagedError(path, problem)


def _in_stored_order(reader: TensorReader, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> list[Wanted]:
    """What to fill from which stored tensor, in the order of the files, which is that of the manifest."""
    order = {name: number for number, name in enumerate(reader)}
    pairs = [Wanted(source, tensor) for name, tensor in tensors.items() if (source := _stored_name(name, reader, state)) in reader]
    return sorted(pairs, key=lambda pair: order[pair.source])


def _stored_name(name: str, reader: TensorReader, state: Mapping[str, Any]) -> str:
    """The name that `name` is stored under: its own, or for an alias of a tied weight that of the weight."""
    target = (state.get("tied") or {}).get(name.removeprefix("model."))
    return f"model.{target}" if name not in reader and name.startswith("model.") and target else name


def _match(path: Path, reader: TensorReader, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any], strict: bool) -> list[str]:
    """Compare names, shapes and dtypes; returns the stored names that this rank does not want."""
    stored = {name: _stored_name(name, reader, state) for name in tensors}
    missing = [name for name, source in stored.items() if source not in reader]
    if missing and strict:
        raise UserError(
            f"{path} does not hold {_some(missing)}, which the program needs: load a checkpoint of the same model and optimizer"
        )
    differing = []
    for name, source in stored.items():
        if source in reader:
            shape, dtype = reader[source]
            if (tuple(tensors[name].shape), tensors[name].dtype) != (shape, dtype):
                mine = f"{tuple(tensors[name].shape)} {tensors[name].dtype}"
                differing.append(f"{name} (stored {shape} {dtype}, wanted {mine})")
    if differing:
        raise UserError(f"{path} was made by another model or precision: {_some(differing)}; use the same configuration")
    return sorted(set(reader) - set(stored.values()))


def _some(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
