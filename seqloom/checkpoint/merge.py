"""Merge a sharded checkpoint into one file, or into a Hugging Face folder, in a stream.

Role in the pipeline: `ckpt_merger.py` calls `merge`. In goes a step folder (or a run folder, or the folder of runs); out come a single
safetensors file with model, optimizer and training state, which `load_checkpoint` reads under any plan, and a folder that transformers
loads. Tensors pass through in batches of rows. Outputs are written under staging names and renamed when they are whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import seqloom
from seqloom.checkpoint import folders
from seqloom.checkpoint.digest import root_digest
from seqloom.checkpoint.huggingface import INDEX, MARK, SINGLE, TOKENIZER_FILES, WRITTEN_DTYPES, hf_nbytes, write_hf_folder
from seqloom.checkpoint.manifest import FORMAT, VERSION, Manifest
from seqloom.checkpoint.read import newest_good
from seqloom.checkpoint.reader import DIGEST_KEY, MERGED_KEY, NO_DIGEST, StepReader, is_merged_file
from seqloom.checkpoint.tensorfile import TensorFile, TensorFileWriter, header_bytes
from seqloom.checkpoint.verify import damage, digest_place
from seqloom.errors import UserError

MODEL_PREFIX = "model."
_BESIDE = frozenset(f"hf/{name}" for name in TOKENIZER_FILES)
_SLACK_BYTES = 2**20


@dataclass(frozen=True)
class MergeReport:
    """What a merge did: the step folder it read and, for a Hugging Face folder, the dtype of the weights and where that came from."""

    source: Path
    dtype: str | None = None
    dtype_reason: str | None = None


def resolve_source(ckpt_dir: Path, *, verify: bool = True) -> Path:
    """The step folder that `ckpt_dir` means: itself, the newest good step of a run folder, or of the only run in a folder of runs.

    A folder without steps whose subfolders have manifests counts as one step, collected from several machines. Raises `UserError` when
    there is no checkpoint, several runs (listed), or no good one.
    """
    if not ckpt_dir.is_dir():
        raise UserError(f"--ckpt_dir {ckpt_dir} is not a folder: give a step folder, a run folder or the folder of runs")
    if folders.is_step_folder(ckpt_dir) or (not folders.steps(ckpt_dir) and folders.collected_parts(ckpt_dir)):
        problem = damage(ckpt_dir, digests=verify)
        if problem is not None:
            raise UserError(f"{ckpt_dir} is damaged ({problem}): put a good copy in its place or merge another step")
        return ckpt_dir
    runs = [ckpt_dir] if folders.steps(ckpt_dir) else sorted(path for path in ckpt_dir.iterdir() if path.is_dir() and folders.steps(path))
    if len(runs) > 1:
        raise UserError(f"{ckpt_dir} holds several runs ({', '.join(run.name for run in runs)}): choose one, --ckpt_dir {runs[0]}")
    found = newest_good(runs[0], verify=verify) if runs else None
    if found is None:
        raise UserError(f"{ckpt_dir} holds no checkpoint: it should contain step folders (step-N), or one run folder that does")
    return found


def merge(
    ckpt_dir: Path,
    *,
    output_fname: Path | None = None,
    hf_output: Path | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
    verify: bool = True,
) -> MergeReport:
    """Merge a checkpoint into `output_fname`, `hf_output`, or both; see `resolve_source` for `ckpt_dir`.

    `dtype` of the Hugging Face weights: `bfloat16`, `float32`, or None for the model config's. Raises `UserError` before anything is
    written when no output is asked for, an output cannot be written or holds something else, the disk is too small, or the checkpoint is
    damaged (digests are checked unless `verify` is False).
    """
    if output_fname is None and hf_output is None:
        raise UserError("nothing to write: give --output_fname FILE, --hf_output FOLDER, or both")
    if output_fname is not None:
        _require_writable_file(output_fname)
    if hf_output is not None:
        _require_writable_folder(hf_output)
    source = resolve_source(ckpt_dir, verify=verify)
    reader = StepReader(folders.open_step(source))
    report = MergeReport(source)
    try:
        if hf_output is not None:
            config = _model_config(reader)
            chosen, reason = _choose_dtype(dtype, config)
            report = MergeReport(source, chosen, reason)
            _check_space(hf_output, hf_nbytes(reader, _model_names(reader.manifest), WRITTEN_DTYPES[chosen]))
        if output_fname is not None:
            merge_to_file(reader, output_fname)
        if hf_output is not None:
            merge_to_hf(reader, hf_output, config, chosen, max_shard_bytes)
    finally:
        reader.close()
    return report


def merge_to_file(reader: StepReader, output: Path) -> None:
    """Write all tensors and the training state of a step folder to one file, atomically. See docs/checkpoints.md for its metadata."""
    manifest = reader.manifest
    document = {
        "format": FORMAT,
        "version": VERSION,
        "step": manifest.step,
        "versions": {"seqloom": seqloom.__version__, "torch": torch.__version__},
        "model_config": _model_config(reader) if "hf/config.json" in manifest.files else None,
        "state": dict(manifest.state),
    }
    metadata = {MERGED_KEY: json.dumps(document, separators=(",", ":")), DIGEST_KEY: NO_DIGEST}
    _check_space(output, sum(info.nbytes for info in reader.values()))

    def write(staging: Path) -> None:
        with TensorFileWriter(staging, reader, metadata) as writer:
            for name in reader:
                for batch in reader.batches(name):
                    writer.append(batch)
        start, _ = digest_place(header_bytes(reader, metadata))
        with open(staging, "r+b") as file:
            file.seek(start)
            file.write(root_digest(writer.blocks).encode())
            file.flush()
            os.fsync(file.fileno())

    _staged(output, write)


def merge_to_hf(reader: StepReader, output: Path, config: Mapping[str, Any], dtype: str, max_shard_bytes: int) -> None:
    """Write the model of a step folder as a Hugging Face folder, atomically; `model.<fqn>` becomes `<fqn>`, tied aliases are left out."""

    def write(staging: Path) -> None:
        staging.mkdir()
        names = _model_names(reader.manifest)
        beside = [reader.step.file(name) for name in reader.manifest.files if name in _BESIDE]
        write_hf_folder(staging, reader, names, config, dtype=dtype, beside=beside, max_shard_bytes=max_shard_bytes)
        for path in staging.iterdir():
            folders.sync(path)
        folders.sync(staging)

    _staged(output, write)


def _staging_name(output: Path) -> str:
    return f"{output.name}-merge-"


def _staged(output: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make a file or folder under a staging name and give it its own name when it is whole and on disk."""
    name = _staging_name(output)
    folders.sweep_staging(output.parent, name)
    staging = folders.staging_path(output.parent, name)
    try:
        write(staging)
        if output.is_dir():
            os.rename(output, folders.staging_path(output.parent, name))
        os.replace(staging, output)
        folders.sync(output.parent)
    except OSError as error:
        raise UserError(
            f"writing {output} failed ({error.strerror or error}): make room or choose another place, and merge again"
        ) from error
    finally:
        folders.sweep_staging(output.parent, name)


def _model_names(manifest: Manifest) -> dict[str, str]:
    """Name in the Hugging Face folder -> name in the checkpoint, for every parameter that is not an alias."""
    tied = set(manifest.state.get("tied") or {})
    names = {name.removeprefix(MODEL_PREFIX): name for name in manifest.tensors if name.startswith(MODEL_PREFIX)}
    return {name: source for name, source in names.items() if name not in tied}


def _model_config(reader: StepReader) -> dict[str, Any]:
    if "hf/config.json" not in reader.manifest.files:
        raise UserError(
            f"{reader.folder} was saved without the model's config.json, so no Hugging Face folder can be made: use --output_fname"
        )
    return json.loads(reader.step.file("hf/config.json").read_text())


def _choose_dtype(asked: str | None, config: Mapping[str, Any]) -> tuple[str, str]:
    """The dtype of the written weights and why."""
    if asked is not None:
        return asked, "--dtype"
    named = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
    return (named, "the model config") if named in WRITTEN_DTYPES else ("bfloat16", "the default, as the model config names none")


def _check_space(output: Path, needed: int) -> None:
    folders.require_space(output.absolute().parent, needed + _SLACK_BYTES, f"writing {output}")


def _require_writable_file(output: Path) -> None:
    if output.is_dir():
        raise UserError(f"--output_fname {output} is a folder: give the name of a file, such as {output / 'merged.ckpt'}")
    if output.exists() and not is_merged_file(output):
        raise UserError(f"--output_fname {output} exists and is not a merged checkpoint, so it is not written over: choose another name")
    _require_writable_parent(output, "--output_fname")


def _require_writable_folder(output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise UserError(f"--hf_output {output} is a file: give the name of a folder")
    if output.is_dir() and any(output.iterdir()) and not _is_own_hf_folder(output):
        raise UserError(f"--hf_output {output} holds other files, which are not written over: choose another folder or empty it")
    _require_writable_parent(output, "--hf_output")


def _require_writable_parent(output: Path, flag: str) -> None:
    """Make the output's parent folder and try to write in it, for permission bits do not tell everything."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        probe = folders.staging_path(output.parent, _staging_name(output))
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise UserError(f"{flag} {output} cannot be written ({error.strerror or error}): choose a folder with write permission") from error


def _is_own_hf_folder(folder: Path) -> bool:
    """Whether everything in a folder is what an earlier merge wrote, so that a new merge may take its place."""
    weights = [path for path in folder.iterdir() if path.suffix == ".safetensors"]
    known = {*TOKENIZER_FILES, "config.json", INDEX, SINGLE, *(path.name for path in weights)}
    if not weights or any(path.name not in known for path in folder.iterdir()):
        return False
    try:
        return all(_mark_of(path) == MARK for path in weights)
    except UserError:
        return False


def _mark_of(path: Path) -> dict[str, str]:
    file = TensorFile(path)
    file.close()
    return file.metadata
