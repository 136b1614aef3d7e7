"""Any sharding written, any other read, through real files: 1 to 8 ranks, meshes of up to three axes, uneven and strided shards.

No processes: what each rank holds follows from its place in the mesh.
"""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor.placement_types import Replicate, Shard, _StridedShard

from seqloom.checkpoint.folders import open_step
from seqloom.checkpoint.manifest import MANIFEST, FileEntry, Manifest, Piece, TensorEntry
from seqloom.checkpoint.reader import StepReader
from seqloom.checkpoint.slices import Box, cover, placed_boxes
from seqloom.checkpoint.stream import BlockStream
from seqloom.checkpoint.tensorfile import TensorFileWriter, TensorInfo
from seqloom.checkpoint.verify import damage

MESHES = [mesh for axes in (1, 2, 3) for mesh in itertools.product(range(1, 9), repeat=axes) if math.prod(mesh) <= 8]
DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.uint8]


@st.composite
def layouts(draw, dims):
    """A mesh of at most 8 ranks and a placement on each of its axes, for a tensor of `dims` dimensions."""
    mesh = draw(st.sampled_from(MESHES))
    dim = st.integers(0, dims - 1)
    one = st.one_of(st.just(Replicate()), dim.map(Shard), st.builds(_StridedShard, dim, split_factor=st.integers(1, 4)))
    return mesh, tuple(draw(st.lists(one, min_size=len(mesh), max_size=len(mesh))))


@st.composite
def tensors(draw):
    """A tensor of 1 to 3 dimensions whose elements all differ, as far as its type allows."""
    shape = draw(st.lists(st.integers(1, 11), min_size=1, max_size=3))
    dtype = draw(st.sampled_from(DTYPES))
    return (torch.arange(math.prod(shape)) % 251).reshape(shape).to(dtype)


def _ranks(mesh):
    return list(itertools.product(*map(range, mesh)))


def _write(folder, full, mesh, placements):
    """A step folder as the ranks of the mesh would write it: each distinct box once, by the first that holds it."""
    seen, files, pieces = set(), {}, []
    for rank, at in enumerate(_ranks(mesh)):
        own = [box.part for box in placed_boxes(tuple(full.shape), mesh, at, placements) if box.part not in seen]
        seen.update(own)
        keys = {f"w@{','.join(map(str, box.offsets))}": box for box in own}
        if not keys:
            continue
        name = f"shard-{rank:05d}.safetensors"
        with TensorFileWriter(folder / name, {key: TensorInfo(box.sizes, full.dtype) for key, box in keys.items()}) as writer:
            for box in keys.values():
                writer.append(box.narrow(full))
        files[name] = FileEntry(writer.nbytes, writer.blocks)
        pieces += [Piece(name, key, box) for key, box in keys.items()]
    entry = TensorEntry(TensorInfo(tuple(full.shape), full.dtype), tuple(pieces))
    manifest = Manifest(1, math.prod(mesh), files, {"w": entry}, {})
    (folder / MANIFEST).write_bytes(manifest.to_bytes())
    return manifest


@given(st.data())
@settings(max_examples=250, deadline=None)
def test_any_sharding_written_any_other_read(tmp_path_factory, data):
    full = data.draw(tensors())
    folder = tmp_path_factory.mktemp("slices")
    manifest = _write(folder, full, *data.draw(layouts(full.dim())))
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest
    assert damage(folder) is None
    reader = StepReader(open_step(folder))
    mesh, placements = data.draw(layouts(full.dim()))
    for at in _ranks(mesh):
        for box in placed_boxes(tuple(full.shape), mesh, at, placements):
            read = reader.read_slice("w", box.part.offsets, box.part.sizes)
            assert read.dtype == full.dtype
            assert torch.equal(read, box.part.narrow(full))
    assert torch.equal(reader.read("w"), full)
    reader.close()


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_any_box_and_where_its_bytes_lie(tmp_path_factory, data):
    """Whatever part is asked for; and the bytes that a part is said to need are those that are read."""
    full = data.draw(tensors())
    folder = tmp_path_factory.mktemp("slices")
    _write(folder, full, *data.draw(layouts(full.dim())))
    offsets = [data.draw(st.integers(0, size)) for size in full.shape]
    sizes = [data.draw(st.integers(0, size - offset)) for size, offset in zip(full.shape, offsets, strict=True)]
    wanted = Box(tuple(offsets), tuple(sizes))
    reader = StepReader(open_step(folder))
    extents = list(reader.extents("w", wanted))
    touched = {extent.file: _Touched(reader.file(extent.file)) for extent in extents}
    assert torch.equal(reader.read_slice("w", offsets, sizes), wanted.narrow(full))
    assert sum(extent.nbytes for extent in extents) == wanted.numel * full.dtype.itemsize
    for name, stream in touched.items():
        said = [extent for extent in extents if extent.file == name]
        assert min(extent.first for extent in said) == min(stream.touched)
        assert max(extent.end for extent in said) == max(stream.touched) + 1
        assert sum(extent.nbytes for extent in said) == len(stream.touched)
    reader.close()


class _Touched(BlockStream):
    """Notes which bytes of a file are asked for."""

    def __init__(self, file):
        super().__init__(file.path, file.path.stat().st_size, ())
        self.touched = set()
        file.read_through(self)

    def read_into(self, descriptor, view, offset):
        self.touched.update(range(offset, offset + len(view)))
        return super().read_into(descriptor, view, offset)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_ranks_that_hold_the_same_hold_it_wholly(data):
    """Two boxes of a layout are equal or have nothing in common, so each element is stored once."""
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    mesh, placements = data.draw(layouts(len(shape)))
    boxes = {box.part for at in _ranks(mesh) for box in placed_boxes(shape, mesh, at, placements)}
    assert all(a.intersect(b) is None for a, b in itertools.combinations(boxes, 2))
    assert sum(box.numel for box in boxes) == math.prod(shape)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_a_missing_or_doubled_piece_is_found(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    mesh, placements = data.draw(layouts(len(shape)))
    boxes = sorted({box.part for at in _ranks(mesh) for box in placed_boxes(shape, mesh, at, placements)})
    victim = data.draw(st.sampled_from(boxes))
    whole = Box.whole(shape)
    assert {index for index, _ in cover(whole, boxes)} == set(range(len(boxes)))
    for pieces in ([box for box in boxes if box != victim], [*boxes, victim]):
        with pytest.raises(ValueError, match="piece"):
            cover(whole, pieces)
