"""Look at checkpoints: list those of a run, verify one, show what is in one.

Role in the pipeline: `python -m seqloom checkpoint {list, verify, show}` prints what these functions return, line by line; `compare` is
the fourth of these commands.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from seqloom.checkpoint import folders
from seqloom.checkpoint.manifest import Manifest
from seqloom.checkpoint.read import find_checkpoint
from seqloom.checkpoint.reader import StepReader, open_checkpoint
from seqloom.checkpoint.verify import damage
from seqloom.errors import UserError

_GIB = 2**30


def list_checkpoints(folder: Path) -> Iterator[str]:
    """A line per step of a run folder, or of every run in a folder of runs: step, size, ranks, or what is wrong with it.

    Manifests and file sizes are checked, digests are not. Raises `UserError` when there is no checkpoint.
    """
    runs = [folder] if folders.steps(folder) else sorted(path for path in folder.glob("*") if folders.steps(path))
    if not runs:
        raise UserError(f"{folder} holds no checkpoint: give a run folder or the folder of runs")
    for run in runs:
        yield f"{run}"
        for step in folders.steps(run):
            path = folders.step_folder(run, step)
            problem = folders.structural_damage(path)
            yield f"  {path.name:<12} {problem and f'damaged: {problem}' or _summary(Manifest.read(path))}"


def verify_checkpoint(path: Path) -> str:
    """Check all sizes and digests of a step folder, a run's newest step, or a merged file; returns a line that says it is good.

    Raises `UserError` naming the file and the digests when it is not.
    """
    path = newest(path)
    problem = damage(path)
    if problem is not None:
        raise UserError(f"{path} is damaged ({problem}): restore it from a good copy, or use another checkpoint")
    return f"{path}: all sizes and digests are as written"


def show_checkpoint(path: Path) -> Iterator[str]:
    """Lines about one checkpoint: step, plan, mesh, training state, and its tensors with shape, dtype and number of pieces."""
    path = newest(path)
    reader, state = open_checkpoint(path)
    reader.close()
    yield f"{path}: {_summary(reader.manifest) if isinstance(reader, StepReader) else 'a merged file'}"
    for key, value in state.items():
        text = str(value)
        yield f"  {key}: {text if len(text) <= 100 else text[:97] + '...'}"
    totals: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for name, (shape, dtype) in reader.items():
        pieces = f", {len(reader.manifest.tensors[name].pieces)} pieces" if isinstance(reader, StepReader) else ""
        yield f"  {name} {list(shape)} {str(dtype).removeprefix('torch.')}{pieces}"
        kind = ".".join(name.split(".")[: 2 if name.startswith("optimizer.") else 1])
        totals[kind][0] += math.prod(shape)
        totals[kind][1] += reader[name].nbytes
    for kind, (elements, nbytes) in totals.items():
        yield f"  {kind} in all: {elements:,} elements, {nbytes / _GIB:.3f} GiB"


def newest(path: Path) -> Path:
    """The checkpoint meant by a path: itself, or the newest step of a run folder, good or not."""
    steps = [] if folders.is_step_folder(path) else folders.steps(path)
    return folders.step_folder(path, steps[-1]) if steps else find_checkpoint(str(path), path) or path


def _summary(manifest: Manifest) -> str:
    size = sum(entry.nbytes for entry in manifest.files.values()) / _GIB
    plan = manifest.state.get("plan")
    written_by = f"{manifest.world_size} rank{'s' if manifest.world_size != 1 else ''}"
    return f"step {manifest.step}, {size:.3f} GiB, {len(manifest.tensors)} tensors, written by {written_by}" + (
        f", plan {plan}" if plan else ""
    )
