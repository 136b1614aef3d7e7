"""Save a checkpoint: every piece of state once, all files digested, committed in one rename or not at all.

Role in the pipeline: `save_checkpoint` on all ranks with the tensors as they lie (plain or DTensor), or `write_checkpoint` with pieces
that were copied before. Out comes `<run>/step-N/`: shard files, `manifest.json`, and in `hf/` what a merge needs. The steps: agree who
writes what (`assign`), rank 0 prepares a staging folder, each rank writes its shards, rank 0 writes the manifest and commits. Each step
ends in an agreement, so a failure on one rank is an error on all.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import seqloom
from seqloom.checkpoint import folders, group
from seqloom.checkpoint.assign import Division, Job, divide, piece
from seqloom.checkpoint.digest import BlockHasher
from seqloom.checkpoint.huggingface import tokenizer_files
from seqloom.checkpoint.manifest import MANIFEST, FileEntry, Manifest, Piece, TensorEntry
from seqloom.checkpoint.slices import Box
from seqloom.checkpoint.tensorfile import TensorFileWriter, TensorInfo
from seqloom.checkpoint.verify import damage
from seqloom.errors import UserError

MAX_FILE_BYTES = 4 * 2**30
SLACK_BYTES = 4 * 2**20
_log = logging.getLogger(__name__)

PieceOf = Callable[[Job], torch.Tensor]


@dataclass(frozen=True)
class Beside:
    """What a checkpoint holds beside tensors: the training state (plain JSON, no NaN), the model's config, its tokenizer's files."""

    state: Mapping[str, Any]
    model_config: Mapping[str, Any] | None = None
    tokenizer_folder: Path | None = None


def save_checkpoint(
    run_folder: Path,
    step: int,
    tensors: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
    *,
    model_config: dict | None = None,
    tokenizer_folder: Path | None = None,
) -> Path:
    """Write `run_folder/step-N/` and point `run_folder/latest` at it; returns the folder. Collective over the default group.

    `tensors` maps `model.<fqn>`, `optimizer.<state>.<fqn>` and `optimizer.step.<fqn>` to plain tensors (the same on every rank; the
    first rank that has one writes it) or DTensors placed by Shard and Replicate. `state` is the training state, plain JSON (no NaN);
    rank 0's is stored. Its optional entry `tied` maps aliases to parameter names; aliases are not stored. `model_config` and the
    tokenizer's files go to `hf/`. Raises `UserError` on all ranks when the step exists already, the disk is too small, or any rank fails.
    """
    division = divide(f"saving step {step} in {run_folder}", tensors, state)
    beside = Beside(state, model_config, tokenizer_folder)
    return write_checkpoint(run_folder, step, division, lambda job: piece(tensors[job.name], job.box), beside)


def write_checkpoint(run_folder: Path, step: int, division: Division, piece_of: PieceOf, beside: Beside) -> Path:
    """`save_checkpoint` of a division made before: `piece_of` gives the tensors of this rank's jobs, from any device. Collective."""
    doing = f"saving step {step} in {run_folder}"
    needed = division.nbytes + SLACK_BYTES
    target = folders.step_folder(run_folder, step)
    _refuse_existing(target)
    staging = Path(group.attempt(doing, lambda: _prepare(target, needed) if group.rank() == 0 else None)[0])
    try:
        written = group.attempt(doing, lambda: _write_shards(staging, target, division.mine(), piece_of, needed))
        group.attempt(doing, lambda: _finish(staging, target, step, division.infos, written, beside))
    except BaseException:
        _discard(staging)
        raise
    return target


def _refuse_existing(target: Path) -> None:
    """Raise `UserError` on all ranks if the step has a good checkpoint; set a damaged one aside."""
    exists = group.gather_json(target.exists() if group.rank() == 0 else None)[0]
    if not exists:
        return
    problem = damage(target)
    if problem is None:
        raise UserError(f"{target} is a good checkpoint already and is never written over: resume from it, or use another --name")
    if group.rank() == 0:
        _log.warning("%s is damaged (%s); moved to %s", target, problem, folders.set_aside(target))


def _prepare(target: Path, needed: int) -> str:
    """Rank 0: sweep what killed saves left, check the space, make the staging folder; returns its path."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folders.sweep_staging(target.parent)
        folders.require_space(target.parent, needed, f"saving {target.name}")
        return str(folders.make_staging(target))
    except OSError as error:
        raise UserError(f"cannot write in {target.parent}: {error.strerror}; choose a folder that can be written") from error


def _write_shards(staging: Path, target: Path, jobs: Sequence[Job], piece_of: PieceOf, needed: int) -> dict[str, dict[str, Any]]:
    """This rank's shard files of `target`, each of about `MAX_FILE_BYTES` at most; file name -> bytes, blocks and the keys in it."""
    answer, rank = {}, group.rank()
    for number, part in enumerate(_split(jobs)):
        name = f"shard-{rank:05d}.safetensors" if number == 0 else f"shard-{rank:05d}-{number}.safetensors"
        with (
            folders.space_for(needed, target.parent, f"saving {target.name}"),
            TensorFileWriter(staging / name, {job.key: job.stored for job in part}, {"format": "pt"}) as writer,
        ):
            for job in part:
                writer.append(piece_of(job))
        pieces = [[job.name, job.key, job.box.offsets, job.box.sizes] for job in part]
        answer[name] = {"bytes": writer.nbytes, "blocks": writer.blocks, "pieces": pieces}
    return answer


def _split(jobs: Sequence[Job]) -> Iterable[list[Job]]:
    part: list[Job] = []
    filled = 0
    for job in jobs:
        if part and filled + job.stored.nbytes > MAX_FILE_BYTES:
            yield part
            part, filled = [], 0
        part.append(job)
        filled += job.stored.nbytes
    if part:
        yield part


def _finish(
    staging: Path,
    target: Path,
    step: int,
    infos: Mapping[str, TensorInfo],
    written: Sequence[Mapping[str, Any]],
    beside: Beside,
) -> None:
    """Rank 0: write `hf/`, then the manifest, then commit."""
    if group.rank() != 0:
        return
    files, pieces = {}, defaultdict(list)
    for report in written:
        for name, entry in report.items():
            files[name] = FileEntry(entry["bytes"], tuple(entry["blocks"]))
            for tensor, key, offsets, sizes in entry["pieces"]:
                pieces[tensor].append(Piece(name, key, Box(tuple(offsets), tuple(sizes))))
    files.update(_write_hf(staging, beside))
    entries = {name: TensorEntry(info, tuple(sorted(pieces[name], key=lambda piece: piece.box))) for name, info in infos.items()}
    versions = {"seqloom": seqloom.__version__, "torch": torch.__version__}
    manifest = Manifest(step, group.world_size(), files, entries, beside.state, versions)
    unseen = next(manifest.wrong_sizes(staging), None)
    if unseen is not None:
        raise UserError(f"{staging}: {unseen} as rank 0 sees it: the run folder must be on a file system that all machines share")
    try:
        data = manifest.to_bytes()
    except (TypeError, ValueError) as error:
        raise UserError(f"the training state is not plain JSON ({error}): it may hold text, finite numbers, lists and mappings") from error
    folders.write_durably(staging / MANIFEST, data)
    folders.commit(staging, target)


def _write_hf(staging: Path, beside: Beside) -> dict[str, FileEntry]:
    """Copy what a Hugging Face folder needs beside the weights into `hf/`."""
    contents: dict[str, bytes] = {}
    if beside.tokenizer_folder is not None:
        contents.update({path.name: path.read_bytes() for path in tokenizer_files(beside.tokenizer_folder)})
    if beside.model_config is not None:
        contents["config.json"] = (json.dumps(beside.model_config, indent=2, sort_keys=True) + "\n").encode()
    if contents:
        with folders.space_for(folders.NAME_BYTES, staging, "saving a checkpoint"):
            (staging / "hf").mkdir()
    entries = {}
    for name, data in contents.items():
        folders.write_durably(staging / "hf" / name, data)
        hasher = BlockHasher()
        hasher.update(data)
        entries[f"hf/{name}"] = FileEntry(len(data), hasher.blocks())
    return entries


def _discard(staging: Path) -> None:
    """Rank 0: remove a staging folder after a failure, as far as it can be; the next save sweeps the rest."""
    if group.rank() == 0 and staging.is_dir():
        try:
            folders.sweep_staging(staging.parent, staging.name.removeprefix(".staging-"))
        except OSError as error:
            _log.warning("%s could not be removed: %s", staging, error)
