"""Model ids: names in configs/models with exact sizes, folders, hub ids without a network, and what goes wrong."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from seqloom.capture import architecture
from seqloom.capture.architecture import architecture_names, has_weights, resolve_config, weights_folder
from seqloom.errors import UserError

PARAMETERS = {
    "gpt2": 124_439_808,
    "llama3_1b": 1_235_814_400,
    "llama3_3b": 3_212_749_824,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama3_405b": 405_853_388_800,
    "mistral_7b": 7_248_023_552,
    "qwen3_0_6b": 596_049_920,
    "qwen3_8b": 8_190_735_360,
}


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """The hub does not answer and nothing is cached."""
    import transformers.utils.hub
    from huggingface_hub import constants, file_download

    for module in (constants, file_download, transformers.utils.hub):
        for name in ("HF_HUB_CACHE", "TRANSFORMERS_CACHE"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, str(tmp_path / "hub"))
    monkeypatch.setattr("seqloom.data.hub.hub_reachable", lambda: False)


def tiny_config() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=64
    )


def test_every_architecture_is_counted():
    assert set(architecture_names()) == set(PARAMETERS)


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_parameter_counts_are_the_published_ones(name):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(resolve_config(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]
    assert type(model).__name__ == resolve_config(name).architectures[0]


def test_llama3_8b_is_the_published_config():
    config = resolve_config("llama3_8b")
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (32, 4096, 14336)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.vocab_size) == (32, 8, 128, 128256)
    assert config.rope_parameters["rope_theta"] == 500000.0 and not config.tie_word_embeddings and config.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["llama3_1b", "llama3_3b", "qwen3_0_6b", "gpt2"])
def test_small_models_tie_their_embeddings(name):
    assert resolve_config(name).tie_word_embeddings


def test_resolving_twice_gives_equal_and_independent_configs():
    first = resolve_config("qwen3_8b")
    first.num_hidden_layers = 1
    assert resolve_config("qwen3_8b").num_hidden_layers == 36


def test_names_work_from_any_folder(tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "__init__.py").write_text("")  # a stranger's package of the same name does not matter
    code = "from seqloom.capture.architecture import resolve_config; print(resolve_config('llama3_8b').hidden_size)"
    root = str(Path(architecture.__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "4096", done.stderr


def test_known_hub_id_needs_no_network_and_says_so(no_network, caplog):
    with caplog.at_level(logging.WARNING):
        config = resolve_config("meta-llama/Meta-Llama-3-8B-Instruct")
    assert config.hidden_size == 4096 and config.eos_token_id == 128009
    assert "configs/models/llama3_8b.json" in caplog.text


def test_hub_ids_keep_the_fields_in_which_they_differ(no_network):
    old, new = resolve_config("meta-llama/Meta-Llama-3-8B"), resolve_config("meta-llama/Llama-3.1-8B")
    assert (old.max_position_embeddings, new.max_position_embeddings) == (8192, 131072)
    assert old.rope_parameters["rope_type"] == "default"
    assert new.rope_parameters["rope_type"] == "llama3" and new.rope_parameters["factor"] == 8.0
    assert old.eos_token_id == 128001


def test_every_hub_id_belongs_to_one_architecture(no_network):
    ids = [hub_id for name in architecture_names() for hub_id in json.loads(architecture._architectures()[name])["_hub_ids"]]
    assert len(ids) == len(set(ids))
    for hub_id in ids:
        config = resolve_config(hub_id)
        assert not hasattr(config, "_hub_ids"), hub_id


def test_a_cached_hub_id_is_read_from_the_cache(no_network, tmp_path):
    snapshot = tmp_path / "hub" / "models--some--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    tiny_config().save_pretrained(snapshot)
    refs = tmp_path / "hub" / "models--some--model" / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    assert resolve_config("some/model").hidden_size == 32
    assert not has_weights("some/model")


def test_unknown_hub_id_without_network_names_what_there_is(no_network):
    with pytest.raises(UserError, match=r"nobody/llama3-9b.*local folder.*llama3_8b"):
        resolve_config("nobody/llama3-9b")


def test_unknown_name_lists_the_nearest():
    with pytest.raises(UserError, match="llama3_80b.*nearest: .*llama3_8b"):
        resolve_config("llama3_80b")
    with pytest.raises(UserError, match="there are gpt2, llama3_1b"):
        resolve_config("zzzzzz")


@pytest.mark.parametrize("model_id", ["./nowhere", "/nowhere/at/all", "a/b/c", "~/nowhere/model"])
def test_missing_folders_are_no_hub_ids(model_id):
    with pytest.raises(UserError, match="neither a folder nor a name"):
        resolve_config(model_id)


def test_local_folder(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    assert resolve_config(str(tmp_path)).hidden_size == 32


def test_local_folder_needs_no_datasets(tmp_path, monkeypatch):
    resolve_config("llama3_1b").save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert resolve_config(str(tmp_path)).hidden_size == 2048


def test_local_folder_wins_over_a_name(tmp_path, monkeypatch):
    tiny_config().save_pretrained(tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    assert resolve_config("gpt2").model_type == "llama"


def test_folder_without_config(tmp_path):
    with pytest.raises(UserError, match=r"has no config\.json"):
        resolve_config(str(tmp_path))


@pytest.mark.parametrize("text", ["{not json", '{"model_type": "no-such-model"}', "[]", '{"hidden_size": 3}'])
def test_damaged_config(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=str(tmp_path)):
        resolve_config(str(tmp_path))


def test_code_of_a_model_folder_never_runs(tmp_path):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass EvilConfig: pass\n")
    (tmp_path / "config.json").write_text('{"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig"}}')
    with pytest.raises(UserError, match="does not describe a model"):
        resolve_config(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_has_weights(tmp_path):
    AutoModelForCausalLM.from_config(tiny_config()).save_pretrained(tmp_path / "model")
    assert has_weights(str(tmp_path / "model")) and weights_folder(str(tmp_path / "model")) == tmp_path / "model"
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "other.bin")
    assert not has_weights(str(tmp_path / "model"))
    (tmp_path / "model" / "model.safetensors.index.json").write_text("{}")
    assert has_weights(str(tmp_path / "model"))
    assert not has_weights("llama3_8b") and not has_weights(str(tmp_path / "nowhere"))


def test_weights_of_a_cached_hub_id(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repo, name: str(tmp_path / name) if "index" not in name else None)
    assert weights_folder("some/model") == tmp_path
