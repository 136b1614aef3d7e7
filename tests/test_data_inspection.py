"""bookcorpus.py --inspect: what it counts is what a count by hand gives, and what does not count as a label is visible."""

import io
import json
import re

import numpy as np
import pytest
from datasets import Dataset

from seqloom.data.build import build
from seqloom.data.corpora import Corpus
from seqloom.data.inspection import count_labels, inspect
from seqloom.data.loader import open_dataset
from seqloom.data.packing import IGNORED
from seqloom.data.settings import Settings
from seqloom.data.tokenizer import train_tokenizer
from seqloom.errors import UserError

LENGTH = 24


@pytest.fixture(scope="module")
def sources():
    texts = Dataset.from_dict({"text": [f"document {i} " + "says " * (i % 9) for i in range(40)]})
    chats = [[{"role": "user", "content": f"ask {i}"}, {"role": "assistant", "content": f"answer {i}"}] for i in range(10)]
    return [Corpus("texts", texts), Corpus("talk", Dataset.from_dict({"messages": chats}), "messages")]


@pytest.fixture(scope="module")
def tokenizer(sources):
    made = train_tokenizer([source.documents for source in sources], 300)
    made.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"
    made.chat_template += "{% if add_generation_prompt %}<assistant>{% endif %}"
    return made


@pytest.fixture(scope="module")
def folders(sources, tokenizer, tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    for pack in ("documents", "stream"):
        build(sources, tokenizer, "train:300", root / pack, Settings(LENGTH, pack, validation=0.2))
    return root


def shown(path, rows=3):
    out = io.StringIO()
    inspect(path, rows, out)
    return out.getvalue()


def fact(text, name):
    return re.search(rf"^  {name} +(.*)$", text, re.MULTILINE)[1]


@pytest.mark.parametrize("pack", ["documents", "stream"])
def test_the_facts_are_those_of_a_count_by_hand(folders, pack):
    data, said = open_dataset(folders / pack), shown(folders / pack)
    positions = data.rows * LENGTH
    labels = int((data.read(np.arange(data.rows))[1] != IGNORED).sum())
    assert labels == data.metadata.labels == count_labels(data)
    assert fact(said, "labels that count") == f"{labels / positions:.3%} of the positions"
    assert fact(said, "padding") == f"{(positions - data.metadata.tokens) / positions:.3%} of the positions"
    assert "from texts: 32 documents" in said and "from talk: 8 documents" in said
    assert f"{folders / pack / 'validation'}: " in said and "from talk: 2 documents" in said
    borders = np.array(open_dataset(folders / "documents").read_cu_seqlens(np.arange(data.rows)))
    if pack == "documents":
        per_row = np.bincount(borders[:-1] // LENGTH)
        per_row[-1] -= positions > data.metadata.tokens
        assert fact(said, "documents per row") == f"{per_row.min()} at least, {np.median(per_row):g} in the median, {per_row.max()} at most"


def test_documents_that_are_cut(tokenizer, tmp_path):
    texts = ["a" * 10, "b" * 50, "c" * 9, "d" * 9, "e" * 12]
    made, _ = build([Corpus("x", Dataset.from_dict({"text": texts}))], tokenizer, "t", tmp_path / "set", Settings(12))
    ends = np.cumsum([len(tokenizer(text)["input_ids"]) + 1 for text in texts])
    by_hand = sum(first // 12 != (end - 1) // 12 for first, end in zip([0, *ends], ends, strict=False))
    assert made.cut == by_hand > 0 and fact(shown(tmp_path / "set"), "cut by a row's end").startswith(f"{by_hand} documents")


def test_what_does_not_count_is_marked(sources, tokenizer, tmp_path):
    build(sources[1:], tokenizer, "t", tmp_path / "set", Settings(200))
    said = shown(tmp_path / "set", 1)
    assert "-- document 1 of " in said and "⟦<user>ask 0</><assistant>⟧answer 0</>\n" in said
    assert said.count("row ") - said.count("per row") == 1 and "more documents" in said


def test_on_a_terminal_it_is_dim(folders, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    out = Terminal()
    inspect(folders / "documents", 2, out)
    assert "\x1b[2m" in out.getvalue() and "⟦" not in out.getvalue()


def test_long_documents_are_shown_from_both_ends(tokenizer, tmp_path):
    build([Corpus("x", Dataset.from_dict({"text": ["begin " + "x y z " * 500 + "fin"]}))], tokenizer, "t", tmp_path / "set", Settings(4000))
    said = shown(tmp_path / "set", 1)
    assert re.search(r"⟧egin .* \.\.\. [\d,]+ tokens \.\.\. .*fin<\|endoftext\|>\n-- padding: ", said) and len(said) < 2500


def test_sets_of_older_versions_are_counted(folders, tmp_path, sources, tokenizer):
    build(sources[:1], tokenizer, "t", tmp_path / "set", Settings(LENGTH))
    now = shown(tmp_path / "set")
    file = tmp_path / "set" / "seqloom.json"
    fields = json.loads(file.read_text())
    for name in ("parts", "weights", "chat_labels", "chat_template", "labels", "cut"):
        del fields[name]
    file.write_text(json.dumps(fields))
    then = shown(tmp_path / "set")
    assert [line for line in now.splitlines() if "cut by" not in line] == then.splitlines()
    assert build(sources[:1], tokenizer, "t", tmp_path / "set", Settings(LENGTH))[1] is False


def test_missing_and_damaged_sets_are_a_sentence(tmp_path, sources, tokenizer):
    with pytest.raises(UserError, match="there is no data set"):
        shown(tmp_path / "gone")
    build(sources[:1], tokenizer, "t", tmp_path / "set", Settings(LENGTH))
    with pytest.raises(UserError, match="--inspect is -1"):
        shown(tmp_path / "set", -1)
    (tmp_path / "set" / "tokenizer" / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="the tokenizer in .* is gone or damaged"):
        shown(tmp_path / "set")
    rows = tmp_path / "set" / "rows-00000.arrow"
    rows.write_bytes(rows.read_bytes()[:-400])
    with pytest.raises(UserError, match="make it again"):
        shown(tmp_path / "set")
