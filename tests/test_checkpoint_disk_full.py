"""Full disks: a save that has no room says how many bytes it needs and how many are free, and leaves the step before it as it was."""

import contextlib
import errno
import logging
import os
import re
import shutil
import subprocess

import pytest
import torch
from deadly import Steps
from hypothesis import given, settings
from hypothesis import strategies as st

from seqloom.checkpoint import folders, write
from seqloom.checkpoint.merge import merge
from seqloom.checkpoint.read import find_checkpoint, load_checkpoint
from seqloom.checkpoint.verify import damage
from seqloom.checkpoint.write import save_checkpoint
from seqloom.errors import UserError

CONFIG = {"model_type": "llama"}
NEEDED_AND_FREE = re.compile(r"needs \d+ bytes in .*\d+ are free")


def _tensors(step, rows=64):
    generator = torch.Generator().manual_seed(step)
    return {f"model.{i}": torch.randn(rows, 256, generator=generator) for i in range(8)}


def _save(run, step):
    return save_checkpoint(run, step, _tensors(step), {"step": step, "rng": [7] * 5000}, model_config=CONFIG)


def _check(run, step):
    assert find_checkpoint("last", run) == folders.step_folder(run, step)
    tensors = {name: torch.zeros_like(tensor) for name, tensor in _tensors(step).items()}
    assert load_checkpoint(folders.step_folder(run, step), tensors)["step"] == step
    assert all(torch.equal(tensors[name], tensor) for name, tensor in _tensors(step).items())


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory):
    """A file system in memory of 8 MiB."""
    folder = tmp_path_factory.mktemp("disk")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def _fill(path, leave):
    """A file that leaves so many bytes free on its file system."""
    with open(path, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, shutil.disk_usage(path.parent).free - leave))


def _save_with_room(disk, room, monkeypatch):
    """Save step 2 beside step 1 with `room` bytes free; the error, or None."""
    run, ballast = disk / "run", disk / "ballast"
    shutil.rmtree(run, ignore_errors=True)
    ballast.unlink(missing_ok=True)
    monkeypatch.setattr(write, "MAX_FILE_BYTES", 200_000)
    _save(run, 1)
    _fill(ballast, room)
    try:
        _save(run, 2)
        problem = None
    except UserError as error:
        problem = str(error)
    if problem is None:
        _check(run, 2)
        return None
    assert [path.name for path in run.iterdir() if path.name.startswith(".")] == []
    _check(run, 1)
    ballast.unlink()
    _save(run, 2)
    _check(run, 2)
    return problem


def test_too_little_room_is_seen_before_anything_is_written(small_disk, monkeypatch):
    for room in (0, 4096, 100_000, 1_000_000, 4_000_000):
        assert NEEDED_AND_FREE.search(_save_with_room(small_disk, room, monkeypatch))


@given(room=st.integers(0, 1_200_000))
@settings(max_examples=40, deadline=None)
def test_room_that_runs_out_while_writing(small_disk, room):
    """As if another program took the room after it was looked at: the first look sees plenty."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folders, "require_space", lambda *arguments: None)
        problem = _save_with_room(small_disk, room, patch)
    needed = sum(tensor.numel() * 4 for tensor in _tensors(1).values())
    assert (problem is None) == (room > needed) or abs(room - needed) < 100_000
    assert problem is None or NEEDED_AND_FREE.search(problem), problem


def test_merges_have_to_fit_too(small_disk, monkeypatch):
    run, ballast = small_disk / "run", small_disk / "ballast"
    shutil.rmtree(run, ignore_errors=True)
    ballast.unlink(missing_ok=True)
    _save(run, 1)
    _fill(ballast, 300_000)
    for outputs in ({"output_fname": small_disk / "m.ckpt"}, {"hf_output": small_disk / "hf", "dtype": "float32"}):
        with pytest.raises(UserError, match="are free"):
            merge(run, **outputs)
        with monkeypatch.context() as patch:
            patch.setattr(folders, "require_space", lambda *arguments: None)
            with pytest.raises(UserError, match="make room"):
                merge(run, **outputs)
    assert sorted(path.name for path in small_disk.iterdir()) == ["ballast", "run"]
    ballast.unlink()
    merge(run, output_fname=small_disk / "m.ckpt")
    assert damage(small_disk / "m.ckpt") is None


# ---- every step towards the disk fails once


@contextlib.contextmanager
def _failing_at(root, number, error):
    """The `number`-th step towards the disk under `root` fails; yields the counter."""

    def at(count, partly):
        if count == number and steps.watching:
            if partly is not None:
                with contextlib.suppress(OSError):
                    partly()
            raise OSError(error, os.strerror(error))

    steps = Steps(root, at, small=False)
    with steps.watched():
        yield steps


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO], ids=["full", "quota", "broken"])
def test_any_step_may_fail(tmp_path, monkeypatch, caplog, error):
    """What is left is step 1, or step 2 where only what follows the commit failed; and the next save works."""
    caplog.set_level(logging.CRITICAL)
    monkeypatch.setattr(write, "MAX_FILE_BYTES", 200_000)
    run, number, outcomes = tmp_path / "run", 0, []
    while True:
        number += 1
        shutil.rmtree(run, ignore_errors=True)
        _save(run, 1)
        problem = None
        with _failing_at(run, number, error) as steps:
            try:
                _save(run, 2)
            except UserError as refusal:
                problem = str(refusal)
        if steps.count < number:
            break
        step = 2 if (run / "step-2").exists() else 1
        outcomes.append((step, problem))
        _check(run, step)
        _save(run, step + 1)
        _check(run, step + 1)
        assert not [path for path in run.iterdir() if path.name.startswith(".")]
    assert len(outcomes) > 20
    assert [step for step, _ in outcomes] == sorted(step for step, _ in outcomes)
    assert all(problem is not None or step == 2 for step, problem in outcomes)
    sentences = [problem for _, problem in outcomes if problem is not None]
    assert all(str(run) in sentence for sentence in sentences)
    if error != errno.EIO:
        clear = [sentence for sentence in sentences if re.search(r"needs \d+ bytes.*make room", sentence)]
        assert clear == sentences, set(sentences) - set(clear)
        assert not [sentence for sentence in sentences if ".staging" in sentence]
