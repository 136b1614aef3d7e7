"""The cache of captures: what it gives is what capture gives, whatever happened to its files."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import FAMILIES
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from seqloom.capture import Captured, capture, warm
from seqloom.capture.architecture import find_config
from seqloom.capture.cache import KEEP, Cache
from seqloom.capture.warm import ModelConfig, cached_capture, config_fields, read_config, registered_operators
from seqloom.emit.pipeline import CACHE, compile_program
from seqloom.emit.request import DEFAULT_LOSS, CompileRequest
from seqloom.errors import UserError

ROOT = Path(__file__).parents[1]
ASKED = {"batch_size": 1, "seq_len": 16, "dtype": torch.float32, "loss": DEFAULT_LOSS, "loss_chunk": 8}
KEY = {"model": "m", "seq_len": 3}


@pytest.fixture
def store(tmp_path) -> Cache:
    return Cache(tmp_path / "programs" / ".cache")


@pytest.fixture
def captures(monkeypatch) -> list[dict]:
    """The captures that were really made."""
    made: list[dict] = []

    def counted(config, **asked) -> Captured:
        made.append(asked)
        return capture(config, **asked)

    monkeypatch.setattr(warm, "capture", counted)
    return made


def model_config(family: str = "llama", **changes) -> ModelConfig:
    config = FAMILIES[family](1)
    for name, value in changes.items():
        setattr(config, name, value)
    return ModelConfig("unused", config_fields(config), config)


def files(store: Cache, kind: str = "capture") -> list[Path]:
    return sorted(store.folder.glob(f"{kind}-*"))


def warnings(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("seqloom.") and record.levelno >= logging.WARNING]


# --- the store -------------------------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None)
@given(key=st.dictionaries(st.text(max_size=3), JSON, max_size=3), content=JSON.filter(lambda content: content is not None))
def test_content_comes_back(key, content, tmp_path_factory):
    store = Cache(tmp_path_factory.mktemp("cache"))
    assert store.load("thing", key) is None
    store.save("thing", key, content)
    assert repr(store.load("thing", key)) == repr(content)
    assert store.load("other", key) is None and store.load("thing", {**key, "more": 1}) is None


def test_the_order_of_a_key_does_not_matter(store):
    store.save("thing", {"a": 1, "b": 2}, "content")
    assert store.load("thing", {"b": 2, "a": 1}) == "content"
    assert store.load("thing", {"a": 2, "b": 1}) is None


def test_no_byte_can_change_unnoticed(store, caplog):
    store.save("thing", KEY, {"shape": [1, 2.5], "name": "x"})
    path = store.path("thing", KEY)
    whole = path.read_bytes()
    for at in range(len(whole) - 1):  # the last one ends the line
        for bit in (1, 16, 128):
            damaged = bytearray(whole)
            damaged[at] ^= bit
            path.write_bytes(bytes(damaged))
            caplog.clear()
            found = store.load("thing", KEY)
            # White space that stays white space is the one change that changes nothing.
            assert (found is None and len(warnings(caplog)) == 1) or (found == {"shape": [1, 2.5], "name": "x"} and chr(whole[at]) == " ")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, '"x"', "{}", '{"key": {}, "content": 1}', '{"sha256": 1}'])
def test_other_documents_are_ignored_in_one_line_and_written_anew(store, caplog, text):
    store.save("thing", KEY, "content")
    store.path("thing", KEY).write_text(text)
    assert store.load("thing", KEY) is None
    (line,) = warnings(caplog)
    assert str(store.path("thing", KEY)) in line and "\n" not in line and "made anew" in line
    store.save("thing", KEY, "new")
    assert store.load("thing", KEY) == "new"


def test_a_file_under_the_name_of_another_is_not_believed(store, caplog):
    store.save("thing", KEY, "content")
    os.rename(store.path("thing", KEY), store.path("thing", {"model": "another"}))
    assert store.load("thing", {"model": "another"}) is None
    assert len(warnings(caplog)) == 1


def test_a_place_that_cannot_be_used_costs_a_line(store, caplog, tmp_path):
    store.path("thing", KEY).mkdir(parents=True)  # where the file should be
    assert store.load("thing", KEY) is None
    store.save("thing", KEY, "content")
    assert len(warnings(caplog)) == 2 and "is not kept" in warnings(caplog)[1]
    assert files(store, "thing") == [store.path("thing", KEY)]  # no part is left beside it
    (tmp_path / "file").write_text("")
    caplog.clear()
    Cache(tmp_path / "file").save("thing", KEY, "content")
    assert len(warnings(caplog)) == 1 and "File exists" in warnings(caplog)[0]


def test_the_files_used_last_are_kept(store):
    keys = [{"n": n} for n in range(KEEP + 4)]
    for at, key in enumerate(keys[:KEEP]):
        store.save("thing", key, at)
        os.utime(store.path("thing", key), (at, at))
    store.save("other", KEY, "another kind")
    os.utime(store.path("other", KEY), (0, 0))
    assert store.load("thing", keys[0]) == 0  # the oldest, used now
    for at, key in enumerate(keys[KEEP:], start=KEEP):
        store.save("thing", key, at)
    kept = [at for at, key in enumerate(keys) if store.load("thing", key) == at]
    assert kept == [0, *range(5, KEEP + 4)]
    assert store.load("other", KEY) == "another kind"


def test_what_a_killed_process_left_behind_goes_too(store):
    store.folder.mkdir(parents=True)
    part = store.folder / "thing-abc.json.12345"
    part.write_text("{")
    os.utime(part, (0, 0))
    for n in range(KEEP):
        store.save("thing", {"n": n}, n)
    assert not part.exists() and len(files(store, "thing")) == KEEP


# --- captures --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama_tied", "gpt2", "cohere"])
def test_a_second_capture_is_equal_and_not_made(store, captures, family, caplog):
    first = cached_capture(store, model_config(family), **ASKED)
    second = cached_capture(store, model_config(family), **ASKED)
    assert first == second == capture(FAMILIES[family](1), **ASKED)
    assert len(captures) == 1 and len(files(store)) == 1 and not warnings(caplog)


@pytest.mark.parametrize("change", [{"batch_size": 2}, {"seq_len": 32}, {"dtype": torch.bfloat16}, {"loss_chunk": 4}])
def test_every_argument_counts(store, captures, change):
    cached_capture(store, model_config(), **ASKED)
    changed = cached_capture(store, model_config(), **{**ASKED, **change})
    assert len(captures) == 2 and changed == capture(FAMILIES["llama"](1), **{**ASKED, **change})


@pytest.mark.parametrize("change", [{"rms_norm_eps": 1e-3}, {"num_hidden_layers": 2}, {"a_field_nobody_knows": 1}])
def test_every_setting_of_the_model_counts(store, captures, change):
    cached_capture(store, model_config(), **ASKED)
    cached_capture(store, model_config(**change), **ASKED)
    assert len(captures) == 2


def test_where_the_config_lay_does_not_count(store, captures, tmp_path):
    for name in ("a", "b"):
        FAMILIES["llama"](1).save_pretrained(tmp_path / name)
        cached_capture(store, read_config(str(tmp_path / name), store), **ASKED)
    assert len(captures) == 1


@pytest.mark.parametrize("package", ["torch", "transformers", "python"])
def test_another_version_captures_anew(store, captures, monkeypatch, package):
    cached_capture(store, model_config(), **ASKED)
    if package == "torch":
        monkeypatch.setattr(torch, "__version__", "99.0")
    elif package == "transformers":
        monkeypatch.setattr(warm, "version", lambda name: "99.0")
    else:
        monkeypatch.setattr(warm.platform, "python_version", lambda: "3.99.0")
    cached_capture(store, model_config(), **ASKED)
    assert len(captures) == 2


def test_other_sources_capture_anew(store, captures, monkeypatch):
    cached_capture(store, model_config(), **ASKED)
    monkeypatch.setattr(warm, "_source_digest", lambda: "another")
    cached_capture(store, model_config(), **ASKED)
    assert len(captures) == 2


def test_the_digest_of_the_sources_sees_every_file(tmp_path, monkeypatch):
    digest = warm._source_digest.__wrapped__
    names = ["graph.py", "annotation.py", "grammar.py", "capture/head.py", "ops/rules.py"]
    assert all((warm.PACKAGE / name).is_file() for name in names)
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    monkeypatch.setattr(warm, "PACKAGE", tmp_path)
    seen = [digest()]
    for name in names:
        (tmp_path / name).write_text("x = 2\n")
        seen.append(digest())
    (tmp_path / "ops" / "more.py").write_text("")
    seen.append(digest())
    os.rename(tmp_path / "ops" / "more.py", tmp_path / "ops" / "other.py")
    seen.append(digest())
    (tmp_path / "plan").mkdir()
    (tmp_path / "plan" / "solver.py").write_text("the planner does not capture")
    assert len(set(seen)) == len(seen) and digest() == seen[-1]


def test_another_source_of_an_operator_captures_anew(store, captures, tmp_path, monkeypatch):
    source = (ROOT / "chunk_linear_cross_entropy.py").read_text()
    monkeypatch.syspath_prepend(tmp_path)
    asked = {**ASKED, "loss": "cached_loss:chunk_linear_cross_entropy"}
    for at, text in enumerate((source, source, source + "\n# another version\n")):
        (tmp_path / "cached_loss.py").write_text(text)
        sys.modules.pop("cached_loss", None)
        captured = cached_capture(store, model_config(), **asked)
        assert "cached_loss:chunk_linear_cross_entropy" in registered_operators(captured.graph)
        assert len(captures) == (1, 1, 2)[at]
    (tmp_path / "cached_loss.py").unlink()
    sys.modules.pop("cached_loss")
    with pytest.raises(UserError, match="there is no module cached_loss"):
        cached_capture(store, model_config(), **asked)


def test_a_damaged_capture_is_made_anew(store, captures, caplog):
    first = cached_capture(store, model_config(), **ASKED)
    (path,) = files(store)
    whole = path.read_text()
    path.write_text(whole.replace('"shape": [1, 16', '"shape": [1, 17', 1))
    assert cached_capture(store, model_config(), **ASKED) == first
    assert len(captures) == 2 and len(warnings(caplog)) == 1
    assert path.read_text() == whole


@pytest.mark.parametrize("content", [{}, [], {"operators": {}, "captured": {}}, "x", {"operators": {}, "captured": {"graph": {"name": 1}}}])
def test_a_well_formed_file_of_something_else_is_made_anew(store, captures, caplog, content):
    first = cached_capture(store, model_config(), **ASKED)
    (path,) = files(store)
    store.save("capture", json.loads(path.read_text())["key"], content)
    assert cached_capture(store, model_config(), **ASKED) == first
    assert len(captures) == 2 and len(warnings(caplog)) == 1


def test_a_graph_that_contradicts_itself_is_made_anew(store, captures, caplog):
    first = cached_capture(store, model_config(), **ASKED)
    (path,) = files(store)
    document = json.loads(path.read_text())
    document["content"]["captured"]["graph"]["nodes"].reverse()
    store.save("capture", document["key"], document["content"])
    assert cached_capture(store, model_config(), **ASKED) == first
    assert len(captures) == 2 and "before its definition" in warnings(caplog)[0]


def test_a_graph_that_json_cannot_hold_is_not_kept(store, monkeypatch, caplog):
    captured = capture(FAMILIES["llama"](1), **ASKED)
    first, *rest = captured.graph.nodes
    odd = dataclasses.replace(captured, graph=captured.graph.replace(nodes=(dataclasses.replace(first, kwargs=(("z", 1j),)), *rest)))
    monkeypatch.setattr(warm, "capture", lambda config, **asked: odd)
    assert cached_capture(store, model_config(), **ASKED) is odd
    assert not files(store) and "complex" in warnings(caplog)[0]


class OwnConfig(LlamaConfig):
    """A user's config: its model's code is the user's, and changes without a version."""


class OwnLlama(LlamaForCausalLM):
    """A user's model for the config of a known one."""


def test_models_with_code_of_their_own_are_never_kept(store, monkeypatch):
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    made = []
    monkeypatch.setattr(warm, "capture", lambda config, **asked: made.append(config))
    config = OwnConfig(num_hidden_layers=1)
    cached_capture(store, ModelConfig("own", config_fields(config), config), **ASKED)
    AutoModelForCausalLM.register(LlamaConfig, OwnLlama, exist_ok=True)
    try:
        cached_capture(store, model_config(), **ASKED)
    finally:
        del MODEL_FOR_CAUSAL_LM_MAPPING._extra_content[LlamaConfig]
    assert len(made) == 2 and not store.folder.exists()


# --- configs ---------------------------------------------------------------------------------------------------------------------


def test_written_fields_are_those_that_decide_alone(tmp_path):
    assert find_config("llama3_8b").written()["hidden_size"] == 4096
    FAMILIES["llama"](1).save_pretrained(tmp_path)
    found = find_config(str(tmp_path))
    assert found.written()["model_type"] == "llama" and not found.published
    for text in ("{", "[]", '{"hidden_size": 3}', '{"model_type": "llama", "auto_map": {}}'):
        (tmp_path / "config.json").write_text(text)
        assert found.written() is None
    (tmp_path / "config.json").unlink()
    assert found.written() is None


def test_fields_hold_the_whole_model_and_nothing_else():
    config = FAMILIES["gemma3"](2)
    fields = config_fields(config)
    assert fields["layer_types"] == config.layer_types and fields["model_type"] == "gemma3_text"
    assert not {"_name_or_path", "transformers_version"} & fields.keys()
    assert json.loads(json.dumps(fields)) == fields
    assert ModelConfig("x", fields, config).to_dict() == fields


def test_a_config_without_its_object_resolves_it():
    config = ModelConfig("llama3_8b", {}, None).resolve()
    assert config.hidden_size == 4096
    assert ModelConfig("llama3_8b", {}, config).resolve() is config


# --- compiles --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_program_is_the_same_with_and_without_the_cache(family, tmp_path, captures):
    FAMILIES[family](2).save_pretrained(tmp_path / "model")
    request = CompileRequest(
        str(tmp_path / "model"), 32, 2, 2, precision="fp32", hardware="cpu", force="sp2", output_folder=tmp_path / "programs"
    )
    first = compile_program(request)
    written = {path.name: path.read_bytes() for path in first.folder.iterdir()}
    second = compile_program(dataclasses.replace(request, name="again"))
    assert len(captures) == 1 and len(files(Cache(request.output_folder / CACHE))) == 1
    for name in ("program.py", "fingerprint.json"):
        assert (second.folder / name).read_bytes() == written[name]
    assert {**first.plan, "timings": 0, "solver": 0} == {**second.plan, "timings": 0, "solver": 0}
    compile_program(dataclasses.replace(request, force="tp2", zero=3))
    compile_program(dataclasses.replace(request, seq_len=64))
    assert len(captures) == 2


COMPILE = """
import json, sys
from pathlib import Path
from seqloom.emit.pipeline import compile_program
from seqloom.emit.request import CompileRequest
compile_program(CompileRequest("model", 32, 2, 2, name=sys.argv[1], precision="fp32", hardware="cpu", force="sp2",
    output_folder=Path("programs")))
print(json.dumps([name in sys.modules for name in ("transformers", "torch._dynamo")]))
"""


def compiled(folder: Path, name: str) -> tuple[list[bool], dict[str, bytes], str]:
    """A compile in a process of its own: whether it imported transformers and the compiler of PyTorch, what it wrote, what it said."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", COMPILE, name], cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    written = {path.name: path.read_bytes() for path in (folder / "programs" / name).iterdir()}
    return json.loads(result.stdout), written, result.stderr


def test_the_next_process_needs_no_transformers_and_writes_the_same(tmp_path):
    FAMILIES["llama"](1).save_pretrained(tmp_path / "model")
    cold = compiled(tmp_path, "cold")
    warm_ = compiled(tmp_path, "warm")
    assert cold[0] == [True, True] and warm_[0] == [False, False]
    for name in ("program.py", "fingerprint.json"):
        assert cold[1][name] == warm_[1][name]
    (config,) = files(Cache(tmp_path / "programs" / ".cache"), "config")
    config.write_text("{")
    damaged = compiled(tmp_path, "damaged")
    assert damaged[0][0] and "the cached config" in damaged[2]
    assert damaged[1]["program.py"] == cold[1]["program.py"]


# --- the model's code ---------------------------------------------------------------------------------------------------------------------


def test_a_function_that_was_replaced_is_noticed_by_cache_and_fingerprint(store, captures, monkeypatch):
    """`LlamaMLP.forward = ...` changes the model, though its config and every version are the same."""
    from transformers.models.llama import modeling_llama

    from seqloom.capture.model_source import model_source_digest

    before = cached_capture(store, model_config(), **ASKED)
    digest = model_source_digest("llama")

    def forward(self, x):
        return self.down_proj(self.up_proj(x))

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", forward)
    assert model_source_digest("llama") != digest
    after = cached_capture(store, model_config(), **ASKED)
    assert len(captures) == 2
    assert len(all_operators(after)) < len(all_operators(before)), "the gate is gone"
    monkeypatch.undo()
    assert model_source_digest("llama") == digest


def all_operators(captured: Captured) -> list[str]:
    """Every operator of a capture."""
    return [node.op for graph in (captured.graph, *captured.graph.blocks.values()) for node in graph.nodes]


def test_an_edited_file_of_transformers_is_noticed(monkeypatch, tmp_path):
    from seqloom.capture import model_source

    (tmp_path / "models/made_up").mkdir(parents=True)
    file = tmp_path / "models/made_up/modeling_made_up.py"
    digests = []
    monkeypatch.setattr(model_source, "_package", lambda: tmp_path)
    for text in ("x = 1", "x = 2", "x = 1"):
        file.write_text(text)
        model_source._files_digest.cache_clear()
        digests.append(model_source.model_source_digest("made-up"))
    model_source._files_digest.cache_clear()
    assert digests[0] == digests[2] != digests[1]
