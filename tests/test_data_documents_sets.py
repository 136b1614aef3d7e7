"""Data sets packed by documents, from text on disk to micro-batches: what the folder says, what the loader gives, what is damaged."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, List, Value, load_from_disk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from seqloom.data.build import build
from seqloom.data.corpora import Corpus
from seqloom.data.loader import Loader, open_dataset
from seqloom.data.metadata import DEFAULT_PACK, Metadata, read_metadata, write_metadata
from seqloom.data.packing import IGNORED
from seqloom.data.prepare import prepare
from seqloom.data.settings import Settings
from seqloom.data.tokenizer import train_tokenizer
from seqloom.errors import UserError

LENGTH = 16
END = "<|endoftext|>"


@pytest.fixture(scope="module")
def corpus():
    words = ["alpha", "beta", "gamma", " ", "\n", "naïve", "漢字"]
    rng = np.random.default_rng(1)
    documents = ["".join(rng.choice(words, size=rng.integers(1, 30))) for _ in range(80)]
    documents[3], documents[4] = "", None  # these leave no trace
    documents[7] = f"alpha{END}beta"  # an end of text within a document is not its end
    return Dataset.from_dict({"text": documents})


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return train_tokenizer([corpus], 300)


def save(corpus, tokenizer, path, length=LENGTH, pack="documents", **options):
    return build([Corpus("words", corpus)], tokenizer, "train:300", path, Settings(length, pack, **options))


@pytest.fixture(scope="module")
def folders(corpus, tokenizer, tmp_path_factory):
    """The same text packed in both ways."""
    root = tmp_path_factory.mktemp("sets")
    for pack in ("documents", "stream"):
        save(corpus, tokenizer, root / pack, pack=pack)
    return root


def token_lists(corpus, tokenizer):
    encoded = (tokenizer(text or "", add_special_tokens=False)["input_ids"] for text in corpus["text"])
    return [[*ids, tokenizer.eos_token_id] for ids in encoded if ids]


def document_numbers(texts, length):
    """The number of the document of every position of every row `[rows, length]`; padding is -1."""
    flat = [number for number, text in enumerate(texts) for _ in text]
    return np.array(flat + [-1] * (-len(flat) % length)).reshape(-1, length)


def borders_of(numbers):
    return [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]


@pytest.mark.parametrize("length", [1, 5, 16, 10_000])
def test_the_folder_holds_what_the_text_says(corpus, tokenizer, tmp_path, length):
    metadata, made = save(corpus, tokenizer, tmp_path / "set", length)
    table = load_from_disk(str(tmp_path / "set"))
    texts = token_lists(corpus, tokenizer)
    stream, numbers = sum(texts, []), document_numbers(texts, length)
    ids, labels = np.array(table["input_ids"][:]), np.array(table["labels"][:])
    assert made and metadata.documents == len(texts) == 78 and metadata.tokens == len(stream)
    assert ids.reshape(-1)[: len(stream)].tolist() == stream
    assert table["cu_seqlens"][:] == [borders_of(row) for row in numbers]
    goes_on = np.append(numbers.reshape(-1)[:-1] == numbers.reshape(-1)[1:], False).reshape(numbers.shape) & (numbers >= 0)
    following = np.append(ids.reshape(-1)[1:], 0).reshape(ids.shape)
    assert (labels == np.where(goes_on, following, IGNORED)).all()
    lists = List(Value("int32"), length=length)
    assert table.features == Features(input_ids=lists, labels=lists, cu_seqlens=List(Value("int32")))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(documents=st.lists(st.text(max_size=30), max_size=10), length=st.integers(1, 20))
def test_any_text_comes_back_document_by_document(tmp_path_factory, tokenizer, documents, length):
    documents = [text for text in documents if END not in text] + ["end"]
    path = tmp_path_factory.mktemp("sets") / "set"
    save(Dataset.from_dict({"text": documents}), tokenizer, path, length)
    dataset = open_dataset(path)
    input_ids, labels = dataset.read(np.arange(dataset.rows))
    input_ids, labels, cu_seqlens = input_ids.reshape(-1), labels.reshape(-1), dataset.read_cu_seqlens(np.arange(dataset.rows))
    found, pieces = [], []
    for start, stop in zip(cu_seqlens, cu_seqlens[1:], strict=False):
        pieces += input_ids[start:stop].tolist()
        if labels[stop - 1] == IGNORED:
            found.append(tokenizer.decode(pieces))
            pieces = []
    padded = dataset.rows * length > dataset.metadata.tokens
    assert found[: len(found) - padded] == [text + END for text in documents if text] and not pieces
    assert set(found[len(found) - padded :]) <= {END * n for n in range(1, length)}


def test_how_much_is_written_at_once_makes_no_difference(corpus, tokenizer, folders, tmp_path, monkeypatch):
    sizes = {"build.BLOCK_TOKENS": 100, "rows.BLOCK_TOKENS": 40, "rows.FILE_BYTES": 900, "pieces.MAX_BATCH": 3, "pieces.MIN_BYTES": 500}
    for name, size in sizes.items():
        monkeypatch.setattr(f"seqloom.data.{name}", size)
    save(corpus, tokenizer, tmp_path / "set")
    assert len(list((tmp_path / "set").glob("rows-*.arrow"))) > 3
    assert load_from_disk(str(tmp_path / "set"))[:] == load_from_disk(str(folders / "documents"))[:]
    assert read_metadata(tmp_path / "set") == read_metadata(folders / "documents")


def test_a_stream_has_two_columns_and_labels_every_token(corpus, tokenizer, folders):
    stream = sum(token_lists(corpus, tokenizer), [])
    table = load_from_disk(str(folders / "stream"))
    padding = -len(stream) % LENGTH
    lists = List(Value("int32"), length=LENGTH)
    assert table.features == Features(input_ids=lists, labels=lists)
    assert sum(table["input_ids"][:], []) == stream + [tokenizer.eos_token_id] * padding
    assert sum(table["labels"][:], []) == stream[1:] + [IGNORED] * (padding + 1)


def test_both_ways_have_the_same_tokens_and_fewer_labels(folders):
    rows = np.arange(open_dataset(folders / "stream").rows)
    (ids, labels), (whole_ids, whole_labels) = (open_dataset(folders / pack).read(rows) for pack in ("documents", "stream"))
    assert (ids == whole_ids).all()
    assert ((labels == whole_labels) | (labels == IGNORED)).all() and (labels != whole_labels).sum() == 77  # all ends but the last one


def test_metadata_of_both_ways(folders):
    whole, mine = (read_metadata(folders / pack) for pack in ("stream", "documents"))
    assert (whole.pack, whole.typical_row) == ("stream", (LENGTH,))
    rows = load_from_disk(str(folders / "documents"))["cu_seqlens"][:]
    work = [sum(length**2 for length in np.diff(row)) for row in rows]
    assert mine.pack == "documents" and sum(mine.typical_row) == LENGTH
    assert sum(length**2 for length in mine.typical_row) == sorted(work)[(len(work) - 1) // 2]
    assert mine.difference(whole) == "made with --pack documents there, not stream"
    assert whole.difference(mine) == "made with --pack stream there, not documents"
    assert json.loads((folders / "documents" / "seqloom.json").read_text())["typical_row"] == list(mine.typical_row)


def test_another_way_of_packing_is_another_data_set(corpus, tokenizer, tmp_path):
    first, _ = save(corpus, tokenizer, tmp_path / "set", pack="stream")
    assert save(corpus, tokenizer, tmp_path / "set", pack="stream") == (first, False)
    with pytest.raises(UserError, match=r"made with --pack stream there, not documents\): pass --overwrite"):
        save(corpus, tokenizer, tmp_path / "set")
    second, made = save(corpus, tokenizer, tmp_path / "set", overwrite=True)
    assert made and save(corpus, tokenizer, tmp_path / "set") == (second, False)


def test_the_default_is_one_constant(tmp_path):
    (tmp_path / "text.txt").write_text("a few words and no more")
    settings = (str(tmp_path / "text.txt"), "train:300", str(tmp_path / "set"), 8)
    assert prepare(*settings)[0].pack == DEFAULT_PACK
    assert prepare(*settings, pack=DEFAULT_PACK)[1] is False


def test_folders_from_before_there_was_a_choice(corpus, tokenizer, folders, tmp_path):
    save(corpus, tokenizer, tmp_path / "set", pack="stream")
    path = tmp_path / "set" / "seqloom.json"
    fields = json.loads(path.read_text())
    del fields["pack"], fields["typical_row"]
    path.write_text(json.dumps(fields))
    assert read_metadata(tmp_path / "set") == read_metadata(folders / "stream")
    assert save(corpus, tokenizer, tmp_path / "set", pack="stream")[1] is False
    batches = (Loader(open_dataset(folder), 0, 4, 0, 1, 4, 1).next_step()[0] for folder in (tmp_path / "set", folders / "stream"))
    for old, new in zip(*(sorted(batch.items()) for batch in batches), strict=True):
        assert old[0] == new[0] and torch.equal(old[1], new[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pack": "rows"}, "pack is rows, not one of stream, documents"),
        ({"typical_row": [3, 4]}, "typical_row do not add up to 16"),
        ({"typical_row": [0, 16]}, "typical_row do not add up to 16"),
        ({"typical_row": 16}, ""),
        ({"typical_row": ["many"]}, ""),
    ],
    ids=str,
)
def test_damaged_metadata(folders, tmp_path, changes, message):
    fields = json.loads((folders / "stream" / "seqloom.json").read_text())
    (tmp_path / "seqloom.json").write_text(json.dumps({**fields, **changes}))
    with pytest.raises(UserError, match=rf"seqloom.json is damaged \(.*{message}.*\): make the data set again"):
        read_metadata(tmp_path)


def made(path, borders, vocab_size=100, column="cu_seqlens", kind="int32"):
    """A folder that says it is packed by documents, row r of which starts with the id r and has the given borders."""
    rows = len(borders)
    features = Features({"input_ids": List(Value("int32"), length=4), "labels": List(Value("int32"), length=4), column: List(Value(kind))})
    ids = [[row, 1, 2, 3] for row in range(rows)]
    Dataset.from_dict({"input_ids": ids, "labels": ids, column: borders}, features=features).save_to_disk(str(path))
    write_metadata(path, Metadata(4, vocab_size, "t", "0", "c", "0", rows, rows * 4, rows, pack="documents", typical_row=(1, 3)))
    return path


@pytest.mark.parametrize("bad", [[], [0], [1, 4], [0, 3], [0, 2, 2, 4], [0, 3, 1, 4], [0, 8], None], ids=str)
def test_damaged_borders_are_named(tmp_path, bad, monkeypatch):
    monkeypatch.setattr("seqloom.data.documents.SCAN_ROWS", 2)
    good = [[0, 4], [0, 1, 4], [0, 1, 2, 3, 4]]
    assert open_dataset(made(tmp_path / "good", good)).rows == 3
    with pytest.raises(UserError, match=r"row 3 of .*bad has damaged borders .*from 0 to 4\): make it again") as caught:
        open_dataset(made(tmp_path / "bad", [*good, bad, [0, 4]]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("changes", [{"column": "borders"}, {"kind": "int64"}, {"kind": "string"}], ids=str)
def test_a_missing_or_foreign_column_is_named(tmp_path, changes):
    borders = [["0", "4"]] if changes.get("kind") == "string" else [[0, 4]]
    with pytest.raises(UserError, match=r"has no column cu_seqlens of their borders: make it again with --overwrite"):
        open_dataset(made(tmp_path / "set", borders, **changes))


def test_check_vocab_is_not_about_borders(tmp_path):
    dataset = open_dataset(made(tmp_path / "set", [[0, 4]] * 3))
    dataset.check_vocab(4)
    with pytest.raises(UserError, match="row 0 .* token id 3"):
        dataset.check_vocab(3)


def test_a_micro_batch_of_documents(tmp_path):
    dataset = open_dataset(made(tmp_path / "set", [[0, 4], [0, 1, 4], [0, 2, 3, 4]]))
    assert dataset.read_cu_seqlens(np.array([2, 0, 1])).tolist() == [0, 2, 3, 4, 8, 9, 12]
    seen = set()
    for step, _ in zip(Loader(dataset, 0, 3, 0, 1, 3, 1), range(6), strict=False):
        batch = step[0]
        seen.add(tuple(batch["input_ids"][:, 0].tolist()))
        positions = [[[0, 1, 2, 3], [0, 0, 1, 2], [0, 1, 0, 0]][row] for row in batch["input_ids"][:, 0]]
        assert batch["position_ids"].tolist() == positions
        assert batch["cu_seqlens"].tolist() == [place for place, x in enumerate(sum(positions, [])) if x == 0] + [12]
    assert len(seen) > 1


def test_types_and_shapes(folders):
    for pack in ("documents", "stream"):
        for batch in Loader(open_dataset(folders / pack), 0, 12, 1, 2, 3, 2).next_step():
            assert type(batch) is dict and list(batch) == ["input_ids", "labels", "position_ids", "cu_seqlens"]
            assert all(type(tensor) is torch.Tensor and tensor.dtype == torch.int64 and tensor.is_contiguous() for tensor in batch.values())
            cu_seqlens = batch.pop("cu_seqlens")
            assert all(tensor.shape == (3, LENGTH) for tensor in batch.values())
            assert cu_seqlens.ndim == 1 and (cu_seqlens.diff() > 0).all() and cu_seqlens[0] == 0 and cu_seqlens[-1] == 3 * LENGTH
            assert set(range(0, 3 * LENGTH + 1, LENGTH)) <= set(cu_seqlens.tolist())


def test_a_stream_has_its_rows_as_borders(folders):
    batch = Loader(open_dataset(folders / "stream"), 0, 3, 0, 1, 3, 1).next_step()[0]
    assert batch["cu_seqlens"].tolist() == [0, LENGTH, 2 * LENGTH, 3 * LENGTH]
    assert torch.equal(batch["position_ids"], torch.arange(LENGTH).expand(3, LENGTH))


sizes = st.sampled_from([(1, 1, 12), (1, 12, 1), (2, 3, 2), (3, 2, 2), (4, 1, 3), (6, 2, 1), (12, 1, 1)])


def steps_of(dataset, size, count, state=None):
    """Each step as what its rows look like one by one, in global order; and the state behind them."""
    dp_size, micro, accumulation = size
    loaders = [Loader(dataset, 5, 12, rank, dp_size, micro, accumulation) for rank in range(dp_size)]
    for loader in loaders:
        loader.load_state_dict(state or loader.state_dict())
    return [[row for loader in loaders for batch in loader.next_step() for row in rows_of(batch)] for _ in range(count)], loaders[
        0
    ].state_dict()


def rows_of(batch):
    cu_seqlens = batch["cu_seqlens"].numpy()
    length = batch["input_ids"].shape[1]
    for index, parts in enumerate(zip(*(batch[name].tolist() for name in ("input_ids", "labels", "position_ids")), strict=True)):
        start = index * length
        inside = cu_seqlens[(cu_seqlens >= start) & (cu_seqlens <= start + length)] - start
        yield (*parts, inside.tolist())


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(before=sizes, after=sizes, pack=st.sampled_from(["documents", "stream"]), steps=st.integers(0, 3))
def test_sharding_and_resuming_change_nothing(folders, before, after, pack, steps):
    dataset = open_dataset(folders / pack)
    first, state = steps_of(dataset, before, steps)
    second, _ = steps_of(dataset, after, 2, json.loads(json.dumps(state)))
    assert first + second == steps_of(dataset, (1, 12, 1), steps + 2)[0]


def test_both_ways_visit_the_rows_in_the_same_order(folders):
    ours, theirs = (steps_of(open_dataset(folders / pack), (2, 3, 2), 4) for pack in ("documents", "stream"))
    assert ours[1] == theirs[1]
    assert [[row[0] for row in step] for step in ours[0]] == [[row[0] for row in step] for step in theirs[0]]
