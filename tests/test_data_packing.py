"""Packing loses and repeats no token: exact on random streams, and through the saved folder."""

import json
import os

import numpy as np
import pytest
from datasets import Dataset, load_from_disk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from seqloom.data.build import build
from seqloom.data.corpora import Corpus
from seqloom.data.encode import TextEncoder
from seqloom.data.folders import staged_folder
from seqloom.data.metadata import Metadata, read_metadata, write_metadata
from seqloom.data.packing import IGNORED, pack_stream
from seqloom.data.pieces import tokenize
from seqloom.data.settings import Settings
from seqloom.data.tokenizer import load_tokenizer, train_tokenizer
from seqloom.errors import UserError

PAD = 7
streams = st.lists(st.lists(st.integers(0, 50), max_size=40), max_size=8)


def packed(pieces: list[list[int]], seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    blocks = list(pack_stream((np.array(piece, np.int32) for piece in pieces), seq_len, PAD))
    empty = np.empty((0, seq_len), np.int32)
    return tuple(np.concatenate([empty, *(block[i] for block in blocks)]) for i in range(2))


@given(pieces=streams, seq_len=st.integers(1, 17))
def test_no_token_is_lost_or_repeated(pieces, seq_len):
    stream = [token for piece in pieces for token in piece]
    input_ids, labels = packed(pieces, seq_len)
    assert input_ids.dtype == labels.dtype == np.int32
    assert len(input_ids) == -(-len(stream) // seq_len)
    flat = input_ids.reshape(-1)
    assert flat[: len(stream)].tolist() == stream
    assert set(flat[len(stream) :].tolist()) <= {PAD}
    assert labels[labels != IGNORED].tolist() == stream[1:]
    assert (labels.reshape(-1)[max(len(stream) - 1, 0) :] == IGNORED).all()


@given(pieces=streams, seq_len=st.integers(1, 17))
def test_labels_are_the_next_inputs(pieces, seq_len):
    input_ids, labels = packed(pieces, seq_len)
    counts = labels.reshape(-1)[:-1] != IGNORED
    assert (labels.reshape(-1)[:-1][counts] == input_ids.reshape(-1)[1:][counts]).all()


@given(stream=st.lists(st.integers(0, 50), max_size=100), cuts=st.lists(st.integers(0, 100), max_size=6), seq_len=st.integers(1, 9))
def test_how_the_stream_is_cut_makes_no_difference(stream, cuts, seq_len):
    bounds = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    pieces = [stream[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
    for ours, whole in zip(packed(pieces, seq_len), packed([stream], seq_len), strict=True):
        assert (ours == whole).all()


def test_memory_is_bounded_by_a_block():
    """Rows come out while the stream is still going in."""
    taken = 0

    def stream():
        nonlocal taken
        for _ in range(1000):
            taken += 10
            yield np.arange(10, dtype=np.int32)

    next(pack_stream(stream(), 16, PAD))
    assert taken <= 20


@pytest.fixture(scope="module")
def corpus():
    words = ["alpha", "beta", "gamma", "delta", " ", "\n", "naïve", "漢字", "🧵"]
    rng = np.random.default_rng(0)
    documents = ["".join(rng.choice(words, size=rng.integers(1, 60))) for _ in range(120)]
    documents[5] = ""  # an empty document leaves no trace
    documents[6] = None
    return Dataset.from_dict({"text": documents})


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return train_tokenizer([corpus], 300)


def expected_stream(corpus, tokenizer):
    stream = []
    for text in corpus["text"]:
        ids = tokenizer(text or "", add_special_tokens=False)["input_ids"]
        stream += [*ids, tokenizer.eos_token_id] if ids else []
    return stream


def save(corpus, tokenizer, path, length=16, corpus_name="words", tokenizer_name="train:300", **options):
    return build([Corpus(corpus_name, corpus)], tokenizer, tokenizer_name, path, Settings(length, **{"pack": "stream", **options}))


@pytest.mark.parametrize("num_proc", [1, 2])
@pytest.mark.parametrize("length", [1, 16, 100_000])
def test_saved_data_set_holds_the_stream(corpus, tokenizer, tmp_path, length, num_proc):
    metadata, made = save(corpus, tokenizer, tmp_path / "set", length, num_proc=num_proc)
    stream = expected_stream(corpus, tokenizer)
    rows = load_from_disk(str(tmp_path / "set")).with_format("numpy", dtype=np.int32)
    input_ids, labels = rows["input_ids"][:], rows["labels"][:]
    assert made and {str(feature.feature.dtype) for feature in rows.features.values()} == {"int32"}
    assert (metadata.rows, metadata.tokens, metadata.documents) == (len(rows), len(stream), 118)
    assert input_ids.shape == labels.shape == (-(-len(stream) // length), length)
    assert input_ids.reshape(-1)[: len(stream)].tolist() == stream
    assert labels[labels != IGNORED].tolist() == stream[1:]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(documents=st.lists(st.text(max_size=30), min_size=1, max_size=12), length=st.integers(1, 20))
def test_any_text_survives_the_round_trip(tmp_path_factory, tokenizer, documents, length):
    documents = [text for text in documents if "<|endoftext|>" not in text] + ["end"]
    path = tmp_path_factory.mktemp("sets") / "set"
    metadata, _ = save(Dataset.from_dict({"text": documents}), tokenizer, path, length)
    ids = [token for row in load_from_disk(str(path))["input_ids"] for token in row][: metadata.tokens]
    assert tokenizer.decode(ids) == "".join(f"{text}<|endoftext|>" for text in documents if text)


def test_folder_says_what_it_is(corpus, tokenizer, tmp_path):
    metadata, _ = save(corpus, tokenizer, tmp_path / "set")
    fields = json.loads((tmp_path / "set" / "seqloom.json").read_text())
    assert fields["sequence_length"] == 16 and fields["vocab_size"] == len(tokenizer) and fields["tokenizer"] == "train:300"
    assert fields["corpus"] == "words" and fields["version"] == 1
    assert read_metadata(tmp_path / "set") == metadata
    again = load_tokenizer(str(tmp_path / "set" / "tokenizer"))
    assert again.get_vocab() == tokenizer.get_vocab() and again.eos_token_id == tokenizer.eos_token_id
    assert again("naïve 漢字")["input_ids"] == tokenizer("naïve 漢字")["input_ids"]
    assert not any(path.suffix in (".pkl", ".pt") for path in (tmp_path / "set").rglob("*"))
    assert sorted(os.listdir(tmp_path)) == ["set"]  # nothing left beside it
    assert not (tmp_path / "set" / "scratch").exists()


def test_same_input_same_rows(corpus, tokenizer, tmp_path):
    for name in "ab":
        save(corpus, tokenizer, tmp_path / name)
    a, b = (load_from_disk(str(tmp_path / name)) for name in "ab")
    assert a["input_ids"][:] == b["input_ids"][:]
    assert read_metadata(tmp_path / "a") == read_metadata(tmp_path / "b")


def test_made_again_with_the_same_settings_is_left_alone(corpus, tokenizer, tmp_path):
    first, _ = save(corpus, tokenizer, tmp_path / "set")
    before = os.stat(tmp_path / "set" / "seqloom.json").st_mtime_ns
    second, made = save(corpus, tokenizer, tmp_path / "set", corpus_name="the same words by another name")
    assert (second, made) == (first, False)
    assert os.stat(tmp_path / "set" / "seqloom.json").st_mtime_ns == before


def test_other_settings_are_refused_and_overwrite_replaces(corpus, tokenizer, tmp_path):
    save(corpus, tokenizer, tmp_path / "set")
    with pytest.raises(UserError, match="sequence_length is 16 there, not 32.*--overwrite"):
        save(corpus, tokenizer, tmp_path / "set", 32)
    with pytest.raises(UserError, match="corpus words holds other documents or rules now"):
        save(corpus.select(range(50)), tokenizer, tmp_path / "set")
    with pytest.raises(UserError, match="tokenizer is train:300 there, not train:280"):
        save(corpus, train_tokenizer([corpus], 280), tmp_path / "set", tokenizer_name="train:280")
    with pytest.raises(UserError, match="tokenizer train:300 holds other documents or rules now"):
        save(corpus, train_tokenizer([corpus], 280), tmp_path / "set")
    assert read_metadata(tmp_path / "set").sequence_length == 16
    save(corpus, tokenizer, tmp_path / "set", 32, overwrite=True)
    assert read_metadata(tmp_path / "set").sequence_length == 32
    assert os.listdir(tmp_path) == ["set"]


def test_something_else_is_never_replaced(corpus, tokenizer, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"holds something else \(it has no seqloom.json\)"):
        save(corpus, tokenizer, tmp_path / "thesis", overwrite=True)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"


def test_an_empty_folder_is_filled(corpus, tokenizer, tmp_path):
    (tmp_path / "set").mkdir()
    _, made = save(corpus, tokenizer, tmp_path / "set")
    assert made


def test_unwritable_folder(corpus, tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"):
        save(corpus, tokenizer, tmp_path / "file" / "set")


def test_a_corpus_without_tokens(tokenizer, tmp_path):
    with pytest.raises(UserError, match="gives no tokens"):
        save(Dataset.from_dict({"text": ["", None]}), tokenizer, tmp_path / "set")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("length", [0, -5])
def test_lengths_are_positive(corpus, tokenizer, tmp_path, length):
    with pytest.raises(UserError, match=f"--sequence_length is {length}"):
        save(corpus, tokenizer, tmp_path / "set", length)


def test_tokenize_appends_the_end_of_text(corpus, tokenizer, tmp_path):
    store = tokenize(corpus, TextEncoder(tokenizer), tmp_path)
    assert store.lengths[5] == store.lengths[6] == 0
    full = np.flatnonzero(store.lengths)
    assert all(store.read(full[i : i + 1])[-1] == tokenizer.eos_token_id for i in range(len(full)))


def test_a_failure_leaves_the_old_folder_whole(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "marker").write_text("old")
    with pytest.raises(RuntimeError), staged_folder(tmp_path / "set", "marker", overwrite=True) as staging:
        (staging / "marker").write_text("new")
        raise RuntimeError
    assert (tmp_path / "set" / "marker").read_text() == "old"
    assert os.listdir(tmp_path) == ["set"]


def test_a_full_disk_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match="disk of .* is full"), staged_folder(tmp_path / "set", "marker"):
        raise OSError(28, "No space left on device")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is damaged"), ("[]", "is damaged"), ('{"rows": 1}', "is damaged")],
)
def test_damaged_metadata(tmp_path, text, message):
    (tmp_path / "seqloom.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read_metadata(tmp_path)


def test_metadata_of_another_version(tmp_path):
    write_metadata(tmp_path, Metadata(1, 2, "t", "d", "c", "d", 1, 1, 1, version=99))
    with pytest.raises(UserError, match="format 99"):
        read_metadata(tmp_path)
