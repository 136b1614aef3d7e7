"""Training on packed documents: every way to split attention makes the same steps, a resumed run too, and the merged model agrees."""

import json

import numpy as np
import pytest
from datasets import Dataset, Features, List, Value
from procs import run_ranks
from test_trainer_loop import WHOLE, _train, losses
from tiny_job import LENGTH, ROWS, VOCAB, make_model

from examples import check_merged
from seqloom.checkpoint import merge
from seqloom.data.loader import Loader, open_dataset
from seqloom.data.metadata import Metadata, write_metadata
from seqloom.runtime.context import Prepared
from seqloom.trainer.ahead import Ahead


def make_documents(folder, seed=0):
    """Rows of documents of random lengths with a pattern that can be learned inside each."""
    generator = np.random.default_rng(seed)
    ids, labels, borders = [], [], []
    for _ in range(ROWS):
        cuts = [0, *sorted(generator.choice(np.arange(1, LENGTH), size=2, replace=False).tolist()), LENGTH]
        row = np.concatenate([(generator.integers(0, 90) + 3 * np.arange(b - a)) % 90 for a, b in zip(cuts, cuts[1:], strict=False)])
        after = np.append(row[1:], -100)
        after[np.array(cuts[1:]) - 1] = -100
        ids.append(row.astype(np.int32))
        labels.append(after.astype(np.int32))
        borders.append(cuts)
    column = List(Value("int32"), length=LENGTH)
    features = Features(input_ids=column, labels=column, cu_seqlens=List(Value("int32")))
    Dataset.from_dict({"input_ids": ids, "labels": labels, "cu_seqlens": borders}, features=features).save_to_disk(str(folder))
    about = Metadata(LENGTH, VOCAB, "t", "0" * 64, "c", "0" * 64, ROWS, ROWS * LENGTH, 3 * ROWS, pack="documents", typical_row=(4, 9, 3))
    write_metadata(folder, about)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    make_model(folder / "model")
    make_documents(folder / "data")
    run_ranks(_train, 1, folder, {**WHOLE, "plan_ngpus": 1, "name": "alone"}, timeout=240)
    return folder


@pytest.mark.parametrize("attention", ["magi", "heads", "auto"])
def test_two_ranks_make_the_steps_of_one(job, attention):
    run_ranks(_train, 2, job, {**WHOLE, "name": attention, "attention": attention, "force": "sp2"}, timeout=240)
    assert losses(job, attention) == pytest.approx(losses(job, "alone"), abs=1e-5)
    assert json.loads((job / "programs" / attention / "plan.json").read_text())["documents"] == [4, 9, 3]


def test_heads_and_sequence_together_train_as_one_rank(job):
    run_ranks(_train, 4, job, {**WHOLE, "name": "both", "plan_ngpus": 4, "force": "cp2,sp2"}, timeout=240)
    assert losses(job, "both") == pytest.approx(losses(job, "alone"), abs=1e-5)


def test_documents_count(job):
    """Without their borders the same rows give other losses: the masks are not the same."""
    folder = job / "whole_rows"
    folder.mkdir()
    make_model(folder / "model")
    make_documents(folder / "data")
    about = json.loads((folder / "data" / "seqloom.json").read_text())
    (folder / "data" / "seqloom.json").write_text(json.dumps({**about, "pack": "stream", "typical_row": [LENGTH]}))
    run_ranks(_train, 1, folder, {**WHOLE, "plan_ngpus": 1, "name": "stream"}, timeout=240)
    assert max(abs(a - b) for a, b in zip(losses(folder, "stream"), losses(job, "alone"), strict=True)) > 1e-4


def test_a_resumed_run_goes_on_with_the_next_rows(job):
    """The data is read one step ahead, and the checkpoint knows nothing of it."""
    half = {**WHOLE, "name": "half", "lr_schedule": None, "attention": "magi", "force": "sp2"}
    run_ranks(_train, 2, job, {**half, "max_train_steps": 4}, {**half, "resume_path": "last"}, {**half, "name": "straight"}, timeout=240)
    assert losses(job, "half") == losses(job, "straight")


def test_the_merged_model_gives_the_trainers_numbers(job, tmp_path):
    merge.merge(job / "checkpoints/alone", hf_output=tmp_path / "hf", dtype="float32")
    final = json.loads((job / "runs/alone/final.json").read_text())
    assert check_merged.compare(check_merged.load(tmp_path / "hf"), job / "data", final) < 1e-5


# --- one step ahead ------------------------------------------------------------------------------------------------------------------


class Plain:
    """A layout that changes nothing."""

    def prepare(self, micro_batch):
        return Prepared(micro_batch, None)


def test_reading_ahead_hands_out_the_loaders_steps_and_leaves_its_place(job):
    dataset = open_dataset(job / "data")
    plain, ahead_of = (Loader(dataset, 3, 8, 0, 1, 2, 4) for _ in range(2))
    ahead = Ahead(ahead_of, Plain())
    for step in range(7):
        if step == 4:  # continue from a place further on, as a resumed run does
            for loader in (plain, ahead_of):
                loader.load_state_dict({**loader.state_dict(), "epoch": 2, "position": 5})
        wanted, found = plain.next_step(), ahead.next_step()
        assert [b["input_ids"].tolist() for b in wanted] == [b.inputs["input_ids"].tolist() for b in found]
        assert plain.state_dict() == ahead_of.state_dict()
    ahead.close()


def test_a_mistake_in_the_data_surfaces_at_its_step(job):
    class Failing(Plain):
        def prepare(self, micro_batch):
            raise OSError("disk gone")

    ahead = Ahead(Loader(open_dataset(job / "data"), 3, 8, 0, 1, 2, 4), Failing())
    with pytest.raises(OSError, match="disk gone"):
        ahead.next_step()
    ahead.close()
