"""The proof of a compiled program: parity on a small model of its structure."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from models import FAMILIES

from seqloom.emit.pipeline import compile_program
from seqloom.emit.request import CompileRequest
from seqloom.errors import UserError
from seqloom.runtime import verify
from seqloom.runtime.shrink import shrink


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("programs")
    FAMILIES["llama"](2).save_pretrained(place / "model")
    asked = CompileRequest(
        str(place / "model"), 64, 2, 2, "tiny", hardware="cpu", precision="fp32", force="sp2", zero=3, output_folder=place
    )
    return compile_program(asked).folder


def test_verify_passes_and_says_so(folder, capsys):
    assert verify.run(folder) == 0
    assert "parity: passed" in capsys.readouterr().out


def test_verify_fails_loudly_when_the_program_is_wrong(folder, capsys, monkeypatch):
    wrong = verify.program_source
    monkeypatch.setattr(
        verify,
        "program_source",
        lambda *args: (
            wrong(*args).replace("LOSS_PARTIAL = ('sp',)", "LOSS_PARTIAL = ()").replace('("sp",)  # axes over', "()  # axes over")
        ),
    )
    assert verify.run(folder) == 1
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize("attention", ["heads", "gather"])
def test_a_plan_of_many_ranks_is_laid_over_a_small_mesh(tmp_path, capsys, attention):
    """A mesh of 4 x 4 ranks, proved on 2 x 2; by heads it splits the query heads of each of four key/value heads."""
    config = FAMILIES["llama"](2)
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 16, 4, 8
    config.save_pretrained(tmp_path / "model")
    flags = {"hardware": "cpu", "precision": "fp32", "force": "sp4,sp4", "zero": 3, "attention": attention}
    folder = compile_program(CompileRequest(str(tmp_path / "model"), 128, 16, 16, "wide", output_folder=tmp_path, **flags)).folder
    assert verify.run(folder, ranks_per_axis=2) == 0
    assert "parity: passed" in capsys.readouterr().out
    with pytest.raises(UserError, match="--ranks_per_axis 1 leaves nothing"):
        verify.run(folder, ranks_per_axis=1)


def test_a_process_that_the_system_ends_is_one_sentence(folder, monkeypatch):
    monkeypatch.setattr(verify, "_rank", _killed)
    with pytest.raises(UserError, match=r"process \d of 2 was ended from outside \(SIGKILL\).*--ranks_per_axis 2"):
        verify.verify(folder)


def _killed(rank, *_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_verify_without_a_program(tmp_path):
    with pytest.raises(UserError, match="compile it first"):
        verify.verify(tmp_path)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gemma2"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_small_models_keep_the_structure(family, ranks):
    config = FAMILIES[family](6)
    small = shrink(config, ranks)
    assert small.num_attention_heads == config.num_attention_heads
    assert small.num_hidden_layers == 4
    assert small.hidden_size % small.num_attention_heads == 0 or getattr(small, "head_dim", None)
    for size in (small.hidden_size, getattr(small, "intermediate_size", ranks), small.vocab_size - 64):
        assert size % ranks == 0
