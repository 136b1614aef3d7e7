"""The checkpoint format without processes: slices, files, manifests, commit, and damage of every kind refused."""

import ast
import hashlib
import itertools
import json
import logging
import random
import re
import shutil
from pathlib import Path

import pytest
import safetensors
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.distributed.tensor.placement_types import Partial, Replicate, Shard, _StridedShard

import seqloom.checkpoint
from seqloom.checkpoint import digest, folders, write
from seqloom.checkpoint.inspect import list_checkpoints, show_checkpoint, verify_checkpoint
from seqloom.checkpoint.manifest import Manifest
from seqloom.checkpoint.read import find_checkpoint, load_checkpoint
from seqloom.checkpoint.slices import Box, cover, placed_boxes
from seqloom.checkpoint.tensorfile import DTYPES, TensorFile, TensorFileWriter, TensorInfo, header_bytes
from seqloom.checkpoint.verify import damage
from seqloom.checkpoint.write import save_checkpoint
from seqloom.errors import UserError

# ---- slices


@st.composite
def placed_tensors(draw, shape=None):
    """A shape, a mesh of one or two axes, and a placement on it."""
    shape = shape if shape is not None else tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    mesh = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=2)))
    dims = st.integers(0, len(shape) - 1)
    one = st.one_of(st.just(Replicate()), dims.map(Shard), st.builds(_StridedShard, dims, split_factor=st.integers(1, 4)))
    return shape, mesh, tuple(draw(st.lists(one, min_size=len(mesh), max_size=len(mesh))))


def _coordinates(mesh):
    return list(itertools.product(*map(range, mesh)))


def _distinct_boxes(shape, mesh, placements):
    return sorted({box.part for at in _coordinates(mesh) for box in placed_boxes(shape, mesh, at, placements)})


@given(placed_tensors())
@settings(max_examples=300, deadline=None)
def test_boxes_hold_each_element_exactly_once(case):
    shape, mesh, placements = case
    count = torch.zeros(shape, dtype=torch.int64)
    for box in _distinct_boxes(shape, mesh, placements):
        box.narrow(count).add_(1)
    assert bool((count == 1).all())


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_any_sharding_written_any_other_read(data):
    written = data.draw(placed_tensors())
    shape, mesh, placements = data.draw(placed_tensors(shape=written[0]))
    full = torch.arange(torch.Size(shape).numel()).reshape(shape)
    pieces = _distinct_boxes(*written)
    stored = [box.narrow(full).clone() for box in pieces]
    for at in _coordinates(mesh):
        for box in placed_boxes(shape, mesh, at, placements):
            result = torch.full(box.part.sizes, -1)
            for index, common in cover(box.part, pieces):
                common.within(box.part).narrow(result).copy_(common.within(pieces[index]).narrow(stored[index]))
            assert torch.equal(result, box.part.narrow(full))


@given(placed_tensors())
@settings(max_examples=100, deadline=None)
def test_places_fill_the_local_tensor_in_order(case):
    shape, mesh, placements = case
    for at in _coordinates(mesh):
        boxes = placed_boxes(shape, mesh, at, placements)
        local = [0] * len(shape) if not boxes else [max(b.place.offsets[d] + b.place.sizes[d] for b in boxes) for d in range(len(shape))]
        count = torch.zeros(local, dtype=torch.int64)
        for box in boxes:
            box.place.narrow(count).add_(1)
        assert bool((count == 1).all())


def _chunks(items, count):
    length = -(-len(items) // count) if items else 0
    return [items[i * length : (i + 1) * length] for i in range(count)]


@given(st.integers(1, 60), st.integers(1, 5), st.sampled_from([2, 3, 4]))
@settings(max_examples=300, deadline=None)
def test_fsdp_over_tensor_parallel_splits_tensor_parallel_first(size, dp, tp):
    placements = (_StridedShard(0, split_factor=tp), Shard(0))
    for d, t in _coordinates((dp, tp)):
        expected = _chunks(_chunks(list(range(size)), tp)[t], dp)[d]
        held = [
            i
            for b in placed_boxes((size,), (dp, tp), (d, t), placements)
            for i in range(b.part.offsets[0], sum(b.part.offsets + b.part.sizes))
        ]
        assert held == expected


def test_partial_sums_are_refused():
    with pytest.raises(UserError, match="reduce it first"):
        placed_boxes((4,), (2,), (0,), (Partial(),))


def test_scalars_have_one_box():
    assert placed_boxes((), (2, 2), (1, 1), (Replicate(), Replicate()))[0].part == Box((), ())
    assert cover(Box((), ()), [Box((), ())]) == [(0, Box((), ()))]


@pytest.mark.parametrize("pieces", [[Box((0,), (2,))], [Box((0,), (3,)), Box((2,), (2,))], [Box((0,), (2,)), Box((0,), (2,))], []])
def test_gaps_and_overlaps_are_found(pieces):
    with pytest.raises(ValueError, match="piece"):
        cover(Box((0,), (4,)), pieces)


# ---- safetensors streams


def _random_tensor(shape, dtype, seed):
    size = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    if dtype == torch.bool:
        raw = raw % 2
    return raw.view(dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)


def _bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)


@st.composite
def tensor_files(draw):
    shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
    names = st.text(st.characters(blacklist_categories=["Cs"]), min_size=1, max_size=12).filter(lambda name: name != "__metadata__")
    specs = draw(st.dictionaries(names, st.tuples(shapes, st.sampled_from(list(DTYPES.values()))), max_size=4))
    return {name: _random_tensor(shape, dtype, i) for i, (name, (shape, dtype)) in enumerate(specs.items())}


@given(tensor_files(), st.data())
@settings(max_examples=100, deadline=None)
def test_written_stream_is_safetensors_and_slices_are_right(tmp_path_factory, tensors, data):
    path = tmp_path_factory.mktemp("stream") / "a.safetensors"
    with TensorFileWriter(path, {n: TensorInfo(tuple(t.shape), t.dtype) for n, t in tensors.items()}, {"format": "pt"}) as writer:
        for tensor in tensors.values():
            writer.append(tensor)
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    assert all(
        t.shape == loaded[n].shape and t.dtype == loaded[n].dtype and torch.equal(_bits(t), _bits(loaded[n])) for n, t in tensors.items()
    )
    assert writer.nbytes == path.stat().st_size
    assert writer.blocks == (xxhash.xxh3_128_hexdigest(path.read_bytes()),)
    file = TensorFile(path)
    for name, tensor in tensors.items():
        offsets = [data.draw(st.integers(0, size)) for size in tensor.shape]
        sizes = [data.draw(st.integers(0, size - offset)) for size, offset in zip(tensor.shape, offsets, strict=True)]
        expected = Box(tuple(offsets), tuple(sizes)).narrow(tensor)
        assert torch.equal(_bits(file.read_slice(name, offsets, sizes)), _bits(expected))
    file.close()


def test_library_files_are_read(tmp_path):
    tensors = {"b": torch.randn(3, 4), "a": torch.arange(5, dtype=torch.int64), "s": torch.tensor(2.0)}
    save_file(tensors, tmp_path / "x.safetensors")
    file = TensorFile(tmp_path / "x.safetensors")
    assert all(torch.equal(file.read(name), tensor) for name, tensor in tensors.items())
    with pytest.raises(ValueError, match="not inside"):
        file.read_slice("b", (0, 0), (3, 5))


def test_writer_counts_bytes(tmp_path):
    with pytest.raises(RuntimeError, match="promised"), TensorFileWriter(tmp_path / "a", {"x": TensorInfo((3,), torch.float32)}) as writer:
        writer.append(torch.zeros(2))


def _header(entries):
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


HOSTILE = {
    "huge header": (2**60).to_bytes(8, "little") + b"{}",
    "header past the end": (100).to_bytes(8, "little") + b"{}",
    "short": b"\1\0",
    "empty": b"",
    "not json": (2).to_bytes(8, "little") + b"{{",
    "a list": (2).to_bytes(8, "little") + b"[]",
    "huge tensor": _header({"x": {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 2**62]}}),
    "wrong size": _header({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}) + b"\0" * 4,
    "negative": _header({"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}),
    "overlap": _header({n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in "ab"}) + b"\0" * 4,
    "hole": _header({"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}) + b"\0" * 8,
    "unknown type": _header({"x": {"dtype": "PICKLE", "shape": [1], "data_offsets": [0, 4]}}) + b"\0" * 4,
    "deep": (200_000).to_bytes(8, "little") + b"[" * 200_000,
    "trailing": _header({}) + b"more",
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_files_are_refused_before_allocation(tmp_path, data):
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(UserError, match="x.safetensors is not a whole safetensors file"):
        TensorFile(tmp_path / "x.safetensors")


@given(st.binary(max_size=100), st.integers(1, 17))
@settings(max_examples=50, deadline=None)
def test_block_digests_do_not_depend_on_how_bytes_come(data, step):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digest, "BLOCK_BYTES", 16)
        hasher = digest.BlockHasher()
        for start in range(0, len(data), step):
            hasher.update(data[start : start + step])
        assert hasher.blocks() == tuple(xxhash.xxh3_128_hexdigest(data[i : i + 16]) for i in range(0, len(data), 16))


# ---- save and load in one process


def _tensors(seed=0):
    torch.manual_seed(seed)
    tensors = {"model.norm.weight": torch.randn(7), "model.embed.weight": torch.randn(11, 5), "model.empty": torch.zeros(0, 3)}
    tensors |= {f"optimizer.exp_avg.{n.removeprefix('model.')}": torch.randn_like(t) for n, t in list(tensors.items())}
    return tensors | {"optimizer.step.norm.weight": torch.tensor(3.0), "model.half": torch.randn(3, 2).bfloat16()}


def _same(tensors, expected):
    return tensors.keys() == expected.keys() and all(torch.equal(tensors[name], expected[name]) for name in tensors)


def _blank(tensors):
    return {name: torch.full_like(tensor, 99) for name, tensor in tensors.items()}


def _save(run, step, seed=None):
    state = {"step": step, "plan": "sp2", "mesh": {"sp": 2}, "rng": [[1, 2], "AAA="], "text": 'é"\n'}
    return save_checkpoint(run, step, _tensors(step if seed is None else seed), state, model_config={"model_type": "llama"})


def test_round_trip(tmp_path):
    folder = _save(tmp_path / "run", 5)
    assert folder == tmp_path / "run" / "step-5"
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["latest", "step-5"]
    assert (tmp_path / "run" / "latest").read_text().strip() == "step-5"
    tensors = _blank(_tensors(5))
    state = load_checkpoint(folder, tensors)
    assert _same(tensors, _tensors(5))
    assert state == {"step": 5, "plan": "sp2", "mesh": {"sp": 2}, "rng": [[1, 2], "AAA="], "text": 'é"\n'}
    assert _same(load_file(folder / "shard-00000.safetensors"), {name: t for name, t in _tensors(5).items() if t.numel()})


def test_manifest_says_what_is_there(tmp_path):
    folder = _save(tmp_path, 5)
    document = json.loads((folder / "manifest.json").read_text())
    assert (document["format"], document["version"], document["step"], document["world_size"]) == ("seqloom-checkpoint", 2, 5, 1)
    assert (document["plan"], document["mesh"]) == ("sp2", {"sp": 2})
    assert set(document["files"]) == {"shard-00000.safetensors", "hf/config.json"}
    for name, entry in document["files"].items():
        data = (folder / name).read_bytes()
        blocks = [xxhash.xxh3_128_digest(data)]
        assert (entry["bytes"], entry["blocks"]) == (len(data), [b.hex() for b in blocks])
        assert entry["digest"] == hashlib.sha256(b"".join(blocks)).hexdigest()
    piece = {"file": "shard-00000.safetensors", "key": "model.embed.weight", "offsets": [0, 0], "sizes": [11, 5]}
    assert document["tensors"]["model.embed.weight"] == {"dtype": "F32", "shape": [11, 5], "pieces": [piece]}
    assert document["tensors"]["optimizer.step.norm.weight"]["shape"] == []
    manifest = Manifest.read(folder)
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest


def test_the_documentation_suffices_to_read_one(tmp_path, monkeypatch):
    """The Python of docs/checkpoints.md runs as printed."""
    weight = torch.randn(6, 4)
    save_checkpoint(tmp_path, 1000, {"model.lm_head.weight": weight}, {"step": 1000})
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parent.parent / "docs" / "checkpoints.md").read_text()
    names = {"hashlib": hashlib, "json": json, "torch": torch, "safetensors": safetensors}
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(block, names)
    assert torch.equal(names["result"], weight)


def test_large_state_is_split_into_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(write, "MAX_FILE_BYTES", 200)
    folder = _save(tmp_path, 1)
    assert len(list(folder.glob("shard-00000*.safetensors"))) > 2
    tensors = _blank(_tensors(1))
    load_checkpoint(folder, tensors)
    assert _same(tensors, _tensors(1))


def test_many_blocks(tmp_path, monkeypatch):
    for module in ("digest", "fill", "manifest", "stream", "verify"):
        monkeypatch.setattr(f"seqloom.checkpoint.{module}.BLOCK_BYTES", 64)
    folder = _save(tmp_path, 1)
    assert damage(folder) is None
    assert len(Manifest.read(folder).files["shard-00000.safetensors"].blocks) > 10
    _flip(folder / "shard-00000.safetensors", 8 * 700)
    assert "from byte 640 has digest" in damage(folder)


def test_tied_aliases_are_not_stored_and_can_be_asked_for(tmp_path):
    weight = torch.randn(4, 2)
    state = {"tied": {"lm_head.weight": "embed.weight"}}
    folder = save_checkpoint(tmp_path, 1, {"model.embed.weight": weight, "model.lm_head.weight": weight}, state)
    assert list(Manifest.read(folder).tensors) == ["model.embed.weight"]
    tensors = {"model.embed.weight": torch.zeros(4, 2), "model.lm_head.weight": torch.zeros(4, 2)}
    load_checkpoint(folder, tensors)
    assert torch.equal(tensors["model.lm_head.weight"], weight)


def test_an_existing_step_is_never_written_over(tmp_path):
    _save(tmp_path, 5)
    with pytest.raises(UserError, match="step-5 is a good checkpoint already"):
        _save(tmp_path, 5, seed=6)
    tensors = _blank(_tensors(5))
    load_checkpoint(tmp_path / "step-5", tensors)
    assert _same(tensors, _tensors(5))


def test_a_damaged_step_is_set_aside_and_saved_again(tmp_path, caplog):
    _flip(_save(tmp_path, 5) / "shard-00000.safetensors", 8000)
    _save(tmp_path, 5, seed=6)
    tensors = _blank(_tensors(6))
    load_checkpoint(tmp_path / "step-5", tensors)
    assert _same(tensors, _tensors(6))
    assert "moved to" in caplog.text
    assert [p.name.startswith("damaged-step-5-") for p in tmp_path.iterdir() if p.is_dir()].count(True) == 1


def test_stale_staging_is_swept(tmp_path):
    (tmp_path / ".staging-step-3-dead").mkdir()
    (tmp_path / ".staging-step-3-dead" / "shard-00000.safetensors").write_bytes(b"x")
    _save(tmp_path, 5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-5"]


def test_disk_space_is_checked_before_writing(tmp_path, monkeypatch):
    _save(tmp_path, 1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"needs \d{7} bytes .* only 1000 are free"):
        _save(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-1"]
    assert find_checkpoint("last", tmp_path) == tmp_path / "step-1"


def test_full_disk_while_writing_leaves_the_previous_step(tmp_path, monkeypatch):
    _save(tmp_path, 1)

    def full(self, tensor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TensorFileWriter, "append", full)
    with pytest.raises(UserError, match=r"saving step-2 needs \d+ bytes in .*, whose disk is full"):
        _save(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-1"]


@pytest.mark.parametrize("value", [float("nan"), {1, 2}, torch.zeros(1)])
def test_state_must_be_json(tmp_path, value):
    with pytest.raises(UserError, match="not plain JSON"):
        save_checkpoint(tmp_path, 1, _tensors(), {"value": value})
    assert list(tmp_path.iterdir()) == []


def test_unwritable_run_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write in"):
        _save(tmp_path / "file" / "run", 1)


def test_mismatches_are_named_and_nothing_is_filled(tmp_path):
    folder = _save(tmp_path, 1)
    tensors = _blank(_tensors(1))
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    with pytest.raises(UserError, match=r"model.embed.weight \(stored \(11, 5\) torch.float32, wanted \(11, 6\)"):
        load_checkpoint(folder, tensors | {"model.embed.weight": torch.zeros(11, 6)})
    with pytest.raises(UserError, match="does not hold a, b, c and 1 more"):
        load_checkpoint(folder, tensors | {name: torch.zeros(1) for name in "abcd"})
    with pytest.raises(UserError, match="does not have: model.norm.weight"):
        load_checkpoint(folder, {name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"})
    with pytest.raises(UserError, match="wanted .* torch.float64"):
        load_checkpoint(folder, tensors | {"model.norm.weight": torch.zeros(7, dtype=torch.float64)})
    assert _same(tensors, before)
    load_checkpoint(folder, {"model.norm.weight": tensors["model.norm.weight"], "extra": torch.zeros(1)}, strict=False)
    assert torch.equal(tensors["model.norm.weight"], _tensors(1)["model.norm.weight"])


# ---- damage


def _flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8 % len(data)] ^= 1 << bit % 8
    path.write_bytes(data)


def check_refused(folder, match="damaged"):
    tensors = _blank(_tensors(5))
    with pytest.raises(UserError, match=match):
        load_checkpoint(folder, tensors)
    assert _same(tensors, _blank(_tensors(5))) or all(bool(tensor.isnan().all()) for tensor in tensors.values())


@pytest.mark.parametrize("name", ["shard-00000.safetensors", "manifest.json", "hf/config.json"])
def test_flipped_bits_are_refused(tmp_path, name):
    folder = _save(tmp_path, 5)
    path = folder / name
    good = path.read_bytes()
    generator = random.Random(name)
    edges = [bit for byte in (0, 1, 7, 8, len(good) - 1, len(good) - 2, len(good) - 70) for bit in range(byte * 8, byte * 8 + 8)]
    for bit in [*edges, *(generator.randrange(len(good) * 8) for _ in range(60))]:
        _flip(path, bit % (len(good) * 8))
        check_refused(folder, match=name.split("/")[-1])
        path.write_bytes(good)
    load_checkpoint(folder, _blank(_tensors(5)))


@pytest.mark.parametrize("name", ["shard-00000.safetensors", "manifest.json", "hf/config.json"])
def test_cut_grown_zeroed_and_missing_files_are_refused(tmp_path, name):
    folder = _save(tmp_path, 5)
    path = folder / name
    good = path.read_bytes()
    for bad in (good[:-1], good[: len(good) // 2], b"", good + b"\0", good + good, b"\0" * len(good)):
        path.write_bytes(bad)
        check_refused(folder)
    path.unlink()
    check_refused(folder, match=f"{name.split('/')[-1]}")


def test_files_of_another_step_and_swapped_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(write, "MAX_FILE_BYTES", 200)
    folder, other = _save(tmp_path, 5), _save(tmp_path, 6)
    a, b = folder / "shard-00000.safetensors", folder / "shard-00000-1.safetensors"
    good = a.read_bytes()
    a.write_bytes((other / a.name).read_bytes())
    check_refused(folder)
    a.write_bytes(b.read_bytes())
    b.write_bytes(good)
    check_refused(folder)


def test_without_verification_only_sizes_are_checked(tmp_path):
    folder = _save(tmp_path, 5)
    _flip(folder / "shard-00000.safetensors", 8 * ((folder / "shard-00000.safetensors").stat().st_size - 1))
    load_checkpoint(folder, _blank(_tensors(5)), verify=False)
    (folder / "shard-00000.safetensors").unlink()
    with pytest.raises(UserError, match="shard-00000.safetensors is missing"):
        load_checkpoint(folder, _blank(_tensors(5)), verify=False)


def _edit_manifest(folder, edit):
    """Change the manifest and give it a right digest again: what an attacker would do."""
    document = json.loads((folder / "manifest.json").read_bytes())
    document.pop("digest")
    edit(document)
    body = json.dumps(document, indent=1).removesuffix("\n}").encode() + b","
    (folder / "manifest.json").write_bytes(body + b'\n "digest": "%s"\n}\n' % hashlib.sha256(body).hexdigest().encode())


def _rename_file(new):
    def edit(document):
        document["files"] = {new if name.startswith("shard") else name: entry for name, entry in document["files"].items()}
        for tensor in document["tensors"].values():
            for piece in tensor["pieces"]:
                piece["file"] = new

    return edit


def _set(path, value):
    def edit(document):
        *parents, last = path
        for key in parents:
            document = document[key]
        document[last] = value

    return edit


_EMBED = ("tensors", "model.embed.weight")
CRAFTED = {
    "parent": _rename_file("../step-4/shard-00000.safetensors"),
    "absolute": _rename_file("/etc/hostname"),
    "inner parent": _rename_file("hf/../../x"),
    "empty name": _rename_file(""),
    "dot": _rename_file("./shard-00000.safetensors"),
    "unknown file": _set((*_EMBED, "pieces", 0, "file"), "other.safetensors"),
    "huge shape": _set((*_EMBED, "shape"), [2**50, 5]),
    "negative offset": _set((*_EMBED, "pieces", 0, "offsets"), [-1, 0]),
    "outside": _set((*_EMBED, "pieces", 0, "offsets"), [1, 0]),
    "fractional": _set((*_EMBED, "shape"), [11.0, 5]),
    "wrong rank": _set((*_EMBED, "pieces", 0, "sizes"), [55]),
    "no pieces": _set((*_EMBED, "pieces"), []),
    "dtype": _set((*_EMBED, "dtype"), "OBJECT"),
    "version": _set(("version",), 1),
    "format": _set(("format",), "other"),
    "hash": _set(("hash",), "crc32"),
    "digest": _set(("files", "shard-00000.safetensors", "digest"), "0" * 64),
    "blocks": _set(("files", "shard-00000.safetensors", "blocks"), []),
}


@pytest.mark.parametrize("edit", CRAFTED.values(), ids=CRAFTED.keys())
def test_crafted_manifests_are_refused(tmp_path, edit):
    folder = _save(tmp_path, 5)
    _edit_manifest(folder, lambda document: None)
    load_checkpoint(folder, _blank(_tensors(5)))
    _edit_manifest(folder, edit)
    check_refused(folder)


def test_manifest_that_disagrees_with_the_shard_is_refused(tmp_path):
    folder = _save(tmp_path, 5)
    _edit_manifest(folder, _set((*_EMBED, "pieces", 0, "key"), "optimizer.exp_avg.norm.weight"))
    with pytest.raises(UserError, match="the manifest says"):
        load_checkpoint(folder, _blank(_tensors(5)))


# ---- finding


def test_last_without_checkpoints_is_none(tmp_path):
    assert find_checkpoint("last", tmp_path / "nothing") is None
    (tmp_path / ".staging-step-3-dead").mkdir()
    assert find_checkpoint("last", tmp_path) is None


def test_last_orders_by_number_and_passes_damaged_ones_by(tmp_path, caplog):
    for step in (2, 9, 10):
        _save(tmp_path, step)
    assert find_checkpoint("last", tmp_path) == tmp_path / "step-10"
    _flip(tmp_path / "step-10" / "shard-00000.safetensors", 9000)
    with caplog.at_level(logging.WARNING):
        assert find_checkpoint("last", tmp_path) == tmp_path / "step-9"
    assert "step-10 is damaged: shard-00000.safetensors from byte 0 has digest" in caplog.text
    assert "using the previous good checkpoint" in caplog.text
    assert find_checkpoint("last", tmp_path, verify=False) == tmp_path / "step-10"
    (tmp_path / "step-9" / "manifest.json").unlink()
    assert find_checkpoint(str(tmp_path), tmp_path / "elsewhere") == tmp_path / "step-2"
    shutil.rmtree(tmp_path / "step-2" / "hf")
    with pytest.raises(UserError, match="no checkpoint of .* is good .*step-2 is damaged: hf/config.json is missing"):
        find_checkpoint("last", tmp_path)


def test_paths(tmp_path):
    folder = _save(tmp_path / "run", 2)
    assert find_checkpoint(str(folder), tmp_path) == folder
    assert find_checkpoint(str(tmp_path / "run"), tmp_path) == folder
    with pytest.raises(UserError, match="there is no checkpoint at"):
        find_checkpoint(str(tmp_path / "none"), tmp_path)
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="holds no step folder"):
        find_checkpoint(str(tmp_path / "other"), tmp_path)
    (tmp_path / "file").write_bytes(b"\x80\x04N.")
    with pytest.raises(UserError, match="is not a whole safetensors file"):
        load_checkpoint(find_checkpoint(str(tmp_path / "file"), tmp_path), {})


def test_inspection(tmp_path):
    for step in (1, 2):
        _save(tmp_path / "run", step)
    _flip(tmp_path / "run" / "step-2" / "shard-00000.safetensors", 9000)
    (tmp_path / "run" / "step-1" / "hf" / "config.json").unlink()
    lines = list(list_checkpoints(tmp_path))
    assert [("damaged: hf/config.json is missing" in line, "step 2" in line) for line in lines[1:]] == [(True, False), (False, True)]
    with pytest.raises(UserError, match="step-2 is damaged .*shard-00000"):
        verify_checkpoint(tmp_path / "run")
    good = _save(tmp_path / "good", 3)
    assert "as written" in verify_checkpoint(good)
    shown = "\n".join(show_checkpoint(good))
    assert "plan: sp2" in shown
    assert "model.embed.weight [11, 5] float32, 1 pieces" in shown
    with pytest.raises(UserError, match="holds no checkpoint"):
        list(list_checkpoints(tmp_path / "nothing"))


# ---- no pickle, and names


def test_nothing_is_pickled():
    forbidden = {"pickle", "load", "save", "all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list"}
    for path in Path(seqloom.checkpoint.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not modules & {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}, path
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("torch", "dist"):
                assert node.attr not in forbidden, (path, node.attr)


def test_header_is_aligned():
    for length in range(20):
        header = header_bytes({"n" * (length + 1): TensorInfo((2,), torch.float32)})
        assert len(header) % 8 == 0


def test_staging_names_are_hidden(tmp_path):
    staging = folders.make_staging(tmp_path / "step-3")
    assert staging.name.startswith(".")
    assert folders.steps(tmp_path) == []
