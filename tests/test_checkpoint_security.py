"""Nothing from a checkpoint is executed, nothing outside its folder is touched, nothing is allocated for a lie."""

import ast
import hashlib
import json
import os
import shutil
import tracemalloc
from pathlib import Path

import pytest
import torch

from seqloom.checkpoint import folders, reader
from seqloom.checkpoint.compare import compare
from seqloom.checkpoint.huggingface import HFReader
from seqloom.checkpoint.inspect import list_checkpoints, show_checkpoint
from seqloom.checkpoint.merge import merge
from seqloom.checkpoint.read import find_checkpoint, load_checkpoint
from seqloom.checkpoint.tensorfile import TensorFile
from seqloom.checkpoint.verify import damage
from seqloom.checkpoint.write import save_checkpoint
from seqloom.errors import UserError

ROOT = Path(__file__).parent.parent
PICKLING = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "torch.serialization"}
LISTS = {"broadcast_object_list", "scatter_object_list", "send_object_list", "recv_object_list"}
OBJECTS = {"load", "save", "all_gather_object", "gather_object"} | LISTS


# ---- no pickle anywhere


def _sources():
    own = [*ROOT.glob("*.py"), *(ROOT / "seqloom").rglob("*.py"), *(ROOT / "custom_ops").rglob("*.py"), *(ROOT / "configs").rglob("*.py")]
    assert len(own) > 50
    return own


def test_nothing_pickles():
    for path in _sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not {alias.name for alias in node.names} & PICKLING, path
            if isinstance(node, ast.ImportFrom):
                names = {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
                assert not names & (PICKLING | {f"torch.{name}" for name in OBJECTS} | {f"torch.distributed.{name}" for name in OBJECTS}), (
                    path
                )
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("torch", "dist", "numpy", "np"):
                assert node.attr not in OBJECTS, (path, node.lineno)
            if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "trust_remote_code"):
                assert not (isinstance(node.value, ast.Constant) and node.value.value is True), (path, node.lineno)


class _Evil:
    def __reduce__(self):
        return (os.mkdir, (str(_Evil.place),))


@pytest.mark.parametrize("name", ["shard-00000.safetensors", "manifest.json", "hf/config.json", "hf/tokenizer.json"])
def test_a_pickle_in_place_of_a_file_is_not_run(tmp_path, name):
    _Evil.place = tmp_path / "executed"
    folder = _save(tmp_path / "run")
    torch.save(_Evil(), folder / name)
    for action in (
        lambda: load_checkpoint(folder, _tensors()),
        lambda: load_checkpoint(folder, _tensors(), verify=False),
        lambda: merge(folder, output_fname=tmp_path / "m", hf_output=tmp_path / "hf", verify=False),
        lambda: list(show_checkpoint(folder)),
        lambda: compare(folder, folder),
    ):
        try:
            action()
        except UserError:
            continue
    assert not _Evil.place.exists()


@pytest.mark.parametrize("name", ["merged.ckpt", "model.safetensors"])
def test_a_pickle_in_place_of_a_whole_file_is_not_run(tmp_path, name):
    _Evil.place = tmp_path / "executed"
    torch.save(_Evil(), tmp_path / name)
    with pytest.raises(UserError, match="is not a whole safetensors file"):
        load_checkpoint(find_checkpoint(str(tmp_path / name), tmp_path), _tensors())
    if name == "model.safetensors":
        with pytest.raises(UserError, match="is not a whole safetensors file"):
            HFReader(tmp_path)
    assert not _Evil.place.exists()


# ---- links


def _tensors():
    return {"model.a": torch.arange(24.0).reshape(6, 4), "model.b": torch.ones(3)}


def _save(run, step=1):
    tokenizer = run.parent / "tokenizer"
    tokenizer.mkdir(exist_ok=True)
    (tokenizer / "tokenizer.json").write_text("{}")
    return save_checkpoint(run, step, _tensors(), {"step": step}, model_config={"model_type": "llama"}, tokenizer_folder=tokenizer)


@pytest.mark.parametrize("name", ["shard-00000.safetensors", "hf/config.json", "hf"])
@pytest.mark.parametrize("absolute", [True, False])
def test_links_that_leave_the_folder_are_refused(tmp_path, name, absolute):
    folder = _save(tmp_path / "run")
    away = tmp_path / "away"
    shutil.move(folder / name, away)
    (folder / name).symlink_to(away if absolute else os.path.relpath(away, (folder / name).parent))
    for verify in (True, False):
        with pytest.raises(UserError, match="is a link that leaves the folder"):
            load_checkpoint(folder, _tensors(), verify=verify)
        with pytest.raises(UserError, match="is a link that leaves the folder"):
            merge(folder, output_fname=tmp_path / "m", verify=verify)
    assert "is a link that leaves the folder" in list(list_checkpoints(tmp_path / "run"))[1]
    assert not (tmp_path / "m").exists()


def test_links_inside_the_folder_and_to_the_folder_are_fine(tmp_path):
    folder = _save(tmp_path / "run")
    (folder / "shard-00000.safetensors").rename(folder / "elsewhere")
    (folder / "shard-00000.safetensors").symlink_to("elsewhere")
    (tmp_path / "link").symlink_to(folder)
    for path in (folder, tmp_path / "link"):
        tensors = {name: torch.zeros_like(tensor) for name, tensor in _tensors().items()}
        load_checkpoint(path, tensors)
        assert all(torch.equal(tensors[name], tensor) for name, tensor in _tensors().items())


@pytest.mark.parametrize("kind", ["fifo", "folder", "device"])
def test_what_is_no_file_is_refused_without_waiting(tmp_path, kind):
    folder = _save(tmp_path / "run")
    path = folder / "shard-00000.safetensors"
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(UserError, match="shard-00000.safetensors"):
        load_checkpoint(folder, _tensors())


def test_a_step_of_a_run_that_is_a_link_is_still_never_deleted_through(tmp_path):
    """Setting a damaged step aside renames the link, not what it points at."""
    folder = _save(tmp_path / "other")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "step-1").symlink_to(folder)
    (folder / "shard-00000.safetensors").unlink()
    _save(tmp_path / "run")
    assert folder.is_dir()
    assert damage(tmp_path / "run" / "step-1") is None


# ---- lies about sizes


def _rewrite(folder, edit):
    """Change the manifest and give it a right digest again."""
    document = json.loads((folder / "manifest.json").read_bytes())
    document.pop("digest")
    edit(document)
    body = json.dumps(document, indent=1).removesuffix("\n}").encode() + b","
    (folder / "manifest.json").write_bytes(body + b'\n "digest": "%s"\n}\n' % hashlib.sha256(body).hexdigest().encode())


def _huge(shape):
    def edit(document):
        entry = document["tensors"]["model.a"]
        entry["shape"] = shape
        entry["pieces"][0].update(offsets=[0] * len(shape), sizes=shape)

    return edit


SHAPES = [[2**40], [2**20, 2**20], [1, 2**45], [2**62], [2**70], [2**31] * 3]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_huge_shapes_in_a_manifest_allocate_nothing(tmp_path, monkeypatch, shape):
    """The manifest agrees with itself about a tensor of petabytes; its file does not hold it."""
    folder = _save(tmp_path / "run")
    _rewrite(folder, _huge(shape))
    monkeypatch.setattr(reader.torch, "empty", _small(torch.empty))
    tracemalloc.start()
    for action in (
        lambda: merge(folder, output_fname=tmp_path / "m", verify=False),
        lambda: merge(folder, hf_output=tmp_path / "hf", verify=False),
        lambda: load_checkpoint(folder, _tensors(), verify=False),
        lambda: compare(folder, folder),
    ):
        with pytest.raises(UserError):
            action()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 * 2**20
    assert not (tmp_path / "m").exists()
    assert not (tmp_path / "hf").exists()


def _small(empty):
    def checked(size, *arguments, **options):
        assert torch.Size([size] if isinstance(size, int) else size).numel() < 10**6
        return empty(size, *arguments, **options)

    return checked


def _file(entries, data=b""):
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + data


BAD_HEADERS = {
    "a header of exabytes": (2**62).to_bytes(8, "little") + b"{}",
    "a header of the largest size": (2**64 - 1).to_bytes(8, "little"),
    "a header of gigabytes": (2**31).to_bytes(8, "little") + b"{" * 100,
    "a tensor of petabytes": _file({"x": {"dtype": "F32", "shape": [2**50], "data_offsets": [0, 2**52]}}),
    "offsets past the end": _file({"x": {"dtype": "U8", "shape": [100], "data_offsets": [0, 100]}}, b"\0" * 50),
    "a product past 64 bits": _file({"x": {"dtype": "F32", "shape": [2**32, 2**32], "data_offsets": [0, 0]}}),
    "nothing, in huge dimensions": _file({"x": {"dtype": "F32", "shape": [2**63, 0], "data_offsets": [0, 0]}}),
    "booleans for sizes": _file({"x": {"dtype": "U8", "shape": [True], "data_offsets": [0, True]}}, b"\0"),
    "text for sizes": _file({"x": {"dtype": "U8", "shape": "11", "data_offsets": [0, 1]}}, b"\0"),
    "metadata that is a list": _file({"__metadata__": [], "x": []}),
    "the same name twice": (lambda t: len(t).to_bytes(8, "little") + t + b"\0\0")(
        b'{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"x":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}'
    ),
}


@pytest.mark.parametrize("data", BAD_HEADERS.values(), ids=BAD_HEADERS.keys())
def test_bad_headers_allocate_nothing(tmp_path, data):
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    tracemalloc.start()
    for action in (lambda: TensorFile(path), lambda: HFReader(tmp_path), lambda: load_checkpoint(path, {})):
        with pytest.raises(UserError, match="model.safetensors"):
            action()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * 2**20


PATHS = [
    "../outside",
    "/etc/passwd",
    "hf/../../outside",
    "a/../../outside",
    "..",
    "",
    ".",
    "./x",
    "a//b",
    "a\\..\\b",
    "x\0y",
    "~/x/../../y",
]


@pytest.mark.parametrize("path", PATHS)
def test_paths_that_leave_the_folder_are_refused(tmp_path, path):
    folder = _save(tmp_path / "run")
    (tmp_path / "run" / "outside").write_bytes((folder / "shard-00000.safetensors").read_bytes())

    def edit(document):
        document["files"] = {path if name.startswith("shard") else name: entry for name, entry in document["files"].items()}
        for entry in document["tensors"].values():
            for piece in entry["pieces"]:
                piece["file"] = path

    _rewrite(folder, edit)
    with pytest.raises(UserError, match="leaves the folder"):
        load_checkpoint(folder, _tensors(), verify=False)
    with pytest.raises(UserError, match="leaves the folder"):
        merge(folder, output_fname=tmp_path / "m", verify=False)
    assert folders.structural_damage(folder) is not None
