"""create_mini_model.py: the same architecture, smaller; the original's first layers where its weights are at hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen3Config

import create_mini_model as script
from seqloom.capture.architecture import resolve_config
from seqloom.capture.mini_model import Sizes, create_mini_model, shrink
from seqloom.data.prepare import prepare
from seqloom.errors import UserError

TINY = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96, "num_hidden_layers": 6}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def original(kind: str, folder: Path) -> Path:
    """A six-layer model with weights, saved in several shards."""
    config = {
        "llama": lambda: LlamaConfig(**TINY, intermediate_size=128, eos_token_id=90),
        "tied": lambda: LlamaConfig(**TINY, intermediate_size=128, tie_word_embeddings=True),
        "qwen3": lambda: Qwen3Config(**TINY, intermediate_size=128, head_dim=32),
        "gpt2": lambda: GPT2Config(n_embd=64, n_head=4, n_layer=6, vocab_size=96, n_positions=32, bos_token_id=90, eos_token_id=90),
    }[kind]()
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size="100KB")
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return original("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A data set of bookcorpus.py with a vocabulary of 300."""
    path = tmp_path_factory.mktemp("data") / "set"
    prepare("stdlib", "train:300", str(path), 64, max_documents=5)
    return path


def state(folder):
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    return model.state_dict()


@pytest.mark.parametrize("kind", ["llama", "tied", "qwen3", "gpt2"])
def test_first_layers_keep_the_weights(kind, tmp_path):
    source = original(kind, tmp_path / "original")
    assert (source / "model.safetensors.index.json").is_file()
    made = create_mini_model(str(source), str(tmp_path / "mini"), Sizes(num_layers=2))
    whole, mini = state(source), state(tmp_path / "mini")
    assert 0 < len(mini) < len(whole)
    for name, tensor in mini.items():
        assert torch.equal(tensor, whole[name]), name
    assert f"the weights of {source}, its first 2 layers" in made.origin
    assert AutoConfig.from_pretrained(tmp_path / "mini").num_hidden_layers == 2


def test_base_model_weights_of_gpt2_are_found(tmp_path):
    """The published GPT-2 is saved without the `transformer.` prefix."""
    source = original("gpt2", tmp_path / "full")
    AutoModelForCausalLM.from_pretrained(source).transformer.save_pretrained(tmp_path / "base")
    create_mini_model(str(tmp_path / "base"), str(tmp_path / "mini"), Sizes(num_layers=3))
    whole = state(source)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in state(tmp_path / "mini").items())


def test_weights_are_read_one_tensor_at_a_time(llama, tmp_path, monkeypatch):
    import safetensors

    opened = []
    original_open = safetensors.safe_open

    class Watched:
        def __init__(self, *args, **kwargs):
            self.file = original_open(*args, **kwargs)

        def get_slice(self, key):
            return self.file.get_slice(key)

        def get_tensor(self, key):
            opened.append(key)
            return self.file.get_tensor(key)

    monkeypatch.setattr(safetensors, "safe_open", Watched)
    create_mini_model(str(llama), str(tmp_path / "mini"), Sizes(num_layers=1))
    assert len(opened) == len(set(opened)) == 12 and not any(".layers.1." in key for key in opened)


def test_random_values_without_weights_are_those_of_the_seed(llama, tmp_path):
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_text((llama / "config.json").read_text())
    before = torch.random.get_rng_state()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        made = create_mini_model(str(tmp_path / "config"), str(tmp_path / name), Sizes(num_layers=2), seed=seed)
        assert f"random values, as the model draws them (seed {seed})" in made.origin
    assert torch.equal(torch.random.get_rng_state(), before)
    a, b, c = (state(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["model.embed_tokens.weight"], c["model.embed_tokens.weight"])
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(shrink(resolve_config(str(llama)), Sizes(num_layers=2))).state_dict()
    assert all(torch.equal(a[name], theirs[name]) for name in a)


@pytest.mark.parametrize(
    "sizes", [Sizes(2, hidden_size=32), Sizes(2, num_attention_heads=2), Sizes(2, intermediate_size=32), Sizes(2, vocab_size=64)]
)
def test_other_widths_start_from_random_values_and_say_so(llama, tmp_path, sizes):
    made = create_mini_model(str(llama), str(tmp_path / "mini"), sizes)
    assert "random values" in made.origin and f"the weights of {llama} do not fit another" in made.origin
    state(tmp_path / "mini")


def test_defaults_are_four_layers_of_the_same_widths():
    mini, whole = shrink(resolve_config("llama3_8b"), Sizes()), resolve_config("llama3_8b")
    assert mini.num_hidden_layers == 4
    fields, theirs = mini.to_dict(), whole.to_dict()
    assert {name for name in theirs if fields[name] != theirs[name]} == {"num_hidden_layers"}


def test_widths_follow_the_hidden_size():
    mini = shrink(resolve_config("llama3_8b"), Sizes(hidden_size=256, num_attention_heads=8))
    assert (mini.intermediate_size, mini.num_key_value_heads, mini.head_dim) == (896, 2, 32)
    mini = shrink(resolve_config("qwen3_0_6b"), Sizes(hidden_size=128, num_attention_heads=4))
    assert (mini.intermediate_size, mini.num_key_value_heads, mini.head_dim) == (384, 2, 64)
    assert mini.layer_types == ["full_attention"] * 4
    mini = shrink(resolve_config("gpt2"), Sizes(hidden_size=64, num_attention_heads=4, max_position_embeddings=128))
    assert (mini.n_embd, mini.n_head, mini.n_layer, mini.n_positions) == (64, 4, 4, 128)


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(["llama3_8b", "llama3_1b", "qwen3_0_6b", "mistral_7b"]),
    layers=st.integers(1, 5),
    heads=st.sampled_from([1, 2, 4, 8, 16]),
    width=st.sampled_from([2, 8, 32]),
    vocab=st.sampled_from([16, 300]),
)
def test_any_shrunken_config_makes_a_consistent_model(name, layers, heads, width, vocab):
    whole = resolve_config(name)
    config = shrink(whole, Sizes(layers, hidden_size=heads * width, num_attention_heads=heads, vocab_size=vocab))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    attention = model.model.layers[-1].self_attn
    assert len(model.model.layers) == layers and model.get_input_embeddings().weight.shape == (vocab, heads * width)
    assert attention.q_proj.weight.shape == (heads * config.head_dim, heads * width)
    assert attention.k_proj.weight.shape == (config.num_key_value_heads * config.head_dim, heads * width)
    assert heads % config.num_key_value_heads == 0
    assert config.head_dim * heads * whole.hidden_size == whole.head_dim * whole.num_attention_heads * heads * width
    assert all(getattr(config, token) is None for token in ("bos_token_id", "eos_token_id") if getattr(whole, token) >= vocab)


def test_original_config_is_left_alone():
    whole = resolve_config("qwen3_0_6b")
    before = whole.to_dict()
    shrink(whole, Sizes(2, hidden_size=64, num_attention_heads=2))
    assert whole.to_dict() == before


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("llama3_8b", Sizes(num_layers=0), "--num_layers is 0"),
        ("llama3_8b", Sizes(num_layers=33), "the model has 32 layers"),
        ("llama3_8b", Sizes(hidden_size=100, num_attention_heads=8), "give no even head size"),
        ("llama3_8b", Sizes(hidden_size=24, num_attention_heads=8), "give no even head size"),
        ("llama3_8b", Sizes(num_key_value_heads=5), "32 heads do not share 5 key/value heads"),
        ("llama3_8b", Sizes(vocab_size=-1), "--vocab_size is -1"),
        ("gpt2", Sizes(num_key_value_heads=2), "gpt2 config has no num_key_value_heads"),
        ("gpt2", Sizes(intermediate_size=2), "gpt2 config has no intermediate_size"),
    ],
)
def test_sizes_that_do_not_fit(name, sizes, message):
    with pytest.raises(UserError, match=message):
        shrink(resolve_config(name), sizes)


SMALL = Sizes(2, hidden_size=32, num_attention_heads=2, num_key_value_heads=1)


def test_data_set_gives_vocabulary_and_tokenizer(packed, tmp_path):
    from transformers import AutoTokenizer

    create_mini_model("llama3_8b", str(tmp_path / "mini"), SMALL, dataset_path=str(packed))
    config = AutoConfig.from_pretrained(tmp_path / "mini")
    mine, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "mini", packed / "tokenizer"))
    assert config.vocab_size == 300 == len(mine)
    assert (config.eos_token_id, config.bos_token_id, config.pad_token_id) == (0, 0, None)
    assert mine.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    text = "def f(x):\n    return x  # naïve 漢字"
    assert mine(text)["input_ids"] == theirs(text)["input_ids"] and mine.decode(mine(text)["input_ids"]) == text


def test_end_of_text_embedding_is_trained(packed, tmp_path):
    """A pad_token_id equal to the end of text would freeze its embedding."""
    create_mini_model("llama3_8b", str(tmp_path / "mini"), SMALL, tokenizer=str(packed / "tokenizer"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "mini", dtype=torch.float32)
    ids = torch.tensor([[0, 5, 6, 7]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.get_input_embeddings().weight.grad[0].abs().sum() > 0


def test_mini_model_generates(packed, tmp_path):
    create_mini_model("qwen3_0_6b", str(tmp_path / "mini"), SMALL, dataset_path=str(packed))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "mini")
    assert model.generate(torch.tensor([[5, 6]]), max_new_tokens=3, do_sample=False).shape[1] in (3, 4, 5)
    assert (tmp_path / "mini" / "generation_config.json").is_file()


def test_vocabulary_grows_shrinks_or_stays(llama, packed, tmp_path):
    create_mini_model("llama3_8b", str(tmp_path / "given"), Sizes(1, 32, None, 2, 1, vocab_size=512), dataset_path=str(packed))
    assert AutoConfig.from_pretrained(tmp_path / "given").vocab_size == 512
    with pytest.raises(UserError, match="--vocab_size is 200, but the tokenizer has 300"):
        create_mini_model("llama3_8b", str(tmp_path / "small"), Sizes(1, 32, None, 2, 1, vocab_size=200), dataset_path=str(packed))
    made = create_mini_model(str(llama), str(tmp_path / "grown"), Sizes(1), dataset_path=str(packed))  # 96 tokens are too few
    assert AutoConfig.from_pretrained(tmp_path / "grown").vocab_size == 300 and "do not fit another vocab_size" in made.origin
    big = tmp_path / "big"
    AutoModelForCausalLM.from_config(LlamaConfig(**{**TINY, "vocab_size": 400}, intermediate_size=128)).save_pretrained(big)
    made = create_mini_model(str(big), str(tmp_path / "kept"), Sizes(1), dataset_path=str(packed))
    assert AutoConfig.from_pretrained(tmp_path / "kept").vocab_size == 400 and "its first 1 layers" in made.origin


def test_one_tokenizer_only(packed, tmp_path):
    with pytest.raises(UserError, match="give one of them"):
        create_mini_model("llama3_8b", str(tmp_path / "m"), SMALL, tokenizer="x", dataset_path=str(packed))


def test_missing_shard_and_missing_tensor(llama, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in llama.iterdir():
        os.link(file, broken / file.name)
    index = json.loads((broken / "model.safetensors.index.json").read_text())
    gone = index["weight_map"]["model.norm.weight"]
    (broken / gone).unlink()
    with pytest.raises(UserError, match=f"not complete: {gone} is missing"):
        create_mini_model(str(broken), str(tmp_path / "mini"), Sizes(2))
    del index["weight_map"]["model.norm.weight"]
    index["weight_map"] = {key: file for key, file in index["weight_map"].items() if file != gone}
    (broken / "model.safetensors.index.json").unlink()
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="have no "):
        create_mini_model(str(broken), str(tmp_path / "mini"), Sizes(6))
    assert not (tmp_path / "mini").exists()


def test_weights_that_contradict_the_config(llama, tmp_path):
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    for file in llama.glob("model*"):
        os.link(file, wrong / file.name)
    config = resolve_config(str(llama))
    config.vocab_size = 100
    config.save_pretrained(wrong)
    with pytest.raises(UserError, match=r"embed_tokens.weight is \[96, 64\] in .* \[100, 64\] by the config"):
        create_mini_model(str(wrong), str(tmp_path / "mini"), Sizes(2))


def test_output_folder_is_guarded(llama, tmp_path):
    target = str(tmp_path / "mini")
    create_mini_model(str(llama), target, Sizes(1))
    with pytest.raises(UserError, match="--overwrite"):
        create_mini_model(str(llama), target, Sizes(2))
    create_mini_model(str(llama), target, Sizes(2), overwrite=True)
    assert AutoConfig.from_pretrained(target).num_hidden_layers == 2
    with pytest.raises(UserError, match="the folder of the original"):
        create_mini_model(str(llama), str(llama), Sizes(1), overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"):
        create_mini_model(str(llama), str(tmp_path / "file" / "mini"), Sizes(1))


def test_no_language_model(packed, tmp_path):
    from transformers import ViTConfig

    ViTConfig().save_pretrained(tmp_path / "vit")
    with pytest.raises(UserError, match="a vit config is not that of a plain language model"):
        create_mini_model(str(tmp_path / "vit"), str(tmp_path / "mini"), Sizes(1), tokenizer=str(packed / "tokenizer"))


def test_command_line(llama, tmp_path, monkeypatch, capsys):
    def call(*flags):
        monkeypatch.setattr(sys, "argv", ["create_mini_model.py", *map(str, flags)])
        with pytest.raises(SystemExit) as stop:
            script.run(script.main)
        return stop.value.code

    assert call("--model_id", llama, "--output-id", tmp_path / "mini", "--num-layers", 3, "--seed=4") == 0
    printed = capsys.readouterr().out
    assert f"{tmp_path / 'mini'}: " in printed and "its first 3 layers" in printed
    assert sum(tensor.numel() for tensor in state(tmp_path / "mini").values()) == int(printed.split(": ")[1].split()[0].replace(",", ""))
    assert call("--model_id", tmp_path, "--output_id", tmp_path / "other") == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: the model folder")


def test_help_is_quick_and_needs_no_torch():
    path = Path(script.__file__)
    code = f"import sys, runpy; sys.argv = ['x', '--help']\ntry: runpy.run_path({str(path)!r}, run_name='__main__')\n"
    code += "finally: print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=path.parent)
    assert done.returncode == 0 and done.stdout.strip().endswith("[]")
