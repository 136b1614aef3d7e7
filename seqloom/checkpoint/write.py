"""Save a checkpoint: every piece of state once, all files digested, committed in one rename or not at all.

Role in the pipeline: the trainer calls `save_checkpoint` on all ranks with the tensors as they lie (plain or DTensor). Out comes
`<run>/step-N/`: shard files, `manifest.json`, and in `hf/` what a merge needs. The steps: agree who writes what (`_assign`), rank 0
prepares a staging folder, each rank writes its shards, rank 0 writes the manifest and commits. Each step ends in an agreement, so a
failure on one rank is an error on all.
"""

from __future__ import annotations

import errno
import json
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

import seqloom
from seqloom.checkpoint import folders, group
from seqloom.checkpoint.digest import BlockHasher
from seqloom.checkpoint.huggingface import tokenizer_files
from seqloom.checkpoint.manifest import MANIFEST, FileEntry, Manifest, Piece, TensorEntry
from seqloom.checkpoint.slices import Box, local_boxes, local_tensor
from seqloom.checkpoint.tensorfile import DTYPES, TensorFileWriter, TensorInfo, dtype_name
from seqloom.checkpoint.verify import damage
from seqloom.errors import UserError

MAX_FILE_BYTES = 4 * 2**30
_SLACK_BYTES = 4 * 2**20
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Job:
    """One piece and the rank that writes it."""

    name: str
    box: Box
    info: TensorInfo
    owner: int

    @property
    def key(self) -> str:
        """Name in the shard file: the tensor's own, and where the piece starts if it is only a part."""
        return self.name if self.box.sizes == self.info.shape else f"{self.name}@{','.join(map(str, self.box.offsets))}"

    @property
    def stored(self) -> TensorInfo:
        """Shape and dtype of the piece."""
        return TensorInfo(self.box.sizes, self.info.dtype)


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
    doing = f"saving step {step} in {run_folder}"
    tied = set(state.get("tied") or {})
    tensors = {name: tensor for name, tensor in tensors.items() if name.removeprefix("model.") not in tied}
    proposals = group.attempt(doing, lambda: _propose(tensors))
    jobs, infos = _assign(proposals)
    needed = sum(job.stored.nbytes for job in jobs) + _SLACK_BYTES
    target = folders.step_folder(run_folder, step)
    _refuse_existing(target)
    staging = Path(group.attempt(doing, lambda: _prepare(target, needed) if group.rank() == 0 else None)[0])
    try:
        mine = [job for job in jobs if job.owner == group.rank()]
        written = group.attempt(doing, lambda: _write_shards(staging, group.rank(), mine, tensors, needed))
        group.attempt(doing, lambda: _finish(staging, target, step, infos, written, state, model_config, tokenizer_folder))
    except BaseException:
        _discard(staging)
        raise
    return target


def _propose(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """What this rank holds, as JSON: per tensor dtype, shape, whether it is plain, and its boxes."""
    answer = {}
    for name, tensor in tensors.items():
        boxes = [(box.part.offsets, box.part.sizes) for box in local_boxes(tensor)]
        answer[name] = (dtype_name(tensor.dtype), tuple(tensor.shape), isinstance(tensor, DTensor), boxes)
    return answer


def _assign(proposals: Sequence[Mapping[str, Any]]) -> tuple[list[_Job], dict[str, TensorInfo]]:
    """Who writes which piece: of the ranks that hold it, the one with the fewest bytes so far. The same on every rank.

    Plain tensors go to the first rank that has them. Raises `UserError` where ranks disagree or pieces leave gaps or overlap.
    """
    infos: dict[str, TensorInfo] = {}
    holders: dict[str, dict[Box, list[int]]] = defaultdict(lambda: defaultdict(list))
    for rank, proposal in enumerate(proposals):
        for name, (dtype, shape, is_split, boxes) in proposal.items():
            info = TensorInfo(tuple(shape), DTYPES[dtype])
            if infos.setdefault(name, info) != info:
                raise UserError(f"cannot save {name}: rank {rank} has {info}, an earlier rank {infos[name]}; all ranks need the same shape")
            for offsets, sizes in boxes:
                ranks = holders[name][Box(tuple(offsets), tuple(sizes))]
                if is_split or not ranks:
                    ranks.append(rank)
    load, jobs = [0] * len(proposals), []
    for name, info in infos.items():
        if sum(box.numel for box in holders[name]) * info.dtype.itemsize != info.nbytes:
            raise UserError(f"cannot save {name}: the parts that the ranks hold do not make up its shape {info.shape} exactly once")
        for box, ranks in sorted(holders[name].items()):
            owner = min(ranks, key=lambda rank: (load[rank], rank))
            jobs.append(_Job(name, box, info, owner))
            load[owner] += jobs[-1].stored.nbytes
    return jobs, infos


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


def _write_shards(
    staging: Path, rank: int, jobs: Sequence[_Job], tensors: Mapping[str, torch.Tensor], needed: int
) -> dict[str, dict[str, Any]]:
    """This rank's shard files, each of about `MAX_FILE_BYTES` at most; file name -> bytes, blocks and the keys in it."""
    answer = {}
    for number, part in enumerate(_split(jobs)):
        name = f"shard-{rank:05d}.safetensors" if number == 0 else f"shard-{rank:05d}-{number}.safetensors"
        try:
            with TensorFileWriter(staging / name, {job.key: job.stored for job in part}, {"format": "pt"}) as writer:
                for job in part:
                    writer.append(_piece(tensors[job.name], job.box))
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            folders.require_space(staging, needed, f"saving {staging.name}")
            raise UserError(f"the disk of {staging.parent} is full: the checkpoint needs {needed} bytes; make room") from error
        pieces = [[job.name, job.key, job.box.offsets, job.box.sizes] for job in part]
        answer[name] = {"bytes": writer.nbytes, "blocks": writer.blocks, "pieces": pieces}
    return answer


def _split(jobs: Sequence[_Job]) -> Iterable[list[_Job]]:
    part: list[_Job] = []
    filled = 0
    for job in jobs:
        if part and filled + job.stored.nbytes > MAX_FILE_BYTES:
            yield part
            part, filled = [], 0
        part.append(job)
        filled += job.stored.nbytes
    if part:
        yield part


def _piece(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    """The part of this rank's local tensor that lies at `box` of the global one."""
    place = next(held.place for held in local_boxes(tensor) if held.part == box)
    return place.narrow(local_tensor(tensor))


def _finish(
    staging: Path,
    target: Path,
    step: int,
    infos: Mapping[str, TensorInfo],
    written: Sequence[Mapping[str, Any]],
    state: Mapping[str, Any],
    model_config: dict | None,
    tokenizer_folder: Path | None,
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
    files.update(_write_hf(staging, model_config, tokenizer_folder))
    entries = {name: TensorEntry(info, tuple(sorted(pieces[name], key=lambda piece: piece.box))) for name, info in infos.items()}
    versions = {"seqloom": seqloom.__version__, "torch": torch.__version__}
    manifest = Manifest(step, group.world_size(), files, entries, state, versions)
    unseen = next(manifest.wrong_sizes(staging), None)
    if unseen is not None:
        raise UserError(f"{staging}: {unseen} as rank 0 sees it: the run folder must be on a file system that all machines share")
    try:
        data = manifest.to_bytes()
    except (TypeError, ValueError) as error:
        raise UserError(f"the training state is not plain JSON ({error}): it may hold text, finite numbers, lists and mappings") from error
    folders.write_durably(staging / MANIFEST, data)
    folders.commit(staging, target)


def _write_hf(staging: Path, model_config: dict | None, tokenizer_folder: Path | None) -> dict[str, FileEntry]:
    """Copy what a Hugging Face folder needs beside the weights into `hf/`."""
    contents: dict[str, bytes] = {}
    if tokenizer_folder is not None:
        contents.update({path.name: path.read_bytes() for path in tokenizer_files(tokenizer_folder)})
    if model_config is not None:
        contents["config.json"] = (json.dumps(model_config, indent=2, sort_keys=True) + "\n").encode()
    if contents:
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
