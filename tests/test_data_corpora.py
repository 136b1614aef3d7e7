"""Every kind of corpus becomes documents in a fixed order; tokenizers load or train; what cannot be read says what to give instead."""

import json
import sysconfig
from pathlib import Path

import datasets
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from seqloom.data.corpora import corpus_digest, load_corpus
from seqloom.data.hub import hub_clients, hub_reachable
from seqloom.data.tokenizer import END_OF_TEXT, load_tokenizer, train_tokenizer, training_vocab
from seqloom.errors import UserError


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    """Files read by `datasets` are cached in the test's own folder; the hub does not answer."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("seqloom.data.hub.hub_reachable", lambda: False)


@pytest.fixture(scope="module")
def stdlib():
    return load_corpus("stdlib")


@pytest.fixture
def files(tmp_path):
    """Two documents in each format; the file names are in the order b, a on purpose."""
    (tmp_path / "b.txt").write_text("second\nline two\n", encoding="utf-8")
    (tmp_path / "a.txt").write_text("first naïve 漢字\n\nmore", encoding="utf-8")
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(["one", "two\nlines"])))
    Dataset.from_dict({"text": ["p", "q"], "n": [1, 2]}).to_parquet(tmp_path / "d.parquet")
    return tmp_path


def test_stdlib_is_python_source(stdlib):
    assert stdlib.column_names == ["text"] and len(stdlib) > 300
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = set(stdlib["text"])
    for name in ("argparse.py", "json/decoder.py", "asyncio/base_events.py"):
        assert (root / name).read_text(encoding="utf-8") in texts
    assert all(stdlib["text"])


def test_stdlib_is_the_same_every_time(stdlib):
    assert corpus_digest(load_corpus("stdlib")) == corpus_digest(stdlib)


def test_stdlib_leaves_out_what_is_not_its_own(tmp_path, monkeypatch):
    for name, data in {
        "z.py": b"z = 1",
        "a.py": b"a = 1",
        "pkg/m.py": b"m = 1",
        "latin.py": b"# -*- coding: latin-1 -*-\n# \xe9",
        "data.bin": b"\x00",
        "empty.py": b"",
        "site-packages/other.py": b"other",
        "__pycache__/c.py": b"cached",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert load_corpus("stdlib")["text"][:] == ["a = 1", "z = 1", "m = 1"]


def test_no_standard_library_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(UserError, match="has no .py sources"):
        load_corpus("stdlib")


def test_text_file_is_one_document(files):
    assert load_corpus(str(files / "a.txt"))["text"][:] == ["first naïve 漢字\n\nmore"]


def test_list_keeps_its_order_and_glob_sorts(files):
    assert load_corpus(f"{files}/b.txt,{files}/a.txt")["text"][0].startswith("second")
    assert load_corpus(f"{files}/*.txt")["text"][0].startswith("first")


def test_jsonl_and_parquet(files):
    jsonl, parquet = load_corpus(str(files / "c.jsonl")), load_corpus(str(files / "d.parquet"))
    assert jsonl["text"][:] == ["one", "two\nlines"] and parquet["text"][:] == ["p", "q"]
    assert jsonl.column_names == parquet.column_names == ["text"]


def test_a_changed_file_is_read_again(files):
    assert load_corpus(str(files / "c.jsonl"))["text"][0] == "one"
    (files / "c.jsonl").write_text('{"text": "changed, and longer"}\n')
    assert load_corpus(str(files / "c.jsonl"))["text"][:] == ["changed, and longer"]


def test_folders(files, tmp_path):
    saved = Dataset.from_dict({"text": ["x", "y"], "other": [0, 1]})
    saved.save_to_disk(tmp_path / "saved")
    DatasetDict(train=saved, test=saved.select([0])).save_to_disk(tmp_path / "splits")
    (tmp_path / "shards").mkdir()
    for i in (1, 0):
        Dataset.from_dict({"text": [f"shard {i}"]}).to_parquet(tmp_path / "shards" / f"part-{i}.parquet")
    assert load_corpus(str(tmp_path / "saved"))["text"][:] == ["x", "y"]
    assert load_corpus(str(tmp_path / "splits"))["text"][:] == ["x", "y"]
    assert load_corpus(str(tmp_path / "shards"))["text"][:] == ["shard 0", "shard 1"]


def test_folders_that_are_no_corpus(tmp_path):
    with pytest.raises(UserError, match="holds no dataset"):
        load_corpus(str(tmp_path))
    DatasetDict(test=Dataset.from_dict({"text": ["x"]})).save_to_disk(tmp_path / "splits")
    with pytest.raises(UserError, match="has the splits test but no `train`"):
        load_corpus(str(tmp_path / "splits"))
    (tmp_path / "seqloom.json").write_text("{}")
    with pytest.raises(UserError, match="already tokenized and packed"):
        load_corpus(str(tmp_path))


@pytest.mark.parametrize("name", ["nothing.txt", "*.parquet", "a.txt,gone.txt"])
def test_missing_files(files, monkeypatch, name):
    (files / "d.parquet").unlink()
    monkeypatch.chdir(files)
    with pytest.raises(UserError, match="there is no data file .*`stdlib`"):
        load_corpus(name)


@pytest.mark.parametrize("name", ["./gone", "/gone/for/good", "~/gone"])
def test_missing_folders_are_no_hub_ids(name):
    with pytest.raises(UserError, match="there is no data folder or file"):
        load_corpus(name)


def test_kinds_do_not_mix(files):
    with pytest.raises(UserError, match="must be of one kind"):
        load_corpus(f"{files}/a.txt,{files}/c.jsonl")


@pytest.mark.parametrize(
    ("name", "data"), [("x.txt", b"\xff\xfe\xfa"), ("x.jsonl", b'{"text": "a"}\n{"text": oops}\n'), ("x.parquet", b"no")]
)
def test_damaged_files_are_named(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=rf"cannot read .*{name}"):
        load_corpus(str(tmp_path / name))


def test_text_column_is_needed(tmp_path):
    Dataset.from_dict({"content": ["x"], "id": [1]}).save_to_disk(tmp_path / "set")
    with pytest.raises(UserError, match="no column `text` but content, id"):
        load_corpus(str(tmp_path / "set"))
    Dataset.from_dict({"text": [1, 2]}).save_to_disk(tmp_path / "numbers")
    with pytest.raises(UserError, match="not strings"):
        load_corpus(str(tmp_path / "numbers"))


def test_hub_without_network_names_the_alternatives():
    with pytest.raises(UserError, match="data set bookcorpus/bookcorpus from the hub .*local dataset folder.*`stdlib`"):
        load_corpus("bookcorpus/bookcorpus")


def test_hub_scripts_are_read_through_their_parquet_conversion(monkeypatch):
    asked = []

    def load_dataset(name, split, revision=None):
        asked.append((name, split, revision))
        if revision is None:
            raise RuntimeError("Dataset scripts are no longer supported, but found bookcorpus.py")
        return Dataset.from_dict({"text": ["from the hub"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_corpus("bookcorpus/bookcorpus")["text"][:] == ["from the hub"]
    assert asked == [("bookcorpus/bookcorpus", "train", None), ("bookcorpus/bookcorpus", "train", "refs/convert/parquet")]


def test_hub_clients_are_offline_only_inside():
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    with pytest.raises(KeyError), hub_clients():
        assert constants.HF_HUB_OFFLINE and datasets.config.HF_HUB_OFFLINE
        raise KeyError
    assert before == constants.HF_HUB_OFFLINE == datasets.config.HF_HUB_OFFLINE


def test_hub_reachable_asks_once_and_not_when_offline(monkeypatch):
    from huggingface_hub import constants

    def fail(*_, **__):
        raise AssertionError("asked the network")

    monkeypatch.setattr("urllib.request.urlopen", fail)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not hub_reachable.__wrapped__()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    assert not hub_reachable.__wrapped__()


@given(documents=st.lists(st.text(max_size=5), min_size=1, max_size=5), other=st.lists(st.text(max_size=5), min_size=1, max_size=5))
@settings(deadline=None, max_examples=40)
def test_digest_tells_corpora_apart(documents, other):
    a, b = (corpus_digest(Dataset.from_dict({"text": texts})) for texts in (documents, other))
    assert (a == b) == (documents == other)


def test_trained_tokenizer_is_deterministic_and_lossless(stdlib):
    corpus = stdlib.select(range(60))
    first, second = (train_tokenizer([corpus], 1000) for _ in range(2))
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    assert len(first) == 1000 and first.eos_token == END_OF_TEXT and first.eos_token_id == 0
    for text in [*corpus["text"][:5], "naïve 漢字 🧵\r\n\t  two  spaces ", "\x00\x7f"]:
        assert first.decode(first(text, add_special_tokens=False)["input_ids"]) == text


@given(st.text())
@settings(deadline=None, max_examples=100)
def test_every_text_is_encoded_without_loss(text):
    tokenizer = _tiny_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text and all(0 <= token < len(tokenizer) for token in ids)


def _tiny_tokenizer(cache=[]):  # noqa: B006
    if not cache:
        cache.append(train_tokenizer([Dataset.from_dict({"text": ["a small text to train on"]})], 300))
    return cache[0]


def test_a_small_corpus_gives_a_smaller_vocabulary():
    assert 257 <= len(_tiny_tokenizer()) < 300


def test_large_corpora_are_sampled(monkeypatch):
    corpus = Dataset.from_dict({"text": ["ab " * 100, "xyz " * 100] * 50})
    monkeypatch.setattr("seqloom.data.tokenizer.TRAINING_BYTES", corpus.data.nbytes // 2)
    assert "xyz" not in train_tokenizer([corpus], 270).get_vocab()


@pytest.mark.parametrize("name", ["train:", "train:many", "train:256", "train:-5", "train:0"])
def test_bad_training_sizes(name):
    with pytest.raises(UserError, match="at least 257"):
        training_vocab(name)


def test_tokenizers_load_from_a_folder(tmp_path):
    _tiny_tokenizer().save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).get_vocab() == _tiny_tokenizer().get_vocab()


def test_tokenizers_that_cannot_be_used(tmp_path):
    for name in ("./gone", str(tmp_path / "gone")):
        with pytest.raises(UserError, match="there is no tokenizer folder"):
            load_tokenizer(name)
    with pytest.raises(UserError, match=r"cannot load the tokenizer .*train:4096"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(UserError, match=r"cannot load the tokenizer nobody/nothing .*train:4096"):
        load_tokenizer("nobody/nothing")
    with pytest.raises(UserError, match="needs a corpus"):
        load_tokenizer("train:4096")
    headless = _tiny_tokenizer().__class__(tokenizer_object=_tiny_tokenizer().backend_tokenizer)
    headless.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no end-of-text token"):
        load_tokenizer(str(tmp_path))
