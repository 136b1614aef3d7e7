"""A captured model written as JSON comes back equal in every value, type and order, or not at all."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import FAMILIES

from seqloom.annotation import Annotation, Bound
from seqloom.capture import Captured, capture
from seqloom.capture.graph_json import captured_from_json, captured_to_json
from seqloom.graph import Graph, GraphError, Node, Ref, Value

WORDS = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn, torch.strided, torch.channels_last]


@functools.cache
def tiny(family: str, dtype: torch.dtype = torch.bfloat16) -> Captured:
    return capture(FAMILIES[family](3), batch_size=2, seq_len=16, dtype=dtype)


def there_and_back(captured: Captured) -> Captured:
    """Through text, as in a file."""
    return captured_from_json(json.loads(json.dumps(captured_to_json(captured), allow_nan=False)))


def anatomy(tree: Any) -> Any:
    """A tree with the type of everything in it and the order of mappings, which `==` does not look at; NaN is itself."""
    if dataclasses.is_dataclass(tree):
        return type(tree), [anatomy(getattr(tree, field.name)) for field in dataclasses.fields(tree)]
    if isinstance(tree, Mapping):
        return "mapping", [(key, anatomy(value)) for key, value in tree.items()]
    if isinstance(tree, (tuple, list)):
        return type(tree), [anatomy(item) for item in tree]
    if isinstance(tree, frozenset):
        return frozenset, sorted(tree)
    return type(tree), repr(tree) if isinstance(tree, float) else tree


def with_argument(*args: Any, kwargs: tuple[tuple[str, Any], ...] = (), bound: Bound | None = None) -> Captured:
    """A model of one operator `x -> y` that has these arguments too."""
    values = {"x": Value("x", (2, 6), torch.float32, "input"), "y": Value("y", (2, 6), torch.float32)}
    bound = bound or Annotation.parse("b d -> b d").bind([(2, 6)])
    node = Node("aten.thing.default", (Ref("x"), *args), kwargs, ("y",), bound, "layers.0", "Thing")
    return Captured(Graph("Model", values, (node,), ("x",), ("y",)), {}, "Model", 0)


# --- captured models -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_comes_back_as_it_was(family):
    captured = tiny(family)
    loaded = there_and_back(captured)
    assert loaded == captured
    assert anatomy(loaded) == anatomy(captured)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_dtype_of_a_model_comes_back(dtype):
    captured = tiny("llama", dtype)
    assert anatomy(there_and_back(captured)) == anatomy(captured)


def test_the_same_model_gives_the_same_text():
    first, again = (json.dumps(captured_to_json(c)) for c in (tiny("gemma2"), there_and_back(tiny("gemma2"))))
    assert first == again
    (block, *_) = captured_to_json(tiny("gemma2"))["graph"]["blocks"].values()
    sets = [node["bound"]["frozen"] for node in block["nodes"]]
    assert any(len(names) > 1 for names in sets) and all(names == sorted(names) for names in sets)


def test_what_a_graph_answers_is_the_same():
    captured, loaded = tiny("llama_tied").graph, there_and_back(tiny("llama_tied")).graph
    assert list(loaded.parameters()) == list(captured.parameters()) and list(loaded.buffers()) == list(captured.buffers())
    for mine, its in zip((captured, *captured.blocks.values()), (loaded, *loaded.blocks.values()), strict=True):
        for node, twin in zip(mine.nodes, its.nodes, strict=True):
            assert twin.inputs == node.inputs
            assert node.bound is None or twin.bound.splits(nested=True) == node.bound.splits(nested=True)


# --- arguments, bounds and graphs at random --------------------------------------------------------------------------------------

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(WORDS) | st.just(Ref("x"))
ARGUMENTS = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=8)


def described(args: tuple[Any, ...], kwargs: tuple[tuple[str, Any], ...]) -> Captured:
    """`with_argument` with an annotation of as many inputs as there are Refs."""
    probe = with_argument(*args, kwargs=kwargs).graph.nodes[0]
    count = len(probe.inputs)
    bound = Annotation.parse(", ".join(["b d"] * count) + " -> b d").bind([(2, 6)] * count)
    return with_argument(*args, kwargs=kwargs, bound=bound)


@settings(deadline=None)
@given(st.lists(ARGUMENTS, max_size=3).map(tuple), st.lists(st.tuples(st.text(max_size=4), ARGUMENTS), max_size=2).map(tuple))
def test_arguments_come_back_with_their_types(args, kwargs):
    captured = described(args, kwargs)
    assert anatomy(there_and_back(captured)) == anatomy(captured)


@pytest.mark.parametrize("number", [0.1, -0.0, 1e-320, 1.0, math.pi * 1e300, math.inf, -math.inf, math.nan, 2**63 - 1, -(10**40), True, 1])
def test_numbers_lose_nothing(number):
    loaded = there_and_back(with_argument(number)).graph.nodes[0].args[1]
    assert (type(loaded), repr(loaded)) == (type(number), repr(number))


@pytest.mark.parametrize("text", ["", "torch.float32", '{"ref": "x"}', "inf", "ünï\n\0", "\ud800"])
def test_text_is_never_taken_for_something_else(text):
    assert there_and_back(with_argument(text, (text,))).graph.nodes[0].args == (Ref("x"), text, (text,))


NAMES = st.sampled_from(["b", "l", "d", "*0", "(h", "64"])
DIMS = st.lists(st.lists(NAMES, min_size=1, max_size=3).map(tuple), max_size=3).map(tuple)


@settings(deadline=None)
@given(
    st.builds(
        Bound,
        inputs=st.lists(st.none() | DIMS, max_size=3).map(tuple),
        outputs=st.lists(DIMS, max_size=2).map(tuple),
        named_sizes=st.lists(st.tuples(NAMES, st.integers(1, 2**40)), max_size=4).map(tuple),
        frozen=st.frozensets(NAMES),
        reduced=st.frozensets(NAMES),
        nested=st.lists(st.tuples(NAMES, st.lists(NAMES, max_size=2).map(tuple)), max_size=2).map(tuple),
    )
)
def test_bounds_come_back(bound):
    # A random bound describes no tensor, so it goes around the verifier inside a call of a block, whose bound nobody reads.
    block = Graph("Layer", {"a": Value("a", (2,), torch.float32, "input")}, (), ("a",), ("a",))
    values = {name: Value(name, (2,), torch.float32, kind) for name, kind in (("x", "input"), ("y", "activation"))}
    call = Node("block:Layer", (Ref("x"),), (), ("y",), bound, "layers.0", "Layer")
    captured = Captured(Graph("Model", values, (call,), ("x",), ("y",), {"Layer": block}), {"a": "b"}, "Model", 3)
    assert anatomy(there_and_back(captured)) == anatomy(captured)


# --- what is refused -------------------------------------------------------------------------------------------------------------


class Whole(int):
    """Prints like an int, and is none."""


@pytest.mark.parametrize("argument", [1j, [1], {"a": 1}, torch.device("cpu"), object(), Whole(3), slice(1), b"x", (1, (2, {3}))])
def test_an_argument_without_a_word_is_refused(argument):
    with pytest.raises(GraphError, match="cannot be written as JSON"):
        captured_to_json(with_argument(argument))


def test_loading_verifies_the_graph_and_its_blocks():
    document = captured_to_json(tiny("llama"))
    document["graph"]["values"][-1]["shape"] = [7]
    with pytest.raises(GraphError):
        captured_from_json(document)
    document = captured_to_json(tiny("llama"))
    (block,) = document["graph"]["blocks"].values()
    block["nodes"].reverse()
    with pytest.raises(GraphError, match="before its definition"):
        captured_from_json(document)


@pytest.mark.parametrize("word", ["load", "nn", "Tensor", "no_such_thing", "__name__"])
def test_only_dtypes_and_their_like_are_looked_up(word):
    document = captured_to_json(with_argument(torch.bfloat16))
    assert document["graph"]["nodes"][0]["args"][1] == {"torch": "bfloat16"}
    document["graph"]["nodes"][0]["args"][1] = {"torch": word}
    with pytest.raises((ValueError, AttributeError)):
        captured_from_json(document)


@pytest.mark.parametrize("argument", [{"pickle": "x"}, {}, {"ref": "x", "torch": "bool"}, {"float": "many"}])
def test_unknown_words_are_refused(argument):
    document = captured_to_json(with_argument(1))
    document["graph"]["nodes"][0]["args"][1] = argument
    with pytest.raises((KeyError, ValueError)):
        captured_from_json(document)


@pytest.mark.parametrize("field", ["graph", "tied", "model_class", "num_parameters"])
def test_a_missing_field_is_noticed(field):
    document = captured_to_json(with_argument(1))
    del document[field]
    with pytest.raises(KeyError, match=field):
        captured_from_json(document)
