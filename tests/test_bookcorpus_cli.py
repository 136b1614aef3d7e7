"""bookcorpus.py from its command line: the documented flags, what it prints, and every mistake as one sentence."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import bookcorpus
from seqloom.data.loader import open_dataset
from seqloom.data.prepare import prepare
from seqloom.errors import UserError

SCRIPT = Path(bookcorpus.__file__)


def cli(*flags, cwd=None):
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, flags)], cwd=cwd, capture_output=True, text=True, timeout=200)


def call(monkeypatch, *flags):
    """The script within this process, without the start of an interpreter."""
    monkeypatch.setattr(sys, "argv", ["bookcorpus.py", *map(str, flags)])
    with pytest.raises(SystemExit) as stop:
        bookcorpus.run(bookcorpus.main)
    return stop.value.code


def flags_of(**values):
    return [part for name, value in values.items() for part in (f"--{name}", value)]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {i} says a few words and no more\n"}) + "\n" for i in range(50)))
    return path


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("seqloom.data.hub.hub_reachable", lambda: False)


def test_stdlib_from_any_folder(tmp_path):
    done = cli(
        *flags_of(data_path_or_name="stdlib", tokenizer_path_or_name="train:400", save_path="./set", sequence_length=128, max_documents=20),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    dataset = open_dataset(tmp_path / "set", seq_len=128)
    assert dataset.metadata.documents == 20 and dataset.vocab_size == 400
    assert f"{dataset.rows:,} rows of 128 tokens, vocabulary 400" in done.stdout
    dataset.check_vocab(400)


def test_dashes_and_underscores_are_the_same(monkeypatch, text, tmp_path):
    for i, names in enumerate((("data_path_or_name", "save_path"), ("data-path-or-name", "save-path"))):
        values = {names[0]: text, "tokenizer_path_or_name": "train:300", names[1]: tmp_path / str(i), "sequence-length": "16"}
        assert call(monkeypatch, *flags_of(**values)) == 0
    assert open_dataset(tmp_path / "0").metadata == open_dataset(tmp_path / "1").metadata


def test_again_refuse_overwrite(monkeypatch, text, tmp_path, capsys):
    base = flags_of(data_path_or_name=text, tokenizer_path_or_name="train:300", save_path=tmp_path / "set")
    assert call(monkeypatch, *base, "--sequence_length", 16) == 0
    assert call(monkeypatch, *base, "--sequence_length", 16) == 0
    assert "already there" in capsys.readouterr().out
    assert call(monkeypatch, *base, "--sequence_length", 32) == 2
    assert "pass --overwrite" in capsys.readouterr().err
    assert call(monkeypatch, *base, "--sequence_length=32", "--overwrite") == 0
    assert open_dataset(tmp_path / "set").seq_len == 32


def test_pack_by_documents_and_by_stream(monkeypatch, text, tmp_path, capsys):
    base = flags_of(data_path_or_name=text, tokenizer_path_or_name="train:300", sequence_length=64)
    for pack in ("documents", "stream"):
        assert call(monkeypatch, *base, "--save_path", tmp_path / pack, "--pack", pack) == 0
    said = capsys.readouterr().out
    found = {pack: open_dataset(tmp_path / pack).metadata for pack in ("documents", "stream")}
    assert [found[pack].pack for pack in found] == list(found) and found["documents"].tokens == found["stream"].tokens
    lengths = found["documents"].typical_row
    assert len(lengths) > 1 and said.count("packed by documents") == 1
    assert f"  packed by documents: {len(lengths)} in a typical row, the longest of {max(lengths)} tokens\n" in said


def test_the_other_way_of_packing_is_refused_without_overwrite(monkeypatch, text, tmp_path, capsys):
    base = flags_of(data_path_or_name=text, tokenizer_path_or_name="train:300", save_path=tmp_path / "set", sequence_length=16)
    assert call(monkeypatch, *base, "--pack", "stream") == 0
    assert call(monkeypatch, *base, "--pack", "documents") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and "made with --pack stream there, not documents" in error and "--overwrite" in error
    assert call(monkeypatch, *base, "--pack", "documents", "--overwrite") == 0
    assert open_dataset(tmp_path / "set").metadata.pack == "documents"


@pytest.mark.parametrize("pack", ["documents", "stream"])
def test_a_share_of_the_documents_is_kept_for_evaluation(monkeypatch, text, tmp_path, capsys, pack):
    """Every document lies in one of the two data sets; the same command finds them again, another share is refused."""
    target = tmp_path / "packed"
    flags = flags_of(data_path_or_name=text, tokenizer_path_or_name="train:300", save_path=target, sequence_length=32, pack=pack)
    assert call(monkeypatch, *flags, "--validation", 0.1) == 0
    assert "  kept for evaluation: 5 documents, " in capsys.readouterr().out
    found = [documents_of(target), documents_of(target / "validation")]
    assert [len(part) for part in found] == [45, 5] and len(found[0] | found[1]) == 50
    assert open_dataset(target).metadata.tokenizer_digest == open_dataset(target / "validation").metadata.tokenizer_digest
    assert call(monkeypatch, *flags, "--validation", 0.1) == 0
    assert "already there" in capsys.readouterr().out
    assert call(monkeypatch, *flags) == 2
    assert "made with --validation 0.1 there, not 0" in capsys.readouterr().err


def documents_of(folder):
    """The documents of a data set as text."""
    from transformers import AutoTokenizer

    data = open_dataset(folder)
    tokenizer = AutoTokenizer.from_pretrained(data.tokenizer_path)
    stream = data.read(range(data.rows))[0].reshape(-1)[: data.metadata.tokens]
    return set(tokenizer.decode(stream).split(tokenizer.eos_token)) - {""}


def test_a_corpus_of_one_document_cannot_be_split(monkeypatch, tmp_path, capsys):
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": "a single document " * 20}) + "\n")
    flags = flags_of(data_path_or_name=tmp_path / "one.jsonl", tokenizer_path_or_name="train:300", save_path=tmp_path / "out")
    assert call(monkeypatch, *flags, "--sequence_length", 32, "--validation", 0.5) == 2
    assert "the corpus has a single one" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_unknown_way_of_packing_names_the_known_ones(monkeypatch, text, tmp_path, capsys):
    base = flags_of(data_path_or_name=text, tokenizer_path_or_name="train:300", save_path=tmp_path / "set", sequence_length=16)
    assert call(monkeypatch, *base, "--pack", "sentences") == 2
    captured = capsys.readouterr()
    said = captured.out + captured.err
    assert "sentences" in said and "stream" in said and "documents" in said and not (tmp_path / "set").exists()


def test_changed_text_is_noticed(monkeypatch, text, tmp_path, capsys):
    base = flags_of(data_path_or_name=text, tokenizer_path_or_name="train:300", save_path=tmp_path / "set", sequence_length=16)
    assert call(monkeypatch, *base) == 0
    text.write_text(text.read_text() + '{"text": "one more"}\n')
    assert call(monkeypatch, *base) == 2
    assert "holds other documents or rules now" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_length": 0}, "--sequence_length is 0"),
        ({"num_proc": 0}, "--num_proc is 0"),
        ({"max_documents": 0}, "--max_documents is 0"),
        ({"tokenizer_path_or_name": "train:ten"}, "train:ten does not give a vocabulary size"),
        ({"data_path_or_name": "./gone"}, "there is no data folder or file ./gone"),
        ({"data_path_or_name": "nobody/nothing"}, "cannot load the data set nobody/nothing"),
        ({"save_path": "FILE/set"}, "cannot write to"),
        ({"save_path": "OTHER"}, "holds something else"),
    ],
)
def test_mistakes_are_one_sentence(monkeypatch, text, tmp_path, capsys, changes, message):
    (tmp_path / "FILE").write_text("")
    (tmp_path / "OTHER").mkdir()
    (tmp_path / "OTHER" / "notes").write_text("")
    values = {"data_path_or_name": text, "tokenizer_path_or_name": "train:300", "save_path": "set", "sequence_length": 16, **changes}
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, *flags_of(**values)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "set").exists()


def test_bad_output_is_found_before_the_work(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("seqloom.data.prepare.load_corpus", lambda _: pytest.fail("read the corpus first"))
    with pytest.raises(UserError, match="cannot write to"):
        prepare("stdlib", "train:300", str(tmp_path / "file" / "set"), 16)


def test_a_look_at_what_is_there(monkeypatch, text, tmp_path, capsys):
    flags = flags_of(data_path_or_name=text, tokenizer_path_or_name="train:300", save_path=tmp_path / "set", sequence_length=64)
    assert call(monkeypatch, *flags) == 0
    capsys.readouterr()
    for inspect, rows in ((("--inspect",), 3), (("--inspect", 1), 1), (("--inspect=2",), 2)):
        assert call(monkeypatch, "--save_path", tmp_path / "set", *inspect) == 0
        said = capsys.readouterr().out
        assert said.count("\nrow ") == rows and "labels that count" in said
    assert call(monkeypatch, "--inspect", "--save_path", tmp_path / "set") == 0
    assert call(monkeypatch, "--inspect", "--save_path", tmp_path / "gone") == 2
    assert "error: there is no data set" in capsys.readouterr().err


def test_a_blend_is_described(monkeypatch, text, tmp_path, capsys):
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"body": f"{i} others say more about it\n"}) + "\n" for i in range(50)))
    flags = [
        "--data_path_or_name",
        text,
        other,
        "--text_column",
        "text",
        "body",
        "--weights",
        3,
        1,
        "--tokenizer_path_or_name",
        "train:300",
    ]
    assert call(monkeypatch, *flags, "--save_path", tmp_path / "set", "--sequence_length", 32) == 0
    said = capsys.readouterr().out
    assert f"% from {text}: 50 documents" in said and "documents left unused" in said
    assert call(monkeypatch, *flags, "--weights", 1, 1, 1, "--save_path", tmp_path / "x", "--sequence_length", 32) == 2
    assert "--weights has 3 numbers for 2 corpora" in capsys.readouterr().err


def test_help_and_missing_flags_are_quick_and_need_no_torch():
    code = f"import sys, runpy; sys.argv = ['bookcorpus.py', '--help']\ntry: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    code += "finally: print([m for m in ('torch', 'datasets', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=SCRIPT.parent)
    assert done.returncode == 0 and done.stdout.strip().endswith("[]") and "train:4096" in done.stdout
    missing = cli("--save_path", "x")
    assert missing.returncode == 2 and "Traceback" not in missing.stderr


def test_debug_shows_the_traceback(tmp_path):
    base = flags_of(data_path_or_name="./gone", tokenizer_path_or_name="train:300", save_path=tmp_path / "set", sequence_length=16)
    assert "Traceback" in cli("--debug", *base).stderr
    plain = cli(*base)
    assert plain.returncode == 2 and "Traceback" not in plain.stderr
