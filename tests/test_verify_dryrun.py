"""The two proofs of a compiled program: parity on a small model, and a dry run at full size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import FAMILIES

from seqloom.emit.pipeline import compile_program
from seqloom.emit.request import CompileRequest
from seqloom.errors import UserError
from seqloom.runtime import dryrun, verify
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


def test_dry_run_of_every_rank(folder, capsys):
    assert dryrun.run(folder) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and [line.split()[0] for line in lines[1:]] == ["0", "1"]


def test_dry_run_counts_what_stays_between_steps(folder):
    """Between steps a rank holds its half of the fp32 weights and of Adam's two moments, and little else."""
    result = dryrun.dry_run(folder, 0)
    numel = sum(p.numel() for p in _model(folder).parameters())
    assert result.standing_bytes == pytest.approx(12 * numel / 2, rel=0.02)
    assert result.peak_bytes > result.standing_bytes
    assert result.flops > 0


def _model(folder: Path):
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder.parent / "model"))


def test_dry_run_of_a_rank_that_does_not_exist(folder):
    with pytest.raises(UserError, match="ranks 0 to 1"):
        dryrun.dry_run(folder, 7)


def test_dry_run_without_a_program(tmp_path):
    with pytest.raises(UserError, match="compile it first"):
        dryrun.dry_run(tmp_path, 0)


def test_live_bytes_follow_tensors_and_resizes():
    from torch._subclasses.fake_tensor import FakeTensorMode

    live = dryrun.LiveBytes()
    with FakeTensorMode(), live, live.resizes():
        a = torch.empty(1000, dtype=torch.float32)
        b = a.view(10, 100)
        assert live.alive == 4000
        a.untyped_storage().resize_(0)
        assert live.alive == 0 and live.peak == 4000
        a.untyped_storage().resize_(8000)
        assert live.alive == 8000
        del a, b
        assert live.alive == 0 and live.peak == 8000
