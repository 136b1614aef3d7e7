"""The loader: an order that any number of scale units agree on, resumed exactly, losing no row; bad data sets found at start."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, List, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from seqloom.data.loader import Loader, epoch_order, open_dataset
from seqloom.data.metadata import Metadata, write_metadata
from seqloom.errors import UserError

LENGTH = 4


def make(path, rows, vocab_size=10_000, input_ids=None, labels=None):
    """A data set whose row r starts with the id r, so that a batch tells which rows it holds."""
    if input_ids is None:
        input_ids = [[r, 1, 2, 3] for r in range(rows)]
    labels = labels or [[*ids[1:], -100] for ids in input_ids]
    column = List(Value("int32"), length=LENGTH)
    table = Dataset.from_dict({"input_ids": input_ids, "labels": labels}, features=Features(input_ids=column, labels=column))
    table.save_to_disk(str(path))
    write_metadata(path, Metadata(LENGTH, vocab_size, "t", "0", "c", "0", rows=rows, tokens=rows * LENGTH, documents=1))
    return open_dataset(path)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Data sets of 1 to 23 rows."""
    root = tmp_path_factory.mktemp("sets")
    return {rows: make(root / str(rows), rows) for rows in (1, 2, 7, 12, 23)}


def rows_of(step):
    return [batch["input_ids"][:, 0].tolist() for batch in step]


def global_batches(dataset, steps, seed, dp_size, micro, accumulation, state=None):
    """The rows of each global batch, put together from all scale units in order."""
    loaders = [Loader(dataset, seed, dp_size * micro * accumulation, i, dp_size, micro, accumulation) for i in range(dp_size)]
    for loader in loaders:
        if state is not None:
            loader.load_state_dict(state)
    batches = []
    for _ in range(steps):
        batches.append([row for loader in loaders for part in rows_of(loader.next_step()) for row in part])
    assert len({json.dumps(loader.state_dict()) for loader in loaders}) == 1
    return batches, loaders[0].state_dict()


def test_shapes_types_and_shift(sets):
    step = Loader(sets[23], 0, 12, 1, 2, 3, 2).next_step()
    assert len(step) == 2
    for batch in step:
        assert batch.pop("cu_seqlens").tolist() == [0, LENGTH, 2 * LENGTH, 3 * LENGTH]
        assert set(batch) == {"input_ids", "labels", "position_ids"}
        assert all(tensor.shape == (3, LENGTH) and tensor.dtype == torch.int64 and tensor.is_contiguous() for tensor in batch.values())
        assert torch.equal(batch["labels"][:, :-1], batch["input_ids"][:, 1:]) and (batch["labels"][:, -1] == -100).all()
        assert torch.equal(batch["position_ids"], torch.arange(LENGTH).expand(3, LENGTH))


sizes = st.sampled_from([(1, 1, 12), (1, 12, 1), (2, 3, 2), (3, 2, 2), (4, 1, 3), (6, 2, 1), (12, 1, 1)])


@settings(deadline=None, max_examples=40)
@given(rows=st.sampled_from([1, 2, 7, 12, 23]), seed=st.integers(0, 5), size=sizes)
def test_order_does_not_depend_on_the_number_of_scale_units(sets, rows, seed, size):
    ours, _ = global_batches(sets[rows], 5, seed, *size)
    alone, _ = global_batches(sets[rows], 5, seed, 1, 12, 1)
    assert ours == alone


@settings(deadline=None, max_examples=40)
@given(rows=st.sampled_from([1, 2, 7, 12, 23]), before=sizes, after=sizes, steps=st.integers(0, 6))
def test_resume_under_another_size_continues_with_the_next_sample(sets, rows, before, after, steps):
    first, state = global_batches(sets[rows], steps, 3, *before)
    state = json.loads(json.dumps(state))
    second, _ = global_batches(sets[rows], 4, 3, *after, state=state)
    whole, _ = global_batches(sets[rows], steps + 4, 3, 1, 12, 1)
    assert first + second == whole


@settings(deadline=None, max_examples=30)
@given(rows=st.sampled_from([1, 2, 7, 12, 23]), batch=st.integers(1, 30), later=st.integers(1, 30))
def test_resume_under_another_global_batch(sets, rows, batch, later):
    first, state = global_batches(sets[rows], 3, 0, 1, batch, 1)
    second, _ = global_batches(sets[rows], 3, 0, 1, later, 1, state=state)
    seen = [row for step in first + second for row in step]
    stream = np.concatenate([epoch_order(rows, 0, epoch) for epoch in range(len(seen) // rows + 1)])
    assert seen == stream[: len(seen)].tolist()


@settings(deadline=None, max_examples=30)
@given(rows=st.sampled_from([1, 2, 7, 12, 23]), batch=st.integers(1, 30))
def test_every_epoch_sees_every_row_once(sets, rows, batch):
    steps = -(-3 * rows // batch)
    batches, state = global_batches(sets[rows], steps, 1, 1, batch, 1)
    seen = [row for step in batches for row in step]
    for epoch in range(3):
        assert sorted(seen[epoch * rows : (epoch + 1) * rows]) == list(range(rows))
    assert (state["epoch"], state["position"]) == divmod(steps * batch, rows)


def test_epochs_and_seeds_are_shuffled_differently(sets):
    orders = [tuple(epoch_order(23, seed, epoch)) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9


def test_iterating_is_stepping(sets):
    a, b = (Loader(sets[23], 0, 4, 0, 1, 2, 2) for _ in range(2))
    for step, _ in zip(a, range(8), strict=False):
        assert rows_of(step) == rows_of(b.next_step())


@pytest.mark.parametrize("sizes", [(8, 0, 2, 2, 1), (8, 0, 3, 2, 2), (0, 0, 1, 1, 0), (1, 0, 0, 1, 1)])
def test_sizes_must_multiply(sets, sizes):
    with pytest.raises(UserError, match="the global batch of"):
        Loader(sets[7], 0, *sizes)


def test_rank_outside_is_a_bug(sets):
    with pytest.raises(ValueError, match="dp_rank 2"):
        Loader(sets[7], 0, 2, 2, 2, 1, 1)


def test_state_of_another_order_is_refused(sets):
    state = Loader(sets[7], 0, 1, 0, 1, 1, 1).state_dict()
    with pytest.raises(UserError, match="rows in the data set 7, this one has 12"):
        Loader(sets[12], 0, 1, 0, 1, 1, 1).load_state_dict(state)
    with pytest.raises(UserError, match="seed 0, this one has 1"):
        Loader(sets[7], 1, 1, 0, 1, 1, 1).load_state_dict(state)


def test_check_vocab_names_the_row(tmp_path):
    ids = [[5, 5, 5, 5] for _ in range(40)]
    dataset = make(tmp_path / "good", 40, input_ids=ids)
    dataset.check_vocab(6)
    with pytest.raises(UserError, match=r"row 0 .* token id 5 .* has 5 tokens"):
        dataset.check_vocab(5)
    ids[33] = [5, 5, 99, 100]
    with pytest.raises(UserError, match=r"row 33 of .* holds the token id 99 in input_ids"):
        make(tmp_path / "bad", 40, input_ids=ids).check_vocab(99)
    make(tmp_path / "edge", 40, input_ids=ids).check_vocab(101)


def test_check_vocab_looks_at_labels_too(tmp_path):
    labels = [[1, 1, 1, -100], [1, 1, 77, -100]]
    dataset = make(tmp_path / "set", 2, input_ids=[[1] * 4] * 2, labels=labels)
    with pytest.raises(UserError, match="row 1 .* 77 in labels"):
        dataset.check_vocab(50)


@settings(deadline=None, max_examples=10)
@given(row=st.integers(0, 99), column=st.integers(0, LENGTH - 1))
def test_check_vocab_finds_one_id_anywhere(tmp_path_factory, row, column):
    ids = np.ones((100, LENGTH), int)
    ids[row, column] = 50
    dataset = make(tmp_path_factory.mktemp("set"), 100, input_ids=ids.tolist())
    with pytest.raises(UserError, match=f"row {row} "):
        dataset.check_vocab(50)


def test_check_vocab_counts_rows_over_several_batches(tmp_path, monkeypatch):
    monkeypatch.setattr("seqloom.data.loader.SCAN_TOKENS", 8 * LENGTH)
    ids = [[1] * LENGTH for _ in range(30)]
    ids[29][3] = 50
    with pytest.raises(UserError, match="row 29 "):
        make(tmp_path / "set", 30, input_ids=ids).check_vocab(50)


def test_dataset_facts(sets):
    dataset = sets[7]
    assert (dataset.rows, dataset.seq_len, dataset.vocab_size) == (7, LENGTH, 10_000)
    input_ids, labels = dataset.read(np.array([3, 0, 3]))
    assert input_ids[:, 0].tolist() == [3, 0, 3] and labels.shape == (3, LENGTH) and input_ids.dtype == np.int64


def test_other_length_is_refused(sets):
    assert open_dataset(sets[7].path, seq_len=LENGTH).rows == 7
    with pytest.raises(UserError, match=r"have 4 tokens, but --seq_len is 8: .*--sequence_length 8"):
        open_dataset(sets[7].path, seq_len=8)


def test_missing_foreign_and_damaged_folders(tmp_path):
    with pytest.raises(UserError, match="there is no data set .*bookcorpus.py"):
        open_dataset(tmp_path / "nowhere")
    Dataset.from_dict({"text": ["a"]}).save_to_disk(str(tmp_path / "text"))
    with pytest.raises(UserError, match="no packed data set"):
        open_dataset(tmp_path / "text")
    make(tmp_path / "broken", 5)
    next((tmp_path / "broken").glob("*.arrow")).unlink()
    with pytest.raises(UserError, match="cannot be read"):
        open_dataset(tmp_path / "broken")


def test_row_count_must_agree(tmp_path):
    make(tmp_path / "set", 5)
    write_metadata(tmp_path / "set", Metadata(LENGTH, 10, "t", "0", "c", "0", rows=6, tokens=24, documents=1))
    with pytest.raises(UserError, match="holds 5 rows, not the 6"):
        open_dataset(tmp_path / "set")
