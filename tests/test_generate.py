"""A model continues a prompt: what transformers would write, the same for the same seed; mistakes in a sentence."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tiny_job import make_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from seqloom.data.tokenizer import train_tokenizer
from seqloom.errors import UserError
from seqloom.generate import Sampling, generate, load, run

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("merged")
    tokenizer = train_tokenizer([Dataset.from_dict({"text": ["def read(self):\n    return self.file"] * 20})], 280)
    make_model(folder, vocab_size=len(tokenizer))
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig.from_pretrained(folder)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_command_prints_prompt_and_continuation(model_folder):
    words = ["generate", "--model", str(model_folder), "--prompt", "def read", "--max_new_tokens", "8", "--temperature", "0"]
    done = subprocess.run([sys.executable, "-m", "seqloom", *words], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    model, tokenizer = load(model_folder)
    with torch.no_grad():
        ids = tokenizer("def read", return_tensors="pt")["input_ids"]
        for _ in range(8):
            ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), -1)
    assert done.stdout.strip() == tokenizer.decode(ids[0]).strip()


def test_the_same_seed_draws_the_same(model_folder):
    model, tokenizer = load(model_folder)
    texts = [generate(model, tokenizer, "def", Sampling(12, seed=seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("def")


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"max_new_tokens": 0}, "--max_new_tokens is 0"),
        ({"temperature": -1.0}, "--temperature is -1.0"),
        ({"top_k": -1}, "--top_k is -1"),
        ({"top_p": 0.0}, "--top_p is 0.0"),
    ],
)
def test_settings_that_cannot_be(given, part):
    with pytest.raises(UserError, match=part):
        Sampling(**{"max_new_tokens": 1, **given})


def test_folders_and_prompts_that_cannot_be(model_folder, tmp_path):
    with pytest.raises(UserError, match="holds no model for transformers: write one with `python ckpt_merger.py --hf_output"):
        run(tmp_path, "x", Sampling(1))
    make_model(tmp_path)
    with pytest.raises(UserError, match="transformers cannot load"):
        run(tmp_path, "x", Sampling(1))
    with pytest.raises(UserError, match="--prompt has no token"):
        run(model_folder, "", Sampling(1))
    with pytest.raises(UserError, match="has no chat template: leave --chat out"):
        run(model_folder, "x", Sampling(1), chat=True)


def test_the_model_is_the_folders(model_folder):
    assert isinstance(load(model_folder)[0], type(AutoModelForCausalLM.from_pretrained(model_folder)))
