"""`python ckpt_merger.py`: the documented command lines, exit codes and sentences."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ckpt_merger
from seqloom.checkpoint.read import load_checkpoint
from seqloom.checkpoint.write import save_checkpoint
from seqloom.entry import run

ROOT = Path(__file__).parent.parent
CONFIG = {"model_type": "llama", "hidden_size": 4, "eos_token_id": 2}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with ./checkpoints/mini holding steps 5 and 10."""
    monkeypatch.chdir(tmp_path)
    for step in (5, 10):
        tensors = {"model.w": torch.full((3, 4), float(step)), "optimizer.step.w": torch.tensor(float(step))}
        save_checkpoint(Path("checkpoints/mini"), step, tensors, {"step": step, "plan": "dp2"}, model_config=CONFIG)
    return tmp_path


def _call(monkeypatch, capsys, *flags):
    """Exit code and streams of the entry point, in this process."""
    monkeypatch.setattr(sys, "argv", ["ckpt_merger.py", *flags])
    with pytest.raises(SystemExit) as leaving:
        run(ckpt_merger.main)
    streams = capsys.readouterr()
    return leaving.value.code, streams.out, streams.err


def test_the_documented_command(place):
    command = [sys.executable, str(ROOT / "ckpt_merger.py"), "--ckpt_dir", "./checkpoints", "--output_fname", "./merged.ckpt"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert "merged checkpoints/mini/step-10" in done.stdout
    tensors = {"model.w": torch.zeros(3, 4), "optimizer.step.w": torch.tensor(0.0)}
    assert load_checkpoint(Path("merged.ckpt"), tensors)["step"] == 10
    assert torch.equal(tensors["model.w"], torch.full((3, 4), 10.0))


def test_an_error_is_one_sentence_and_exit_code_2(place):
    (place / "checkpoints" / "mini" / "step-5" / "shard-00000.safetensors").unlink()
    command = [sys.executable, str(ROOT / "ckpt_merger.py"), "--ckpt_dir", "checkpoints/mini/step-5", "--output_fname", "m"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: checkpoints/mini/step-5 is damaged (shard-00000.safetensors is missing)")
    assert done.stderr.count("\n") == 1
    assert not (place / "m").exists()


@pytest.mark.parametrize("dash", ["_", "-"])
def test_hugging_face_output(place, monkeypatch, capsys, dash):
    flags = [f"--ckpt{dash}dir", "checkpoints/mini", f"--hf{dash}output", "hf", "--dtype", "float32", f"--max{dash}shard{dash}gb", "1"]
    code, out, _ = _call(monkeypatch, capsys, *flags)
    assert code == 0
    assert "weights in float32 (from --dtype)" in out
    assert torch.equal(load_file("hf/model.safetensors")["w"], torch.full((3, 4), 10.0))
    assert json.loads(Path("hf/config.json").read_text()) == CONFIG | {"dtype": "float32"}


def test_the_dtype_used_is_said(place, monkeypatch, capsys):
    code, out, _ = _call(monkeypatch, capsys, "--ckpt_dir", "checkpoints", "--hf_output", "hf")
    assert code == 0
    assert "weights in bfloat16 (from the default, as the model config names none)" in out


def test_damaged_newest_step_is_named_and_the_previous_one_used(place, monkeypatch, capsys, caplog):
    path = place / "checkpoints" / "mini" / "step-10" / "shard-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    code, out, _ = _call(monkeypatch, capsys, "--ckpt_dir", "checkpoints", "--output_fname", "m.ckpt")
    assert code == 0
    assert "merged checkpoints/mini/step-5" in out
    assert "step-10 is damaged: shard-00000.safetensors from byte 0 has digest" in caplog.text
    code, out, _ = _call(monkeypatch, capsys, "--ckpt_dir", "checkpoints", "--output_fname", "m.ckpt", "--no-verify")
    assert code == 0
    assert "merged checkpoints/mini/step-10" in out


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--ckpt_dir", "checkpoints"], "error: nothing to write: give --output_fname FILE, --hf_output FOLDER, or both"),
        (["--ckpt_dir", "nowhere", "--output_fname", "m"], "error: --ckpt_dir nowhere is not a folder"),
        (["--ckpt_dir", "checkpoints", "--output_fname", "checkpoints"], "error: --output_fname checkpoints is a folder"),
        (["--ckpt_dir", "checkpoints", "--hf_output", "/proc/x/y"], "error: --hf_output /proc/x/y cannot be written"),
        (["--ckpt_dir", "checkpoints", "--hf_output", "checkpoints"], "error: --hf_output checkpoints holds other files"),
    ],
)
def test_bad_input(place, monkeypatch, capsys, flags, sentence):
    code, out, err = _call(monkeypatch, capsys, *flags)
    assert (code, out) == (2, "")
    assert err.startswith(sentence)
    assert err.count("\n") == 1


def test_several_runs_are_listed(place, monkeypatch, capsys):
    save_checkpoint(Path("checkpoints/other"), 1, {"model.w": torch.zeros(1)}, {})
    code, _, err = _call(monkeypatch, capsys, "--ckpt_dir", "checkpoints", "--output_fname", "m")
    assert code == 2
    assert "several runs (mini, other): choose one, --ckpt_dir checkpoints/mini" in err


def test_unknown_flags_and_dtypes_are_refused(place, monkeypatch, capsys):
    for flags in (["--dtype", "int8"], ["--nonsense", "1"]):
        code, _, _ = _call(monkeypatch, capsys, "--ckpt_dir", "checkpoints", "--hf_output", "hf", *flags)
        assert code == 2
    assert not (place / "hf").exists()
