"""Whole trainings of a tiny model: logging, checkpoints, resuming under other ranks and plans, and how runs fail."""

import base64
import gzip
import io
import json
import math
import re

import pytest
import torch
import torch.distributed as dist
from procs import run_ranks
from tiny_job import LENGTH, ROWS, config, make_dataset, make_job, read_log

from examples import check_merged
from seqloom.checkpoint import folders, merge
from seqloom.checkpoint.manifest import Manifest
from seqloom.errors import UserError
from seqloom.trainer import state
from seqloom.trainer.config import TrainConfig, parse
from seqloom.trainer.failure import follows
from seqloom.trainer.logging import RunLog, StepRecord, clock, step_line
from seqloom.trainer.loop import train_on
from seqloom.trainer.plot import plot_loss
from seqloom.trainer.schedule import learning_rate
from seqloom.trainer.settings_file import resolved
from seqloom.trainer.spikes import Note

CPU = torch.device("cpu")


def record(step, loss=2.5, **changes):
    fields = {
        "step": step,
        "loss": loss,
        "grad_norm": 1.25,
        "lr": 1e-3,
        "tokens": 100,
        "tokens_seen": 100 * step,
        "epoch": 0.5,
        "step_time_s": 2.0,
        "tokens_per_s": 123456.7,
        "tokens_per_s_per_gpu": 61728.35,
        "mfu_causal": 0.412,
        "memory_gib": 1.234,
        "data_wait_s": 0.0123,
        "eta_s": 3725.0,
        "memory_share": 0.77,
    }
    return StepRecord(**{**fields, **changes})


class Terminal(io.StringIO):
    def isatty(self):
        return True


# --- what a run says --------------------------------------------------------------------------------------------------


def test_a_line_holds_everything_once():
    assert step_line(record(7), 1000, 989e12) == (
        "step    7/1000  loss 2.5000  grad 1.250  lr 1.00e-03  61,728 tok/s/gpu  mfu 41.2% of 989 TFLOP/s  mem 1.23 GiB 77%  data 12 ms  "
        "eta 1:02:05"
    )


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (245, "4:05"), (3599.7, "1:00:00"), (90061, "25:01:01")])
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_a_log_without_a_terminal_is_plain_lines(tmp_path):
    console = io.StringIO()
    with RunLog(tmp_path, 1, 2, 1e12, console) as log:
        log.step(record(1))
        log.event(1, "checkpoint", "saved")
        log.event(1, "start", "unsaid", aloud=False)
        log.step(record(2, notes=(Note("spike", "loss 9 against 3 before"),)))
    lines = console.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 1/2", "saved", "step 2/2", "note: step 2: loss 9 against 3 before"]
    assert "\r" not in console.getvalue()
    written = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line for line in written if "loss" in line] == read_log(tmp_path)
    assert [(line["step"], line["event"], line["text"]) for line in written if "event" in line] == [
        (1, "checkpoint", "saved"),
        (1, "start", "unsaid"),
    ]
    assert [line.get("notes") for line in written if "loss" in line] == [None, [{"kind": "spike", "text": "loss 9 against 3 before"}]]
    assert read_log(tmp_path)[1]["tokens_seen"] == 200


def test_a_terminal_gets_a_bar_and_the_same_files(tmp_path):
    console = Terminal()
    with RunLog(tmp_path, 2, 3, 1e12, console) as log:
        log.step(record(2))
        log.say("saved here")
        log.step(record(3))
    assert "\r" in console.getvalue()
    assert "saved here\n" in console.getvalue()
    assert "3/3" in console.getvalue()
    assert [entry["step"] for entry in read_log(tmp_path)] == [2, 3]


def test_tensorboard_has_every_scalar(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    more = []
    with RunLog(tmp_path, 1, 2, 1e12, io.StringIO(), lambda scalars, step: more.append((step, scalars))) as log:
        log.step(record(1, loss=3.0))
        log.step(record(2, loss=2.0))
    assert [(step, scalars["loss"]) for step, scalars in more] == [(1, 3.0), (2, 2.0)]
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 3.0), (2, 2.0)]
    assert {"grad_norm", "lr", "tokens_per_s", "memory_gib", "mfu_causal"} <= set(events.Tags()["scalars"])


def test_a_resumed_log_continues_and_the_later_record_counts(tmp_path):
    with RunLog(tmp_path, 1, 4, 1e12, io.StringIO()) as log:
        for step in (1, 2, 3):
            log.step(record(step, loss=1.0))
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # killed in the middle of a line
    with RunLog(tmp_path, 3, 4, 1e12, io.StringIO()) as log:
        for step in (3, 4):
            log.step(record(step, loss=2.0))
    assert [(entry["step"], entry["loss"]) for entry in read_log(tmp_path)] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]
    with RunLog(tmp_path, 1, 4, 1e12, io.StringIO()) as log:
        log.step(record(1, loss=9.0))
    assert [entry["loss"] for entry in read_log(tmp_path)] == [9.0]


def test_the_plot_is_a_picture(tmp_path):
    with RunLog(tmp_path, 1, 3, 1e12, io.StringIO()) as log:
        for step in (1, 2, 3):
            log.step(record(step, loss=4.0 / step))
    path = plot_loss(tmp_path, "a run")
    assert path == tmp_path / "loss.png"
    assert path.read_bytes().startswith(b"\x89PNG")


# --- state ------------------------------------------------------------------------------------------------------------


def _restores_generators(rank, world_size):
    state.seed_random_state(seed=3, step=0)
    saved = [state.random_state(CPU) for _ in range(world_size)]
    expected = torch.rand(4)
    torch.manual_seed(99)
    state.restore_random_state(json.loads(json.dumps(saved)), CPU, seed=3, step=5)
    same = torch.equal(torch.rand(4), expected)
    state.restore_random_state(saved[:1], CPU, seed=3, step=5)
    first = torch.rand(4)
    state.restore_random_state(saved[:1], CPU, seed=3, step=6)
    return same, expected.tolist(), first.tolist(), torch.rand(4).tolist()


def test_generators_continue_or_are_seeded_anew():
    results = run_ranks(_restores_generators, 2)
    assert all(same for same, *_ in results)
    drawn = [tuple(values) for _, *draws in results for values in draws]
    assert len(set(drawn)) == 6, "every rank, step and restart draws its own numbers"


def test_generator_state_is_text():
    text = state.random_state(CPU)["cpu"]
    assert len(base64.b64decode(text)) == torch.get_rng_state().numel()


@pytest.mark.parametrize(
    ("error", "answer"),
    [
        (UserError("a sentence"), True),
        (dist.DistNetworkError("gone"), True),
        (RuntimeError("[/x/gloo/transport/tcp/pair.cc:547] Connection closed by peer"), True),
        (RuntimeError("shapes differ"), False),
        (ValueError("gloo"), False),
    ],
)
def test_what_may_follow_from_another_rank(error, answer):
    assert follows(error) is answer


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return make_job(tmp_path_factory.mktemp("job"))


def losses(folder, name):
    return [entry["loss"] for entry in read_log(folder / "runs" / name)]


def _train(rank, world_size, folder, *runs):
    for changes in runs:
        train_on(config(folder, runtime_ngpus=world_size, **changes), CPU)


WHOLE = {
    "name": "whole",
    "plan_ngpus": 2,
    "max_train_steps": 6,
    "checkpoint_every": 4,
    "warmup_steps": 2,
    "lr_schedule": "linear",
    "profile": "2:3",
}


@pytest.fixture(scope="module")
def whole(job):
    """Six steps on two ranks, checkpoints at 4 and 6."""
    run_ranks(_train, 2, job, WHOLE, timeout=240)
    return job


def test_a_run_learns_and_says_so(whole):
    log = read_log(whole / "runs/whole")
    assert [entry["step"] for entry in log] == [1, 2, 3, 4, 5, 6]
    assert log[0]["loss"] == pytest.approx(math.log(96), abs=0.3)
    assert log[-1]["loss"] < log[0]["loss"] - 0.3
    for entry in log:
        rate = learning_rate(entry["step"], peak=1e-2, schedule="linear", warmup_steps=2, total_steps=6)
        assert entry["lr"] == rate
        assert entry["tokens_per_s"] == pytest.approx(2 * entry["tokens_per_s_per_gpu"])
        assert entry["memory_gib"] > 0
        assert entry["step_time_s"] >= entry["data_wait_s"] >= 0
    assert log[-1]["epoch"] == pytest.approx(6 * 2 / ROWS)
    assert log[-1]["tokens_seen"] == sum(entry["tokens"] for entry in log)
    assert 6 * 2 * (LENGTH - 1) <= log[-1]["tokens_seen"] <= 6 * 2 * LENGTH
    assert (whole / "runs/whole/loss.png").is_file()
    (page,) = whole.glob("programs/*/plan.html")
    assert "easured" in page.read_text(encoding="utf-8"), "the run stands beside the plan"


def test_a_run_leaves_its_settings_its_page_and_its_profile(whole):
    folder = whole / "runs/whole"
    again = parse(TrainConfig, "train.py", ["--config", str(folder / "config.yaml")])
    assert resolved(again) == resolved(config(whole, runtime_ngpus=2, **WHOLE))
    known = json.loads((folder / "run.json").read_text())
    assert (known["ranks"], known["total_steps"], known["tokens_per_step"]) == (2, 6, 2 * LENGTH)
    assert known["flops_per_token"] == pytest.approx(6 * known["parameters"], rel=0.5), "a model this small is mostly its matrices"
    assert (folder / known["plan_page"]).is_file()
    assert "loss" in (folder / "report.html").read_text()
    events = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines() if '"event"' in line]
    assert [(event["step"], event["event"]) for event in events if event["event"] != "checkpoint"] == [
        (0, "start"),
        (3, "profile"),
        (6, "finish"),
    ]
    assert [event["step"] for event in events if event["event"] == "checkpoint"] == [4, 6]
    (program,) = whole.glob("programs/whole/program.py")
    blocks = re.findall(r"^class (\w+)\(nn.Module\)", program.read_text(), re.MULTILINE)
    trace = gzip.decompress((folder / "profile/steps-2-3.json.gz").read_bytes()).decode()
    assert all(f'"{name}.forward"' in trace for name in blocks)


def test_a_run_leaves_checkpoints_that_say_what_they_are(whole):
    assert folders.steps(whole / "checkpoints/whole") == [4, 6]
    saved = Manifest.read(whole / "checkpoints/whole/step-4").state
    assert (saved["step"], saved["data"]["position"]) == (4, 8)
    assert saved["tokens_seen"] == read_log(whole / "runs/whole")[3]["tokens_seen"]
    assert saved["plan"]["plan_ngpus"] == saved["plan"]["runtime_ngpus"] == len(saved["rng"]) == 2
    assert saved["mesh"]["dp"] == 1
    assert math.prod(saved["mesh"].values()) == 2
    assert saved["optimizer"]["lr_schedule"] == "linear"
    assert saved["tied"] == {}


def test_the_merged_model_gives_the_trainers_numbers(whole, tmp_path):
    merge.merge(whole / "checkpoints/whole", hf_output=tmp_path / "hf", dtype="float32")
    final = json.loads((whole / "runs/whole/final.json").read_text())
    assert final["step"] == 6
    assert len(final["token_losses"]) == 4
    model = check_merged.load(tmp_path / "hf")
    assert check_merged.compare(model, whole / "data", final) < 1e-5
    with torch.no_grad():
        model.lm_head.weight[3] += 0.1
    assert check_merged.compare(model, whole / "data", final) > 1e-3


def _resume(rank, world_size, folder):
    """Stopped after four steps by a limit, continued with `last`; then finished already; then under other names from elsewhere."""
    half = {**WHOLE, "name": "half", "lr_schedule": None}
    train_on(config(folder, runtime_ngpus=2, **{**half, "max_train_steps": 4}), CPU)
    train_on(config(folder, runtime_ngpus=2, **half, resume_path="last"), CPU)
    train_on(config(folder, runtime_ngpus=2, **half, resume_path="last"), CPU)
    train_on(config(folder, runtime_ngpus=2, **{**half, "name": "straight"}), CPU)
    other = {**half, "name": "scale_units", "plan_ngpus": 1, "grad_accumulation_steps": 1}
    train_on(config(folder, runtime_ngpus=2, **other, resume_path=folder / "checkpoints/straight/step-4"), CPU)


def test_a_resumed_run_makes_the_same_steps(whole):
    run_ranks(_resume, 2, whole, timeout=240)
    straight = losses(whole, "straight")
    assert losses(whole, "half") == straight, "the same ranks and plan: the same numbers to the last bit"
    assert folders.steps(whole / "checkpoints/half") == [4, 6]
    assert losses(whole, "scale_units") == pytest.approx(straight[4:], abs=1e-5), "two scale units of one rank"

    merge.merge(whole / "checkpoints/straight/step-4", output_fname=whole / "merged.ckpt")
    alone = {**WHOLE, "name": "alone", "plan_ngpus": 1, "lr_schedule": None, "resume_path": whole / "merged.ckpt"}
    run_ranks(_train, 1, whole, alone, timeout=240)
    assert losses(whole, "alone") == pytest.approx(straight[4:], abs=1e-5), "one rank, from the merged file"


def _refused(rank, world_size, folder):
    """Every mistake in turn; each must be the same sentence on every rank."""
    said = {}
    cases = {
        "old run": {**WHOLE},
        "older checkpoint": {**WHOLE, "resume_path": folder / "checkpoints/whole/step-4"},
        "ranks": {**WHOLE, "name": "x", "runtime_ngpus": 4, "plan_ngpus": 4},
        "no data": {**WHOLE, "name": "x", "dataset_path": None, "seq_len": LENGTH},
        "vocabulary": {**WHOLE, "name": "x", "dataset_path": folder / "foreign"},
        "stale": {**WHOLE, "max_train_steps": 9, "resume_path": "last", "grad_accumulation_steps": 3},
        "spoiled": {**WHOLE, "name": "spoiled", "lr": 1e30, "max_grad_norm": 0, "warmup_steps": 0, "checkpoint_every": 1},
        "other data": {**WHOLE, "name": "x", "dataset_path": folder / "small", "resume_path": folder / "checkpoints/whole/step-4"},
    }
    for name, changes in cases.items():
        try:
            train_on(config(folder, **{"runtime_ngpus": world_size, **changes}), CPU)
            said[name] = "nothing"
        except UserError as error:
            said[name] = str(error)
    return said


def test_mistakes_are_one_sentence_on_every_rank(whole):
    make_dataset(whole / "foreign", highest=200)
    make_dataset(whole / "small", rows=ROWS // 2)
    before = sorted(path for path in (whole / "checkpoints/whole").rglob("*"))
    first, second = run_ranks(_refused, 2, whole, timeout=240)
    assert first == second
    parts = {
        "old run": "checkpoints of an earlier run, up to step 6",
        "older checkpoint": "checkpoints after step 4, up to step 6",
        "ranks": "this job has 2 ranks, but --runtime_ngpus is 4",
        "no data": "--dataset_path",
        "vocabulary": f"row {ROWS - 1} of {whole / 'foreign'} holds the token id 200",
        "stale": "grad_accumulation_steps was 2 and is now 3",
        "spoiled": "and the run stops without saving this step",
        "other data": f"had rows in the data set {ROWS}, this one has {ROWS // 2}",
    }
    for name, part in parts.items():
        assert part in first[name], f"{name}: {first[name]}"
        assert "\n" not in first[name], name
    assert sorted(path for path in (whole / "checkpoints/whole").rglob("*")) == before, "nothing was lost"
    spoiled = folders.steps(whole / "checkpoints/spoiled")
    assert f"continue from step {spoiled[-1]}" in first["spoiled"]
