"""Blends: every stretch has the asked shares, no document is used twice, and the order depends on nothing but lengths and weights."""

import json

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from seqloom.data.blend import blend, check_weights
from seqloom.data.build import build
from seqloom.data.corpora import Corpus
from seqloom.data.loader import Loader, open_dataset
from seqloom.data.metadata import read_metadata
from seqloom.data.prepare import prepare
from seqloom.data.settings import Settings
from seqloom.data.split import held_out
from seqloom.data.tokenizer import train_tokenizer
from seqloom.errors import UserError

NAMES = ("books", "code", "news")
corpora = st.lists(st.lists(st.integers(0, 30), max_size=40), min_size=1, max_size=3)


def arrays(corpora):
    return [np.array(lengths, np.int32) for lengths in corpora]


@given(corpora)
def test_without_weights_all_documents_are_used_once_and_interleaved(corpora):
    lengths = arrays(corpora)
    order = blend(lengths, (), NAMES[: len(lengths)])
    total = sum(tokens.sum() for tokens in lengths)
    for corpus, tokens in enumerate(lengths):
        mine = order.corpora == corpus
        assert order.documents[mine].tolist() == np.flatnonzero(tokens).tolist()
        so_far = np.cumsum([lengths[c][d] for c, d in zip(order.corpora, order.documents, strict=True)])
        given_out = np.cumsum(np.where(mine, [lengths[c][d] for c, d in zip(order.corpora, order.documents, strict=True)], 0))
        assert np.abs(given_out - so_far * tokens.sum() / max(total, 1)).max(initial=0) <= 30 * len(lengths)


positive = st.lists(st.lists(st.integers(1, 9), min_size=20, max_size=60), min_size=2, max_size=3)


@given(positive, st.lists(st.floats(0.5, 8), min_size=3, max_size=3))
def test_any_stretch_has_the_asked_shares_until_a_corpus_runs_out(corpora, weights):
    lengths, weights = arrays(corpora), weights[: len(corpora)]
    order = blend(lengths, weights, NAMES[: len(lengths)])
    sizes = np.array([lengths[c][d] for c, d in zip(order.corpora, order.documents, strict=True)])
    shares = np.array(weights) / sum(weights)
    taken = np.array([np.where(order.corpora == corpus, sizes, 0).cumsum() for corpus in range(len(lengths))])
    off = np.abs(taken - shares[:, None] * taken.sum(0))
    assert off.max() <= 9 * len(lengths)  # every stretch is a difference of two of these: off by twice as much at most
    used = [int((order.corpora == corpus).sum()) for corpus in range(len(lengths))]
    assert any(count == len(tokens) for count, tokens in zip(used, lengths, strict=True))
    for corpus, count in enumerate(used):
        assert order.documents[order.corpora == corpus].tolist() == list(range(count))
    assert blend(lengths, [weight * 3 for weight in weights], NAMES).documents.tolist() == order.documents.tolist()


def test_one_corpus_keeps_its_order_and_drops_what_is_empty():
    assert blend(arrays([[3, 0, 2]]), (0.3,), NAMES[:1]).documents.tolist() == [0, 2]


def test_weights_that_cannot_be():
    with pytest.raises(UserError, match=r"--weights has 2 numbers for 3 corpora \(books, code, news\)"):
        check_weights((1, 2), NAMES)
    for bad in (0, -1, float("nan"), float("inf")):
        with pytest.raises(UserError, match="--weights gives code"):
            check_weights((1, bad), NAMES[:2])
    with pytest.raises(UserError, match="code has no tokens to blend"):
        blend(arrays([[3], [0]]), (1, 1), NAMES[:2])
    with pytest.raises(UserError, match="ends where books runs out, with room for 11 tokens of code"):
        blend(arrays([[5] * 20, [1000, 1]]), (0.9, 0.1), NAMES[:2])


@given(st.lists(st.integers(2, 50), min_size=1, max_size=3), st.floats(0.01, 0.9))
def test_every_corpus_gives_its_share_to_evaluate_on(counts, share):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    chosen = held_out(labels, share)
    assert [int(chosen[labels == corpus].sum()) for corpus in range(len(counts))] == [
        min(max(1, round(share * count)), count - 1) for count in counts
    ]
    assert (chosen == held_out(labels, share)).all() and not held_out(labels, 0).any()


def documents(name, count, words):
    return Dataset.from_dict({"text": [f"{name}-{i:03d} " + "word " * (i * 7 % words) for i in range(count)]})


@pytest.fixture(scope="module")
def sources():
    return [Corpus("books", documents("books", 90, 20)), Corpus("code", documents("code", 60, 9))]


@pytest.fixture(scope="module")
def tokenizer(sources):
    return train_tokenizer([source.documents for source in sources], 300)


@pytest.fixture(scope="module", params=["documents", "stream"])
def blended(request, sources, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("blend") / "set"
    build(sources, tokenizer, "train:300", path, Settings(32, request.param, validation=0.1, weights=(0.5, 0.5)))
    return path


def texts(path, tokenizer):
    data = open_dataset(path)
    stream = data.read(np.arange(data.rows))[0].reshape(-1)[: data.metadata.tokens]
    return [text for text in tokenizer.decode(stream).split(tokenizer.eos_token) if text]


def test_a_blended_data_set_says_what_it_holds(blended, sources, tokenizer):
    training, validation = texts(blended, tokenizer), texts(blended / "validation", tokenizer)
    metadata, kept = read_metadata(blended), read_metadata(blended / "validation")
    assert len(set(training + validation)) == len(training) + len(validation) == metadata.documents + kept.documents
    everything = set(sources[0].documents["text"]) | set(sources[1].documents["text"])
    assert set(training + validation) <= everything and len(everything) == 150
    for number, part in enumerate(metadata.parts):
        mine = [text for text in training if text.startswith(part.name)]
        assert mine == sorted(mine) and len(mine) == part.documents and part.name == sources[number].name
        assert part.tokens == sum(len(tokenizer(text)["input_ids"]) + 1 for text in mine)
        assert part.documents + part.unused + kept.parts[number].documents == len(sources[number].documents)
        assert abs(part.tokens / metadata.tokens - 0.5) < 0.03 and part.digest == sources[number].digest
    assert min(part.unused for part in metadata.parts) == 0 < max(part.unused for part in metadata.parts)
    third = training[len(training) // 3 : 2 * len(training) // 3]  # interleaved, not one after the other
    assert 0.3 < sum(len(text) for text in third if text.startswith("code")) / sum(map(len, third)) < 0.7


@settings(deadline=None, max_examples=4)
@given(split=st.sampled_from([(1, 1, 6), (2, 3, 1), (3, 1, 2), (6, 1, 1)]), after=st.sampled_from([(1, 6, 1), (3, 2, 1)]))
@pytest.mark.parametrize("inside", [".", "validation"])
def test_an_epoch_of_a_blend_has_every_row_once_whoever_reads_it(blended, inside, split, after):
    """Two epochs read by some scale units and, from a point in the middle, by others: as one unit reads them, each row once an epoch."""
    data = open_dataset(blended / inside)
    steps = -(-2 * data.rows // 6)
    first, state = rows_read(data, split, steps // 2, None)
    second, _ = rows_read(data, after, steps - steps // 2, json.loads(json.dumps(state)))
    seen = first + second
    assert seen == rows_read(data, (1, 1, 6), steps, None)[0]
    rows = [tuple(row) for row in data.read(np.arange(data.rows))[0].tolist()]
    for epoch in range(2):
        assert sorted(seen[epoch * data.rows : (epoch + 1) * data.rows]) == sorted(rows)


def rows_read(data, split, steps, state):
    units, micro, accumulation = split
    loaders = [Loader(data, 3, 6, unit, units, micro, accumulation) for unit in range(units)]
    for loader in loaders:
        loader.load_state_dict(state or loader.state_dict())
    found = []
    for _ in range(steps):
        found += [tuple(row) for loader in loaders for batch in loader.next_step() for row in batch["input_ids"].tolist()]
    return found, loaders[0].state_dict()


def test_other_weights_or_corpora_are_another_data_set(blended, sources, tokenizer):
    made = read_metadata(blended)
    again = Settings(32, made.pack, validation=0.1, weights=(0.5, 0.5))
    assert build(sources, tokenizer, "train:300", blended, again) == (made, False)
    with pytest.raises(UserError, match=r"made with --weights 0.5 0.5 there, not 0.6 0.4\): pass --overwrite"):
        build(sources, tokenizer, "train:300", blended, Settings(32, made.pack, validation=0.1, weights=(0.6, 0.4)))
    with pytest.raises(UserError, match="made with --weights 0.5 0.5 there, not none"):
        build(sources, tokenizer, "train:300", blended, Settings(32, made.pack, validation=0.1))
    with pytest.raises(UserError, match=r"corpus is books \+ code there, not code \+ books"):
        build(sources[::-1], tokenizer, "train:300", blended, again)
    changed = [sources[0], Corpus("code", documents("code", 61, 9))]
    with pytest.raises(UserError, match=r"corpus books \+ code holds other documents or rules now"):
        build(changed, tokenizer, "train:300", blended, again)


def test_a_name_with_commas_is_one_corpus(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text(f"the file {name} " * 20)
    names = (f"{tmp_path}/a.txt,{tmp_path}/b.txt", f"{tmp_path}/c.txt")
    metadata, _ = prepare(names, "train:300", str(tmp_path / "set"), 16)
    assert [part.documents for part in metadata.parts] == [2, 1] and [part.name for part in metadata.parts] == list(names)
