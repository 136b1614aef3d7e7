"""The real command lines: `python train.py`, `torchrun ... train.py`, and the tools around them, as processes."""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from tiny_job import LENGTH, flags, make_dataset, make_job, make_model, read_log

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def run(*words, folder, timeout=240):
    """A command in a folder; its result, with stderr freed of torchrun's own lines."""
    command = [str(word) for word in words]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=ENVIRONMENT, timeout=timeout, check=False)
    result.said = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    return result


def python(script, *words, folder):
    return run(sys.executable, ROOT / script, *words, folder=folder)


def torchrun(ranks, *words, folder):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return run(*launcher, ROOT / "train.py", *words, folder=folder)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return make_job(tmp_path_factory.mktemp("entry"))


@pytest.fixture
def alone(job, tmp_path):
    """Model and data in a folder of this test's own."""
    shutil.copytree(job / "model", tmp_path / "model")
    shutil.copytree(job / "data", tmp_path / "data")
    return tmp_path


# --- compile, then run ------------------------------------------------------------------------------------------------


def test_compile_then_train_then_resume_then_merge(alone):
    """The seeds' workflow: compile in one process, train on two, continue, merge both ways, train from the merged file."""
    both = flags(alone, name="two", plan_ngpus=2, runtime_ngpus=2)
    compiled = python("train.py", "--run_mode", "compile", *both, folder=alone)
    assert compiled.returncode == 0, compiled.stderr
    program = alone / "programs/two/program.py"
    assert compiled.stdout.startswith(f"wrote {program.parent}\npredicted: ")
    written = program.stat().st_mtime_ns

    trained = torchrun(2, *both, "--max_train_steps", "3", folder=alone)
    assert trained.returncode == 0, trained.stderr
    assert program.stat().st_mtime_ns == written, "a valid program is not compiled again"
    lines = trained.stdout.splitlines()
    table = ["model", "data", "step", "run", "ranks", "plan", "predicted", "settings", "program", "checkpoints", "report", "stop"]
    assert [line.split()[0] for line in lines[: len(table)]] == table
    said = [line for line in lines[len(table) :] if not line.startswith("note: ")]
    assert [line for line in lines if re.match(r"step \d/3  loss \d", line)] == said[:3]
    assert said[3] == f"saved {alone}/checkpoints/two/step-3"
    assert f"checkpoints in {alone}/checkpoints/two" in lines[-3]
    assert lines[-2] == f"report     {alone}/runs/two/report.html"

    resumed = torchrun(2, *both, "--max_train_steps", "5", "--resume_path", "last", folder=alone)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming from" in resumed.stdout
    assert [entry["step"] for entry in read_log(alone / "runs/two")] == [1, 2, 3, 4, 5]

    merged = python(
        "ckpt_merger.py", "--ckpt_dir", "checkpoints", "--output_fname", "merged.ckpt", "--hf_output", "hf", "--dtype=float32", folder=alone
    )
    assert merged.returncode == 0, merged.stderr
    check = [
        ROOT / "examples/check_merged.py",
        "--merged",
        "hf",
        "--dataset_path",
        "data",
        "--final",
        "runs/two/final.json",
    ]
    checked = run(sys.executable, *check, folder=alone)
    assert checked.returncode == 0, checked.stderr
    assert "no missing and no unexpected key" in checked.stdout
    final = json.loads((alone / "runs/two/final.json").read_text())
    (alone / "runs/two/final.json").write_text(json.dumps({**final, "loss": final["loss"] + 0.01}))
    checked = run(sys.executable, *check, folder=alone)
    assert checked.returncode == 2
    assert "it is not the trained model" in checked.said[0]

    one = python("train.py", *flags(alone, name="one", max_train_steps=6, resume_path="merged.ckpt"), folder=alone)
    assert one.returncode == 0, one.stderr
    assert "no program in" in one.stdout, "one plain process compiles for itself"
    assert [entry["step"] for entry in read_log(alone / "runs/one")] == [6]


def test_the_debugging_line_of_the_seeds(alone):
    """Two scale units of one rank, everything else as it comes: compiled by the first rank, bf16, planned for an H100."""
    line = "--plan_ngpus 1 --runtime_ngpus 2 --name llama3_debug --model_id ./model --dataset_path ./data --max_train_steps 2"
    result = torchrun(2, *line.split(), folder=alone)
    assert result.returncode == 0, result.stderr
    assert "no program in .seqloom/llama3_debug: compiling" in result.stdout
    assert "2 scale units x 4 micro-batches x 1 row = 128 tokens" in result.stdout
    assert "dp 2, ZeRO" in result.stdout
    assert (alone / "checkpoints/llama3_debug/step-2/manifest.json").is_file()
    assert (alone / "runs/llama3_debug/log.jsonl").is_file()


# --- mistakes ---------------------------------------------------------------------------------------------------------


def refused(result, *parts):
    """One sentence, told once, without a traceback of ours."""
    assert result.returncode != 0
    assert len(result.said) == 1, result.stderr
    assert all(part in result.said[0] for part in parts), result.said
    assert 'train.py", line' not in result.stderr


def test_mistakes_in_one_process(alone):
    def train(**changes):
        return python("train.py", *flags(alone, **changes), folder=alone)

    def compile_only(**changes):
        return train(run_mode="compile", **changes)

    one = train(runtime_ngpus=2)
    refused(one, "this job has 1 rank, but --runtime_ngpus is 2", "torchrun --nproc_per_node=2")
    assert one.returncode == 2
    refused(compile_only(dataset_path=None), "--dataset_path, or --seq_len")
    refused(compile_only(plan_ngpus=2, runtime_ngpus=3), "not a multiple of plan_ngpus 2")
    (alone / "empty").mkdir()
    refused(compile_only(model_id=alone / "empty"), "empty has no config.json")
    (alone / "file").write_text("in the way")
    refused(compile_only(output_folder=alone / "file"), "file", "writable")
    assert {path.name for path in (alone / "programs").glob("*")} <= {".cache"}, "no program was written"


def test_mistakes_of_a_job_are_told_once(alone):
    """A world of another size, and a stale program: found on all ranks or on the first, told once either way, and no rank hangs."""
    refused(torchrun(2, *flags(alone, runtime_ngpus=4), folder=alone), "this job has 2 ranks, but --runtime_ngpus is 4")
    words = {"name": "old", "runtime_ngpus": 2, "max_train_steps": 1}
    assert python("train.py", "--run_mode=compile", *flags(alone, **words), folder=alone).returncode == 0
    make_model(alone / "model", num_hidden_layers=3)
    stale = torchrun(2, *flags(alone, **words), folder=alone)
    refused(stale, "stale", "num_hidden_layers was 2 and is now 3", "--run_mode compile")
    shown = torchrun(2, *flags(alone, **words), "--debug", folder=alone)
    assert "Traceback" in shown.stderr
    assert "UserError" in shown.stderr


def test_a_foreign_vocabulary_is_found_at_the_start(alone):
    make_dataset(alone / "foreign", highest=96)
    result = python("train.py", *flags(alone, dataset_path=alone / "foreign"), folder=alone)
    refused(result, "row 23", "token id 96", "96 tokens")
    assert not list((alone / "checkpoints").rglob("step-*"))


BROKEN = """
import torch
import torch.distributed as dist
from torch.nn import functional as F

from seqloom.ops import register_op


@register_op("b l d^, n^ d^, b l -> b l")
def broken_loss(hidden_states, weight, labels, padding_idx, chunk_size=1024):
    if dist.is_initialized() and dist.get_rank() == 1:
        raise ZeroDivisionError("the operator of rank 1 is broken")
    losses = F.cross_entropy((hidden_states @ weight.T).flatten(0, 1).float(), labels.flatten(), ignore_index=padding_idx, reduction="none")
    return losses.view_as(labels)
"""


def test_a_rank_that_breaks_ends_the_job(alone):
    """The traceback is that of the rank that broke, not those of the ranks that lost it; the job ends at once, non-zero."""
    (alone / "broken_loss.py").write_text(textwrap.dedent(BROKEN))
    words = flags(alone, name="broken", plan_ngpus=1, runtime_ngpus=2, loss="broken_loss:broken_loss", max_train_steps=2)
    environment = ENVIRONMENT["PYTHONPATH"]
    ENVIRONMENT["PYTHONPATH"] = f"{environment}{os.pathsep}{alone}"
    try:
        result = torchrun(2, *words, folder=alone)
    finally:
        ENVIRONMENT["PYTHONPATH"] = environment
    assert result.returncode != 0
    assert "ZeroDivisionError: the operator of rank 1 is broken" in result.stderr
    assert "Connection closed" not in result.stderr
    assert not list((alone / "checkpoints").rglob("step-*"))


def test_the_length_of_the_compiled_program_is_the_datas(alone):
    make_dataset(alone / "longer", length=2 * LENGTH)
    words = {"name": "length", "max_train_steps": 1}
    assert python("train.py", "--run_mode=compile", *flags(alone, **words), folder=alone).returncode == 0
    longer = python("train.py", *flags(alone, **words, dataset_path=alone / "longer"), folder=alone)
    refused(longer, "stale", f"seq_len was {LENGTH} and is now {2 * LENGTH}")
