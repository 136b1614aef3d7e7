"""Settings in a file: read with --config, won over by flags, refused with the nearest name, and stored so that they can be read again."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from seqloom.errors import UserError
from seqloom.trainer.config import TrainConfig, parse
from seqloom.trainer.settings_file import RESOLVED_FILE, changed, named, resolved, settings_of, write_resolved

YAML = """
model_id: llama3_8b
plan-ngpus: 2
runtime_ngpus: 4
optimizer:
  optimizer: muon
  lr: 1e-3
  betas: [0.8, 0.9]
output:
  async_checkpoint: false
  keep_last: null
seed: 7
"""
TOML = """
model_id = "llama3_8b"
plan_ngpus = 2
runtime_ngpus = 4
seed = 7
[optimizer]
optimizer = "muon"
lr = 1e-3
betas = [0.8, 0.9]
[output]
async_checkpoint = false
"""


def file(folder, text, name="run.yaml"):
    path = folder / name
    path.write_text(text)
    return str(path)


def read(*words):
    return parse(TrainConfig, "train.py", list(words))


def test_yaml_and_toml_say_the_same_as_flags(tmp_path):
    flags = (
        "--model_id llama3_8b --plan_ngpus 2 --runtime_ngpus 4 --optimizer muon --lr 1e-3 --betas 0.8 0.9 --no_async_checkpoint --seed 7"
    )
    expected = resolved(read(*flags.split()))
    assert resolved(read("--config", file(tmp_path, YAML))) == expected
    assert resolved(read(f"--config={file(tmp_path, TOML, 'run.toml')}")) == expected


def test_flags_win_over_the_file(tmp_path):
    config = read("--config", file(tmp_path, YAML), "--lr", "2e-3", "--async_checkpoint", "--gpu_mem_constraint", "30")
    assert (config.optimizer.lr, config.output.async_checkpoint, config.compile.memory_gib, config.seed) == (2e-3, True, 30.0, 7)


def test_what_is_stored_is_read_again(tmp_path):
    config = read("--config", file(tmp_path, YAML), "--name", "again", "--profile", "3:4", "--eval_rows", "5")
    path = write_resolved(config, tmp_path)
    assert path.name == RESOLVED_FILE
    assert resolved(read("--config", str(path))) == resolved(config)
    assert set(yaml.safe_load(path.read_text())["optimizer"]) >= {"lr", "betas", "optimizer"}


def test_the_settings_that_were_changed(tmp_path):
    assert changed(read("--model_id", "m", "--lr", "1", "--num_epochs", "2")) == {"model_id": "m", "lr": 1.0}


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("lrr: 1", "has `lrr`, which is no setting: did you mean `lr`?"),
        ("optimizer: {weight_dekay: 1}", "did you mean `weight_decay`?"),
        ("qqqqqqqq: 1", "train.py --help"),
        ("output: {lr: 1}", "has `lr` under `output`: it belongs under `optimizer`"),
        ("optimizer: {seed: 1}", "has `seed` under `optimizer`: it belongs at the top"),
        ("lr: 1\noptimizer: {lr: 2}", "gives `lr` twice"),
        ("memory_gib: 1\ngpu_mem_constraint: 2", "gives `memory_gib` twice"),
        ("lr: fast", "gives `lr` a value that it cannot have (fast)"),
        ("lr: {a: 1}", "gives `lr` settings of its own"),
        ("precision: fp8", "gives `precision` a value that it cannot have (fp8)"),
        ("config: other.yaml", "has `config`, which is no setting"),
        ("- lr", "is a list"),
        ("lr: [", "is damaged"),
        ("lr: -1", "--lr is -1"),
        ("keep_best: 2", "give --keep_last too"),
    ],
)
def test_mistakes_in_a_file_are_one_sentence(tmp_path, text, part):
    with pytest.raises(UserError) as caught:
        read("--config", file(tmp_path, text), "--model_id", "m")
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "part"), [("run.ini", "is none of .yaml"), ("gone.yaml", "cannot read --config")])
def test_files_that_cannot_be_read(tmp_path, name, part):
    if name != "gone.yaml":
        file(tmp_path, "lr: 1", name)
    with pytest.raises(UserError, match="run.ini is none of" if name == "run.ini" else "cannot read"):
        read("--config", str(tmp_path / name), "--model_id", "m")


def test_an_empty_file_changes_nothing(tmp_path):
    assert resolved(read("--config", file(tmp_path, ""), "--model_id", "m")) == resolved(read("--model_id", "m"))


def test_the_last_file_counts():
    assert named(["--config", "a", "--config=b", "--lr", "1"]) == Path("b")
    assert named(["--lr", "1"]) is None


@given(st.sampled_from(sorted(settings_of(TrainConfig))), st.data())
def test_a_misspelt_setting_is_always_refused(name, data):
    from seqloom.trainer import settings_file

    place = data.draw(st.integers(0, len(name)))
    wrong = name[:place] + "x" + name[place:]
    if wrong in settings_of(TrainConfig):
        return
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match=f"has `{wrong}`"):
        patch.setattr(settings_file, "_mapping", lambda _: {wrong: 1})
        settings_file.read_settings(Path("run.yaml"), TrainConfig)
