"""Tokenizing in pieces: killed half way it goes on with what is finished, what is stale is made again, and threads equal processes."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from seqloom.data import pieces
from seqloom.data.build import build
from seqloom.data.corpora import Corpus
from seqloom.data.encode import TextEncoder
from seqloom.data.loader import open_dataset
from seqloom.data.pieces import only_one, tokenize
from seqloom.data.prepare import prepare
from seqloom.data.progress import progress
from seqloom.data.rows import RowWriter
from seqloom.data.settings import Settings
from seqloom.data.tokenizer import load_tokenizer, train_tokenizer
from seqloom.data.tokens import TokenStore, holds, write_tokens
from seqloom.errors import UserError

SLOW = """
import sys, time
from seqloom.data import pieces, tokens
from seqloom.data.prepare import prepare
pieces.MIN_BYTES = 2000
def do(work, piece, make=pieces.Work.do):
    time.sleep(float(sys.argv[1]))
    return make(work, piece)
pieces.Work.do = do
prepare(*sys.argv[2:5], 32, num_proc=int(sys.argv[5]))
"""


@pytest.fixture(scope="module")
def corpus():
    rng = np.random.default_rng(0)
    return Dataset.from_dict({"text": [f"{i}: " + "some words " * int(rng.integers(0, 30)) for i in range(400)]})


@pytest.fixture(scope="module")
def tokenizer_folder(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([corpus], 300).save_pretrained(folder)
    return folder


@pytest.fixture
def tokenizer(tokenizer_folder):
    return load_tokenizer(str(tokenizer_folder))


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(pieces, "MIN_BYTES", 2000)


def run(corpus_folder, tokenizer_folder, target, seconds=0.0, num_proc=1):
    command = [sys.executable, "-c", SLOW, *map(str, (seconds, corpus_folder, tokenizer_folder, target, num_proc))]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)


@pytest.mark.parametrize("num_proc", [1, 2])
def test_killed_half_way_it_goes_on_with_the_finished_pieces(corpus, tokenizer_folder, tmp_path, small, num_proc, capsys):
    corpus.save_to_disk(str(tmp_path / "text"))
    waiting = tmp_path / ".set.pieces"
    process = run(tmp_path / "text", tokenizer_folder, tmp_path / "set", 0.1, num_proc)
    deadline = time.monotonic() + 120
    while len(list(waiting.glob("*/piece-*.arrow"))) < 6:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    wait_for_the_end_of_all(process.pid)
    left = sorted(waiting.glob("*/piece-*.arrow"))
    when = {path.name: path.stat().st_mtime_ns for path in left}
    prepare(str(tmp_path / "text"), str(tokenizer_folder), str(tmp_path / "set"), 32, num_proc=num_proc)
    found = re.search(r"goes on: (\d+) of 400 documents of .* are tokenized already", capsys.readouterr().err)
    pieces_in_all = corpus_pieces(corpus)
    assert found
    assert 6 <= len(when) < pieces_in_all and abs(int(found[1]) / 400 - len(when) / pieces_in_all) < 0.03
    assert sorted(os.listdir(tmp_path)) == ["set", "text"]  # neither pieces nor half a folder is left
    whole, _ = build([Corpus("text", corpus)], load_tokenizer(str(tokenizer_folder)), "t", tmp_path / "whole", Settings(32))
    ours, theirs = (open_dataset(tmp_path / name) for name in ("set", "whole"))
    assert ours.table[:] == theirs.table[:] and ours.metadata.tokens == whole.tokens


def wait_for_the_end_of_all(group):
    """The processes that a killed one had started end by themselves."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("a process outlived the one that started it")


def corpus_pieces(corpus):
    return len(pieces._plan(corpus, list, Path(".")).bounds) - 1


def stop_after(monkeypatch, count):
    """The pieces behind the first `count` cannot be made."""
    made = []

    def do(work, piece, make=pieces.Work.do):
        if len(made) >= count:
            raise KeyboardInterrupt
        made.append(piece)
        return make(work, piece)

    monkeypatch.setattr(pieces.Work, "do", do)
    monkeypatch.setattr(pieces, "THREADS", 1)
    return made


def test_only_what_was_made_of_the_same_is_used_again(corpus, tokenizer, tmp_path, small, monkeypatch):
    """After a stop, other packing finds the pieces; other documents or another tokenizer do not."""
    source, other = Corpus("text", corpus), train_tokenizer([corpus], 290)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 5)
        build([source], tokenizer, "t", tmp_path / "set", Settings(32))
    changes = [([source], tokenizer, 64, 5), ([Corpus("text", corpus.select(range(399)))], tokenizer, 32, 0), ([source], other, 32, 0)]
    for sources, its, length, expected in changes:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            made = stop_after(patch, 3)
            build(sources, its, "t", tmp_path / "set", Settings(length))
        assert set(made).isdisjoint(range(5)) if expected else made == [0, 1, 2]
    assert build([source], tokenizer, "t", tmp_path / "set", Settings(64))[1]
    assert os.listdir(tmp_path) == ["set"]


def test_damaged_pieces_are_made_again(corpus, tokenizer, tmp_path, small, capsys):
    whole = tokenize(corpus, TextEncoder(tokenizer), tmp_path / "a")
    tokens = whole.read(np.arange(400))
    files = sorted((tmp_path / "a").iterdir())
    files[0].write_bytes(files[0].read_bytes()[:-20])
    files[1].write_bytes(b"")
    files[2].unlink()
    write_tokens(files[3], [[np.array([1], np.int32)]])
    again = tokenize(corpus, TextEncoder(tokenizer), tmp_path / "a")
    assert (again.read(np.arange(400)) == tokens).all() and (again.lengths == whole.lengths).all()
    assert "goes on: " in capsys.readouterr().err


def test_processes_give_what_threads_give(corpus, tokenizer, tmp_path, small):
    one, two = (tokenize(corpus, TextEncoder(tokenizer), tmp_path / str(count), count) for count in (1, 2))
    assert (one.lengths == two.lengths).all() and (one.read(np.arange(400)) == two.read(np.arange(400))).all()
    expected = tokenizer(corpus["text"][:], add_special_tokens=False)["input_ids"]
    assert one.read(np.arange(400)).tolist() == [token for ids in expected for token in [*ids, tokenizer.eos_token_id]]


def test_a_process_that_is_killed_is_a_sentence(corpus, tokenizer, tmp_path, small, monkeypatch):
    monkeypatch.setattr(pieces.Work, "do", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(UserError, match="a process that tokenizes was killed .*smaller --num_proc"):
        tokenize(corpus, TextEncoder(tokenizer), tmp_path / "x", 2)


@pytest.mark.parametrize("num_proc", [1, 2])
def test_what_goes_wrong_in_a_process_is_said(corpus, tokenizer, tmp_path, small, num_proc):
    def encode(texts):
        raise UserError("this text is too odd")

    with pytest.raises(UserError, match="too odd"):
        tokenize(corpus, encode, tmp_path / "x", num_proc)


@pytest.mark.parametrize("step", ["pieces", "rows"])
def test_a_full_disk_is_a_sentence_and_keeps_the_pieces(corpus, tokenizer, tmp_path, small, monkeypatch, step):
    """/dev/full answers every write as a full disk does."""
    with monkeypatch.context() as patch:
        if step == "rows":
            patch.setattr(RowWriter, "_file", lambda *_: Path("/dev/full"))
        else:
            patch.setattr("seqloom.data.tokens.open", lambda *_: os.fdopen(os.open("/dev/full", os.O_WRONLY), "wb"), raising=False)
        with pytest.raises(UserError, match=r"the disk of .* is full: free some space"):
            build([Corpus("text", corpus)], tokenizer, "t", tmp_path / "set", Settings(32))
    assert os.listdir(tmp_path) == [".set.pieces"]
    assert len(list(tmp_path.glob(".set.pieces/*/*"))) == (corpus_pieces(corpus) if step == "rows" else 0)
    assert build([Corpus("text", corpus)], tokenizer, "t", tmp_path / "set", Settings(32))[1]


def test_two_at_once_are_refused(tmp_path):
    code = "import sys, fcntl; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"
    (tmp_path / "p").mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "p" / "lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        other.stdout.readline()
        with pytest.raises(UserError, match="another process prepares set: wait for it"), only_one(tmp_path / "p", Path("set")):
            pass
        other.stdin.close()
    with only_one(tmp_path / "p", Path("set")):
        pass
    assert not (tmp_path / "p").exists()


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_any_rising_choice_of_documents_is_read(tmp_path_factory, data):
    documents = data.draw(st.lists(st.lists(st.integers(-50, 50), max_size=5), min_size=1, max_size=20))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(documents)), max_size=3)))
    folder = tmp_path_factory.mktemp("tokens")
    bounds = [0, *cuts, len(documents)]
    for number, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
        half = (start + stop) // 2
        batches = [[np.array(ids, np.int32) for ids in documents[a:b]] for a, b in ((start, half), (half, stop))]
        write_tokens(folder / str(number), batches)
        assert holds(folder / str(number), stop - start) and not holds(folder / str(number), stop - start + 1)
    store = TokenStore([folder / str(number) for number in range(len(bounds) - 1)])
    chosen = sorted(data.draw(st.sets(st.integers(0, len(documents) - 1))))
    assert store.lengths.tolist() == [len(ids) for ids in documents]
    assert store.read(np.array(chosen, np.int64)).tolist() == [token for number in chosen for token in documents[number]]


def test_progress_is_lines_now_and_then(capsys, monkeypatch):
    clock = iter([0.0, 5.0, 11.0, 12.0, 30.0])
    monkeypatch.setattr("seqloom.data.progress.time.monotonic", lambda: next(clock))
    with progress("tokenize text", 1000, 200) as advance:
        for count in (100, 100, 100, 500):
            advance(count)
    assert capsys.readouterr().err == "tokenize text: 400 of 1,000 documents, about 33 s left\n"


def test_progress_is_a_bar_on_a_terminal(tmp_path):
    class Terminal:
        text = ""
        encoding = "utf-8"

        def isatty(self):
            return True

        def write(self, text):
            self.text += text

        def flush(self):
            pass

    terminal = Terminal()
    with progress("tokenize text", 10, 2, terminal) as advance:
        advance(8)
    assert "tokenize text" in terminal.text and "10.0/10.0" in terminal.text
