"""Merges of what several machines hold, and merges that are killed."""

import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from deadly import Steps, kill_at
from procs import run_ranks
from safetensors.torch import load_file
from test_checkpoint_kill import _codes, _die, _fork, in_nursery
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from seqloom.checkpoint import write
from seqloom.checkpoint.huggingface import HFReader
from seqloom.checkpoint.merge import merge, resolve_source
from seqloom.checkpoint.read import load_checkpoint
from seqloom.checkpoint.verify import damage
from seqloom.checkpoint.write import save_checkpoint
from seqloom.errors import UserError

CONFIG = {"model_type": "llama", "hidden_size": 5}


def _full(step=1):
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(12, 5, generator=generator) for name in ("model.a", "model.b", "optimizer.exp_avg.a")}


def _write(rank, world_size, run, tokenizer):
    mesh = init_device_mesh("cpu", (world_size,))
    for step in (1, 2):
        tensors = {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in _full(step).items()}
        save_checkpoint(Path(run), step, tensors, {"step": step}, model_config=CONFIG, tokenizer_folder=Path(tokenizer))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of four ranks with steps 1 and 2."""
    root = tmp_path_factory.mktemp("machines")
    (root / "tokenizer").mkdir()
    (root / "tokenizer" / "tokenizer.json").write_text("{}")
    run_ranks(_write, 4, str(root / "run"), str(root / "tokenizer"))
    return root / "run"


def _scatter(step, target, machines):
    """Copy a step's files to a folder per machine: `machines` maps its name to the ends of the file names it has."""
    for machine, ends in machines.items():
        for path in step.rglob("*"):
            name = path.relative_to(step)
            if path.is_file() and (path.name == "manifest.json" or any(str(name).endswith(end) for end in ends)):
                (target / machine / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target / machine / name)
    return target


SHARDS = [f"shard-{rank:05d}.safetensors" for rank in range(4)]
HALVES = {"node0": [*SHARDS[:2], "config.json"], "node1": [*SHARDS[2:], "tokenizer.json"]}


def _check_merged(source, tmp_path):
    report = merge(source, output_fname=tmp_path / "m.ckpt", hf_output=tmp_path / "hf", dtype="float32")
    assert report.source == source
    merged = load_file(tmp_path / "m.ckpt")
    assert all(torch.equal(merged[name], tensor) for name, tensor in _full().items())
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    assert all(torch.equal(weights[name], _full()[f"model.{name}"]) for name in ("a", "b"))
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["hidden_size"] == 5
    assert (tmp_path / "hf" / "tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize(
    "machines",
    [
        HALVES,
        {"a": SHARDS[:1], "b": [*SHARDS[1:3], "config.json", "tokenizer.json"], "c": SHARDS[3:]},
        {"a": [*SHARDS, "config.json", "tokenizer.json"], "b": SHARDS[1:2]},
    ],
    ids=["halves", "three", "twice"],
)
def test_shards_collected_from_several_machines(run, tmp_path, machines):
    _check_merged(_scatter(run / "step-1", tmp_path / "collected", machines), tmp_path)


def test_collected_shards_load_as_they_lie(run, tmp_path):
    source = _scatter(run / "step-1", tmp_path / "collected", HALVES)
    assert damage(source) is None
    tensors = {name: torch.zeros_like(tensor) for name, tensor in _full().items()}
    assert load_checkpoint(source, tensors) == {"step": 1}
    assert all(torch.equal(tensors[name], tensor) for name, tensor in _full().items())


def test_other_files_beside_the_machines_do_not_matter(run, tmp_path):
    source = _scatter(run / "step-1", tmp_path / "collected", HALVES)
    (source / "notes.txt").write_text("from the cluster")
    (source / "logs").mkdir()
    _check_merged(source, tmp_path)


def test_a_truncated_copy_does_not_hide_a_whole_one(run, tmp_path):
    source = _scatter(run / "step-1", tmp_path / "collected", {"a": SHARDS, **HALVES})
    path = source / "a" / SHARDS[3]
    path.write_bytes(path.read_bytes()[:-5])
    _check_merged(source, tmp_path)


def test_parts_that_do_not_make_a_whole_are_refused(run, tmp_path):
    missing = _scatter(run / "step-1", tmp_path / "missing", HALVES)
    (missing / "node1" / SHARDS[3]).unlink()
    with pytest.raises(UserError, match="missing is damaged .shard-00003.safetensors is missing"):
        merge(missing, output_fname=tmp_path / "m")
    flipped = _scatter(run / "step-1", tmp_path / "flipped", HALVES)
    path = flipped / "node1" / SHARDS[2]
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(UserError, match="shard-00002.safetensors from byte 0 has digest"):
        merge(flipped, output_fname=tmp_path / "m")
    mixed = _scatter(run / "step-1", tmp_path / "mixed", {"node0": HALVES["node0"]})
    _scatter(run / "step-2", mixed, {"node1": HALVES["node1"]})
    with pytest.raises(UserError, match="node0 and .*node1 are parts of different checkpoints"):
        merge(mixed, output_fname=tmp_path / "m")
    torn = _scatter(run / "step-1", tmp_path / "torn", HALVES)
    (torn / "node1" / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="node1/manifest.json is damaged"):
        merge(torn, output_fname=tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_run_folder_is_not_taken_for_machines(run):
    assert resolve_source(run) == run / "step-2"
    assert resolve_source(run.parent) == run / "step-2"


# ---- killed at every step

OLD, NEW = 1, 2


def _every_step(folder, before):
    """Kill a merge at step 1, 2, ... of it until it ends; after each: what there is to see, and whether it is whole."""
    root = Path(folder)
    write.MAX_FILE_BYTES = 300
    for step in (OLD, NEW):
        save_checkpoint(root / "run", step, _full(step), {"step": step}, model_config=CONFIG)
    found = []
    for number in range(1, 1000):
        outputs = root / "out"
        shutil.rmtree(outputs, ignore_errors=True)
        outputs.mkdir()
        if before:
            _merge(root, OLD, outputs)

        def act(number=number, outputs=outputs):
            Steps(outputs, kill_at(number, _die)).watch()
            _merge(root, NEW, outputs)

        code = _codes([_fork(act)])[0]
        found.append(_judge(outputs))
        _merge(root, NEW, outputs)
        assert _judge(outputs) == (NEW, NEW)
        assert sorted(path.name for path in outputs.iterdir()) == ["hf", "m.ckpt"]
        if code == 0:
            return found
    raise AssertionError("a merge has no end")


def _merge(root, step, outputs):
    source = root / "run" / f"step-{step}"
    merge(source, output_fname=outputs / "m.ckpt", hf_output=outputs / "hf", dtype="float32", max_shard_bytes=300)


def _judge(outputs):
    """The steps that the merged file and the folder hold, None where there is none; whatever can be seen must be whole."""
    visible = {path.name for path in outputs.iterdir() if not path.name.startswith(".")}
    assert visible <= {"m.ckpt", "hf"}
    merged = folder = None
    if "m.ckpt" in visible:
        assert damage(outputs / "m.ckpt") is None
        tensors = {name: torch.zeros_like(tensor) for name, tensor in _full().items()}
        merged = load_checkpoint(outputs / "m.ckpt", tensors)["step"]
        assert all(torch.equal(tensors[name], tensor) for name, tensor in _full(merged).items())
    if "hf" in visible:
        reader = HFReader(outputs / "hf")
        weights = {name: reader.read(name) for name in reader}
        reader.close()
        folder = next(step for step in (OLD, NEW) if torch.equal(weights["a"], _full(step)["model.a"]))
        assert all(torch.equal(weights[name], _full(folder)[f"model.{name}"]) for name in ("a", "b"))
        assert (outputs / "hf" / "generation_config.json").is_file()
    return merged, folder


@pytest.mark.parametrize("before", [False, True], ids=["new", "again"])
def test_killed_merges_leave_nothing_that_looks_whole(before):
    """Where there was an earlier merge, the folder may be gone for the moment between two renames, but is never a mixture."""
    with tempfile.TemporaryDirectory(prefix="seqloom-merge-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        found = in_nursery(_every_step, folder, before)
    first = OLD if before else None
    assert len(found) > 30
    assert (found[0], found[-1]) == ((first, first), (NEW, NEW))
    assert {merged for merged, _ in found} == {first, NEW}
    assert {hf for _, hf in found} <= {first, None, NEW}
    assert not before or [hf for _, hf in found].count(None) <= 2
