"""Merging: one file that equals the tensors, a folder that transformers loads, outputs that are whole or absent."""

import json
import shutil
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from seqloom.checkpoint import digest as digest_module
from seqloom.checkpoint import fill as fill_module
from seqloom.checkpoint import manifest as manifest_module
from seqloom.checkpoint import reader as reader_module
from seqloom.checkpoint import stream as stream_module
from seqloom.checkpoint import tensorfile as tensorfile_module
from seqloom.checkpoint import verify as verify_module
from seqloom.checkpoint.folders import open_step
from seqloom.checkpoint.huggingface import HFReader, write_hf_folder
from seqloom.checkpoint.manifest import Manifest
from seqloom.checkpoint.merge import merge, resolve_source
from seqloom.checkpoint.read import load_checkpoint
from seqloom.checkpoint.reader import StepReader
from seqloom.checkpoint.tensorfile import TensorFileWriter
from seqloom.checkpoint.verify import damage
from seqloom.checkpoint.write import save_checkpoint
from seqloom.errors import UserError

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "llama_tied": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=61, n_positions=64)),
}
TIED = {
    "llama": {},
    "llama_tied": {"lm_head.weight": "model.embed_tokens.weight"},
    "gpt2": {"lm_head.weight": "transformer.wte.weight"},
}


def _model(kind, seed=0):
    torch.manual_seed(seed)
    return MODELS[kind]().eval()


def _tensors(model, kind):
    """Names as the trainer gives them; moments and steps have known values."""
    parameters = {n: p for n, p in model.named_parameters() if n not in TIED[kind]}
    tensors = {f"model.{n}": p for n, p in parameters.items()}
    tensors |= {f"optimizer.exp_avg.{n}": p.detach() * 2 for n, p in parameters.items()}
    return tensors | {f"optimizer.step.{n}": torch.tensor(7.0) for n in parameters}


def _config(model, dtype=None):
    config = model.config.to_dict()
    config.pop("dtype", None)
    return config | ({"dtype": dtype} if dtype else {})


def _save(run, kind, step=7, seed=0, dtype=None):
    model = _model(kind, seed)
    state = {"step": step, "tied": TIED[kind], "note": 'a "digest":"' + "0" * 64 + '" in the state'}
    return model, save_checkpoint(run, step, _tensors(model, kind), state, model_config=_config(model, dtype))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_loads_the_folder_with_no_key_missing_or_unexpected(tmp_path, kind, dtype):
    model, _ = _save(tmp_path / "run", kind)
    merge(tmp_path / "run", hf_output=tmp_path / "hf", dtype=dtype, max_shard_bytes=9000)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values()), info
    assert str(loaded.dtype) == f"torch.{dtype}"
    assert set(json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())["weight_map"]).isdisjoint(TIED[kind])
    expected = dict(model.named_parameters())
    assert all(torch.equal(parameter, expected[name].to(loaded.dtype)) for name, parameter in loaded.named_parameters())
    ids = torch.arange(12).reshape(1, 12)
    assert dtype == "bfloat16" or torch.equal(loaded(ids).logits, model(ids).logits)


def test_shards_index_and_reader_agree(tmp_path):
    model, folder = _save(tmp_path / "run", "llama")
    merge(folder, hf_output=tmp_path / "hf", dtype="float32", max_shard_bytes=9000)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 3
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    expected = dict(model.named_parameters())
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in expected.values())
    assert set(index["weight_map"].values()) == set(files)
    reader = HFReader(tmp_path / "hf")
    assert set(reader) == set(expected) == set(index["weight_map"])
    for name, parameter in expected.items():
        shape, dtype = reader[name]
        assert (shape, dtype) == (tuple(parameter.shape), torch.float32)
        assert torch.equal(reader.read(name), parameter)
    weight = expected["model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(reader.read_slice("model.layers.1.mlp.down_proj.weight", (3, 5), (7, 20)), weight[3:10, 5:25])
    target = torch.zeros_like(weight, dtype=torch.bfloat16)
    reader.fill("model.layers.1.mlp.down_proj.weight", target)
    assert torch.equal(target, weight.bfloat16())
    reader.close()


def test_merged_file_holds_everything(tmp_path):
    model, folder = _save(tmp_path / "run", "gpt2")
    merge(tmp_path / "run", output_fname=tmp_path / "merged.ckpt")
    expected = {name: tensor.detach() for name, tensor in _tensors(model, "gpt2").items()}
    tensors = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    state = load_checkpoint(tmp_path / "merged.ckpt", tensors)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
    assert state == dict(Manifest.read(folder).state)
    with safe_open(tmp_path / "merged.ckpt", "pt") as file:
        document = json.loads(file.metadata()["seqloom"])
        assert set(file.keys()) == set(expected)
    assert (document["step"], document["model_config"]["model_type"]) == (7, "gpt2")


def test_flipped_bits_of_a_merged_file_are_refused(tmp_path):
    model, _ = _save(tmp_path / "run", "llama")
    path = tmp_path / "merged.ckpt"
    merge(tmp_path / "run", output_fname=path)
    good = path.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    tensors = {name: torch.zeros_like(tensor) for name, tensor in _tensors(model, "llama").items()}
    for position in [*range(40), *range(40, header, 97), header - 1, header, *range(header, len(good), 7001), len(good) - 1]:
        path.write_bytes(good[:position] + bytes([good[position] ^ 1 << position % 8]) + good[position + 1 :])
        with pytest.raises(UserError, match="merged.ckpt"):
            load_checkpoint(path, tensors)
    for bad in (good[:-1], good + b"\0", good[: header + 10], b""):
        path.write_bytes(bad)
        with pytest.raises(UserError, match="merged.ckpt"):
            load_checkpoint(path, tensors)
    path.write_bytes(good)
    assert damage(path) is None
    load_checkpoint(path, tensors)


def test_merge_streams(tmp_path, monkeypatch):
    """Python's own memory (buffers, headers) and the tensors alive are bounded by the batch, not by the model."""
    for module in (digest_module, fill_module, manifest_module, stream_module, verify_module):
        monkeypatch.setattr(module, "BLOCK_BYTES", 64 * 2**10)
    rows = 4096
    tensors = {f"model.{i}": torch.full((rows, 64), float(i)) for i in range(8)}
    folder = save_checkpoint(tmp_path / "run", 1, tensors, {}, model_config={"model_type": "llama"})
    merge(folder, output_fname=tmp_path / "first.ckpt", hf_output=tmp_path / "first", dtype="bfloat16")  # imports what a merge needs
    for module, size in ((reader_module, "ROW_BATCH_BYTES"), (tensorfile_module, "BUFFER_BYTES")):
        monkeypatch.setattr(module, size, 64 * 2**10)
    largest = []
    append = TensorFileWriter.append

    def watch(self, tensor):
        largest.append(tensor.numel() * tensor.element_size())
        append(self, tensor)

    monkeypatch.setattr(TensorFileWriter, "append", watch)
    tracemalloc.start()
    merge(folder, output_fname=tmp_path / "merged.ckpt", hf_output=tmp_path / "hf", dtype="bfloat16")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert max(largest) == 64 * 2**10
    assert peak < 2 * 2**20
    merged = load_file(tmp_path / "merged.ckpt")
    assert all(torch.equal(merged[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("asked", "named", "expected"),
    [(None, "float32", "float32"), (None, None, "bfloat16"), (None, "torch.bfloat16", "bfloat16"), ("float32", "bfloat16", "float32")],
)
def test_dtype_of_the_folder(tmp_path, asked, named, expected):
    _save(tmp_path / "run", "llama", dtype=named)
    report = merge(tmp_path / "run", hf_output=tmp_path / "hf", dtype=asked)
    assert report.dtype == expected
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == expected
    assert {str(t.dtype) for t in load_file(tmp_path / "hf" / "model.safetensors").values()} == {f"torch.{expected}"}


def test_tokenizer_and_generation_config_travel(tmp_path):
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "model.safetensors", "pytorch_model.bin", "evil.py"):
        (tokenizer / name).write_text(name)
    (tokenizer / "generation_config.json").write_text('{"temperature": 0.6}')
    model = _model("llama")
    config = _config(model) | {"eos_token_id": 5}
    for run, folder in (("with", tokenizer), ("without", None)):
        save_checkpoint(tmp_path / run, 1, _tensors(model, "llama"), {}, model_config=config, tokenizer_folder=folder)
        merge(tmp_path / run, hf_output=tmp_path / f"hf_{run}")
    names = {path.name for path in (tmp_path / "hf_with").iterdir()}
    assert names == {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert (tmp_path / "hf_with" / "tokenizer.json").read_text() == "tokenizer.json"
    assert json.loads((tmp_path / "hf_with" / "generation_config.json").read_text()) == {"temperature": 0.6}
    assert json.loads((tmp_path / "hf_without" / "generation_config.json").read_text())["eos_token_id"] == 5


# ---- which checkpoint is meant


def test_the_source_is_a_step_a_run_or_the_only_run(tmp_path, caplog):
    (tmp_path / "README.md").write_text("runs")
    _, first = _save(tmp_path / "a", "llama", step=1)
    _, second = _save(tmp_path / "a", "llama", step=2)
    assert resolve_source(first) == first
    assert resolve_source(tmp_path / "a") == second
    assert resolve_source(tmp_path) == second
    (second / "shard-00000.safetensors").unlink()
    assert resolve_source(tmp_path) == first
    assert "shard-00000.safetensors is missing" in caplog.text
    with pytest.raises(UserError, match="step-2 is damaged .shard-00000.safetensors is missing"):
        resolve_source(second)
    _save(tmp_path / "b", "llama", step=1)
    with pytest.raises(UserError, match=r"several runs \(a, b\)"):
        resolve_source(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no checkpoint"):
        resolve_source(tmp_path / "empty")
    with pytest.raises(UserError, match="is not a folder"):
        resolve_source(tmp_path / "none")


# ---- outputs


def test_outputs_are_checked_before_anything_is_read(tmp_path):
    with pytest.raises(UserError, match="nothing to write"):
        merge(tmp_path)
    (tmp_path / "file").write_text("notes")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes").write_text("mine")
    nothing = tmp_path / "none"
    for arguments, match in (
        ({"output_fname": tmp_path / "file"}, "not a merged checkpoint"),
        ({"output_fname": tmp_path / "folder"}, "is a folder"),
        ({"output_fname": tmp_path / "file" / "x"}, "cannot be written"),
        ({"output_fname": Path("/proc/nowhere/merged.ckpt")}, "cannot be written"),
        ({"hf_output": tmp_path / "file"}, "is a file"),
        ({"hf_output": tmp_path / "folder"}, "holds other files"),
        ({"hf_output": tmp_path / "file" / "x"}, "cannot be written"),
    ):
        with pytest.raises(UserError, match=match):
            merge(nothing, **arguments)
    assert (tmp_path / "file").read_text() == "notes"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_a_new_merge_replaces_an_old_one(tmp_path):
    _save(tmp_path / "a", "llama", seed=1)
    _save(tmp_path / "b", "llama", seed=2)
    for run in "ab":
        merge(
            tmp_path / run,
            output_fname=tmp_path / "m.ckpt",
            hf_output=tmp_path / "hf",
            dtype="float32",
            max_shard_bytes=10**9 if run == "b" else 9000,
        )
    expected = dict(_model("llama", 2).named_parameters())
    exported = load_file(tmp_path / "hf" / "model.safetensors")
    assert all(torch.equal(exported[name], tensor) for name, tensor in expected.items())
    assert not list((tmp_path / "hf").glob("model-*"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "hf", "m.ckpt"]
    (tmp_path / "hf" / "README.md").write_text("mine")
    with pytest.raises(UserError, match="holds other files"):
        merge(tmp_path / "a", hf_output=tmp_path / "hf")


def test_disk_space_is_checked(tmp_path, monkeypatch):
    _save(tmp_path / "run", "llama")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    for arguments in ({"output_fname": tmp_path / "m"}, {"hf_output": tmp_path / "hf"}):
        with pytest.raises(UserError, match="only 10 are free"):
            merge(tmp_path / "run", **arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_without_a_model_config_only_a_file_can_be_made(tmp_path):
    save_checkpoint(tmp_path / "run", 1, {"model.x": torch.ones(2)}, {})
    with pytest.raises(UserError, match="without the model's config.json"):
        merge(tmp_path / "run", hf_output=tmp_path / "hf", output_fname=tmp_path / "m")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    merge(tmp_path / "run", output_fname=tmp_path / "m")
    assert load_file(tmp_path / "m").keys() == {"model.x"}


# ---- Hugging Face folders that are not whole


def test_hf_reader_names_what_is_missing(tmp_path):
    with pytest.raises(UserError, match="has no weights that can be read"):
        HFReader(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(UserError, match="a pickle that is never loaded"):
        HFReader(tmp_path)
    save_file({"x": torch.ones(2)}, tmp_path / "model-00001-of-00002.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "model-00001-of-00002.safetensors", "y": "model-00002-of-00002.safetensors"}}))
    with pytest.raises(UserError, match="model-00002-of-00002.safetensors .* is missing"):
        HFReader(tmp_path)
    index.write_text(json.dumps({"weight_map": {"y": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(UserError, match="does not hold y"):
        HFReader(tmp_path)["y"]
    for bad in ("../secret.safetensors", "/etc/x", "sub/x", ""):
        index.write_text(json.dumps({"weight_map": {"x": bad}}))
        with pytest.raises(UserError, match="outside its folder"):
            HFReader(tmp_path)
    index.write_text("[]")
    with pytest.raises(UserError, match="is not an index"):
        HFReader(tmp_path)


def test_hf_folder_from_another_hf_folder(tmp_path):
    """A reader is a reader: what transformers saved goes through write_hf_folder unchanged."""
    model = _model("llama")
    model.save_pretrained(tmp_path / "a")
    reader = HFReader(tmp_path / "a")
    (tmp_path / "b").mkdir()
    write_hf_folder(tmp_path / "b", reader, {name: name for name in reader}, model.config.to_dict(), dtype="float32")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_step_reader_reads_batches(tmp_path, monkeypatch):
    _, folder = _save(tmp_path, "llama")
    monkeypatch.setattr(reader_module, "ROW_BATCH_BYTES", 100)
    reader = StepReader(open_step(folder))
    for name in reader:
        batches = list(reader.batches(name))
        whole = torch.cat(batches) if reader[name].shape else batches[0]
        assert torch.equal(whole, reader.read(name))
    reader.close()
