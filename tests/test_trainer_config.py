"""Flags, their checks, the learning rate, and what must be true before a run begins."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqloom.data.metadata import Metadata, write_metadata
from seqloom.emit.request import CompileRequest
from seqloom.errors import UserError
from seqloom.trainer import start
from seqloom.trainer.config import CompileConfig, EvalConfig, FaultConfig, MonitorConfig, OptimizerConfig, OutputConfig, TrainConfig, parse
from seqloom.trainer.schedule import learning_rate

ROOT = Path(__file__).resolve().parents[1]


def train_config(*words):
    return parse(TrainConfig, "train.py", ["--model_id", "llama3_8b", *words])


def data_folder(folder, length=64):
    folder.mkdir()
    write_metadata(folder, Metadata(length, 100, "t", "0" * 64, "c", "0" * 64, 10, 640, 3))
    return folder


# --- flags ------------------------------------------------------------------------------------------------------------


def test_compile_flags_are_the_fields_of_the_request():
    mine = {field.name: field for field in dataclasses.fields(CompileConfig)}
    of_the_data = {"documents"}
    for field in dataclasses.fields(CompileRequest):
        if field.name in of_the_data:
            continue
        assert field.name in mine
        if field.name not in ("model_id", "seq_len", "grad_accumulation_steps"):
            assert mine[field.name].default == field.default, field.name
    assert set(mine) - {field.name for field in dataclasses.fields(CompileRequest)} == {"dataset_path"}


def test_defaults_are_those_people_know():
    config = train_config()
    assert config.optimizer == OptimizerConfig("adamw", 2e-5, (0.9, 0.95), 0.95, 0.0, 1.0, "constant", 0)
    assert config.compile.grad_accumulation_steps == 4
    assert config.compile.precision == "bf16"
    assert (config.output.checkpoint_every, config.output.resume_path, config.num_epochs) == (1000, None, 2)
    assert (config.run_mode, config.seed, config.init) == ("run", 0, None)
    assert config.run_folder == Path("checkpoints/default")
    assert config.log_folder == Path("runs/default")


def test_dash_and_underscore_are_the_same_and_equals_is_allowed():
    first = train_config("--plan_ngpus=2", "--runtime_ngpus=4", "--run_mode", "compile", "--max_train_steps", "7")
    second = train_config("--plan-ngpus", "2", "--runtime-ngpus", "4", "--run-mode=compile", "--max-train-steps=7")
    assert first == second
    assert (first.compile.plan_ngpus, first.compile.runtime_ngpus, first.max_train_steps) == (2, 4, 7)


@pytest.mark.parametrize("flag", ["--memory_gib", "--memory-gib", "--gpu_mem_constraint", "--gpu-mem-constraint"])
def test_memory_has_the_name_people_know(flag):
    assert train_config(flag, "60.5").compile.memory_gib == 60.5


def test_the_command_lines_of_the_design_parse():
    line = "--run_mode compile --model_id meta-llama/Meta-Llama-3-8B-Instruct --dataset_path ./d --plan_ngpus=8 --runtime_ngpus=8"
    config = parse(TrainConfig, "train.py", line.split())
    assert config.run_mode == "compile"
    assert config.compile.model_id == "meta-llama/Meta-Llama-3-8B-Instruct"
    line = "--plan_ngpus 1 --runtime_ngpus 2 --name llama3_debug --model_id ./llama3_mini --dataset_path ./bookcorpus_llama3_4K"
    config = parse(TrainConfig, "train.py", line.split())
    assert (config.compile.plan_ngpus, config.compile.runtime_ngpus, config.compile.name) == (1, 2, "llama3_debug")


def test_an_unknown_flag_ends_the_process_with_the_nearest_name(capsys):
    with pytest.raises(SystemExit) as ended:
        train_config("--plan_gpus", "2")
    assert ended.value.code == 2
    assert "--plan_ngpus" in capsys.readouterr().err


def test_only_the_first_rank_of_a_machine_tells_of_mistakes(capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit):
        train_config("--no_such_flag", "2")
    captured = capsys.readouterr()
    assert captured.err == captured.out == ""


def test_parsing_needs_no_heavy_package():
    code = (
        "import sys; from seqloom.trainer.config import TrainConfig, parse; import seqloom.cli\n"
        "parse(TrainConfig, 'train.py', ['--model_id', 'm'])\n"
        "print([name for name in ('torch', 'transformers', 'datasets', 'numpy') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60, check=True)
    assert result.stdout.strip() == "[]"


def test_help_explains_every_flag():
    result = subprocess.run([sys.executable, "train.py", "--help"], capture_output=True, text=True, cwd=ROOT, timeout=60, check=True)
    for cls in (TrainConfig, CompileConfig, OptimizerConfig, OutputConfig, EvalConfig, FaultConfig, MonitorConfig):
        for field in dataclasses.fields(cls):
            if field.name not in ("compile", "output", "evaluation", "faults", "monitor"):
                assert f"--{field.name}" in result.stdout
    assert "Micro-batches of one step" in result.stdout


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("--lr", "0"), "--lr is 0.0"),
        (("--lr", "nan"), "--lr is nan"),
        (("--betas", "0.9", "1.0"), "--betas"),
        (("--weight_decay", "-1"), "--weight_decay is -1"),
        (("--max_grad_norm", "-1"), "--max_grad_norm is -1"),
        (("--warmup_steps", "-1"), "--warmup_steps is -1"),
        (("--checkpoint_every", "0"), "--checkpoint_every is 0"),
        (("--keep_last", "0"), "--keep_last is 0"),
        (("--keep_every", "5"), "give --keep_last too"),
        (("--max_skips", "-1"), "--max_skips is -1"),
        (("--momentum", "1"), "--momentum is 1.0"),
        (("--min_lr_ratio", "1.5"), "--min_lr_ratio is 1.5"),
        (("--decay_steps", "5"), "belongs to --lr_schedule wsd"),
        (("--lr_schedule", "wsd", "--decay_steps", "0"), "--decay_steps is 0"),
        (("--profile", "13:10"), "--profile is 13:10"),
        (("--profile", "0:3"), "--profile is 0:3"),
        (("--memory_snapshot", "x"), "--memory_snapshot is x"),
        (("--trace_strategy", "meta"), "--trace_strategy is a flag of nnScaler"),
        (("--pipeline-pivots=3",), "--pipeline_pivots is a flag of nnScaler"),
        (("--timeout", "0"), "--timeout is 0"),
        (("--num_epochs", "0"), "--num_epochs is 0"),
        (("--max_train_steps", "0"), "--max_train_steps is 0"),
    ],
)
def test_impossible_values_are_refused(words, part):
    with pytest.raises(UserError, match=part):
        train_config(*words)


# --- from flags to a request ------------------------------------------------------------------------------------------


def test_request_takes_every_setting(tmp_path):
    line = "--seq_len 128 --plan_ngpus 2 --runtime_ngpus 4 --zero 3 --force sp2 --recompute all --precision fp32 --memory_gib 8"
    request = train_config(*line.split(), "--output_folder", str(tmp_path)).compile.request()
    assert request == CompileRequest(
        model_id="llama3_8b",
        seq_len=128,
        plan_ngpus=2,
        runtime_ngpus=4,
        grad_accumulation_steps=4,
        zero=3,
        force="sp2",
        recompute="all",
        precision="fp32",
        memory_gib=8,
        output_folder=tmp_path,
    )


def test_sequence_length_comes_from_the_data_set(tmp_path):
    folder = str(data_folder(tmp_path / "data", length=64))
    assert train_config("--dataset_path", folder).compile.request().seq_len == 64
    assert train_config("--dataset_path", folder, "--seq_len", "64").compile.request().seq_len == 64


def test_sequence_length_must_be_known_and_agree(tmp_path):
    with pytest.raises(UserError, match="--dataset_path, or --seq_len"):
        train_config().compile.request()
    folder = data_folder(tmp_path / "data", length=64)
    with pytest.raises(UserError, match="have 64 tokens, but --seq_len is 32"):
        train_config("--dataset_path", str(folder), "--seq_len", "32").compile.request()
    with pytest.raises(UserError, match="there is no data set"):
        train_config("--dataset_path", str(tmp_path / "nothing")).compile.request()


def test_ranks_must_fill_scale_units():
    with pytest.raises(UserError, match="runtime_ngpus 3 is not a multiple of plan_ngpus 2"):
        train_config("--seq_len", "8", "--plan_ngpus", "2", "--runtime_ngpus", "3").compile.request()


@settings(deadline=None)
@given(rows=st.integers(1, 500), per_step=st.integers(1, 64), epochs=st.integers(1, 5))
def test_steps_are_what_the_epochs_fill(rows, per_step, epochs):
    steps = train_config("--num_epochs", str(epochs)).total_steps(rows, per_step)
    assert steps >= 1
    assert steps * per_step <= max(epochs * rows, per_step)
    assert (steps + 1) * per_step > epochs * rows
    assert train_config("--max_train_steps", "9").total_steps(rows, per_step) == 9


# --- learning rate ----------------------------------------------------------------------------------------------------

SCHEDULES = st.sampled_from(["constant", "linear", "cosine"])


@given(schedule=SCHEDULES, warmup=st.integers(0, 50), total=st.integers(1, 200), peak=st.floats(1e-6, 1.0))
def test_rate_rises_to_its_peak_and_never_again(schedule, warmup, total, peak):
    rates = [
        learning_rate(step, peak=peak, schedule=schedule, warmup_steps=warmup, total_steps=total)
        for step in range(1, max(total, warmup) + 2)
    ]
    assert all(0 <= rate <= peak * (1 + 1e-12) for rate in rates)
    assert all(rate > 0 for rate in rates[:total])
    rising, falling = rates[:warmup], rates[warmup:]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    assert falling[0] == peak or warmup >= total
    if warmup:
        assert rising[-1] == peak
        assert rising[0] == pytest.approx(peak / warmup)


@pytest.mark.parametrize(("schedule", "middle"), [("constant", 1.0), ("linear", 0.5), ("cosine", 0.5)])
def test_rate_half_way_and_behind_the_end(schedule, middle):
    def rate(step):
        return learning_rate(step, peak=1.0, schedule=schedule, warmup_steps=10, total_steps=110)

    assert rate(5) == 0.5
    assert rate(61) == pytest.approx(middle)
    assert rate(111) == pytest.approx(1.0 if schedule == "constant" else 0.0)
    assert rate(500) == pytest.approx(1.0 if schedule == "constant" else 0.0)


# --- before a run begins ----------------------------------------------------------------------------------------------


def test_stable_and_decay():
    def rate(step, **more):
        return learning_rate(step, peak=1.0, schedule="wsd", warmup_steps=10, total_steps=100, **more)

    assert [rate(step) for step in (1, 10, 11, 80, 81)] == [0.1, 1.0, 1.0, 1.0, 1.0]
    assert [rate(step) for step in (82, 91, 100)] == pytest.approx([0.95, 0.5, 0.05])
    assert [rate(step, decay_steps=10, min_ratio=0.5) for step in (90, 91, 96, 100)] == pytest.approx([1.0, 1.0, 0.75, 0.55])
    assert rate(11, decay_steps=1000) == 1.0, "never longer than what the warm-up leaves"


@given(st.sampled_from(["linear", "cosine", "wsd"]), st.integers(0, 20), st.integers(1, 60), st.floats(0, 1))
def test_a_rate_falls_to_no_less_than_its_floor(schedule, warmup, falling, floor):
    total = warmup + falling
    settings = {"peak": 3.0, "schedule": schedule, "warmup_steps": warmup, "total_steps": total, "min_ratio": floor}
    rates = [learning_rate(step, **settings) for step in range(1, total + 1)]
    after = rates[warmup:]
    assert all(earlier >= later - 1e-12 for earlier, later in zip(after, after[1:], strict=False))
    assert min(after) >= 3.0 * floor - 1e-12 and max(rates) <= 3.0 + 1e-12
    assert learning_rate(total + 1, **settings) == pytest.approx(3.0 * floor)


def test_world_size_names_the_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--name", "a b", "--runtime_ngpus", "2"])
    start.check_world_size(2, 2)
    with pytest.raises(UserError) as caught:
        start.check_world_size(1, 2)
    assert "this job has 1 rank, but --runtime_ngpus is 2" in str(caught.value)
    assert "`torchrun --nproc_per_node=2 train.py --name 'a b' --runtime_ngpus 2`" in str(caught.value)
    with pytest.raises(UserError, match="this job has 4 ranks"):
        start.check_world_size(4, 2)


@pytest.mark.parametrize(
    ("ranks", "command"),
    [
        (1, "python train.py"),
        (6, "torchrun --nproc_per_node=6 train.py"),
        (8, "torchrun --nproc_per_node=8 train.py"),
        (12, "torchrun --nproc_per_node=12 train.py"),
        (32, "torchrun --nnodes=4 --nproc_per_node=8 train.py"),
    ],
)
def test_launch_command(ranks, command):
    assert start.launch_command(ranks, ["train.py"]) == command


def test_device_is_the_gpu_where_there_are_enough(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert start.choose_device_type("h100-80gb") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert start.choose_device_type("h100-80gb") == "cuda"
    assert start.choose_device_type("cpu") == "cpu"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(UserError, match="2 GPUs for 3 ranks"):
        start.choose_device_type("h100-80gb")


def test_ranks_share_the_cores(monkeypatch):
    before = torch.get_num_threads()
    try:
        monkeypatch.setattr(start.os, "sched_getaffinity", lambda _: set(range(8)))
        for ranks, threads in (("1", 8), ("2", 4), ("3", 2), ("16", 1)):
            monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
            start.prepare_process("cpu", deterministic=False)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_deterministic_algorithms_on_request(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        start.prepare_process("cuda", deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
        assert start.os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)


def run_config(folder, *words):
    return train_config("--checkpoint_dir", str(folder / "checkpoints"), "--log_dir", str(folder / "runs"), *words)


def test_folders_are_made_and_tried(tmp_path):
    start.check_folders(run_config(tmp_path))
    assert (tmp_path / "checkpoints/default").is_dir()
    assert list((tmp_path / "runs/default").iterdir()) == []


@pytest.mark.parametrize(("taken", "flag"), [("checkpoints", "--checkpoint_dir"), ("runs", "--log_dir")])
def test_a_folder_that_cannot_be_written_is_named(tmp_path, taken, flag):
    (tmp_path / taken).write_text("a file in the way")
    with pytest.raises(UserError, match=f"cannot write in .*{taken}.*{flag}"):
        start.check_folders(run_config(tmp_path))


def test_a_new_run_never_meets_an_old_one(tmp_path):
    (tmp_path / "checkpoints/default/step-40").mkdir(parents=True)
    with pytest.raises(UserError, match="up to step 40.*--resume_path last"):
        start.check_folders(run_config(tmp_path))
    start.check_folders(run_config(tmp_path, "--resume_path", "last"))
    start.check_folders(run_config(tmp_path, "--name", "other"))


def test_an_older_checkpoint_needs_a_new_name(tmp_path):
    for step in (20, 40):
        (tmp_path / f"checkpoints/default/step-{step}").mkdir(parents=True)
    older = str(tmp_path / "checkpoints/default/step-20")
    with pytest.raises(UserError, match="checkpoints after step 20, up to step 40"):
        start.check_later_checkpoints(run_config(tmp_path, "--resume_path", older), 20)
    start.check_later_checkpoints(run_config(tmp_path, "--resume_path", older, "--name", "other"), 20)
    start.check_later_checkpoints(run_config(tmp_path, "--resume_path", "last"), 20)
    start.check_later_checkpoints(run_config(tmp_path, "--resume_path", str(tmp_path / "checkpoints/default/step-40")), 40)


def test_where_weights_come_from(tmp_path):
    empty, full = tmp_path / "empty", tmp_path / "full"
    empty.mkdir()
    full.mkdir()
    (full / "model.safetensors").write_bytes(b"")
    assert start.choose_weights(str(full), None) == full
    assert start.choose_weights(str(full), "weights") == full
    assert start.choose_weights(str(full), "random") is None
    assert start.choose_weights(str(empty), None) is None
    assert start.choose_weights("llama3_8b", None) is None
    assert start.choose_weights("nobody/nothing", "random") is None
    with pytest.raises(UserError, match="not on this machine"):
        start.choose_weights(str(empty), "weights")
    with pytest.raises(UserError, match="hf download nobody/nothing.*--init random"):
        start.choose_weights("nobody/nothing", None)
