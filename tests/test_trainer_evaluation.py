"""Evaluation while training: the original model's loss on rows that are kept from it, at no change to the run."""

import io
import json
import math
import os
import signal

import pytest
import torch
from procs import run_ranks
from tiny_job import LENGTH, config, make_dataset, make_job, read_log
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from seqloom.checkpoint import folders
from seqloom.checkpoint.manifest import Manifest
from seqloom.checkpoint.read import open_checkpoint
from seqloom.data.loader import open_dataset
from seqloom.data.metadata import DOCUMENTS, Metadata, read_metadata, write_metadata
from seqloom.errors import Stopped, UserError
from seqloom.report.run_log import LOG
from seqloom.trainer import evaluate, loop
from seqloom.trainer.evaluate import Evaluation, open_evaluation
from seqloom.trainer.logging import RunLog
from seqloom.trainer.signals import StopSignals

CPU = torch.device("cpu")
RUN = {"plan_ngpus": 2, "runtime_ngpus": 2, "max_train_steps": 5, "checkpoint_every": 2, "grad_accumulation_steps": 1}
HELD_OUT = 7  # rows: no multiple of what is evaluated at once


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = make_job(tmp_path_factory.mktemp("evaluation"))
    make_dataset(folder / "held-out", rows=HELD_OUT, seed=1)
    return folder


def trained(rank, world_size, folder, *runs):
    for changes in runs:
        loop.train_on(config(folder, **{**RUN, **changes}), CPU)


def evaluations(folder, name):
    records = map(json.loads, filter(None, (folder / "runs" / name / LOG).read_text().splitlines()))
    return {record["step"]: record["evaluation"] for record in records if "evaluation" in record}


def original_loss(job, checkpoint, rows):
    """The mean loss of Hugging Face's model with the weights of a checkpoint."""
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(job / "model"))
    reader, _ = open_checkpoint(checkpoint)
    model.load_state_dict({name.removeprefix("model."): reader.read(name) for name in reader if name.startswith("model.")})
    reader.close()
    input_ids, labels = (torch.from_numpy(array) for array in open_dataset(job / "held-out").read(rows))
    with torch.no_grad():
        return F.cross_entropy(model(input_ids).logits.flatten(0, 1), labels.flatten()).item()


PLANS = {
    "sp2": {"force": "sp2", "zero": 3},
    "tp_sp2": {"force": "tp_sp2"},
    "units": {"plan_ngpus": 1, "micro_batch_size": 2},
    "units-zero": {"force": "dp2", "zero": 2, "micro_batch_size": 2},
}


def test_the_loss_is_the_original_models_and_nothing_of_the_run_changes(job):
    held_out = {"eval_path": job / "held-out"}
    runs = [{**plan, **more, "name": f"{name}{word}"} for name, plan in PLANS.items() for word, more in (("", {}), ("-eval", held_out))]
    run_ranks(trained, 2, job, *runs, timeout=240)
    for name in PLANS:
        found = evaluations(job, f"{name}-eval")
        assert sorted(found) == [2, 4, 5], "with every checkpoint, the last included"
        for step, evaluation in found.items():
            folder = job / f"checkpoints/{name}-eval/step-{step}"
            assert evaluation["loss"] == pytest.approx(original_loss(job, folder, range(HELD_OUT)), rel=1e-5)
            assert evaluation["rows"] == HELD_OUT and evaluation["perplexity"] == pytest.approx(math.exp(evaluation["loss"]))
            assert evaluation["tokens"] == HELD_OUT * LENGTH - math.ceil(HELD_OUT / 2)
            assert Manifest.read(folder).state["evaluation"]["loss"] == evaluation["loss"]
        with_it, without = (read_log(job / "runs" / f"{name}{word}") for word in ("-eval", ""))
        assert [(r["step"], r["loss"], r["grad_norm"]) for r in with_it] == [(r["step"], r["loss"], r["grad_norm"]) for r in without]


def test_as_often_and_on_as_many_rows_as_asked_and_the_best_stay(job):
    asked = {"eval_path": job / "held-out", "eval_every": 1, "eval_rows": 3, "force": "sp2", "lr": 0.5, "max_train_steps": 8}
    run_ranks(trained, 2, job, {**asked, "name": "best", "checkpoint_every": 1, "keep_last": 1, "keep_best": 2}, timeout=120)
    losses = {step: found["loss"] for step, found in evaluations(job, "best").items()}
    assert sorted(losses) == list(range(1, 9))
    best = sorted(losses, key=losses.get)[:2]
    assert folders.steps(job / "checkpoints/best") == sorted({*best, 8})
    assert losses[8] == pytest.approx(original_loss(job, job / "checkpoints/best/step-8", range(3)), rel=1e-5)


def _signalled(rank, world_size, folder):
    """A run whose second rank gets a signal in the middle of its second evaluation."""
    calls, begun = [], evaluate.total_loss

    def counted(*args):
        calls.append(None)
        if rank == 1 and len(calls) == HELD_OUT + 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return begun(*args)

    evaluate.total_loss = counted
    asked = {"eval_path": folder / "held-out", "eval_every": 1, "checkpoint_every": 100, "name": "signalled", "force": "sp2"}
    with StopSignals() as signals, pytest.raises(Stopped) as stopped:
        loop.train_on(config(folder, **{**RUN, **asked}), CPU, signals)
    return str(stopped.value), len(calls)


def test_a_signal_in_an_evaluation_saves_and_leaves(job):
    said = run_ranks(_signalled, 2, job, timeout=120)
    assert said[0] == said[1] and said[0][0].startswith("stopped by SIGTERM after step 2, which is saved")
    assert said[0][1] == HELD_OUT + 3, "the rest of the evaluation is left out"
    assert folders.steps(job / "checkpoints/signalled") == [2]
    assert "evaluation" not in Manifest.read(job / "checkpoints/signalled/step-2").state
    assert sorted(evaluations(job, "signalled")) == [1]


def test_a_loss_that_is_not_finite_is_logged_as_json_knows_it(tmp_path):
    console = io.StringIO()
    with RunLog(tmp_path, 1, 2, 1e12, console) as log:
        log.evaluation(Evaluation(1, math.inf, 10, 1, 0.5))
        log.evaluation(Evaluation(2, 1000.0, 10, 1, 0.5))
    found = [json.loads(line)["evaluation"] for line in (tmp_path / LOG).read_text().splitlines()]
    assert [entry["perplexity"] for entry in found] == [None, None] and [entry["loss"] for entry in found] == [None, 1000.0]
    assert "evaluation after step 1: loss inf, perplexity inf" in console.getvalue()


# --- what there is to evaluate on ------------------------------------------------------------------------------------------------------


def test_the_folder_validation_of_the_data_is_found_by_itself(job, tmp_path):
    data = make_dataset(tmp_path / "data")
    training = open_dataset(data)
    assert open_evaluation(config(job), training) is None
    make_dataset(data / "validation", rows=3)
    assert open_evaluation(config(job), training).rows == 3
    assert open_evaluation(config(job, eval_path=job / "held-out"), training).rows == HELD_OUT
    assert open_evaluation(config(job, eval_every=0), training) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"eval_every": 5}, "--eval_every needs text to evaluate on: make the data with bookcorpus.py --validation"),
        ({"eval_rows": 5}, "--eval_rows needs text to evaluate on"),
        ({"keep_best": 1, "keep_last": 2}, "--keep_best needs text to evaluate on"),
        ({"keep_best": 1, "keep_last": 2, "eval_every": 0}, "--keep_best needs evaluations, which --eval_every 0 forbids"),
        ({"eval_path": "nowhere"}, "there is no data set nowhere"),
    ],
)
def test_what_cannot_be_evaluated_is_one_sentence(job, changes, words):
    with pytest.raises(UserError, match=words):
        open_evaluation(config(job, **changes), open_dataset(job / "data"))


@pytest.mark.parametrize("changes", [{"eval_every": -1}, {"eval_rows": 0}, {"keep_best": -1}, {"keep_best": 1}])
def test_flags_that_make_no_sense_are_refused(job, changes):
    (flag,) = changes
    with pytest.raises(UserError, match=f"--{flag}"):
        config(job, **changes)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"pack": DOCUMENTS}, "is packed as documents, unlike"), ({"tokenizer_digest": "1" * 64}, "is made with another tokenizer, unlike")],
)
def test_text_that_was_prepared_otherwise_is_refused(job, tmp_path, change, words):
    other = make_dataset(tmp_path / "other")
    known = read_metadata(other).__dict__
    if "pack" in change:  # with the column of borders that such rows have
        from datasets import Dataset, Features, List, Value, load_from_disk

        table = load_from_disk(str(other)).to_dict()
        features = Features({**{name: List(Value("int32")) for name in table}, "cu_seqlens": List(Value("int32"))})
        rows = Dataset.from_dict({**table, "cu_seqlens": [[0, LENGTH]] * len(table["labels"])}, features=features)
        other = tmp_path / "documents"
        rows.save_to_disk(str(other))
    write_metadata(other, Metadata(**{**known, **change}))
    with pytest.raises(UserError, match=words):
        open_evaluation(config(job, eval_path=other), open_dataset(job / "data"))
