"""Damage of every kind, in numbers, to one checkpoint of several ranks: always refused, with the file named.

Files are changed and put back in place, so that one checkpoint serves for all. `damage` judges every case, `find_checkpoint` and
`load_checkpoint` a part of them.
"""

import json
import logging
import os
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from procs import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from seqloom.checkpoint import write
from seqloom.checkpoint.manifest import MANIFEST, Manifest
from seqloom.checkpoint.read import find_checkpoint, load_checkpoint
from seqloom.checkpoint.verify import damage
from seqloom.checkpoint.write import save_checkpoint
from seqloom.errors import UserError

RANKS = 3
SHAPES = {"embed": (31, 300), "up": (300, 29), "norm": (300,)}
FLIPS, EACH = 1200, 100
LOADS = 10  # every so many cases the checkpoint is also looked for and loaded


def _full(step):
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def _write(rank, world_size, run, tokenizer):
    """Two steps of a run, of equal sizes: three ranks, several files of each, and everything that lies beside."""
    write.MAX_FILE_BYTES = 16_000
    mesh = init_device_mesh("cpu", (world_size,))
    placements = {"embed": Shard(0), "up": Shard(1), "norm": Replicate()}
    for step in (1, 2):
        tensors = {}
        for name, full in _full(step).items():
            tensors[f"model.{name}"] = distribute_tensor(full, mesh, [placements[name]])
            tensors[f"optimizer.exp_avg.{name}"] = distribute_tensor(full * 2, mesh, [placements[name]])
        state = {"step": step, "rng": [step] * 500}
        save_checkpoint(Path(run), step, tensors, state, model_config={"model_type": "llama"}, tokenizer_folder=Path(tokenizer))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with steps 1 and 2."""
    root = tmp_path_factory.mktemp("damage")
    (root / "tokenizer").mkdir()
    (root / "tokenizer" / "tokenizer.json").write_text(json.dumps({"vocab": {f"token{i}": i for i in range(2000)}}))
    (root / "tokenizer" / "tokenizer_config.json").write_text("{}")
    run_ranks(_write, RANKS, str(root / "run"), str(root / "tokenizer"))
    return root / "run"


@pytest.fixture
def step(run):
    """The folder of step 2, which is the same after as before."""
    folder = run / "step-2"
    before = {path: path.read_bytes() for path in _files(folder)}
    yield folder
    assert {path: path.read_bytes() for path in _files(folder)} == before
    assert damage(folder) is None
    tensors = _blank()
    load_checkpoint(folder, tensors)
    assert all(torch.equal(tensors[f"model.{name}"], full) for name, full in _full(2).items())


def _files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _blank():
    names = [f"{kind}.{name}" for kind in ("model", "optimizer.exp_avg") for name in SHAPES]
    return {name: torch.zeros(SHAPES[name.split(".")[-1]]) for name in names}


def _check_refused(step, number, *names):
    """The damage is found and one of the files is named; now and then also by who looks for a checkpoint and who loads one."""
    named = re.compile("|".join(re.escape(name) for name in names))
    problem = damage(step)
    assert problem is not None, names
    assert named.search(problem), (names, problem)
    if number % LOADS:
        return
    assert find_checkpoint("last", step.parent) == step.parent / "step-1"
    tensors = _blank()
    with pytest.raises(UserError, match="step-2") as refusal:
        load_checkpoint(step, tensors)
    assert named.search(str(refusal.value)), (names, str(refusal.value))
    values = [tensor.unique().tolist() for tensor in tensors.values()]
    assert all(value == [0.0] or all(x != x for x in value) for value in values)


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level(logging.ERROR)


def _name(step, path):
    return path.relative_to(step).as_posix()


def _overwrite(path, start, data):
    with open(path, "r+b", buffering=0) as file:
        file.seek(start)
        file.write(data)


def test_the_checkpoint_has_files_of_every_kind(step):
    names = [_name(step, path) for path in _files(step)]
    assert set(names) == {MANIFEST, *Manifest.read(step).files}
    assert {"manifest.json", "hf/config.json", "hf/tokenizer.json", "hf/tokenizer_config.json"} < set(names)
    for rank in range(RANKS):
        assert len([name for name in names if name.startswith(f"shard-{rank:05d}")]) > 1


def test_single_flipped_bits(step):
    """Over all files, small ones as often as large ones, the first and last bits of each among them."""
    generator = random.Random(0)
    files = _files(step)
    for number in range(FLIPS):
        path = files[number % len(files)]
        bits = path.stat().st_size * 8
        edges = [0, 7, bits - 1, bits - 8]
        bit = edges[number // len(files)] if number // len(files) < len(edges) else generator.randrange(bits)
        byte = path.read_bytes()[bit // 8]
        _overwrite(path, bit // 8, bytes([byte ^ 1 << bit % 8]))
        _check_refused(step, number, _name(step, path))
        _overwrite(path, bit // 8, bytes([byte]))


def test_zeroed_pages(step):
    """4 KiB become zeros, as where a block never reached the disk."""
    generator = random.Random(1)
    files = _files(step)
    for number in range(EACH):
        path = files[number % len(files)]
        good = path.read_bytes()
        start = generator.randrange(max(1, len(good) - 4096))
        page = good[start : start + 4096]
        _overwrite(path, start, b"\0" * len(page))
        assert path.read_bytes() != good
        _check_refused(step, number, _name(step, path))
        _overwrite(path, start, page)


def test_truncated_files(step):
    generator = random.Random(2)
    files = _files(step)
    for number in range(EACH):
        path = files[number % len(files)]
        good = path.read_bytes()
        os.truncate(path, generator.choice([0, len(good) - 1, generator.randrange(len(good))]))
        _check_refused(step, number, _name(step, path))
        path.write_bytes(good)


def test_extended_files(step):
    generator = random.Random(3)
    files = _files(step)
    for number in range(EACH):
        path = files[number % len(files)]
        size = path.stat().st_size
        with open(path, "ab") as file:
            file.write(generator.choice([b"\0", b"\n", generator.randbytes(1 + generator.randrange(5000))]))
        _check_refused(step, number, _name(step, path))
        os.truncate(path, size)


def test_deleted_files(step):
    generator = random.Random(4)
    files = _files(step)
    for number in range(EACH):
        path = files[number % len(files)] if number < len(files) else generator.choice(files)
        path.rename(step.parent / "kept")
        _check_refused(step, number, _name(step, path))
        (step.parent / "kept").rename(path)


def test_files_of_two_ranks_swapped(step):
    generator = random.Random(5)
    shards = [path for path in _files(step) if path.suffix == ".safetensors"]
    for number in range(EACH):
        a = generator.choice(shards)
        b = generator.choice([path for path in shards if path.name[:11] != a.name[:11]])
        _swap(a, b)
        _check_refused(step, number, a.name, b.name)
        _swap(a, b)


def _swap(a, b):
    a.rename(a.with_suffix(".tmp"))
    b.rename(a)
    a.with_suffix(".tmp").rename(b)


def test_files_of_another_step(step):
    """Files of step 1 have the sizes of those of step 2; only what differs is put in place."""
    generator = random.Random(6)
    other = step.parent / "step-1"
    differing = [path for path in _files(step) if path.read_bytes() != (other / _name(step, path)).read_bytes()]
    shards = [path for path in differing if path.suffix == ".safetensors"]
    assert all(path.stat().st_size == (other / path.name).stat().st_size for path in shards)
    assert {path.name[:11] for path in shards} == {f"shard-{rank:05d}" for rank in range(RANKS)}
    for number in range(EACH):
        some = generator.sample(shards, 1 + generator.randrange(len(shards) - 1)) if number % 2 else [shards[number // 2 % len(shards)]]
        good = {path: path.read_bytes() for path in some}
        for path in some:
            shutil.copyfile(other / path.name, path)
        _check_refused(step, number, *(path.name for path in some))
        for path, data in good.items():
            path.write_bytes(data)


def test_the_manifest_of_another_step(step):
    path = step / MANIFEST
    good = path.read_bytes()
    shutil.copyfile(step.parent / "step-1" / MANIFEST, path)
    _check_refused(step, 0, "shard-")
    path.write_bytes(good)
