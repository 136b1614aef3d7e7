"""Loading that hashes on the way: every byte of a block is hashed once, whatever is asked for, in whatever order."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from procs import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from seqloom.checkpoint import fill, stream, verify
from seqloom.checkpoint.read import find_checkpoint, load_checkpoint, load_newest
from seqloom.checkpoint.verify import Contents
from seqloom.checkpoint.write import save_checkpoint
from seqloom.errors import UserError

BLOCK = 64


@pytest.fixture
def small_blocks(monkeypatch):
    _small_blocks(monkeypatch.setattr)


def _small_blocks(setattr_):
    for module in ("digest", "fill", "manifest", "stream", "verify"):
        setattr_(f"seqloom.checkpoint.{module}.BLOCK_BYTES", BLOCK)
    setattr_(stream, "CHUNK_BYTES", 24)


@given(st.binary(min_size=1, max_size=500), st.data())
@settings(max_examples=200, deadline=None)
def test_any_reads_give_the_bytes_and_the_digests(tmp_path_factory, data, draw):
    path = tmp_path_factory.mktemp("stream") / "file"
    path.write_bytes(data)
    overlay = draw.draw(st.binary(max_size=100).filter(lambda text: len(text) <= len(data)))
    count = -(-len(data) // BLOCK)
    indices = draw.draw(st.sets(st.integers(0, count - 1)))
    reads = draw.draw(st.lists(st.tuples(st.integers(len(overlay), len(data)), st.integers(0, len(data))), max_size=6))
    if draw.draw(st.booleans()):
        reads = sorted(reads)
    with pytest.MonkeyPatch.context() as patch:
        _small_blocks(patch.setattr)
        reader = stream.BlockStream(path, len(data), indices, overlay)
        with open(path, "rb", buffering=0) as file:
            for start, length in reads:
                buffer = bytearray(length)
                read = reader.read_into(file.fileno(), memoryview(buffer), start)
                assert bytes(buffer[:read]) == data[start : start + length]
            found = reader.finish(file.fileno())
    expected = overlay + data[len(overlay) :]
    assert found == {i: xxhash.xxh3_128_hexdigest(expected[i * BLOCK : (i + 1) * BLOCK]) for i in indices}


def _count_bytes(monkeypatch):
    """How many bytes are read from files, as they are read."""
    read = []
    preadv = os.preadv

    def counting(descriptor, buffers, offset):
        count = preadv(descriptor, buffers, offset)
        read.append(count)
        return count

    monkeypatch.setattr(os, "preadv", counting)
    return read


def test_a_checked_load_reads_every_byte_once(tmp_path, monkeypatch, small_blocks):
    tensors = {f"model.{i}": torch.randn(40, 7) for i in range(6)}
    folder = save_checkpoint(tmp_path, 1, tensors, {"step": 1})
    size = (folder / "shard-00000.safetensors").stat().st_size
    header = 8 + int.from_bytes((folder / "shard-00000.safetensors").read_bytes()[:8], "little")
    loaded = {name: torch.zeros_like(tensor) for name, tensor in reversed(tensors.items())}
    read = _count_bytes(monkeypatch)
    load_checkpoint(folder, loaded)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert size <= sum(read) <= size + header + 2 * BLOCK  # the header is read to be parsed, and once more to be hashed


def _columns(rank, world_size, folder):
    """Each rank wants a quarter of every row, so no rank wants half of a block, and the blocks are shared out: how many each hashed."""
    mesh = init_device_mesh("cpu", (world_size,))
    with pytest.MonkeyPatch.context() as patch:
        _small_blocks(patch.setattr)
        hashed = []
        hash_blocks = verify.hash_blocks
        patch.setattr(verify, "hash_blocks", lambda blocks: hashed.extend(blocks) or hash_blocks(blocks))
        tensor = distribute_tensor(torch.zeros(64, 16), mesh, [Shard(1)])
        load_checkpoint(Path(folder), {"model.w": tensor})
        try:
            path = Path(folder) / "shard-00000.safetensors"
            if rank == 0:
                path.write_bytes(path.read_bytes()[:-1] + b"\x01")
            dist.barrier()
            load_checkpoint(Path(folder), {"model.w": distribute_tensor(torch.zeros(64, 16), mesh, [Shard(1)])})
        except UserError as error:
            return tensor.full_tensor().tolist(), len(hashed) // 2, str(error)
    return None


def test_blocks_that_no_rank_wants_are_shared_out(tmp_path, small_blocks):
    full = torch.arange(64 * 16.0).reshape(64, 16)
    folder = save_checkpoint(tmp_path, 1, {"model.w": full}, {})
    answers = run_ranks(_columns, 4, str(folder))
    blocks = len(Contents.of(folder).block_ids())
    assert [tensor == full.tolist() for tensor, _, _ in answers] == [True] * 4
    assert sum(hashed for _, hashed, _ in answers) == blocks
    assert {hashed for _, hashed, _ in answers} <= {blocks // 4, blocks // 4 + 1}
    assert {"shard-00000.safetensors from byte" in sentence for _, _, sentence in answers} == {True}


# ---- the newest good checkpoint in one pass


def _save(run, step):
    return save_checkpoint(run, step, {"model.w": torch.full((50,), float(step))}, {"step": step})


def _damage(folder):
    path = folder / "shard-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")


def test_load_newest_is_find_and_load(tmp_path, caplog):
    tensors = {"model.w": torch.zeros(50)}
    assert load_newest(tmp_path, tensors) is None
    for step in (1, 2, 3):
        _save(tmp_path, step)
    assert load_newest(tmp_path, tensors) == (tmp_path / "step-3", {"step": 3})
    _damage(tmp_path / "step-3")
    (tmp_path / "step-2" / "manifest.json").unlink()
    folder, state = load_newest(tmp_path, tensors)
    assert folder == find_checkpoint("last", tmp_path) == tmp_path / "step-1"
    assert state == {"step": 1}
    assert torch.equal(tensors["model.w"], torch.ones(50))
    assert "step-3 is damaged: shard-00000.safetensors from byte 0 has digest" in caplog.text
    assert f"using the previous good checkpoint {tmp_path / 'step-1'}" in caplog.text
    _damage(tmp_path / "step-1")
    with pytest.raises(UserError, match="no checkpoint of .* is good"):
        load_newest(tmp_path, tensors)
    assert bool(tensors["model.w"].isnan().all())


def test_another_model_is_no_damage(tmp_path):
    for step in (1, 2):
        _save(tmp_path, step)
    tensors = {"model.w": torch.zeros(51)}
    with pytest.raises(UserError, match="was made by another model"):
        load_newest(tmp_path, tensors)
    assert torch.equal(tensors["model.w"], torch.zeros(51))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool])
def test_spoiled_tensors_cannot_be_taken_for_values(dtype):
    tensor = torch.ones(5).to(dtype)
    fill.spoil([tensor])
    assert bool(tensor.float().isnan().all()) if dtype.is_floating_point else len(set(tensor.tolist())) == 1
