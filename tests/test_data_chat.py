"""Chats: tokens as the template writes them, labels on what the assistant says and nothing else, through packing in both ways."""

import json

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from seqloom.data.build import build
from seqloom.data.chat import ChatEncoder, check_messages, set_chat_template
from seqloom.data.corpora import Corpus, corpus_digest, load_corpus
from seqloom.data.loader import Loader, open_dataset
from seqloom.data.metadata import read_metadata
from seqloom.data.packing import IGNORED, pack_documents, pack_stream
from seqloom.data.pieces import tokenize
from seqloom.data.prepare import prepare
from seqloom.data.settings import Settings
from seqloom.data.tokenizer import train_tokenizer
from seqloom.errors import UserError

TURN = "{% for m in messages %}<{{ m['role'] }}>"
PLAIN = TURN + "{{ m['content'] }}</>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
TAGGED = (
    TURN
    + "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}</>{% endgeneration %}{% else %}{{ m['content'] }}</>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
LAST_ONLY = "{% for m in messages %}{% if loop.last %}{{ m['content'] }}{% else %}...{% endif %}{% endfor %}"
STRICT = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('begin with the user') }}{% endif %}" + PLAIN


def chat(*says):
    return [{"role": role, "content": content} for role, content in says]


CHATS = [
    chat(("system", "be brief"), ("user", "what is one and one"), ("assistant", "two"), ("user", "sure?"), ("assistant", "yes, two")),
    chat(("user", "hello"), ("assistant", "hello to you")),
    [],
    chat(("user", "nobody answers")),
    *(chat(("user", f"say {i}"), ("assistant", f"{i} it is " * i)) for i in range(1, 12)),
]


@pytest.fixture(scope="module")
def corpus():
    return Corpus("talk", Dataset.from_dict({"messages": CHATS}), "messages")


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return train_tokenizer([corpus.documents], 320)


def with_template(tokenizer, template):
    tokenizer.chat_template = template
    return tokenizer


def spoken(tokenizer, tokens):
    """The text of a chat, and the part of it that counts: the rest of each stretch is a `|`."""
    text, said = "", ""
    for token in tokens.tolist():
        text += tokenizer.decode([token if token >= 0 else ~token])
        said += tokenizer.decode([token]) if token >= 0 else "" if said.endswith("|") else "|"
    return text, said


@pytest.mark.parametrize("template", [PLAIN, TAGGED])
def test_only_what_the_assistant_says_counts(tokenizer, template):
    found = ChatEncoder(with_template(tokenizer, template), "assistant", "talk")(CHATS)
    assert spoken(tokenizer, found[0]) == (
        "<system>be brief</><user>what is one and one</><assistant>two</><user>sure?</><assistant>yes, two</>",
        "|two</>|yes, two</>",
    )
    assert spoken(tokenizer, found[1])[1] == "|hello to you</>"
    assert len(found[2]) == 0 and spoken(tokenizer, found[3])[1] == "|"
    everything = ChatEncoder(tokenizer, "all", "talk")(CHATS)
    for some, every in zip(found, everything, strict=True):
        assert np.where(some < 0, ~some, some).tolist() == every.tolist() and some.dtype == every.dtype == np.int32


words = st.text(alphabet="ab <>/\n漢", max_size=8)
chats = st.lists(
    st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), words), min_size=1, max_size=5), min_size=1, max_size=3
)


@settings(deadline=None, max_examples=60)
@given(chats)
def test_prefixes_and_tags_agree_on_any_chat(tokenizer, lists):
    """On any texts, also where tokens reach over the border of what is said, both ways count the same tokens."""
    lists = [chat(*says) for says in lists]
    plain = ChatEncoder(with_template(tokenizer, PLAIN), "assistant", "talk")(lists)
    tagged = ChatEncoder(with_template(tokenizer, TAGGED), "assistant", "talk")(lists)
    assert [tokens.tolist() for tokens in plain] == [tokens.tolist() for tokens in tagged]


def test_a_template_that_does_not_write_from_front_to_end_is_refused(tokenizer):
    encode = ChatEncoder(with_template(tokenizer, LAST_ONLY), "assistant", "talk")
    with pytest.raises(UserError, match=r"beginning of a chat of talk otherwise than the whole \(at message 3 of 5\).*generation.*all"):
        encode(CHATS[:1])
    assert len(ChatEncoder(tokenizer, "all", "talk")(CHATS[:1])[0])


def test_a_template_that_refuses_a_chat_is_a_sentence(tokenizer):
    with pytest.raises(UserError, match=r"cannot write a chat of talk \(begin with the user; the first one has system, user"):
        ChatEncoder(with_template(tokenizer, STRICT), "assistant", "talk")(CHATS[:1])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "holds values of type str, not chats"),
        (["hello"], "holds lists of str, not chats"),
        ([{"from": "human", "value": "x"}], r"a message without a `role` that is a string \(it has from, value\)"),
        ([{"role": "user", "content": None}], r"without a `content` that is a string \(it has role\)"),
        ([{"role": "user", "content": [{"text": "x"}]}], "without a `content` that is a string"),
    ],
)
def test_what_is_no_chat_is_named(messages, message):
    with pytest.raises(UserError, match=f"talk .*{message}.*--chat_column"):
        check_messages(messages, "talk")


def test_columns_that_are_missing_or_hold_something_else(tmp_path):
    Dataset.from_dict({"conversation": CHATS, "text": ["x"] * len(CHATS), "id": list(range(len(CHATS)))}).save_to_disk(tmp_path / "set")
    name = str(tmp_path / "set")
    assert load_corpus(name, "conversation", chat=True)["messages"][:] == CHATS
    with pytest.raises(UserError, match="no column `conversations` but conversation, text, id: did you mean --chat_column conversation?"):
        load_corpus(name, "conversations", chat=True)
    with pytest.raises(UserError, match="no column `zzz` but .*: name the one that holds the documents as --text_column"):
        load_corpus(name, "zzz")
    with pytest.raises(UserError, match="the column `text` of .* holds values of type str, not chats"):
        load_corpus(name, "text", chat=True)
    with pytest.raises(UserError, match="the column `conversation` of .* holds lists, not strings.*--chat_column"):
        load_corpus(name, "conversation")
    with pytest.raises(UserError, match="the column `id` of .* holds .*int64.*, not strings"):
        load_corpus(name, "id")


@settings(deadline=None, max_examples=60)
@given(
    documents=st.lists(st.lists(st.tuples(st.integers(0, 50), st.booleans()), min_size=1, max_size=9), min_size=1, max_size=8),
    seq_len=st.integers(1, 12),
)
def test_the_mask_survives_packing(documents, seq_len):
    """Every token is an input; it is a label where it counts and, packed by documents, does not begin one."""
    pieces = [np.array([token if counts else ~token for token, counts in document], np.int32) for document in documents]
    tokens = [token for document in documents for token, _ in document]
    counts = [counts for document in documents for _, counts in document]
    begins = [index == 0 for document in documents for index in range(len(document))]
    ends = [np.array([len(piece)]) for piece in pieces]
    for rows, split in (
        (list(pack_stream(pieces, seq_len, 7)), False),
        (list(pack_documents(zip(pieces, ends, strict=True), seq_len, 7)), True),
    ):
        input_ids, labels = (np.concatenate([block[i].reshape(-1) for block in rows]) for i in (0, 1))
        following = zip(tokens[1:], counts[1:], begins[1:], strict=True)
        expected = [token if count and not (split and begin) else IGNORED for token, count, begin in following]
        assert input_ids[: len(tokens)].tolist() == tokens and input_ids.dtype == labels.dtype == np.int32
        assert labels.tolist() == expected + [IGNORED] * (len(labels) - len(expected))


@pytest.mark.parametrize("pack", ["documents", "stream"])
def test_from_chats_to_micro_batches(corpus, tokenizer, tmp_path, pack):
    """In any order of any epoch a token is a label if, and only if, the assistant says it; no chat is lost."""
    with_template(tokenizer, TAGGED)
    metadata, _ = build([corpus], tokenizer, "t", tmp_path / "set", Settings(24, pack, validation=0.2))
    read = [ChatEncoder(tokenizer, "assistant", "talk")([one])[0].tolist() for one in CHATS]
    for folder in (tmp_path / "set", tmp_path / "set" / "validation"):
        data = open_dataset(folder)
        loader, seen = Loader(data, 0, 1, 0, 1, 1, 1), {}
        for _ in range(data.rows):
            batch = loader.next_step()[0]
            seen[tuple(batch["input_ids"][0].tolist())] = batch["labels"][0].tolist()
        ids, labels = (array.reshape(-1).tolist() for array in data.read(np.arange(data.rows)))
        assert all(seen[tuple(ids[row * 24 : row * 24 + 24])] == labels[row * 24 : row * 24 + 24] for row in range(data.rows))
        marked = [token if label == token else ~token for token, label in zip(ids, [IGNORED, *labels], strict=False)]
        marked = marked[: data.metadata.tokens]
        while marked:
            (first,) = [tokens for tokens in read if tokens and marked[: len(tokens)] == tokens]
            read.remove(first)
            del marked[: len(first)]
    assert (
        read == [[]]
        and metadata.chat_labels == "assistant"
        and metadata.labels
        == sum(label != IGNORED for row in open_dataset(tmp_path / "set").read(np.arange(metadata.rows))[1] for label in row)
    )


def test_processes_and_threads_read_the_same_chats(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("seqloom.data.pieces.MIN_BYTES", 200)
    talk = Dataset.from_dict({"messages": CHATS * 3})
    encode = ChatEncoder(with_template(tokenizer, PLAIN), "assistant", "talk")
    one, two = (tokenize(talk, encode, tmp_path / str(count), count) for count in (1, 2))
    assert len(list((tmp_path / "2").iterdir())) > 4
    assert one.read(np.arange(len(talk))).tolist() == two.read(np.arange(len(talk))).tolist()


def test_a_tokenizer_without_places_of_tokens_is_refused(tokenizer):
    class Slow:
        is_fast = False

    with pytest.raises(UserError, match="written in Python.*--chat_labels all"):
        ChatEncoder(Slow(), "assistant", "talk")(CHATS[:1])


def test_a_tokenizer_that_would_cut_texts_does_not(corpus, tokenizer, tmp_path):
    its = train_tokenizer([corpus.documents], 300)
    its.backend_tokenizer.enable_truncation(3)
    its.backend_tokenizer.enable_padding(length=10)
    texts = Corpus("x", Dataset.from_dict({"text": ["a much longer text than three tokens", "b"]}))
    made, _ = build([texts], its, "t", tmp_path / "set", Settings(8))
    assert made.tokens == sum(len(train_tokenizer([corpus.documents], 300)(text)["input_ids"]) + 1 for text in texts.documents["text"])


def test_other_labels_or_templates_are_another_data_set(corpus, tokenizer, tmp_path):
    first, _ = build([corpus], with_template(tokenizer, PLAIN), "t", tmp_path / "set", Settings(24))
    assert build([corpus], tokenizer, "t", tmp_path / "set", Settings(24)) == (first, False)
    with pytest.raises(UserError, match="made with --chat_labels assistant there, not all"):
        build([corpus], tokenizer, "t", tmp_path / "set", Settings(24, chat_labels="all"))
    with pytest.raises(UserError, match="made with another chat template there"):
        build([corpus], with_template(tokenizer, TAGGED), "t", tmp_path / "set", Settings(24))
    assert read_metadata(tmp_path / "set").parts[0].chat


def test_chats_in_which_nobody_answers(tokenizer, tmp_path):
    silent = Corpus("talk", Dataset.from_dict({"messages": [chat(("human", "x"), ("gpt", "y"))] * 3}), "messages")
    with pytest.raises(UserError, match="no label of talk counts: its chats need messages of the role `assistant`"):
        build([silent], with_template(tokenizer, PLAIN), "t", tmp_path / "set", Settings(24))


def test_digests_tell_chats_apart():
    one, two = ([chat(("user", "a"), ("assistant", "b"))], [chat(("user", "a"), ("user", "b"))])
    assert corpus_digest(Dataset.from_dict({"messages": one})) != corpus_digest(Dataset.from_dict({"messages": two}))


def test_templates_that_cannot_be_used(tokenizer, tmp_path):
    bad = tmp_path / "bad.jinja"
    bad.write_text("{% for m in %}")
    with pytest.raises(UserError, match="cannot read the chat template .*gone"):
        set_chat_template(tokenizer, str(tmp_path / "gone"))
    with pytest.raises(UserError, match="bad.jinja is no Jinja template"):
        set_chat_template(tokenizer, str(bad))
    with pytest.raises(UserError, match="has no chat template .*--chat_template FILE"):
        set_chat_template(with_template(tokenizer, None), None)


def test_chats_and_texts_from_the_command_line(tmp_path):
    (tmp_path / "talk.jsonl").write_text("".join(json.dumps({"conv": one}) + "\n" for one in CHATS))
    (tmp_path / "template.jinja").write_text(PLAIN)
    (tmp_path / "a.txt").write_text("plain words " * 30)
    names, target = [str(tmp_path / "talk.jsonl"), str(tmp_path / "a.txt")], str(tmp_path / "set")
    template = str(tmp_path / "template.jinja")
    with pytest.raises(UserError, match="--chat_labels and --chat_template say how chats are read"):
        prepare(names[1], "train:300", target, 16, chat_template=template)
    with pytest.raises(UserError, match="--chat_column has 3 names for 2 corpora"):
        prepare(names, "train:300", target, 16, chat_column=("a", "b", "c"))
    with pytest.raises(UserError, match="the tokenizer has no chat template"):
        prepare(names[0], "train:300", target, 16, chat_column="conv")
    metadata, _ = prepare(names, "train:300", target, 16, chat_column=("conv", "-"), chat_template=template)
    assert [(part.chat, part.column) for part in metadata.parts] == [(True, "conv"), (False, "text")]
    assert open_dataset(target).rows == metadata.rows
    assert "</>" in (tmp_path / "set" / "tokenizer" / "chat_template.jinja").read_text()
